"""results/figures.py: what is drawn, from synthetic records and from one tiny run."""

import importlib
import shlex
import sys
from pathlib import Path

import matplotlib.colors
import matplotlib.style
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

import dare_iql

RESULTS = Path(__file__).parents[2] / "results"
DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
HOPPER, MAZE = "hopper-medium-v2", "antmaze-umaze-v2"
STEPS = [0, 50, 100]


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    module = importlib.import_module("figures")
    with matplotlib.style.context(module.STYLE):
        yield module


def level(method, env, seed):
    """A number of the run's own, so that means can be told apart."""
    return sum(map(ord, method)) % 17 + len(env) + seed**2


def record(figures, method, env, seed, **settings):
    base = level(method, env, seed)
    rows = [{"phase": "offline", "step": x, "normalized_score": x / 10 + seed} for x in (20, 40)]
    rows += [{"phase": "online", "step": x, "normalized_score": base + x / 10} for x in STEPS]
    train = [{"phase": "offline", "step": 40, "q": 1.0}, {"phase": "online", "step": 10}]
    if method.startswith("dare") and "no_exchange" not in method:
        train += [
            {
                "phase": "online",
                "step": x,
                "exchanged": base + x,
                "mu_offline": base,
                "mu_online": x,
            }
            for x in STEPS[1:]
        ]
    sizes = {"offline_iterations": 40.0, "online_iterations": 100.0, "batch_size": 256.0}
    settings = {"data": "regenerated"} | sizes | settings
    return figures.Record(method, env, seed, settings, rows, train)


def all_records(figures, tasks=(HOPPER, MAZE), seeds=(0, 1, 3)):
    methods = dict.fromkeys(m for plan in figures.FIGURES.values() for m in plan.labels)
    return [record(figures, m, env, s) for m in methods for env in tasks for s in seeds]


def write_records(figures, records, folder):
    importlib.import_module("collect").write_records(records, folder)
    return folder


def program(figures, monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, args)])
    figures.main()


def lines_of(ax):
    return {line.get_label(): line for line in ax.lines}


def titles_of(figure):
    return [ax.get_title(loc="left") for ax in figure.axes]


def visible_texts(figure):
    """All texts of a drawn figure but those of ticks beyond the axes, which are not drawn."""
    beyond = [
        label
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    ]
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    return [t for t in texts if t not in beyond]


CURVES = "2 3 3-iql 4 5 6 7 8 9 10 11 12 13 14 sign".split()


@pytest.mark.parametrize("name", CURVES)
def test_curves_are_means_over_seeds(figures, name):
    plan = figures.FIGURES[name]
    figure, note = figures.draw(name, all_records(figures))
    tasks = [env for env in (HOPPER, MAZE) if env in plan.tasks]
    assert note == f"{len(tasks)} of {len(plan.tasks)} tasks"
    assert titles_of(figure) == [env.removesuffix("-v2") for env in tasks]
    for ax, env in zip(figure.axes, tasks, strict=True):
        lines = lines_of(ax)
        for method, label in plan.labels.items():
            base = np.mean([level(method, env, seed) for seed in (0, 1, 3)])
            expected = {
                "score": [base, base + 5, base + 10],
                "exchanged": [base + 50, base + 100],
                "sign": [50 - base, 100 - base],
            }[plan.quantity]
            line = lines[label]
            np.testing.assert_allclose(line.get_ydata(), expected)
            np.testing.assert_allclose(line.get_xdata(), STEPS[-len(expected) :])
            assert line.get_color() == figures.style_of(method)[1]
        assert sorted(t.get_text() for t in ax.texts) == sorted(plan.labels.values())
    (text,) = [t.get_text() for t in figure.texts if "seeds" in t.get_text()]
    sizes = "regenerated data; 40 offline updates, 100 online steps, batches of 256."
    assert f"3 seeds; {sizes}" in text.replace("\n", " ").replace("\xa0", " ")


def test_the_band_is_the_bootstrap_interval(figures):
    runs = [record(figures, "iql", HOPPER, seed) for seed in range(4)]
    steps, mean, band = figures.mean_and_band(runs, "score")
    low, high = figures.interval(np.array([level("iql", HOPPER, s) for s in range(4)]), 2_000)
    np.testing.assert_allclose(band, [low + steps / 10, high + steps / 10])
    assert (band[0] < mean).all() and (mean < band[1]).all()


def test_offline_phase_left_of_the_switch(figures):
    """Shared offline agents are one grey line; an agent of its own keeps its colour."""
    records = [record(figures, m, HOPPER, 1) for m in ("cql", "cal_ql", "dare_cql")]
    for row in records[0].eval[:2]:
        row["normalized_score"] += 7
    figure, note = figures.draw("5", records)
    assert note == "1 of 9 tasks, without edis_cql"
    lines = lines_of(figure.axes[0])
    own, shared = lines["_offline CQL"], lines["_offline Cal-QL, DARE-C"]
    np.testing.assert_allclose(own.get_xdata(), [-12.5, 0])  # 40 updates in a quarter of 100 steps
    np.testing.assert_allclose(own.get_ydata(), [10, 12])
    np.testing.assert_allclose(shared.get_ydata(), [3, 5])
    assert own.get_color() == figures.BASELINES["cql"][1] and shared.get_color() == "0.45"
    assert "1 seed;" in figure.texts[0].get_text()
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["0.05k", "0.1k", "offline"]


@pytest.mark.parametrize("n", [1, 4, 13])
@pytest.mark.parametrize("name", ["3", "5", "9", "sign", "study"])
def test_no_text_is_cut_or_covered(figures, name, n):
    """At any number of tasks; the lines of the first two seeds end close together."""
    figure, _ = figures.draw(name, all_records(figures, figures.TASKS[:n], (0, 1)))
    figure.draw_without_rendering()
    texts = visible_texts(figure)
    shown = {t.get_text() for t in texts}
    tasks = {env.removesuffix("-v2") for env in figures.FIGURES[name].tasks} & set(
        titles_of(figure)
    )
    assert tasks and tasks <= shown
    width, height = figure.bbox.size
    boxes = [t.get_window_extent() for t in texts]
    for i, (box, text) in enumerate(zip(boxes, texts, strict=True)):
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text
        inner = box.from_bounds(box.x0, box.y0 + box.height / 6, box.width, box.height * 2 / 3)
        assert not [texts[k] for k in range(i) if inner.overlaps(boxes[k])], text


def test_spread_keeps_order_and_distance(figures):
    found = figures.spread(np.array([5.0, 1.0, 5.1, 30.0]), 2.0)
    np.testing.assert_allclose(found, [4.05, 1.0, 6.05, 30.0])
    np.testing.assert_allclose(figures.spread(np.zeros(3), 3.0), [-3, 0, 3])


@pytest.mark.parametrize("name", ["study", "study-cql"])
def test_study_shows_paired_differences(figures, name):
    plan = figures.FIGURES[name]
    records = all_records(figures)
    absent = ("iql", "cql")
    # These lack seed 0 on one task, one variant all of it.
    records = [r for r in records if (r.method in absent, r.env, r.seed) != (True, MAZE, 0)]
    alone = plan.others[-1]
    records = [r for r in records if (r.method, r.env) != (alone, MAZE)]
    figure, _ = figures.draw(name, records)
    assert titles_of(figure) == ["hopper-medium", "antmaze-umaze", "all tasks"]
    rows = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert rows == [plan.labels[m] for m in plan.others]
    for ax, tasks in zip(figure.axes, ([HOPPER], [MAZE], [HOPPER, MAZE]), strict=True):
        assert (plan.labels[alone] in lines_of(ax)) == (tasks == [HOPPER])
        for method in plan.others[:-1]:
            gap = np.mean([np.mean([level(method, t, s) - level(plan.main, t, s) for s in seeds])
                           for t in tasks
                           for seeds in [(1, 3) if method in absent and t == MAZE else (0, 1, 3)]
                           ])  # fmt: skip
            line = lines_of(ax)[plan.labels[method]]
            np.testing.assert_allclose(line.get_xdata(), [gap], atol=1e-12)
            assert list(line.get_ydata()) == [plan.others.index(method)]
    with pytest.raises(ValueError, match="no variant has a seed in common with dare"):
        figures.draw(name, [r for r in records if (r.method == plan.main) == (r.seed == 1)])


def test_small_print_names_the_tasks_of_each_size(figures):
    def text(maze):
        records = [record(figures, m, HOPPER, s) for m in ("iql", "dare_iql") for s in (0, 1)]
        records += [
            record(figures, m, MAZE, s, **maze) for m in ("iql", "dare_iql") for s in (0, 1)
        ]
        figure, _ = figures.draw("study", records)
        return figure.texts[0].get_text().replace("\n", " ").replace("\xa0", " ")

    assert "hopper" not in text({})
    assert (
        "hopper-medium: 40 offline updates, 100 online steps, batches of 256; "
        "antmaze-umaze: 80 offline updates, 100 online steps, batches of 256."
    ) in text({"offline_iterations": 80.0})


def test_main_draws_what_it_can(figures, tmp_path, monkeypatch, capsys):
    runs = [record(figures, m, HOPPER, s) for m in ("iql", "dare_iql") for s in (0, 1)]
    folder = write_records(figures, runs, tmp_path / "records")
    program(figures, monkeypatch, folder, "--output", tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + len(figures.FIGURES)
    drawn = sorted(x.name for x in (tmp_path / "out").iterdir())
    assert drawn == [f"figure_{x}.png" for x in ("2", "7", "9", "sign", "study")]
    assert f"figure 7: {tmp_path}/out/figure_7.png, 1 of 9 tasks, without pex, edis_iql" in said
    missing = "needs runs of dare_cql and, on the same task, cql or cal_ql or edis_cql"
    assert f"figure 5: not drawn, {missing}" in said
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as image:
            assert image.size[0] > 500 and len(image.getcolors(256)) > 10
    program(
        figures, monkeypatch, folder, "--figure", "3,7", "--format", "pdf", "--output", tmp_path
    )
    assert (tmp_path / "figure_7.pdf").read_bytes()[:5] == b"%PDF-"
    assert capsys.readouterr().out.startswith("figure 3: not drawn, needs runs of dare_cql and")


def test_errors_are_one_line(figures, tmp_path, monkeypatch, capsys):
    runs = [record(figures, m, HOPPER, 0) for m in ("iql", "dare_iql")]
    folder = write_records(figures, runs, tmp_path / "records")
    for args, message in [
        ((folder, "--figure", "5"), "error: nothing was drawn from .*; the lines above say"),
        ((folder, "--figure", "1"), "error: nothing was drawn from"),
        ((folder, "--figure", "99,7"), r"error: no figure 99; there are 1, 2, 3, 3-iql"),
        ((tmp_path,), "error: .* has neither finished runs nor runs.csv"),
    ]:
        with pytest.raises(SystemExit, match=message) as stop:
            program(figures, monkeypatch, *args, "--output", tmp_path)
        assert "\n" not in str(stop.value)
    assert (
        "figure 1: not drawn, needs the directory of one finished DARE" in capsys.readouterr().out
    )
    runs[1].settings["online_iterations"] = 200.0
    with pytest.raises(ValueError, match=f"iql, dare_iql on {HOPPER} differ in data, updates"):
        figures.draw("7", runs)
    mixed = [*runs, record(figures, "dare_cql", HOPPER, 0, data="d4rl")]
    folder = write_records(figures, mixed, tmp_path / "mixed")
    program(figures, monkeypatch, folder, "--figure", "7,9", "--output", tmp_path)  # 9 may mix
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"figure 7: not drawn, iql, dare_iql on {HOPPER} differ in data")
    assert (
        said[1].startswith(f"figure 9: {tmp_path / 'figure_9.png'}, 1 of 13 tasks")
        and said[2:] == []
    )
    runs[1].settings["online_iterations"] = 100.0
    other = record(figures, "iql", HOPPER, 1)
    del other.eval[-1]
    with pytest.raises(ValueError, match=f"seeds of iql on {HOPPER} were logged at different"):
        figures.draw("7", [*runs, other])


def test_every_method_has_a_colour_of_its_own_in_each_figure(figures):
    for name, plan in figures.FIGURES.items():
        colors = [figures.style_of(method)[1] for method in plan.labels]
        assert len(set(colors)) == len(colors) == len(set(plan.labels.values())), name
        assert all(matplotlib.colors.is_color_like(color) for color in colors)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished DARE-I run of 60 online steps."""
    folder = tmp_path_factory.mktemp("runs")
    args = f"""--env {HOPPER} --data '{DATA}' --wandb disabled --device cpu --hidden_dim 8
        --batch_size 32 --offline_iterations 10 --online_iterations 60 --n_episodes 1
        --initial_collection_steps 40 --behavior_iterations 10 --energy_iterations 5
        --behavior_batch_size 16 --behavior_width 8 --energy_hidden 8 --energy_batch_size 8
        --n_support 2 --n_support_states 30 --diffusion_steps 4 --runs_dir '{folder}'"""
    dare_iql.main(shlex.split(args))
    return folder / "dare_iql" / HOPPER / "seed_0"


def test_figure_1_but_for_tsne(figures, run):
    shift = figures.shift_of(run)
    n = 60  # the online rows; the data has more
    shapes = {k: shift[k].shape for k in ("errors", "offline_scores", "online_scores")}
    assert set(shapes.values()) == {(n,)} and shift["offline"].shape == (n, 11 + 3)
    np.testing.assert_allclose(shift["offline"].mean(0), 0, atol=1e-4)
    deviations = shift["offline"].std(0)
    assert ((abs(deviations - 1) < 1e-3) | (deviations == 0)).all()
    # Actions back in their own units are the online buffer's.
    state = dare_iql.load(run / "checkpoint.pt")
    actions = state["online_buffer"]["rows"][:, 11:14].numpy()
    standard = (actions - actions.mean(0)) / actions.std(0)
    found = shift["online"][:, 11:]
    found = (found - found.mean(0)) / found.std(0)
    np.testing.assert_allclose(np.sort(found, 0), np.sort(standard, 0), atol=1e-3)
    assert (shift["errors"] > 0).all() and shift["errors"].max() <= 4
    means = shift["offline_scores"].mean(), shift["online_scores"].mean()
    assert min(means) <= shift["tau"] <= max(means)
    figure = figures.draw_shift(shift, np.random.default_rng(0).normal(size=(2 * n, 2)))
    left, middle, right = figure.axes
    assert sum(bar.get_height() for bar in left.patches) == n
    assert [len(points.get_offsets()) for points in middle.collections] == [n, n]
    lines = lines_of(right)
    assert lines["tau"].get_xdata()[0] == shift["tau"]
    for name in ("offline", "online"):
        scores, x = shift[f"{name}_scores"], lines[f"fit, {name}"].get_xdata()
        density = np.exp(-((x - scores.mean()) ** 2) / 2 / scores.var()) / scores.std()
        np.testing.assert_allclose(
            lines[f"fit, {name}"].get_ydata(), density / np.sqrt(2 * np.pi), rtol=1e-4
        )
    assert f"{HOPPER}, seed 0, data: {DATA.name}; 10 offline updates" in figure.texts[0].get_text()


def test_the_offline_agent_is_not_the_fine_tuned_one(figures, run):
    """The error is of the cached agent, and without the cache there is one line, no training."""
    errors = figures.shift_of(run)["errors"]
    (cache,) = (run.parents[2] / "cache").glob("iql-*.pt")
    state = dare_iql.load(cache)
    away = cache.rename(cache.with_suffix(".away"))
    with pytest.raises(SystemExit, match="error: .*iql-.* is missing; bring back the cache"):
        figures.shift_of(run)
    last = [k for k in state["agent"]["actor"] if k.endswith("weight")][-1]
    state["agent"]["actor"][last] *= 0
    dare_iql.save(cache, state)
    changed = figures.shift_of(run)["errors"]
    away.rename(cache)
    assert not np.allclose(errors, changed)


def test_figure_1_from_the_command_line(figures, run, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="error: nothing was drawn from"):
        program(figures, monkeypatch, run, "--figure", "7", "--output", tmp_path)
    said = capsys.readouterr().out
    assert said == "figure 7: not drawn, needs a runs directory or records, not one run\n"
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(SystemExit, match=r"error: Fig. 1 \(b\) needs scikit-learn; run pip"):
        program(figures, monkeypatch, run, "--output", tmp_path)
    monkeypatch.undo()
    summary = run / "summary.yaml"
    away = summary.rename(run / "away.yaml")
    monkeypatch.syspath_prepend(RESULTS)
    with pytest.raises(SystemExit, match="error: .* is no finished run"):
        program(figures, monkeypatch, run, "--output", tmp_path)
    away.rename(summary)


def test_figure_1_with_tsne(figures, run, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    program(figures, monkeypatch, run, "--output", tmp_path)
    with Image.open(tmp_path / "figure_1.png") as image:
        assert image.size[0] == 1400
    rows = np.random.default_rng(0).normal(size=(40, 5))
    points = figures.embed(rows[:20], rows[20:] + 10)
    assert points.shape == (40, 2)
    centres = points[:20].mean(0), points[20:].mean(0)
    spread = points[:20].std(0).max()
    assert np.linalg.norm(centres[0] - centres[1]) > 2 * spread  # two clusters stay apart
