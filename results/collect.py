"""Collect finished runs into a table: python results/collect.py [RUNS_DIR] [--csv FILE] > table.md

One line per method, task and data: scores as mean ± standard deviation over seeds, the bootstrap
interval (95%) of the last-four mean, and the median updates per second of both phases. With --csv
every evaluation of these runs is written to a file.
"""

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import yaml

COLUMNS = """method, task, data, offline updates, online steps, seeds, offline score,
    last-four mean, 95% interval, best, offline updates/s, online steps/s"""
COLUMNS = [" ".join(name.split()) for name in COLUMNS.split(",")]


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
    for path in sorted(runs_dir.glob("*/*/seed_*/summary.yaml")):
        cfg = yaml.safe_load((path.parent / "config.yaml").read_text())
        run = yaml.safe_load(path.read_text()) | rates(path.parent / "train.csv")
        data = Path(cfg["data"]).name
        sizes = cfg["offline_iterations"], cfg["online_iterations"]
        groups[(cfg["name"], cfg["env"], data, *sizes)].append(run)
    return groups


def write_evaluations(runs_dir: Path, path: Path):
    """Write the rows of all finished runs' eval.csv, with method, task and seed before them."""
    rows = []
    for summary in sorted(runs_dir.glob("*/*/seed_*/summary.yaml")):
        name, env, seed = summary.parent.parts[-3:]
        with open(summary.parent / "eval.csv", newline="") as f:
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
    args = parser.parse_args()
    runs_dir = args.runs_dir
    groups = collect(runs_dir)
    if not groups:
        sys.exit(f"error: no finished run under {runs_dir}; a run has one when it has summary.yaml")
    if args.csv:
        write_evaluations(runs_dir, args.csv)
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
