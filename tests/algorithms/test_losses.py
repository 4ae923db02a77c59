"""Losses of IQL and DARE-I, Eqs. 2 to 4, 15, 16 and 35, row by row; rewards and batches."""

import math

import numpy as np
import pytest
import torch
from tiny_runs import DATA, ENV, run

import d4rl_gymnasium as d4rl
import dare_iql
import iql
import pex
from dare_iql import TensorBatch

S, A, B, N_OFFLINE = 3, 2, 8, 5
MODULES = [iql, dare_iql, pex]  # the IQL group


def config_of(**settings):
    sizes = {"hidden_dim": 8, "batch_size": B, "mixing_ratio": N_OFFLINE / B, "n_max_actions": 4}
    return dare_iql.TrainConfig(env="hopper-medium-v2", **{**sizes, "discount": 0.9, **settings})


def agent_of(config, module=dare_iql, online=True):
    """An agent whose target Q differs from its Q and whose draws often exceed the bounds."""
    torch.manual_seed(0)
    agent = module.ImplicitQLearning(S, A, config)
    for network in (agent.qf, agent.q_target, agent.vf, agent.actor):
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.5)
    agent.actor.log_std.data = torch.tensor([1.0, 0.5])
    agent.online = online
    return agent


@pytest.fixture
def batch():
    """Five offline-like rows, then three online-like ones; each half has a terminal."""
    generator = torch.Generator().manual_seed(1)
    s, a, r, s2 = (torch.randn(B, k, generator=generator) for k in (S, A, 1, S))
    done = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    return TensorBatch(s, a.tanh(), r.squeeze(1), s2, done)


@pytest.fixture
def advantage():
    """Both signs in both halves; exp(3 x 2.5) is above the bound of 100."""
    return torch.tensor([0.4, -0.3, 2.5, 0.0, -1.0, 0.7, -0.2, 2.0])


def changed(batch, rows, **fields):
    """The batch with other values of some fields in some rows."""
    new = {k: getattr(batch, k).clone() for k in fields}
    for name, value in fields.items():
        new[name][rows] = value
    return batch._replace(**new)


ONLINE, OFFLINE = slice(N_OFFLINE, None), slice(0, N_OFFLINE)


# --- Eq. 15 ---


def targets_by_hand(agent, batch, next_v, seed):
    """r + gamma V(s') offline; online the max over drawn actions of the smaller target Q."""
    config, targets = agent.config, []
    torch.manual_seed(seed)
    noise = torch.randn(config.n_max_actions, B - N_OFFLINE, A)
    mean, log_std = agent.actor(batch.next_observations)
    for i in range(B):
        value = next_v[i]
        if i >= N_OFFLINE:
            drawn = mean[i] + log_std.exp() * noise[:, i - N_OFFLINE]
            twins = [agent.q_target.both(batch.next_observations[i], a.clamp(-1, 1)) for a in drawn]
            value = max(min(q1.item(), q2.item()) for q1, q2 in twins)
        targets.append(batch.rewards[i] + config.discount * (1 - batch.terminals[i]) * value)
    return torch.stack(targets).detach()


@pytest.mark.parametrize("online_loss", ["sac", "expectile"])
def test_q_loss_is_eq_15(batch, online_loss):
    agent, next_v = agent_of(config_of(online_loss=online_loss)), torch.randn(B)
    targets = targets_by_hand(agent, batch, next_v, seed=7)
    q1, q2 = agent.qf.both(batch.observations, batch.actions)
    expected = ((q1 - targets) ** 2 + (q2 - targets) ** 2).sum() / (2 * B)
    torch.manual_seed(7)
    torch.testing.assert_close(agent.q_loss(batch, next_v), expected)


def test_targets_of_eq_15_use_their_own_next_value(batch):
    agent = agent_of(config_of())

    def loss(next_v):
        torch.manual_seed(7)
        return agent.q_loss(batch, next_v).item()

    next_v = torch.linspace(-1, 1, B)
    other = next_v.clone()
    other[ONLINE] += 10  # V(s') is not in the online half
    assert loss(other) == loss(next_v)
    other[0] += 10
    assert loss(other) != loss(next_v)


def test_no_gradient_flows_through_the_targets_of_eq_15(batch):
    agent = agent_of(config_of())
    agent.q_loss(batch, torch.zeros(B)).backward()
    assert all(p.grad is not None for p in agent.qf.parameters())
    others = [*agent.q_target.parameters(), *agent.actor.parameters(), *agent.vf.parameters()]
    assert all(p.grad is None for p in others)


# --- Eq. 16 ---


def test_drawn_actions_are_clamped_and_their_densities_are_not(batch):
    actor = agent_of(config_of()).actor
    torch.manual_seed(5)
    actions, log_prob = actor.sample(batch.observations, 50)
    torch.manual_seed(5)
    mean, log_std = actor(batch.observations)
    policy = torch.distributions.Normal(mean, log_std.exp())
    drawn = mean + log_std.exp() * torch.randn(50, B, A)
    assert 0.2 < (drawn.abs() > 1).float().mean() < 0.8
    torch.testing.assert_close(actions, drawn.clamp(-1, 1))
    torch.testing.assert_close(log_prob, policy.log_prob(drawn).sum(-1))


def policy_loss_by_hand(agent, batch, advantage, seed):
    """AWR on the offline-like rows, alpha log pi - min Q on the online-like rows."""
    config, losses = agent.config, []
    torch.manual_seed(seed)
    noise = torch.randn(1, B - N_OFFLINE, A)[0]
    for i in range(B):
        mean, log_std = agent.actor(batch.observations[i])
        policy = torch.distributions.Normal(mean, log_std.exp())
        if i < N_OFFLINE:
            weight = min(math.exp(config.beta * advantage[i]), 100.0)
            losses.append(-weight * policy.log_prob(batch.actions[i]).sum())
        else:
            drawn = mean + log_std.exp() * noise[i - N_OFFLINE]
            q = torch.min(*agent.qf.both(batch.observations[i], drawn.clamp(-1, 1)))
            losses.append(config.sac_alpha * policy.log_prob(drawn).sum() - q)
    return sum(losses) / B


def test_policy_loss_and_its_gradient_are_those_of_eq_16(batch, advantage):
    agent = agent_of(config_of(sac_alpha=0.3))
    expected = policy_loss_by_hand(agent, batch, advantage, seed=5)
    torch.manual_seed(5)
    loss = agent.policy_loss(batch, advantage)
    torch.testing.assert_close(loss, expected)
    parameters = list(agent.actor.parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters))
    loss.backward()
    others = [*agent.qf.parameters(), *agent.q_target.parameters(), *agent.vf.parameters()]
    assert all(p.grad is None for p in others)


def test_each_half_has_its_own_term_of_eq_16(batch, advantage):
    agent = agent_of(config_of())

    def loss(batch, advantage):
        torch.manual_seed(5)
        return agent.policy_loss(batch, advantage).item()

    before = loss(batch, advantage)
    # Neither the stored actions nor the advantages of the online-like rows count ...
    more = advantage + torch.arange(B).ge(N_OFFLINE)
    assert loss(changed(batch, ONLINE, actions=0.9), more) == before
    assert loss(changed(batch, OFFLINE, actions=0.9), advantage) != before
    # ... and Q counts in their share of the batch alone.
    for q in (agent.qf.q1, agent.qf.q2):
        q.net[-2].bias.data += 1.0
    assert loss(batch, advantage) == pytest.approx(before - (B - N_OFFLINE) / B)


def test_q_gradient_of_an_update_is_that_of_the_q_loss_alone(batch):
    agent = agent_of(config_of(online_loss="sac"))
    next_v = agent.vf(batch.next_observations).detach()
    torch.manual_seed(11)
    parameters = list(agent.qf.parameters())
    expected = torch.autograd.grad(agent.q_loss(batch, next_v), parameters)
    torch.manual_seed(11)
    agent.train(batch)
    torch.testing.assert_close([p.grad for p in parameters], list(expected))


@pytest.mark.parametrize("module", [iql, dare_iql])
def test_updates_leave_no_graph_behind(batch, module):
    """A target that required a gradient would hold the graphs of all updates before it."""
    agent = agent_of(config_of(), module)
    for _ in range(2):
        log_dict = agent.train(batch)
    kept = [*agent.q_target.parameters(), *log_dict.values()]
    assert not any(x.requires_grad or x.grad_fn for x in kept)


# --- Eq. 35 ---


def test_value_loss_is_eq_35(batch, advantage):
    agent = agent_of(config_of(online_loss="expectile", iql_tau=0.7, online_expectile=0.95))
    expectiles = [0.7] * N_OFFLINE + [0.95] * (B - N_OFFLINE)
    weights = [abs(e - (u < 0)) for e, u in zip(expectiles, advantage.tolist(), strict=True)]
    expected = sum(w * u**2 for w, u in zip(weights, advantage.tolist(), strict=True)) / B
    assert agent.value_loss(advantage).item() == pytest.approx(expected)


def losses(agent, batch, advantage):
    """Value, critic and actor loss with the same draws."""
    torch.manual_seed(3)
    next_v = torch.linspace(-1, 1, B)
    return torch.stack(
        [
            agent.value_loss(advantage),
            agent.q_loss(batch, next_v),
            agent.policy_loss(batch, advantage),
        ]
    ).tolist()


@pytest.mark.parametrize(
    "online_loss, online, differ",
    [
        ("sac", True, [False, True, True]),
        ("expectile", True, [True, True, False]),
        ("none", True, [False, False, False]),
        ("sac", False, [False, False, False]),
        ("expectile", False, [False, False, False]),
    ],
)
def test_what_differs_from_iql(batch, advantage, online_loss, online, differ):
    config = config_of(online_loss=online_loss)
    expected = losses(agent_of(config, iql, online), batch, advantage)
    found = losses(agent_of(config, dare_iql, online), batch, advantage)
    assert [x != y for x, y in zip(found, expected, strict=True)] == differ


def test_iql_losses_by_hand(batch, advantage):
    """Eqs. 2 to 4, which the rows of the offline half keep."""
    agent, next_v = agent_of(config_of(), iql), torch.linspace(-1, 1, B)
    targets = batch.rewards + 0.9 * (1 - batch.terminals) * next_v
    q1, q2 = agent.qf.both(batch.observations, batch.actions)
    weights = (3.0 * advantage).exp().clamp(max=100.0)
    mean, log_std = agent.actor(batch.observations)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(batch.actions).sum(-1)
    expected = [
        (torch.where(advantage < 0, 0.3, 0.7) * advantage**2).mean(),
        (((q1 - targets) ** 2).mean() + ((q2 - targets) ** 2).mean()) / 2,
        -(weights * log_prob).mean(),
    ]
    found = losses(agent, batch, advantage)
    np.testing.assert_allclose(found, [x.item() for x in expected], rtol=1e-5)


def test_actor_lr_decays_offline_only(batch):
    agent = agent_of(config_of(offline_iterations=4, online_loss="none"), online=False)
    rates = []
    for _ in range(4):
        agent.train(batch)
        rates.append(agent.optimizer.param_groups[-1]["lr"].item())  # of this update
    expected = [3e-4 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in (0, 1, 2, 3)]
    np.testing.assert_allclose(rates, expected, rtol=1e-7, atol=1e-12)
    agent.start_online()
    agent.train(batch)
    rates = [float(g["lr"]) for g in agent.optimizer.param_groups]
    np.testing.assert_allclose(rates, 3e-4, rtol=1e-7)


# --- Rewards ---


@pytest.fixture
def dataset():
    """Three episodes with returns 3 (terminal), -1 (time-out) and 10 (end of the data)."""
    states = np.arange(14.0, dtype=np.float32).reshape(7, 2)
    observations, next_observations = states, states + 2
    next_observations[3] += 0.5  # the state behind a time-out is not the next row
    return {
        "observations": observations,
        "next_observations": next_observations,
        "rewards": np.array([1, 2, -2, 1, 3, 3, 4], np.float32),
        "terminals": np.array([0, 1, 0, 0, 0, 0, 0], bool),
    }


@pytest.mark.parametrize("module", MODULES)
def test_returns_end_at_terminals_and_gaps(dataset, module):
    assert module.return_reward_range(dataset) == (-1.0, 10.0)
    dataset["terminals"][1] = False  # the first two episodes join: 2 and 10
    assert module.return_reward_range(dataset) == (2.0, 10.0)
    dataset["next_observations"][3] -= 0.5  # all join
    assert module.return_reward_range(dataset) == (12.0, 12.0)


@pytest.mark.parametrize(
    "env, normalize, scale, shift",
    [
        ("hopper-medium-v2", False, 1.0, 0.0),
        ("hopper-medium-v2", True, 1000 / 11, 0.0),
        ("antmaze-umaze-v2", True, 1.0, -1.0),
        ("antmaze-umaze-v2", False, 1.0, 0.0),
    ],
)
@pytest.mark.parametrize("module", MODULES)
def test_rewards_are_scaled_and_shifted(dataset, module, env, normalize, scale, shift):
    raw = dataset["rewards"].copy()
    config = module.TrainConfig(env=env, normalize_reward=normalize)
    assert module.modify_reward(dataset, config) == pytest.approx((scale, shift))
    np.testing.assert_allclose(dataset["rewards"], scale * raw + shift, rtol=1e-6)


@pytest.mark.parametrize("module", MODULES)
def test_rewards_of_equal_returns_cannot_be_scaled(dataset, module):
    dataset["rewards"][:] = 0.0
    config = module.TrainConfig(env="hopper-medium-v2", normalize_reward=True)
    with pytest.raises(SystemExit, match="^error: all episodes have the same return: use --norm"):
        module.modify_reward(dataset, config)


@pytest.mark.parametrize("module", MODULES)
def test_online_rewards_are_scaled_as_the_data_is(monkeypatch, tmp_path, module):
    """Both buffers of a run hold 1000 r / range of returns."""
    raw, buffers, step = [], [], d4rl.ResumableEnv.step

    class Buffer(module.ReplayBuffer):
        def __init__(self, *args):
            super().__init__(*args)
            buffers.append(self)

    def watched(env, action):
        transition = step(env, action)
        raw.append(transition[1])
        return transition

    monkeypatch.setattr(module, "ReplayBuffer", Buffer)
    monkeypatch.setattr(d4rl.ResumableEnv, "step", watched)
    sizes = dict(offline_iterations=0, online_iterations=9, initial_collection_steps=8)
    run(module, tmp_path, **sizes, normalize_reward=True)
    dataset = d4rl.qlearning_dataset(ENV, data=DATA)
    smallest, largest = module.return_reward_range(dataset)
    scale = 1000 / (largest - smallest)
    offline, online = (buffer.rows(slice(None)) for buffer in buffers)
    np.testing.assert_allclose(offline.rewards, scale * dataset["rewards"], rtol=1e-6)
    np.testing.assert_allclose(online.rewards, scale * np.array(raw), rtol=1e-6)
    assert scale != pytest.approx(1, rel=0.1) and len(raw) == 9


# --- Robots with one action ---


@pytest.mark.parametrize("module", MODULES)
def test_a_robot_with_one_action(module):
    """Its batches keep the shape [B, 1]; actions of data may come as a column or a list."""
    buffer = module.ReplayBuffer(3, 1, 11)
    columns = dict(observations=np.eye(10, 3), actions=np.arange(10.0)[:, None] / 10)
    columns |= dict(rewards=np.arange(10.0), next_observations=np.ones((10, 3)))
    columns |= dict(terminals=np.zeros(10, bool))
    buffer.load_d4rl_dataset({k: np.float32(x) for k, x in columns.items()})
    buffer.add_transition(np.ones(3, "f"), np.float32([0.5]), 2.0, np.zeros(3, "f"), True)
    batch = buffer.sample(64)
    assert [x.shape for x in batch] == [(64, 3), (64, 1), (64,), (64, 3), (64,)]
    last = [x.tolist() for x in buffer.rows(slice(10, None))]
    assert last == [[[1.0] * 3], [[0.5]], [2.0], [[0.0] * 3], [1.0]]
    config = module.TrainConfig(env="hopper-medium-v2", hidden_dim=8, batch_size=64)
    agent = module.ImplicitQLearning(3, 1, config)
    assert agent.qf(batch.observations, batch.actions).shape == (64,)
    for online in (False, True):
        if online:
            agent.start_online()
        assert all(x.isfinite() for x in agent.train(batch).values())
    assert agent.act(np.ones((2, 3))).shape == (2, 1)


@pytest.mark.parametrize("module", MODULES)
def test_batches_are_drawn_uniformly_from_the_filled_rows(module):
    buffer = module.ReplayBuffer(3, 2, 50)
    for k in range(5):
        buffer.add_transition(np.full(3, k, "f"), np.zeros(2, "f"), k, np.zeros(3, "f"), False)
    torch.manual_seed(0)
    counts = buffer.sample(20_000).rewards.long().bincount()
    assert counts.shape == (5,) and (counts / 20_000 - 0.2).abs().max() < 0.015
    few = buffer.sample_indices(20_000, torch.tensor(2)).bincount()
    assert few.shape == (2,) and (few / 20_000 - 0.5).abs().max() < 0.02
    other = module.ReplayBuffer(3, 2, 60)
    other.load_state_dict(buffer.state_dict())
    assert other.size == 5
    for found, expected in zip(other.rows(slice(5)), buffer.rows(slice(5)), strict=True):
        assert torch.equal(found, expected)
