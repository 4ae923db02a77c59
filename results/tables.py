"""The paper's tables from runs: python results/tables.py PATH [--table 1,2,study] > tables.md

PATH is a runs directory or a folder of committed records. `--table` takes numbers of the paper
(1, 2, 3, 8, 9, 10, 11), `study` (all methods and tasks that there are, paired with the baseline
and with DARE), `cost`, `exchange` and `claims` (what the paper says, against the records). The
paper's numbers are printed beside (--paper) only where sizes and data are the paper's, too.

A cell is mean ± population standard deviation (runs); pairs.py says how intervals are made.
"""

import argparse
import csv
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cells import PAPER_SIZES, Cell, Table
from claims import claims
from collect import read_records, write_table
from pairs import (
    ANTMAZE,
    LOCOMOTION,
    TASKS,
    UTD_TASKS,
    best,
    bootstrap,
    by_seed,
    cut,
    iqm,
    last_four,
    log,
    matched,
    mean_of_tasks,
    reduced,
    sizes_of,
    summary,
    t_interval,
)

# --- Tables of the paper ---


@dataclass(frozen=True)
class Layout:
    """A table of the paper: blocks of rows, in each {heading: method}.

    Scores are those at online step `until`; `groups` of columns have their own highest mean;
    with `sums` the rows are sums over the three robots.
    """

    title: str
    tasks: dict[str, str]
    blocks: dict[str, dict[str, str]]
    until: int = 200_000
    groups: int = 1
    sums: bool = False

    def lines(self) -> dict[str, list[str]]:
        """Rows of a block, totals too: label and the tasks that are added up."""
        if self.sums:
            ends = ("M", "MR", "ME")
            rows = {k: [t for t in self.tasks if self.tasks[t].endswith(f"-{k}")] for k in ends}
        else:
            rows = {}
            for name, family in (("L", LOCOMOTION), ("AM", ANTMAZE)):
                tasks = [t for t in self.tasks if t in family]
                rows |= {self.tasks[t]: [t] for t in tasks}
                rows |= {f"total ({name})": tasks} if self.tasks is TASKS else {}
        return rows | {"total": list(self.tasks)}

    def methods(self) -> dict[str, str]:
        """Headings of all methods, those of a block with its name before."""
        return {
            method: f"{block} {heading}".strip()
            for block, columns in self.blocks.items()
            for heading, method in columns.items()
        }


CQL_GROUP = {"Base (CQL)": "cql", "Cal-QL": "cal_ql", "EDIS-C": "edis_cql", "DARE-C": "dare_cql"}
IQL_GROUP = {"Base (IQL)": "iql", "PEX": "pex", "EDIS-I": "edis_iql", "DARE-I": "dare_iql"}
OFFLINE = {"CQL": "cql", "Cal-QL": "cal_ql", "IQL": "iql"}
UTD10 = {"EDIS-I": "edis_iql_utd10", "PEX": "pex_utd10", "DARE-I": "dare_iql_utd10"}
UTD = {f"UTD=1 {k}": IQL_GROUP[k] for k in ("PEX", "EDIS-I", "DARE-I")}
UTD |= {f"UTD=10 {k}": UTD10[k] for k in ("PEX", "EDIS-I", "DARE-I")}
CAPS = {"n = 16": "dare_cql_n16", "n = 32": "dare_cql", "n = inf": "dare_cql_uncapped"}
TWO_CAPS = {
    "DARE-C": {"n = 32": "dare_cql", "n = inf": "dare_cql_uncapped"},
    "DARE-I": {"n = 32": "dare_iql_n32", "n = inf": "dare_iql"},
}
IV = {"DARE-IV, n = inf": "dare_iv", "DARE-I, n = 0": "dare_iql_no_exchange"}
IV |= {"DARE-I, n = inf": "dare_iql"}
LAYOUTS = {
    "1": Layout("online fine-tuning", TASKS, {"": CQL_GROUP | IQL_GROUP}, groups=2),
    "2": Layout("maximum exchange n", LOCOMOTION, TWO_CAPS, sums=True),
    "3": Layout("ten updates a step (UTD = 10)", UTD_TASKS, {"": UTD10}, until=100_000),
    "8": Layout("offline training, before fine-tuning", TASKS, {"": OFFLINE}, until=0),
    "9": Layout("maximum exchange n of DARE-C", LOCOMOTION, {"DARE-C": CAPS}, sums=True),
    "10": Layout("one and ten updates a step", UTD_TASKS, {"": UTD}, until=100_000, groups=2),
    "11": Layout("online losses of DARE-I", LOCOMOTION, {"": IV}),
}


def entry(runs: dict, method: str, tasks: list[str], until: int, measure) -> Cell | None:
    """Cell of a task, or of the sum over tasks; None if one has no runs."""
    cells = []
    for task in tasks:
        found = [cut(record, until) for record in runs.get((method, task), {}).values()]
        cells.append(summary([measure(record) for record in found], sizes_of(found)))
    if None in cells:
        return None
    sizes = " and ".join(sorted({part for c in cells for part in c.sizes.split(" and ")}))
    total = Cell(sum(c.mean for c in cells), None, min(c.seeds for c in cells), sizes=sizes)
    return cells[0] if len(cells) == 1 else total


def highlighted(row: dict, groups: int) -> dict:
    """The row with the highest mean of each group in bold, where two or more are comparable."""
    out = dict(row)
    for names in np.array_split(list(row), groups):
        cells = {k: row[k] for k in map(str, names) if row[k]}
        if len(cells) > 1 and len({c.sizes for c in cells.values()}) == 1:
            top = max(c.mean for c in cells.values())
            out |= {k: replace(c, bold=True) for k, c in cells.items() if c.mean == top}
    return out


def paper_numbers() -> dict:
    """Cells of the paper by (table, method, row)."""
    with open(Path(__file__).with_name("paper.csv"), newline="") as f:
        return {
            (row["table"], row["method"], row["task"]): Cell(
                float(row["mean"]), float(row["std"]) if row["std"] else None
            )
            for row in csv.DictReader(f)
        }


def with_paper(row: dict, published: dict) -> dict:
    """The row with the paper's number and the difference from it after each column."""
    out = {}
    for heading, cell in row.items():
        paper = published[heading]
        difference = Cell(cell.mean - paper.mean, signed=True) if cell else None
        out |= {heading: cell, f"{heading}, paper": paper}
        out[f"{heading}, less paper"] = difference
    return out


def layout_rows(runs: dict, key: str, measure=last_four, numbers: dict | None = None) -> list[dict]:
    """Rows of a table of the paper; with `numbers` the paper's are beside."""
    layout, rows = LAYOUTS[key], []
    for block, columns in layout.blocks.items():
        for label, tasks in layout.lines().items():
            row = {h: entry(runs, m, tasks, layout.until, measure) for h, m in columns.items()}
            row = highlighted(row, layout.groups)
            if numbers:
                row = with_paper(row, {h: numbers[key, m, label] for h, m in columns.items()})
            rows.append(({"method": block} if block else {}) | {"dataset": label} | row)
    return rows


def aggregate_rows(runs: dict, key: str) -> list[dict]:
    """One row a method: tasks, runs, and the interquartile mean over all of them.

    The tasks are those in which all methods have runs, methods without any aside.
    """
    layout, rows = LAYOUTS[key], []
    there = {m for m in layout.methods() if any((m, task) in runs for task in layout.tasks)}
    common = [task for task in layout.tasks if all((m, task) in runs for m in there)]
    for method, heading in layout.methods().items():
        groups = [[cut(r, layout.until) for r in runs.get((method, task), {}).values()]
                  for task in common]  # fmt: skip
        strata = [np.array([r.last_four for r in group]) for group in groups if group]
        row = {"method": heading, "tasks": len(strata), "runs": sum(map(len, strata)), "IQM": None}
        if strata:
            sizes = sizes_of([r for group in groups for r in group])
            interval = bootstrap(strata, iqm)
            row["IQM"] = Cell(float(iqm(strata)), interval=interval, sizes=sizes)
        rows.append(row)
    return rows


def comparable(runs: dict, layout: Layout) -> bool:
    """Whether all runs of a table have the paper's sizes, on D4RL's data."""
    records = [r for (method, task), seeds in runs.items() for r in seeds.values()
               if method in layout.methods() and task in layout.tasks]  # fmt: skip
    sizes = {sizes_of([cut(r, layout.until)]) for r in records}
    return sizes <= {PAPER_SIZES[layout.until]} and not any(map(reduced, records))


def paper_tables(runs: dict, key: str, paper: bool = False, anyway: bool = False) -> list[Table]:
    """A table of the paper, its best evaluations and its aggregates.

    Raises:
        ValueError: the paper's numbers are asked for beside other sizes or data, not `anyway`.
    """
    layout, name = LAYOUTS[key], f"table{key}"
    rows, warning = layout_rows(runs, key), ""
    if paper and not comparable(runs, layout):
        if not anyway:
            raise ValueError(
                f"the runs of Table {key} are not {PAPER_SIZES[layout.until]}, behavior models "
                "and EDIS in full; so the paper's numbers do not belong beside them; leave "
                "--paper out, or add --other_sizes"
            )
        warning = "the paper's numbers are of other sizes or data than these runs."
    if paper:
        rows = layout_rows(runs, key, numbers=paper_numbers())
    what = "last-four mean" if layout.until else "offline score"
    sums = (
        "Sums and totals: of the means, where all tasks have runs; in brackets the fewest runs. "
        "Bold: the highest mean of a row in its group, where all have the same data and sizes."
    )
    note = f"Mean ± population standard deviation of the {what} over (n) runs. {sums}"
    iqm_note = "IQM: mean of the middle half of the runs of the tasks that all these methods have; "
    iqm_note += "95% bootstrap interval, too narrow if there are few runs."
    title = f"Table {key}: {layout.title}"
    return [
        Table(name, f"{title}, {what}", rows, [note], warning, layout.until),
        Table(f"{name}_best", f"{title}, best evaluation", layout_rows(runs, key, best), [sums],
              until=layout.until),
        Table(f"{name}_iqm", f"{title}, aggregates", aggregate_rows(runs, key), [iqm_note],
              until=layout.until),
    ]  # fmt: skip


# --- The study ---


def baseline(method: str) -> str | None:
    """Baseline of the method's group."""
    if method == "cal_ql" or "cql" in method:
        return "cal_ql"
    return "iql" if "iql" in method or method.startswith(("pex", "dare_iv")) else None


def parent(method: str) -> str | None:
    """DARE, for its variants."""
    whole = {"cal_ql": "dare_cql", "iql": "dare_iql"}.get(baseline(method))
    return whole if method.startswith("dare_") and method != whole else None


def differences(runs: dict, method: str, other: str | None, task: str, until: int = 200_000):
    """Last-four means of a method less another's by seed, and the data and sizes of the pairs."""
    pairs = matched(runs, [method, other], task, until) if other not in (None, method) else []
    records = [record for pair in pairs for record in pair]
    return np.array([a.last_four - b.last_four for a, b in pairs]), sizes_of(records)


def study(runs: dict) -> list[Table]:
    """All methods and tasks that there are, with differences, and these over all tasks."""
    rows, against = [], {"minus baseline": baseline, "minus DARE": parent}
    for method, task in sorted(runs, key=lambda k: (k[1], baseline(k[0]) or "", k[0])):
        found = [cut(record) for record in runs[method, task].values()]
        sizes = sizes_of(found)
        row = {"task": task, "method": method}
        row["offline score"] = summary([r.offline_score for r in found], sizes)
        row["last-four mean"] = summary([r.last_four for r in found], sizes, interval=True)
        row["best"] = summary([r.best for r in found], sizes)
        for heading, other in against.items():
            values, sizes = differences(runs, method, other(method), task)
            row[heading] = summary(values, sizes, signed=True, interval=True)
        rows.append(row)
    totals = []
    for method in sorted({method for method, _ in runs}, key=lambda m: (baseline(m) or "", m)):
        row = {"method": method}
        for heading, other in against.items():
            tasks = [task for name, task in runs if name == method]
            pairs = [differences(runs, method, other(method), task) for task in tasks]
            row[f"tasks ({heading})"] = sum(len(values) > 0 for values, _ in pairs) or None
            row[heading] = aggregate(pairs)
        totals.append(row)
    note = (
        "Mean ± population standard deviation (runs); 95% t interval over the seeds. Baseline: "
        "cal_ql or iql; differences are of last-four means, by seed, of runs with the same data "
        "and offline updates, at the smaller number of online steps."
    )
    return [
        Table("study", "Study, by task", rows, [note]),
        Table("study_differences", "Study, differences over all tasks", totals,
              ["Mean over the tasks (pairs of runs) of the differences of last-four means; 95% t "
               "interval, stratified by task. Tasks and their sizes differ between rows."]),
    ]  # fmt: skip


def aggregate(pairs: list[tuple]) -> Cell | None:
    """Mean over tasks of the differences of (differences, sizes), with its interval."""
    strata = [values for values, _ in pairs if len(values)]
    if not strata:
        return None
    sizes = " and ".join(sorted({p for _, s in pairs for p in s.split(" and ") if p}))
    mean, count = float(mean_of_tasks(strata)), sum(map(len, strata))
    return Cell(mean, None, count, t_interval(strata), sizes, signed=True)


def cost(runs: dict) -> list[Table]:
    """Time and memory of each method."""
    rows = []
    for method in sorted({method for method, _ in runs}):
        found = [r for (name, _), seeds in runs.items() if name == method for r in seeds.values()]
        ms = [1000 / row["steps_per_second"] for r in found for row in r.train
              if row["phase"] == "online" and "q_loss" in row]  # fmt: skip
        columns = {k: [r.settings[k] for r in found if k in r.settings]
                   for k in ("seconds", "peak_memory_gb", "hardware")}  # fmt: skip
        sizes, time, memory = sizes_of(found), columns["seconds"], columns["peak_memory_gb"]
        rows.append({
            "method": method,
            "tasks": len({task for name, task in runs if name == method}),
            "runs": len(found),
            "ms per online step": Cell(float(np.median(ms)), sizes=sizes) if ms else None,
            "processor seconds": Cell(float(np.median(time)), digits=0) if time else None,
            "peak memory, GB": Cell(max(memory), digits=2) if memory else None,
            "hardware": "; ".join(sorted(set(columns["hardware"]))) or None,
        })  # fmt: skip
    notes = ["Medians over the online log rows with updates and over the runs; the highest peak. "
             "Runs of a grid leave offline agent, behavior model and support actions to others: "
             "these are costs of fine-tuning and its evaluations. Compare methods of as many "
             "tasks."]  # fmt: skip
    return [Table("cost", "Cost of fine-tuning", rows, notes)]


def exchange(runs: dict) -> list[Table]:
    """What DARE's exchange did, by task and method."""
    rows, columns = [], {"M": "exchanged", "tau": "tau"}
    columns |= {k: k for k in ("mu_offline", "mu_online")}
    for method, task in sorted(runs, key=lambda k: (k[1], k[0])):
        found = [r for r in runs[method, task].values() if len(log(r, "mu_offline"))]
        if found:
            sizes = sizes_of(found)
            share = [np.mean(log(r, "mu_offline") > log(r, "mu_online")) for r in found]
            row = {"task": task, "method": method}
            row["mu_offline > mu_online, share"] = summary(share, sizes, digits=2)
            for name, column in columns.items():
                means = [log(r, column).mean() for r in found]
                row[name] = summary(means, sizes, digits=1 if name == "M" else 3)
            rows.append(row)
    notes = ["Of the online log rows (means over log_freq steps) of each run: mean ± population "
             "standard deviation over (n) runs. M: exchanged pairs of an update, of as many as "
             "half a batch."]  # fmt: skip
    return [Table("exchange", "Exchange", rows, notes)]


# --- Command line ---

OTHERS = {"study": study, "cost": cost, "exchange": exchange, "claims": claims}
SUFFIXES = {"markdown": ".md", "csv": ".csv", "latex": ".tex"}


def emit(table: Table, kind: str, folder: Path | None):
    """Print a table, or write it to a file of its name, whole or not at all."""
    if kind == "csv":
        write_table(table.csv_rows(), folder / f"{table.name}.csv")
        return
    text = table.markdown() if kind == "markdown" else table.latex()
    if folder is None:
        print(text)
        return
    path = folder / f"{table.name}{SUFFIXES[kind]}"
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def build(args) -> list[Table]:
    """Tables that the command line asks for.

    Raises:
        ValueError: they cannot be made so.
        FileNotFoundError: there are no runs.
    """
    names = args.table.split(",")
    if unknown := [name for name in names if name not in LAYOUTS | OTHERS]:
        raise ValueError(f"no table {unknown[0]}; there are {', '.join(LAYOUTS | OTHERS)}")
    if args.paper and (mine := [name for name in names if name in OTHERS]):
        raise ValueError(f"--paper has no numbers for {mine[0]}; name tables of the paper")
    if args.format == "csv" and not args.output:
        raise ValueError("--format csv writes one file a table; name a folder with --output")
    runs = by_seed(read_records(args.path))
    tables = []
    for name in names:
        if name in OTHERS:
            tables += OTHERS[name](runs)
        else:
            tables += paper_tables(runs, name, args.paper, args.other_sizes)
    return tables


def main():
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="runs directory, or folder of records")
    parser.add_argument("--table", default=",".join(LAYOUTS), help="names, with commas between")
    parser.add_argument("--format", choices=list(SUFFIXES), default="markdown")
    parser.add_argument("--output", type=Path, help="folder for one file a table")
    parser.add_argument("--paper", action="store_true", help="the paper's numbers beside")
    parser.add_argument("--other_sizes", action="store_true", help="--paper beside other sizes too")
    args = parser.parse_args()
    try:
        tables = build(args)
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
    for table in tables:
        emit(table, args.format, args.output)


if __name__ == "__main__":
    main()
