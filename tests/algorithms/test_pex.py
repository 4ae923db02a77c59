"""PEX: who acts, what is learned from it, and what stays frozen."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import (
    ENV,
    assert_equal,
    assert_same_end,
    checkpoint,
    directory,
    interrupt,
    recorded,
    run,
)

import iql
import pex

S, A, B = 3, 2, 4


def agent_of(**settings):
    """An online agent; the fresh policy has the offline one's architecture and other weights."""
    sizes = {"hidden_dim": 8, "batch_size": B, "beta": 3.0, **settings}
    torch.manual_seed(0)
    agent = pex.ImplicitQLearning(S, A, pex.TrainConfig(env="hopper-medium-v2", **sizes))
    agent.actor.log_std.data = torch.tensor([0.3, -0.2])
    for parameter in agent.q_target.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    agent.start_online()
    return agent


def states_of(n, seed=1):
    return torch.randn(n, S, generator=torch.Generator().manual_seed(seed))


def batch_of(n=B):
    s, s2 = states_of(n), states_of(n, seed=2)
    return pex.TensorBatch(s, s[:, :A].tanh(), s[:, 2], s2, torch.zeros(n))


def candidates(agent, state):
    """Mean of the offline and of the new policy for one state."""
    return agent.offline_actor(state)[0], agent.actor(state)[0]


def test_expansion_freezes_the_offline_policy_and_starts_a_new_one():
    torch.manual_seed(0)
    agent = pex.ImplicitQLearning(S, A, pex.TrainConfig(env="hopper-medium-v2", hidden_dim=8))
    for _ in range(3):
        agent.train(batch_of())
    before = {k: x.clone() for k, x in agent.actor.state_dict().items()}
    q_state = agent.optimizer.state[next(agent.qf.parameters())]["step"]
    agent.start_online()
    for key, value in agent.offline_actor.state_dict().items():
        assert torch.equal(value, before[key])
    for key, value in agent.actor.state_dict().items():
        if key == "log_std":
            assert (value == 0).all()
        else:
            assert not torch.equal(value, before[key])
    assert q_state == 3 and not agent.optimizer.state
    for _ in range(3):
        agent.train(batch_of())
    for key, value in agent.offline_actor.state_dict().items():
        assert torch.equal(value, before[key])
    assert agent.optimizer.state[agent.actor.log_std]["step"] == 3
    assert not any(p.requires_grad for p in agent.offline_actor.parameters())


def close(actions, action, tolerance=1e-5):
    """Which rows are an action, [N]; products of batches of different size round differently."""
    return (actions - action).abs().amax(1) < tolerance


def test_q_chooses_with_the_probabilities_of_a_softmax(monkeypatch):
    """Of 20,000 draws at one state; the new policy's action is nearly its mean here."""
    monkeypatch.setattr(pex, "LOG_STD_MIN", -20.0)
    agent = agent_of(inv_temperature=7.0)
    agent.actor.log_std.data.fill_(-20.0)
    n, state = 20_000, states_of(1)
    offline, new = candidates(agent, state)
    q = torch.cat([agent.qf(state, offline), agent.qf(state, new)])
    expected = (7.0 * q).softmax(0)[1].item()
    assert 0.05 < expected < 0.95
    torch.manual_seed(0)
    actions = agent.compose(state.expand(n, -1))
    is_new, is_offline = close(actions, new, 1e-4), close(actions, offline)
    assert (is_new ^ is_offline).all()
    assert is_new.float().mean().item() == pytest.approx(expected, abs=4 * 0.5 / n**0.5)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_evaluation_is_greedy_but_for_epsilon(epsilon):
    agent, n = agent_of(inv_temperature=0.3), 20_000  # drawn choices are nearly even
    agent.actor.log_std.data.fill_(-3.0)
    state = states_of(1, seed=5)
    offline, new = candidates(agent, state)
    better = bool(agent.qf(state, new) > agent.qf(state, offline))
    torch.manual_seed(0)
    actions = agent.compose(state.expand(n, -1), epsilon)
    offline_share = close(actions, offline).float().mean().item()
    mean_share = close(actions, new).float().mean().item()
    logit = 0.3 * (agent.qf(state, new) - agent.qf(state, offline))
    drawn = torch.sigmoid(logit).item()
    is_new = (1 - epsilon) * better + epsilon * drawn
    assert offline_share == pytest.approx(1 - is_new, abs=0.015)
    # The new policy's action is its mean with probability 1 - epsilon, whoever is chosen.
    assert mean_share == pytest.approx(is_new * (1 - epsilon), abs=0.015)


def test_acting_draws_and_evaluating_is_greedy_but_for_a_tenth(monkeypatch):
    agent, asked = agent_of(), []

    def compose(state, epsilon=1.0):
        asked.append(epsilon)
        return state[:, :A]

    monkeypatch.setattr(agent, "compose", compose)
    for deterministic in (True, False):
        agent.act(states_of(2).numpy(), deterministic)
    assert asked == [0.1, 1.0]


def test_the_deviation_of_the_policy_has_a_bound_of_its_own():
    agent = agent_of()
    agent.actor.log_std.data.fill_(-9.0)
    assert (agent.actor(states_of(1))[1] == -5.0).all()


def test_q_and_not_the_target_q_chooses(monkeypatch):
    """Which disagree here."""
    agent, state = agent_of(), states_of(1)
    monkeypatch.setattr(agent, "q_target", lambda state, action: -agent.qf(state, action))
    offline, new = candidates(agent, state)
    better = new if agent.qf(state, new) > agent.qf(state, offline) else offline
    assert close(agent.compose(state.expand(500, -1), epsilon=0.0), better).all()


def test_three_updates_equal_the_authors_code(monkeypatch):
    """Given the actions that their policies composed."""
    file = dict(np.load(Path(__file__).parents[1] / "data" / "pex_three_updates.npz"))
    config = pex.TrainConfig(env=ENV, device="cpu", hidden_dim=16, batch_size=32)
    agent = pex.ImplicitQLearning(11, 3, config)
    agent.start_online()
    nets = ("qf", "q_target", "vf", "actor", "offline_actor")
    for name in nets:
        getattr(agent, name).load_state_dict(recorded(file, f"init/{name}/"))
    for i in range(3):
        rows = recorded(file, f"batch{i}/")
        composed = torch.from_numpy(file[f"composed{i}"])
        monkeypatch.setattr(agent, "compose", lambda state, actions=composed: actions)
        agent.train(pex.TensorBatch(*(rows[k] for k in pex.TensorBatch._fields)))
    for name in nets:
        for key, expected in recorded(file, f"after/{name}/").items():
            found = getattr(agent, name).state_dict()[key]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            moved = (expected - recorded(file, f"init/{name}/")[key]).abs().max()
            assert (moved > 1e-4) == (name != "offline_actor") or name == "q_target"


def test_the_policy_learns_last_and_from_composed_actions():
    """With the weights of V, Q and the target Q from after their step."""
    agent, batch = agent_of(), batch_of()
    actor = copy.deepcopy(agent.actor)
    torch.manual_seed(3)
    loss = agent.train(batch)["actor_loss"]
    updated, agent.actor = agent.actor, actor
    torch.manual_seed(3)
    actions = agent.compose(batch.observations)
    adv = agent.q_target(batch.observations, actions) - agent.vf(batch.observations)
    weights = torch.exp(3.0 * adv).clamp(max=100.0).detach()
    mean, log_std = actor(batch.observations)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    expected = -(weights * log_prob).mean()
    torch.testing.assert_close(loss, expected.detach())
    gradients = torch.autograd.grad(expected, list(actor.parameters()))
    torch.testing.assert_close([p.grad for p in updated.parameters()], list(gradients))


def test_weights_are_bounded():
    agent, batch = agent_of(beta=1000.0, vf_lr=0.0), batch_of()
    for p in agent.vf.parameters():
        p.data.zero_()
    agent.vf.v.net[-2].bias.data.fill_(-100.0)  # every advantage is large
    actor = copy.deepcopy(agent.actor)
    torch.manual_seed(3)
    loss = agent.train(batch)["actor_loss"]
    agent.actor = actor
    torch.manual_seed(3)
    actions = agent.compose(batch.observations)
    expected = -100.0 * actor.log_prob(batch.observations, actions).mean()
    torch.testing.assert_close(loss, expected.detach())


def test_drawn_actions_are_not_clamped():
    agent = agent_of()
    agent.actor.log_std.data.fill_(2.0)
    assert np.abs(agent.act(states_of(200).numpy())).max() > 1


def test_offline_pex_is_iql():
    log_dicts = []
    for script in (iql, pex):
        torch.manual_seed(0)
        config = script.TrainConfig(env="hopper-medium-v2", hidden_dim=8)
        agent = script.ImplicitQLearning(S, A, config)
        torch.manual_seed(1)
        log_dicts.append([agent.train(script.TensorBatch(*batch_of())) for _ in range(3)][-1])
        state = states_of(2).numpy()
        np.testing.assert_array_equal(agent.act(state, True), agent.actor(states_of(2))[0].detach())
    assert all(torch.equal(log_dicts[0][k], log_dicts[1][k]) for k in log_dicts[0])


def test_actions_and_state_survive_a_checkpoint():
    agent = agent_of()
    agent.train(batch_of())
    state = agent.state_dict()
    other = pex.ImplicitQLearning(S, A, agent.config)
    other.start_online()
    other.load_state_dict(state)
    observations = states_of(50).numpy()
    for deterministic in (True, False):
        actions = []
        for one in (agent, other):
            torch.manual_seed(4)
            actions.append(one.act(observations, deterministic))
        np.testing.assert_array_equal(*actions)


# --- Runs ---


def test_a_run_starts_from_the_offline_agent_of_iql_and_resumes_exactly(tmp_path, monkeypatch):
    agent = run(iql, tmp_path, online_iterations=0) / "offline.pt"
    sizes = {"load_model": str(agent), "online_iterations": 120}
    expected = run(pex, tmp_path / "whole", **sizes)
    assert torch.load(agent)["trainer"]["total_it"] == 200
    assert checkpoint(expected)["trainer"]["total_it"] == 260
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, pex.ImplicitQLearning, "train", 50)
        run(pex, tmp_path, **sizes)
    assert checkpoint(directory(tmp_path, pex))["step"] == 100
    assert_same_end(run(pex, tmp_path, **sizes), expected)


def test_evaluations_draw_nothing_from_the_run(tmp_path):
    ends = []
    for name, freq in (("often", 10), ("seldom", 1000)):
        sizes = dict(offline_iterations=10, online_iterations=80, offline_eval_freq=1000)
        ends.append(checkpoint(run(pex, tmp_path, name=name, eval_freq=freq, **sizes)))
    for part in ("trainer", "rng", "online_buffer"):
        assert_equal(ends[0][part], ends[1][part])
