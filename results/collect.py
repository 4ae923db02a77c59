"""Collect finished runs into a table: python results/collect.py [RUNS_DIR] [--csv FILE] > table.md

One line per method, task and data: scores as mean ± standard deviation over seeds, the bootstrap
interval (95%) of the last-four mean, and the median updates per second of both phases. With --csv
every evaluation of these runs is written to a file; with --records all that tables.py and
figures.py need of them, as text that can be committed.
"""

import argparse
import csv
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

COLUMNS = """method, task, data, offline updates, online steps, seeds, offline score,
    last-four mean, 95% interval, best, offline updates/s, online steps/s"""
COLUMNS = [" ".join(name.split()) for name in COLUMNS.split(",")]
# Settings that are text whatever they look like: a commit can be 4829103 or 12e4567.
TEXT = "method", "env", "name", "commit", "command", "hardware", "torch", "numpy"
# Before the columns of the scripts' eval.csv and train.csv.
RUN = ["method", "env", "seed"]


@dataclass
class Record:
    """A finished run. Rows are dictionaries; numbers are floats and empty cells are left out.

    `settings` are the run's config.yaml and summary.yaml and, of a run of grid.py, its job.yaml
    (command, commit, hardware, seconds).
    """

    method: str
    env: str
    seed: int
    settings: dict
    eval: list[dict]
    train: list[dict]

    def scores(self, phase: str = "online") -> tuple[np.ndarray, np.ndarray]:
        """Steps and normalized scores of the evaluations of a phase."""
        rows = [row for row in self.eval if row["phase"] == phase]
        columns = [[row[k] for row in rows] for k in ("step", "normalized_score")]
        return tuple(np.array(column, float) for column in columns)

    @property
    def offline_score(self) -> float:
        """Score at online step 0: of the agent that fine-tuning starts from."""
        return float(self.scores()[1][0])

    @property
    def last_four(self) -> float:
        """Mean score of the last four online evaluations, as in Table 1."""
        scores = self.scores()[1]
        return float(np.mean(scores[1:][-4:] if len(scores) > 1 else scores))

    @property
    def best(self) -> float:
        """Highest score of an online evaluation."""
        return float(self.scores()[1].max())


def number(text: str):
    """A cell as a number where it is one."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def read_rows(path: Path) -> list[dict]:
    """Rows of a CSV file without their empty cells."""
    with open(path, newline="") as f:
        return [{k: v if k in TEXT else number(v) for k, v in row.items() if v}
                for row in csv.DictReader(f)]  # fmt: skip


def read_run(directory: Path) -> Record:
    """The record of a finished run's directory."""
    settings = {}
    for name in ("config", "summary", "job"):
        if (path := directory / f"{name}.yaml").exists():
            known = yaml.safe_load(path.read_text())
            settings |= {k: v for k, v in known.items() if v is not None}
    name, env, seed = directory.parts[-3:]
    rows = (read_rows(directory / f"{kind}.csv") for kind in ("eval", "train"))
    return Record(name, env, int(seed.removeprefix("seed_")), settings, *rows)


def finished_runs(runs_dir: Path) -> list[Path]:
    """Directories of the finished runs, without those of grid.py that only fill the cache."""
    found = sorted(runs_dir.glob("*/*/seed_*/summary.yaml"))
    return [path.parent for path in found if not path.parts[-4].startswith("prepare_")]


def read_records(path: Path) -> list[Record]:
    """Records of the finished runs in a runs directory, or of those that write_records wrote.

    Raises:
        FileNotFoundError: there are none.
    """
    path = Path(path)
    found = [read_run(directory) for directory in finished_runs(path)]
    if found:
        return found
    if not (path / "runs.csv").exists():
        raise FileNotFoundError(f"{path} has neither finished runs nor runs.csv")
    rows = {kind: defaultdict(list) for kind in ("eval", "train")}
    for kind, runs in rows.items():
        for row in read_rows(path / f"{kind}.csv"):
            runs[tuple(row.pop(k) for k in RUN)].append(row)
    for settings in read_rows(path / "runs.csv"):
        run = tuple(settings[k] for k in RUN)
        method, env, seed = run
        del settings["method"]
        found.append(
            Record(method, env, int(seed), settings, rows["eval"][run], rows["train"][run])
        )
    return found


def write_table(rows: list[dict], path: Path):
    """Write rows with the union of their columns, whole or not at all."""
    partial = path.with_suffix(".tmp")
    with open(partial, "w", newline="") as f:
        columns = list(dict.fromkeys(k for row in rows for k in row))
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(partial, path)


def short(value):
    """Floats of a log to six digits, which halve the files."""
    return f"{value:.6g}" if isinstance(value, float) else value


def write_records(records: list[Record], folder: Path):
    """Write runs.csv, eval.csv and train.csv (the online rows), from which read_records reads."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [dict(zip(RUN, (r.method, r.env, r.seed), strict=True)) for r in records]
    settings = [run | r.settings for run, r in zip(runs, records, strict=True)]
    write_table(settings, folder / "runs.csv")
    for kind in ("eval", "train"):
        rows = [
            run | {k: short(v) for k, v in row.items()}
            for run, record in zip(runs, records, strict=True)
            for row in getattr(record, kind)
            if kind == "eval" or row["phase"] == "online"
        ]
        write_table(rows, folder / f"{kind}.csv")


def prepared(runs_dir: Path) -> list[dict]:
    """Cost of the finished runs of grid.py that only fill the cache."""
    rows = []
    for path in sorted(runs_dir.glob("prepare_*/*/seed_*/summary.yaml")):
        name, env, seed = path.parent.parts[-3:]
        job = yaml.safe_load((path.parent / "job.yaml").read_text())
        run = {"prepared": name.removeprefix("prepare_"), "env": env}
        rows.append(run | {"seed": seed.removeprefix("seed_")} | job)
    return rows


def rates(path: Path) -> dict:
    """Median updates per second of each phase of a train.csv (rows without updates left out)."""
    found = defaultdict(list)
    with open(path, newline="") as f:
        for row in csv.DictReader(f):
            if row["q_loss"]:
                found[row["phase"]].append(float(row["steps_per_second"]))
    return {phase: float(np.median(values)) for phase, values in found.items()}


def interval(values: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """Percentile bootstrap over seeds, 95%."""
    index = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return tuple(np.percentile(values[index].mean(1), [2.5, 97.5]))


def collect(runs_dir: Path) -> dict:
    """Finished runs by (method, task, data, offline updates, online steps)."""
    groups = defaultdict(list)
    for path in finished_runs(runs_dir):
        cfg = yaml.safe_load((path / "config.yaml").read_text())
        run = yaml.safe_load((path / "summary.yaml").read_text()) | rates(path / "train.csv")
        data = Path(cfg["data"]).name
        sizes = cfg["offline_iterations"], cfg["online_iterations"]
        groups[(cfg["name"], cfg["env"], data, *sizes)].append(run)
    return groups


def write_evaluations(runs_dir: Path, path: Path):
    """Write the rows of all finished runs' eval.csv, with method, task and seed before them."""
    rows = []
    for directory in finished_runs(runs_dir):
        name, env, seed = directory.parts[-3:]
        with open(directory / "eval.csv", newline="") as f:
            run = {"method": name, "env": env, "seed": seed.removeprefix("seed_")}
            rows += [run | row for row in csv.DictReader(f)]
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs_dir", nargs="?", type=Path, default=Path("runs"))
    parser.add_argument("--csv", type=Path, help="file for every evaluation")
    parser.add_argument("--records", type=Path, help="folder for all that is needed of the runs")
    args = parser.parse_args()
    runs_dir = args.runs_dir
    groups = collect(runs_dir)
    if not groups:
        sys.exit(f"error: no finished run under {runs_dir}; a run has one when it has summary.yaml")
    if args.csv:
        write_evaluations(runs_dir, args.csv)
    if args.records:
        write_records(read_records(runs_dir), args.records)
        if rows := prepared(runs_dir):
            write_table(rows, args.records / "prepared.csv")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for (name, env, data, offline, online), runs in sorted(groups.items(), key=lambda g: g[0][1:]):
        names = ("offline_score", "last_four_mean", "best")
        scores = {k: np.array([r[k] for r in runs]) for k in names}
        cells = [f"{v.mean():.1f} ± {v.std():.1f}" for v in scores.values()]
        cells.insert(2, "{:.1f} to {:.1f}".format(*interval(scores["last_four_mean"])))
        speeds = [[r[p] for r in runs if p in r] for p in ("offline", "online")]
        cells += [f"{np.median(v):.0f}" if v else "cached" for v in speeds]
        sizes = [f"{offline:,}", f"{online:,}", str(len(runs))]
        print("| " + " | ".join([name, env, data, *sizes, *cells]) + " |")


if __name__ == "__main__":
    main()
