"""An environment that is not in D4RL's list becomes a task in one call."""

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium.envs.mujoco.inverted_pendulum_v5 import InvertedPendulumEnv

import d4rl_gymnasium as d4rl
from d4rl_gymnasium import regenerate, report, tasks
from d4rl_gymnasium.__main__ import main

PENDULUM = "pendulum-mine-v0"


pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def pendulum():
    """A robot with one action, whose own bounds are -3 and 3."""
    d4rl.register_task(PENDULUM, "InvertedPendulum-v5", 5.0, 1000.0)
    yield PENDULUM
    forget(PENDULUM)


def forget(env_id):
    d4rl.TASKS.pop(env_id, None)
    gymnasium.registry.pop(env_id, None)


def rollout(env, actions, seed=0):
    observations = [env.reset(seed=seed)[0]]
    for action in actions:
        observations.append(env.step(action)[0])
    return np.array(observations)


@pytest.fixture
def file(pendulum, tmp_path):
    """200 steps of it, with no time-outs."""
    env, rng = gymnasium.make(pendulum), np.random.default_rng(0)
    observation, _ = env.reset(seed=0)
    rows = []
    for _ in range(200):
        action = rng.uniform(-1, 1, 1).astype(np.float32)
        following, reward, terminated, _, _ = env.step(action)
        rows.append((observation, action, reward, terminated))
        observation = env.reset()[0] if terminated else following
    path = tmp_path / "mine.hdf5"
    with h5py.File(path, "w") as file:
        keys = ("observations", "actions", "rewards", "terminals")
        for key, column in zip(keys, zip(*rows, strict=True), strict=True):
            file[key] = np.array(column)
    return str(path)


def test_the_task_has_the_environment_with_actions_between_the_bounds(pendulum):
    known = d4rl.task(pendulum)
    assert (known.observation_dim, known.action_dim, known.max_episode_steps) == (4, 1, 1000)
    assert known.family == "locomotion"
    env, own = gymnasium.make(pendulum), gymnasium.make("InvertedPendulum-v5")
    assert env.action_space == gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    actions = np.array([[0.2], [-0.1], [1.0]], np.float32)
    # Rescaling rounds in float32.
    np.testing.assert_allclose(rollout(env, actions), rollout(own, 3 * actions), atol=1e-6)
    assert own.action_space.high == 3  # Gymnasium's id is what it was
    assert env.get_normalized_score(502.5) == 0.5
    assert d4rl.get_normalized_score(pendulum, 1000.0) == 1.0


def test_its_file_is_read_with_one_action(pendulum, file):
    data = d4rl.qlearning_dataset(pendulum, data=file)
    assert data["actions"].shape == (199, 1) and data["observations"].shape == (199, 4)
    raw = gymnasium.make(pendulum).get_dataset(file)
    assert raw["actions"].shape == (200, 1)
    with pytest.raises(d4rl.DatasetError, match=r"needs \(200, 11\): use a file of this task"):
        d4rl.get_dataset("hopper-medium-v2", file)


def test_it_runs_side_by_side_and_resumes(pendulum):
    envs = d4rl.make_eval_envs(pendulum, 3)
    states, _ = envs.reset(seed=5)
    own = [gymnasium.make(pendulum) for _ in range(3)]
    expected = [env.reset(seed=5 + i)[0] for i, env in enumerate(own)]
    np.testing.assert_array_equal(states, expected)
    states, *_ = envs.step(np.full((3, 1), 0.1, np.float32))
    np.testing.assert_array_equal(states, [x.step(np.full(1, 0.1, np.float32))[0] for x in own])
    env, other = (d4rl.ResumableEnv(gymnasium.make(pendulum)) for _ in range(2))
    rollout(env, np.full((5, 1), 0.1, np.float32))
    other.load_state_dict(env.state_dict())
    action = np.full(1, -0.2, np.float32)
    np.testing.assert_array_equal(env.step(action)[0], other.step(action)[0])


class Alternating(InvertedPendulumEnv):
    """Its reward changes sign from step to step, which the simulator's state does not show."""

    sign = 1

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        self.sign *= -1
        return observation, self.sign, terminated, truncated, info

    def task_state(self):
        return {"sign": self.sign}

    def set_task_state(self, state):
        self.sign = state["sign"]


def test_what_an_environment_keeps_beside_the_simulators_state_is_resumed():
    gymnasium.register("Alternating-v0", Alternating, max_episode_steps=100)
    d4rl.register_task("alternating-mine-v0", "Alternating-v0")
    try:
        env, other = (d4rl.ResumableEnv(gymnasium.make("alternating-mine-v0")) for _ in range(2))
        rollout(env, np.zeros((3, 1), np.float32))
        other.load_state_dict(env.state_dict())
        action = np.zeros(1, np.float32)
        assert env.step(action)[1] == other.step(action)[1] == 1
    finally:
        forget("alternating-mine-v0")
        forget("Alternating-v0")


@pytest.mark.parametrize("own", ["Ant-v5", "Humanoid-v5"])
def test_rewards_of_resumed_environments_are_those_of_the_first(own):
    """These two take the place before a step from what the simulator computed in the last one."""
    env_id = f"{own[:-3].lower()}-mine-v0"
    d4rl.register_task(env_id, own)
    try:
        env, other = (d4rl.ResumableEnv(gymnasium.make(env_id)) for _ in range(2))
        actions = np.random.default_rng(0).uniform(-1, 1, (12, *env.action_space.shape))
        rollout(env, actions[:4].astype(np.float32))
        other.load_state_dict(env.state_dict())
        for action in actions[4:].astype(np.float32):
            (state, reward, *_), (state_2, reward_2, *_) = env.step(action), other.step(action)
            assert reward == reward_2
            np.testing.assert_array_equal(state, state_2)
    finally:
        forget(env_id)


def test_check_replays_a_file_with_rescaled_actions(pendulum, file):
    found = report.check(pendulum, file)
    assert found["rewards"]["agree"] == found["rewards"]["compared"] > 100
    assert found["observations"]["agree"] == found["observations"]["compared"] > 100


def test_one_action_needs_an_axis_of_its_own(pendulum, file):
    with h5py.File(file, "a") as content:
        actions = content["actions"][:, 0]
        del content["actions"]
        content["actions"] = actions
    with pytest.raises(d4rl.DatasetError, match=r"needs \(200, 1\): write them with a second axis"):
        d4rl.get_dataset(pendulum, file)


def test_it_has_no_data_but_its_files(pendulum, capsys):
    with pytest.raises(d4rl.DatasetError, match="no data of D4RL: name a file of yours"):
        d4rl.get_dataset(pendulum)
    with pytest.raises(d4rl.DatasetError, match="can't be regenerated"):
        d4rl.get_dataset(pendulum, "regenerated")
    assert regenerate.regenerated_tasks() == sorted(set(d4rl.TASKS) - {pendulum})
    with pytest.raises(SystemExit, match="^error: .*name a file of yours"):
        main(["describe", pendulum])


def test_describe_works_for_it(pendulum, file, tmp_path, capsys):
    main(["describe", pendulum, "--data", file, "--pictures", str(tmp_path)])
    assert "200 transitions" in capsys.readouterr().out


def test_other_data_brings_its_own_environment_back(pendulum, file):
    tasks.substitute(pendulum, gymnasium.spec("InvertedDoublePendulum-v5"), (0.0, 1.0))
    assert gymnasium.make(pendulum).observation_space.shape == (9,)
    d4rl.get_dataset(pendulum, file)
    assert gymnasium.make(pendulum).observation_space.shape == (4,)
    assert d4rl.get_normalized_score(pendulum, 1000.0) == 1.0


def test_registering_again_replaces_it(pendulum):
    d4rl.register_task(pendulum, "InvertedDoublePendulum-v5")
    known = d4rl.task(pendulum)
    assert (known.observation_dim, known.action_dim) == (9, 1)
    assert d4rl.get_normalized_score(pendulum, 50.0) == 0.5  # a score of 50: the return
    env = gymnasium.make(pendulum)
    assert isinstance(env, d4rl.envs.OfflineEnv) and env.env.action_space.high == 1


FAULTS = {
    "one of D4RL's": ("hopper-medium-v2", "InvertedPendulum-v5", {}, "is an environment already"),
    "Gymnasium's": ("Hopper-v5", "InvertedPendulum-v5", {}, "is an environment already"),
    "malformed": ("my robot!", "InvertedPendulum-v5", {}, "'my robot!' is no id"),
    "unknown": (PENDULUM, "NoSuchRobot-v0", {}, "cannot make 'NoSuchRobot-v0'"),
    "another simulator": (PENDULUM, "Pendulum-v1", {}, "no MuJoCo environment"),
    "discrete actions": (PENDULUM, "CartPole-v1", {}, "only vectors are supported"),
    "endless": (PENDULUM, "Endless-v0", {}, "no episode limit"),
    "scores": (PENDULUM, "InvertedPendulum-v5", {"ref_max_score": 0.0}, "must increase"),
}


@pytest.mark.parametrize(("env_id", "base", "scores", "message"), FAULTS.values(), ids=FAULTS)
def test_what_does_not_serve_is_one_line_and_no_task(env_id, base, scores, message):
    gymnasium.register("Endless-v0", gymnasium.spec("InvertedPendulum-v5").entry_point)
    before = dict(d4rl.TASKS)
    with pytest.raises(ValueError, match=message) as raised:
        d4rl.register_task(env_id, base, **scores)
    assert "\n" not in str(raised.value) and d4rl.TASKS == before
    forget("Endless-v0")
    assert gymnasium.spec("Hopper-v5").entry_point.endswith("HopperEnv")
    assert PENDULUM not in gymnasium.registry


# --- D4RL's methods of an environment ---


@pytest.mark.parametrize("env_id", ["hopper-medium-v2", "antmaze-umaze-v2"])
def test_an_environment_of_d4rl_has_its_methods(env_id):
    known, env = d4rl.task(env_id), gymnasium.make(env_id)
    assert env.get_normalized_score(known.ref_max_score) == 1.0
    assert env.get_normalized_score(known.ref_min_score) == 0.0
    again = gymnasium.make(env.spec)  # as Minari makes it from a specification
    assert again.spec == env.spec
    assert again.get_normalized_score(known.ref_max_score) == 1.0
