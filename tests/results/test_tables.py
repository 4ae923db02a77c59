"""The tables of results/: numbers by hand, intervals by another bootstrap, formats, refusals."""

import csv
import importlib
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

RESULTS = Path(__file__).parents[2] / "results"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(RESULTS)  # its programs are no package
    cells, claims, collect, pairs, tables = map(
        importlib.import_module, ("cells", "claims", "collect", "pairs", "tables")
    )
HC, H, W = (f"{robot}-medium-v2" for robot in ("halfcheetah", "hopper", "walker2d"))
PAPER = {"data": "d4rl", "offline_iterations": 1_000_000, "online_iterations": 200_000}
SMALL = {"data": "regenerated", "offline_iterations": 20_000, "online_iterations": 40_000}
SIZES = "data regenerated (200,000 transitions), 20,000 offline updates, 40,000 online steps, "
SIZES += "batches of 256, layers of 256"


def run(method, env, seed, scores, offline=(), train=(), **settings):
    """A record whose online evaluations lie evenly between step 0 and the last."""
    settings = (
        SMALL | {"regenerated_size": 200_000, "batch_size": 256, "hidden_dim": 256} | settings
    )
    steps = np.linspace(0, settings["online_iterations"], len(scores))
    rows = [{"phase": "offline", "step": i, "normalized_score": x} for i, x in enumerate(offline)]
    rows += [{"phase": "online", "step": s, "normalized_score": float(x)}
             for s, x in zip(steps, scores, strict=True)]  # fmt: skip
    return collect.Record(method, env, seed, settings, rows, list(train))


def flat(method, env, values, **settings):
    """Runs with a constant score each, seeds 0, 1, ..."""
    return [run(method, env, i, [x] * 5, **settings) for i, x in enumerate(values)]


def command(monkeypatch, capsys, folder, records, *args):
    collect.write_records(records, folder)
    monkeypatch.setattr(sys, "argv", ["tables", str(folder), *map(str, args)])
    tables.main()
    return capsys.readouterr().out


def refusal(monkeypatch, capsys, *args):
    with pytest.raises(SystemExit) as e:
        command(monkeypatch, capsys, *args)
    assert str(e.value).startswith("error: ") and "\n" not in str(e.value)
    return str(e.value)


# --- The paper's numbers ---


def paper():
    with open(RESULTS / "paper.csv", newline="") as f:
        return {(r["table"], r["method"], r["task"]): r for r in csv.DictReader(f)}


def test_the_papers_totals_but_four_are_the_sums_of_its_tasks():
    tasks, totals = defaultdict(dict), defaultdict(dict)
    for (table, method, task), row in paper().items():
        kind = totals if task.startswith("total") else tasks
        kind[table, method][task] = float(row["mean"])
    wrong = {}
    for key, found in totals.items():
        for name, total in found.items():
            family = {"total (AM)": {True}, "total (L)": {False}}.get(name, {True, False})
            parts = [x for task, x in tasks[key].items() if task.startswith("AM") in family]
            if round(abs(sum(parts) - total), 1) > 0:
                wrong[(*key, name)] = (total, round(sum(parts), 1))
    assert wrong == {
        ("1", "edis_cql", "total"): (1200.1, 1199.9),
        ("3", "pex_utd10", "total"): (495.8, 500.0),
        ("10", "pex", "total"): (442.2, 441.7),
        ("10", "pex_utd10", "total"): (495.8, 500.0),
    }


def test_the_papers_tables_agree_but_for_four_deviations():
    numbers = {k: (float(r["mean"]), r["std"]) for k, r in paper().items()}
    assert len(numbers) == 297
    differing = {
        (a, method, task): numbers[a, method, task] + numbers[b, method, task]
        for a, b in (("1", "11"), ("3", "10"), ("2", "9"))
        for table, method, task in numbers
        if table == a and (b, method, task) in numbers and (a, task) != ("1", "total")
        and numbers[a, method, task] != numbers[b, method, task]
    }  # fmt: skip
    assert differing == {
        ("1", "dare_iql", "HC-ME"): (93.5, "2.1", 93.5, "1.0"),
        ("1", "dare_iql", "W2D-ME"): (114.7, "1.6", 114.7, "1.1"),
        ("1", "dare_iql", "H-M"): (99.8, "2.8", 99.8, "2.4"),
        ("1", "dare_iql", "W2D-M"): (92.2, "3.2", 92.2, "2.6"),
    }
    for table, method in [("2", "dare_cql"), ("2", "dare_iql"), ("9", "dare_cql")]:
        for kind in ("M", "MR", "ME"):
            parts = [numbers["1", method, f"{robot}-{kind}"][0] for robot in ("HC", "H", "W2D")]
            assert numbers[table, method, kind][0] == pytest.approx(sum(parts))


def test_the_paper_says_11_and_10_highest_scores_but_shows_12_and_9():
    numbers = paper()
    for group, count in ((tables.CQL_GROUP, 12), (tables.IQL_GROUP, 9)):
        scores = [[float(numbers["1", m, task]["mean"]) for m in group.values()]
                  for task in tables.TASKS.values()]  # fmt: skip
        assert (np.argmax(scores, 1) == 3).sum() == count


def test_every_cell_of_a_layout_has_a_number_of_the_paper():
    wanted = {
        (key, method, label)
        for key, layout in tables.LAYOUTS.items()
        for columns in layout.blocks.values()
        for method in columns.values()
        for label in layout.lines()
    }
    assert wanted == set(paper())


# --- Tables of the paper, from runs ---


def cell(records, key, heading, label, block="", **kwargs):
    rows = tables.layout_rows(pairs.by_seed(records), key, **kwargs)
    (row,) = [r for r in rows if r["dataset"] == label and r.get("method", "") == block]
    return row[heading]


def test_cell_is_mean_and_population_deviation_of_the_last_four():
    records = [run("iql", H, 0, [0, 100, 1, 2, 3, 4]), run("iql", H, 1, [9, 0, 5, 6, 7, 8])]
    found = cell(records, "1", "Base (IQL)", "H-M")
    assert (found.mean, found.std, found.seeds) == (4.5, 2.0, 2)
    assert found.text() == "4.5 ± 2.0 (2)" and found.sizes == SIZES
    assert cell(records, "8", "IQL", "H-M").mean == 4.5  # of 0 and 9
    assert cell(records, "8", "IQL", "H-M").sizes.split(", ")[-3] == "0 online steps"
    assert cell(records, "1", "Base (IQL)", "H-M", measure=pairs.best).mean == (100 + 9) / 2
    assert cell(records, "1", "PEX", "H-M") is None


def test_best_offline_evaluation():
    records = [run("cql", H, 0, [30, 99], offline=[1, 50, 30])]
    assert cell(records, "8", "CQL", "H-M", measure=pairs.best).mean == 50


def test_tables_3_and_10_stop_at_100_000_steps():
    scores = np.arange(21.0)  # one per 10,000 steps: 7, 8, 9, 10 are the last up to 100,000
    records = [run("pex", H, 0, scores, **PAPER)]
    records += [run("pex_utd10", H, 0, scores[:11], **PAPER | {"online_iterations": 100_000})]
    for heading in ("UTD=1 PEX", "UTD=10 PEX"):
        found = cell(records, "10", heading, "H-M")
        assert found.mean == 8.5 and found.sizes == cells.PAPER_SIZES[100_000]
    assert cell(records, "3", "PEX", "H-M").mean == 8.5
    assert cell(records, "1", "PEX", "H-M").mean == 18.5


def test_sums_and_totals_need_all_their_tasks():
    medium = sum((flat("dare_iql", env, x) for env, x in
                  ((HC, [1, 3]), (H, [10, 10]), (W, [100, 102, 104]))), [])  # fmt: skip
    found = cell(medium, "2", "n = inf", "M", "DARE-I")
    assert (found.mean, found.std, found.seeds) == (2 + 10 + 102, None, 2)
    assert cell(medium, "2", "n = inf", "total", "DARE-I") is None
    assert cell(medium[2:], "2", "n = inf", "M", "DARE-I") is None
    everywhere = [r for env in tables.TASKS for r in flat("dare_iql", env, [2.0, 4.0])]
    totals = {"total (L)": 27, "total (AM)": 12, "total": 39}
    assert {k: cell(everywhere, "1", "DARE-I", k).mean for k in totals} == totals
    assert cell(everywhere[2:], "1", "DARE-I", "total (L)") is None
    assert cell(everywhere[2:], "1", "DARE-I", "total (AM)").mean == 12


def test_bold_is_the_highest_mean_of_the_row_in_its_group():
    records = [r for method, x in (("iql", 1.0), ("pex", 3.0), ("dare_iql", 3.0), ("cql", 9.0),
               ("cal_ql", 8.0)) for r in flat(method, H, [x])]  # fmt: skip
    rows = tables.layout_rows(pairs.by_seed(records), "1")
    bold = {(r["dataset"], k) for r in rows for k, c in r.items()
            if isinstance(c, cells.Cell) and c.bold}  # fmt: skip
    assert bold == {("H-M", "PEX"), ("H-M", "DARE-I"), ("H-M", "Base (CQL)")}
    assert not cell(flat("iql", H, [1.0]), "1", "Base (IQL)", "H-M").bold  # alone in its row


def test_markdown_marks_other_sizes_and_leaves_missing_cells_empty(tmp_path, monkeypatch, capsys):
    records = flat("iql", H, [1, 2]) + flat("iql", W, [1, 2]) + flat("pex", H, [3], **PAPER)
    out = command(monkeypatch, capsys, tmp_path, records, "--table", "1")
    # Neither is bold: they cannot be compared.
    assert "| H-M |  |  |  |  | 1.5 ± 0.5 (2) | 3.0 ± 0.0 (1) [1] |  |  |" in out
    assert f"- Unmarked: {SIZES}.\n" in out and "- [1]: data d4rl, 1,000,000 offline" in out
    assert "not with published numbers" in out
    out = command(monkeypatch, capsys, tmp_path, flat("pex", H, [3], **PAPER), "--table", "1")
    assert "not with published numbers" not in out


def test_path_of_the_data_is_not_printed():
    records = flat("iql", H, [1], data="/somewhere/hopper-mixed.hdf5")
    found = cell(records, "1", "Base (IQL)", "H-M").sizes
    assert found.startswith("data hopper-mixed.hdf5,")
    records = flat("iql", H, [1], data="minari:mujoco/hopper/medium-v0")
    assert "minari:mujoco/hopper" in cell(records, "1", "Base (IQL)", "H-M").sizes


# --- Statistics ---


def uneven():
    rng = np.random.default_rng(3)
    return [rng.normal(mean, 2, n) for mean, n in ((0, 5), (10, 4), (30, 7))]


def test_interval_is_that_of_another_stratified_bootstrap():
    def mean(*x, axis):
        return sum(v.mean(axis) for v in x) / len(x)

    def middle_half(*x, axis):
        x = np.sort(np.concatenate(x, axis), axis)
        return x[..., 4:12].mean(axis)  # 16 runs

    for ours, other in ((pairs.mean_of_tasks, mean), (pairs.iqm, middle_half)):
        expected = stats.bootstrap(uneven(), other, n_resamples=20_000, method="percentile")
        found = pairs.bootstrap(uneven(), ours)
        assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.12)
        assert ours(uneven()) == pytest.approx(other(*uneven(), axis=-1))
    one = uneven()[:1]
    assert pairs.bootstrap(one, ours) == pytest.approx(
        (np.sort(one[0])[1], np.sort(one[0])[3]), abs=3
    )
    for strata in ([*one, np.ones(1)], []):
        assert pairs.bootstrap(strata, ours) is None and pairs.t_interval(strata) is None


def test_t_interval():
    first, second, third = uneven()
    found = pairs.t_interval([first])
    low, high = stats.t.interval(0.95, 4, first.mean(), stats.sem(first))
    assert found == pytest.approx((low, high))
    welch = stats.ttest_ind(second, -third, equal_var=False).confidence_interval(0.95)
    found = pairs.t_interval([second, third])  # of the mean of both, half of a difference
    assert found == pytest.approx((welch.low / 2, welch.high / 2))
    assert pairs.t_interval([np.ones(3), np.full(2, 5.0)]) == (3, 3)


@pytest.mark.parametrize("tasks, seeds", [(1, 2), (1, 5), (5, 5)])
def test_t_interval_covers_what_it_says(tasks, seeds):
    """Of normal differences 95% are to be covered; a percentile bootstrap covers 50, 84, 91%."""
    rng = np.random.default_rng(tasks * seeds)
    scale = np.linspace(1, 3, tasks)[:, None]
    found = [pairs.t_interval(list(rng.normal(size=(tasks, seeds)) * scale)) for _ in range(2000)]
    assert 0.935 < np.mean([low < 0 < high for low, high in found]) < 0.975


def test_interquartile_mean_is_rliables():
    pytest.importorskip("rliable", reason='needs pip install -e ".[results]"')
    from rliable import library, metrics

    scores = np.random.default_rng(0).normal([0, 10, 30], 4, (5, 3))
    np.random.seed(0)
    points, intervals = library.get_interval_estimates(
        {"a": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=5000
    )
    strata = list(scores.T)
    assert pairs.iqm(strata) == pytest.approx(points["a"][0])
    assert pairs.bootstrap(strata, pairs.iqm) == pytest.approx(intervals["a"][:, 0], abs=0.15)


def test_aggregates_pool_the_runs_of_the_tasks_that_all_methods_have():
    records = flat("iql", H, [0, 1, 2, 3]) + flat("iql", W, [4, 5, 6, 100])
    more = flat("iql", HC, [7]) + flat("pex", H, [8]) + flat("pex", W, [9])
    rows = tables.aggregate_rows(pairs.by_seed(records + more), "1")
    assert [(row["tasks"], row["runs"]) for row in rows[4:6]] == [(2, 8), (2, 2)]
    row = tables.aggregate_rows(pairs.by_seed(records), "1")[4]
    assert (row["method"], row["tasks"], row["runs"]) == ("Base (IQL)", 2, 8)
    assert row["IQM"].mean == (2 + 3 + 4 + 5) / 4
    assert row["IQM"].interval[0] < 3.5 < row["IQM"].interval[1]
    empty = tables.aggregate_rows(pairs.by_seed(records), "1")[0]
    assert (empty["tasks"], empty["runs"], empty["IQM"]) == (0, 0, None)


# --- The study ---


def test_study_pairs_by_seed_and_cuts_at_the_smaller_number_of_steps():
    records = [run("iql", H, s, [0, 1, 1, 1, 1 + 8 * s]) for s in (0, 1, 2)]
    records += [run("dare_iql", H, s, [0, 2, 2, 2, 2 + 8 * s]) for s in (1, 2, 3)]
    records += [run("dare_iql_n16", H, s, [0, 5, 5], online_iterations=20_000) for s in (1, 2)]
    records += [run("dare_iql_direct", H, 1, [7, 7], offline_iterations=5)]
    by_task, over_tasks = tables.study(pairs.by_seed(records))
    rows = {row["method"]: row for row in by_task.rows}
    assert rows["iql"]["minus baseline"] is None and rows["dare_iql"]["minus DARE"] is None
    assert rows["iql"]["last-four mean"].mean == 3 and rows["iql"]["best"].mean == 9
    found = rows["dare_iql"]["minus baseline"]
    assert (found.mean, found.seeds, found.interval) == (1, 2, (1, 1))
    assert found.text() == "+1.0 (2); +1.0 to +1.0"
    found = rows["dare_iql_n16"]  # 5 against 1 and 2, the means up to step 20,000
    assert (found["minus baseline"].mean, found["minus DARE"].mean) == (4, 3)
    assert found["minus DARE"].sizes.split(", ")[-3] == "20,000 online steps"
    assert rows["dare_iql_direct"]["minus DARE"] is None  # another offline agent
    total = {row["method"]: row for row in over_tasks.rows}["dare_iql"]
    assert total["tasks (minus baseline)"] == 1 and total["minus baseline"].mean == 1


def test_aggregate_difference_weighs_tasks_alike():
    records = flat("cal_ql", H, [0, 0]) + flat("dare_cql", H, [1, 3])
    records += flat("cal_ql", W, [0] * 4) + flat("dare_cql", W, [10] * 4)
    (_, table) = tables.study(pairs.by_seed(records))
    found = {row["method"]: row for row in table.rows}["dare_cql"]["minus baseline"]
    assert (found.mean, found.seeds) == (6, 6)
    half = stats.t.ppf(0.975, 1) * 1 / 2  # of 1 and 3, whose mean has a deviation of 1
    assert found.interval == pytest.approx((6 - half, 6 + half))


@pytest.mark.parametrize(
    "method, base, dare",
    [("cql", "cal_ql", None), ("cal_ql", "cal_ql", None), ("edis_cql", "cal_ql", None),
     ("dare_cql", "cal_ql", None), ("dare_cql_direct", "cal_ql", "dare_cql"),
     ("pex_utd10", "iql", None), ("edis_iql", "iql", None), ("dare_iv", "iql", "dare_iql"),
     ("dare_iql_separated", "iql", "dare_iql"), ("mine", None, None)],
)  # fmt: skip
def test_baseline_and_parent(method, base, dare):
    assert (tables.baseline(method), tables.parent(method)) == (base, dare)


def log_row(**values):
    return {"phase": "online", "step": 1.0} | values


def test_cost():
    train = [log_row(steps_per_second=1.0), log_row(steps_per_second=100.0, q_loss=0.0),
             log_row(steps_per_second=50.0, q_loss=0.0)]  # fmt: skip
    job = {"seconds": 1234.0, "peak_memory_gb": 0.5, "hardware": "2 cores"}
    records = [run("iql", H, 0, [1], train=train, **job), run("pex", H, 0, [1])]
    first, second = tables.cost(pairs.by_seed(records))[0].rows
    assert [first[k].text() for k in list(first)[3:6]] == ["15.0", "1,234", "0.50"]
    assert first["runs"] == 1 and first["hardware"] == "2 cores"
    assert list(second.values()) == ["pex", 1, 1, None, None, None, None]


def exchange_rows(values):
    return [log_row(mu_offline=a, mu_online=b, tau=1.5, exchanged=m) for a, b, m in values]


def test_exchange():
    records = [
        run("dare_iql", H, 0, [1], train=[log_row(), *exchange_rows([(2, 1, 10), (1, 2, 30)])]),
        run("dare_iql", H, 1, [1], train=exchange_rows([(1, 2, 40)])),
        run("iql", H, 0, [1], train=[log_row(q_loss=1.0)]),
    ]
    (row,) = tables.exchange(pairs.by_seed(records))[0].rows
    assert row["mu_offline > mu_online, share"].text() == "0.25 ± 0.25 (2)"
    assert row["M"].text() == "30.0 ± 10.0 (2)" and row["tau"].mean == 1.5
    assert (row["mu_offline"].mean, row["mu_online"].mean) == (1.25, 1.75)


# --- Claims ---


def claim_rows(records):
    (table,) = claims.claims(pairs.by_seed(records))
    return {row["claim"]: row for row in table.rows}


@pytest.mark.parametrize(
    "gains, expected",
    [([2, 2.5, 3], "seen"), ([-3, 1, 2], "not seen"), ([1, 2, 3], "not seen"),
     ([-2, -2.5, -3], "opposite seen"),
     ([5], "not tested"), ([], "not tested")],
)  # fmt: skip
def test_verdicts(gains, expected):
    records = flat("iql", H, [10] * 3) + flat("dare_iql", H, [10 + x for x in gains])
    row = claim_rows(records)["DARE-I above iql"]
    assert row["verdict"] == expected and row["section"] == "7.2"
    if expected == "not tested":
        assert row["estimate"] is None and row["tasks"] is None
    else:
        assert row["estimate"].mean == np.mean(gains) and (row["tasks"], row["pairs"]) == (1, 3)
    assert claim_rows(records)["DARE-I above pex"]["verdict"] == "not tested"


def test_highest_on_most_tasks():
    def records(tasks_won):
        found = []
        for i, env in enumerate((HC, H, W)):
            for method in ("iql", "pex", "edis_iql"):
                found += flat(method, env, [5, 6, 7])
            found += flat("dare_iql", env, [50, 60] if i < tasks_won else [1, 2])
        return found

    for won, expected in ((3, "seen"), (2, "seen"), (1, "opposite seen")):
        row = claim_rows(records(won))["DARE-I highest on most tasks"]
        assert row["verdict"] == expected and row["estimate"].mean == pytest.approx(won / 3 - 0.5)
    ties = [r for r in records(0) if r.method != "dare_iql"]
    ties += [r for env in (HC, H, W) for r in flat("dare_iql", env, [5, 6, 7])]
    assert claim_rows(ties)["DARE-I highest on most tasks"]["verdict"] == "opposite seen"
    lost = [r for r in records(3) if r.method != "pex"]
    assert claim_rows(lost)["DARE-I highest on most tasks"]["verdict"] == "not tested"


def test_claims_on_exchange_counts_go_with_the_batch():
    def verdict(counts, **settings):
        train = exchange_rows([(1, 2, m) for m in counts])
        records = [run("dare_iql", H, s, [1], train=train, **settings) for s in (0, 1)]
        return claim_rows(records)["DARE-I: mostly M < 70 of 128"]["verdict"]

    assert verdict([69, 69, 100]) == "seen" and verdict([70, 70, 1]) == "opposite seen"
    assert verdict([34, 34, 100], batch_size=128) == "seen"
    assert verdict([36, 36, 1], batch_size=128) == "opposite seen"
    assert verdict([]) == "not tested"


def test_claims_of_totals_and_of_stability():
    records = flat("cql", H, [10, 30]) + flat("dare_cql", H, [11, 35])
    records += flat("cql", W, [70, 90]) + flat("dare_cql", W, [84, 100])
    row = claim_rows(records)["DARE-C: total above cql (paper: 15%)"]
    assert row["estimate"].mean == pytest.approx(15) and row["tasks"] == 2  # 115 of 100
    records = [run("dare_cql", H, s, [0, 5, 5, 5, 5]) for s in (0, 1, 2)]
    records += [run("dare_cql_direct", H, s, [90, 4, 6, 4, 6 + s / 9]) for s in (0, 1, 2)]
    row = claim_rows(records)["Gaussian fit steadier than dare_cql_direct"]
    assert row["verdict"] == "seen" and row["estimate"].mean == pytest.approx(1, abs=0.1)
    records = flat("dare_iql", H, [50, 51, 52, 53]) + flat("dare_iv", H, [0, 100, 0, 100])
    row = claim_rows(records)["DARE-I varies less over seeds than dare_iv"]
    assert row["estimate"].mean == pytest.approx(50 - np.std([50, 51, 52, 53]))


def test_claims_about_100_000_steps_need_runs_of_that_length():
    def verdict(steps):
        records = flat("pex", H, [1, 1], online_iterations=steps)
        records += flat("dare_iql", H, [2, 2], online_iterations=steps)
        return claim_rows(records)["UTD 1, 0.1M steps: DARE-I above pex"]["verdict"]

    assert (verdict(99_000), verdict(100_000), verdict(200_000)) == ("not tested", "seen", "seen")


def test_claims_name_known_methods():
    known = set(importlib.import_module("experiments").METHODS)
    assert {m for c in claims.CLAIMS for m in (c.method, *c.others)} <= known
    assert len({c.text for c in claims.CLAIMS}) == len(claims.CLAIMS)


# --- Formats and refusals ---


def everything():
    train = [row | {"q_loss": 1.0, "steps_per_second": 10.0}
             for row in exchange_rows([(2, 1, 10), (1, 2, 30)])]  # fmt: skip
    records = flat("iql", H, [1, 2.25], hardware="2 cores & 5%_x") + flat("pex", H, [3, 4])
    return records + flat("dare_iql", H, [5, 6], train=train)


ALL = "1,2,3,8,9,10,11,study,cost,exchange,claims"


def test_latex_is_escaped_and_its_columns_balance(tmp_path, monkeypatch, capsys):
    out = command(monkeypatch, capsys, tmp_path, everything(), "--table", ALL, "--format", "latex")
    assert r"2 cores \& 5\%\_x" in out and r"dare\_iql" in out and r"\textbf{5.5 $\pm$ 0.5" in out
    assert not re.search(r"(?<!\\)[%_#]", out.replace(r"$\pm$", ""))
    assert not re.search("[^\x00-\x7f]", out)
    assert out.count("{") == out.count("}") and out.count("$") % 2 == 0
    found = re.findall(r"\\begin{tabular}{(l+)}(.*?)\\end{tabular}", out, re.DOTALL)
    assert len(found) == 7 * 3 + 2 + 3 == out.count(r"\begin{table}") == out.count(r"\end{table}")
    for columns, body in found:
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(rows) > 1
        assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns)}
    assert cells.escaped("a\\b~{^}") == (
        r"a\textbackslash{}b\textasciitilde{}\{\textasciicircum{}\}"
    )


def test_csv_holds_numbers(tmp_path, monkeypatch, capsys):
    args = ["--table", ALL, "--format", "csv", "--output", tmp_path / "out"]
    assert command(monkeypatch, capsys, tmp_path, everything(), *args) == ""
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) == 26 and "table1.csv" in files and "claims.csv" in files
    with open(tmp_path / "out" / "table1.csv", newline="") as f:
        rows = {row["dataset"]: row for row in csv.DictReader(f)}
    row = {k: v for k, v in rows["H-M"].items() if k.startswith("Base (IQL)")}
    assert {k: collect.number(v) for k, v in row.items()} == {
        "Base (IQL)": 1.625, "Base (IQL) std": 0.625, "Base (IQL) seeds": 2,
        "Base (IQL) sizes": SIZES,
    }  # fmt: skip
    assert set(rows["AM-U"].values()) == {"AM-U", ""}
    with open(tmp_path / "out" / "study.csv", newline="") as f:
        rows = [r for r in csv.DictReader(f) if r["method"] == "dare_iql"]
    low, high = pairs.t_interval([np.array([4, 3.75])])
    assert float(rows[0]["minus baseline low"]) == low
    assert float(rows[0]["minus baseline high"]) == high


def test_markdown_files_and_a_runs_directory(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "iql" / H / "seed_0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(SMALL | {"regenerated_size": 1, "batch_size": 64, "hidden_dim": 8})
    )
    (folder / "summary.yaml").write_text("best: 5.0\n")
    (folder / "job.yaml").write_text("seconds: 60.0\n")
    (folder / "eval.csv").write_text("phase,step,normalized_score\nonline,0,1\nonline,40000,5\n")
    (folder / "train.csv").write_text("phase,step,q_loss,steps_per_second\nonline,1000,,9\n")
    args = ["tables", tmp_path / "runs", "--table", "study,cost", "--output", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", list(map(str, args)))
    tables.main()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["cost.md", "study.md", "study_differences.md"]
    assert (
        f"| {H} | iql | 1.0 ± 0.0 (1) | 5.0 ± 0.0 (1) | 5.0 ± 0.0 (1) |  |  |"
        in (tmp_path / "out" / "study.md").read_text()
    )
    assert "| iql | 1 | 1 |  | 60 |  |  |" in (tmp_path / "out" / "cost.md").read_text()


def test_the_papers_numbers_only_beside_the_papers_sizes(tmp_path, monkeypatch, capsys):
    paper_runs = flat("iql", H, [80, 82], **PAPER)
    args = ["--table", "1", "--paper"]
    out = command(monkeypatch, capsys, tmp_path, paper_runs, *args)
    assert "| 81.0 ± 1.0 (2) | 77.5 ± 22.2 | +3.5 |" in out and "Warning" not in out
    assert "|  | 84.3 ± 20.1 |  |" in out  # of PEX, that has no runs
    for other in ({"data": "regenerated"}, {"online_iterations": 20_000},
                  {"offline_iterations": 10_000}, {"batch_size": 64}, {"hidden_dim": 32},
                  {"behavior_iterations": 10}, {"model_iterations": 5}):  # fmt: skip
        records = paper_runs + flat("pex", H, [1], **PAPER | other)
        assert "Table 1" in refusal(monkeypatch, capsys, tmp_path, records, *args)
        out = command(monkeypatch, capsys, tmp_path, records, *args, "--other_sizes")
        assert "- Warning: the paper's numbers are of other sizes or data" in out
        args_csv = [*args, "--other_sizes", "--format", "csv", "--output", tmp_path / "out"]
        command(monkeypatch, capsys, tmp_path, records, *args_csv)
        with open(tmp_path / "out" / "table1.csv", newline="") as f:
            assert all("other sizes" in row["warning"] for row in csv.DictReader(f))
    short = flat("pex_utd10", H, [1], **PAPER | {"online_iterations": 100_000})
    assert "84.6 ± 21.4" in command(monkeypatch, capsys, tmp_path, short, "--table", "3", "--paper")


@pytest.mark.parametrize(
    "args, message",
    [(["--table", "7"], "no table 7; there are 1, 2, 3, 8, 9, 10, 11, study"),
     (["--table", "study", "--paper"], "--paper has no numbers for study"),
     (["--format", "csv"], "name a folder with --output")],
)  # fmt: skip
def test_refusals(tmp_path, monkeypatch, capsys, args, message):
    assert message in refusal(monkeypatch, capsys, tmp_path, everything(), *args)


def test_no_runs_or_runs_without_sizes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: .* has neither finished runs nor runs.csv"):
        tables.main()
    record = run("iql", H, 0, [1, 2])
    del record.settings["data"]
    found = refusal(monkeypatch, capsys, tmp_path, [record])
    assert "iql/hopper-medium-v2/seed_0 has no data" in found
