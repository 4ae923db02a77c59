"""Evaluation side by side is evaluation episode by episode; threads change nothing."""

import gymnasium
import numpy as np
import pytest

import d4rl_gymnasium as d4rl
import iql


class Wave:
    """A policy whose action for a state does not depend on the other states of the batch."""

    def __init__(self, action_dim):
        self.action_dim = action_dim
        self.batches = []

    def act(self, states, deterministic):
        assert deterministic
        self.batches.append(len(states))
        return np.sin(7.0 * states[:, : self.action_dim]).astype(np.float32)


def episode(env_id, policy, seed):
    """Return of one episode."""
    env = gymnasium.make(env_id)
    state, _ = env.reset(seed=seed)
    total, done = 0.0, False
    while not done:
        state, reward, terminated, truncated, _ = env.step(policy.act(state[None], True)[0])
        total += reward
        done = terminated or truncated
    return total


def test_scores_are_those_of_single_episodes():
    """The hopper falls at different steps in different episodes."""
    envs, policy = d4rl.make_eval_envs("hopper-medium-v2", 5, n_threads=3), Wave(3)
    results = [iql.eval_actor(envs, policy, 5, 11) for _ in range(2)]
    returns = [episode("hopper-medium-v2", Wave(3), 11 + i) for i in range(5)]
    assert len(set(returns)) == 5
    np.testing.assert_array_equal(results[0], returns)
    np.testing.assert_array_equal(results[1], returns)
    assert set(policy.batches) == {5}


def test_returns_of_a_maze_are_the_successes(monkeypatch):
    """In a maze whose goal is at the start of episodes 0 and 2; the others end by time."""
    envs = d4rl.make_eval_envs("antmaze-umaze-v2", 3)
    for i, env in enumerate(envs.envs):
        end = (0.0, False, True, {}) if i == 1 else (1.0, True, False, {})
        monkeypatch.setattr(
            env, "step", lambda action, step=env.step, end=end: (*step(action)[:1], *end)
        )
    returns = iql.eval_actor(envs, Wave(8), 3, 0)
    assert returns.tolist() == [1.0, 0.0, 1.0]
    score = 100 * d4rl.get_normalized_score("antmaze-umaze-v2", returns.mean())
    assert score == pytest.approx(200 / 3)  # the success rate in percent
