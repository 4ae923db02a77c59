"""PEX: who acts, what is learned from it, and what stays frozen."""

import numpy as np
import pytest
import torch
from tiny_runs import assert_equal, assert_same_end, checkpoint, directory, interrupt, run

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
    assert not any(p in agent.optimizer.state for p in agent.actor.parameters())
    assert q_state == agent.optimizer.state[next(agent.qf.parameters())]["step"] == 3
    for _ in range(3):
        agent.train(batch_of())
    for key, value in agent.offline_actor.state_dict().items():
        assert torch.equal(value, before[key])
    assert agent.optimizer.state[agent.actor.log_std]["step"] == 3
    assert not any(p.requires_grad for p in agent.offline_actor.parameters())


def close(actions, action, tolerance=1e-5):
    """Which rows are an action, [N]; products of batches of different size round differently."""
    return (actions - action).abs().amax(1) < tolerance


def test_q_chooses_with_the_probabilities_of_a_softmax():
    """Of 20,000 draws at one state; the new policy's action is nearly its mean here."""
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


def test_policy_update_regresses_on_the_composed_actions():
    agent, batch = agent_of(), batch_of()
    adv = torch.full((B,), 50.0)  # of the stored actions: must not matter
    torch.manual_seed(3)
    loss = agent.policy_loss(batch, adv)
    torch.manual_seed(3)
    actions = agent.compose(batch.observations)
    own = agent.q_target(batch.observations, actions) - agent.vf(batch.observations)
    weights = torch.exp(3.0 * own).clamp(max=100.0)
    mean, log_std = agent.actor(batch.observations)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    torch.testing.assert_close(loss, -(weights * log_prob).mean())
    loss.backward()
    others = [*agent.qf.parameters(), *agent.vf.parameters(), *agent.q_target.parameters()]
    assert all(p.grad is None for p in others)


def test_weights_are_bounded():
    agent, batch = agent_of(beta=1000.0), batch_of()
    for p in agent.vf.parameters():
        p.data.zero_()
    agent.vf.v.net[-2].bias.data.fill_(-100.0)  # every advantage is large
    torch.manual_seed(3)
    loss = agent.policy_loss(batch, torch.zeros(B))
    torch.manual_seed(3)
    actions = agent.compose(batch.observations)
    expected = -100.0 * agent.actor.log_prob(batch.observations, actions).mean()
    torch.testing.assert_close(loss, expected)


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
        assert np.abs(actions[0]).max() <= 1


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
