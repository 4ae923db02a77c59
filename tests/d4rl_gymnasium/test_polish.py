"""The search for better gains of an expert: what the gains are, and that it climbs and stops."""

import numpy as np
import pytest

from d4rl_gymnasium import polish, train_policies
from d4rl_gymnasium.behavior import BehaviorPolicy


def make_policy(observations=11, actions=3):
    rng = np.random.default_rng(0)
    shapes = {"0": (observations, 8), "1": (8, 8), "_mean": (8, actions), "_log_std": (8, actions)}
    weights = {f"w{name}": rng.standard_normal(shape) / 3 for name, shape in shapes.items()}
    weights |= {f"b{name}": rng.standard_normal(shape[1]) / 3 for name, shape in shapes.items()}
    return BehaviorPolicy({name: x.astype(np.float32) for name, x in weights.items()}, env_steps=7)


def test_gains_are_factors_of_observations_and_actions_and_offsets():
    policy, observation = make_policy(), np.linspace(-1, 1, 11)
    inputs, outputs, offsets = np.full(11, 0.2), [0.1, 0.0, -0.3], [0.0, 0.5, 0.0]
    changed = polish.with_gains(policy, [*inputs, *outputs, *offsets])
    expected = np.arctanh(policy.act(observation * np.exp(0.2))) * np.exp(outputs) + offsets
    np.testing.assert_allclose(np.arctanh(changed.act(observation)), expected, rtol=1e-4)
    same = polish.with_gains(policy, np.zeros(17))
    np.testing.assert_array_equal(same.act(observation), policy.act(observation))
    assert same.env_steps == 7


def test_noise_is_a_factor_of_its_deviation():
    policy, observation = make_policy(), np.zeros(11)
    quiet = polish.with_gains(policy, np.zeros(17), noise=0.5)
    drawn = [
        np.arctanh(p.act(observation, np.random.default_rng(1))) - np.arctanh(p.act(observation))
        for p in (policy, quiet)
    ]
    np.testing.assert_allclose(drawn[1], drawn[0] / 2, atol=1e-5)


@pytest.fixture
def offsets_matter(monkeypatch):
    """The return is 3,600 less 10,000 times the squared distance of the offsets from 0.3."""

    def returns(policy, env, episodes, seed, stochastic):
        away = policy.weights["b_mean"] - make_policy().weights["b_mean"] - 0.3
        return np.full(episodes, 3600 - 1e4 * (away**2).sum())

    for module in (polish, train_policies):
        monkeypatch.setattr(module, "episode_returns", returns)


def test_the_search_climbs(offsets_matter):
    policy = make_policy()
    policy.weights["w_mean"] *= 0
    search = polish.Search(policy, None, spread=0.1)
    first = search.round()
    for _ in range(60):
        last = search.round()
    assert first < 1500 and last > 3400
    assert (search.std >= 0.2 * 0.1).all()


def test_changes_of_weights_are_in_units_of_their_matrix():
    policy, observation = make_policy(), np.linspace(-1, 1, 11)
    search = polish.WeightSearch(policy, None, noise=0.5)
    same = search.candidate(np.zeros(len(search.mean)))
    np.testing.assert_array_equal(same.act(observation), policy.act(observation))
    np.testing.assert_allclose(
        same.weights["b_log_std"], policy.weights["b_log_std"] + np.log(0.5), rtol=1e-6
    )
    changed = search.candidate(np.full(len(search.mean), 0.1)).weights
    for name in polish.MEAN_WEIGHTS:
        old = policy.weights[name]
        step = 0.1 * np.sqrt(np.mean(old**2))
        np.testing.assert_allclose(changed[name] - old, step, rtol=1e-4)
    np.testing.assert_array_equal(changed["w_log_std"], policy.weights["w_log_std"])


def test_the_search_over_weights_climbs(offsets_matter):
    search = polish.WeightSearch(make_policy(), None, spread=0.1)
    first = search.round()
    for _ in range(300):
        last = search.round()
    assert first < 1500 and last > 3000
    returns = polish.episode_returns(search.candidate(search.mean), None, 1, 0, True)
    assert returns[0] > 3400


@pytest.mark.parametrize("over", ["gains", "weights"])
def test_an_expert_is_written_once_it_has_d4rls_return(
    offsets_matter, monkeypatch, tmp_path, capsys, over
):
    for module in (polish, train_policies):
        monkeypatch.setattr(module, "POLICIES", tmp_path)
    make_policy().save(tmp_path / "hopper-expert.npz")
    flags = ["--env", "hopper-expert-v2", "--spread", "0.1", "--over", over]
    polish.main([*flags, "--minutes", "0"])
    assert BehaviorPolicy.load(tmp_path / "hopper-expert.npz").return_mean < 1000
    polish.main(flags)
    found = BehaviorPolicy.load(tmp_path / "hopper-expert.npz")
    assert found.return_mean > 3511 and "D4RL's file 3,511" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: unknown .*hopper-expert-v2"):
        polish.main(["--env", "hoper-expert-v2"])
