"""Cal-QL and CQL: CORL's recorded updates, returns, and the pieces that they do not cover."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import cal_ql
from cal_ql import Batch

S, A = 11, 3
FILE = dict(np.load(Path(__file__).parent / "data" / "cal_ql_two_updates.npz"))


# --- CORL's recorded updates ---


def initial_agent(cfg):
    """The agent with the recorded initial weights, which are those of CORL's order and seed."""
    torch.manual_seed(7)

    def linears(*dims):
        pairs = list(itertools.pairwise(dims))
        layers = [torch.nn.Linear(*pair) for pair in pairs]
        return [cal_ql.orthogonal(layer) for layer in layers]

    twins = [linears(S + A, 256, 256, 1) for _ in range(2)]
    policy = linears(S, 256, 256, 256, 2 * A)
    agent = cal_ql.CalQL(S, A, cfg, "cpu")
    with torch.no_grad():
        for net in (agent.qf, agent.q_target):
            for i, pair in enumerate(zip(*twins, strict=True)):
                net.weights[i].copy_(torch.stack([layer.weight.T for layer in pair]))
        for mine, layer in zip(agent.actor.net.net[::2], policy, strict=True):
            mine.weight.copy_(layer.weight)
    for name, tensor in weights(agent).items():
        if f"init/{name}/head" in FILE:
            head = FILE[f"init/{name}/head"]
            np.testing.assert_allclose(tensor.flatten()[:8], head, atol=1e-6, err_msg=name)
    return agent


def weights(agent):
    """All weights under CORL's names."""
    found = {}
    for i, (w, b) in enumerate(zip(agent.qf.weights, agent.qf.biases, strict=True)):
        for k in range(2):
            found[f"critic_{k + 1}/network.{2 * i}.weight"] = w[k].T
            found[f"critic_{k + 1}/network.{2 * i}.bias"] = b[k, 0]
    target = zip(agent.q_target.weights, agent.q_target.biases, strict=True)
    for i, (w, b) in enumerate(target):
        found[f"target_critic_1/network.{2 * i}.weight"] = w[0].T
        found[f"target_critic_1/network.{2 * i}.bias"] = b[0, 0]
    for i, layer in enumerate(agent.actor.net.net[::2]):
        found[f"actor/base_network.{2 * i}.weight"] = layer.weight
        found[f"actor/base_network.{2 * i}.bias"] = layer.bias
    found["actor/log_std_multiplier.constant"] = agent.actor.log_std_multiplier
    found["actor/log_std_offset.constant"] = agent.actor.log_std_offset
    found["log_alpha/constant"] = agent.factors["log_alpha"]
    if agent.cfg.cql_lagrange:
        found["log_alpha_prime/constant"] = agent.factors["log_alpha_prime"]
    return {k: x.detach().contiguous() for k, x in found.items()}


@pytest.fixture
def feed_draws(monkeypatch):
    """Makes torch.randn and torch.rand give recorded draws, in order and to the last one."""
    queue = []

    def recorded(kind):
        def draw(*shape, device=None):
            name, values = queue.pop(0)
            assert name.endswith(kind)
            # CORL draws uniforms in [-1, 1].
            values = torch.from_numpy(values if kind == "normal" else (values + 1) / 2)
            return values.reshape(shape)

        return draw

    monkeypatch.setattr(torch, "randn", recorded("normal"))
    monkeypatch.setattr(torch, "rand", recorded("uniform"))
    yield lambda draws: queue.extend(draws)
    assert not queue


VARIANTS = {
    "cql": {"calibrated": False},
    "cal_ql": {},
    "lagrange": {
        "cql_alpha": 5.0,
        "cql_lagrange": True,
        "cql_target_action_gap": 0.8,
        "cql_max_target_backup": True,
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_updates_equal_corl(variant, request):
    cfg = cal_ql.Config(q_n_hidden_layers=2, batch_size=64, **VARIANTS[variant])
    agent = initial_agent(cfg)
    feed_draws = request.getfixturevalue("feed_draws")
    draws = "cal_ql" if variant == "cql" else variant  # the same, and kept once
    for i in range(2):
        prefix = f"{draws}/draw{i}/"
        feed_draws(sorted((k, v) for k, v in FILE.items() if k.startswith(prefix)))
        columns = "observations actions rewards next_observations dones mc_returns".split()
        rows = [torch.from_numpy(FILE[f"{variant}/batch{i}/{name}"]) for name in columns]
        metrics = agent.update(Batch(*(x.squeeze(-1) for x in rows)))
        log = {k.split("/")[-1]: v for k, v in FILE.items() if k.startswith(f"{variant}/log{i}/")}
        expected = {
            "q_loss": log["qf1_loss"] + log["qf2_loss"],
            "regularizer": log["cql_min_qf1_loss"] + log["cql_min_qf2_loss"],
            "actor_loss": log["policy_loss"],
            "alpha": log["alpha"],
            "log_pi": log["log_pi"],
            "q": (log["average_qf1"] + log["average_qf2"]) / 2,
        }
        if cfg.cql_lagrange:
            expected["regularizer"] = expected["regularizer"] / log["alpha_prime"]
            expected["alpha_prime"] = log["alpha_prime"]
        found = {k: metrics[k].item() for k in expected}
        assert found == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4)
        for name, tensor in weights(agent).items():
            after = f"{variant}/after{i}/{name}/"
            norm, head = tensor.norm().item(), tensor.flatten()[:8]
            assert norm == pytest.approx(float(FILE[after + "norm"]), rel=1e-4), name
            np.testing.assert_allclose(head, FILE[after + "head"], rtol=1e-4, atol=2e-6)
