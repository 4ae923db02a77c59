"""An update reads no value on the host and has static shapes: what a CUDA graph's capture needs."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cal_ql
import dare_cql
import dare_iql
import edis_cql
import edis_iql
import iql
import pex
from diffusion import BehaviorModel, EnergyModel

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
    with script.autocast(agent.cfg, "cpu"):
        shapes = [captured(lambda x=x: agent.update(batch_of(script, scale=x))) for x in (1.0, 9.0)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 50


@pytest.mark.parametrize("settings", [{"cql_lagrange": True, "cql_max_target_backup": True}])
def test_updates_of_antmaze(settings):
    agent = agent_of(cal_ql, **settings)
    agent.update(batch_of(cal_ql))
    captured(lambda: agent.update(batch_of(cal_ql)))


@pytest.mark.parametrize("kind", ["gaussian", "direct"])
@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
@pytest.mark.parametrize("script", [dare_iql, dare_cql], ids=["dare_iql", "dare_cql"])
def test_a_pass_of_algorithm_1(script, kind, guidance_scale):
    agent = agent_of(script, exchange=kind, guidance_scale=guidance_scale, diffusion_steps=3)
    dare = object.__new__(script.DARE)
    dare.cfg, dare.energy_fitted, dare.n_energy_updates = agent.cfg, True, 0
    dare.behavior = BehaviorModel(S, A, 8).requires_grad_(False)
    dare.energy, dare.q_spread = EnergyModel(S, A, 8), torch.ones(())
    dare.optimizer = torch.optim.Adam(dare.energy.parameters(), fused=True)
    dare.states, dare.actions = torch.randn(20, S), torch.rand(20, 4, A)
    dare.online_buffer = script.ReplayBuffer(S, A, 30, "cpu")
    dare.online_buffer.rows.normal_()
    dare.online_buffer.size = dare.n_online = 30
    dare.online_actions = torch.rand(30, 4, A)
    halves = [batch_of(script, B // 2, scale) for scale in (1.0, 0.1)]
    dare(agent, *halves)
    shapes = [captured(lambda x=x: dare(agent, *x)) for x in (halves, halves[::-1])]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 50


@pytest.mark.parametrize("script", [edis_iql, edis_cql], ids=["edis_iql", "edis_cql"])
def test_trainings_of_the_model_and_its_energies(script):
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
    pairs = edis.contrasts(rows, edis.model.standardize(rows))
    fits = [(edis.model, edis.model_losses, table), (edis.energies, edis.energy_losses, pairs)]
    for fit in fits:
        shapes = [captured(lambda x=(*fit, n): edis.fit(*x, lr=1e-3)) for n in (2, 4)]
        assert len(shapes[1]) > len(shapes[0]) > 50
    shapes = [captured(lambda: edis.generate(20, energies)) for _ in range(2)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 50


def test_sampling_a_batch():
    buffer = iql.ReplayBuffer(S, A, 30, "cpu")
    buffer.rows.normal_()
    buffer.size = 20
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
