"""The 24 task ids: their data, reference scores and episode limits, and their registration."""

import difflib
import json
from dataclasses import dataclass

import gymnasium
import numpy as np

from d4rl_gymnasium.envs import ASSETS

_ENTRY_POINTS = {
    "hopper": "d4rl_gymnasium.locomotion:HopperEnv",
    "walker2d": "d4rl_gymnasium.locomotion:Walker2dEnv",
    "halfcheetah": "d4rl_gymnasium.locomotion:HalfCheetahEnv",
    "antmaze": "d4rl_gymnasium.antmaze:AntMazeEnv",
}


@dataclass(frozen=True)
class Task:
    """One D4RL task; scores are returns (AntMaze: success rates), the limit is in env steps."""

    env_id: str
    family: str  # "locomotion" or "antmaze"
    robot: str  # "hopper", "walker2d", "halfcheetah" or "ant"
    dataset_url: str
    ref_min_score: float
    ref_max_score: float
    max_episode_steps: int


def _load_tasks():
    tasks = {}
    for env_id, fields in json.loads((ASSETS / "tasks.json").read_text()).items():
        name = env_id.split("-")[0]
        is_maze = name == "antmaze"
        family, robot = ("antmaze", "ant") if is_maze else ("locomotion", name)
        tasks[env_id] = Task(env_id, family, robot, **fields)
    return tasks


TASKS = _load_tasks()


def task(env_id):
    """Returns the `Task` of `env_id`; an unknown id is a ValueError with the nearest names."""
    if env_id in TASKS:
        return TASKS[env_id]
    nearest = difflib.get_close_matches(str(env_id), TASKS, n=3, cutoff=0.3) or sorted(TASKS)
    raise ValueError(f"unknown task {env_id!r}; the nearest known names: {', '.join(nearest)}")


def get_normalized_score(env_id, returns):
    """Returns (returns - min) / (max - min), D4RL's score as a fraction: 1 is the expert's.

    `returns` is a number or an array of episode returns; the result has its shape.
    """
    known = task(env_id)
    return (np.asarray(returns)[()] - known.ref_min_score) / (
        known.ref_max_score - known.ref_min_score
    )


def register_tasks():
    """Registers every task with Gymnasium, unless that is done already."""
    for known in TASKS.values():
        if known.env_id in gymnasium.registry:
            continue
        name, *maze = known.env_id.removesuffix("-v2").split("-")
        gymnasium.register(
            id=known.env_id,
            entry_point=_ENTRY_POINTS[name],
            max_episode_steps=known.max_episode_steps,
            kwargs={"maze": maze[0]} if name == "antmaze" else {},
        )
