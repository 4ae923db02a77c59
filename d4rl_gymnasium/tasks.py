"""The 24 task ids: their data, reference scores and episode limits, and their registration."""

import dataclasses
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
_D4RL_TASKS = dict(TASKS)
_substituted = set()


def task(env_id):
    """Returns the `Task` of `env_id`; an unknown id is a ValueError with the nearest ids."""
    if env_id in TASKS:
        return TASKS[env_id]
    nearest = difflib.get_close_matches(str(env_id), TASKS, n=3, cutoff=0)
    raise ValueError(f"unknown env {env_id!r}; the nearest are {', '.join(nearest)}")


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
        if known.env_id not in gymnasium.registry:
            _register(known)


def _register(known):
    name, *maze = known.env_id.removesuffix("-v2").split("-")
    gymnasium.register(
        id=known.env_id,
        entry_point=_ENTRY_POINTS[name],
        max_episode_steps=known.max_episode_steps,
        kwargs={"maze": maze[0]} if name == "antmaze" else {},
    )


def substitute(env_id, spec=None, ref_scores=None):
    """Makes a task id stand for another environment and other scores in this process.

    So a script that names its task by id alone can be run on data that come with an environment of
    their own. `restore` undoes it.

    Args:
        env_id: the task.
        spec: the `gymnasium.envs.registration.EnvSpec` that `gymnasium.make(env_id)` is to make,
            with its episode limit (the task's, if it has none); None keeps D4RL's environment.
        ref_scores: the returns that score 0 and 1; None keeps D4RL's.
    """
    restore(env_id)
    if spec is not None:
        limit = spec.max_episode_steps or TASKS[env_id].max_episode_steps
        spec = dataclasses.replace(spec, id=env_id, max_episode_steps=limit)
        gymnasium.registry[env_id] = spec
        TASKS[env_id] = dataclasses.replace(TASKS[env_id], max_episode_steps=limit)
    if ref_scores is not None:
        low, high = ref_scores
        TASKS[env_id] = dataclasses.replace(TASKS[env_id], ref_min_score=low, ref_max_score=high)
    _substituted.add(env_id)


def restore(env_id):
    """Gives a task id its own environment and scores back, where `substitute` took them."""
    if env_id in _substituted:
        _substituted.remove(env_id)
        TASKS[env_id] = _D4RL_TASKS[env_id]
        del gymnasium.registry[env_id]
        _register(TASKS[env_id])
