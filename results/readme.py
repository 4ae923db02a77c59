"""Write the README's tables from committed numbers: python results/readme.py [--check]

What stands between two marks in README.md is made from results/study (collect.py --records) and
results/regenerated.csv (python -m d4rl_gymnasium describe ... --csv). With --check nothing is
written, and text that differs is an error.
"""

import argparse
import csv
import os
import sys
from pathlib import Path

from cells import Table
from claims import claims
from collect import read_records
from experiments import EXPERIMENTS
from pairs import by_seed, cut, sizes_of, summary
from tables import baseline, cost, exchange, study

ROOT = Path(__file__).resolve().parents[1]
RECORDS, DATA = ROOT / "results" / "study", ROOT / "results" / "regenerated.csv"
# Mean normalized scores of the episodes in D4RL's own files: 100 (mean return - random) / (expert -
# random), with the mean returns of its files that public code on Decision Transformer lists
# (halfcheetah 4,770.3, hopper 1,422.1, walker2d 2,852.1) and D4RL's reference scores.
ORIGINALS = {"halfcheetah-medium-v2": 40.7, "hopper-medium-v2": 44.3, "walker2d-medium-v2": 62.1}
# The README's short names of columns; the order is that of the table.
METHODS = {
    "iql": "IQL",
    "pex": "PEX",
    "dare_iql": "DARE-I",
    "dare_iv": "DARE-IV",
    "dare_iql_no_guidance": "no guidance",
    "dare_iql_no_exchange": "no exchange",
    "dare_iql_direct": "direct",
    "dare_iql_separated": "separated",
    "cal_ql": "Cal-QL",
    "dare_cql": "DARE-C",
}


def scores(runs: dict) -> Table:
    """Tasks x methods: last-four means, and the score before fine-tuning."""
    rows = []
    for task in sorted({task for _, task in runs}):
        row = {"task": task}
        for offline in ("iql", "cal_ql"):
            found = [cut(r, 0) for r in runs.get((offline, task), {}).values()]
            name = f"{METHODS[offline]}, offline"
            row[name] = summary([r.offline_score for r in found], sizes_of(found))
        for method, name in METHODS.items():
            found = [cut(r) for r in runs.get((method, task), {}).values()]
            row[name] = summary([r.last_four for r in found], sizes_of(found))
        rows.append(row)
    used = [name for name in rows[0] if any(row[name] for row in rows)]
    rows = [{name: row[name] for name in used} for row in rows]
    note = "Mean ± population standard deviation of the last-four mean over (n) seeds; the columns "
    note += "from `no guidance` to `separated` are variants of DARE-I."
    return Table("scores", "Scores after fine-tuning", rows, [note])


def tested(table: Table) -> Table:
    """The rows that have an estimate."""
    rows = [row for row in table.rows if row["verdict"] != "not tested"]
    left = sum(row["verdict"] == "not tested" for row in table.rows)
    table.notes.append(f"{left} more claims are not tested: no runs.")
    return Table(table.name, table.title, rows, table.notes)


def section(records: list) -> str:
    """The section as Markdown."""
    runs = by_seed(records)
    compared = study(runs)[1]
    compared.rows = [row for row in compared.rows if baseline(row["method"]) != row["method"]]
    tables = [scores(runs), compared, tested(claims(runs)[0]), *exchange(runs), *cost(runs)]
    commits = sorted({str(r.settings.get("commit", "unknown")) for r in records})
    hardware = sorted({str(r.settings.get("hardware", "unknown")) for r in records})
    torch = sorted({str(r.settings.get("torch", "unknown")) for r in records})
    experiment = EXPERIMENTS["study"]
    planned = sum(len(part.split()) * len(tasks) for part, tasks in experiment.parts)
    head = (
        f"The study, of which {len(records)} of {planned * len(experiment.seeds)} runs are made: "
        "reduced sizes on regenerated data, which compare the methods with each other and with no "
        "published number (`python results/grid.py run study`). Commit "
        f"{', '.join(commits)}; {'; '.join(hardware)}; torch {', '.join(torch)}. "
        "Every evaluation and the command of every run is in [results/study](results/study).\n"
    )
    return "\n".join([head, *(table.markdown() for table in tables)])


def data_section(rows: list[dict]) -> str:
    """Table of the regenerated data sets, from the rows of `describe --csv`."""
    head = "task, episodes, mean score, 10% to 90%, D4RL's mean, terminals, timeouts, at bounds"
    head = [*head.split(", "), "success", "cells visited"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        success, saturated = row["success_rate"], 100 * float(row["action_saturation"])
        cells = [
            row["env"],
            f"{int(row['episodes']):,}",
            row["score mean"],
            f"{row['score 10%']} to {row['score 90%']}",
            str(ORIGINALS.get(row["env"], "")),
            f"{int(row['terminals']):,}",
            f"{int(row['timeouts']):,}",
            f"{saturated:.1f}%",
            f"{100 * float(success):.0f}%" if success else "",
            row["visited_cells"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def replaced(readme: str, name: str, text: str) -> str:
    """The README with other text between the marks of this name.

    Raises:
        ValueError: the marks are missing.
    """
    marks = f"<!-- {name}: python results/readme.py -->", f"<!-- end of {name} -->"
    begin, end = map(readme.find, marks)
    if begin < 0 or end < begin:
        raise ValueError(f"README.md needs the lines {marks[0]} and {marks[1]}")
    return readme[: begin + len(marks[0])] + "\n\n" + text + "\n" + readme[end:]


def rewritten(readme: str) -> str:
    """The README with its tables made anew.

    Raises:
        ValueError, FileNotFoundError: marks, records or the table of data sets are missing.
    """
    with open(DATA, newline="") as f:
        readme = replaced(readme, "data", data_section(list(csv.DictReader(f))))
    return replaced(readme, "results", section(read_records(RECORDS)))


def main():
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if it differs")
    args = parser.parse_args()
    path = ROOT / "README.md"
    try:
        old = path.read_text()
        new = rewritten(old)
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
    if args.check and new != old:
        sys.exit("error: the README's tables are not those of results/; "
                 "run python results/readme.py")  # fmt: skip
    if new != old and not args.check:
        path.with_suffix(".tmp").write_text(new)
        os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main()
