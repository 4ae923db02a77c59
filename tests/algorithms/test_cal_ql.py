"""Cal-QL and CQL: CORL's recorded updates, returns, and the pieces that they do not cover."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import cal_ql
from cal_ql import TanhGaussian, TensorBatch

S, A = 11, 3
FILE = dict(np.load(Path(__file__).parents[1] / "data" / "cal_ql_two_updates.npz"))


# --- CORL's recorded updates ---


def initial_agent(config):
    """The agent with the recorded initial weights, which are those of CORL's order and seed."""
    torch.manual_seed(7)

    def linears(*dims):
        pairs = list(itertools.pairwise(dims))
        layers = [torch.nn.Linear(*pair) for pair in pairs]
        return [layer.apply(cal_ql.init_module_weights) for layer in layers]

    twins = [linears(S + A, 256, 256, 1) for _ in range(2)]
    policy = linears(S, 256, 256, 256, 2 * A)
    agent = cal_ql.CalQL(S, A, config)
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
    if agent.config.cql_lagrange:
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
    sizes = {"hidden_dim": 256, "q_n_hidden_layers": 2, "discount": 0.99}
    config = config_of(**sizes, **VARIANTS[variant])
    agent = initial_agent(config)
    feed_draws = request.getfixturevalue("feed_draws")
    draws = "cal_ql" if variant == "cql" else variant  # the same, and kept once
    for i in range(2):
        prefix = f"{draws}/draw{i}/"
        feed_draws(sorted((k, v) for k, v in FILE.items() if k.startswith(prefix)))
        columns = "observations actions rewards next_observations dones mc_returns".split()
        rows = [torch.from_numpy(FILE[f"{variant}/batch{i}/{name}"]) for name in columns]
        logged = agent.train(TensorBatch(*(x.squeeze(-1) for x in rows)))
        log = {k.split("/")[-1]: v for k, v in FILE.items() if k.startswith(f"{variant}/log{i}/")}
        expected = {
            "q_loss": log["qf1_loss"] + log["qf2_loss"],
            "regularizer": log["cql_min_qf1_loss"] + log["cql_min_qf2_loss"],
            "policy_loss": log["policy_loss"],
            "alpha": log["alpha"],
            "log_pi": log["log_pi"],
            "q": (log["average_qf1"] + log["average_qf2"]) / 2,
        }
        if config.cql_lagrange:
            expected["regularizer"] = expected["regularizer"] / log["alpha_prime"]
            expected["alpha_prime"] = log["alpha_prime"]
        found = {k: logged[k].item() for k in expected}
        assert found == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-4)
        for name, tensor in weights(agent).items():
            after = f"{variant}/after{i}/{name}/"
            norm, head = tensor.norm().item(), tensor.flatten()[:8]
            assert norm == pytest.approx(float(FILE[after + "norm"]), rel=1e-4), name
            np.testing.assert_allclose(head, FILE[after + "head"], rtol=1e-4, atol=2e-6)


# --- Networks ---


def test_batched_twins_are_two_networks():
    torch.manual_seed(0)
    qf = cal_ql.BatchedTwinQ(S, A, 16, 3)
    qf.mean.normal_()
    qf.std.uniform_(0.5, 2.0)
    for bias in qf.biases:
        bias.data.normal_()
    state, action = torch.randn(5, 1, S).expand(-1, 7, -1), torch.randn(5, 7, A)
    both = qf.both(state, action)
    assert both.shape == (2, 5, 7) and len(qf.weights) == 4
    x = torch.cat([(state - qf.mean) / qf.std, action], -1)
    for k in range(2):
        h = x
        for i in range(4):
            h = (h.relu() if i else h) @ qf.weights[i][k] + qf.biases[i][k]
        torch.testing.assert_close(both[k], h.squeeze(-1))
    torch.testing.assert_close(qf(state, action), torch.minimum(*both))
    assert not torch.allclose(*both)


def test_initial_weights_are_orthogonal_with_gain_sqrt_2():
    torch.manual_seed(0)
    agent = cal_ql.CalQL(S, A, config_of(hidden_dim=32))
    layers = [w[k] for w in agent.qf.weights for k in range(2)]
    layers += [m.weight.T for m in agent.actor.net.net[::2]]
    assert len(layers) == 2 * 4 + 4
    for w in layers:
        w = w if w.shape[0] <= w.shape[1] else w.T
        torch.testing.assert_close(w @ w.T, 2.0 * torch.eye(len(w)), atol=1e-5, rtol=0)
    biases = [*agent.qf.biases, *(m.bias for m in agent.actor.net.net[::2])]
    assert all((b == 0).all() for b in biases)
    assert not any(torch.equal(*w) for w in agent.qf.weights)  # equal twins would stay equal
    for mine, target in zip(agent.qf.parameters(), agent.q_target.parameters(), strict=True):
        assert torch.equal(mine, target)


def test_draws_have_the_density_of_a_squashed_gaussian():
    torch.manual_seed(0)
    mean, log_std = torch.randn(6, A), torch.randn(6, A) - 0.5
    actions, log_prob = TanhGaussian(mean, log_std).sample(4)
    assert actions.shape == (6, 4, A) and log_prob.shape == (6, 4)
    normal = torch.distributions.Normal(mean[:, None].double(), log_std[:, None].double().exp())
    squashed = torch.distributions.TransformedDistribution(
        normal, torch.distributions.TanhTransform()
    )
    inside = (actions.abs() < 0.999).all(-1)  # atanh is exact enough here
    expected = squashed.log_prob(actions.double().clamp(-0.9999999, 0.9999999)).sum(-1)
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(log_prob[inside], expected[inside].float(), rtol=1e-3, atol=1e-3)
    far, log_far = TanhGaussian(torch.full((1, A), 60.0), torch.zeros(1, A)).sample()
    assert (far == 1).all() and log_far.isfinite().all()


def test_standardized_networks_see_standardized_data():
    """As CORL, which standardizes the data instead."""
    observations = np.random.default_rng(0).normal(3.0, 5.0, (500, S)).astype("f4")
    mean, std = (torch.from_numpy(x) for x in (observations.mean(0), observations.std(0) + 1e-3))
    config = config_of(hidden_dim=8)
    agents = []
    for standardize in (True, False):
        torch.manual_seed(0)
        agents.append(cal_ql.CalQL(S, A, config))
        if standardize:
            agents[-1].standardize(observations)
    raw = batch_of(4)
    scaled = [(x - mean) / std for x in (raw.observations, raw.next_observations)]
    scaled = raw._replace(observations=scaled[0], next_observations=scaled[1])
    logged = []
    for agent, batch in zip(agents, (raw, scaled), strict=True):
        torch.manual_seed(1)
        logged.append([agent.train(batch) for _ in range(3)][-1])
    torch.testing.assert_close(*logged)


def test_policy_bounds_its_standard_deviation_and_acts_by_its_squashed_mean():
    torch.manual_seed(0)
    agent = cal_ql.CalQL(S, A, config_of(hidden_dim=8))
    state = np.random.default_rng(0).normal(size=(4, S))
    with torch.no_grad():
        for offset, bound in [(50.0, 2.0), (-50.0, -20.0)]:
            agent.actor.log_std_offset.fill_(offset)
            mean, log_std = agent.actor(torch.from_numpy(state).float())
            assert (log_std == bound).all()
    action = agent.act(state, deterministic=True)
    np.testing.assert_allclose(action, mean.tanh(), rtol=1e-6)
    assert action.shape == (4, A) and (action != mean.numpy()).all()
    np.testing.assert_allclose(agent.act(state, deterministic=False), action, atol=1e-6)
    agent.actor.log_std_offset.data.fill_(-1.0)
    drawn = [agent.act(state, deterministic=False) for _ in range(2)]
    assert (drawn[0] != drawn[1]).all() and np.abs(drawn).max() < 1


# --- Losses ---

B, N_OFFLINE = 8, 5


def config_of(module=cal_ql, **settings):
    sizes = {"hidden_dim": 16, "batch_size": B, "mixing_ratio": N_OFFLINE / B, "discount": 0.9}
    settings = {"env": "hopper-medium-v2", "device": "cpu", **sizes, **settings}
    return module.TrainConfig(**settings)


def batch_of(n, seed=1, mc_returns=0.0):
    generator = torch.Generator().manual_seed(seed)
    s, a, r, s2 = (torch.randn(n, k, generator=generator) for k in (S, A, 1, S))
    done = (torch.arange(n) % 3 == 1).float()
    return TensorBatch(s, a.tanh(), r.squeeze(1), s2, done, torch.full((n,), mc_returns))


def agent_of(config, module=cal_ql, online=False):
    torch.manual_seed(0)
    agent = module.CalQL(S, A, config)
    for parameter in agent.q_target.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    agent.online = online
    return agent


def terms(agent, batch, seed=5):
    """TD term, alpha R and mean Q."""
    torch.manual_seed(seed)
    policy = agent.actor(batch.observations)
    with torch.no_grad():
        next_policy = agent.actor(batch.next_observations)
    return agent.q_loss(batch, policy, next_policy)


@pytest.mark.parametrize("best_of", [1, 10])
def test_td_target_by_hand(best_of):
    agent = agent_of(config_of(cql_max_target_backup=best_of > 1))
    batch = batch_of(B)
    policy = TanhGaussian(*(x.detach() for x in agent.actor(batch.next_observations)))
    torch.manual_seed(3)
    found = agent.td_target(batch, policy)
    torch.manual_seed(3)
    actions, _ = policy.sample(best_of)
    for i in range(B):
        q = [agent.q_target.both(batch.next_observations[i : i + 1], a[None]) for a in actions[i]]
        value = max(min(x.flatten().tolist()) for x in q)
        expected = batch.rewards[i] + 0.9 * (1 - batch.terminals[i]) * value
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-5)


def test_regularizer_is_the_importance_weighted_logsumexp():
    """By a plain loop; the mean over 3 x 10 actions of exp(Q) / density up to log 30."""
    agent, batch = agent_of(config_of(calibrated=False, cql_temp=0.7)), batch_of(B)
    q = agent.qf.both(batch.observations, batch.actions)
    with torch.no_grad():
        policies = agent.actor(batch.observations), agent.actor(batch.next_observations)
    torch.manual_seed(4)
    found = agent.conservative_regularizer(batch, q, *policies)
    torch.manual_seed(4)
    kinds = [(2 * torch.rand(B, 10, A) - 1, torch.full((B, 10), A * math.log(0.5)))]
    kinds += [policy.sample(10) for policy in policies]
    for i in range(B):
        exponents = [[], []]
        for actions, log_density in kinds:
            for action, log_p in zip(actions[i], log_density[i], strict=True):
                twins = agent.qf.both(batch.observations[i : i + 1], action[None]).flatten()
                for k in range(2):
                    exponents[k].append((twins[k] - log_p).item() / 0.7)
        for k in range(2):
            soft_max = 0.7 * math.log(sum(math.exp(x) for x in exponents[k]))
            assert found[k, i].item() == pytest.approx(soft_max - q[k, i].item(), rel=1e-4)


@pytest.mark.parametrize(
    "settings, online, bounded",
    [
        ({}, False, True),
        ({}, True, False),
        ({"calibrated_online": True}, True, True),
        ({"calibrated": False}, False, False),
        ({"calibrated": False, "calibrated_online": True}, True, False),
    ],
)
def test_calibration_bounds_the_policys_q_by_the_return(settings, online, bounded):
    """With a return above every Q, R no longer pushes the policy's actions down."""
    agent = agent_of(config_of(**settings), online=online)
    low, high = (terms(agent, batch_of(B, mc_returns=x))[1] for x in (-math.inf, 50.0))
    assert (high > low + 100) if bounded else torch.equal(high, low)
    if bounded:  # logsumexp over 20 bounded values near 50: the gradient of R is the data's alone
        parameters = list(agent.qf.parameters())
        q = agent.qf.both(batch_of(B).observations, batch_of(B).actions)
        expected = torch.autograd.grad(-10.0 * q.sum() / B, parameters)
        torch.testing.assert_close(torch.autograd.grad(high, parameters), expected)


def test_regularizer_is_clipped_from_below():
    agent, batch = agent_of(config_of(cql_clip_diff_min=1e3, calibrated=False)), batch_of(B)
    regularizer = terms(agent, batch)[1]
    assert regularizer.item() == pytest.approx(10.0 * 2 * 1e3)
    gradients = torch.autograd.grad(regularizer, list(agent.qf.parameters()))
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("gap, rises", [(-1e3, True), (1e3, False)])
def test_lagrange_multiplier_rises_above_the_gap_and_falls_below(gap, rises):
    agent = agent_of(config_of(cql_lagrange=True, cql_target_action_gap=gap))
    before = agent.factors["log_alpha_prime"].item()
    logged = agent.train(batch_of(B))
    assert logged["alpha_prime"].item() == pytest.approx(math.e)
    assert (agent.factors["log_alpha_prime"].item() > before) == rises
    plain = agent_of(config_of())
    assert plain.train(batch_of(B))["alpha_prime"] == 1
    assert plain.factors["log_alpha_prime"].item() == 0


def test_the_lagrange_multiplier_is_bounded():
    agent = agent_of(config_of(cql_lagrange=True, cql_target_action_gap=0.8))
    agent.factors["log_alpha_prime"].data.fill_(50.0)
    assert agent.train(batch_of(B))["alpha_prime"] == 1e6  # CORL


def test_online_weight_of_the_regularizer_is_its_own():
    config = config_of(cql_alpha=10.0, cql_alpha_online=2.5, calibrated=False)
    found = [terms(agent_of(config, online=online), batch_of(B))[1] for online in (False, True)]
    assert found[0].item() == pytest.approx(4 * found[1].item())


def test_each_network_gets_the_gradient_of_its_own_loss_alone():
    agent, batch = agent_of(config_of(cql_lagrange=True, cql_target_action_gap=0.8)), batch_of(B)
    torch.manual_seed(9)
    policy = agent.actor(batch.observations)
    with torch.no_grad():
        next_policy = agent.actor(batch.next_observations)
    policy_loss, log_pi = agent.policy_loss(batch, policy)
    actor, critics = list(agent.actor.parameters()), list(agent.qf.parameters())
    of_actor = torch.autograd.grad(policy_loss, actor, retain_graph=True)
    td_loss, regularizer, _ = agent.q_loss(batch, policy, next_policy)
    of_critics = torch.autograd.grad(td_loss + math.e * regularizer, critics, retain_graph=True)
    assert torch.autograd.grad(policy_loss, critics, allow_unused=True) == (None,) * len(critics)
    of_temperature = -(log_pi.mean() - A)
    of_multiplier = -0.5 * math.e * regularizer
    torch.manual_seed(9)
    agent.train(batch)
    torch.testing.assert_close([p.grad for p in actor], list(of_actor))
    torch.testing.assert_close([p.grad for p in critics], list(of_critics))
    factors = agent.factors
    torch.testing.assert_close(factors["log_alpha"].grad, of_temperature)
    torch.testing.assert_close(factors["log_alpha_prime"].grad, of_multiplier.detach())


def test_updates_leave_no_graph_behind():
    """A target that required a gradient would hold the graphs of all updates before it."""
    agent = agent_of(config_of())
    for _ in range(2):
        logged = agent.train(batch_of(B))
    kept = [*agent.q_target.parameters(), *logged.values()]
    assert not any(x.requires_grad or x.grad_fn for x in kept)


# --- Rewards and returns ---


def dataset_of(episodes, gaps=()):
    """Episodes of rewards; a trailing "T" is a terminal. Rows follow on without a gap otherwise."""
    rewards, terminals, first, n = [], [], [], 0
    for episode in episodes:
        terminal = episode[-1] == "T"
        values = episode[: len(episode) - terminal]
        first.append(n)
        n += len(values)
        rewards += values
        terminals += [False] * (len(values) - 1) + [terminal]
    states = np.arange(2.0 * n, dtype=np.float32).reshape(n, 2)
    next_states = states + 2
    for k in gaps:  # the state behind the last row of episode k is not the next row
        next_states[first[k + 1] - 1] += 0.5
    return {
        "observations": states,
        "next_observations": next_states,
        "rewards": np.array(rewards, np.float32),
        "terminals": np.array(terminals),
    }


def test_returns_of_hand_made_episodes():
    """A terminal, a time-out (a gap), a break that neither flag shows, and a cut last episode."""
    dataset = dataset_of([[1, 2, 4, "T"], [1, 1], [8], [2, 3]], gaps=[1, 2])
    found = cal_ql.get_return_to_go(dataset, config_of(discount=0.5))
    np.testing.assert_allclose(found, [3, 4, 4, 1.5, 1, 8, 3.5, 3])


def test_returns_of_a_sparse_reward():
    """Failure throughout: r / (1 - gamma) in every row, whether cut by a gap or by the end."""
    episodes = [[-5, -5, 5, "T"], [-5, -5, -5], [-5, 5, -5], [-5, -5]]
    dataset = dataset_of(episodes, gaps=[1, 2])
    config = config_of(discount=0.5, is_sparse_reward=True, reward_bias=-5.0)
    found = cal_ql.get_return_to_go(dataset, config)
    expected = [-5 - 2.5 + 1.25, -2.5, 5, -10, -10, -10, -5 + 2.5 - 1.25, 2.5, -5, -10, -10]
    np.testing.assert_allclose(found, expected)
    dense = cal_ql.get_return_to_go(dataset, config_of(discount=0.5))
    np.testing.assert_allclose(dense[3:6], [-8.75, -7.5, -5])


@pytest.mark.parametrize("reward_bias", [-5.0, -0.1, 0.0])
def test_failure_is_seen_after_the_rewards_were_rounded(reward_bias):
    dataset = dataset_of([[0, 0, 0]])
    config = config_of(discount=0.9, is_sparse_reward=True, reward_bias=reward_bias)
    cal_ql.modify_reward(dataset, config)
    found = cal_ql.get_return_to_go(dataset, config)
    np.testing.assert_allclose(found, [reward_bias / 0.1] * 3, rtol=1e-5, atol=1e-12)


def test_returns_equal_the_definition():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 30)
    episodes = [rng.normal(size=n).tolist() + ["T"] * rng.integers(2) for n in lengths]
    dataset = dataset_of(episodes, gaps=range(29))
    found = cal_ql.get_return_to_go(dataset, config_of(discount=0.97))
    expected = []
    for episode in np.split(dataset["rewards"].astype(float), np.cumsum(lengths)[:-1]):
        n = len(episode)
        expected += [sum(0.97 ** (j - i) * episode[j] for j in range(i, n)) for i in range(n)]
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_online_returns_are_filled_in_when_an_episode_ends():
    config = config_of(discount=0.5)
    buffer = cal_ql.ReplayBuffer(S, A, 20)

    def add(*rewards):
        for reward in rewards:
            state, action = np.zeros(S), np.zeros(A, np.float32)
            buffer.add_transition(state, action, reward, state, False, cal_ql.UNFINISHED)

    add(1, 2, 4)
    assert buffer.rows(slice(3)).mc_returns.tolist() == [-math.inf] * 3
    cal_ql.finish_episode(buffer, config)
    assert buffer.rows(slice(3)).mc_returns.tolist() == [3, 4, 4]
    add(1)
    cal_ql.finish_episode(buffer, config)
    add(8, 2)
    assert buffer.rows(slice(6)).mc_returns.tolist()[3:] == [1, -math.inf, -math.inf]
    # A row that waits for its return has no bound: R is finite.
    agent = agent_of(config_of(calibrated_online=True), online=True)
    assert terms(agent, buffer.rows(slice(6)))[1].isfinite()
    cal_ql.finish_episode(buffer, config)
    assert buffer.rows(slice(6)).mc_returns.tolist() == [3, 4, 4, 1, 9, 2]


@pytest.mark.parametrize(
    "env, settings, expected",
    [
        ("hopper-medium-v2", {}, (1.0, 0.0)),
        ("hopper-medium-v2", {"normalize_reward": True}, (1000 / 9, 0.0)),
        ("antmaze-umaze-v2", {}, (10.0, -5.0)),
        ("antmaze-umaze-v2", {"normalize_reward": False}, (10.0, -5.0)),
    ],
)
def test_modify_reward(env, settings, expected):
    config = config_of(env=env, **settings)
    dataset = dataset_of([[1, 2, 4, "T"], [8, 8], [8]], gaps=[1])
    rewards = dataset["rewards"].copy()
    scale, shift = cal_ql.modify_reward(dataset, config)
    assert (scale, shift) == pytest.approx(expected)
    np.testing.assert_allclose(dataset["rewards"], scale * rewards + shift, rtol=1e-6)
