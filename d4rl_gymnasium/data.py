"""D4RL's data: where a file is, and its arrays, checked."""

import os
from pathlib import Path

import numpy as np

from d4rl_gymnasium import hdf5, minari_io
from d4rl_gymnasium.download import DatasetError, DownloadError, download, one_line
from d4rl_gymnasium.regenerate import regenerate, regenerated_path
from d4rl_gymnasium.tasks import restore, task

REQUIRED_KEYS = ("observations", "actions", "rewards", "terminals")
# Files of D4RL's first version have no timeouts: there the episode limit stands in for them.
STEP_KEYS = (*REQUIRED_KEYS, "timeouts")
# Other transitions than D4RL's may stand in any order, each with its next observation.
TRANSITION_KEYS = (*STEP_KEYS, "next_observations")
# Actions come from tanh or np.clip in float32, whose rounding at 1 is 6e-8.
ACTION_TOLERANCE = 1e-6


def get_dataset(env_or_id, data="d4rl", regenerated_size=200_000, *, keys=None):
    """The arrays of a D4RL file as they were recorded, checked.

    An array is read by its name, whether that is its only name or a link, and never from another
    file than the one named.

    Args:
        env_or_id: a task id, or an environment made from one, wrapped or not.
        data: `"d4rl"` (D4RL's file from its cache `$D4RL_DATASET_DIR`, default
            `~/.d4rl/datasets`, else downloaded into it), `"regenerated"` (made on this machine by
            D4RL's recipe, then cached), `"minari:ID"` (a data set of Minari: from then on the task
            has the data set's environment and reference scores, see `minari_io`, until other data
            of it is asked for), or the path of an HDF5 file in D4RL's format.
        regenerated_size: number of transitions of regenerated data; 0: D4RL's nominal size.
        keys: names of the arrays to read of a file, where it has them; None reads all.

    Returns:
        dict of arrays with one row per step: observations (N, dim) and actions (N, dim), rewards,
        terminals (the task ended: no bootstrapping) and timeouts (only the episode ended), all
        three (N,), and whatever else the file holds per step, such as infos/qpos.

    Raises:
        ValueError: unknown task id.
        DatasetError: the data can't be had, or is not what the task needs.
    """
    known = task_of(env_or_id)
    restore(known.env_id)
    if _is_minari(data):
        return _load_minari(known, data)
    try:
        path = dataset_path(known.env_id, data, regenerated_size)
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a closed folder, ~ of nobody, a NUL
        raise DatasetError(
            f"cannot look for the data {data} ({one_line(error)}): name another path, or set "
            "D4RL_DATASET_DIR to a folder of yours"
        ) from error
    if data == "regenerated":
        regenerate(known.env_id, regenerated_size, path)
    elif data == "d4rl":
        _fetch(known, path)
    elif not exists or path.is_dir():
        raise DatasetError(
            f"{path} is not a file: --data is d4rl, regenerated or the path of an HDF5 file, "
            "or minari:ID"
        )
    return _read(path, known, keys)


def dataset_path(env_id, data="d4rl", regenerated_size=200_000):
    """Where the file that `data` (see `get_dataset`) names for a task is or will be, as a Path."""
    if data == "regenerated":
        return regenerated_path(env_id, regenerated_size, _cache_dir() / "regenerated")
    if data == "d4rl":
        if not task(env_id).dataset_url:
            raise DatasetError(f"{env_id} has no data of D4RL: name a file of yours with --data")
        return _cache_dir() / task(env_id).dataset_url.rsplit("/", 1)[1]
    if _is_minari(data):
        raise ValueError(f"{data} is no file: Minari keeps it")
    return Path(data).expanduser()


def _is_minari(data):
    return str(data).startswith(minari_io.PREFIX)


def _cache_dir():
    return Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()


def task_of(env_or_id):
    """The `Task` of a task id, or of an environment that `gymnasium.make` made from one."""
    if isinstance(env_or_id, str):
        return task(env_or_id)
    if getattr(env_or_id, "spec", None) is None:
        raise ValueError("need a task id or an environment that gymnasium.make made from one")
    return task(env_or_id.spec.id)


def _load_minari(known, data):
    source = minari_io.load(str(data).removeprefix(minari_io.PREFIX))
    arrays = checked(minari_io.arrays_of(source), known, data)
    minari_io.adopt(known.env_id, source)
    return arrays


def _fetch(known, path):
    try:
        download(known.dataset_url, path, sha256=known.dataset_sha256)
    except DownloadError as error:
        raise DatasetError(
            f"{error}; put the file at {path} by hand, or use --data regenerated, which makes such "
            "data on this machine"
        ) from error
    # A file that was there already is checked by its size alone: its SHA-256 would take a second.
    if path.is_file() and path.stat().st_size != known.dataset_bytes:
        raise DatasetError(
            f"{path} has the name of D4RL's file but {path.stat().st_size:,} bytes, not "
            f"{known.dataset_bytes:,}: move it away to download D4RL's, or name it with "
            f"--data {path} to use it as a file of your own"
        )


def _read(path, known, keys):
    with hdf5.opened(path) as file:
        found = {key: hdf5.find(file, key) for key in TRANSITION_KEYS}
        n = check_layout(found, known, path)
        for key in hdf5.names(file) if keys is None else keys:
            if key not in found and _is_per_step(array := hdf5.find(file, key), n):
                found[key] = array
        key = "next_observations"
        asked = keys is None or key in keys
        if asked and found[key] is None and file.get(key, getlink=True) is not None:
            raise DatasetError(
                f"{path}: {key} are no array but a group, an empty one or a link that leads "
                "nowhere: write them as an array, or leave the name out"
            )
        arrays = {}
        for key, array in found.items():
            if array is not None and (keys is None or key in keys):
                values = hdf5.read(array, key)
                arrays[key] = values[:, 0] if _is_column(key, values) else values
    check_values(arrays, path)
    return arrays


def _is_per_step(array, n):
    return array is not None and array.shape[:1] == (n,) and array.dtype.kind in hdf5.NUMBERS


def _is_column(key, array):
    return key in ("rewards", "terminals", "timeouts") and array.ndim == 2


def checked(arrays, known, source):
    """Given arrays of a task, with per-step vectors of shape (N,), or a DatasetError."""
    arrays = {key: np.asarray(array) for key, array in arrays.items()}
    n = check_layout(arrays, known, source)
    arrays = {
        key: array[:, 0] if _is_column(key, array) else array
        for key, array in arrays.items()
        if array.shape[:1] == (n,)
    }
    check_values(arrays, source)
    return arrays


def check_layout(arrays, known, source):
    """Compare shapes and types with those of a task, without reading; returns the number of rows.

    Args:
        arrays: dict of what has a shape and a dtype, such as `h5py.Dataset`; None is no array.
        known: `Task`.
        source: name of the data for messages.

    Raises:
        DatasetError: a required array is missing, or the first fault.
    """
    missing = [key for key in REQUIRED_KEYS if arrays.get(key) is None]
    if missing:
        there = ", ".join(key for key, array in arrays.items() if array is not None)
        raise DatasetError(
            f"{source} has no {', '.join(missing)}: it is not in D4RL's format (of the arrays "
            f"looked for it has {there or 'none'})"
        )
    n = (arrays["observations"].shape or (0,))[0]
    observations, actions = (n, known.observation_dim), (n, known.action_dim)
    shapes = {
        "observations": observations, "next_observations": observations, "actions": actions
    }  # fmt: skip
    for key in TRANSITION_KEYS:
        array, shape = arrays.get(key), shapes.get(key, (n,))
        if array is None:
            continue
        if array.shape != shape and (key in shapes or array.shape != (n, 1)):
            cure = "use one whose arrays have equally many rows"
            if array.shape == (n,) and shape == (n, 1):
                cure = "write them with a second axis, array[:, None]"
            elif array.shape[:1] == (n,):
                cure = "use a file of this task"
            raise DatasetError(
                f"{source}: {key} have shape {array.shape}, {known.env_id} with {n:,} observations "
                f"needs {shape}: {cure}"
            )
        if array.dtype.kind not in hdf5.NUMBERS:
            raise DatasetError(f"{source}: {key} are no numbers: it is not in D4RL's format")
    if n == 0:
        raise DatasetError(f"{source} is empty: use a file that holds transitions")
    return n


def check_values(arrays, source):
    """A DatasetError where transitions hold what no environment with actions in [-1, 1] makes."""
    for key in ("observations", "next_observations", "actions", "rewards"):
        if key not in arrays:
            continue
        if not (finite := np.isfinite(arrays[key])).all():
            rows = np.unique(np.argwhere(~finite)[:, 0])
            raise DatasetError(
                f"{source}: {key} hold NaN or infinite values in {len(rows):,} of {len(finite):,} "
                f"rows, the first is {rows[0]:,}: use an intact file"
            )
        with np.errstate(over="ignore"):
            in_float32 = arrays[key].astype(np.float32, copy=False)
        if not np.isfinite(in_float32).all():
            raise DatasetError(f"{source}: {key} hold values that float32 cannot: rescale them")
        if key == "actions" and (largest := np.abs(in_float32).max()) > 1 + ACTION_TOLERANCE:
            raise DatasetError(
                f"{source}: actions reach {largest:g} in size, the bounds are -1 and 1: rescale "
                "them"
            )
    for key in ("terminals", "timeouts"):
        if key in arrays and not np.isin(arrays[key], (0, 1)).all():
            raise DatasetError(
                f"{source}: {key} hold values other than 0 and 1: use an intact file"
            )
