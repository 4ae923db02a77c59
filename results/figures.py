"""The paper's figures from runs: python results/figures.py PATH [--figure 1,2,...]

PATH is a runs directory or a folder of committed records (collect.py --records); for Fig. 1 it is
the directory of one finished DARE run. Every figure whose runs are there is written to --output;
for every other one a line says what is missing. Curves are means over seeds with a 95% bootstrap
band, not smoothed; the line at the bottom of each figure says how many seeds, on which data and
at which sizes. Beyond the paper: `study`, each variant minus DARE seed by seed with t intervals,
and `sign`, the difference of both halves' mean scores.
"""

import argparse
import io
import os
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
from collect import Record, interval, read_records
from experiments import ANTMAZE, LOCOMOTION, TASKS
from matplotlib.figure import Figure
from pairs import mean_of_tasks, t_interval
from PIL import Image
from scipy.optimize import isotonic_regression

HERE = Path(__file__).parent
STYLE = HERE / "style.mplstyle"
# One colour for a part that is changed, in both groups; baselines are grey and blue.
PARTS = {
    "n16": ("n = 16", "#44AA99"),
    "n32": ("n = 32", "#117733"),
    "uncapped": ("n = ∞", "#999933"),
    "direct": ("direct", "#332288"),
    "no_guidance": ("no guidance", "#DDAA33"),
    "no_exchange": ("no exchange", "#222222"),
    "resample": ("resampled reference", "#661100"),
    "reference4": ("4 references", "#EE99AA"),
    "reference16": ("16 references", "#994455"),
    "separated": ("separated", "#228833"),
}
BASELINES = {
    "cql": ("CQL", "#999999"),
    "cal_ql": ("Cal-QL", "#66AADD"),
    "edis_cql": ("EDIS-C", "#225588"),
    "iql": ("IQL", "#999999"),
    "pex": ("PEX", "#66AADD"),
    "edis_iql": ("EDIS-I", "#225588"),
}
DARE = {
    "dare_cql": ("DARE-C", "#AA3377"),
    "dare_iql": ("DARE-I", "#D55E00"),
    "dare_iv": ("DARE-IV", "#882255"),
}
QUANTITIES = {
    "score": "normalized score",
    "exchanged": "exchanged pairs M",
    "sign": "μ online − μ offline",
}


def style_of(method: str) -> tuple[str, str]:
    """Label and colour of a method, the same in every figure."""
    method = method.removesuffix("_utd10")
    for group in ("dare_cql_", "dare_iql_"):
        if method.startswith(group):
            return PARTS[method.removeprefix(group)]
    return (BASELINES | DARE)[method]


@dataclass
class Plan:
    """What a figure shows: `main` and at least one of `others`, or with `alone` any of them."""

    title: str
    main: str
    others: tuple[str, ...]
    tasks: list[str]
    label: str | None = None  # of main, where not its name
    quantity: str = "score"
    alone: bool = False
    paired: bool = False  # a forest plot of differences

    @property
    def labels(self) -> dict:
        """Labels by method, main last: it is drawn on top."""
        labels = {method: style_of(method)[0] for method in (*self.others, self.main)}
        for group, letter in ((CQL, "C"), (IQL, "I")):
            if self.alone:  # both groups in one figure
                own = [method for method in labels if method.startswith(f"{group}_")]
                labels |= {method: f"{letter}, {labels[method]}" for method in own}
        return labels | ({self.main: self.label} if self.label else {})


def variants(group: str, *names: str) -> tuple[str, ...]:
    """Names of the runs of a DARE method's variants."""
    return tuple(f"{group}_{name}" for name in names)


CQL, IQL = "dare_cql", "dare_iql"
CQL_GROUP, IQL_GROUP = ("cql", "cal_ql", "edis_cql"), ("iql", "pex", "edis_iql")
ABLATION, REFERENCES = ("no_guidance", "no_exchange"), ("resample", "reference4", "reference16")
CQL_DIRECT, CQL_ABLATION = variants(CQL, "direct"), variants(CQL, *ABLATION)
IQL_DIRECT, IQL_ABLATION = variants(IQL, "direct"), variants(IQL, *ABLATION)
CQL_STUDY = (*CQL_GROUP, *variants(CQL, "n16", "uncapped"), *CQL_DIRECT, *CQL_ABLATION)
IQL_STUDY = (*IQL_GROUP, "dare_iv", *variants(IQL, "n16", "n32"), *IQL_DIRECT, *IQL_ABLATION)
IQL_STUDY += variants(IQL, *REFERENCES, "separated")
BOTH, SIGN = (CQL, *variants(CQL, "uncapped")), (CQL, *variants(IQL, "separated"))
UTD10 = ("pex_utd10", "edis_iql_utd10")
MINUS = "Last-four mean minus that of"
FIGURES = {
    "2": Plan("Exchanged pairs, locomotion", IQL, BOTH, LOCOMOTION, None, "exchanged", True),
    "3": Plan("Gaussian or direct exchange, DARE-C", CQL, CQL_DIRECT, TASKS, "Gaussian"),
    "3-iql": Plan("Gaussian or direct exchange, DARE-I", IQL, IQL_DIRECT, TASKS, "Gaussian"),
    "4": Plan("Ablation of DARE-I", IQL, IQL_ABLATION, TASKS),
    "5": Plan("CQL group, locomotion", CQL, CQL_GROUP, LOCOMOTION),
    "6": Plan("CQL group, AntMaze", CQL, CQL_GROUP, ANTMAZE),
    "7": Plan("IQL group, locomotion", IQL, IQL_GROUP, LOCOMOTION),
    "8": Plan("IQL group, AntMaze", IQL, IQL_GROUP, ANTMAZE),
    "9": Plan("Exchanged pairs", IQL, BOTH, TASKS, None, "exchanged", True),
    "10": Plan("Caps n of DARE-C", CQL, variants(CQL, "n16", "uncapped"), LOCOMOTION, "n = 32"),
    "11": Plan("Caps n of DARE-I", IQL, variants(IQL, "n16", "n32"), LOCOMOTION, "n = ∞"),
    "12": Plan("Ten updates per environment step", f"{IQL}_utd10", UTD10, LOCOMOTION[3:]),
    "13": Plan("Ablation of DARE-C, locomotion", CQL, CQL_ABLATION, LOCOMOTION),
    "14": Plan("Ablation of DARE-I, locomotion", IQL, IQL_ABLATION, LOCOMOTION),
    "sign": Plan("Which half scores higher", IQL, SIGN, TASKS, None, "sign", True),
    "study": Plan(f"{MINUS} DARE-I, by seed", IQL, IQL_STUDY, TASKS, paired=True),
    "study-cql": Plan(f"{MINUS} DARE-C, by seed", CQL, CQL_STUDY, TASKS, paired=True),
}


# --- What is drawn ---


def panels_of(plan: Plan, records: list[Record]) -> dict:
    """Runs of a figure by task and method, tasks in the paper's order.

    Raises:
        ValueError: runs that would share a panel differ in data or sizes.
    """
    panels = {}
    for task in plan.tasks:
        runs = defaultdict(list)
        for record in records:
            if record.env == task and record.method in plan.labels:
                runs[record.method].append(record)
        if plan.alone and runs or plan.main in runs and len(runs) > 1:
            panels[task] = {method: runs[method] for method in plan.labels if method in runs}
    for task, runs in panels.items():
        for one in [[x] for x in runs.values()] if plan.alone else [runs.values()]:
            if len({size_of(record) for group in one for record in group}) > 1:
                names = ", ".join(runs)
                raise ValueError(f"{names} on {task} differ in data, updates, steps or batch size; "
                                 "put runs of each size in a folder of their own")  # fmt: skip
    return panels


def size_of(record: Record) -> tuple:
    """Data, offline updates, online steps and batch size of a run."""
    numbers = [
        record.settings[k] for k in ("offline_iterations", "online_iterations", "batch_size")
    ]
    return Path(str(record.settings["data"])).name, *map(int, numbers)


def series(record: Record, quantity: str, phase: str = "online") -> tuple:
    """Steps [T] and values [T] of one run."""
    if quantity == "score":
        return record.scores(phase)
    rows = [row for row in record.train if row["phase"] == phase and "exchanged" in row]
    steps = np.array([row["step"] for row in rows])
    if quantity == "sign":
        return steps, np.array([row["mu_online"] - row["mu_offline"] for row in rows])
    return steps, np.array([row["exchanged"] for row in rows])


def mean_and_band(records: list[Record], quantity: str, phase: str = "online") -> tuple:
    """Steps [T], mean over seeds [T], and lower and upper end of its 95% interval [2, T].

    Raises:
        ValueError: the seeds do not have the same steps.
    """
    runs = [series(record, quantity, phase) for record in records]
    steps = runs[0][0]
    if any(not np.array_equal(steps, other) for other, _ in runs):
        raise ValueError(f"the seeds of {records[0].method} on {records[0].env} were logged at "
                         "different steps; --eval_freq and --log_freq must agree")  # fmt: skip
    values = np.stack([y for _, y in runs])
    bands = [interval(column, draws=2_000) for column in values.T]
    return steps, values.mean(0), np.reshape(bands, (-1, 2)).T


def differences(plan: Plan, panels: dict) -> dict:
    """Last-four mean of a method less that of plan.main, [seeds], by method and task."""
    found = defaultdict(dict)
    for task, runs in panels.items():
        base = {record.seed: record.last_four for record in runs[plan.main]}
        for method in (m for m in plan.others if m in runs):
            pairs = {r.seed: r.last_four - base[r.seed] for r in runs[method] if r.seed in base}
            if pairs:
                found[method][task] = np.array(list(pairs.values()))
    return found


def caption(plan: Plan, panels: dict) -> str:
    """What a reader must know of the runs: seeds, data and sizes."""
    groups, tasks, counts = defaultdict(set), defaultdict(set), []
    for task, runs in panels.items():
        for method, records in runs.items():
            _, *sizes = size_of(records[0])
            groups[tuple(sizes)].add(plan.labels[method])
            tasks[tuple(sizes)].add(task.removesuffix("-v2"))
            counts.append(len(records))
    names = {"d4rl": "D4RL's data", "regenerated": "regenerated data"}
    records = [r for runs in panels.values() for group in runs.values() for r in group]
    data = ", ".join(sorted({names.get(size_of(r)[0], size_of(r)[0]) for r in records}))
    seeds = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
    parts = [f"{seeds} seed{'s' if seeds != '1' else ''}", data]
    by_task = sum(map(len, tasks.values())) == len(set.union(*tasks.values()))
    for sizes in groups:  # named by what tells them apart
        offline, online, batch = sizes
        who = f"{', '.join(sorted((tasks if by_task else groups)[sizes]))}: "
        parts.append(
            f"{who * (len(groups) > 1)}{offline:,} offline updates, {online:,} online steps, "
            f"batches of\u00a0{batch}"
        )
    interval = "t interval" if plan.paired else "bootstrap interval"
    return f"{plan.title}. Mean and 95% {interval}; {'; '.join(parts)}."


# --- Drawing ---


def grid(n: int, height: float = 1.25) -> tuple[Figure, list]:
    """A figure with n panels in rows of at most four; heights in inches."""
    columns = n if n < 4 else 2 if n == 4 else 3 if n < 10 else 4
    rows = -(-n // columns)
    width, height = {1: (3.4, 1.3 * height), 2: (5.2, height)}.get(n, (7.0, height))
    figure = Figure(figsize=(width, 0.5 + height * rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for ax in panels[n:]:
        ax.remove()
    for ax in panels[: max(n - columns, 0)]:
        ax.tick_params(labelbottom=False)
    return figure, list(panels[:n])


def surround(figure: Figure, text: str, xlabel: str = "", ylabel: str = ""):
    """Write the labels that all panels share, and a text of one or more lines below them."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(text, int(width * 21), break_on_hyphens=False)
    top = (0.1 * len(lines) + 0.06) / height
    figure.text(0.05 / width, 0.04 / height, "\n".join(lines), size=5.5, color="0.35", va="bottom")
    figure.text(0.5, top, xlabel, size=7, ha="center", va="bottom")
    space = top + bool(xlabel) * 0.13 / height
    if ylabel:
        figure.supylabel(ylabel, y=(1 + space) / 2)
    figure.get_layout_engine().set(rect=(0, space, 1, 1 - space))


def spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """The heights that are nearest to the given ones and at least a gap apart."""
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(heights))
    found = np.empty(len(heights))
    found[order] = isotonic_regression(np.asarray(heights)[order] - steps).x + steps
    return found


def label_lines(figure: Figure, axes: list):
    """Put each line's label at its end, so that none covers another."""
    texts = []
    for ax in axes:
        lines = [x for x in ax.lines if not x.get_label().startswith("_")]
        for line in lines:
            end, style = (line.get_xdata()[-1], line.get_ydata()[-1]), {"color": line.get_color()}
            style |= {"textcoords": "offset points", "va": "center", "size": 6}
            texts.append(ax.annotate(line.get_label(), end, (3, 0), **style))
    figure.draw_without_rendering()  # places the panels, whose heights the gaps depend on
    for ax in axes:
        own = [text for text in texts if text.axes is ax]
        to_points = ax.transData.transform
        heights = np.array([to_points((0, text.xy[1]))[1] for text in own]) * 72 / figure.dpi
        low, high = ax.bbox.y0 * 72 / figure.dpi, ax.bbox.y1 * 72 / figure.dpi
        moved = spread(heights, 6.5)
        moved -= max(moved.max() + 3 - high, 0)  # down first: below the panel there is an axis
        moved += max(low - moved.min(), 0)
        for text, height, new in zip(own, heights, moved, strict=True):
            text.set_position((3, new - height))


def draw_offline(ax, runs: dict, labels: dict, width: float):
    """Offline scores left of 0, all of the phase in `width`; one grey line where it is shared."""
    shared = defaultdict(list)
    for method, records in runs.items():
        steps, mean, _ = mean_and_band(records, "score", "offline")
        if len(steps):
            x = width * (steps / size_of(records[0])[1] - 1)
            shared[(tuple(x), tuple(mean))].append(method)
    for (x, mean), methods in shared.items():
        color = style_of(methods[0])[1] if len(methods) == 1 else "0.45"
        ax.plot(x, mean, color=color, label="_offline " + ", ".join(labels[m] for m in methods))
    ax.axvspan(-width, 0, color="0.96", lw=0, zorder=0)
    ax.axvline(0, color="0.5", lw=0.6, zorder=1)


def ticks(ax, end: float, offline: float):
    """Few ticks in thousands of steps; the offline part is named in its middle, 0 is the line."""
    names = {end / 2: f"{end / 2000:g}k", end: f"{end / 1000:g}k"}
    names |= {-offline / 2: "offline"} if offline else {0: "0"}
    ax.set_xlim(-offline, end)
    ax.set_xticks([*names], names.values())


def draw_curves(plan: Plan, panels: dict) -> Figure:
    """Means and bands of plan.quantity along the steps, a panel for each task."""
    figure, axes = grid(len(panels))
    end = max(r.settings["online_iterations"] for runs in panels.values()
              for records in runs.values() for r in records)  # fmt: skip
    offline = end / 4 if plan.quantity == "score" else 0
    for ax, (task, runs) in zip(axes, panels.items(), strict=True):
        for method, records in runs.items():
            steps, mean, band = mean_and_band(records, plan.quantity)
            color = style_of(method)[1]
            ax.fill_between(steps, *band, color=color, alpha=0.15, lw=0)
            ax.plot(steps, mean, color=color, label=plan.labels[method])
        if offline:
            draw_offline(ax, runs, plan.labels, offline)
        elif plan.quantity == "sign":
            ax.axhline(0, color="0.4", lw=0.6, zorder=1)
        else:
            ax.set_ylim(bottom=0)
        ax.set_title(task.removesuffix("-v2"))
        ax.locator_params(axis="y", nbins=4)
        ticks(ax, end, offline)
    note = " Shaded: the offline phase, compressed; the line: step 0 online." if offline else ""
    labels = "online environment steps", QUANTITIES[plan.quantity]
    surround(figure, caption(plan, panels) + note, *labels)
    label_lines(figure, axes)
    return figure


def draw_study(plan: Plan, panels: dict) -> Figure:
    """Forest plot: paired differences from plan.main with their intervals, a panel per task.

    "all tasks" has the mean over tasks of the methods that are on all of the panels.
    """
    found = differences(plan, panels)
    if not found:
        raise ValueError(f"no variant has a seed in common with {plan.main}; run the same seeds")
    strata = {(m, task): [x] for m, values in found.items() for task, x in values.items()}
    tasks = [task for task in panels if any(task in values for values in found.values())]
    if len(tasks) > 1:
        strata |= {(m, "all tasks"): list(values.values())
                   for m, values in found.items() if len(values) == len(tasks)}  # fmt: skip
        tasks += ["all tasks"] * any(task == "all tasks" for _, task in strata)
    figure, axes = grid(len(tasks), height=0.35 + 0.11 * len(found))
    for i, (ax, task) in enumerate(zip(axes, tasks, strict=True)):
        ax.axvline(0, color="0.4", lw=0.6, zorder=1)
        for row, method in enumerate(found):
            if values := strata.get((method, task)):
                color, mean = style_of(method)[1], float(mean_of_tasks(values))
                line = t_interval(values) or (mean, mean)
                ax.plot(line, [row, row], color=color, label="_interval")
                ax.plot([mean], [row], "o", ms=3, color=color, label=plan.labels[method])
        ax.set_title(task.removesuffix("-v2"), weight="bold" if task == "all tasks" else None)
        first = i % ax.get_gridspec().ncols == 0
        ax.set_yticks(range(len(found)), [plan.labels[m] if first else "" for m in found])
        ax.set_ylim(len(found) - 0.5, -0.5)
        ax.locator_params(axis="x", nbins=4)
        ax.tick_params(labelbottom=True)
    label = f"difference of normalized scores from {plan.labels[plan.main]}"
    surround(figure, caption(plan, panels), label)
    return figure


# --- Fig. 1: one finished run ---

SAMPLES = 1_000  # rows of each half; guided sampling and t-SNE take seconds then


def shift_of(run_dir: Path) -> dict:
    """Numbers of Fig. 1 of a finished DARE run, from N offline and N online rows.

    Gives `errors` [N], mean squared error between the offline agent's mean action and the
    dataset's; `offline`, `online` [N, S + A], states and actions in units of the offline rows'
    deviations; `offline_scores`, `online_scores` [N]; `tau`; and the run's config as `cfg`.
    """
    import torch
    from agreement import in_cache, load_run

    torch.set_num_threads(1)
    script, dare = load_run(run_dir)
    cfg, buffers = dare.cfg, (dare.offline_buffer, dare.online_buffer)
    torch.manual_seed(cfg.seed)
    n = min(SAMPLES, *(buffer.size for buffer in buffers))
    offline, online = (x.batch(x.rows[torch.randperm(x.size)[:n]]) for x in buffers)
    with torch.no_grad():
        references = dare.reference_actions(torch.cat([offline.observations, online.observations]))
        actions = torch.cat([offline.actions, online.actions])
        scores = script.alignment_score(actions, references, cfg.align).split(n)
    agent = type(dare.agent)(*dare.offline_buffer.dims, cfg, "cpu")
    digest = dare.offline_buffer.digest()
    path = in_cache(script, cfg, script.OFFLINE_METHOD, script.OFFLINE_FIELDS, digest)
    agent.load_state_dict(script.load(path)["agent"])
    error = agent.act(offline.observations.numpy(), True) - offline.actions.numpy()
    rows = [torch.cat([x.observations, x.actions], 1).numpy() for x in (offline, online)]
    scale = np.where(rows[0].std(0) > 0, rows[0].std(0), 1)
    units = [(x - rows[0].mean(0)) / scale for x in rows]
    return {"errors": np.square(error).mean(1), "offline": units[0], "online": units[1],
            "offline_scores": scores[0].numpy(), "online_scores": scores[1].numpy(),
            "tau": script.separation_point(*scores).item(), "cfg": cfg}  # fmt: skip


def tsne():
    """Scikit-learn's t-SNE; exits with a line where it is missing."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        sys.exit("error: Fig. 1 (b) needs scikit-learn; run pip install 'scikit-learn>=1.5,<2'")
    return TSNE


def embed(offline: np.ndarray, online: np.ndarray) -> np.ndarray:
    """Rows [N, D] of both halves in the plane by t-SNE, [2 N, 2]."""
    rows = np.concatenate([offline, online])
    perplexity = min(30, (len(rows) - 1) / 3)
    return tsne()(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows)


def draw_scores(ax, shift: dict, colors: dict):
    """Histograms of the scores as densities, the two fitted Gaussians, and tau."""
    scores = {name: shift[f"{name}_scores"] for name in colors}
    end = np.percentile(np.concatenate(list(scores.values())), 99)
    x = np.linspace(0, end, 300)
    for name, values in scores.items():
        weights = np.full(len(values), 40 / end / len(values))  # density of all, those left out too
        ax.hist(values, np.linspace(0, end, 41), weights=weights, color=colors[name], alpha=0.3)
        mean, std = values.mean(), values.std()
        density = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
        ax.plot(x, density, color=colors[name], label=f"fit, {name}")
    ax.axvline(shift["tau"], color="0.3", lw=0.8, ls="--", label="tau")
    ax.annotate(f"τ = {shift['tau']:.2f}", (shift["tau"], 1), (2, -1),
                ("data", "axes fraction"), "offset points", va="top", color="0.3")  # fmt: skip
    ax.set(title="(c) alignment scores, fitted Gaussians", xlabel="score", ylabel="density")
    ax.set_xlim(0, end)


def draw_shift(shift: dict, points: np.ndarray) -> Figure:
    """Fig. 1 from shift_of's numbers and the t-SNE points [2 N, 2]."""
    figure, (left, middle, right) = grid(3, height=1.6)
    colors = {"offline": "#225588", "online": "#D55E00"}
    left.hist(shift["errors"], 40, color="0.6")
    left.set(title="(a) offline policy against data", ylabel="samples", xlabel="mean squared error")
    n = len(shift["errors"])
    for (name, color), part in zip(colors.items(), (points[:n], points[n:]), strict=True):
        middle.scatter(*part.T, s=1.5, color=color, alpha=0.5, lw=0, label=name)
    for i, (name, color) in enumerate(colors.items()):
        middle.annotate(name, (1, 1), (0, 3 - 8 * i), "axes fraction", "offset points",
                        ha="right", va="top", color=color)  # fmt: skip
    middle.set(title="(b) states and actions, t-SNE", xticks=[], yticks=[])
    draw_scores(right, shift, colors)
    cfg = shift["cfg"]
    surround(figure, f"{cfg.name}, {cfg.env}, seed {cfg.seed}, data: {Path(cfg.data).name}; "
             f"{cfg.offline_iterations:,} offline updates, {cfg.online_iterations:,} online steps; "
             f"{n:,} offline and {n:,} online samples, (c) up to the 99th percentile.")  # fmt: skip
    return figure


# --- Files and command line ---


def write(figure: Figure, path: Path):
    """Write a picture, whole or not at all; a PNG with 256 colours, a third of the size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, pixels = path.with_suffix(".tmp"), io.BytesIO()
    if path.suffix == ".png":
        figure.savefig(pixels, format="png")
        image = Image.open(pixels).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        image.save(partial, format="png", optimize=True)
    else:
        figure.savefig(partial, format=path.suffix[1:])
    os.replace(partial, path)


def draw(name: str, records: list[Record]) -> tuple[Figure | None, str]:
    """A figure and what it lacks, or None and what is missing for it."""
    plan = FIGURES[name]
    panels = panels_of(plan, records)
    if not panels:
        others = " or ".join(plan.others)
        link = "or" if plan.alone else "and, on the same task,"
        return None, f"not drawn, needs runs of {plan.main} {link} {others}"
    figure = (draw_study if plan.paired else draw_curves)(plan, panels)
    absent = [m for m in plan.labels if not any(m in runs for runs in panels.values())]
    tasks = f"{len(panels)} of {len(plan.tasks)} tasks"
    return figure, tasks + (f", without {', '.join(absent)}" if absent else "")


def draw_one_run(run_dir: Path, names: list[str], write_figure) -> int:
    """Fig. 1; the other figures need more than a run. Gives how many were drawn."""
    for name in names[names[0] == "1" :]:
        print(f"figure {name}: not drawn, needs a runs directory or records, not one run")
    if names[0] != "1":
        return 0
    if not (run_dir / "summary.yaml").exists():
        raise ValueError(f"{run_dir} is no finished run; give the same command again to go on")
    tsne()  # before the long part
    shift = shift_of(run_dir)
    write_figure("1", draw_shift(shift, embed(shift["offline"], shift["online"])), "complete")
    return 1


def draw_many(path: Path, names: list[str], write_figure) -> int:
    """The figures of many runs, with a line for each; gives how many were drawn."""
    drawn, records = 0, read_records(path)
    for name in names:
        if name == "1":
            print("figure 1: not drawn, needs the directory of one finished DARE run as PATH")
            continue
        try:
            figure, note = draw(name, records)
        except ValueError as e:
            figure, note = None, f"not drawn, {e}"
        if figure is None:
            print(f"figure {name}: {note}")
        else:
            write_figure(name, figure, note)
            drawn += 1
    return drawn


def main():
    """Draw what can be drawn, with a line for every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="runs directory, records, or one run (Fig. 1)")
    parser.add_argument("--figure", help=f"of {', '.join(['1', *FIGURES])}; default: all")
    parser.add_argument("--output", type=Path, default=HERE / "figures")
    parser.add_argument("--format", choices=["png", "pdf"], default="png")
    args = parser.parse_args()
    one_run = (args.path / "config.yaml").exists()
    known = ["1", *FIGURES]
    wanted = args.figure.split(",") if args.figure else ["1"] if one_run else known
    names = [name for name in known if name in wanted or name.split("-")[0] in wanted]
    if unknown := [x for x in wanted if x not in known]:
        sys.exit(f"error: no figure {', '.join(unknown)}; there are {', '.join(known)}")

    def write_figure(name: str, figure: Figure, note: str):
        path = args.output / f"figure_{name.replace('-', '_')}.{args.format}"
        write(figure, path)
        print(f"figure {name}: {path}, {note}", flush=True)

    try:
        with matplotlib.style.context(STYLE):
            drawn = (draw_one_run if one_run else draw_many)(args.path, names, write_figure)
    except (OSError, ValueError) as e:
        sys.exit(f"error: {e}")
    if not drawn:
        sys.exit(f"error: nothing was drawn from {args.path}; the lines above say what is missing")


if __name__ == "__main__":
    main()
