"""D4RL's data: where a file is, what it holds, and the transitions that Q-learning wants of it."""

import os
from pathlib import Path

import h5py
import numpy as np

from d4rl_gymnasium import minari_io
from d4rl_gymnasium.download import DatasetError, DownloadError, download, one_line
from d4rl_gymnasium.regenerate import regenerate, regenerated_path, regenerated_tasks
from d4rl_gymnasium.tasks import restore, task

# Length of an observation and of an action of each robot in D4RL's v2 tasks.
ROBOT_SHAPES = {"hopper": (11, 3), "walker2d": (17, 6), "halfcheetah": (17, 6), "ant": (29, 8)}
REQUIRED_KEYS = ("observations", "actions", "rewards", "terminals")
# Files of D4RL's first version have no timeouts: there the episode limit stands in for them.
QLEARNING_KEYS = (*REQUIRED_KEYS, "timeouts")
# Actions come from tanh or np.clip in float32, whose rounding at 1 is 6e-8.
ACTION_TOLERANCE = 1e-6


def get_dataset(env_or_id, data="d4rl", regenerated_size=200_000):
    """The arrays of a D4RL file as they were recorded, checked.

    Args:
        env_or_id: a task id, or an environment made from one, wrapped or not.
        data: `"d4rl"` (D4RL's file from its cache `$D4RL_DATASET_DIR`, default
            `~/.d4rl/datasets`, else downloaded into it), `"regenerated"` (made on this machine by
            D4RL's recipe, then cached), `"minari:ID"` (a data set of Minari: from then on the task
            has the data set's environment and reference scores, see `minari_io`, until other data
            of it is asked for), or the path of an HDF5 file in D4RL's format.
        regenerated_size: number of transitions of regenerated data; 0: as many as D4RL's file has.

    Returns:
        dict of arrays with one row per step: observations (N, dim) and actions (N, dim), rewards,
        terminals (the task ended: no bootstrapping) and timeouts (only the episode ended), all
        three (N,), and whatever else the file holds per step, such as infos/qpos.

    Raises:
        ValueError: unknown task id.
        DatasetError: the data can't be had, or is not what the task needs.
    """
    return _load(env_or_id, data, regenerated_size, keys=None)


def qlearning_dataset(
    env_or_id, dataset=None, terminate_on_end=False, *, data="d4rl", regenerated_size=200_000
):
    """The transitions of a data set, bit for bit those of D4RL's function of this name.

    A next observation is the observation of the next row. Behind a terminal that is the first one
    of another episode, which bootstrapping never reads; a step that ends by time-out is left out,
    since its next observation is lost, unless `terminate_on_end` asks for it.

    Args:
        env_or_id: as in `get_dataset`. Where the data has no timeouts, the episode limit of the
            environment (of the task, given an id) stands in for them.
        dataset: arrays to use in place of `data`, as `get_dataset` returns them.
        terminate_on_end: keep the steps that end by time-out.
        data: as in `get_dataset`.
        regenerated_size: as in `get_dataset`.

    Returns:
        dict of observations (n, dim), actions (n, dim), next_observations (n, dim), rewards (n,),
        all float32, and terminals (n,), bool.

    Raises:
        ValueError: unknown task id.
        DatasetError: as in `get_dataset`, or no transition is left.
    """
    if dataset is None:
        dataset = _load(env_or_id, data, regenerated_size, QLEARNING_KEYS)
    else:
        dataset = _checked(dict(dataset), _task_of(env_or_id), "the given dataset")
    terminals = dataset["terminals"].astype(bool)
    if terminate_on_end:
        kept = np.ones(len(terminals), bool)
    else:
        kept = ~timeouts_of(dataset, _episode_limit(env_or_id))
    kept[-1] = False  # the last row has no next one
    if not kept.any():
        raise DatasetError("the data holds no transition with a next observation: use another file")
    observations = dataset["observations"].astype(np.float32, copy=False)
    return {
        "observations": observations[kept],
        "actions": dataset["actions"].astype(np.float32, copy=False)[kept],
        "next_observations": observations[np.flatnonzero(kept) + 1],
        "rewards": dataset["rewards"].astype(np.float32, copy=False)[kept],
        "terminals": terminals[kept],
    }


def dataset_path(env_id, data="d4rl", regenerated_size=200_000):
    """Where the file that `data` (see `get_dataset`) names for a task is or will be, as a Path."""
    if data == "regenerated":
        return regenerated_path(env_id, regenerated_size, _cache_dir() / "regenerated")
    if data == "d4rl":
        return _cache_dir() / task(env_id).dataset_url.rsplit("/", 1)[1]
    if _is_minari(data):
        raise ValueError(f"{data} is no file: Minari keeps it")
    return Path(data).expanduser()


def _is_minari(data):
    return str(data).startswith(minari_io.PREFIX)


def _load(env_or_id, data, regenerated_size, keys):
    known = _task_of(env_or_id)
    restore(known.env_id)
    if _is_minari(data):
        return _load_minari(known, data)
    try:
        path = dataset_path(known.env_id, data, regenerated_size)
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a closed folder; ~ of nobody
        raise DatasetError(
            f"cannot look for the data {data} ({one_line(error)}): name another path, or set "
            "D4RL_DATASET_DIR to a folder of yours"
        ) from error
    if data == "regenerated":
        regenerate(known.env_id, regenerated_size, path)
    elif data == "d4rl":
        _fetch(known, path)
    elif not is_file:
        raise DatasetError(
            f"{path} is not a file: --data is d4rl, regenerated or the path of an HDF5 file, "
            "or minari:ID"
        )
    arrays, is_regenerated = _read(path, keys)
    if data == "d4rl" and is_regenerated:
        raise DatasetError(
            f"{path} has the name of D4RL's file but was regenerated: move it away, or use "
            "--data regenerated"
        )
    return _checked(arrays, known, path)


def _load_minari(known, data):
    source = minari_io.load(str(data).removeprefix(minari_io.PREFIX))
    arrays = _checked(minari_io.arrays_of(source), known, data)
    minari_io.adopt(known.env_id, source)
    return arrays


def _fetch(known, path):
    try:
        download(known.dataset_url, path)
    except DownloadError as error:
        makeable = regenerated_tasks()
        instead = "which makes such data on this machine"
        if known.env_id not in makeable:
            instead += f" (so far for {', '.join(makeable)})"
        raise DatasetError(
            f"{error}; put the file at {path} by hand, or use --data regenerated, {instead}"
        ) from error


def _read(path, keys):
    """The arrays of an HDF5 file (all but `metadata/`, or those of `keys` that are there)."""
    arrays = {}

    def collect(name, item):
        wanted = not name.startswith("metadata/") if keys is None else name in keys
        if wanted and isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    try:
        # Some network file systems have no locks; nothing writes to a finished file.
        with h5py.File(path, "r", locking="best-effort") as file:
            file.visititems(collect)
            return arrays, "regenerated" in file.attrs
    except (OSError, RuntimeError, KeyError) as error:
        fault = "is truncated or damaged" if h5py.is_hdf5(path) else "is not a readable HDF5 file"
        raise DatasetError(
            f"{path} {fault} ({one_line(error)}): delete it, or put an intact copy there"
        ) from error


def _checked(arrays, known, source):
    """`arrays` with per-step vectors of shape (N,); a DatasetError names the first fault."""
    missing = [key for key in REQUIRED_KEYS if key not in arrays]
    if missing:
        raise DatasetError(f"{source} has no {', '.join(missing)}: it is not in D4RL's format")
    n = len(np.atleast_1d(arrays["observations"]))
    if n == 0:
        raise DatasetError(f"{source} is empty: use a file that holds transitions")
    observation_dim, action_dim = ROBOT_SHAPES[known.robot]
    shapes = {"observations": (n, observation_dim), "actions": (n, action_dim)}
    for key in QLEARNING_KEYS:
        if key not in arrays:
            continue
        array, shape = np.asarray(arrays[key]), shapes.get(key, (n,))
        if array.shape == (n, 1):
            array = array[:, 0]
        if array.shape != shape:
            raise DatasetError(
                f"{source}: {key} have shape {array.shape}, {known.env_id} with {n:,} observations "
                f"needs {shape}: use a file of this task"
            )
        arrays[key] = array
    _check_values(arrays, source)
    return {key: value for key, value in arrays.items() if np.shape(value)[:1] == (n,)}


def _check_values(arrays, source):
    for key in QLEARNING_KEYS:
        if key in arrays and arrays[key].dtype.kind not in "fiub":
            raise DatasetError(f"{source}: {key} are no numbers: it is not in D4RL's format")
    for key in ("observations", "actions", "rewards"):
        if not np.isfinite(arrays[key]).all():
            raise DatasetError(f"{source}: {key} hold NaN or infinite values: use an intact file")
    largest = np.abs(arrays["actions"]).max()
    if largest > 1 + ACTION_TOLERANCE:
        raise DatasetError(
            f"{source}: actions reach {largest:g} in size, the bounds are -1 and 1: rescale them"
        )
    for key in ("terminals", "timeouts"):
        if key in arrays and not np.isin(arrays[key], (0, 1)).all():
            raise DatasetError(
                f"{source}: {key} hold values other than 0 and 1: use an intact file"
            )


def episode_starts(dataset):
    """First rows of the episodes of a `qlearning_dataset`, in order, (E,).

    An episode begins after a terminal and where an observation is not the next observation of the
    row before.
    """
    observations, following = dataset["observations"], dataset["next_observations"]
    first = np.ones(len(observations), bool)
    joined = (observations[1:] == following[:-1]).all(1)
    first[1:] = dataset["terminals"][:-1].astype(bool) | ~joined
    return np.flatnonzero(first)


def timeouts_of(dataset, limit):
    """The timeouts of arrays of `get_dataset`, (N,) bool; a limit in steps stands in for them."""
    if "timeouts" in dataset:
        return dataset["timeouts"].astype(bool)
    return _limit_steps(dataset["terminals"].astype(bool), limit)


def _limit_steps(terminals, limit):
    """Mark the rows at which D4RL's step count reaches the episode limit.

    D4RL sets the count to 0 at the end of an episode and then adds the row if it keeps it: behind
    a terminal, which is kept, the count begins at 1, behind a time-out, which is not, at 0.
    """
    marks = np.zeros(len(terminals), bool)
    start, count = 0, 0
    for end in np.append(np.flatnonzero(terminals), len(terminals) - 1):
        marks[start + limit - 1 - count : end + 1 : limit] = True
        start, count = end + 1, 0 if marks[end] else 1
    return marks


def _cache_dir():
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def _task_of(env_or_id):
    if isinstance(env_or_id, str):
        return task(env_or_id)
    if getattr(env_or_id, "spec", None) is None:
        raise ValueError("need a task id or an environment that gymnasium.make made from one")
    return task(env_or_id.spec.id)


def _episode_limit(env_or_id):
    of_env = None if isinstance(env_or_id, str) else env_or_id.spec.max_episode_steps
    return of_env or _task_of(env_or_id).max_episode_steps
