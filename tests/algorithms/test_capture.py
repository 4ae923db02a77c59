"""An update reads no value on the host, has static shapes and addresses, and can be replayed: what
a CUDA graph's capture needs, here without a GPU.
"""

import copy
import gc
import inspect
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from tiny_runs import AGENTS, DARE, DATA, GROUPS, SCRIPTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dare_iql
import diffusion.sampler
import iql
import pex
from diffusion import BehaviorModel, train_behavior

S, A, B = 11, 3, 16  # the Hopper's
# Operators that wait for the device or whose result's shape depends on values.
FORBIDDEN = """_local_scalar_dense is_nonzero equal nonzero masked_select unique unique_dim _unique2
    unique_consecutive bincount repeat_interleave""".split()
DARES = [group.dare for group in GROUPS]


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


class Stop(Exception):
    """Ends a run where the tests want it to."""


def updates_of(script, path, **settings):
    """The functions that a run accelerates, offline and online, and what the latter works on."""
    own = DARE | {"behavior_iterations": 0, "n_support": 4} if script in DARES else {}
    sizes = dict(env="hopper-medium-v2", data=str(DATA), wandb="disabled", device="cpu")
    sizes |= dict(hidden_dim=8, batch_size=B, offline_iterations=12, online_iterations=60)
    sizes |= dict(initial_collection_steps=50)
    config = script.TrainConfig(**sizes | own | settings, runs_dir=str(path))
    made, torch_seed = [], torch.random.get_rng_state()

    def noting(update, config):
        made.append(update)
        return update

    def restore(run, phase, parts):
        return config.offline_iterations if phase == "offline" else None

    with (
        mock.patch.object(script, "accelerate", noting),
        mock.patch.object(script.Run, "restore", restore),
        mock.patch.object(script, "eval_actor", side_effect=Stop),
        pytest.raises(Stop),
    ):
        script.train(config)
    torch.random.set_rng_state(torch_seed)
    parts = {"sampler": None, "fields": script.TensorBatch._fields}
    parts |= inspect.getclosurevars(made[-1]).nonlocals
    return made[0], made[-1], SimpleNamespace(**parts)


def add_online(run, n, rng=None):
    """Let the online buffer grow by n rows, as the environment does, with support actions."""
    rng = rng or np.random.default_rng(0)
    for _ in range(n):
        state, next_state, action = rng.random(S), rng.random(S), rng.random(A)
        row = {"observations": state, "actions": action, "next_observations": next_state}
        row |= {"rewards": rng.random(), "terminals": 0.0, "mc_returns": rng.random()}
        run.online_buffer.add_transition(*(row[k] for k in run.fields))
    if run.sampler:
        run.sampler.add_support(int(run.online_buffer.size))


def agent_of(script, **settings):
    sizes = dict(env="hopper-medium-v2", device="cpu", hidden_dim=8, batch_size=B)
    config = script.TrainConfig(**sizes | settings)
    torch.manual_seed(0)
    return getattr(script, AGENTS[script])(S, A, config)


def batch_of(script, n=B, scale=1.0):
    columns = [torch.randn(n, S), torch.randn(n, A).tanh(), torch.randn(n), torch.randn(n, S)]
    columns = [scale * x for x in columns] + [torch.zeros(n), torch.zeros(n)]
    return script.TensorBatch(*columns[: len(script.TensorBatch._fields)])


def tensors_of(*parts):
    """All tensors that parts of a run keep, gradients apart."""
    found = []
    for x in (x for part in parts for x in vars(part).values()):
        if isinstance(x, torch.Tensor):
            found.append(x)
        elif isinstance(x, torch.nn.Module):
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


@SCRIPTS
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("precision", ["bf16"])  # fp32: test_updates_of_a_run
def test_updates(script, online, precision):
    agent = agent_of(script, precision=precision)
    if online:
        agent.start_online()
    agent.train(batch_of(script))  # the optimizer makes its state in the first step
    addresses = [x.data_ptr() for x in tensors_of(agent)]
    batch = batch_of(script)
    update = script.accelerate(lambda: agent.train(batch), agent.config)
    shapes = [captured(update)]
    for column in batch:
        column.mul_(9.0)
    shapes.append(captured(update))
    assert shapes[0] == shapes[1] and len(shapes[0]) > 50
    assert [x.data_ptr() for x in tensors_of(agent)] == addresses


@SCRIPTS
def test_updates_of_a_run(tmp_path, script):
    """With the batches that they draw."""
    offline, online, run = updates_of(script, tmp_path)
    add_online(run, 20)
    for update, in_fine_tuning in ((offline, False), (online, True)):
        run.trainer.online = in_fine_tuning
        update()
        addresses = [x.data_ptr() for x in tensors_of(run.trainer)]
        shapes = [captured(update) for _ in range(2)]
        assert shapes[0] == shapes[1] and len(shapes[0]) > 50
        assert [x.data_ptr() for x in tensors_of(run.trainer)] == addresses


@pytest.mark.parametrize("kind", ["gaussian", "direct"])
@pytest.mark.parametrize(
    "reference", [{"guidance_scale": 0.0}, {"guidance_scale": 3.0}, {"reference": "resample"}]
)
@pytest.mark.parametrize("script", DARES, ids=lambda script: script.__name__)
def test_a_pass_of_algorithm_1(tmp_path, script, kind, reference):
    _, update, run = updates_of(script, tmp_path, exchange=kind, **reference)
    add_online(run, 20)
    update()
    parts = run.trainer, run.sampler, run.offline_buffer, run.online_buffer
    addresses = [x.data_ptr() for x in tensors_of(*parts)]
    shapes = [captured(update)]
    # Other scores: another number of pairs is exchanged.
    run.online_buffer.rows(slice(None)).actions.mul_(0.1)
    shapes.append(captured(update))
    assert shapes[0] == shapes[1] and len(shapes[0]) > 150
    assert [x.data_ptr() for x in tensors_of(*parts)] == addresses


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
    made, autocast = [], torch.autocast

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
    monkeypatch.setattr(
        torch, "autocast", lambda device, *args, **options: autocast("cpu", *args, **options)
    )
    monkeypatch.setattr(diffusion.sampler, "SUPPORT_CHUNK", 2)  # else no new state would take part
    return made


def as_on_cuda(config, cuda_graph=True):
    """The settings of a machine with a GPU, which this one has not."""
    config = copy.copy(config)
    config.device, config.cuda_graph = "cuda", cuda_graph
    return config


CALLS = 9


def replayed_and_called(script, path, online, **settings):
    """What updates log while the online buffer grows, and all tensors at the end, of both ways."""
    results = []
    for graph in (True, False):
        updates = updates_of(script, path / str(graph), **settings)
        run, update = updates[2], updates[1 if online else 0]
        run.trainer.online = online
        step = script.accelerate(update, as_on_cuda(run.trainer.config, graph))
        log_dicts, rng = [], np.random.default_rng(0)
        torch.manual_seed(0)
        add_online(run, 3, rng)
        for _ in range(CALLS):
            add_online(run, 1, rng)
            log_dicts.append({k: x.clone() for k, x in step().items()})
        parts = [run.trainer, run.online_buffer]
        parts += [run.sampler, run.sampler.energy] if run.sampler else []
        results.append((log_dicts, [x.clone() for x in tensors_of(*parts)]))
    return results


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("online", [False, True])
@SCRIPTS
def test_replayed_updates_equal_called_ones(tmp_path, graphs, script, online, precision):
    """Numbers that change between updates (counts, rates, sizes) would be frozen by a recording."""
    found, expected = replayed_and_called(script, tmp_path, online, precision=precision)
    assert len(graphs) == 1 and graphs[0].replays == CALLS - 3 and len(graphs[0].calls) > 50
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found[0][-1] != found[0][-2]


def test_replayed_resampling_equals_called(tmp_path, graphs):
    settings = {"reference": "resample", "n_reference": 3}
    found, expected = replayed_and_called(DARES[0], tmp_path, True, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_replayed_training_of_the_behavior_model(tmp_path, graphs):
    torch.manual_seed(0)
    states, actions, models = torch.randn(50, S), torch.rand(50, A), []
    settings = dict(behavior_iterations=CALLS, behavior_batch_size=16, behavior_lr_decay=True)
    config = dare_iql.TrainConfig(env="hopper-medium-v2", device="cpu", **settings)
    on_cuda = as_on_cuda(config)
    for accelerate in (lambda update: update, lambda update: iql.accelerate(update, on_cuda)):
        torch.manual_seed(1)
        models.append(BehaviorModel(S, A, 8))
        path = tmp_path / str(len(models))
        train_behavior(models[-1], states, actions, config, path, accelerate=accelerate)
    assert graphs[0].replays == CALLS - 3
    weights = [list(model.parameters()) for model in models]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_a_frozen_number_is_seen(graphs):
    total, count = torch.zeros(()), 0

    def add():
        nonlocal count
        count += 1
        return total.add_(count)

    config = as_on_cuda(iql.TrainConfig(env="hopper-medium-v2", device="cpu"))
    step = iql.accelerate(add, config)
    for _ in range(6):
        step()
    assert total == 1 + 2 + 3 + 4 + 4 + 4 and count == 4


@pytest.mark.parametrize(
    "device, cuda_graph, n", [("cuda", True, 1), ("cuda", False, 0), ("cpu", True, 0)]
)
def test_graphs_are_for_cuda_alone(graphs, device, cuda_graph, n):
    config = as_on_cuda(iql.TrainConfig(env="hopper-medium-v2", device="cpu"), cuda_graph)
    config.device = device
    calls = []
    step = iql.accelerate(lambda: calls.append(None), config)
    for _ in range(9):
        step()
    assert len(graphs) == n and len(calls) == (4 if n else 9)
    assert iql.TrainConfig(env="hopper-medium-v2").cuda_graph is False


@pytest.mark.parametrize("script", [*DARES, pex], ids=lambda script: script.__name__)
def test_no_update_leaves_a_tensor_behind(tmp_path, script):
    offline, online, run = updates_of(script, tmp_path)
    add_online(run, 20)
    kinds = {torch.Tensor, torch.nn.Parameter}
    for update, in_fine_tuning in ((offline, False), (online, True)):
        run.trainer.online, counts = in_fine_tuning, []
        for _ in range(3):
            update()
            gc.collect()
            counts.append(sum(type(x) in kinds for x in gc.get_objects()))
        assert counts[1] == counts[2]


# --- Compilation ---


@pytest.mark.parametrize("script", DARES, ids=lambda script: script.__name__)
def test_compiled_updates_equal_called_ones(script):
    """Traced, which takes long; the back end that runs the trace as it is needs no compiler."""
    results = []
    for compiled in (False, True):
        agent = agent_of(script)
        agent.start_online()
        torch.manual_seed(3)
        batch, update = batch_of(script), agent.train
        if compiled:
            torch.compiler.reset()
            update = torch.compile(update, backend="eager")
        torch.manual_seed(1)
        log_dicts = [update(batch) for _ in range(3)]
        results.append((log_dicts, tensors_of(agent)))
    torch.testing.assert_close(*results)
