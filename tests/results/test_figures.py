"""results/figures.py: what is drawn, from synthetic records."""

import sys

import matplotlib.colors
import matplotlib.style
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image
from synthetic import MAZE, H, exchange_rows, flat, run, write_runs

import figures
from lib.experiments import METHODS, PICTURES, TASKS
from lib.statistics import t_interval

STEPS = [0, 50, 100]


@pytest.fixture(autouse=True)
def style():
    with matplotlib.style.context(figures.STYLE):
        yield


def level(method, env, seed):
    """A number of the run's own, so that means can be told apart."""
    return sum(map(ord, method)) % 17 + len(env) + seed**2


def record(method, env, seed, **settings):
    base = level(method, env, seed)
    train = [{"phase": "offline", "step": 40, "q": 1.0}, {"phase": "online", "step": 10}]
    if method.startswith("dare") and "no_exchange" not in method:
        train += [
            {"phase": "online", "step": x, "exchanged": base + x, "mu_offline": base,
             "mu_online": x, "auc": base / 100}
            for x in STEPS[1:]
        ]  # fmt: skip
    sizes = {"offline_iterations": 40, "online_iterations": 100, "eval_freq": 50}
    return run(method, env, seed, [base + x / 10 for x in STEPS], train, **sizes | settings)


def all_records(tasks=(H, MAZE), seeds=(0, 1, 3)):
    methods = dict.fromkeys(m for plan in PICTURES.values() for m in plan.methods)
    return [record(m, env, s) for m in methods for env in tasks for s in seeds]


def program(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, args)])
    figures.main()


def lines_of(ax):
    return {line.get_label(): line for line in ax.lines}


def titles_of(figure):
    return [ax.get_title(loc="left") for ax in figure.axes]


def small_print(figure):
    return figure.get_supxlabel().replace("\n", " ")


@pytest.mark.parametrize(
    "name", [k for k, x in PICTURES.items() if x.shows != "differences" and H in x.tasks]
)
def test_curves_are_means_over_seeds(name):
    plan = PICTURES[name]
    figure, note = figures.draw(name, all_records())
    tasks = [env for env in (H, MAZE) if env in plan.tasks]
    assert note == f"{len(tasks)} of {len(plan.tasks)} tasks"
    assert titles_of(figure) == [env.removesuffix("-v2") for env in tasks]
    for ax, env in zip(figure.axes, tasks, strict=True):
        for method in plan.methods:
            base = np.mean([level(method, env, seed) for seed in (0, 1, 3)])
            expected = {
                "score": [base, base + 5, base + 10],
                "exchanged": [base + 50, base + 100],
                "sign": [50 - base, 100 - base],
                "auc": [base / 100, base / 100],
            }[plan.shows]
            line = lines_of(ax)[METHODS[method].label]
            np.testing.assert_allclose(line.get_ydata(), expected)
            np.testing.assert_allclose(line.get_xdata(), STEPS[-len(expected) :])
            assert line.get_color() == METHODS[method].color
    (legend,) = figure.legends
    assert {t.get_text() for t in legend.texts} == {METHODS[m].label for m in plan.methods}
    sizes = "40 offline updates, 100 online steps, batches of 256, layers of 256."
    assert f"3 seeds; data regenerated (200,000 transitions), {sizes}" in small_print(figure)


def test_a_dotted_line_says_where_updates_begin():
    records = [record(m, H, 0, initial_collection_steps=n) for m, n in (("iql", 30), ("pex", 20))]
    plan = PICTURES["fig7"]
    text = figures.caption(plan, figures.panels_of(plan, records))
    assert "updates begin at the dotted line" in text
    (ax, *_) = figures.draw_curves(plan, figures.panels_of(plan, records)).axes
    assert [x.get_xdata()[0] for x in ax.lines if x.get_linestyle() == ":"] == [20]
    none = figures.panels_of(plan, [record(m, H, 0) for m in ("iql", "pex")])
    assert "dotted" not in figures.caption(plan, none)


def test_the_band_of_few_seeds_is_their_range():
    levels = [3.0, 7.0, 8.0]
    _, mean, band = figures.mean_and_band(flat("iql", H, levels), "score")
    np.testing.assert_allclose(mean, 6.0)
    np.testing.assert_allclose(band, [[3.0] * 5, [8.0] * 5])
    plan = figures.PICTURES["fig7"]
    texts = []
    for n in (3, 4):
        records = flat("pex", H, [1.0] * n) + flat("dare_iql", H, [2.0] * 5)
        texts.append(figures.caption(plan, figures.panels_of(plan, records)))
    assert "Mean and the range of the seeds, from four on a 95% t interval; 3 to 5" in texts[0]
    assert "Mean and 95% t interval; 4 to 5 seeds" in texts[1]


def test_differences_are_drawn_with_their_t_intervals():
    values = {"iql": [1, 2, 4], "dare_iql": [9, 5, 2]}
    found = [run(m, H, s, [x] * 5) for m, xs in values.items() for s, x in enumerate(xs)]
    figure, _ = figures.draw("differences-iql", found)
    color = METHODS["iql"].color
    lines = [x for x in figure.axes[0].lines if x.get_color() == color and len(x.get_xdata()) == 2]
    (line,) = lines
    np.testing.assert_allclose(line.get_xdata(), t_interval([np.subtract(*values.values())]))


def test_the_drawn_band_is_that_of_mean_and_band():
    found = [run(m, H, s, [s, 1 + 2 * s]) for m in ("iql", "dare_iql") for s in range(4)]
    figure, _ = figures.draw("fig7", found)
    _, _, (low, high) = figures.mean_and_band(found[:4], "score")
    (path,) = figure.axes[0].collections[0].get_paths()
    y = path.vertices[:, 1]
    assert (y.min(), y.max()) == pytest.approx((low.min(), high.max()))
    assert figure.axes[0].xaxis.get_major_formatter()(50_000, 0) == "50k"


@pytest.mark.parametrize("name, level", [("auc", 0.5), ("sign", 0.0)])
def test_a_line_says_where_there_is_no_difference(name, level):
    train = [row | {"auc": 0.4} for row in exchange_rows([(1, 2, 3), (2, 1, 4)])]
    figure, _ = figures.draw(name, [run("dare_iql", H, s, [1], train) for s in (0, 1)])
    flat = [x for x in figure.axes[0].lines if len(x.get_ydata()) == 2 and x.get_color() == "0.4"]
    assert list(flat[0].get_ydata()) == [level, level]


def test_the_band_is_the_t_interval():
    runs = [record("iql", H, seed) for seed in range(4)]
    steps, mean, band = figures.mean_and_band(runs, "score")
    levels = np.array([level("iql", H, seed) for seed in range(4)])
    low, high = t_interval([levels])
    np.testing.assert_allclose(band, [low + steps / 10, high + steps / 10])
    assert (band[0] < mean).all() and (mean < band[1]).all()
    _, mean, band = figures.mean_and_band(runs[:1], "score")  # one run has no spread
    np.testing.assert_array_equal(band, [mean, mean])


@pytest.mark.parametrize("n", [1, 13])
@pytest.mark.parametrize("name", ["fig5", "fig9", "differences-iql"])
def test_no_text_is_cut_or_covered(name, n):
    figure, _ = figures.draw(name, all_records(list(TASKS)[:n], (0, 1)))
    figure.draw_without_rendering()
    beyond = [
        label
        for ax in figure.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    ]
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    texts = [t for t in texts if t not in beyond]
    tasks = {env.removesuffix("-v2") for env in PICTURES[name].tasks} & set(titles_of(figure))
    assert tasks and tasks <= {t.get_text() for t in texts}
    width, height = figure.bbox.size
    boxes = [t.get_window_extent() for t in texts]
    for i, (box, text) in enumerate(zip(boxes, texts, strict=True)):
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text
        inner = box.from_bounds(box.x0, box.y0 + box.height / 6, box.width, box.height * 2 / 3)
        assert not [texts[k] for k in range(i) if inner.overlaps(boxes[k])], text


@pytest.mark.parametrize("name", ["differences-iql", "differences-cql"])
def test_paired_differences(name):
    *others, dare = PICTURES[name].methods
    first, *_, alone = others
    records = all_records()
    # The first lacks seed 0 on one task, the last all of it.
    records = [r for r in records if (r.method, r.env, r.seed) != (first, MAZE, 0)]
    records = [r for r in records if (r.method, r.env) != (alone, MAZE)]
    figure, _ = figures.draw(name, records)
    assert titles_of(figure) == ["hopper-medium", "antmaze-umaze", "all tasks"]
    rows = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert rows == [METHODS[m].label for m in others]
    for ax, tasks in zip(figure.axes, ([H], [MAZE], [H, MAZE]), strict=True):
        assert (METHODS[alone].label in lines_of(ax)) == (tasks == [H])
        for method in others[:-1]:
            gap = np.mean([np.mean([level(method, t, s) - level(dare, t, s) for s in seeds])
                           for t in tasks
                           for seeds in [(1, 3) if (method, t) == (first, MAZE) else (0, 1, 3)]
                           ])  # fmt: skip
            line = lines_of(ax)[METHODS[method].label]
            np.testing.assert_allclose(line.get_xdata(), [gap], atol=1e-12)
            assert list(line.get_ydata()) == [others.index(method)]
    with pytest.raises(ValueError, match=f"no method has a seed in common with {dare}"):
        figures.draw(name, [r for r in records if (r.method == dare) == (r.seed == 1)])


def test_small_print_names_the_tasks_or_methods_of_each_size():
    def text(name, method, **other):
        records = [record(m, H, s) for m in ("iql", "dare_iql") for s in (0, 1)]
        figure, _ = figures.draw(name, records + [record(m, MAZE, 0, **other) for m in method])
        return small_print(figure)

    both = "iql", "dare_iql"
    assert "hopper" not in text("differences-iql", both)
    found = text("differences-iql", both, offline_iterations=80)
    assert "hopper-medium: data regenerated (200,000 transitions), 40 offline updates" in found
    assert "antmaze-umaze: data regenerated (200,000 transitions), 80 offline updates" in found
    records = [record("dare_iql", H, 0), record("dare_cql", H, 0, offline_iterations=80)]
    found = small_print(figures.draw("fig9", records)[0])  # which may mix sizes
    assert "DARE-C on hopper-medium: data regenerated (200,000 transitions), 80 offline" in found


def test_main_draws_what_it_can(tmp_path, monkeypatch, capsys):
    runs = [record(m, H, s) for m in ("iql", "dare_iql") for s in (0, 1)]
    folder = write_runs(runs, tmp_path / "runs")
    program(monkeypatch, folder, "--output", tmp_path / "out")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(PICTURES)
    drawn = sorted(x.name for x in (tmp_path / "out").iterdir())
    names = "auc", "differences-iql", "fig2", "fig7", "fig9", "full_size", "sign"
    assert {f"{x}.png" for x in names} <= set(drawn)
    assert not {"fig5.png", "fig6.png", "differences-cql.png"} & set(drawn)
    assert f"fig7: {tmp_path}/out/fig7.png, 1 of 9 tasks, without pex, edis_iql" in said
    assert (
        "fig5: not drawn, needs runs of two of cql, cal_ql, edis_cql, dare_cql on one task" in said
    )
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as image:
            assert image.size[0] > 500 and len(image.getcolors(256)) > 10
    args = ["--figure", "fig3,fig7", "--format", "pdf", "--output", tmp_path]
    program(monkeypatch, folder, *args)
    assert (tmp_path / "fig7.pdf").read_bytes()[:5] == b"%PDF-"


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    runs = [record(m, H, 0) for m in ("iql", "dare_iql")]
    folder = write_runs(runs, tmp_path / "runs")
    for args, message in [
        ((folder, "--figure", "fig5"), "error: nothing was drawn from .*; the lines above say"),
        ((folder, "--figure", "fig99,fig7"), "error: no figure fig99; there are fig2, fig3"),
        ((tmp_path / "no",), "error: .* has neither finished runs nor runs.csv"),
    ]:
        with pytest.raises(SystemExit, match=message) as stop:
            program(monkeypatch, *args, "--output", tmp_path)
        assert "\n" not in str(stop.value)
    runs[1].settings["hidden_dim"] += 1
    with pytest.raises(ValueError, match=f"iql, dare_iql on {H} differ in data or sizes"):
        figures.draw("fig7", runs)
    runs[1].settings["hidden_dim"] -= 1
    other = record("iql", H, 1)
    del other.eval[-1]
    with pytest.raises(ValueError, match=f"seeds of iql on {H} were logged at different"):
        figures.draw("fig7", [*runs, other])


def test_a_shorter_run_has_a_shorter_curve():
    long, short = record("iql", H, 0), record("dare_iql", H, 0)
    short = short.until(short.eval[-2]["step"])
    figure, _ = figures.draw("fig7", [long, short])
    drawn = lines_of(figure.axes[0])
    ends = [drawn[label].get_xdata()[-1] for label in ("IQL", "DARE-I")]
    assert ends == [record.scores()[0][-1] for record in (long, short)] and ends[0] > ends[1]
    text = small_print(figure)
    assert "100 online steps" in text and "shorter curves are of fewer online steps" in text


def test_every_method_has_a_colour_of_its_own_in_each_figure():
    for name, plan in PICTURES.items():
        colors = [METHODS[method].color for method in plan.methods]
        assert len(set(colors)) == len(colors), name
        assert all(matplotlib.colors.is_color_like(color) for color in colors)
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
