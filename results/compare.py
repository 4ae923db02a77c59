"""Compare two methods seed by seed: python results/compare.py RUNS_DIR A B [--csv FILE]

A and B are names of runs (`--name`). For each task and quantity one line gives the means and
standard deviations over the seeds that both have, and the mean difference B - A with its 95%
bootstrap interval over these pairs. With --csv the single seeds are written to a file.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import yaml
from collect import interval

QUANTITIES = {
    "offline score": "normalized score of the last offline evaluation",
    "mean offline score": "mean over the offline evaluations but the first",
    "offline mean Q": "q in the last offline row of train.csv",
    "last-four mean": "mean score of the last four online evaluations",
    "offline updates/s": "median over train.csv",
}


def rows_of(path: Path, phase: str) -> list[dict]:
    """Rows of a CSV file of one phase."""
    with open(path, newline="") as f:
        return [row for row in csv.DictReader(f) if row["phase"] == phase]


def quantities(run: Path) -> dict:
    """Quantities of one finished run; what it has not is left out."""
    evaluations, trained = (
        rows_of(run / "eval.csv", "offline"),
        rows_of(run / "train.csv", "offline"),
    )
    scores = [float(row["normalized_score"]) for row in evaluations]
    found = {"offline score": scores[-1]} if scores else {}
    found |= {"mean offline score": np.mean(scores[1:])} if scores[1:] else {}
    if trained:
        rates = [float(row["steps_per_second"]) for row in trained]
        found |= {"offline mean Q": float(trained[-1]["q"]), "offline updates/s": np.median(rates)}
    if rows_of(run / "eval.csv", "online")[1:]:
        summary = yaml.safe_load((run / "summary.yaml").read_text())
        found["last-four mean"] = summary["last_four_mean"]
    return found


def compare(runs_dir: Path, a: str, b: str) -> list[dict]:
    """Rows (task, quantity, seed, A, B) of the seeds that both methods have finished."""
    found = []
    for summary in sorted(runs_dir.glob(f"{a}/*/seed_*/summary.yaml")):
        task, seed = summary.parent.parts[-2:]
        other = runs_dir / b / task / seed
        if (other / "summary.yaml").exists():
            first, second = quantities(summary.parent), quantities(other)
            found += [
                {"task": task, "quantity": k, "seed": seed.removeprefix("seed_"),
                 a: float(first[k]), b: float(second[k])}
                for k in QUANTITIES if k in first and k in second
            ]  # fmt: skip
    return found


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("a")
    parser.add_argument("b")
    parser.add_argument("--csv", type=Path, help="file for the single seeds")
    args = parser.parse_args()
    rows = compare(args.runs_dir, args.a, args.b)
    if not rows:
        sys.exit(f"error: no seed in {args.runs_dir} is finished by both {args.a} and {args.b}")
    print(f"| task | quantity | seeds | {args.a} | {args.b} | difference | 95% interval |")
    print("|---|---|---|---|---|---|---|")
    for task, quantity in dict.fromkeys((row["task"], row["quantity"]) for row in rows):
        pairs = [r for r in rows if (r["task"], r["quantity"]) == (task, quantity)]
        first, second = (np.array([row[name] for row in pairs]) for name in (args.a, args.b))
        low, high = interval(second - first)
        print(f"| {task} | {quantity} | {len(pairs)} | {first.mean():.1f} ± {first.std():.1f} "
              f"| {second.mean():.1f} ± {second.std():.1f} | {(second - first).mean():+.1f} "
              f"| {low:+.1f} to {high:+.1f} |")  # fmt: skip
    if args.csv:
        with open(args.csv, "w", newline="") as f:
            writer = csv.DictWriter(f, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
