"""--precision: fp32 is exact, bf16 rounds the networks' products alone, auto takes the faster."""

import itertools
from pathlib import Path

import pytest
import torch

import cal_ql
import dare_cql
import dare_iql
import iql
import pex

S, A, B = 5, 2, 64
SCRIPTS = [iql, dare_iql, cal_ql, dare_cql, pex]
AGENTS = {iql: "ImplicitQLearning", dare_iql: "ImplicitQLearning", cal_ql: "CalQL"}
AGENTS |= {dare_cql: "CalQL", pex: "ImplicitQLearning"}
DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"


def agent_of(script, precision):
    cfg = script.Config(env="hopper-medium-v2", hidden_dim=32, batch_size=B, precision=precision)
    torch.manual_seed(0)
    agent = getattr(script, AGENTS[script])(S, A, cfg, "cpu")
    agent.start_online()
    return agent


def batch_of(script):
    generator = torch.Generator().manual_seed(1)
    s, a, s2 = (torch.randn(B, k, generator=generator) for k in (S, A, S))
    columns = [s, a.tanh(), s[:, 0], s2, torch.zeros(B), torch.zeros(B)]
    return script.Batch(*columns[: len(script.Batch._fields)])


def updates(script, precision, n=3):
    """Metrics of the last of a few updates, and the agent."""
    agent, batch = agent_of(script, precision), batch_of(script)
    torch.manual_seed(2)
    for _ in range(n):
        with script.autocast(agent.cfg, agent.device):
            metrics = agent.update(batch)
    return metrics, agent


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda x: x.__name__)
def test_fp32_is_exact(script):
    found, _ = updates(script, "fp32")
    agent, batch = agent_of(script, "fp32"), batch_of(script)
    torch.manual_seed(2)
    expected = [agent.update(batch) for _ in range(3)][-1]
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda x: x.__name__)
def test_bf16_rounds_products_and_keeps_losses_and_weights_in_fp32(script):
    found, agent = updates(script, "bf16")
    expected, _ = updates(script, "fp32")
    assert found.keys() == expected.keys()
    assert all(x.dtype == torch.float32 for x in found.values())
    parameters = [p for group in agent.optimizer.param_groups for p in group["params"]]
    assert all(p.dtype == torch.float32 for p in parameters)
    losses = [k for k in found if k.endswith("loss") or k == "regularizer"]
    for name in losses:
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=0.02)
    assert any(found[k] != expected[k] for k in losses)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda x: x.__name__)
def test_outputs_of_networks_are_fp32(script):
    agent, batch = agent_of(script, "bf16"), batch_of(script)
    with script.autocast(agent.cfg, "cpu"):
        outputs = [agent.qf(batch.observations, batch.actions), *agent.actor(batch.observations)]
        product = batch.observations @ batch.observations.T
    assert all(x.dtype == torch.float32 for x in outputs)
    assert product.dtype == torch.bfloat16


@pytest.mark.parametrize("share, expected", [(0.5, "bf16"), (0.74, "bf16"), (0.76, "fp32")])
def test_auto_takes_bf16_where_it_is_clearly_faster(monkeypatch, tmp_path, share, expected):
    # The clock stands still but for the product: 1 s in fp32, `share` of it in bf16.
    durations = itertools.chain([1.0] * 10, [share] * 10)
    clock = itertools.accumulate(x for duration in durations for x in (0.0, duration))
    monkeypatch.setattr(iql.time, "perf_counter", lambda: next(clock))
    cfg = iql.Config(env="hopper-medium-v2", runs_dir=str(tmp_path))
    assert iql.automatic_precision(cfg, "cpu") == expected


def test_auto_keeps_the_precision_of_the_run_to_go_on_with(monkeypatch, tmp_path):
    cfg = iql.Config(env="hopper-medium-v2", runs_dir=str(tmp_path), seed=3)
    directory = tmp_path / "iql" / "hopper-medium-v2" / "seed_3"
    directory.mkdir(parents=True)
    for precision in ("bf16", "fp32"):
        (directory / "config.yaml").write_text(f"precision: {precision}\n")
        assert iql.automatic_precision(cfg, "cpu") == precision


def test_a_run_in_bf16_has_a_cache_of_its_own(tmp_path, capsys):
    args = """--env hopper-medium-v2 --wandb disabled --device cpu --hidden_dim 16
        --batch_size 32 --offline_iterations 20 --online_iterations 40 --n_episodes 1
        --initial_collection_steps 10 --log_freq 10 --behavior_iterations 20 --energy_iterations 5
        --behavior_batch_size 32 --behavior_width 8 --energy_hidden 8 --energy_batch_size 16
        --n_support 2 --n_support_states 30 --diffusion_steps 2""".split()
    args += ["--data", str(DATA), "--runs_dir", str(tmp_path)]
    for name, precision in [("a", "fp32"), ("b", "bf16")]:
        dare_cql.main([*args, "--name", name, "--precision", precision])
        assert (tmp_path / name / "hopper-medium-v2" / "seed_0" / "summary.yaml").exists()
    assert "cache hit" not in capsys.readouterr().out
    for kind in ("cal_ql", "behavior", "support"):
        assert len(list((tmp_path / "cache").glob(f"{kind}-*.pt"))) == 2
