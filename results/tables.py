"""Tables from runs: python results/tables.py show PATH [--table table1,comparison] > tables.md

    python results/tables.py show PATH          tables of a runs directory or of committed records
    python results/tables.py collect RUNS FOLDER  write the records of finished runs, to commit
    python results/tables.py pages [--check]    write the generated pages of this repository

`--table` takes table1, table2, table3, table8 to table11 of the paper; `scores`, `comparison` (all
methods and tasks that there are, paired with the baseline and with DARE), `questions` (what DARE's
parts do, by each measure), `paper` (the paper's differences beside ours), `pairs` (every two
methods), `exchange`, `cost` and `claims` (what the paper says, against the runs). A cell is mean ±
population standard deviation (runs); lib/statistics.py says how intervals are made.
"""

import argparse
import csv
import functools
import itertools
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from d4rl_gymnasium.files import write
from lib.claims import claims
from lib.experiments import (
    ANTMAZE,
    EXPERIMENTS,
    LOCOMOTION,
    METHODS,
    PAPER_TABLES,
    ROOT,
    TASKS,
    Experiment,
    kind_of,
    method_of,
    words,
)
from lib.records import (
    by_seed,
    matched,
    read_records,
    read_rows,
    sizes_of,
    unfinished,
    write_records,
)
from lib.statistics import bootstrap, iqm, mean_of_tasks, t_interval
from lib.table import PAPER_SIZES, Cell, Table, in_short, summary

RECORDS = ROOT / "results"

# --- Tables of the paper ---


def lines_of(table: Experiment) -> dict[str, list[str]]:
    """Rows of a table, totals too: label and the tasks that are added up."""
    if table.sums:
        ends = "M", "MR", "ME"
        rows = {end: [t for t in table.tasks if TASKS[t].endswith(f"-{end}")] for end in ends}
    elif table.tasks == list(TASKS):
        rows = {}
        for name, family in (("L", LOCOMOTION), ("AM", ANTMAZE)):
            rows |= {label: [task] for task, label in family.items()}
            rows[f"total ({name})"] = list(family)
    else:
        rows = {TASKS[task]: [task] for task in table.tasks}
    return rows | {"total": table.tasks}


def entry(runs: dict, method: str, tasks: list[str], until: int) -> Cell | None:
    """Cell of a task, or of the sum over tasks; None if one has no runs."""
    cells = []
    for task in tasks:
        found = [record.until(until) for record in runs.get((method, task), {}).values()]
        cells.append(summary([r.last_four for r in found], sizes_of(found)))
    if None in cells:
        return None
    sizes = "\n".join(sorted({part for c in cells for part in c.sizes.splitlines()}))
    total = Cell(sum(c.mean for c in cells), None, min(c.seeds for c in cells), sizes=sizes)
    return cells[0] if len(cells) == 1 else total


def highlighted(cells: dict) -> dict:
    """Cells with the highest mean in bold, where two or more are comparable."""
    there = {k: cell for k, cell in cells.items() if cell}
    if len(there) < 2 or len({cell.sizes for cell in there.values()}) > 1:
        return cells
    top = max(cell.mean for cell in there.values())
    return cells | {k: replace(c, bold=True) for k, c in there.items() if c.mean == top}


def paper_numbers() -> dict:
    """Cells of the paper by (table, method, row)."""
    with open(ROOT / "results" / "paper.csv", newline="") as f:
        return {
            (f"table{row['table']}", row["method"], row["task"]): Cell(
                float(row["mean"]), float(row["std"]) if row["std"] else None
            )
            for row in csv.DictReader(f)
        }


def paper_rows(runs: dict, name: str, paper: bool = False) -> list[dict]:
    """Rows of a table of the paper; with `paper` its numbers and the differences are beside."""
    table, numbers, rows = PAPER_TABLES[name], paper_numbers(), []
    for label, tasks in lines_of(table).items():
        row = {"dataset": label}
        for part, _ in table.parts:
            cells = highlighted({m: entry(runs, m, tasks, table.until) for m in part.split()})
            for method, cell in cells.items():
                heading, published = METHODS[method].label, numbers[name, method, label]
                row[heading] = cell
                if paper:
                    row[f"{heading}, paper"] = published
                    less = Cell(cell.mean - published.mean, signed=True) if cell else None
                    row[f"{heading}, less paper"] = less
        rows.append(row)
    return rows


def aggregate_rows(runs: dict, table: Experiment) -> list[dict]:
    """One row a method that has runs: the interquartile mean over those of the common tasks."""
    there = [m for m in table.methods if any((m, task) in runs for task in table.tasks)]
    common = [task for task in table.tasks if all((m, task) in runs for m in there)]
    rows = []
    for method in there if common else []:
        groups = [[r.until(table.until) for r in runs[method, t].values()] for t in common]
        strata = [np.array([r.last_four for r in group]) for group in groups]
        sizes, interval = sizes_of(sum(groups, [])), bootstrap(strata, iqm)
        row = {"method": METHODS[method].label, "tasks": len(common)}
        row |= {"runs": sum(map(len, strata))}
        rows.append(row | {"IQM": Cell(float(iqm(strata)), interval=interval, sizes=sizes)})
    return rows


def paper_table(runs: dict, name: str, paper: bool = False) -> list[Table]:
    """A table of the paper, and its aggregates."""
    table = PAPER_TABLES[name]
    what = "last-four mean" if table.until else "offline score"
    notes = [
        f"Mean ± population standard deviation of the {what} over (n) runs. Totals: of the means, "
        "where all tasks have runs; in brackets the fewest runs. Bold: the highest mean of a row "
        "in its group, where all have the same data and sizes."
    ]
    records = [
        record.until(table.until)
        for (method, task), seeds in runs.items()
        for record in seeds.values()
        if method in table.methods and task in table.tasks
    ]
    if paper and not all(r.sizes == PAPER_SIZES[table.until] and r.is_full_size for r in records):
        notes.append("Warning: the paper's numbers are of other sizes or data than these runs.")
    title = f"Table {name.removeprefix('table')}: {table.title}"
    iqm_note = "IQM: mean of the middle half of the runs of the tasks that all these methods have; "
    iqm_note += "95% bootstrap interval, too narrow if there are few runs."
    return [
        Table(f"{title}, {what}", paper_rows(runs, name, paper), notes),
        Table(f"{title}, aggregates", aggregate_rows(runs, table), [iqm_note]),
    ]


# --- Other tables ---

AGAINST = {  # heading: the method that others are compared with, or None
    "minus baseline": lambda name: method_of(name).baseline,
    "minus DARE": lambda name: method_of(name).dare,
}


def in_order(names) -> list[str]:
    """Names of methods in the order of METHODS, those of other runs after their kind, or last."""
    order = [*METHODS, None]
    return sorted(names, key=lambda name: (order.index(kind_of(name)), name))


def differences(
    runs: dict, method: str, other: str | None, task: str, of: str = "last_four"
) -> tuple[np.ndarray, str]:
    """A method's scores less another's by seed, and the data and sizes of the pairs.

    `of` is the property of a record that is compared.
    """
    pairs = matched(runs, [method, other], task) if other not in (None, method) else []
    sizes = sizes_of([record for pair in pairs for record in pair])
    return np.array([getattr(a, of) - getattr(b, of) for a, b in pairs]), sizes


def comparison(runs: dict) -> list[Table]:
    """All methods and tasks that there are, with differences, and these over all tasks."""
    rows, totals, tasks = [], [], sorted({task for _, task in runs})
    methods = in_order({method for method, _ in runs})
    for task, method in [(t, m) for t in tasks for m in methods if (m, t) in runs]:
        found = list(runs[method, task].values())
        row = {"task": task, "method": method_of(method).label}
        row["offline score"] = summary([r.offline_score for r in found], sizes_of(found))
        row["last-four mean"] = summary([r.last_four for r in found], sizes_of(found))
        row["best"] = summary([r.best for r in found], sizes_of(found))
        last_q = [r.log("q")[1][-1] for r in found if len(r.log("q")[1])]
        row["mean Q at the end"] = summary(last_q, sizes_of(found), 0)
        for heading, other in AGAINST.items():
            row[heading] = over_tasks([differences(runs, method, other(method), task)])
        rows.append(row)
    for method in methods:
        row = {"method": method_of(method).label}
        for heading, other in AGAINST.items():
            pairs = averaged([differences(runs, method, other(method), task) for task in tasks])
            row[f"tasks ({heading})"] = len(pairs) or None
            row[heading] = over_tasks(pairs)
        if any(row[heading] for heading in AGAINST):
            totals.append(row)
    note = (
        "Mean ± population standard deviation (runs). Baseline: Cal-QL or IQL; differences, with "
        "95% t intervals, are of last-four means, by seed, of runs with the same data and sizes, "
        "at the smaller number of online steps. Mean Q: of the last log row."
    )
    return [
        Table("Differences over all tasks", totals,
              ["Mean over the tasks (pairs of runs) of the differences of last-four means; tasks "
               "with one pair only where none has more. 95% t interval, stratified by task. Tasks "
               "and their sizes differ between rows."]),
        Table("By task", rows, [note]),
    ]  # fmt: skip


DIFFERENCES = {"difference": "last_four", "in the seeds": "last_four"}
DIFFERENCES |= {"all evaluations": "after_updates", "the last": "last"}


def differences_of(runs: dict, method: str, other: str, task: str) -> dict:
    """Of method and other on a task, by the columns DIFFERENCES."""
    found = {k: differences(runs, method, other, task, of) for k, of in DIFFERENCES.items()}
    by_seed = ", ".join(f"{x:+.1f}" for x in found["in the seeds"][0])
    return {k: over_tasks([pair]) for k, pair in found.items()} | {"in the seeds": by_seed}


def pairs(runs: dict) -> list[Table]:
    """The difference of every two methods on each task, with those of the seeds, and over all."""
    rows, tasks = [], sorted({task for _, task in runs})
    methods = list(itertools.combinations(in_order({method for method, _ in runs}), 2))
    for task in tasks:
        for other, method in methods:
            row = {"task": task, "method": method_of(method).label, "minus": method_of(other).label}
            row |= differences_of(runs, method, other, task)
            if row["difference"]:
                rows.append(row)
    for other, method in methods:
        row = {"task": "", "method": method_of(method).label, "minus": method_of(other).label}
        for k, of in DIFFERENCES.items():
            found = averaged([differences(runs, method, other, task, of) for task in tasks])
            row[k] = over_tasks(found)
        if len(found) > 1:
            rows.append(row | {"task": f"{len(found)} tasks", "in the seeds": None})
    return [
        Table("Every two methods", rows,
              ["Differences of last-four means (pairs of runs), with 95% t intervals; then of the "
               "means of all evaluations after online updates, and of the last evaluation. Over "
               "several tasks, those with two pairs or more if there are any: their mean, and the "
               "interval stratified by task."])
    ]  # fmt: skip


EXCHANGE = "the exchange: DARE-I against no exchange"
QUESTIONS = {  # a method, and the one that it is compared with
    "DARE-I against IQL": ("dare_iql", "iql"),
    "DARE-I against PEX": ("dare_iql", "pex"),
    "the release: no exchange against IQL": ("dare_iql_no_exchange", "iql"),
    EXCHANGE: ("dare_iql", "dare_iql_no_exchange"),
    "the exchange: resampled reference against no exchange":
        ("dare_iql_resample", "dare_iql_no_exchange"),
    "any exchange: random rows against no exchange":
        ("dare_iql_resample_random", "dare_iql_no_exchange"),
    "which rows: resampled reference against random rows":
        ("dare_iql_resample", "dare_iql_resample_random"),
    "which rows: DARE-I against (fewer) random rows": ("dare_iql", "dare_iql_resample_random"),
    "guidance: guided against resampled": ("dare_iql", "dare_iql_resample"),
    "resampled reference: against IQL": ("dare_iql_resample", "iql"),
    "which rows: DARE-I against random rows, as many": ("dare_iql", "dare_iql_random"),
    "unguided, 16 references: against IQL": ("dare_iql_resample_density", "iql"),
    "unguided, 16 references: against DARE-I": ("dare_iql_resample_density", "dare_iql"),
    "unguided, 16 references: against resampled":
        ("dare_iql_resample_density", "dare_iql_resample"),
    "unguided, 16 references: against no exchange":
        ("dare_iql_resample_density", "dare_iql_no_exchange"),
    "guidance: guided against unguided": ("dare_iql", "dare_iql_no_guidance"),
    # Readings of Eqs. 15 and 16, without exchange
    "alpha of Eq. 16: 0 against 0.2, no exchange":
        ("dare_iql_no_exchange_alpha0", "dare_iql_no_exchange"),
    "max of Eq. 15: ten draws against one, no exchange":
        ("dare_iql_no_exchange_ten_draws", "dare_iql_no_exchange"),
    "policy's rate online: 3e-5 against 3e-4, no exchange":
        ("dare_iql_no_exchange_small_rate", "dare_iql_no_exchange"),
    "policy's rate online: 3e-5 against 3e-4, IQL": ("iql_small_rate", "iql"),
    "DARE-IV against DARE-I, no exchange": ("dare_iv_no_exchange", "dare_iql_no_exchange"),
    # The CQL group
    "DARE-C against Cal-QL": ("dare_cql", "cal_ql"),
    "DARE-C against Cal-QL with R at the same weight": ("dare_cql", "cal_ql_alpha5"),
    "the release: DARE-C without exchange against Cal-QL": ("dare_cql_no_exchange", "cal_ql"),
    "the exchange: DARE-C against no exchange": ("dare_cql", "dare_cql_no_exchange"),
    "which rows: DARE-C by the scores against at random": ("dare_cql", "dare_cql_random"),
}  # fmt: skip


MEASURES = {  # of a record: in a title, and in a note
    "last_four": ("", "last-four means"),
    "after_updates": (", over all evaluations", "means of all evaluations after online updates"),
    "last": (", in the last evaluation", "scores of the last evaluation"),
}


def questions(runs: dict, of: str = "last_four") -> list[Table]:
    """What the parts of DARE do, on each task and, if there are several, over all."""
    rows, tasks, (more, measure) = [], sorted({task for _, task in runs}), MEASURES[of]
    sizes = defaultdict(set)  # of the pairs on each task
    for question, (method, other) in QUESTIONS.items():
        found = {task: differences(runs, method, other, task, of) for task in tasks}
        cells = {task: over_tasks([pair]) for task, pair in found.items()}
        if len(tasks) > 1:
            pairs = averaged(found.values())
            cells["all"] = over_tasks(pairs) if len(pairs) > 1 else None
        if any(cells.values()):
            cells = {k: cell and replace(cell, sizes="") for k, cell in cells.items()}
            rows.append({"question": question, **cells})
        for task, (_, text) in found.items():
            sizes[task].update(text.splitlines())
    note = f"Differences of {measure} (pairs of runs), with 95% t intervals, at the smaller "
    note += "number of online steps."
    if len(tasks) > 1:
        note += " All: mean over the tasks of a row that have two pairs or more, the interval "
        note += "stratified by task."
    notes = [note]
    if of == "last_four":
        lines = {task: "\n".join(sorted(texts)) for task, texts in sizes.items() if texts}
        notes += [f"{task}: {in_short(text)}." for task, text in lines.items()]
    return [Table(f"What does what{more}", rows, notes)]


def questions_in_each_way(runs: dict) -> list[Table]:
    """The questions by each measure, and at the step that the shortest runs reach."""
    tables = [table for of in MEASURES for table in questions(runs, of)]
    if tables[1].rows == tables[0].rows:  # no more than four evaluations come after updates
        del tables[1]
    records = [record for seeds in runs.values() for record in seeds.values()]
    shortest = min((r.n_steps for r in records if r.n_steps), default=0)
    if any(record.n_steps > shortest for record in records):
        (early,) = questions(by_seed([record.until(shortest) for record in records]))
        tables.append(replace(early, title=f"{early.title}, at {shortest:,} online steps"))
    return tables


def averaged(pairs) -> list[tuple]:
    """Of (differences, sizes) by task those that a mean is over: with two pairs of runs or more.

    Where no task has two, those with one.
    """
    several = [pair for pair in pairs if len(pair[0]) > 1]
    return several or [pair for pair in pairs if len(pair[0])]


def over_tasks(pairs) -> Cell | None:
    """Mean over one task or more of the differences of (differences, sizes), with its interval."""
    if not (pairs := averaged(pairs)):
        return None
    strata = [values for values, _ in pairs]
    sizes = "\n".join(sorted({part for _, sizes in pairs for part in sizes.splitlines()}))
    mean, n = float(mean_of_tasks(strata)), sum(map(len, strata))
    return Cell(mean, None, n, t_interval(strata), sizes, signed=True)


IN_THE_PAPER = {  # tables of the paper with the first and with the second method of a question
    "DARE-I against IQL": ("table1", "table1"),
    "DARE-I against PEX": ("table1", "table1"),
    "the release: no exchange against IQL": ("table11", "table1"),
    EXCHANGE: ("table11", "table11"),
    "DARE-C against Cal-QL": ("table1", "table1"),
}


def beside_paper(runs: dict) -> Table:
    """Differences of last-four means, and those of the means in the paper's tables."""
    tasks, numbers, rows = sorted({task for _, task in runs}), paper_numbers(), []
    for question, in_tables in IN_THE_PAPER.items():
        method, other = zip(in_tables, QUESTIONS[question], strict=True)  # each with its table
        here = {t: over_tasks([differences(runs, *QUESTIONS[question], t)]) for t in tasks}
        paper = {
            task: Cell(
                numbers[(*method, TASKS[task])].mean - numbers[(*other, TASKS[task])].mean,
                signed=True,
            )
            for task in tasks
            if (*method, TASKS.get(task)) in numbers
        }
        if any(here.values()):
            here = {k: cell and replace(cell, sizes="") for k, cell in here.items()}
            rows += [{"difference": question} | here, {"difference": f"{question}, paper"} | paper]
    note = "Here: of last-four means (pairs of runs), with 95% t intervals. Paper: of the means in "
    note += "its Tables 1 and 11, which are of D4RL's data and of longer phases: signs may be "
    note += "compared, sizes hardly."
    return Table("Beside the paper's differences", rows, [note])


def scores(runs: dict) -> list[Table]:
    """Methods x tasks: last-four means, and the score before fine-tuning."""
    tasks, rows = sorted({task for _, task in runs}), []
    for method in in_order({method for method, _ in runs}):
        label, measures = method_of(method).label, {"": lambda r: r.last_four}
        if method == method_of(method).baseline:
            measures = {" before fine-tuning": lambda r: r.offline_score} | measures
        for more, measure in measures.items():
            row = {"method": label + more}
            for task in tasks:
                found = list(runs.get((method, task), {}).values())
                row[task] = summary([measure(r) for r in found], sizes_of(found))
            rows.append(row)
    n_seeds, over = {len(seeds) for seeds in runs.values()}, "(n) seeds"
    if len(n_seeds) == 1:  # said once, not in every cell
        n = n_seeds.pop()
        over = f"{n} seeds" if n > 1 else "one seed"
        rows = [{k: replace(x, seeds=None) if isinstance(x, Cell) else x for k, x in row.items()}
                for row in rows]  # fmt: skip
    note = "A seed's score is the mean of its last four evaluations; mean ± population standard "
    note += f"deviation over {over}."
    return [Table("Scores after fine-tuning", rows, [note])]


def cost(runs: dict) -> list[Table]:
    """Time and memory of each method on each hardware."""
    groups = defaultdict(list)
    for method in in_order({method for method, _ in runs}):
        for (name, _), seeds in runs.items():
            for record in seeds.values() if name == method else ():
                groups[method, record.settings.get("hardware")].append(record)
    rows = []
    for (method, hardware), found in groups.items():
        ms = [1000 / row["steps_per_second"] for r in found for row in r.train
              if row["phase"] == "online" and "q_loss" in row]  # fmt: skip
        time, memory = (
            [r.settings[k] for r in found if k in r.settings] for k in ("seconds", "peak_memory_gb")
        )
        rows.append({
            "method": method_of(method).label,
            "hardware": hardware,
            "tasks": len({record.env for record in found}),
            "runs": len(found),
            "ms per online step": Cell(float(np.median(ms)), sizes=sizes_of(found)) if ms else None,
            "processor seconds": Cell(float(np.median(time)), digits=0) if time else None,
            "peak memory, GB": Cell(max(memory), digits=2) if memory else None,
        })  # fmt: skip
    note = (
        "Medians over the online log rows with updates and over the runs; the highest peak. Runs "
        "of a grid leave offline agent, behavior model and support actions to others: these are "
        "costs of fine-tuning and its evaluations. Compare rows of as many tasks on one hardware. "
        "Steps are timed by the clock, beside other programs; processor seconds suffer less."
    )
    return [Table("Cost of fine-tuning", rows, [note])]


def exchange(runs: dict) -> list[Table]:
    """What DARE's exchange did, by task and method."""
    columns = {"M": "exchanged", "M by chance": "exchanged_by_chance", "AUC": "auc"}
    columns |= {k: k for k in ("separation", "mu_offline", "mu_online")}
    digits = {"M": 1, "M by chance": 1, "AUC": 2}
    rows, methods = [], in_order({method for method, _ in runs})
    for task, method in [(t, m) for t in sorted({t for _, t in runs}) for m in methods]:
        found = [r for r in runs.get((method, task), {}).values() if len(r.log("mu_offline")[0])]
        if found:
            share = [np.mean(r.log("mu_offline")[1] > r.log("mu_online")[1]) for r in found]
            row = {"task": task, "method": method_of(method).label}
            row["mu_offline > mu_online, share"] = summary(share, sizes_of(found), 2)
            for name, column in columns.items():
                logged = [r for r in found if len(r.log(column)[0])]
                means = [r.log(column)[1].mean() for r in logged]
                row[name] = summary(means, sizes_of(logged), digits.get(name, 3))
            rows.append(row)
    note = (
        "Of the online log rows (means over log_freq steps) of each run: mean ± population "
        "standard deviation over (n) runs. M: exchanged pairs of an update, of half a batch; by "
        "chance: with the same scores, labels drawn at random, and no cap. AUC: probability that "
        "an offline row scores lower than an online one."
    )
    return [Table("Exchange", rows, [note])]


OTHERS = {
    "scores": scores,
    "comparison": comparison,
    "questions": questions_in_each_way,
    "pairs": pairs,
    "paper": lambda runs: [beside_paper(runs)],
    "exchange": exchange,
    "cost": cost,
    "claims": lambda runs: [claims(runs)],
}


# --- Generated pages ---


def prepared(rows: list[dict]) -> Table:
    """What the parts that runs share cost, from prepared.csv."""
    groups = defaultdict(lambda: defaultdict(list))
    rows = [row for row in rows if "seconds" in row]  # unknown where an attempt was killed
    for row in rows:
        groups[row["prepared"], row.get("hardware")][row["env"]].append(row["seconds"])
    lines, tasks = [], sorted({row["env"] for row in rows})
    for (name, hardware), found in groups.items():
        cells = {
            task: Cell(float(np.median(times)), seeds=len(times), digits=0)
            for task, times in found.items()
        }
        line = {"prepared": name, "hardware": hardware}
        lines.append(line | {task: cells.get(task) for task in tasks})
    note = (
        "Processor seconds, medians over (n) runs: offline agents of iql, cal_ql and cql, one a "
        "seed; behavior models with their support actions of dare, one a data set. A few seconds: "
        "another method had made them before."
    )
    return Table("Cost of what the runs share", lines, [note])


def made_with(name: str, runs: dict) -> str:
    """How many runs of an experiment there are, and what made them."""
    records = [record for seeds in runs.values() for record in seeds.values()]
    plan = EXPERIMENTS[name]
    planned = sum(
        len(part.split()) * len(plan.seeds_of(env)) for part, tasks in plan.parts for env in tasks
    )
    beyond = [
        r for r in records if not (plan.has(r.method, r.env) and r.seed in plan.seeds_of(r.env))
    ]
    made = len(records) - len(beyond)
    where = sorted({(r.env, r.seed) for r in beyond})
    named = "; ".join(
        f"{env}, seeds {', '.join(str(seed) for task, seed in where if task == env)}"
        for env in sorted({env for env, _ in where})
    )
    more = f", and {len(beyond)} beyond the plan ({named})" if beyond else ""
    commits, hardware, torch = (
        ", ".join(sorted({str(r.settings.get(k, "unknown")) for r in records}))
        for k in ("commit", "hardware", "torch")
    )
    return (
        f"{made} of {planned} runs are made (`python results/grid.py run {name}`){more}. "
        f"Commits {commits}; {hardware}; torch {torch}.\n"
    )


def record_page(name: str) -> str:
    """README.md of an experiment's folder of records."""
    folder = RECORDS / name
    runs = by_seed(read_records(folder))
    head = (
        f"# {EXPERIMENTS[name].title}\n\n"
        "Written by `python results/tables.py pages` from the files in this folder. `runs.csv` has "
        "settings, command, commit and cost of every run, `eval.csv` every evaluation, `train.csv` "
        "the online log rows, `prepared.csv` what the runs share.\n"
    )
    tables = [
        *scores(runs),
        *questions_in_each_way(runs),
        beside_paper(runs),
        *comparison(runs),
        *exchange(runs),
        claims(runs),
        *cost(runs),
    ]
    tables.append(prepared(read_rows(folder / "prepared.csv")))
    found = [table.markdown() for table in tables if table.rows]
    return "\n".join([head, made_with(name, runs), *found])


STUDY = (
    "full_size",
    "longer",
    "readings",
    "finetuning",
    "finetuning_replay",
    "finetuning_cql",
)


ANSWERS = "full_size", "longer"  # the records that answer: is DARE-I better than IQL?


def answer_block() -> str:
    """DARE-I against IQL, and against itself without exchange, for the README of the repository."""
    rows, compared = [], {k: QUESTIONS[k] for k in ("DARE-I against IQL", EXCHANGE)}
    for name in ANSWERS:
        runs = by_seed(read_records(RECORDS / name))
        tasks = sorted({t for _, t in runs})
        tasks = [task for task in tasks if matched(runs, ["iql", "dare_iql"], task)]
        over = {
            question: [differences(runs, *pair, task) for task in tasks]
            for question, pair in compared.items()
        }
        for i, task in enumerate(tasks):
            iql, dare = zip(*matched(runs, ["iql", "dare_iql"], task), strict=True)
            row = {"task": task.removesuffix("-v2"), "online steps": f"{dare[0].n_steps:,}"}
            row["IQL before fine-tuning"] = summary([r.offline_score for r in iql], "")
            row["IQL"] = summary([r.last_four for r in iql], "")
            row["DARE-I"] = summary([r.last_four for r in dare], "")
            row |= {k: over_tasks([(pairs[i][0], "")]) for k, pairs in over.items()}
            rows.append(row)
        if len(tasks) > 2:  # of the longer runs one of two tasks was chosen by what had been seen
            means = {k: over_tasks(pairs) for k, pairs in over.items()}
            means = {k: cell and replace(cell, sizes="") for k, cell in means.items()}
            rows.append(
                {"task": f"mean of {len(averaged(over['DARE-I against IQL']))} tasks"} | means
            )
    for row in rows:
        for key, cell in row.items():
            if isinstance(cell, Cell) and cell.interval:
                row[key] = replace(cell, bold=min(cell.interval) * max(cell.interval) > 0)
    notes = [
        "Scores: last four evaluations, 5,000 steps apart (in 25,000 steps these are all after "
        "updates), mean ± population standard deviation over the runs. "
        "Differences: the first less the second, by seed (runs), with a 95% t interval that covers "
        "other seeds, not other tasks or data. Bold: it excludes 0, as one in twenty does by "
        "chance."
    ]
    return Table("DARE-I and IQL", rows, notes).markdown()


def longer_block() -> str:
    """What does what in the longer runs, with the differences of the seeds."""
    runs, rows = by_seed(read_records(RECORDS / "longer")), []
    for task in sorted({task for _, task in runs}):
        for question, pair in QUESTIONS.items():
            row = differences_of(runs, *pair, task)
            if row["difference"]:
                rows.append({"task": task.removesuffix("-v2"), "question": question, **row})
    notes = ["Differences of last-four means (pairs of runs), with 95% t intervals, and of each "
             "seed; then of the means of all evaluations after online updates, and of the last "
             "evaluation."]  # fmt: skip
    return Table("Differences in the longer runs", rows, notes).markdown()


SCORED = "dare_iql_resample"  # whose runs results/readings/scores.csv has on every task


def score_readings_block() -> str:
    """Which reading of the alignment score tells the halves apart, from results/scores.py."""
    rows = [x for x in read_rows(RECORDS / "readings" / "scores.csv") if x["name"] == SCORED]
    published = {}  # Table 7's s by task: that of the runs themselves, the largest
    for row in rows:
        published[row["env"]] = max(row["guidance_scale"], published.get(row["env"], 0.0))
    scales = "0: the behavior", "1", "Table 7's"
    readings = [(s, n, "gaussian_kl") for n in (1, 16) for s in scales]
    lines = []
    for s, n, align in [*readings, ("Table 7's", 1, "softmax_kl")]:
        line = {"s": s, "reference actions": str(n), "--align": align}
        for env in sorted(published):
            scale = {"0: the behavior": 0.0, "1": 1.0, "Table 7's": published[env]}[s]
            wanted = {"env": env, "guidance_scale": scale, "n_reference": n, "align": align}
            found = [row["auc"] for row in rows if wanted.items() <= row.items()]
            line[env] = summary(found, "", 2)
        lines.append(line)
    return Table("AUC, offline rows against online rows", lines).markdown()


def deviation_block() -> str:
    """Standard deviations of policies before and after fine-tuning, from results/deviation.py."""
    cells = defaultdict(lambda: defaultdict(list))
    for row in read_rows(RECORDS / "full_size" / "deviation.csv"):
        cells[row["method"]][row["env"]].append(row)
    tasks = sorted({task for by_task in cells.values() for task in by_task})
    methods = {f"{METHODS['iql'].label} before fine-tuning": ("iql", "before")}
    methods |= {method_of(name).label: (name, "after") for name in in_order(cells)}
    rows = [
        {"method": label}
        | {t: summary([row[when] for row in cells[name][t]], "", 3) for t in tasks}
        for label, (name, when) in methods.items()
    ]
    return Table("Standard deviation of the policy", rows).markdown()


# Written as a whole, from the records beside them.
PAGES = {f"results/{name}/README.md": functools.partial(record_page, name) for name in STUDY}
# Written between the marks <!-- NAME: python results/tables.py pages --> and <!-- end of NAME -->,
# in these pages.
BLOCKS = {"answer": answer_block, "longer": longer_block, "scores": score_readings_block}
BLOCKS["deviation"] = deviation_block
MARKED = "README.md", "results/README.md"


def with_blocks(text: str) -> str:
    """A page with its blocks made anew; a page without marks stays as it is.

    Raises:
        ValueError: a mark names no block, or has no end.
    """
    for name in re.findall("\n<!-- (.*): python results/tables.py pages -->(?=\n)", text):
        begin = f"\n<!-- {name}: python results/tables.py pages -->"
        end = f"\n<!-- end of {name} -->"
        if name not in BLOCKS or text.find(end) < text.find(begin):
            raise ValueError(f"{begin.strip()} names no block or has no {end.strip()} after it")
        head, rest = text.split(begin, 1)
        text = f"{head}{begin}\n\n{BLOCKS[name]()}{end}{rest.split(end, 1)[1]}"
    return text


def pages() -> dict[Path, str]:
    """Text of every page that has something generated."""
    found = {ROOT / name: make() for name, make in PAGES.items()}
    for path in (ROOT / name for name in MARKED):
        found[path] = with_blocks(path.read_text())
    return found


# --- Command line ---


def show(args) -> list[Table]:
    """Tables that the command line asks for.

    Raises:
        ValueError: there is no such table, or there are no runs.
    """
    names, known = args.table, [*PAPER_TABLES, *OTHERS]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no table {unknown[0]}; there are {', '.join(known)}")
    records, tables = read_records(args.path), []
    if left := unfinished(args.path):
        print(f"not finished, left out: {', '.join(left)}", file=sys.stderr)
    if args.until is not None:
        records = [record.until(args.until) for record in records]
    for part in args.tasks or []:
        if not any(part in r.env for r in records):
            raise ValueError(f"the runs of {args.path} have nothing for {part} of --tasks")
    for seed in args.seeds or []:
        if seed not in {str(r.seed) for r in records}:
            raise ValueError(f"the runs of {args.path} have nothing for {seed} of --seeds")
    if args.tasks:
        records = [r for r in records if any(part in r.env for part in args.tasks)]
    if args.seeds:
        records = [r for r in records if str(r.seed) in args.seeds]
    if not records:
        raise ValueError(f"the runs of {args.path} have none of these seeds on these tasks")
    runs = by_seed(records)
    for name in names:
        paper = name in PAPER_TABLES
        tables += paper_table(runs, name, args.paper) if paper else OTHERS[name](runs)
    if not (tables := [table for table in tables if table.rows]):
        raise ValueError(f"the runs of {args.path} have nothing for {', '.join(names)}")
    return tables


def main():
    """Print tables, or write records or pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    action = actions.add_parser("show", help="print tables")
    action.add_argument("path", type=Path, help="runs directory, or folder of records")
    action.add_argument("--table", type=words, default="scores,comparison,exchange,claims,cost",
                        help=f"of {', '.join([*PAPER_TABLES, *OTHERS])}; commas between; "
                        "default: %(default)s")  # fmt: skip
    action.add_argument("--until", type=int, metavar="STEP",
                        help="cut runs that go on beyond this online step")  # fmt: skip
    action.add_argument("--tasks", type=words, help="only of these parts of task names")
    action.add_argument("--seeds", type=words, help="only of these seeds, commas between")
    action.add_argument("--format", choices=["markdown", "latex"], default="markdown")
    action.add_argument("--paper", action="store_true", help="the paper's numbers beside")
    action = actions.add_parser("collect", help="write the records of finished runs")
    action.add_argument("runs_dir", type=Path)
    action.add_argument("folder", type=Path)
    action.add_argument("--experiment", choices=EXPERIMENTS, metavar="NAME",
                        help="only runs of this one of grid.py's experiments")  # fmt: skip
    action.add_argument("--until", type=int, metavar="STEP",
                        help="also of unfinished runs: cut all at this online step")  # fmt: skip
    action.add_argument("--add", action="store_true", help="keep other runs that FOLDER has")
    action = actions.add_parser("pages", help="write the generated pages of this repository")
    action.add_argument("--check", action="store_true", help="write nothing, fail if they differ")
    args = parser.parse_args()
    try:
        if getattr(args, "until", None) is not None and args.until < 0:
            raise ValueError("--until is an online step: 0 or more")
        if args.action == "show":
            print("\n".join(getattr(table, args.format)() for table in show(args)), end="")
        elif args.action == "collect":
            experiment = EXPERIMENTS.get(args.experiment)
            where = args.runs_dir, args.folder
            records = write_records(*where, args.until, args.add, experiment)
            print(f"{args.folder} has {len(records)} runs")
            if args.until is None and (left := unfinished(args.runs_dir)):
                print(f"not finished, left out: {', '.join(left)}")
        else:
            for path, text in pages().items():
                stale = not path.exists() or path.read_text() != text
                if stale and args.check:
                    sys.exit(f"error: {path} is stale; run python results/tables.py pages")
                if stale:
                    write(path, text)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
