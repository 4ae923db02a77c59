"""Write the READMEs' tables from committed numbers: python results/readme.py [--check]

What stands between two marks in README.md and in results/README.md is made from results/study
(collect.py --records) and results/regenerated.csv (python -m d4rl_gymnasium describe ... --csv).
With --check nothing is written, and text that differs is an error.
"""

import argparse
import csv
import os
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from cells import Cell, Table
from claims import claims
from collect import read_records, read_rows
from experiments import EXPERIMENTS
from pairs import by_seed, cut, sizes_of, summary
from tables import baseline, cost, exchange, study

ROOT = Path(__file__).resolve().parents[1]
RECORDS, DATA = ROOT / "results" / "study", ROOT / "results" / "regenerated.csv"
# Mean normalized scores of the episodes in D4RL's own files: 100 (mean return - random) / (expert -
# random), with the mean returns of its files that public code on Decision Transformer lists
# (halfcheetah 4,770.3, hopper 1,422.1, walker2d 2,852.1) and D4RL's reference scores.
ORIGINALS = {"halfcheetah-medium-v2": 40.7, "hopper-medium-v2": 44.3, "walker2d-medium-v2": 62.1}
# The README's names of methods, in the order of its rows.
METHODS = {
    "iql": "IQL",
    "pex": "PEX",
    "dare_iql": "DARE-I",
    "dare_iv": "DARE-IV",
    "dare_iql_no_guidance": "DARE-I, no guidance",
    "dare_iql_no_exchange": "DARE-I, no exchange",
    "dare_iql_direct": "DARE-I, direct exchange",
    "dare_iql_separated": "DARE-I, exchange where separated",
    "dare_iql_resample": "DARE-I, resampled reference",
    "dare_iql_reference4": "DARE-I, 4 references",
    "dare_iql_reference16": "DARE-I, 16 references",
    "cal_ql": "Cal-QL",
    "dare_cql": "DARE-C",
}


def scores(runs: dict) -> Table:
    """Methods x tasks: last-four means, and the score before fine-tuning."""
    tasks, rows = sorted({task for _, task in runs}), []
    counts = {len(seeds) for seeds in runs.values()}

    def row(name: str, method: str, measure) -> dict:
        cells = {"method": name}
        for task in tasks:
            found = [cut(r) for r in runs.get((method, task), {}).values()]
            cells[task] = summary([measure(r) for r in found], sizes_of(found))
            if cells[task] and len(counts) == 1:
                cells[task] = replace(cells[task], seeds=None)
        return cells

    for method, name in METHODS.items():
        if method in ("iql", "cal_ql"):
            rows.append(row(f"{name} before fine-tuning", method, lambda r: r.offline_score))
        rows.append(row(name, method, lambda r: r.last_four))
    rows = [row for row in rows if any(row[task] for task in tasks)]
    over = f"{counts.pop()} seeds" if len(counts) == 1 else "(n) seeds"
    note = f"Mean ± population standard deviation over {over} of the last four evaluations' mean."
    return Table("scores", "Scores after fine-tuning", rows, [note])


def tested(table: Table) -> Table:
    """The rows that have an estimate."""
    rows = [row for row in table.rows if row["verdict"] != "not tested"]
    left = sum(row["verdict"] == "not tested" for row in table.rows)
    table.notes.append(f"{left} more claims are not tested: no runs.")
    return Table(table.name, table.title, rows, table.notes)


def summary_section(records: list) -> str:
    """What the README says of the study, as Markdown."""
    runs = by_seed(records)
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
    return "\n".join([head, scores(runs).markdown(), tested(claims(runs)[0]).markdown()])


def preparing(rows: list[dict]) -> Table:
    """What the study's shared parts cost, from prepared.csv."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["prepared"]][row["env"]].append(row["seconds"])
    tasks = sorted({row["env"] for row in rows})
    cells = {
        name: {task: Cell(float(np.median(found[task])), seeds=len(found[task]), digits=0)
               if task in found else None for task in tasks}
        for name, found in groups.items()
    }  # fmt: skip
    note = (
        "Processor seconds, medians over (n) runs: offline agents of IQL and Cal-QL (one a seed), "
        "and behavior models with their support actions (one a data set; `dare`: of DARE-I and its "
        "variants, `dare_resample`: support actions of all states)."
    )
    rows = [{"prepared": name} | row for name, row in cells.items()]
    return Table("prepared", "Cost of what the runs share", rows, [note])


def study_section(records: list) -> str:
    """What results/README.md says of the study beside that, as Markdown."""
    runs = by_seed(records)
    by_task, compared = study(runs)
    by_task.rows = [row for row in by_task.rows if row["minus baseline"] or row["minus DARE"]]
    for row in by_task.rows:
        del row["offline score"], row["last-four mean"], row["best"]
    compared.rows = [row for row in compared.rows if baseline(row["method"]) != row["method"]]
    tables = [compared, by_task, *exchange(runs), *cost(runs)]
    tables.append(preparing(read_rows(RECORDS / "prepared.csv")))
    return "\n".join(table.markdown() for table in tables)


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
    """A README with other text between the marks of this name.

    Raises:
        ValueError: the marks are missing.
    """
    marks = f"<!-- {name}: python results/readme.py -->", f"<!-- end of {name} -->"
    begin, end = map(readme.find, marks)
    if begin < 0 or end < begin:
        raise ValueError(f"it needs the lines {marks[0]} and {marks[1]}")
    return readme[: begin + len(marks[0])] + "\n\n" + text + "\n" + readme[end:]


def data_rows() -> list[dict]:
    """Rows of regenerated.csv."""
    with open(DATA, newline="") as f:
        return list(csv.DictReader(f))


# What stands between the marks of each file.
SECTIONS = {
    "README.md": {
        "data": lambda: data_section(data_rows()),
        "results": lambda: summary_section(read_records(RECORDS)),
    },
    "results/README.md": {"study": lambda: study_section(read_records(RECORDS))},
}


def rewritten(name: str, text: str) -> str:
    """The text of a README with its tables made anew.

    Raises:
        ValueError, FileNotFoundError: marks, records or the table of data sets are missing.
    """
    for section, make in SECTIONS[name].items():
        text = replaced(text, section, make())
    return text


def main():
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if they differ")
    args = parser.parse_args()
    for name in SECTIONS:
        path = ROOT / name
        try:
            old = path.read_text()
            new = rewritten(name, old)
        except (ValueError, FileNotFoundError) as e:
            sys.exit(f"error: {name}: {e}")
        if args.check and new != old:
            sys.exit(f"error: the tables of {name} are not those of the files; "
                     "run python results/readme.py")  # fmt: skip
        if new != old:
            path.with_suffix(".tmp").write_text(new)
            os.replace(path.with_suffix(".tmp"), path)


if __name__ == "__main__":
    main()
