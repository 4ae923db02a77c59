"""Minari's data sets in and out (https://minari.farama.org); the package is an optional extra.

In: the steps of a data set become arrays in D4RL's layout, and the task that they are used for
takes the environment and the reference scores of the data set, where it has them. Supported are
flat observations and actions of the task's sizes and environments of MuJoCo. Dict observations are
not: Minari's AntMaze is another maze, with other coordinates, than D4RL's.

Out: whole episodes with their last observation, D4RL's environment and D4RL's reference scores.
"""

import contextlib
import os
import re
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from d4rl_gymnasium.download import DatasetError, one_line, writing
from d4rl_gymnasium.envs import EXACT_MUJOCO, get_env_state
from d4rl_gymnasium.tasks import substitute, task

PREFIX = "minari:"


def _minari():
    try:
        import minari
    except ImportError as error:
        raise DatasetError(
            f"Minari's data sets need the package minari ({one_line(error)}): on Python 3.11 or "
            'later, pip install -e ".[minari]"'
        ) from error
    return minari


def load(dataset_id):
    """Opens a Minari data set, from its local folder or else downloaded into it.

    Raises:
        DatasetError: no package, no such data set, or observations or actions that aren't flat.
    """
    minari = _minari()
    try:
        with warnings.catch_warnings():
            # That there is a later version of a data set is no concern of a reproducible run.
            warnings.simplefilter("ignore")
            dataset = minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # its formats and stores raise errors of all kinds
        raise DatasetError(
            f"Minari cannot load {dataset_id!r} ({type(error).__name__}: {one_line(error)}); "
            "`minari list local` and `minari list remote` show what there is"
        ) from error
    for name in ("observation", "action"):
        space = getattr(dataset, f"{name}_space")
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise DatasetError(
                f"the {name}s of Minari's {dataset_id} are {type(space).__name__}"
                f"{space.shape or ''}, only vectors are supported"
            )
    return dataset


def arrays_of(dataset):
    """The steps of a data set from `load` under D4RL's keys, one row each, in order.

    An episode that neither terminates nor is truncated, because its recording stopped, ends by
    time-out.

    Raises:
        DatasetError: an episode lacks its last observation.
    """
    parts = {name: [] for name in (
        "observations", "next_observations", "actions", "rewards", "terminals", "timeouts"
    )}  # fmt: skip
    for episode in dataset.iterate_episodes():
        steps = len(episode.rewards)
        if len(episode.observations) != steps + 1:
            raise DatasetError(
                f"episode {episode.id} of Minari's {dataset.id} has {len(episode.observations)} "
                f"observations and {steps} steps: use a later version of the data set"
            )
        timeouts = np.array(episode.truncations, bool)
        timeouts[-1:] |= ~np.array(episode.terminations[-1:], bool)
        rows = (
            episode.observations[:-1], episode.observations[1:], episode.actions, episode.rewards,
            np.array(episode.terminations, bool), timeouts,
        )  # fmt: skip
        for part, row in zip(parts.values(), rows, strict=True):
            part.append(row)
    if not parts["rewards"]:
        raise DatasetError(f"Minari's {dataset.id} is empty: use another data set")
    return {name: np.concatenate(part) for name, part in parts.items()}


def adopt(env_id, dataset):
    """Makes a task id stand for the environment and reference scores of a data set from `load`.

    Where the data set has none, those of D4RL's task stay. Prints which they are.

    Raises:
        DatasetError: its environment can't be made, doesn't fit the task, or can't be saved.
    """
    known, spec = task(env_id), dataset.env_spec and _environment_spec(env_id, dataset)
    metadata = dataset.storage.metadata
    scores = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    if None in scores:
        scores = None
    name = dataset.env_spec.id if spec else f"D4RL's {env_id}, as the data set names none"
    low, high = scores or (known.ref_min_score, known.ref_max_score)
    whose = "its own" if scores else "D4RL's, as the data set has none"
    substitute(env_id, spec, scores)
    print(
        f"data: Minari's {dataset.id}, {dataset.total_steps:,} steps, as {env_id}: scores on it are"
        f" NOT comparable with those on D4RL's data; environment {name}; reference scores "
        f"{low:g} and {high:g} ({whose})",
        flush=True,
    )


def _environment_spec(env_id, dataset):
    """The specification of a data set's environment, once it has been tried."""
    wanted = f"the environment of Minari's {dataset.id}, {dataset.env_spec.id},"
    try:
        env = dataset.recover_environment(eval_env=True)
    except Exception as error:  # of whatever package the environment is from
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise DatasetError(f"{wanted} cannot be made ({reason}): install what it needs") from error
    with contextlib.closing(env), contextlib.closing(gymnasium.make(env_id)) as own:
        for name in ("observation_space", "action_space"):
            theirs, ours = getattr(env, name), getattr(own, name)
            if not isinstance(theirs, Box) or theirs.shape != ours.shape:
                raise DatasetError(f"{wanted} has {name} {theirs}, {env_id} {ours}: use another")
        if not (np.all(env.action_space.low == -1) and np.all(env.action_space.high == 1)):
            raise DatasetError(f"{wanted} has action bounds other than -1 and 1: use another")
        try:
            env.reset()
            get_env_state(env)
        except ValueError as error:
            raise DatasetError(f"{wanted} cannot be used: {error}") from error
    return env.spec


def default_id(env_id, data):
    """The id that `write` gives a data set: the task, and where the data is from unless D4RL's."""
    source = "" if data == "d4rl" else "-" + re.sub(r"\W", "-", Path(data).stem)
    return f"d4rl_gymnasium/{env_id.removesuffix('-v2')}{source}-v2"


def write(env_id, dataset, dataset_id, source):
    """Writes arrays of `get_dataset` as a Minari data set; returns its folder.

    Args:
        env_id: task id, whose environment and reference scores are recorded.
        dataset: dict of arrays, one row per step, timeouts among them.
        dataset_id: id of the new data set, such as "namespace/name-v0".
        source: "d4rl", "regenerated" or a path: where the arrays are from.

    Raises:
        DatasetError: no package, the id is taken or malformed, or the disk can't be written.
    """
    minari = _minari()
    from minari.storage.datasets_root_dir import get_dataset_path

    root = get_dataset_path()
    final = root / dataset_id
    if final.exists():
        raise DatasetError(f"{final} is there already: give another --id, or move it away")
    buffers, remark = episodes(env_id, dataset)
    about = _metadata(env_id, source, remark)
    about["observation_space"] = Box(-np.inf, np.inf, dataset["observations"].shape[1:], np.float32)
    with (
        writing(final, "MINARI_DATASETS_PATH"),
        tempfile.TemporaryDirectory(dir=root, prefix=".writing-") as folder,
    ):
        with mock.patch.dict(os.environ, MINARI_DATASETS_PATH=folder), warnings.catch_warnings():
            # Minari warns that e-mail address, permalink and evaluation environment are missing.
            warnings.simplefilter("ignore", UserWarning)
            try:
                minari.create_dataset_from_buffers(dataset_id, buffers, env=env_id, **about)
            except (ValueError, TypeError, AssertionError) as error:
                raise DatasetError(f"Minari refuses {dataset_id!r}: {one_line(error)}") from error
        _move(Path(folder), root, dataset_id)
    return final


def _move(folder, root, dataset_id):
    """Moves a finished data set, and the descriptions of its namespaces, to Minari's folder."""
    parent = Path(dataset_id).parent
    (root / parent).mkdir(parents=True, exist_ok=True)
    for description in folder.rglob("namespace_metadata.json"):
        target = root / description.relative_to(folder)
        if not target.exists():
            os.replace(description, target)
    os.replace(folder / dataset_id, root / dataset_id)


def episodes(env_id, dataset):
    """The episodes of arrays of `get_dataset` as Minari's buffers, and a remark on their ends.

    The last observation of an episode is its last row's next one. Where the file has no next
    observations, an episode that ends by time-out loses its last step, and after a terminal,
    where nothing is ever bootstrapped from, the last observation is repeated.

    Raises:
        DatasetError: the rows are not in the order of their episodes.
    """
    from minari.data_collector import EpisodeBuffer

    from d4rl_gymnasium.report import episode_bounds
    from d4rl_gymnasium.transitions import require_order

    following = dataset.get("next_observations")
    terminals, timeouts = dataset["terminals"].astype(bool), dataset["timeouts"].astype(bool)
    require_order(dataset, terminals | timeouts)
    buffers = []
    for start, end in zip(*episode_bounds(dataset, task(env_id).family == "antmaze"), strict=True):
        steps = slice(start, end)
        observations = dataset["observations"][steps]
        if following is not None:
            observations = np.concatenate([observations, following[end - 1 : end]])
        elif terminals[end - 1] and not timeouts[end - 1]:
            observations = np.concatenate([observations, observations[-1:]])
        else:
            steps = slice(start, end - 1)
        if steps.start == steps.stop:
            continue
        rows = {key: dataset[key][steps] for key in ("actions", "rewards")}
        rows["terminations"], rows["truncations"] = terminals[steps], timeouts[steps].copy()
        rows["truncations"][-1] |= not rows["terminations"][-1]
        buffers.append(EpisodeBuffer(observations=observations, **rows))
    if following is not None:
        return buffers, ""
    return buffers, (
        " The source has no next observations: episodes that end by time-out lack their last step, "
        "and behind a terminal the last observation stands twice."
    )


def _metadata(env_id, source, remark):
    """What Minari records of a data set beside its steps."""
    known = task(env_id)
    if source == "d4rl":
        origin = "D4RL's data set of this name. Licence: CC BY 4.0."
        author, algorithm = "Fu et al., D4RL", "as D4RL's"
    elif source == "regenerated":
        origin = "Collected by D4RL's recipe in D4RL's physics; not D4RL's data. Licence: MIT."
        author, algorithm = "d4rl_gymnasium", "SAC"
    elif source.startswith(PREFIX):
        origin = f"From Minari's {source.removeprefix(PREFIX)}."
        author, algorithm = "unknown", "unknown"
    else:
        origin = f"From the file {Path(source).name}."
        author, algorithm = "unknown", "unknown"
    if known.family == "antmaze":
        origin += " As in D4RL's files every step at the goal is terminal, and the episode goes on."
    return {
        "description": f"{env_id}: {origin}{remark}",
        "author": author,
        "algorithm_name": algorithm,
        "ref_min_score": known.ref_min_score,
        "ref_max_score": known.ref_max_score,
        "requirements": [f"mujoco=={EXACT_MUJOCO}"],
    }
