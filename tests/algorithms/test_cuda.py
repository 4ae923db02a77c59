"""On a GPU, by `pytest --cuda tests/algorithms/test_cuda.py`: updates replayed as CUDA graphs equal
called ones, and those of a CPU.
"""

from copy import deepcopy

import numpy as np
import pytest
import torch
from test_capture import CALLS, DARES, add_online, agent_of, batch_of, tensors_of, updates_of
from test_edis import BASELINE, SHORT
from tiny_runs import SCRIPTS, SETTINGS, checkpoint, run

import dare_iql
import diffusion.sampler
import edis_cql
import edis_iql
import iql

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and --cuda")


def logged_and_tensors(script, path, online, **settings):
    """What updates log while the online buffer grows, and all tensors at the end."""
    offline_update, online_update, run = updates_of(script, path, device="cuda", **settings)
    run.trainer.online = online
    step = script.accelerate(online_update if online else offline_update, run.trainer.config)
    log_dicts, rng = [], np.random.default_rng(0)
    torch.manual_seed(0)
    add_online(run, 3, rng)
    for _ in range(CALLS):
        add_online(run, 1, rng)
        log_dicts.append({k: x.clone() for k, x in step().items()})
    parts = [run.trainer, run.online_buffer]
    parts += [run.sampler, run.sampler.energy] if run.sampler else []
    return log_dicts, [x.clone() for x in tensors_of(*parts)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("online", [False, True])
@SCRIPTS
def test_replayed_updates_equal_called_ones(tmp_path, monkeypatch, script, online, precision):
    monkeypatch.setattr(diffusion.sampler, "SUPPORT_CHUNK", 2)
    settings = {"precision": precision}
    found = logged_and_tensors(script, tmp_path / "graph", online, cuda_graph=True, **settings)
    expected = logged_and_tensors(script, tmp_path / "called", online, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert found[0][-1] != found[0][-2]


def test_replayed_resampling_equals_called(tmp_path, monkeypatch):
    monkeypatch.setattr(diffusion.sampler, "SUPPORT_CHUNK", 2)
    settings = {"reference": "resample", "n_reference": 3}
    found = logged_and_tensors(DARES[0], tmp_path / "graph", True, cuda_graph=True, **settings)
    expected = logged_and_tensors(DARES[0], tmp_path / "called", True, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_an_update_equals_that_of_the_cpu():
    agents = [agent_of(iql, device=device, hidden_dim=64) for device in ("cpu", "cuda")]
    agents[1].load_state_dict(deepcopy(agents[0].state_dict()))
    batches = [batch_of(iql, 64) for _ in range(5)]
    log_dicts = []
    for agent in agents:
        device = agent.config.device
        for batch in batches:
            log_dict = agent.train(iql.TensorBatch(*(x.to(device) for x in batch)))
        log_dicts.append({name: x.cpu() for name, x in log_dict.items()})
    torch.testing.assert_close(*log_dicts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [dare_iql.exchange, dare_iql.direct_exchange])
def test_an_exchange_equals_that_of_the_cpu(rule):
    torch.manual_seed(0)
    halves = batch_of(dare_iql, 64), batch_of(dare_iql, 64)
    scores = torch.randn(64).square(), torch.randn(64).square() + 0.5
    on_cuda = [dare_iql.TensorBatch(*(x.cuda() for x in half)) for half in halves]
    *found, exchanged, separation = rule(*on_cuda, *(x.cuda() for x in scores))
    *expected, n, point = rule(*halves, *scores)
    assert exchanged == n > 0
    torch.testing.assert_close(separation.cpu(), point)
    for half, other in zip(found, expected, strict=True):
        torch.testing.assert_close(dare_iql.TensorBatch(*(x.cpu() for x in half)), other)


@pytest.mark.parametrize("script", [*SETTINGS, edis_iql, edis_cql], ids=lambda s: s.__name__)
def test_a_run_is_made_and_resumed(tmp_path, monkeypatch, script):
    """Behavior model, energy, EDIS's trainings, generators and files, which no update has."""
    for edis in (edis_iql, edis_cql):
        monkeypatch.setitem(SETTINGS, edis, BASELINE | SHORT)
    for online_iterations in (120, 160):  # the second resumes the first
        settings = {"device": "cuda", "cuda_graph": True, "online_iterations": online_iterations}
        path = run(script, tmp_path, **settings)
    state = checkpoint(path)
    assert state["step"] == 160 and state["cuda_rng"] is not None
