"""DARE's losses, Eqs. 15, 16 and 35, row by row against plain formulas; rewards and returns."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dare_iql
import iql
from dare_iql import Batch

S, A, B, N_OFFLINE = 3, 2, 8, 5


def config(**settings):
    sizes = {"hidden_dim": 8, "batch_size": B, "mixing_ratio": N_OFFLINE / B, "n_max_actions": 4}
    return dare_iql.Config(env="hopper-medium-v2", **{**sizes, "discount": 0.9, **settings})


def agent_of(cfg, module=dare_iql, online=True):
    """An agent whose target Q differs from its Q and whose draws often exceed the bounds."""
    torch.manual_seed(0)
    agent = module.ImplicitQLearning(S, A, cfg, "cpu")
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
    return Batch(s, a.tanh(), r.squeeze(1), s2, done)


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
    cfg, targets = agent.cfg, []
    torch.manual_seed(seed)
    noise = torch.randn(cfg.n_max_actions, B - N_OFFLINE, A)
    mean, log_std = agent.actor(batch.next_observations)
    for i in range(B):
        value = next_v[i]
        if i >= N_OFFLINE:
            drawn = mean[i] + log_std.exp() * noise[:, i - N_OFFLINE]
            twins = [agent.q_target.both(batch.next_observations[i], a.clamp(-1, 1)) for a in drawn]
            value = max(min(q1.item(), q2.item()) for q1, q2 in twins)
        targets.append(batch.rewards[i] + cfg.discount * (1 - batch.terminals[i]) * value)
    return torch.stack(targets).detach()


@pytest.mark.parametrize("online_loss", ["sac", "expectile"])
def test_critic_loss_is_eq_15(batch, online_loss):
    agent, next_v = agent_of(config(online_loss=online_loss)), torch.randn(B)
    targets = targets_by_hand(agent, batch, next_v, seed=7)
    q1, q2 = agent.qf.both(batch.observations, batch.actions)
    expected = ((q1 - targets) ** 2 + (q2 - targets) ** 2).sum() / (2 * B)
    torch.manual_seed(7)
    torch.testing.assert_close(agent.critic_loss(batch, next_v), expected)


def test_targets_of_eq_15_use_their_own_next_value(batch):
    agent = agent_of(config())

    def loss(next_v):
        torch.manual_seed(7)
        return agent.critic_loss(batch, next_v).item()

    next_v = torch.linspace(-1, 1, B)
    other = next_v.clone()
    other[ONLINE] += 10  # V(s') is not in the online half
    assert loss(other) == loss(next_v)
    other[0] += 10
    assert loss(other) != loss(next_v)


def test_no_gradient_flows_through_the_targets_of_eq_15(batch):
    agent = agent_of(config())
    agent.critic_loss(batch, torch.zeros(B)).backward()
    assert all(p.grad is not None for p in agent.qf.parameters())
    others = [*agent.q_target.parameters(), *agent.actor.parameters(), *agent.vf.parameters()]
    assert all(p.grad is None for p in others)


# --- Eq. 16 ---


def test_drawn_actions_are_clamped_and_their_densities_are_not(batch):
    actor = agent_of(config()).actor
    torch.manual_seed(5)
    actions, log_prob = actor.sample(batch.observations, 50)
    torch.manual_seed(5)
    mean, log_std = actor(batch.observations)
    policy = torch.distributions.Normal(mean, log_std.exp())
    drawn = mean + log_std.exp() * torch.randn(50, B, A)
    assert 0.2 < (drawn.abs() > 1).float().mean() < 0.8
    torch.testing.assert_close(actions, drawn.clamp(-1, 1))
    torch.testing.assert_close(log_prob, policy.log_prob(drawn).sum(-1))


def actor_loss_by_hand(agent, batch, advantage, seed):
    """AWR on the offline-like rows, alpha log pi - min Q on the online-like rows."""
    cfg, losses = agent.cfg, []
    torch.manual_seed(seed)
    noise = torch.randn(1, B - N_OFFLINE, A)[0]
    for i in range(B):
        mean, log_std = agent.actor(batch.observations[i])
        policy = torch.distributions.Normal(mean, log_std.exp())
        if i < N_OFFLINE:
            weight = min(math.exp(cfg.beta * advantage[i]), 100.0)
            losses.append(-weight * policy.log_prob(batch.actions[i]).sum())
        else:
            drawn = mean + log_std.exp() * noise[i - N_OFFLINE]
            q = torch.min(*agent.qf.both(batch.observations[i], drawn.clamp(-1, 1)))
            losses.append(cfg.sac_alpha * policy.log_prob(drawn).sum() - q)
    return sum(losses) / B


def test_actor_loss_and_its_gradient_are_those_of_eq_16(batch, advantage):
    agent = agent_of(config(sac_alpha=0.3))
    expected = actor_loss_by_hand(agent, batch, advantage, seed=5)
    torch.manual_seed(5)
    loss = agent.actor_loss(batch, advantage)
    torch.testing.assert_close(loss, expected)
    parameters = list(agent.actor.parameters())
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters))
    loss.backward()
    others = [*agent.qf.parameters(), *agent.q_target.parameters(), *agent.vf.parameters()]
    assert all(p.grad is None for p in others)


def test_each_half_has_its_own_term_of_eq_16(batch, advantage):
    agent = agent_of(config())

    def loss(batch, advantage):
        torch.manual_seed(5)
        return agent.actor_loss(batch, advantage).item()

    before = loss(batch, advantage)
    # Neither the stored actions nor the advantages of the online-like rows count ...
    more = advantage + torch.arange(B).ge(N_OFFLINE)
    assert loss(changed(batch, ONLINE, actions=0.9), more) == before
    assert loss(changed(batch, OFFLINE, actions=0.9), advantage) != before
    # ... and Q counts in their share of the batch alone.
    for q in (agent.qf.q1, agent.qf.q2):
        q.net[-1].bias.data += 1.0
    assert loss(batch, advantage) == pytest.approx(before - (B - N_OFFLINE) / B)


def test_q_gradient_of_an_update_is_that_of_the_critic_loss_alone(batch):
    agent = agent_of(config(online_loss="sac"))
    next_v = agent.vf(batch.next_observations).detach()
    torch.manual_seed(11)
    parameters = list(agent.qf.parameters())
    expected = torch.autograd.grad(agent.critic_loss(batch, next_v), parameters)
    torch.manual_seed(11)
    agent.update(batch)
    torch.testing.assert_close([p.grad for p in parameters], list(expected))


@pytest.mark.parametrize("module", [iql, dare_iql])
def test_updates_leave_no_graph_behind(batch, module):
    """A target that required a gradient would hold the graphs of all updates before it."""
    agent = agent_of(config(), module)
    for _ in range(2):
        metrics = agent.update(batch)
    kept = [*agent.q_target.parameters(), *metrics.values()]
    assert not any(x.requires_grad or x.grad_fn for x in kept)


# --- Eq. 35 ---


def test_value_loss_is_eq_35(batch, advantage):
    agent = agent_of(config(online_loss="expectile", iql_tau=0.7, online_expectile=0.95))
    expectiles = [0.7] * N_OFFLINE + [0.95] * (B - N_OFFLINE)
    weights = [abs(e - (u < 0)) for e, u in zip(expectiles, advantage.tolist(), strict=True)]
    expected = sum(w * u**2 for w, u in zip(weights, advantage.tolist(), strict=True)) / B
    assert agent.value_loss(batch, advantage).item() == pytest.approx(expected)


def losses(agent, batch, advantage):
    """Value, critic and actor loss with the same draws."""
    torch.manual_seed(3)
    next_v = torch.linspace(-1, 1, B)
    return torch.stack(
        [
            agent.value_loss(batch, advantage),
            agent.critic_loss(batch, next_v),
            agent.actor_loss(batch, advantage),
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
    cfg = config(online_loss=online_loss)
    expected = losses(agent_of(cfg, iql, online), batch, advantage)
    found = losses(agent_of(cfg, dare_iql, online), batch, advantage)
    assert [x != y for x, y in zip(found, expected, strict=True)] == differ


def test_iql_losses_by_hand(batch, advantage):
    """Eqs. 2 to 4, which the rows of the offline half keep."""
    agent, next_v = agent_of(config(), iql), torch.linspace(-1, 1, B)
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
    agent = agent_of(config(offline_iterations=4, online_loss="none"), online=False)
    rates = []
    for _ in range(4):
        agent.update(batch)
        rates.append(agent.optimizer.param_groups[-1]["lr"].item())
    expected = [3e-4 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(rates, expected, rtol=1e-7, atol=1e-12)
    agent.start_online()
    agent.update(batch)
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


@pytest.mark.parametrize("module", [iql, dare_iql])
def test_return_range_splits_at_terminals_and_gaps(dataset, module):
    assert module.return_range(dataset) == 11.0
    dataset["terminals"][1] = False  # the first two episodes join: 2 and 10
    assert module.return_range(dataset) == 8.0
    dataset["next_observations"][3] -= 0.5  # all join
    assert module.return_range(dataset) == 0.0


@pytest.mark.parametrize(
    "env, normalize, expected",
    [
        ("hopper-medium-v2", False, (1.0, 0.0)),
        ("hopper-medium-v2", True, (1000 / 11, 0.0)),
        ("antmaze-umaze-v2", True, (1.0, -1.0)),
        ("antmaze-umaze-v2", False, (1.0, 0.0)),
    ],
)
@pytest.mark.parametrize("module", [iql, dare_iql])
def test_reward_transform(dataset, module, env, normalize, expected):
    cfg = module.Config(env=env, normalize_reward=normalize)
    assert module.reward_transform(dataset, cfg) == pytest.approx(expected)


# --- Energies and one pass of Algorithm 1 ---


def bare_dare(agent=None, **settings):
    """The exchange without its models, which the tests below do not need or replace."""
    dare = object.__new__(dare_iql.DARE)
    dare.cfg, dare.behavior, dare.energy = config(**settings), "nu_0", "f_phi"
    dare.guided_noise = "eps"
    dare.agent, dare.q_spread, dare.n_spreads = agent, torch.ones(()), torch.zeros(())
    return dare


def test_energies_are_q_in_units_of_its_usual_spread():
    agent = agent_of(config())
    dare = bare_dare(agent, energy_beta=2.0)
    spreads = []
    for k in range(3):
        states, actions = torch.randn(4, S), torch.randn(4, 5, A) * (k + 1)
        q = torch.stack(
            [torch.min(*agent.q_target.both(s.expand(5, -1), a))
             for s, a in zip(states, actions, strict=True)]
        )  # fmt: skip
        spreads.append(q.std(1).mean())
        expected = 2.0 * q / torch.stack(spreads).mean()  # of few updates the plain mean
        torch.testing.assert_close(dare.energies(states, actions), expected)
    raw = bare_dare(agent, energy_beta=2.0, energy_normalize=False)
    torch.testing.assert_close(raw.energies(states, actions), 2.0 * q)


def test_resampled_actions_are_those_of_the_rows_drawn_by_q():
    """Of the support actions of each row's own state, with probability softmax(s beta_E Q)."""
    agent, draws = agent_of(config()), 20_000
    settings = {"reference": "resample", "n_reference": draws, "n_support": 4, "energy_beta": 2.0}
    dare = bare_dare(agent, **settings, guidance_scale=3.0, energy_normalize=False)
    states = torch.randn(5, S)
    dare.actions, dare.online_actions = torch.rand(10, 4, A), torch.rand(6, 4, A)
    dare.offline_buffer = SimpleNamespace(index=torch.tensor([7, 0]))
    dare.online_buffer = SimpleNamespace(index=torch.tensor([5, 5, 1]))
    actions = torch.cat([dare.actions[[7, 0]], dare.online_actions[[5, 5, 1]]])
    with torch.no_grad():
        q = agent.q_target(states[:, None].expand(-1, 4, -1), actions)
    torch.manual_seed(0)
    found = dare.reference_actions(states)
    assert found.shape == (5, draws, A)
    is_action = (found[:, :, None] == actions[:, None]).all(-1)
    assert (is_action.sum(-1) == 1).all()
    expected = torch.softmax(3.0 * 2.0 * q, -1)
    torch.testing.assert_close(is_action.float().mean(1), expected, rtol=0, atol=0.015)
    assert (expected.amax(-1) - expected.amin(-1)).min() > 0.05  # else the test would see nothing


@pytest.mark.parametrize("chunk", [1, 4])
def test_resampling_draws_rows_with_support_alone(monkeypatch, chunk):
    monkeypatch.setattr(dare_iql, "SUPPORT_CHUNK", chunk)
    monkeypatch.setattr(
        dare_iql,
        "draw_support_actions",
        lambda _, x, k, steps: (x[:, None, :A] + 1).repeat(1, k, 1),
    )
    dare = bare_dare(agent_of(config()), reference="resample")
    dare.has_support, dare.energy_fitted, dare.n_online = True, True, 0
    dare.n_online_drawable, dare.online_actions = torch.tensor(0), torch.zeros(20, 16, A)
    dare.online_buffer = buffer = dare_iql.ReplayBuffer(S, A, 20, "cpu")
    for n in range(1, 10):
        buffer.add(torch.randn(1, S), torch.rand(1, A), [0.0], torch.randn(1, S), [0.0])
        dare.prepare()
        drawable = buffer.n_drawable.item()
        assert drawable == n if chunk == 1 else n - 4 < drawable <= n
        supported = buffer.batch(buffer.rows[:drawable]).observations[:, :A] + 1
        torch.testing.assert_close(dare.online_actions[:drawable, 0], supported)
        buffer.sample(200)
        assert buffer.index.max() == drawable - 1


@pytest.mark.parametrize("when", ["always", "separated"])
def test_a_pass_of_algorithm_1_asks_whether_to_exchange(monkeypatch, batch, when):
    # The first offline rows are far from their references and all others on them.
    references = batch.actions[:, None].clone()
    references[:3] += 1.0
    monkeypatch.setattr(dare_iql, "sample_actions", lambda *args, **kwargs: references)
    dare = bare_dare(guidance_scale=0, exchange_when=when)
    halves = [Batch(*(x[rows] for x in batch)) for rows in (OFFLINE, ONLINE)]
    *after, metrics = dare(*halves)
    assert metrics["mu_offline"] > metrics["mu_online"]
    assert (metrics["exchanged"] > 0) == (when == "always")


@pytest.mark.parametrize("kind, align", [("gaussian", "gaussian_kl"), ("direct", "softmax_kl")])
def test_a_pass_of_algorithm_1_exchanges_by_the_scores(monkeypatch, batch, kind, align):
    # References far from the first offline rows and near the online rows: these change sides.
    references = torch.stack([batch.actions, batch.actions + 0.1], 1)
    references[:3] += torch.tensor([1.0, -2.0])

    def sampled(behavior, states, n, energy, guidance_scale, steps, noise_prediction):
        assert (behavior, energy) == ("nu_0", "f_phi") and torch.equal(states, batch.observations)
        assert (n, guidance_scale, steps, noise_prediction) == (2, 0, 7, "eps")
        return references

    monkeypatch.setattr(dare_iql, "sample_actions", sampled)
    settings = {"exchange": kind, "align": align, "max_exchange": 1, "n_reference": 2}
    dare = bare_dare(guidance_scale=0, diffusion_steps=7, **settings)
    halves = [Batch(*(x[rows] for x in batch)) for rows in (OFFLINE, ONLINE)]
    offline, online, metrics = dare(*halves)
    scores = dare_iql.alignment_score(batch.actions, references, align)
    scores = scores.split([N_OFFLINE, B - N_OFFLINE])
    if kind == "gaussian":
        *expected, exchanged, tau = dare_iql.exchange(*halves, *scores, 1)
    else:
        *expected, exchanged, tau = dare_iql.direct_exchange(*halves, *scores)
    torch.testing.assert_close([offline, online], expected)
    assert dare_iql.exchange(*halves, *scores)[2] > 1 == dare.cfg.max_exchange
    fits = [x.mean() for x in scores] + [x.std(correction=0) for x in scores]
    names = "exchanged tau mu_offline mu_online sigma_offline sigma_online".split()
    expected_metrics = dict(zip(names, [exchanged.float(), tau, *fits], strict=True))
    torch.testing.assert_close(metrics, expected_metrics)
