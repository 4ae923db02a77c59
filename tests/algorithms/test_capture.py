"""An update reads no value on the host, has static shapes and addresses, and can be replayed: what
a CUDA graph's capture needs, here without a GPU.
"""

import gc
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cal_ql
import dare_cql
import dare_iql
import edis_cql
import edis_iql
import iql
import pex
from diffusion import BehaviorModel, train_behavior

S, A, B = 5, 2, 16
# Operators that wait for the device or whose result's shape depends on values.
FORBIDDEN = """_local_scalar_dense is_nonzero equal nonzero masked_select unique unique_dim _unique2
    unique_consecutive bincount repeat_interleave""".split()
AGENTS = {iql: "ImplicitQLearning", dare_iql: "ImplicitQLearning", pex: "ImplicitQLearning"}
AGENTS |= {cal_ql: "CalQL", dare_cql: "CalQL"}
AGENTS |= {edis_iql: "ImplicitQLearning", edis_cql: "CalQL"}
NAMES = [script.__name__ for script in AGENTS]


class Captured(TorchDispatchMode):
    """Fails at operators that a capture refuses, and notes the shapes of all results."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in FORBIDDEN:
            raise AssertionError(f"{name} waits for the device")
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            raise AssertionError("an index of truth values has a shape that depends on values")
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.shapes.append((name, tuple(result.shape)))
        return result


def agent_of(script, **settings):
    cfg = script.Config(env="hopper-medium-v2", hidden_dim=8, batch_size=B, **settings)
    torch.manual_seed(0)
    return getattr(script, AGENTS[script])(S, A, cfg, "cpu")


def batch_of(script, n=B, scale=1.0):
    columns = [torch.randn(n, S), torch.randn(n, A).tanh(), torch.randn(n), torch.randn(n, S)]
    columns = [scale * x for x in columns] + [torch.zeros(n), torch.zeros(n)]
    return script.Batch(*columns[: len(script.Batch._fields)])


def buffer_of(script, size, capacity):
    buffer = script.ReplayBuffer(S, A, capacity, "cpu")
    buffer.add(*batch_of(script, size))
    return buffer


def dare_of(script, path, **settings):
    """DARE as a run makes it, with an untrained behavior model."""
    settings |= {"behavior_iterations": 0, "behavior_width": 8, "energy_hidden": 8, "n_support": 4}
    settings |= {"energy_iterations": 2, "energy_batch_size": 8, "diffusion_steps": 3}
    agent = agent_of(script, runs_dir=str(path), **settings)
    agent.start_online()
    buffers = buffer_of(script, 20, 20), buffer_of(script, 20, 60)
    dare = script.DARE(agent.cfg, SimpleNamespace(stop=False), agent, *buffers)
    dare.prepare()
    return dare


def tensors_of(part):
    """All tensors that a part of a run keeps, gradients apart."""
    found = [x for x in vars(part).values() if isinstance(x, torch.Tensor)]
    for x in vars(part).values():
        if isinstance(x, torch.nn.Module):
            found += [*x.parameters(), *x.buffers()]
        elif isinstance(x, torch.optim.Optimizer):
            found += [y for state in x.state.values() for y in state.values()]
    return found


def captured(call):
    with Captured() as mode:
        call()
    return mode.shapes


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
        lambda x: float(x.mean()),
    ],
)
def test_the_check_itself_fails_where_it_should(operation):
    with pytest.raises(AssertionError), Captured():
        operation(torch.randn(5))


@pytest.mark.parametrize("script", AGENTS, ids=NAMES)
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_updates(script, online, precision):
    agent = agent_of(script, precision=precision)
    if online:
        agent.start_online()
    agent.update(batch_of(script))  # the optimizer makes its state in the first step
    addresses = [x.data_ptr() for x in tensors_of(agent)]
    with script.autocast(agent.cfg, "cpu"):
        shapes = [captured(lambda x=x: agent.update(batch_of(script, scale=x))) for x in (1.0, 9.0)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 50
    assert [x.data_ptr() for x in tensors_of(agent)] == addresses


@pytest.mark.parametrize("settings", [{"cql_lagrange": True, "cql_max_target_backup": True}])
def test_updates_of_antmaze(settings):
    agent = agent_of(cal_ql, **settings)
    agent.update(batch_of(cal_ql))
    captured(lambda: agent.update(batch_of(cal_ql)))


@pytest.mark.parametrize("kind", ["gaussian", "direct"])
@pytest.mark.parametrize(
    "reference", [{"guidance_scale": 0.0}, {"guidance_scale": 3.0}, {"reference": "resample"}]
)
@pytest.mark.parametrize("script", [dare_iql, dare_cql], ids=["dare_iql", "dare_cql"])
def test_a_pass_of_algorithm_1(tmp_path, script, kind, reference):
    dare = dare_of(script, tmp_path, exchange=kind, **reference)
    dare.update()
    addresses = [x.data_ptr() for x in tensors_of(dare)]
    halves = [batch_of(script, B // 2, scale) for scale in (1.0, 0.1)]
    shapes = [captured(lambda x=x: dare(*x)) for x in (halves, halves[::-1])]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 50
    shapes = [captured(dare.update) for _ in range(2)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 150
    assert [x.data_ptr() for x in tensors_of(dare)] == addresses


@pytest.mark.parametrize("script", [edis_iql, edis_cql], ids=["edis_iql", "edis_cql"])
def test_generating_transitions(script):
    agent = agent_of(script, model_width=8, model_depth=2, energy_hidden=8, n_denoising_steps=3)
    buffers = [script.ReplayBuffer(S, A, 30, "cpu") for _ in range(2)]
    for buffer in buffers:
        buffer.rows.normal_()
        buffer.size = 30
    edis = script.EDIS(agent.cfg, SimpleNamespace(stop=False), agent, *buffers)
    table = torch.cat([buffer.rows[:, : edis.n_columns + 1] for buffer in buffers]).sigmoid()
    rows = table[:, :-1]
    edis.model.set_statistics(rows)
    energies = [(energy, 1.0) for energy in edis.energies.values()]
    shapes = [captured(lambda: edis.generate(20, energies)) for _ in range(2)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 50


def test_sampling_a_batch():
    buffer = iql.ReplayBuffer(S, A, 30, "cpu")
    buffer.add(*batch_of(iql, 20))
    captured(lambda: buffer.sample(B))


@pytest.mark.parametrize("script", AGENTS, ids=NAMES)
@pytest.mark.parametrize("online", [False, True])
def test_losses_are_one_graph_for_the_compiler(script, online):
    """Traced without a break; the back end that runs the trace as it is needs no compiler."""
    results = []
    for compiled in (False, True):
        agent, batch = agent_of(script), batch_of_seed(script)
        if online:
            agent.start_online()
        losses = agent.losses
        if compiled:
            torch.compiler.reset()
            losses = torch.compile(losses, backend="eager", fullgraph=True)
        torch.manual_seed(1)
        loss, metrics = losses(batch)
        loss.backward()
        parameters = [p for group in agent.optimizer.param_groups for p in group["params"]]
        results.append((loss, metrics, [p.grad for p in parameters]))
    torch.testing.assert_close(*results)


def batch_of_seed(script):
    torch.manual_seed(3)
    return batch_of(script)


# --- Replay ---


class Recorder(Captured):
    """Notes every operator with its arguments and results too."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.calls.append((function, args, kwargs or {}, result))
        return result


class RecordedGraph:
    """torch.cuda.CUDAGraph on a CPU: replays operators, not the Python that called them.

    As there, arguments are the recorded tensors and numbers, and results go where they went when
    recorded. Recording also runs here, so the first replay has been done by it.
    """

    def __init__(self):
        self.calls, self.replays = [], 0

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.calls if self.replays > 1 else []:
            found = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(found), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new.view(old.shape))  # an in-place squeeze changes shapes


@pytest.fixture
def graphs(monkeypatch):
    """Let torch.cuda record and replay on the CPU."""
    made = []

    class Graph(RecordedGraph):
        def __init__(self):
            super().__init__()
            made.append(self)

    @contextmanager
    def recording(graph):
        with Recorder(graph.calls):
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {"CUDAGraph": Graph, "graph": recording, "Stream": lambda: stream}
    fakes |= {"current_stream": lambda: stream, "stream": lambda x: nullcontext()}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for script in (dare_iql, dare_cql):
        monkeypatch.setattr(script, "SUPPORT_CHUNK", 2)  # else no new state would take part
    return made


CALLS = 9


def run(script, path, online, graph, **settings):
    """Metrics of updates while the online buffer grows, and all tensors at the end."""
    torch.manual_seed(0)
    if online == "dare":
        dare = dare_of(script, path, **settings)
        agent, growing, update = dare.agent, dare.online_buffer, dare.update
        parts = [dare, dare.energy, agent]
    else:
        agent, growing = agent_of(script, **settings), buffer_of(script, 3, 60)
        if online:
            agent.start_online()
        parts = [agent]

        def update():
            return agent.update(growing.sample(B))

    with script.autocast(agent.cfg, "cpu"):
        step, metrics = script.CudaGraph(update) if graph else update, []
        rng = np.random.default_rng(0)
        for _ in range(CALLS):
            widths = zip(script.Batch._fields, growing.widths, strict=True)
            growing.add(*(rng.random((1, width)) for _, width in widths))
            if online == "dare":
                dare.prepare()
            metrics.append({k: x.clone() for k, x in step().items()})
    if online == "dare":
        dare.online_actions[dare.n_online :] = 0.0  # was never written
    return metrics, [x.clone() for part in parts for x in tensors_of(part)]


VARIANTS = [(script, online) for script in AGENTS for online in (False, True)]
VARIANTS += [(dare_iql, "dare"), (dare_cql, "dare")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("script, online", VARIANTS)
def test_replayed_updates_equal_called_ones(tmp_path, graphs, script, online, precision):
    """Numbers that change between updates (counts, rates, sizes) would be frozen by a recording."""
    settings = {"precision": precision, "offline_iterations": 12}
    found = run(script, tmp_path, online, True, **settings)
    assert len(graphs) == 1 and graphs[0].replays == CALLS - 3 and len(graphs[0].calls) > 50
    expected = run(script, tmp_path, online, False, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found[0][-1] != found[0][-2]


@pytest.mark.parametrize("settings", [{"reference": "resample", "n_reference": 3}])
def test_replayed_resampling_equals_called(tmp_path, graphs, settings):
    found = run(dare_iql, tmp_path, "dare", True, **settings)
    expected = run(dare_iql, tmp_path, "dare", False, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_replayed_training_of_the_behavior_model(graphs):
    torch.manual_seed(0)
    states, actions, models = torch.randn(50, S), torch.rand(50, A), []
    for accelerate in (None, lambda update, generator: iql.CudaGraph(update)):
        torch.manual_seed(1)
        models.append(BehaviorModel(S, A, 8))
        train_behavior(models[-1], states, actions, CALLS, 16, accelerate=accelerate)
    assert graphs[0].replays == CALLS - 3
    weights = [list(model.parameters()) for model in models]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.mark.parametrize("script", [edis_iql, edis_cql], ids=["edis_iql", "edis_cql"])
def test_replayed_trainings_of_edis(monkeypatch, graphs, script):
    results = []
    for graph in (False, True):
        torch.manual_seed(0)
        agent = agent_of(script, model_width=8, model_depth=2, energy_hidden=8, n_unguided=9)
        buffers = [buffer_of(script, n, 30) for n in (30, 20)]
        if graph:
            monkeypatch.setattr(script, "accelerated", lambda update, *_: script.CudaGraph(update))
        edis = script.EDIS(agent.cfg, SimpleNamespace(stop=False), agent, *buffers)
        table = torch.rand(40, edis.n_columns + 1)
        losses = edis.fit(edis.model, edis.model_losses, table, CALLS, 1e-2, decay=True)
        pairs = {k: (table[:20, :-1], table[20:, :-1]) for k in script.ENERGIES}
        losses |= edis.fit(edis.energies, edis.energy_losses, pairs, CALLS, 1e-2)
        results.append((losses, list(edis.model.parameters()), list(edis.energies.parameters())))
    assert [x.replays for x in graphs] == [CALLS - 3] * 2
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_frozen_number_is_seen(graphs):
    total, count = torch.zeros(()), 0

    def add():
        nonlocal count
        count += 1
        return total.add_(count)

    step = iql.CudaGraph(add)
    for _ in range(6):
        step()
    assert total == 1 + 2 + 3 + 4 + 4 + 4 and count == 4


def test_an_update_that_cannot_be_recorded_ends_in_one_line(graphs):
    def update():
        if len(graphs[0].calls) > 0:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return torch.zeros(()) + 1

    step = iql.CudaGraph(update)
    for _ in range(3):
        step()
    graphs[0].calls.append(None)
    with pytest.raises(SystemExit, match=r"record the update \(operation not permitted\); take --"):
        step()


def test_graphs_are_for_cuda_alone(monkeypatch):
    monkeypatch.setattr(iql, "CudaGraph", lambda function, generator: "graph")
    settings = {"env": "hopper-medium-v2"}
    assert iql.accelerated(None, iql.Config(**settings), "cuda") == "graph"
    assert iql.accelerated(None, iql.Config(**settings), "cpu") != "graph"
    assert iql.accelerated(None, iql.Config(**settings, cuda_graph=False), "cuda") != "graph"


@pytest.mark.parametrize("script, online", VARIANTS)
def test_no_update_leaves_a_tensor_behind(tmp_path, script, online):
    agent = agent_of(script)
    update = dare_of(script, tmp_path).update if online == "dare" else None
    if online is True:
        agent.start_online()
    counts = []
    for _ in range(4):
        update() if update else agent.update(batch_of(script))
        gc.collect()
        counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert counts[1] == counts[2] == counts[3]
