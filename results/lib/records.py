"""Finished runs, as they lie in a runs directory or as committed records."""

import csv
import io
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from d4rl_gymnasium.files import write
from lib.experiments import Experiment

KEY = "method", "env", "seed"  # before the columns of the scripts' eval.csv and train.csv
# Settings that are text whatever they look like: a commit can be 4829103 or 12e4567.
TEXT = "method", "env", "name", "data", "load_model", "commit", "command", "hardware", "torch"
PREPARING = "prepare_"  # begins the names of runs that only make what others start from
# What the tables say of every run.
SIZES = "offline_iterations", "batch_size", "hidden_dim"
REQUIRED = "data", "regenerated_size", "online_iterations", *SIZES
# The paper's sizes of DARE (App. B.5) and EDIS (Table 6), which the tables do not state.
FULL_SIZE = {
    "behavior_iterations": 600_000,
    "behavior_batch_size": 4096,
    "energy_hidden": 256,
    "model_iterations": 50_000,
}


@dataclass
class Record:
    """A finished run. Rows are dictionaries; numbers are floats and empty cells are left out.

    `settings` are the run's config.yaml and, of a run of grid.py, its job.yaml (command, commit,
    hardware, seconds).
    """

    method: str
    env: str
    seed: int
    settings: dict
    eval: list[dict]
    train: list[dict]

    @property
    def key(self) -> tuple:
        """What the columns KEY name it by."""
        return self.method, self.env, self.seed

    @property
    def n_steps(self) -> int:
        """Online steps."""
        return int(self.settings["online_iterations"])

    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and normalized scores of the online evaluations."""
        rows = [row for row in self.eval if row["phase"] == "online"]
        return tuple(np.array([row[k] for row in rows]) for k in ("step", "d4rl_normalized_score"))

    @property
    def offline_score(self) -> float:
        """Score at online step 0: of the agent that fine-tuning starts from."""
        return float(self.scores()[1][0])

    @property
    def last_four(self) -> float:
        """Mean score of the last four online evaluations, as in Table 1; of none, offline_score."""
        scores = self.scores()[1]
        return float(np.mean(scores[1:][-4:] if len(scores) > 1 else scores))

    @property
    def last(self) -> float:
        """Score of the last online evaluation."""
        return float(self.scores()[1][-1])

    @property
    def after_updates(self) -> float:
        """Mean score of all evaluations after online updates; of none, offline_score."""
        steps, scores = self.scores()
        found = scores[steps > int(self.settings.get("initial_collection_steps", 0))]
        return float(found.mean()) if len(found) else self.offline_score

    @property
    def best(self) -> float:
        """Highest score of an online evaluation, step 0 included."""
        return float(self.scores()[1].max())

    def log(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a column of the online log rows that have it."""
        rows = [row for row in self.train if row["phase"] == "online" and column in row]
        return np.array([row["step"] for row in rows]), np.array([row[column] for row in rows])

    def until(self, step: int) -> "Record":
        """The run as it was at an online step, if it went on beyond."""
        if self.n_steps <= step:
            return self
        kept = [
            [row for row in rows if row["phase"] != "online" or row["step"] <= step]
            for rows in (self.eval, self.train)
        ]
        settings = self.settings | {"online_iterations": step}
        settings.pop("seconds", None)  # which are of the whole run
        return replace(self, eval=kept[0], train=kept[1], settings=settings)

    def reached(self, step: int) -> bool:
        """Whether the run has an evaluation and a log row of an online step."""
        return all(any(r["phase"] == "online" and r["step"] == step for r in rows)
                   for rows in (self.eval, self.train))  # fmt: skip

    @property
    def origin(self) -> tuple:
        """Data, offline updates, batch and layers: what runs need in common to be compared."""
        data = self.settings["data"]
        data = data if data.startswith("minari:") else Path(data).name
        if data == "regenerated":
            data += f" ({int(self.settings['regenerated_size']):,} transitions)"
        return data, *(int(self.settings[k]) for k in SIZES)

    @property
    def sizes(self) -> str:
        """Data and sizes as text."""
        return described(*self.origin, self.n_steps)

    @property
    def is_full_size(self) -> bool:
        """Whether the behavior model, the energy and EDIS have the paper's sizes."""
        return all(float(self.settings.get(k, v)) == v for k, v in FULL_SIZE.items())


def described(data: str, offline: int, batch: int, hidden: int, online: int) -> str:
    """Data and sizes as text."""
    return (
        f"data {data}, {offline:,} offline updates, {online:,} online steps, "
        f"batches of {batch}, layers of {hidden}"
    )


def sizes_of(records: list[Record]) -> str:
    """Data and sizes of runs, each once, one a line."""
    return "\n".join(sorted({r.sizes for r in records}))


# --- Runs directories ---


def read_yaml(path: Path) -> dict:
    """Values of a YAML file; none where there is no file."""
    return yaml.safe_load(path.read_text()) if path.exists() else {}


def read_rows(path: Path) -> list[dict]:
    """Rows of a CSV file without their empty cells; none where there is no file."""

    def value(key: str, text: str):
        try:
            return text if key in TEXT else float(text)
        except ValueError:
            return text

    if not path.exists():
        return []
    with open(path, newline="") as f:
        return [{k: value(k, x) for k, x in row.items() if x} for row in csv.DictReader(f)]


def is_finished(directory: Path, steps: int | None = None) -> bool:
    """Whether the run in a directory has its last log row and its last evaluation.

    Args:
        directory: of the run.
        steps: online steps that it shall have; by default those of its config.yaml.
    """
    if not (config := read_yaml(directory / "config.yaml")):
        return False
    steps = config["online_iterations"] if steps is None else steps
    ends = [
        [(row["phase"], row["step"]) for row in read_rows(directory / f"{kind}.csv")][-1:]
        for kind in ("train", "eval")
    ]
    logged = ends[0] == [("online", steps)] or steps == 0
    return logged and ends[1] == [("online", steps - steps % config["eval_freq"])]


def read_run(directory: Path) -> Record:
    """The record of a finished run's directory."""
    found = read_yaml(directory / "config.yaml") | read_yaml(directory / "job.yaml")
    settings = {k: v for k, v in found.items() if v is not None}
    method, env, seed = directory.parts[-3:]
    rows = [read_rows(directory / f"{kind}.csv") for kind in ("eval", "train")]
    return Record(method, env, int(seed.removeprefix("seed_")), settings, *rows)


def run_folders(runs_dir: Path, preparing: bool = False) -> list[Path]:
    """Folders NAME/ENV/seed_N of runs that have begun: grid.py's preparing ones, or the others.

    Folders of other names, such as seed_0_old, were moved away.
    """
    found = [path.parent for path in sorted(runs_dir.glob("*/*/seed_*/config.yaml"))]
    found = [x for x in found if x.name.removeprefix("seed_").isdecimal()]
    return [x for x in found if x.parts[-3].startswith(PREPARING) == preparing]


def unfinished(runs_dir: Path) -> list[str]:
    """Runs that have begun and are not finished, as NAME/ENV/seed_N."""
    return ["/".join(x.parts[-3:]) for x in run_folders(runs_dir) if not is_finished(x)]


def read_runs(runs_dir: Path, preparing: bool = False, until: int | None = None) -> list[Record]:
    """Records of the finished runs in a runs directory, or of the preparing ones of grid.py.

    With `until` also of unfinished runs that have reached this online step; all are cut there.
    """
    found = []
    for folder in run_folders(runs_dir, preparing):
        if is_finished(folder):
            found.append(read_run(folder))
        elif until is not None and (record := read_run(folder)).reached(until):
            found.append(record)
    return found if until is None else [record.until(until) for record in found]


# --- Committed records ---


def read_records(path: Path) -> list[Record]:
    """Records of the finished runs in a runs directory, or those that write_records wrote.

    Raises:
        ValueError: there are none, or one does not say its data or sizes.
    """
    found = read_runs(path)
    if not found and not (path / "runs.csv").exists():
        raise ValueError(f"{path} has neither finished runs nor runs.csv")
    if not found:
        rows = {kind: defaultdict(list) for kind in ("eval", "train")}
        for kind, runs in rows.items():
            for row in read_rows(path / f"{kind}.csv"):
                runs[tuple(row.pop(k) for k in KEY)].append(row)
        for settings in read_rows(path / "runs.csv"):
            method, env, seed = key = tuple(settings.pop(k) for k in KEY)
            found.append(
                Record(method, env, int(seed), settings, rows["eval"][key], rows["train"][key])
            )
    for record in found:
        where = f"{record.method}/{record.env}/seed_{record.seed}"
        if not len(record.scores()[0]):
            raise ValueError(f"{path} has no evaluation of {where}: collect the records again")
        if missing := [key for key in REQUIRED if key not in record.settings]:
            raise ValueError(f"the run {where} does not say its {missing[0]}; leave it out")
    return found


def csv_text(rows: list[dict]) -> str:
    """Rows as CSV with the union of their columns; floats to six digits, which halves the files."""

    def short(x):
        if not isinstance(x, float):
            return x
        return str(int(x)) if x.is_integer() else f"{x:.6g}"  # no 1e+06 of a setting

    text = io.StringIO()
    columns = list(dict.fromkeys(k for row in rows for k in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: short(x) for k, x in row.items()})
    return text.getvalue()


def write_records(
    runs_dir: Path,
    folder: Path,
    until: int | None = None,
    add: bool = False,
    experiment: Experiment | None = None,
) -> list[Record]:
    """Write runs.csv, eval.csv and train.csv (online rows) of the finished runs in a directory.

    With `until` also of unfinished runs that have reached this online step; all are cut there.
    prepared.csv has what the preparing runs of grid.py cost. With `add` other runs that the folder
    has are kept. With `experiment` the directory may have the runs of others too. Returns all
    records of the folder.

    Raises:
        ValueError: there are no such runs, or nothing to add to.
    """
    records, prepared = read_runs(runs_dir, until=until), read_runs(runs_dir, preparing=True)
    if experiment:
        records = [r for r in records if experiment.has(r.method, r.env)]
        prepared = [
            r for r in prepared if experiment.needs(r.method.removeprefix(PREPARING), r.env)
        ]
    if not records:
        which = "finished run"
        if until is not None:
            which = f"run that has reached online step {until}, with an evaluation and a log row"
        of = f" of {experiment.title!r}" if experiment else ""
        raise ValueError(f"{runs_dir} has no {which}{of}")
    if add:
        found = {r.key: r for r in [*read_records(folder), *records]}
        records = [found[key] for key in sorted(found)]
    folder.mkdir(parents=True, exist_ok=True)

    def named(record: Record, row: dict) -> dict:
        more = {k: x for k, x in row.items() if k not in KEY}
        return dict(zip(KEY, record.key, strict=True)) | more

    for kind in ("eval", "train"):
        rows = [named(r, row) for r in records for row in getattr(r, kind)
                if kind == "eval" or row["phase"] == "online"]  # fmt: skip
        write_rows(folder / f"{kind}.csv", rows)
    # Written last, for rows of runs that runs.csv does not name are not read.
    write_rows(folder / "runs.csv", [named(r, r.settings) for r in records])
    write_costs(folder / "prepared.csv", prepared, add)
    return records


def write_rows(path: Path, rows: list[dict]):
    """Write a CSV file; where there are no rows there is none."""
    if rows:
        write(path, csv_text(rows))
    else:  # train.csv of runs that were never online
        path.unlink(missing_ok=True)


def write_costs(path: Path, prepared: list[Record], add: bool):
    """Write what preparing runs cost; with `add` the other rows of the file are kept."""
    jobs = "command", "commit", "hardware", "seconds", "peak_memory_gb", "attempts"
    costs = [
        {"prepared": r.method.removeprefix(PREPARING), "env": r.env, "seed": r.seed}
        | {k: r.settings[k] for k in jobs if k in r.settings}
        for r in prepared
    ]
    if add:
        of = "prepared", "env", "seed", "hardware"
        found = {tuple(x.get(k, "") for k in of): x for x in [*read_rows(path), *costs]}
        costs = [found[key] for key in sorted(found)]
    write_rows(path, costs)


def append(path: Path | None, rows: list[dict]):
    """Append rows to a CSV file, with a header if it is new."""
    if not path:
        return
    header, lines = csv_text(rows).split("\n", 1)
    old = path.read_text() if path.exists() else ""
    if old and old.split("\n", 1)[0] != header:
        new = path.with_suffix(f".{time.time():.0f}{path.suffix}")
        write(new, f"{header}\n{lines}")
        sys.exit(f"error: {path} has other columns; these rows are in {new}")
    write(path, old + lines if old else f"{header}\n{lines}")


def add_rows(path: Path, new: list[dict], key: tuple[str, ...], own: str):
    """Add rows to a CSV file, in place of those with the same key.

    Raises:
        SystemExit: the file lacks the column `own`: it is another program's.
    """
    old = read_rows(path)
    if old and own not in old[0]:
        sys.exit(f"error: {path} is another program's table, without {own}: name another file")
    replaced = [[row[k] for k in key] for row in new]
    kept = [row for row in old if [row[k] for k in key] not in replaced]
    write(path, csv_text(kept + new))


# --- Runs in pairs ---


def by_seed(records: list[Record]) -> dict:
    """Runs as {(method, task): {seed: run}}."""
    runs = defaultdict(dict)
    for record in records:
        runs[record.method, record.env][record.seed] = record
    return dict(runs)


def matched(runs: dict, methods: list[str], task: str, until: float = math.inf) -> list[tuple]:
    """Tuples of one run a method: seeds that all have, of one origin, cut at the same step.

    Runs that were evaluated at other steps are no pair, for their last four would be others.
    """
    groups = [runs.get((method, task), {}) for method in methods]
    found = []
    for seed in sorted(set.intersection(*map(set, groups))):
        records = [group[seed] for group in groups]
        steps = min(until, *(r.n_steps for r in records))
        records = tuple(r.until(steps) for r in records)
        evaluated = {tuple(r.scores()[0]) for r in records}
        if len({r.origin for r in records}) == len(evaluated) == 1:
            found.append(records)
    return found
