"""Collect finished runs into a table: python results/collect.py [RUNS_DIR] > table.md

One line per method, task and data: scores as mean ± standard deviation over seeds, the bootstrap
interval (95%) of the last-four mean, and the median updates per second of both phases.
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import yaml


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


def main():
    """Print the table."""
    runs_dir = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    groups = collect(runs_dir)
    if not groups:
        sys.exit(f"error: no finished run under {runs_dir}; a run has one when it has summary.yaml")
    print("| method | task | data | offline updates | online steps | seeds | offline score "
          "| last-four mean | 95% interval | best | offline updates/s | online steps/s |")
    print("|" + "---|" * 12)
    for (name, env, data, offline, online), runs in sorted(groups.items(), key=lambda g: g[0][1:]):
        scores = {k: np.array([r[k] for r in runs])
                  for k in ("offline_score", "last_four_mean", "best")}
        cells = [f"{v.mean():.1f} ± {v.std():.1f}" for v in scores.values()]
        cells.insert(2, "{:.1f} to {:.1f}".format(*interval(scores["last_four_mean"])))
        speeds = [[r[p] for r in runs if p in r] for p in ("offline", "online")]
        cells += [f"{np.median(v):.0f}" if v else "cached" for v in speeds]
        sizes = [f"{offline:,}", f"{online:,}", str(len(runs))]
        print("| " + " | ".join([name, env, data, *sizes, *cells]) + " |")


if __name__ == "__main__":
    main()
