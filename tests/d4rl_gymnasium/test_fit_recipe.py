"""The shares of the policies: the fit by hand, and what ships against D4RL's published figures."""

import json

import gymnasium
import numpy as np
import pytest

import d4rl_gymnasium as d4rl
from d4rl_gymnasium import fit_recipe
from d4rl_gymnasium.behavior import BehaviorPolicy
from d4rl_gymnasium.d4rl_files import FILES, SOURCES, known_of
from d4rl_gymnasium.regenerate import POLICIES

ROBOTS = ["halfcheetah", "hopper", "walker2d"]
RECIPE = json.loads((POLICIES / "recipe.json").read_text())


def test_shares_by_hand():
    """Episodes of 10 steps and return 0, of 30 and 100: half each has mean 50, deviation 50."""
    measured = {
        "bad": (np.zeros(4), np.full(4, 10.0)),
        "good": (np.full(4, 100.0), np.full(4, 30.0)),
    }
    known = {"return mean": 50.0, "return std": 50.0, "length mean": 20.0}
    assert fit_recipe.shares_of(known, measured) == {"bad": 0.25, "good": 0.75}
    # Three times as many good episodes: 75, the root of 75 * 25, and 25; of 10 rows 9 are good.
    known = {"return mean": 75.0, "return std": 1875**0.5, "length mean": 25.0}
    shares = fit_recipe.shares_of(known, measured)
    assert shares == pytest.approx({"bad": 0.1, "good": 0.9}, abs=0.005)


def test_episodes_are_whole(monkeypatch):
    env = gymnasium.make("hopper-medium-v2")
    policy = BehaviorPolicy.load(POLICIES / "hopper-replay-1.npz")
    returns, lengths = fit_recipe.episodes_of(policy, env, 3)
    again = fit_recipe.episodes_of(policy, env, 3)
    np.testing.assert_array_equal(returns, again[0])
    assert (lengths >= 1).all() and (lengths < 1000).all() and len(set(returns)) == 3


def test_every_figure_of_d4rls_files_has_a_source():
    assert set(FILES) == set(d4rl.TASKS)
    for figures in FILES.values():
        assert {"transitions", "episodes", "length mean"} <= set(figures)
        assert {source for _, source in figures.values()} <= set(SOURCES)
    for robot in ROBOTS:
        parts = [known_of(f"{robot}-{name}-v2") for name in ("medium", "expert")]
        both = known_of(f"{robot}-medium-expert-v2")
        n = [part["episodes"] for part in parts]
        mean = np.average([part["return mean"] for part in parts], weights=n)
        assert both["return mean"] == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("robot", ROBOTS)
def test_the_recipe_is_complete_and_in_the_order_of_training(robot):
    for variant in ("medium", "medium-replay", "expert", "full-replay"):
        shares = RECIPE[f"{robot}-{variant}"]
        assert sum(shares.values()) == pytest.approx(1, abs=0.005) and min(shares.values()) > 0
        policies = [BehaviorPolicy.load(POLICIES / f"{name}.npz") for name in shares]
        steps = [policy.env_steps for policy in policies]
        assert steps == sorted(steps)
    first = next(iter(RECIPE[f"{robot}-medium-replay"]))
    assert BehaviorPolicy.load(POLICIES / f"{first}.npz").env_steps == 0


# Of the mean return, from D4RL's; and the least episodes of each policy.
SAMPLES = {"medium": (0.05, 5), "medium-replay": (0.15, 2), "expert": (0.03, 4)}


@pytest.mark.parametrize("robot", ROBOTS)
@pytest.mark.parametrize("variant", SAMPLES)
def test_what_ships_has_the_returns_and_lengths_of_d4rls_files(robot, variant):
    """A sample, weighted as the rows are shared: within the tolerance and three standard errors."""
    tolerance, episodes = SAMPLES[variant]
    episodes = max(episodes, 20 // len(RECIPE[f"{robot}-{variant}"]))
    env, known = gymnasium.make(f"{robot}-medium-v2"), known_of(f"{robot}-{variant}-v2")
    weights, means, variances = [], [], []
    for name, share in RECIPE[f"{robot}-{variant}"].items():
        policy = BehaviorPolicy.load(POLICIES / f"{name}.npz")
        sample = np.array(fit_recipe.episodes_of(policy, env, episodes))
        weights.append(share / sample[1].mean())
        means.append(sample.mean(1))
        # Of the returns as recorded: five episodes of a policy that falls now and then tell little.
        variances.append(np.array([policy.return_std**2, sample[1].var(ddof=1)]) / episodes)
    weights = np.array(weights) / np.sum(weights)
    mean, length = weights @ means
    errors = 3 * np.sqrt(weights**2 @ variances)
    assert abs(mean - known["return mean"]) < tolerance * known["return mean"] + errors[0]
    assert abs(length - known["length mean"]) < 0.15 * known["length mean"] + errors[1]
