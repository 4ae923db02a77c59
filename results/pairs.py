"""Runs by task and seed, in pairs, and the statistics of tables.py.

Intervals (95%) of means are Student's t intervals, as few runs make percentile bootstraps too
narrow; those of other statistics are percentile bootstraps. In both the runs of each task stand for
themselves, the tasks are fixed. Standard deviations are those of the population, as in collect.py.
"""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import experiments
import numpy as np
from cells import Cell, described
from collect import Record
from scipy.stats import t, trim_mean

NAMES = {"halfcheetah": "HC", "hopper": "H", "walker2d": "W2D", "antmaze": "AM"}
KINDS = {"medium-expert": "ME", "medium-replay": "MR", "medium": "M", "medium-diverse": "MD",
         "medium-play": "MP", "umaze-diverse": "UD", "umaze": "U"}  # fmt: skip


def abbreviated(task: str) -> str:
    """A task's name in the paper's tables."""
    name, kind = task.removesuffix("-v2").split("-", 1)
    return f"{NAMES[name]}-{KINDS[kind]}"


LOCOMOTION = {task: abbreviated(task) for task in experiments.LOCOMOTION}
ANTMAZE = {task: abbreviated(task) for task in experiments.ANTMAZE}
TASKS = LOCOMOTION | ANTMAZE
# Tables 3 and 10 have no medium-expert.
UTD_TASKS = {task: label for task, label in LOCOMOTION.items() if not label.endswith("ME")}

# What config.yaml says of every run and the tables need.
SIZES = "offline_iterations", "online_iterations", "batch_size", "hidden_dim"
SETTINGS = "data", "regenerated_size", *SIZES
# The paper's sizes of DARE (App. B.5) and EDIS (Table 6), which tables do not state of their runs.
FULL_SIZE = {
    "behavior_iterations": 600_000,
    "behavior_batch_size": 4096,
    "energy_hidden": 256,
    "model_iterations": 50_000,
}

# --- Runs ---


def origin(record: Record) -> tuple[str, int, int, int]:
    """Data, offline updates, batch and layers of a run: what runs need in common to be paired."""
    data = str(record.settings["data"])
    data = data if data.startswith("minari:") else Path(data).name
    if data == "regenerated":
        data += f" ({int(record.settings['regenerated_size']):,} transitions)"
    return data, *(int(record.settings[k]) for k in SIZES if k != "online_iterations")


def cut(record: Record, until: int = 200_000) -> Record:
    """The run as it was at an online step, if it went on beyond."""
    steps = min(until, int(record.settings["online_iterations"]))
    kept = [row for row in record.eval if row["phase"] != "online" or row["step"] <= steps]
    return replace(record, eval=kept, settings=record.settings | {"online_iterations": steps})


def sizes_of(records: list[Record]) -> str:
    """Data and sizes of runs (after cut), each once."""
    found = {described(*origin(r), int(r.settings["online_iterations"])) for r in records}
    return " and ".join(sorted(found))


def reduced(record: Record) -> str:
    """The first of FULL_SIZE's settings that the run has another value of, or ""."""
    settings = record.settings
    return next((k for k, v in FULL_SIZE.items() if float(settings.get(k, v)) != v), "")


def by_seed(records: list[Record]) -> dict:
    """Runs as {(method, task): {seed: run}}.

    Raises:
        ValueError: a run does not say its data or sizes.
    """
    runs = defaultdict(dict)
    for record in records:
        for key in SETTINGS:
            if key not in record.settings:
                where = f"{record.method}/{record.env}/seed_{record.seed}"
                raise ValueError(f"the run {where} has no {key} in its settings; leave it out")
        runs[record.method, record.env][record.seed] = record
    return dict(runs)


def matched(runs: dict, methods: list[str], task: str, until: int = 200_000) -> list[tuple]:
    """Tuples of one run a method: seeds that all have, of one origin, cut at the same step."""
    groups = [runs.get((method, task), {}) for method in methods]
    found = []
    for seed in sorted(set.intersection(*map(set, groups))):
        records = [group[seed] for group in groups]
        if len({origin(r) for r in records}) == 1:
            steps = min(until, *(int(r.settings["online_iterations"]) for r in records))
            found.append(tuple(cut(r, steps) for r in records))
    return found


def log(record: Record, column: str) -> np.ndarray:
    """A column of the online log rows that have alignment scores."""
    rows = [row for row in record.train if row["phase"] == "online" and "mu_offline" in row]
    return np.array([row[column] for row in rows])


def last_four(record: Record) -> float:
    """The measure of Table 1; of a run cut at step 0, the offline score."""
    return record.last_four


def best(record: Record) -> float:
    """Highest evaluation, online step 0 included; of a run cut at step 0, of the offline phase."""
    if int(record.settings["online_iterations"]):
        return record.best
    return float(max(record.scores("offline")[1], default=record.offline_score))


# --- Statistics ---


def mean_of_tasks(strata: list[np.ndarray]) -> np.ndarray:
    """Mean over the strata of the means over their last axis (runs)."""
    return np.mean([values.mean(-1) for values in strata], 0)


def iqm(strata: list[np.ndarray]) -> np.ndarray:
    """Interquartile mean of the runs of all strata (last axis) together."""
    return trim_mean(np.concatenate(strata, -1), 0.25, axis=-1)


def share_highest(strata: list[np.ndarray]) -> np.ndarray:
    """Share of strata (..., runs, methods) whose first method has the highest mean, less 1/2.

    A mean that another method has, too, is not the highest.
    """
    means = [values.mean(-2) for values in strata]
    return np.mean([m[..., 0] > m[..., 1:].max(-1) for m in means], 0) - 0.5


def t_interval(strata: list[np.ndarray]):
    """Student's t interval, 95%, of mean_of_tasks, with Welch's degrees of freedom.

    None where a stratum has a single run, which tells no spread.
    """
    if not strata or min(map(len, strata)) < 2:
        return None
    mean = float(mean_of_tasks(strata))
    variances = np.array([np.var(values, ddof=1) / len(values) for values in strata])
    if not variances.any():
        return mean, mean
    freedom = variances.sum() ** 2 / sum(
        v**2 / (len(values) - 1) for v, values in zip(variances, strata, strict=True)
    )
    half = float(t.ppf(0.975, freedom) * np.sqrt(variances.sum()) / len(strata))
    return mean - half, mean + half


def bootstrap(strata: list[np.ndarray], statistic, draws: int = 10_000):
    """Percentile interval, 95%; None where a stratum has a single run, which tells no spread."""
    if not strata or min(map(len, strata)) < 2:
        return None
    rng = np.random.default_rng(0)
    drawn = [values[rng.integers(len(values), size=(draws, len(values)))] for values in strata]
    return tuple(float(x) for x in np.percentile(statistic(drawn), [2.5, 97.5]))


def summary(values, sizes: str, *, signed: bool = False, interval: bool = False, digits: int = 1):
    """Cell of runs: mean and standard deviation, of differences the mean alone; None of none."""
    values = np.array(values, float)
    if not len(values):
        return None
    std = None if signed else float(values.std())
    found = t_interval([values]) if interval else None
    return Cell(float(values.mean()), std, len(values), found, sizes, digits, signed)
