"""The behavior policies that ship with the package, and their file format."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest

import d4rl_gymnasium
from d4rl_gymnasium.behavior import BehaviorPolicy

POLICIES = Path(d4rl_gymnasium.__file__).parent / "policies"
LABELS = ["expert", "medium", *(f"replay-{number}" for number in range(8))]


def small_policy():
    rng = np.random.default_rng(0)
    shapes = {
        "w0": (4, 5), "b0": (5,), "w1": (5, 6), "b1": (6,),
        "w_mean": (6, 2), "b_mean": (2,), "w_log_std": (6, 2), "b_log_std": (2,),
    }  # fmt: skip
    weights = {
        name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
    }
    return BehaviorPolicy(weights, 30, 2.5, 0.5, 12.0)


def test_act_is_a_tanh_gaussian():
    policy = small_policy()
    w = policy.weights
    # Beyond the largest log standard deviation, which is 2.
    w["w_log_std"][:, 0], w["b_log_std"][0] = 0, 2.5
    observations = np.random.default_rng(1).standard_normal((30, 4))
    hidden = np.maximum(observations @ w["w0"] + w["b0"], 0)
    hidden = np.maximum(hidden @ w["w1"] + w["b1"], 0)
    mean = hidden @ w["w_mean"] + w["b_mean"]
    std = np.exp(np.clip(hidden @ w["w_log_std"] + w["b_log_std"], -20, 2))
    noise = np.random.default_rng(2).standard_normal((30, 2), dtype=np.float32)
    np.testing.assert_allclose(policy.act(observations), np.tanh(mean), rtol=1e-4)
    drawn = policy.act(observations, np.random.default_rng(2))
    np.testing.assert_allclose(drawn, np.tanh(mean + std * noise), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(policy.act(observations[0]), np.tanh(mean[0]), rtol=1e-4)


def test_save_and_load(tmp_path):
    policy = small_policy()
    policy.save(tmp_path / "policy.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["policy.npz"]
    again = BehaviorPolicy.load(tmp_path / "policy.npz")
    for name, matrix in policy.weights.items():
        np.testing.assert_allclose(again.weights[name], matrix, rtol=1e-3)
    assert (again.env_steps, again.return_mean, again.return_std) == (30, 2.5, 0.5)
    assert again.normalized_score == 12.0
    np.savez(tmp_path / "other.npz", w0=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="no behavior policy: it lacks b0, .*env_steps"):
        BehaviorPolicy.load(tmp_path / "other.npz")


def test_shipped_hopper_policies_are_what_they_say():
    policies = {label: BehaviorPolicy.load(POLICIES / f"hopper-{label}.npz") for label in LABELS}
    assert all((POLICIES / f"hopper-{label}.npz").stat().st_size < 200_000 for label in LABELS)
    assert policies["expert"].normalized_score > 85
    assert abs(policies["medium"].normalized_score - 44.3) < 3  # D4RL's hopper-medium
    steps = [policies[f"replay-{number}"].env_steps for number in range(8)]
    assert steps == sorted(set(steps))
    assert steps[0] == 0 and steps[-1] < policies["medium"].env_steps


@pytest.mark.parametrize("label", ["expert", "medium", "replay-0"])
def test_shipped_policy_earns_its_recorded_return(label):
    policy = BehaviorPolicy.load(POLICIES / f"hopper-{label}.npz")
    env, rng, returns = gymnasium.make("hopper-medium-v2"), np.random.default_rng(0), []
    for episode in range(8):
        observation, _ = env.reset(seed=episode)
        returns.append(0.0)
        done = False
        while not done:
            observation, reward, *done = env.step(policy.act(observation, rng))[:4]
            returns[-1], done = returns[-1] + reward, any(done)
    error = policy.return_std / np.sqrt(len(returns))
    # A processor's rounding decides the episodes, so that another one is another draw.
    assert abs(np.mean(returns) - policy.return_mean) < 4 * error
