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


@pytest.mark.parametrize("n_threads", [1, 3])
def test_scores_are_those_of_single_episodes(n_threads):
    """The hopper falls at different steps in different episodes."""
    cfg = iql.Config(env="hopper-medium-v2", n_episodes=5, eval_seed=11)
    evaluator, policy = iql.Evaluator(cfg), Wave(3)
    evaluator.n_threads = n_threads
    results = [evaluator(policy) for _ in range(2)]
    returns = [episode(cfg.env, Wave(3), 11 + i) for i in range(5)]
    assert len(set(returns)) == 5
    assert results[0] == results[1]
    assert results[0]["return_mean"] == np.mean(returns)
    assert results[0]["return_std"] == np.std(returns)
    score = 100 * d4rl.get_normalized_score(cfg.env, np.mean(returns))
    assert results[0]["normalized_score"] == score and results[0]["success_rate"] == ""
    assert set(policy.batches) == {5}


def test_success_rate_counts_the_episodes_that_reach_the_goal(monkeypatch):
    """In a maze whose goal is at the start of episodes 0 and 2."""
    cfg = iql.Config(env="antmaze-umaze-v2", n_episodes=3)
    evaluator = iql.Evaluator(cfg)
    for i in (0, 2):
        env = evaluator.envs[i]
        step = env.step
        monkeypatch.setattr(
            env, "step", lambda action, step=step: (*step(action)[:1], 1.0, True, False, {})
        )
    for env in evaluator.envs[1:2]:
        step = env.step
        monkeypatch.setattr(
            env, "step", lambda action, step=step: (*step(action)[:1], 0.0, False, True, {})
        )
    result = evaluator(Wave(8))
    assert result["success_rate"] == pytest.approx(2 / 3)
    assert result["normalized_score"] == pytest.approx(200 / 3)
