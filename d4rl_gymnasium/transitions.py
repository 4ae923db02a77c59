"""What learning takes from a data set: its transitions and its episodes."""

import numpy as np

from d4rl_gymnasium.data import STEP_KEYS, TRANSITION_KEYS, checked, get_dataset, task_of
from d4rl_gymnasium.download import DatasetError


def qlearning_dataset(
    env_or_id, dataset=None, terminate_on_end=False, *, data="d4rl", regenerated_size=200_000
):
    """The transitions of a data set, bit for bit those of D4RL's function of this name.

    A next observation is the observation of the next row. After a terminal that is the first one
    of another episode, which bootstrapping never reads; a step that ends by time-out is left out,
    since its next observation is lost, unless `terminate_on_end` asks for it.

    Unlike in D4RL, a file's `next_observations` are used if, within an episode, they differ from
    the observations of the next rows, as when the rows were shuffled: every row is then a
    transition. A printed line says so, as it does where the data has no timeouts.

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
    source = "the given dataset"
    if dataset is None:
        source = data
        keys = STEP_KEYS if data in ("d4rl", "regenerated") else TRANSITION_KEYS
        dataset = get_dataset(env_or_id, data, regenerated_size, keys=keys)
    else:
        dataset = checked(dataset, task_of(env_or_id), source)
    terminals = dataset["terminals"].astype(bool)
    limit = _episode_limit(env_or_id)
    timeouts = timeouts_of(dataset, limit)
    if "timeouts" not in dataset:
        print(
            f"data: {source} has no timeouts: an episode without a terminal is taken to end after "
            f"{limit:,} steps",
            flush=True,
        )
    observations = dataset["observations"].astype(np.float32, copy=False)
    rows = np.flatnonzero(terminate_on_end | ~timeouts)
    rows = rows[rows < len(terminals) - 1]  # the last row has no next one
    in_order = is_in_order(dataset, terminals | timeouts)
    if not in_order:
        print(
            f"data: {source} has next observations that are not those of the next rows; they are "
            "used, and each row is a transition. Returns (of --normalize_reward and Cal-QL) are "
            "sums over rows that follow each other",
            flush=True,
        )
        rows = np.arange(len(terminals))
    if not len(rows):
        raise DatasetError("the data holds no transition with a next observation: use another file")
    following = observations[rows + 1] if in_order else dataset["next_observations"]
    return {
        "observations": observations[rows],
        "actions": dataset["actions"].astype(np.float32, copy=False)[rows],
        "next_observations": following.astype(np.float32, copy=False),
        "rewards": dataset["rewards"].astype(np.float32, copy=False)[rows],
        "terminals": terminals[rows],
    }


def sequence_dataset(env_or_id, dataset=None, *, data="d4rl", regenerated_size=200_000):
    """The episodes of a data set one by one, those of D4RL's function of this name.

    An episode ends at a terminal or a time-out, so on AntMaze, where D4RL's files mark every step
    at the goal as terminal, also there. Rows after the last end are left out.

    Args:
        env_or_id: as in `qlearning_dataset`.
        dataset: as in `qlearning_dataset`.
        data: as in `get_dataset`.
        regenerated_size: as in `get_dataset`.

    Yields:
        dict of the arrays of `get_dataset`, cut to the rows of the episode.

    Raises:
        ValueError: as in `get_dataset`.
        DatasetError: as in `get_dataset`, or the rows are not in the order of their episodes.
    """
    if dataset is None:
        dataset = get_dataset(env_or_id, data, regenerated_size)
    else:
        dataset = checked(dataset, task_of(env_or_id), "the given dataset")
    timeouts = timeouts_of(dataset, _episode_limit(env_or_id), behind_timeout=1)
    ends = dataset["terminals"].astype(bool) | timeouts
    require_order(dataset, ends)
    start = 0
    for end in np.flatnonzero(ends) + 1:
        yield {key: array[start:end].copy() for key, array in dataset.items()}
        start = end


def is_in_order(dataset, ends):
    """Whether a row's next observation, where the data has one, is the next row's observation.

    Args:
        dataset: arrays of `get_dataset`.
        ends: whether an episode ends with a row (N,); such rows are not looked at.
    """
    if "next_observations" not in dataset:
        return True
    following = dataset["next_observations"][:-1].astype(np.float32, copy=False)
    next_row = dataset["observations"][1:].astype(np.float32, copy=False)
    return bool((following == next_row)[~ends[:-1]].all())


def require_order(dataset, ends):
    """Raise a DatasetError unless `is_in_order`."""
    if not is_in_order(dataset, ends):
        raise DatasetError(
            "the rows are no episodes in order, as next observations are not those of the next "
            "rows: use data that was not shuffled, with a time-out where an episode ends by one"
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


def timeouts_of(dataset, limit, behind_timeout=0):
    """The timeouts of arrays of `get_dataset`, (N,) bool; a limit in steps stands in for them.

    `behind_timeout` is the step count of the first row after a time-out, see `_limit_steps`.
    """
    if "timeouts" in dataset:
        return dataset["timeouts"].astype(bool)
    return _limit_steps(dataset["terminals"].astype(bool), limit, behind_timeout)


def _limit_steps(terminals, limit, behind_timeout):
    """Mark the rows at which D4RL's step count reaches the episode limit.

    D4RL sets the count to 0 at the end of an episode and then adds the row if it keeps it: after
    a terminal, which is kept, the count begins at 1. After a time-out it begins at 0 in
    `qlearning_dataset`, which leaves that row out, and at 1 in `sequence_dataset`.
    """
    marks = np.zeros(len(terminals), bool)
    start, count = 0, 0
    for end in np.append(np.flatnonzero(terminals), len(terminals) - 1):
        first, step = start + limit - 1 - count, max(1, limit - behind_timeout)
        marks[first : end + 1 : step] = True
        start = end + 1
        count = behind_timeout if marks[end] else 1
    return marks


def _episode_limit(env_or_id):
    of_env = None if isinstance(env_or_id, str) else env_or_id.spec.max_episode_steps
    return of_env or task_of(env_or_id).max_episode_steps
