"""The 24 task ids: their data, reference scores and episode limits, and their registration.

Sizes and SHA-256 of D4RL's files are those of TensorFlow Datasets (`d4rl_*/checksums.tsv`), which
recorded them from the same addresses.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import RescaleAction

from d4rl_gymnasium.envs import ASSETS, OfflineEnv, get_env_state

# Length of an observation and of an action of each robot in D4RL's v2 tasks.
ROBOT_SHAPES = {"hopper": (11, 3), "walker2d": (17, 6), "halfcheetah": (17, 6), "ant": (29, 8)}
_ENTRY_POINTS = {
    "hopper": "d4rl_gymnasium.locomotion:HopperEnv",
    "walker2d": "d4rl_gymnasium.locomotion:Walker2dEnv",
    "halfcheetah": "d4rl_gymnasium.locomotion:HalfCheetahEnv",
    "antmaze": "d4rl_gymnasium.antmaze:AntMazeEnv",
}


@dataclass(frozen=True)
class Task:
    """One task; scores are returns (AntMaze: success rates), the limit is in env steps."""

    env_id: str
    family: str  # "locomotion" or "antmaze"
    robot: str  # "hopper", "walker2d", "halfcheetah" or "ant"
    observation_dim: int
    action_dim: int
    ref_min_score: float
    ref_max_score: float
    max_episode_steps: int
    dataset_url: str = ""  # empty for a task of `register_task`
    dataset_bytes: int = 0
    dataset_sha256: str = ""


def _load_tasks():
    tasks = {}
    for env_id, fields in json.loads((ASSETS / "tasks.json").read_text()).items():
        name = env_id.split("-")[0]
        is_maze = name == "antmaze"
        family, robot = ("antmaze", "ant") if is_maze else ("locomotion", name)
        tasks[env_id] = Task(env_id, family, robot, *ROBOT_SHAPES[robot], **fields)
    return tasks


TASKS = _load_tasks()
_substituted = {}  # by task id: the `Task` and the `EnvSpec` that `restore` brings back


def task(env_id):
    """Returns the `Task` of `env_id`; an unknown id is a ValueError with the nearest ids."""
    if env_id in TASKS:
        return TASKS[env_id]
    nearest = difflib.get_close_matches(str(env_id), TASKS, n=3, cutoff=0)
    raise ValueError(
        f"unknown env {env_id!r}; the nearest are {', '.join(nearest)}; call register_task for one "
        "of your own"
    )


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
        additional_wrappers=_with_d4rls_methods(()),
    )


def _with_d4rls_methods(wrappers):
    own = OfflineEnv.wrapper_spec()
    return wrappers if own in wrappers else (*wrappers, own)


def register_task(env_id, base, ref_min_score=0.0, ref_max_score=100.0):
    """Makes a task of an environment that is not in D4RL's list, to train on a file of one's own.

    Three lines train on it, with any algorithm:

        import d4rl_gymnasium as d4rl, iql
        d4rl.register_task("pendulum-v0", "InvertedPendulum-v5", 5.0, 1000.0)
        iql.main(["--env", "pendulum-v0", "--data", "mine.hdf5"])

    Its settings are those of locomotion, and its actions are rescaled to [-1, 1]: the file, which
    is in D4RL's format (`get_dataset`), has them so.

    Args:
        env_id: the new id, which `gymnasium.make` then knows too.
        base: id of an environment of MuJoCo with vectors of observations and actions.
        ref_min_score: return that scores 0.
        ref_max_score: return that scores 100; by default scores are returns.

    Raises:
        ValueError: the id is one of D4RL's, or the environment can't be made or doesn't serve.
    """
    registered_before = env_id in TASKS and not TASKS[env_id].dataset_url
    if env_id in gymnasium.registry and not registered_before:
        raise ValueError(f"{env_id} is an environment already: give yours another id")
    if not ref_min_score < ref_max_score:
        raise ValueError(f"the reference scores {ref_min_score} and {ref_max_score} must increase")
    try:
        env = gymnasium.make(base)
    except (gymnasium.error.Error, ImportError) as error:
        raise ValueError(f"cannot make {base!r} ({' '.join(str(error).split())})") from error
    try:
        observations, actions = env.observation_space, env.action_space
        for space in (observations, actions):
            if not isinstance(space, Box) or len(space.shape) != 1:
                raise ValueError(f"{base} has the space {space}, only vectors are supported")
        if not actions.is_bounded():
            raise ValueError(f"the actions of {base} have no bounds, which rescaling needs")
        if env.spec.max_episode_steps is None:
            raise ValueError(f"{base} has no episode limit: register it with max_episode_steps")
        env.reset()
        get_env_state(env)
        spec = env.spec
    finally:
        env.close()
    wrappers = spec.additional_wrappers
    if (actions.low != -1).any() or (actions.high != 1).any():
        one = np.float32(1)  # of the type of the space's bounds, or Gymnasium warns
        wrappers += (RescaleAction.wrapper_spec(min_action=-one, max_action=one),)
    changes = {"id": env_id, "additional_wrappers": _with_d4rls_methods(wrappers)}
    try:
        spec = dataclasses.replace(spec, **changes, vector_entry_point=None)
    except gymnasium.error.Error as error:
        raise ValueError(f"{env_id!r} is no id of an environment: take name-v0") from error
    _substituted.pop(env_id, None)
    gymnasium.registry[env_id] = spec
    dims = observations.shape[0], actions.shape[0]
    scores = float(ref_min_score), float(ref_max_score)
    TASKS[env_id] = Task(env_id, "locomotion", base, *dims, *scores, spec.max_episode_steps)


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
    _substituted[env_id] = TASKS[env_id], gymnasium.registry[env_id]
    if spec is not None:
        limit = spec.max_episode_steps or TASKS[env_id].max_episode_steps
        wrappers = _with_d4rls_methods(spec.additional_wrappers)
        spec = dataclasses.replace(
            spec, id=env_id, max_episode_steps=limit, additional_wrappers=wrappers
        )
        gymnasium.registry[env_id] = spec
        TASKS[env_id] = dataclasses.replace(TASKS[env_id], max_episode_steps=limit)
    if ref_scores is not None:
        low, high = ref_scores
        TASKS[env_id] = dataclasses.replace(TASKS[env_id], ref_min_score=low, ref_max_score=high)


def restore(env_id):
    """Gives a task id its own environment and scores back, where `substitute` took them."""
    if env_id in _substituted:
        TASKS[env_id], gymnasium.registry[env_id] = _substituted.pop(env_id)
