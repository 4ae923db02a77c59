"""The tasks as Gymnasium environments: registry, seeds, limits, errors, saved states, scores."""

import importlib
import io
import os
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import d4rl_gymnasium as d4rl
from d4rl_gymnasium import envs
from d4rl_gymnasium.antmaze import MAZES, cell_center, cells

ONE_OF_EACH = [
    "hopper-medium-replay-v2", "walker2d-random-v2", "halfcheetah-expert-v2",
    "antmaze-umaze-v2", "antmaze-large-diverse-v2",
]  # fmt: skip


def random_actions(env, n, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, *env.action_space.shape))


def continue_with(env, actions):
    """Steps (and resets after an episode's end); returns all numbers that came out."""
    trace = []
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        trace.append(np.concatenate((observation, [reward, terminated, truncated])))
        if terminated or truncated:
            trace.append(np.concatenate((env.reset()[0], [0, 0, 0])))
    return np.array(trace)


def test_registry_holds_the_24_tasks():
    assert len(d4rl.TASKS) == 24
    limits = {env_id: task.max_episode_steps for env_id, task in d4rl.TASKS.items()}
    assert {env_id for env_id, limit in limits.items() if limit != 1000} == {
        "antmaze-umaze-v2",
        "antmaze-umaze-diverse-v2",
    }
    assert limits["antmaze-umaze-v2"] == 700
    sizes = {"hopper": (11, 3), "walker2d": (17, 6), "halfcheetah": (17, 6), "ant": (29, 8)}
    for env_id, task in d4rl.TASKS.items():
        spec = gymnasium.spec(env_id)
        assert spec.max_episode_steps == task.max_episode_steps
        env = gymnasium.make(env_id)
        observation_size, action_size = sizes[task.robot]
        assert env.observation_space.shape == (observation_size,)
        assert env.action_space == gymnasium.spaces.Box(-1, 1, (action_size,), np.float32)


def test_importing_again_is_harmless():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(d4rl)
    assert gymnasium.make("hopper-medium-v2").spec.id == "hopper-medium-v2"


@pytest.mark.filterwarnings("ignore:.*A Box observation space m")
@pytest.mark.parametrize("env_id", ONE_OF_EACH)
def test_gymnasium_accepts_the_environment(env_id):
    # Its render check opens a window, which aborts the process where there is no display.
    check_env(gymnasium.make(env_id).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("env_id", ONE_OF_EACH)
def test_seeds(env_id):
    def start(seed):
        env = gymnasium.make(env_id)
        observation, info = env.reset(seed=seed)
        return np.concatenate((observation, info.get("goal", [])))

    np.testing.assert_array_equal(start(5), start(5))
    assert np.all(start(5) != start(6))


def test_actions_are_clipped_and_checked():
    env = gymnasium.make("hopper-medium-v2").unwrapped
    env.reset(seed=0)
    inside = env.step(np.array([1.0, -1.0, 0.5]))
    env.reset(seed=0)
    outside = env.step(np.array([7.0, -np.inf, 0.5]))
    np.testing.assert_array_equal(inside[0], outside[0])
    assert inside[1] == outside[1]
    with pytest.raises(FloatingPointError, match="NaN"):
        env.step(np.array([np.nan, 0, 0]))
    with pytest.raises(ValueError, match="shape"):
        env.step(np.zeros(4))


def test_time_limit_truncates_and_a_goal_terminates():
    env = gymnasium.make("antmaze-umaze-v2")
    env.reset(seed=0)
    for _ in range(699):
        assert env.step(np.zeros(8))[2:4] == (False, False)
    _, reward, terminated, truncated, info = env.step(np.zeros(8))
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, True, False)
    env.reset()
    env.unwrapped.set_target([0.3, 0.0])
    _, reward, terminated, truncated, info = env.step(np.zeros(8))
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)
    # The mark that is drawn is where the goal is.
    np.testing.assert_array_equal(env.unwrapped.data.site("goal").xpos, [0.3, 0.0, 0.0])
    with pytest.raises(ValueError, match="goal"):
        env.unwrapped.set_target([1.0, 2.0, 3.0])


# Height, angle and speed at which the original classes end an episode, and just inside.
BOUNDS = [
    ("hopper-medium-v2", 0.71, 0.19, 99.0, True),
    ("hopper-medium-v2", 0.69, 0.0, 0.0, False),
    ("hopper-medium-v2", 1.25, 0.21, 0.0, False),
    ("hopper-medium-v2", 1.25, -0.21, 0.0, False),
    ("hopper-medium-v2", 1.25, 0.0, -101.0, False),
    ("walker2d-medium-v2", 0.81, 0.99, 200.0, True),
    ("walker2d-medium-v2", 1.99, -0.99, 0.0, True),
    ("walker2d-medium-v2", 0.79, 0.0, 0.0, False),
    ("walker2d-medium-v2", 2.01, 0.0, 0.0, False),
    ("walker2d-medium-v2", 1.25, 1.01, 0.0, False),
    ("halfcheetah-medium-v2", -0.9, 3.0, 200.0, True),
]


@pytest.mark.parametrize(("env_id", "height", "angle", "speed", "healthy"), BOUNDS)
def test_bounds_of_health(env_id, height, angle, speed, healthy):
    env = gymnasium.make(env_id).unwrapped
    env.reset(seed=0)
    qpos, qvel = env.init_qpos.copy(), env.init_qvel.copy()
    qpos[1:3], qvel[-1] = (height, angle), speed
    env.set_state(qpos, qvel)
    assert env._is_healthy() == healthy


def test_a_diverged_hopper_has_fallen():
    env = gymnasium.make("hopper-medium-v2").unwrapped
    env.reset(seed=0)
    for index, value in ((0, np.inf), (1, np.inf), (3, np.nan)):
        env.data.qpos[:] = env.init_qpos
        env.data.qpos[index] = value
        assert not env._is_healthy()


def test_set_state_sets_the_simulator():
    env = gymnasium.make("antmaze-umaze-v2")
    env.reset(seed=0)
    qpos = np.array([0, 8.0, 0.6, 1, *np.zeros(11)])
    env.unwrapped.set_state(qpos, np.full(14, 0.25))
    np.testing.assert_array_equal(env.unwrapped.data.qpos, qpos)
    np.testing.assert_array_equal(env.unwrapped.data.qvel, 0.25)


def test_maze_cells():
    umaze = MAZES["umaze"]["task"]
    np.testing.assert_array_equal(cell_center(umaze, cells(umaze, "r")[0]), [0, 0])
    # The goal of umaze is two rows above the start: y grows with the row.
    np.testing.assert_array_equal(cell_center(umaze, cells(umaze, "g")[0]), [0, 8])


@pytest.mark.parametrize("env_id", ONE_OF_EACH)
def test_state_continues_bit_for_bit(env_id):
    env = gymnasium.make(env_id)
    env.reset(seed=1)
    actions = random_actions(env, 80)
    continue_with(env, actions[:30])
    buffer = io.BytesIO()
    torch.save(d4rl.get_env_state(env), buffer)
    goes_on = [continue_with(env, actions[30:]), env.reset()[0], env.action_space.sample()]

    other = gymnasium.make(env_id)
    buffer.seek(0)
    d4rl.set_env_state(other, torch.load(buffer, weights_only=True))
    again = [continue_with(other, actions[30:]), other.reset()[0], other.action_space.sample()]
    for ours, theirs in zip(again, goes_on, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if env_id.startswith("antmaze"):
        np.testing.assert_array_equal(env.unwrapped.goal, other.unwrapped.goal)


def test_state_remembers_time_limit_and_goal():
    env = gymnasium.make("antmaze-umaze-v2")
    env.reset(seed=0)
    env.unwrapped.set_target([6.0, 0.0])
    continue_with(env, np.zeros((600, 8)))
    other = gymnasium.make("antmaze-umaze-v2")
    d4rl.set_env_state(other, d4rl.get_env_state(env))
    np.testing.assert_array_equal(other.unwrapped.goal, [6.0, 0.0])
    truncated = [other.step(np.zeros(8))[3] for _ in range(100)]
    assert truncated == [False] * 99 + [True]


def test_state_errors():
    state = d4rl.get_env_state(gymnasium.make("hopper-medium-v2"))
    with pytest.raises(ValueError, match="hopper-medium-v2.*walker2d-medium-v2"):
        d4rl.set_env_state(gymnasium.make("walker2d-medium-v2"), state)
    with pytest.raises(ValueError, match="wrappers"):
        d4rl.set_env_state(gymnasium.make("hopper-medium-v2").unwrapped, state)
    normalized = gymnasium.wrappers.NormalizeReward(gymnasium.make("hopper-medium-v2"))
    with pytest.raises(ValueError, match="NormalizeReward"):
        d4rl.get_env_state(normalized)


@pytest.mark.parametrize("env_id", ["hopper-medium-v2", "antmaze-umaze-v2"])
def test_a_resumable_environment_goes_on_from_its_state(env_id):
    env = d4rl.ResumableEnv(gymnasium.make(env_id))
    observation, _ = env.reset(seed=3)
    np.testing.assert_array_equal(env.last_observation, observation)
    actions = random_actions(env, 60)
    continue_with(env, actions[:25])
    buffer = io.BytesIO()
    torch.save(env.state_dict(), buffer)
    last = env.last_observation
    goes_on = continue_with(env, actions[25:])
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)

    other = d4rl.ResumableEnv(gymnasium.make(env_id))
    other.load_state_dict(state)
    np.testing.assert_array_equal(other.last_observation, last)
    assert other.last_observation.dtype == last.dtype
    np.testing.assert_array_equal(continue_with(other, actions[25:]), goes_on)
    np.testing.assert_array_equal(other.last_observation, env.last_observation)
    with pytest.raises(ValueError, match="the state is one of"):
        d4rl.ResumableEnv(gymnasium.make("walker2d-medium-v2")).load_state_dict(state)


def test_normalized_scores():
    # D4RL's published reference returns: hopper -20.272305 and 3234.3, AntMaze 0 and 1.
    assert d4rl.get_normalized_score("hopper-medium-v2", 3234.3) == 1.0
    assert d4rl.get_normalized_score("hopper-expert-v2", -20.272305) == 0.0
    assert d4rl.get_normalized_score("antmaze-large-play-v2", 0.25) == 0.25
    half = (4592.3 + 1.629008) / 2
    np.testing.assert_allclose(
        d4rl.get_normalized_score("walker2d-medium-v2", [4592.3, half]), [1, 0.5]
    )
    assert d4rl.get_normalized_score("halfcheetah-medium-v2", 12135.0) == 1.0


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="hoper-medium-v2.*hopper-medium-v2"):
        d4rl.task("hoper-medium-v2")
    with pytest.raises(ValueError, match=r"unknown env 'zzz'; the nearest are [^,]+-v2, [^,]+, "):
        d4rl.get_normalized_score("zzz", 1.0)


def test_another_mujoco_warns_once(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium.make("hopper-medium-v2")
    monkeypatch.setattr(envs.mujoco, "__version__", "3.5.0")
    envs.warn_unless_exact_mujoco.cache_clear()
    with pytest.warns(UserWarning, match=r"3\.5\.0.*3\.2\.6.*walls.*RK4.*pip install"):
        gymnasium.make("hopper-medium-v2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium.make("walker2d-medium-v2")


RENDER_PROGRAM = """
import gymnasium, numpy, d4rl_gymnasium
for env_id in ("hopper-medium-v2", "antmaze-umaze-v2"):
    env = gymnasium.make(env_id, render_mode="rgb_array", width=160, height=120)
    env.reset(seed=0)
    first = env.render()
    assert first.shape == (120, 160, 3) and first.dtype == numpy.uint8 and first.std() > 5
    if env_id.startswith("antmaze"):
        env.unwrapped.set_target([4.0, 4.0])
    for _ in range(20):
        env.step(env.action_space.sample())
    assert (env.render() != first).mean() > 0.001
    env.close()
"""


def test_render():
    # In a process of its own: MUJOCO_GL counts only when set before MuJoCo is imported.
    reasons = []
    for backend in ("egl", "osmesa", "glfw"):
        run = subprocess.run(
            [sys.executable, "-c", "from gymnasium.envs.mujoco import mujoco_rendering as m;"
             f"m._ALL_RENDERERS['{backend}'](160, 120).make_current()"],
            env={**os.environ, "MUJOCO_GL": backend}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if run.returncode == 0:
            break
        reasons.append(f"{backend}: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    else:
        pytest.skip("no OpenGL backend works here: " + "; ".join(reasons))
    run = subprocess.run(
        [sys.executable, "-c", RENDER_PROGRAM],
        env={**os.environ, "MUJOCO_GL": backend}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_rendering_without_display_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="MUJOCO_GL=egl"):
        gymnasium.make("hopper-medium-v2", render_mode="rgb_array")
    with pytest.raises(RuntimeError, match="needs a display"):
        gymnasium.make("hopper-medium-v2", render_mode="human")
