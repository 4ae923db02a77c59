"""The simulated tasks against transitions and resets recorded from the original environments."""

from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
from scipy.stats import ks_2samp, ttest_ind

import d4rl_gymnasium as d4rl

DATA = Path(__file__).parents[1] / "data"
MAZES = [env_id for env_id in d4rl.TASKS if env_id.startswith("antmaze")]
RUNNERS = ["hopper-medium-v2", "walker2d-medium-v2", "halfcheetah-medium-v2"]
# Chance that a right implementation fails a whole two-sample test; the seeds are fixed anyway.
SIGNIFICANCE = 0.01
N_RESETS = 1_000
# Normalizing the ant's quaternion (3 to 6) leaves no uniform draw there.
UNIFORM_COLUMNS = {
    "hopper-medium-v2": np.arange(11),
    "walker2d-medium-v2": np.arange(17),
    "halfcheetah-medium-v2": np.arange(8),
    "antmaze-umaze-v2": np.r_[0:3, 7:15],
}


def recorded(env_id):
    with np.load(DATA / f"physics_{env_id}.npz", allow_pickle=False) as file:
        return dict(file)


def touches_wall(env):
    data, model = env.data, env.model
    is_wall = (model.geom_bodyid == 0) & (model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)
    return any(is_wall[data.contact.geom[i]].any() for i in range(data.ncon))


def replay(env_id, data):
    """Steps from every recorded state; returns observations, rewards, terminals, wall touches."""
    env = gymnasium.make(env_id).unwrapped
    env.reset(seed=0)
    steps, touches = [], 0
    for i in range(len(data["action"])):
        env.set_state(data["qpos"][i], data["qvel"][i])
        if "goal" in data:
            env.set_target(data["goal"][i])
            touches += touches_wall(env)
        steps.append(env.step(data["action"][i])[:3])
    return *(np.array(column) for column in zip(*steps, strict=True)), touches


def assert_same_distribution(ours, theirs):
    """Kolmogorov-Smirnov test of every column, corrected for their number (Bonferroni)."""
    pvalues = [ks_2samp(a, b).pvalue for a, b in zip(ours.T, theirs.T, strict=True)]
    worst = int(np.argmin(pvalues))
    assert pvalues[worst] > SIGNIFICANCE / len(pvalues), f"column {worst}: p = {pvalues[worst]}"


@pytest.mark.parametrize("env_id", RUNNERS + MAZES)
def test_recorded_transitions(env_id):
    data = recorded(env_id)
    observations, rewards, terminals, touches = replay(env_id, data)
    np.testing.assert_allclose(observations, data["next_observation"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(rewards, data["reward"], rtol=0, atol=1e-9)
    np.testing.assert_array_equal(terminals, data["terminal"])
    # The recordings have to hold the hard cases, or the test says little.
    assert data["terminal"].any() or "halfcheetah" in env_id
    assert touches >= 10 or env_id not in MAZES


@pytest.mark.parametrize("env_id", list(UNIFORM_COLUMNS))
def test_resets_follow_the_recorded_distribution(env_id):
    theirs = recorded(env_id)["reset_observation"]
    env = gymnasium.make(env_id)
    env.reset(seed=0)
    ours = np.array([env.reset()[0] for _ in range(N_RESETS)], dtype=np.float32)
    assert_same_distribution(ours, theirs)
    # The velocities are drawn alike: together they tell a wrong width.
    n_velocities = env.unwrapped.model.nv
    pooled = [draws[:, -n_velocities:].reshape(-1, 1) for draws in (ours, theirs)]
    assert_same_distribution(*pooled)
    # A uniform draw shows its bounds, to which the test above is nearly blind.
    columns = UNIFORM_COLUMNS[env_id]
    spread, their_spread = np.ptp(ours[:, columns], axis=0), np.ptp(theirs[:, columns], axis=0)
    assert np.all(spread < 1.06 * their_spread)
    assert np.all(spread > 0.99 * their_spread)


@pytest.mark.parametrize(
    "env_id", ["antmaze-umaze-v2", "antmaze-medium-play-v2", "antmaze-large-play-v2"]
)
def test_goals_follow_the_recorded_distribution(env_id):
    theirs = recorded(env_id)["reset_goal"]
    env = gymnasium.make(env_id)
    env.reset(seed=0)
    ours = np.array([env.reset()[1]["goal"] for _ in range(N_RESETS)], dtype=np.float32)
    assert_same_distribution(ours, theirs)
    # x and y are drawn apart: their sum would tell a shared draw, or a shift too small for each.
    ours, theirs = ours.sum(axis=1), theirs.sum(axis=1)
    assert ks_2samp(ours, theirs).pvalue > SIGNIFICANCE
    assert ttest_ind(ours, theirs, equal_var=False).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("maze", ["umaze", "medium", "large"])
def test_play_and_diverse_tasks_are_the_same_environment(maze):
    play = "antmaze-umaze-v2" if maze == "umaze" else f"antmaze-{maze}-play-v2"
    states = []
    for env_id in (play, f"antmaze-{maze}-diverse-v2"):
        env = gymnasium.make(env_id)
        _, info = env.reset(seed=3)
        states.append(np.append(env.step(np.full(8, 0.5, np.float32))[0], info["goal"]))
    np.testing.assert_array_equal(*states)
