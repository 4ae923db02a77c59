"""The paper's figures from runs: python results/figures.py PATH [--figure fig7,finetuning]

PATH is a runs directory or a folder of committed records (tables.py collect). Every figure whose
runs are there is written to --output; for every other one a line says what is missing. Curves are
means over seeds, not smoothed, with a band: the seeds' range, or from four seeds on a 95% t
interval. The small print of a figure says how many seeds, on which data and at which sizes. Beyond
the paper: the studies, as `finetuning` or `full_size`; `differences-iql` and `differences-cql`,
each method minus DARE seed by seed with t intervals; `sign`, the difference of both halves' mean
scores; `auc`, the probability that an offline row scores lower than an online one.
"""

import argparse
import io
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from d4rl_gymnasium.files import write
from lib.experiments import PICTURES, ROOT, Experiment, method_of, words
from lib.records import Record, by_seed, described, matched, read_records, unfinished
from lib.statistics import mean_of_tasks, t_interval

STYLE = ROOT / "results" / "style.mplstyle"
AXES = {
    "score": "normalized score",
    "exchanged": "exchanged pairs M",
    "sign": "μ online − μ offline",
    "auc": "AUC",
    "differences": "difference from ",
}
ALONE = ("exchanged", "sign", "auc")  # drawn of one method, where others need two to compare


# --- What is drawn ---


def panels_of(plan: Experiment, records: list[Record]) -> dict:
    """Runs of a figure by task and method; a task needs two methods, or one that has the quantity.

    A method with fewer online steps has a shorter curve.

    Raises:
        ValueError: runs whose scores would share a panel differ in data or sizes.
    """
    panels = {}
    for task in plan.tasks:
        runs = {
            method: [r for r in records if (r.method, r.env) == (method, task)]
            for method in plan.methods
        }
        alone = plan.shows in ALONE
        if alone:  # runs that have the quantity
            runs = {m: [r for r in found if len(series(r, plan.shows)[0])]
                    for m, found in runs.items()}  # fmt: skip
        runs = {method: found for method, found in runs.items() if found}
        has_dare = plan.shows != "differences" or plan.methods[-1] in runs
        if len(runs) < (1 if alone else 2) or not has_dare:
            continue
        panels[task] = runs
        if not alone and len({r.origin for found in runs.values() for r in found}) > 1:
            raise ValueError(f"{', '.join(runs)} on {task} differ in data or sizes; put the runs "
                             "of each size in a folder of their own")  # fmt: skip
    return panels


def series(record: Record, shows: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [T] and values [T] of one run."""
    if shows == "score":
        return record.scores()
    if shows == "sign":
        steps, offline = record.log("mu_offline")
        return steps, record.log("mu_online")[1] - offline
    return record.log(shows)


def mean_and_band(records: list[Record], shows: str) -> tuple:
    """Steps [T] to the end of the shortest seed, mean over seeds [T], and its band's ends [2, T].

    The band is the range of fewer than four seeds, whose wide interval would hide the curves, and
    otherwise the mean's 95% t interval.

    Raises:
        ValueError: the seeds do not have the same steps.
    """
    shortest = min(record.n_steps for record in records)
    runs = [series(record.until(shortest), shows) for record in records]
    steps = runs[0][0]
    if any(not np.array_equal(steps, other) for other, _ in runs):
        raise ValueError(f"the seeds of {records[0].method} on {records[0].env} were logged at "
                         "different steps; --eval_freq and --log_freq must agree")  # fmt: skip
    values = np.stack([y for _, y in runs])
    if len(values) < 4:
        return steps, values.mean(0), np.stack([values.min(0), values.max(0)])
    bands = [t_interval([column]) for column in values.T]
    return steps, values.mean(0), np.transpose(bands)


def first_update(runs: dict) -> int:
    """Online step of the first update in a panel."""
    return min(int(r.settings.get("initial_collection_steps", 0)) for x in runs.values() for r in x)


def differences(plan: Experiment, panels: dict) -> dict:
    """Last-four means less those of the plan's last method, [pairs], by method and task."""
    *others, dare = plan.methods
    runs, found = {}, defaultdict(dict)
    for methods in panels.values():
        runs |= by_seed([record for records in methods.values() for record in records])
    for method in others:
        for task in panels:
            if pairs := matched(runs, [method, dare], task):
                found[method][task] = np.array([a.last_four - b.last_four for a, b in pairs])
    return found


def caption(plan: Experiment, panels: dict) -> str:
    """What a reader must know of the runs: seeds, data and sizes."""
    who = defaultdict(lambda: defaultdict(list))  # tasks by sizes and methods
    for task, runs in panels.items():
        methods, steps = defaultdict(set), defaultdict(int)
        for record in (r for records in runs.values() for r in records):
            methods[record.origin].add(method_of(record.method).label)
            steps[record.origin] = max(steps[record.origin], record.n_steps)
        for origin, labels in methods.items():
            labels = f"{', '.join(sorted(labels))} on " if len(methods) > 1 else ""
            who[described(*origin, steps[origin])][labels].append(task.removesuffix("-v2"))
    counts, unit = {len(records) for runs in panels.values() for records in runs.values()}, "seed"
    if plan.shows == "differences":
        found = differences(plan, panels)
        counts, unit = {len(x) for by_task in found.values() for x in by_task.values()}, "pair"
    seeds = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
    parts = [f"{seeds} {unit}{'s' if seeds != '1' else ''}"]
    for sizes, tasks in who.items():
        names = [labels + ", ".join(sorted(found)) for labels, found in tasks.items()]
        parts.append(f"{', '.join(names)}: {sizes}" if len(who) > 1 else sizes)
    n_steps = {(task, r.n_steps) for task, runs in panels.items() for x in runs.values() for r in x}
    if len(n_steps) > len(panels) and plan.shows != "differences":
        parts.append("shorter curves are of fewer online steps")
    band = "95% t interval" if min(counts) > 3 else "the range of the seeds"
    if min(counts) < 4 <= max(counts):
        band += ", from four on a 95% t interval"
    band = "95% t interval" if plan.shows == "differences" else band
    mean = f"Mean and {band}; " if max(counts) > 1 else ""
    if plan.shows != "differences" and any(map(first_update, panels.values())):
        mean += "updates begin at the dotted line; "
    return f"{plan.title}. {mean}{'; '.join(parts)}."


# --- Drawing ---


def grid(titles, xlabel: str, text: str, height: float = 1.25) -> tuple[Figure, list]:
    """A figure with a panel for each title in rows of at most four, and small print below.

    `height` is that of a panel in inches.
    """
    n = len(titles)
    columns = n if n < 4 else 2 if n == 4 else 3 if n < 10 else 4
    rows = -(-n // columns)
    width, height = {1: (3.4, 1.3 * height), 2: (5.2, height)}.get(n, (7.0, height))
    lines = textwrap.wrap(text, int(width * 21), break_on_hyphens=False)
    figure = Figure(figsize=(width, 0.5 + 0.1 * len(lines) + height * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    figure.supxlabel("\n".join(lines), x=0.01, ha="left", size=5.5, color="0.35")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in panels[n:]:
        ax.remove()
    for i, (ax, title) in enumerate(zip(panels[:n], titles, strict=True)):
        ax.set_title(title.removesuffix("-v2"))
        if i >= n - columns:  # none below it
            ax.set_xlabel(xlabel)
    return figure, panels[:n]


def draw_curves(plan: Experiment, panels: dict) -> Figure:
    """Means and bands over the online steps, a panel for each task."""
    figure, axes = grid(list(panels), "online environment steps", caption(plan, panels))
    lines = {}
    for ax, runs in zip(axes, panels.values(), strict=True):
        for method, records in runs.items():
            steps, mean, band = mean_and_band(records, plan.shows)
            label, color = method_of(method).label, method_of(method).color
            ax.fill_between(steps, *band, color=color, alpha=0.15, lw=0)
            (lines[label],) = ax.plot(steps, mean, color=color, label=label)
        if start := first_update(runs):
            ax.axvline(start, color="0.4", lw=0.6, ls=":", zorder=1)
        if plan.shows in ("sign", "auc"):
            ax.axhline(0 if plan.shows == "sign" else 0.5, color="0.4", lw=0.6, zorder=1)
        elif plan.shows == "exchanged":
            ax.set_ylim(bottom=0)
        ax.locator_params(nbins=4)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    figure.supylabel(AXES[plan.shows])
    columns = min(len(lines), {1: 2, 2: 3}.get(len(panels), 4))
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=columns)
    return figure


def draw_differences(plan: Experiment, panels: dict) -> Figure:
    """Forest plot: paired differences from DARE with their intervals, a panel per task.

    "all tasks" has the mean over tasks of the methods that have two pairs on all of the panels.
    """
    dare, found = plan.methods[-1], differences(plan, panels)
    tasks = [task for task in panels if any(task in values for values in found.values())]
    if not tasks:
        raise ValueError(f"no method has a seed in common with {dare}; run the same seeds")
    strata = {(m, task): [x] for m, values in found.items() for task, x in values.items()}
    if len(tasks) > 1:
        strata |= {(m, "all tasks"): list(values.values()) for m, values in found.items()
                   if len(values) == len(tasks) and min(map(len, values.values())) > 1}  # fmt: skip
        if any(task == "all tasks" for _, task in strata):
            tasks.append("all tasks")
    xlabel = AXES[plan.shows] + method_of(dare).label
    figure, axes = grid(tasks, xlabel, caption(plan, panels), 0.35 + 0.11 * len(found))
    for i, (ax, task) in enumerate(zip(axes, tasks, strict=True)):
        ax.axvline(0, color="0.4", lw=0.6, zorder=1)
        for row, method in enumerate(found):
            if values := strata.get((method, task)):
                label, color = method_of(method).label, method_of(method).color
                mean = float(mean_of_tasks(values))
                ax.plot(t_interval(values) or (mean, mean), [row, row], color=color)
                ax.plot([mean], [row], "o", ms=3, color=color, label=label)
        first = i % ax.get_gridspec().ncols == 0
        ax.set_yticks(range(len(found)), [method_of(m).label if first else "" for m in found])
        ax.set_ylim(len(found) - 0.5, -0.5)
        ax.locator_params(axis="x", nbins=4)
    return figure


def draw(name: str, records: list[Record]) -> tuple[Figure, str]:
    """A figure and what it lacks.

    Raises:
        ValueError: it cannot be drawn.
    """
    plan = PICTURES[name]
    if not (panels := panels_of(plan, records)):
        two = "" if plan.shows in ALONE else "two of "
        raise ValueError(f"needs runs of {two}{', '.join(plan.methods)} on one task")
    figure = (draw_differences if plan.shows == "differences" else draw_curves)(plan, panels)
    absent = [m for m in plan.methods if not any(m in runs for runs in panels.values())]
    tasks = f"{len(panels)} of {len(plan.tasks)} tasks"
    return figure, tasks + (f", without {', '.join(absent)}" if absent else "")


# --- Files and command line ---


def write_figure(figure: Figure, path: Path):
    """Write a picture, whole or not at all; a PNG with 256 colours, a third of the size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:])
    if path.suffix == ".png":
        image = Image.open(picture).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        picture = io.BytesIO()
        image.save(picture, format="png", optimize=True)
    write(path, picture.getvalue())


def main():
    """Draw what can be drawn, with a line for every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="runs directory or records")
    parser.add_argument("--figure", type=words, default=list(PICTURES),
                        help=f"of {', '.join(PICTURES)}; default: all")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("figures"), help="default: figures/")
    parser.add_argument("--format", choices=["png", "pdf"], default="png")
    args = parser.parse_args()
    if unknown := [name for name in args.figure if name not in PICTURES]:
        sys.exit(f"error: no figure {', '.join(unknown)}; there are {', '.join(PICTURES)}")
    drawn = 0
    try:
        records = read_records(args.path)
        if left := unfinished(args.path):
            print(f"not finished, left out: {', '.join(left)}")
        for name in args.figure:
            try:
                with matplotlib.style.context(STYLE):
                    figure, note = draw(name, records)
                    path = args.output / f"{name}.{args.format}"
                    write_figure(figure, path)
            except ValueError as e:
                print(f"{name}: not drawn, {e}")
                continue
            drawn += 1
            print(f"{name}: {path}, {note}", flush=True)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    if not drawn:
        sys.exit(f"error: nothing was drawn from {args.path}; the lines above say what is missing")


if __name__ == "__main__":
    main()
