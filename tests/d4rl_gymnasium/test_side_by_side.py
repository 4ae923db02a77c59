"""Environments side by side are single environments, whatever the number of threads."""

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv

import d4rl_gymnasium as d4rl


def wave(states):
    """Actions for the hopper; those for a state do not depend on the other states."""
    return np.sin(7.0 * states[:, :3]).astype(np.float32)


def single_episode(seed):
    """The observations, rewards and ends of an episode in an environment of its own."""
    env = gymnasium.make("hopper-medium-v2")
    states, rewards, ended = [env.reset(seed=seed)[0]], [], (False, False)
    while not any(ended):
        state, reward, *ended, _ = env.step(wave(states[-1][None])[0])
        states.append(state)
        rewards.append(reward)
    return states, rewards, ended


@pytest.mark.parametrize("n_threads", [1, 8])
def test_each_environment_is_one_that_is_stepped_alone(n_threads):
    envs = d4rl.make_eval_envs("hopper-medium-v2", 4, n_threads=n_threads)
    episodes = [single_episode(seed) for seed in range(11, 15)]
    lengths = [len(rewards) for _, rewards, _ in episodes]
    assert len(set(lengths)) > 1
    for _ in range(2):  # a reset starts anew
        states, _ = envs.reset(seed=11)
        for t in range(max(lengths) + 2):
            actions = wave(states)
            states, rewards, terminated, truncated, _ = envs.step(actions)
            for i, (own_states, own_rewards, ended) in enumerate(episodes):
                np.testing.assert_array_equal(states[i], own_states[min(t + 1, lengths[i])])
                assert rewards[i] == (own_rewards[t] if t < lengths[i] else 0.0)
                expected = ended if t + 1 >= lengths[i] else [False, False]
                assert [terminated[i], truncated[i]] == expected
    envs.close()


def test_an_ended_episode_is_not_stepped(monkeypatch):
    envs = d4rl.make_eval_envs("antmaze-umaze-v2", 3)
    envs.reset(seed=0)
    envs.envs[1].unwrapped.set_target(envs.envs[1].unwrapped.data.qpos[:2])
    actions = np.zeros((3, 8))
    _, rewards, terminated, truncated, infos = envs.step(actions)
    assert rewards.tolist() == [0.0, 1.0, 0.0]
    assert terminated.tolist() == [False, True, False] and not truncated.any()
    assert infos["success"].tolist() == [False, True, False] and infos["_success"].all()
    monkeypatch.setattr(envs.envs[1], "step", None)
    actions[1] = np.nan  # no action is needed where an episode has ended
    for _ in range(699):
        _, rewards, terminated, truncated, infos = envs.step(actions)
        assert not rewards.any()
    assert terminated.tolist() == [False, True, False]
    assert truncated.tolist() == [True, False, True]
    assert infos["_success"].tolist() == [True, False, True]


def test_what_came_out_stays_as_it_was():
    envs = d4rl.make_eval_envs("hopper-medium-v2", 2)
    first, _ = envs.reset(seed=0)
    _, _, terminated, _, _ = envs.step(np.zeros((2, 3)))
    kept = first.copy()
    while not envs.step(np.zeros((2, 3)))[2].all():
        pass
    np.testing.assert_array_equal(first, kept)
    assert not terminated.any()


def test_it_is_a_vector_environment_of_gymnasium():
    envs = d4rl.make_eval_envs("hopper-medium-v2", 2)
    assert isinstance(envs, VectorEnv) and envs.num_envs == 2
    assert envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert envs.observation_space.shape == (2, 11) and envs.action_space.shape == (2, 3)
    assert envs.single_action_space == gymnasium.make("hopper-medium-v2").action_space
    with pytest.raises(gymnasium.error.ResetNeeded):
        envs.step(np.zeros((2, 3)))
    envs.reset()
    with pytest.raises(ValueError, match="need 2 actions, got 3"):
        envs.step(np.zeros((3, 3)))
    with pytest.raises(FloatingPointError, match="NaN"):
        envs.step(np.full((2, 3), np.nan))
