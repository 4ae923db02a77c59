"""The tables of results/: numbers by hand, the paper's numbers, formats, generated pages."""

import csv
import functools
import re
import sys
from collections import defaultdict

import numpy as np
import pytest
from scipy import stats
from synthetic import HC, MAZE, PAPER, SIZES, H, W, exchange_rows, flat, run, write_runs

import tables
from lib.experiments import METHODS, PAPER_TABLES, ROOT, TASKS, Experiment, method_of
from lib.records import by_seed, write_records
from lib.table import PAPER_SIZES, Cell, Table, escaped, in_short

GROUPS = [part.split() for part, _ in PAPER_TABLES["table1"].parts]


@pytest.fixture
def program(monkeypatch, capsys, tmp_path):
    """Show tables of records; returns what is printed."""

    def call(records, *args):
        monkeypatch.setattr(tables, "read_records", lambda path: records)
        monkeypatch.setattr(sys, "argv", ["tables.py", "show", "somewhere", *map(str, args)])
        tables.main()
        return capsys.readouterr().out

    return call


# --- The paper's numbers ---


def paper():
    with open(ROOT / "results" / "paper.csv", newline="") as f:
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
    for group, count in zip(GROUPS, (12, 9), strict=True):
        scores = [[float(numbers["1", m, task]["mean"]) for m in group] for task in TASKS.values()]
        assert (np.argmax(scores, 1) == 3).sum() == count


def test_every_cell_of_a_table_has_a_number_of_the_paper():
    wanted = {
        (name.removeprefix("table"), method, label)
        for name, table in PAPER_TABLES.items()
        for method in table.methods
        for label in tables.lines_of(table)
    }
    assert wanted == set(paper())


# --- Tables of the paper, from runs ---


def cell(records, name, heading, label):
    (row,) = [r for r in tables.paper_rows(by_seed(records), name) if r["dataset"] == label]
    return row[heading]


def test_cell_is_mean_and_population_deviation_of_the_last_four():
    records = [run("iql", H, 0, [0, 100, 1, 2, 3, 4]), run("iql", H, 1, [9, 0, 5, 6, 7, 8])]
    found = cell(records, "table1", "IQL", "H-M")
    assert (found.mean, found.std, found.seeds) == (4.5, 2.0, 2)
    assert found.text() == "4.5 ± 2.0 (2)" and found.sizes == SIZES
    assert cell(records, "table8", "IQL", "H-M").mean == 4.5  # of 0 and 9
    assert ", 0 online steps," in cell(records, "table8", "IQL", "H-M").sizes
    assert cell(records, "table1", "PEX", "H-M") is None


def test_tables_3_and_10_stop_at_100_000_steps():
    scores = np.arange(21.0)  # one per 10,000 steps: 7, 8, 9, 10 are the last up to 100,000
    records = [run("pex", H, 0, scores, **PAPER)]
    records += [run("pex_utd10", H, 0, scores[:11], **PAPER | {"online_iterations": 100_000})]
    for heading in ("PEX", "PEX, UTD = 10"):
        found = cell(records, "table10", heading, "H-M")
        assert found.mean == 8.5 and found.sizes == PAPER_SIZES[100_000]
    assert cell(records, "table3", "PEX, UTD = 10", "H-M").mean == 8.5
    assert cell(records, "table1", "PEX", "H-M").mean == 18.5


def test_sums_and_totals_need_all_their_tasks():
    medium = sum((flat("dare_iql", env, x) for env, x in
                  ((HC, [1, 3]), (H, [10, 10]), (W, [100, 102, 104]))), [])  # fmt: skip
    found = cell(medium, "table2", "DARE-I", "M")
    assert (found.mean, found.std, found.seeds) == (2 + 10 + 102, None, 2)
    assert cell(medium, "table2", "DARE-I", "total") is None
    assert cell(medium[2:], "table2", "DARE-I", "M") is None
    everywhere = [r for env in TASKS for r in flat("dare_iql", env, [2.0, 4.0])]
    totals = {"total (L)": 27, "total (AM)": 12, "total": 39}
    assert {k: cell(everywhere, "table1", "DARE-I", k).mean for k in totals} == totals
    assert cell(everywhere[2:], "table1", "DARE-I", "total (L)") is None
    assert cell(everywhere[2:], "table1", "DARE-I", "total (AM)").mean == 12


def test_bold_is_the_highest_mean_of_the_row_in_its_group():
    records = [r for method, x in (("iql", 1.0), ("pex", 3.0), ("dare_iql", 3.0), ("cql", 9.0),
               ("cal_ql", 8.0)) for r in flat(method, H, [x])]  # fmt: skip
    rows = tables.paper_rows(by_seed(records), "table1")
    bold = {(r["dataset"], k) for r in rows for k, c in r.items() if isinstance(c, Cell) and c.bold}
    assert bold == {("H-M", "PEX"), ("H-M", "DARE-I"), ("H-M", "CQL")}
    assert not cell(flat("iql", H, [1.0]), "table1", "IQL", "H-M").bold  # alone in its row


def test_markdown_marks_other_sizes_and_leaves_missing_cells_empty(program):
    records = flat("iql", H, [1, 2]) + flat("iql", W, [1, 2]) + flat("pex", H, [3], **PAPER)
    out = program(records, "--table", "table1")
    # Neither is bold: they cannot be compared.
    assert "| H-M |  |  |  |  | 1.5 ± 0.5 (2) | 3.0 (1) [1] |  |  |" in out
    assert f"- Unmarked: {SIZES}.\n" in out and "- [1]: data d4rl, 1,000,000 offline" in out
    assert "not with published numbers" in out
    out = program(flat("pex", H, [3], **PAPER), "--table", "table1")
    assert "not with published numbers" not in out


def test_aggregates_pool_the_runs_of_the_tasks_that_all_methods_have():
    records = flat("iql", H, [0, 1, 2, 3]) + flat("iql", W, [4, 5, 6, 100])
    more = flat("iql", HC, [7]) + flat("pex", H, [8]) + flat("pex", W, [9])
    rows = tables.aggregate_rows(by_seed(records + more), PAPER_TABLES["table1"])
    assert [(r["method"], r["tasks"], r["runs"]) for r in rows] == [("IQL", 2, 8), ("PEX", 2, 2)]
    (row,) = tables.aggregate_rows(by_seed(records), PAPER_TABLES["table1"])
    assert row["IQM"].mean == (2 + 3 + 4 + 5) / 4
    assert row["IQM"].interval[0] < 3.5 < row["IQM"].interval[1]
    assert tables.aggregate_rows(by_seed(flat("mine", H, [1])), PAPER_TABLES["table1"]) == []


def test_the_papers_numbers_warn_beside_other_sizes(program):
    paper_runs, args = flat("iql", H, [80, 82], **PAPER), ["--table", "table1", "--paper"]
    out = program(paper_runs, *args)
    assert "| 81.0 ± 1.0 (2) | 77.5 ± 22.2 | +3.5 |" in out and "Warning" not in out
    assert "|  | 84.3 ± 20.1 |  |" in out  # of PEX, that has no runs
    for other in ({"data": "regenerated"}, {"online_iterations": 20_000},
                  {"offline_iterations": 10_000}, {"batch_size": 64}, {"hidden_dim": 32},
                  {"behavior_iterations": 10}, {"model_iterations": 5}):  # fmt: skip
        out = program(paper_runs + flat("pex", H, [1], **PAPER | other), *args)
        assert "- Warning: the paper's numbers are of other sizes or data" in out


# --- Other tables ---


def test_comparison_pairs_by_seed_and_cuts_at_the_smaller_number_of_steps():
    records = [run("iql", H, s, [0, 1, 1, 1, 1 + 8 * s]) for s in (0, 1, 2)]
    records += [run("dare_iql", H, s, [0, 2, 2, 2, 2 + 8 * s]) for s in (1, 2, 3)]
    records += [run("dare_iql_n16", H, s, [0, 5, 5], online_iterations=20_000) for s in (1, 2)]
    records += [run("dare_iql_direct", H, 1, [7, 7], offline_iterations=5)]
    over_tasks, by_task = tables.comparison(by_seed(records))
    rows = {row["method"]: row for row in by_task.rows}
    assert rows["IQL"]["minus baseline"] is None and rows["DARE-I"]["minus DARE"] is None
    assert rows["IQL"]["last-four mean"].mean == 3 and rows["IQL"]["best"].mean == 9
    found = rows["DARE-I"]["minus baseline"]
    assert (found.mean, found.seeds, found.interval) == (1, 2, (1, 1))
    assert found.text() == "+1.0 (2); +1.0 to +1.0"
    found = rows["DARE-I, n = 16"]  # 5 against 1 and 2, the means up to step 20,000
    assert (found["minus baseline"].mean, found["minus DARE"].mean) == (4, 3)
    assert ", 20,000 online steps," in found["minus DARE"].sizes
    assert rows["DARE-I, direct"]["minus DARE"] is None  # another offline agent
    total = {row["method"]: row for row in over_tasks.rows}["DARE-I"]
    assert total["tasks (minus baseline)"] == 1 and total["minus baseline"].mean == 1


def test_pairs_have_every_two_methods_that_share_seeds():
    records = flat("iql", H, [1, 2]) + flat("dare_iql", H, [4, 7]) + flat("dare_iql_n16", W, [1])
    (table,) = tables.pairs(by_seed(records))
    (row,) = table.rows
    assert (row["task"], row["method"], row["minus"]) == (H, "DARE-I", "IQL")
    half = stats.t.ppf(0.975, 1)  # of 3 and 5, whose mean has a deviation of 1
    assert row["difference"].mean == 4
    assert row["difference"].interval == pytest.approx((4 - half, 4 + half))
    assert row["in the seeds"] == "+3.0, +5.0"
    sizes = {"online_iterations": 60, "initial_collection_steps": 10}
    records = [run("iql", H, 0, [0] * 7, **sizes), run("pex", H, 0, [9, 9, 1, 2, 3, 4, 8], **sizes)]
    (row,) = tables.pairs(by_seed(records))[0].rows
    assert (row["difference"].mean, row["all evaluations"].mean, row["the last"].mean) == (
        17 / 4,
        18 / 5,
        8,
    )
    records += [run("iql", W, 0, [0] * 7, **sizes), run("pex", W, 0, [1] * 7, **sizes)]
    row = tables.pairs(by_seed(records))[0].rows[-1]
    assert (row["task"], row["method"], row["in the seeds"]) == ("2 tasks", "PEX", None)
    assert (row["difference"].mean, row["all evaluations"].mean, row["the last"].mean) == (
        (17 / 4 + 1) / 2,
        (18 / 5 + 1) / 2,
        4.5,
    )


def test_questions_are_of_all_tasks_and_can_be_asked_at_a_step(program):
    records = [run("iql", task, s, [0, 0, 0, 0, 0]) for task in (H, W) for s in (0, 1)]
    records += [run("dare_iql", H, s, [0, 1 + s, 9, 9, 9]) for s in (0, 1)]
    records += [run("dare_iql", W, s, [0, 4, 4, 4, 4]) for s in (0, 1)]
    (row,) = tables.questions(by_seed(records))[0].rows
    assert row["question"] == "DARE-I against IQL"
    assert (row[H].mean, row[W].mean, row["all"].mean) == (7.125, 4, 5.5625)
    printed = program(records, "--table", "questions", "--until", 10_000)
    assert (
        "| DARE-I against IQL | +1.5 (2); " in printed and "| +4.0 (2); +4.0 to +4.0 |" in printed
    )
    with pytest.raises(SystemExit, match="error: --until is an online step: 0 or more"):
        program(records, "--until", -1)
    records += [run("pex", H, s, [0, 1, 1, 1, 1]) for s in (0, 1)]  # on one of the tasks
    rows = {row["question"]: row for row in tables.questions(by_seed(records))[0].rows}
    assert rows["DARE-I against IQL"]["all"].mean == 5.5625
    row = rows["DARE-I against PEX"]
    assert (row[H].mean, row[W], row["all"]) == (6.125, None, None)
    (table,) = tables.questions(by_seed([r for r in records if r.env == H]))
    assert len(table.rows) == 2 and "all" not in table.rows[0] and "All" not in table.notes[0]


def test_questions_are_asked_of_all_evaluations_of_the_last_and_at_the_step_all_reach():
    longer = {"online_iterations": 60_000}
    records = [run("iql", H, s, [0, 1, 1, 1, 1, 1, 6], **longer) for s in (0, 1)]
    records += [run("dare_iql", H, s, [0, 4, 4, 4, 4, 4, 8], **longer) for s in (0, 1)]
    assert len(tables.questions_in_each_way(by_seed(records))) == 3
    four = [record.until(40_000) for record in records]  # all evaluations are the last four
    assert len(tables.questions_in_each_way(by_seed(four))) == 2
    records += [run(method, W, 0, [0, 1, 1, 1, 1]) for method in ("iql", "dare_iql")]
    found = {t.title: t.rows[0][H].mean for t in tables.questions_in_each_way(by_seed(records))}
    assert list(found.values()) == pytest.approx([(3 * 3 + 2) / 4, (3 * 5 + 2) / 6, 2, 3])
    assert list(found)[-1] == "What does what, at 40,000 online steps"


def test_differences_stand_beside_the_papers():
    records = flat("iql", H, [50, 50]) + flat("iql", MAZE, [3, 3])
    records += flat("dare_iql_no_exchange", H, [52, 54]) + flat(
        "dare_iql_no_exchange", MAZE, [1, 1]
    )
    rows = {row["difference"]: row for row in tables.beside_paper(by_seed(records)).rows}
    here, paper = (
        "the release: no exchange against IQL",
        "the release: no exchange against IQL, paper",
    )
    assert list(rows) == [here, paper]
    assert (rows[here][H].mean, rows[here][MAZE].mean) == (3, -2)
    # Table 11, n = 0, less IQL of Table 1; Table 11 has no AntMaze.
    assert rows[paper][H].mean == pytest.approx(91.4 - 77.5) and MAZE not in rows[paper]
    own = flat("iql", "pendulum-v0", [1]) + flat("dare_iql", "pendulum-v0", [3])  # no task of its
    here, paper = tables.beside_paper(by_seed(own)).rows
    assert here["pendulum-v0"].mean == 2 and "pendulum-v0" not in paper


def test_over_all_tasks_those_with_one_pair_do_not_count_unless_all_have_one():
    records = flat("iql", H, [1]) + flat("dare_iql", H, [100])
    assert tables.comparison(by_seed(records))[0].rows[0]["minus baseline"].mean == 99
    records += flat("iql", W, [1, 1]) + flat("dare_iql", W, [3, 5])
    row = tables.comparison(by_seed(records))[0].rows[0]
    assert (row["minus baseline"].mean, row["tasks (minus baseline)"]) == (3, 1)


def test_mean_q_is_that_of_the_last_log_row():
    train = [{"phase": "online", "step": step, "q": q} for step, q in ((100, 7.0), (200, 40.0))]
    records = [run("iql", H, seed, [1, 1], train) for seed in (0, 1)]
    (row,) = tables.comparison(by_seed(records))[1].rows
    assert row["mean Q at the end"].text() == "40 ± 0 (2)"


def test_questions_compare_methods_of_one_group_that_there_are():
    for method, other in tables.QUESTIONS.values():
        assert METHODS[method].baseline == METHODS[other].baseline is not None


def test_planned_runs_are_counted_by_the_seeds_of_their_task(monkeypatch):
    plan = Experiment("Mine", [("iql", [H, W])], seeds=(0, 1), task_seeds={W: (4, 5, 6)})
    monkeypatch.setitem(tables.EXPERIMENTS, "mine", plan)
    records = [run("iql", task, seed, [0, 0]) for task in (H, W) for seed in (0, 4)]
    assert tables.made_with("mine", by_seed(records)).startswith(
        "2 of 5 runs are made (`python results/grid.py run mine`), and 2 beyond the plan "
        f"({H}, seeds 4; {W}, seeds 0). "
    )


def test_aggregate_difference_weighs_tasks_alike():
    records = flat("cal_ql", H, [0, 0]) + flat("dare_cql", H, [1, 3])
    records += flat("cal_ql", W, [0] * 4) + flat("dare_cql", W, [10] * 4)
    (row,) = tables.comparison(by_seed(records))[0].rows
    found = row["minus baseline"]
    assert row["method"] == "DARE-C" and (found.mean, found.seeds) == (6, 6)
    half = stats.t.ppf(0.975, 1) * 1 / 2  # of 1 and 3, whose mean has a deviation of 1
    assert found.interval == pytest.approx((6 - half, 6 + half))


@pytest.mark.parametrize(
    "method, base, dare",
    [("cql", "cal_ql", None), ("cal_ql", "cal_ql", None), ("edis_cql", "cal_ql", None),
     ("dare_cql", "cal_ql", "dare_cql"), ("dare_cql_direct", "cal_ql", "dare_cql"),
     ("pex_utd10", "iql", None), ("edis_iql", "iql", None), ("dare_iv", "iql", "dare_iql"),
     ("dare_iql_other", "iql", "dare_iql"), ("other", None, None)],
)  # fmt: skip
def test_what_methods_are_compared_with(method, base, dare):
    assert [other(method) for other in tables.AGAINST.values()] == [base, dare]
    assert (method_of(method).label == method) == method.endswith("other")


def test_scores_have_all_methods_and_say_the_seeds_once():
    records = flat("dare_iql", H, [1, 3]) + flat("dare_iql", W, [5, 5]) + flat("pex", H, [9, 9])
    records += [run("iql", env, s, [s, 7, 7]) for env in (H, W) for s in (0, 1)]
    (table,) = tables.scores(by_seed(records))
    methods = ["IQL before fine-tuning", "IQL", "PEX", "DARE-I"]
    assert [row["method"] for row in table.rows] == methods
    texts = ["0.5 ± 0.5", "7.0 ± 0.0", "9.0 ± 0.0", "2.0 ± 1.0"]
    assert [row[H].text() for row in table.rows] == texts and table.rows[2][W] is None
    assert "over 2 seeds" in table.notes[0]
    (table,) = tables.scores(by_seed(records[1:]))
    assert table.rows[-1][H].text() == "3.0 (1)" and "over (n) seeds" in table.notes[0]


def test_cost():
    train = [{"phase": "online", "step": 1, "steps_per_second": 1.0}]
    train += [{**train[0], "steps_per_second": x, "q_loss": 0.0} for x in (100.0, 50.0, 25.0)]
    job = {"seconds": 1234.0, "peak_memory_gb": 0.5, "hardware": "2 cores"}
    records = [run("iql", H, 0, [1], train, **job), run("pex", H, 0, [1])]
    for seed, seconds, memory in ((1, 1.0, 0.7), (2, 9999.0, 0.6)):
        more = job | {"seconds": seconds, "peak_memory_gb": memory}
        records.append(run("iql", H, seed, [1], train, **more))
    records.append(run("iql", W, 0, [1], train, **job | {"hardware": "a GPU", "seconds": 5.0}))
    first, other, second = tables.cost(by_seed(records))[0].rows
    # Two medians and the highest.
    assert [first[k].text() for k in list(first)[4:7]] == ["20.0", "1,234", "0.70"]
    assert first["runs"] == 3 and first["hardware"] == "2 cores"
    assert other["processor seconds"].text() == "5" and other["hardware"] == "a GPU"
    assert list(second.values()) == ["PEX", None, 1, 1, None, None, None]


def test_what_runs_share_is_a_line_for_each_hardware():
    rows = [{"prepared": "iql", "env": H, "hardware": x, "seconds": s}
            for x, s in (("2 cores", 10.0), ("a GPU", 1.0), ("2 cores", 30.0))]  # fmt: skip
    rows.append({"prepared": "dare_iql", "env": H})  # an attempt was killed: its cost is not known
    lines = tables.prepared(rows).rows
    assert [(line["hardware"], line[H].text()) for line in lines] == [
        ("2 cores", "20 (2)"),
        ("a GPU", "1 (1)"),
    ]


def test_several_sizes_are_one_text():
    assert in_short(SIZES) == SIZES
    longer = SIZES.replace("40,000", "50,000")
    assert in_short(f"{SIZES}\n{longer}") == SIZES.replace("40,000", "40,000 or 50,000")
    other = SIZES.replace("regenerated (200,000 transitions)", "a and b, c.hdf5").replace(
        "256", "64"
    )
    assert in_short(f"{SIZES}\n{other}") == (
        "data regenerated (200,000 transitions) or data a and b, c.hdf5, 20,000 offline updates, "
        "40,000 online steps, batches of 256 or batches of 64, layers of 256 or layers of 64"
    )


def test_exchange():
    records = [
        run("dare_iql", H, 0, [1], [{"phase": "online", "step": 9},
                                    *exchange_rows([(2, 1, 10), (1, 2, 30)])]),
        run("dare_iql", H, 1, [1], exchange_rows([(1, 2, 40)])),
        run("iql", H, 0, [1], [{"phase": "online", "step": 9, "q_loss": 1.0}]),
    ]  # fmt: skip
    (row,) = tables.exchange(by_seed(records))[0].rows
    assert row["mu_offline > mu_online, share"].text() == "0.25 ± 0.25 (2)"
    assert row["M"].text() == "30.0 ± 10.0 (2)" and row["separation"].mean == 1.5
    assert (row["mu_offline"].mean, row["mu_online"].mean) == (1.25, 1.75)
    assert row["AUC"] is row["M by chance"] is None  # not logged
    train = [row | {"auc": 0.4, "exchanged_by_chance": 50.0} for row in records[1].train]
    records[1] = run("dare_iql", H, 1, [1], train)
    (row,) = tables.exchange(by_seed(records))[0].rows
    assert row["AUC"].text() == "0.40 (1)" and row["M by chance"].mean == 50


# --- Formats, command line, pages ---


def everything():
    train = exchange_rows([(2, 1, 10), (1, 2, 30)])
    train = [row | {"q_loss": 1.0, "steps_per_second": 10.0} for row in train]
    records = flat("iql", H, [1, 2.25], hardware="2 cores & 5%_x") + flat("pex", H, [3, 4])
    return records + flat("dare_iql", H, [5, 6], train=train)


def test_latex_is_escaped_and_its_columns_balance(program):
    names = [*PAPER_TABLES, *tables.OTHERS]
    out = program(everything(), "--table", ",".join(names), "--format", "latex")
    assert r"2 cores \& 5\%\_x" in out and r"\textbf{5.5 $\pm$ 0.5" in out
    assert not re.search(r"(?<!\\)[%_#]", out) and not re.search("[^\x00-\x7f]", out)
    assert out.count("{") == out.count("}") and out.count("$") % 2 == 0
    found = re.findall(r"\\begin{tabular}{(l+)}(.*?)\\end{tabular}", out, re.DOTALL)
    assert out.count(r"\begin{table}") == out.count(r"\end{table}") == len(found)
    assert len(found) == 7 + 5 + 10
    for columns, body in found:
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(columns)}
    assert escaped("a\\b~{^}∞") == (
        r"a\textbackslash{}b\textasciitilde{}\{\textasciicircum{}\}$\infty$"
    )
    assert Table("t", [{"a|b": "c|d"}]).markdown().splitlines()[-1] == r"| c\|d |"


def test_only_the_runs_of_some_tasks_and_seeds_are_shown(program):
    records = flat("iql", H, [1, 2, 9]) + flat("iql", W, [3, 4, 9]) + flat("iql", MAZE, [5])
    records += flat("dare_iql", H, [2, 4, 9]) + flat("dare_iql", W, [4, 6, 9])
    out = program(records, "--table", "scores", "--tasks", "hopper,walk", "--seeds", "0,1")
    assert "| IQL | 1.5 ± 0.5 | 3.5 ± 0.5 |" in out and "antmaze" not in out
    for flags, word in (
        (["--tasks", "hopper, cheetah"], "have nothing for cheetah of --tasks"),
        (["--seeds", "0, 7"], "have nothing for 7 of --seeds"),
        (["--tasks", "antmaze", "--seeds", "1"], "have none of these seeds on these tasks"),
    ):
        with pytest.raises(SystemExit, match=word):
            program(records, "--table", "scores", *flags)


def test_one_question_has_one_answer_over_all_tasks():
    """On the third task there is one pair, which no table averages; its 99 would show."""
    records = flat("iql", H, [0, 0]) + flat("iql", W, [0, 0]) + flat("iql", HC, [0])
    records += (
        flat("dare_iql", H, [1, 3]) + flat("dare_iql", W, [4, 6]) + flat("dare_iql", HC, [99])
    )
    runs = by_seed(records)
    (question,) = tables.questions(runs)[0].rows
    pair = tables.pairs(runs)[0].rows[-1]
    total = next(r for r in tables.comparison(runs)[0].rows if r["method"] == "DARE-I")
    found = [question["all"], pair["difference"], total["minus baseline"]]
    assert [(c.mean, c.seeds) for c in found] == [(3.5, 4)] * 3
    assert found[0].interval == found[1].interval == found[2].interval
    assert (pair["task"], total["tasks (minus baseline)"]) == ("2 tasks", 2)


def test_tables_of_a_runs_directory_are_those_of_its_records(tmp_path, monkeypatch, capsys):
    runs = write_runs(everything(), tmp_path / "runs")
    write_records(runs, tmp_path / "records")
    printed = []
    for path in (runs, tmp_path / "records"):
        monkeypatch.setattr(sys, "argv", ["tables.py", "show", str(path)])
        tables.main()
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert (
        f"| {H} | DARE-I | 5.5 ± 0.5 (2) | 5.5 ± 0.5 (2) | 5.5 ± 0.5 (2) |  | +3.9 (2); "
        in printed[0]
    )


@pytest.mark.parametrize(
    "args, message",
    [(["show", "x", "--table", "table7"], "no table table7; there are table1, table2, "),
     (["show", "no/runs"], "no/runs has neither finished runs nor runs.csv"),
     (["collect", "no/runs", "x"], "no/runs has no finished run")],
)  # fmt: skip
def test_errors_are_one_line(monkeypatch, args, message):
    monkeypatch.setattr(sys, "argv", ["tables.py", *args])
    with pytest.raises(SystemExit) as stop:
        tables.main()
    assert message in str(stop.value) and re.fullmatch("error: .*", str(stop.value))


pages = functools.cache(tables.pages)


@pytest.mark.parametrize("name", [*tables.PAGES, *tables.MARKED])
def test_generated_pages_are_those_of_the_records(name):
    path = ROOT / name
    assert path.read_text() == pages()[path], "run python results/tables.py pages"


def test_deviations_before_and_after(monkeypatch):
    rows = [
        {"method": "iql", "env": H, "seed": 0, "before": 0.25, "after": 0.125},
        {"method": "dare_iql", "env": H, "seed": 0, "before": 0.25, "after": 0.5},
    ]
    monkeypatch.setattr(tables, "read_rows", lambda path: rows)
    lines = tables.deviation_block().splitlines()
    assert "| IQL before fine-tuning | 0.250 (1) |" in lines
    assert "| IQL | 0.125 (1) |" in lines and "| DARE-I | 0.500 (1) |" in lines


def test_auc_by_scale_of_the_guidance(monkeypatch):
    base = {"name": tables.SCORED, "align": "gaussian_kl", "n_reference": 1.0}
    found = {H: {0.0: 0.2, 1.0: 0.4, 8.0: 0.6}, W: {0.0: 0.3, 1.0: 0.5, 5.0: 0.9}}
    rows = [
        base | {"env": env, "guidance_scale": s, "auc": auc}
        for env, aucs in found.items()
        for s, auc in aucs.items()
    ]
    rows.append(base | {"name": "dare_iql", "env": H, "guidance_scale": 0.0, "auc": 0.99})
    monkeypatch.setattr(tables, "read_rows", lambda path: rows)
    text = tables.score_readings_block()
    assert "| 0: the behavior | 1 | gaussian_kl | 0.20 (1) | 0.30 (1) |" in text
    assert "| Table 7's | 1 | gaussian_kl | 0.60 (1) | 0.90 (1) |" in text


def test_a_changed_number_is_found(tmp_path, monkeypatch):
    marks = "<!-- {}: python results/tables.py pages -->\n", "<!-- end of {} -->\n"
    page = "# Title\n" + "".join(mark.format(k) for k in tables.BLOCKS for mark in marks) + "end\n"
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(page)
    monkeypatch.setattr(tables, "PAGES", {})
    monkeypatch.setattr(tables, "MARKED", ["README.md"])
    monkeypatch.setattr(sys, "argv", ["tables.py", "pages"])
    tables.main()
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Title\n<!-- answer: ")
    assert text.endswith(f"<!-- end of {list(tables.BLOCKS)[-1]} -->\nend\n")
    assert tables.answer_block() in text
    monkeypatch.setattr(sys, "argv", ["tables.py", "pages", "--check"])
    tables.main()
    number = re.search(r"\| 50,000 \| \d", text).end()
    (tmp_path / "README.md").write_text(text[:number] + "9" + text[number:])
    with pytest.raises(SystemExit, match="README.md is stale; run python results/tables.py pages"):
        tables.main()
    assert tables.with_blocks("# A page without marks\n") == "# A page without marks\n"
    inline = "as in " + marks[0].format("answer")
    assert tables.with_blocks(inline) == inline
    begin, end = (mark.format("answer") for mark in marks)
    for broken in (begin, end + begin, (begin + end).replace("answer", "other")):
        with pytest.raises(ValueError, match="names no block or has no <!-- end of"):
            tables.with_blocks("\n" + broken)


def test_the_answer_compares_seeds_that_both_methods_have(monkeypatch):
    """IQL has a third seed, whose score would move its mean; bold: the interval excludes 0.

    On a third task DARE-I has no seed in common with IQL, on a fourth a single one.
    """
    found = {"iql": [0, 0, 99], "dare_iql": [5, 6], "dare_iql_no_exchange": [0.99, 2.01]}
    tasks = {"full_size": (H, W), "longer": (H,)}

    def records(folder):
        return [
            run(name, task, seed, [1] + [score] * 4)
            for task in tasks[folder.name]
            for name, scores in found.items()
            for seed, score in enumerate(scores)
        ]

    def more_records(folder):
        found = [run("dare_iql", HC, 7, [1] * 5), run("iql", HC, 8, [1] * 5)]
        found += [run(name, MAZE, 0, [1] + [50] * 4) for name in ("iql", "dare_iql")]
        return records(folder) + (found if folder.name == "full_size" else [])

    monkeypatch.setattr(tables, "read_records", more_records)
    lines = tables.answer_block().splitlines()
    assert not any(HC.removesuffix("-v2") in line for line in lines)
    # Of 5 and 6 the 95% t interval is 5.5 -+ 12.706 x 0.5, of 4.01 and 3.99 it is 4 -+ 0.13.
    cells = "| 1.0 ± 0.0 (2) | 0.0 ± 0.0 (2) | 5.5 ± 0.5 (2) | +5.5 (2); -0.9 to +11.9 | "
    cells += "**+4.0 (2); +3.9 to +4.1** |"
    assert sum(line.endswith(cells) for line in lines) == 3
    (mean,) = (line for line in lines if line.startswith("| mean of 2 tasks |"))
    assert mean.endswith("|  |  |  |  | **+5.5 (4); +4.0 to +7.0** | **+4.0 (4); +4.0 to +4.0** |")


def test_the_longer_runs_have_differences_and_those_of_the_seeds(monkeypatch):
    """Of 4 and 6 the 95% t interval is 5 -+ 12.706; a task where no question has a pair is out."""
    scores = {"iql": [0, 0], "dare_iql": [4, 6]}
    found = [
        run(name, H, seed, [1] + [score] * 4)
        for name, of in scores.items()
        for seed, score in enumerate(of)
    ]
    found.append(run("iql", W, 0, [1] * 5))
    monkeypatch.setattr(tables, "read_records", lambda folder: found)
    cell = "+5.0 (2); -7.7 to +17.7"
    row = (
        f"| {H.removesuffix('-v2')} | DARE-I against IQL | {cell} | +4.0, +6.0 | {cell} | {cell} |"
    )
    lines = tables.longer_block().splitlines()
    assert [x for x in lines if x.startswith("| ")][1:] == [row]


def test_the_answer_of_the_readme_is_one_small_table():
    block = tables.answer_block()
    assert ("\n" + block).count("\n### ") == 1 and len(block.splitlines()) < 16


def test_runs_of_other_seeds_are_counted_beside_the_planned_ones():
    task = tables.EXPERIMENTS["finetuning_replay"].tasks[0]
    runs = by_seed([run("iql", task, seed, [1.0] * 5) for seed in (0, 2)])
    assert tables.made_with("finetuning_replay", runs).startswith("2 of ")
    assert "and" not in tables.made_with("finetuning_replay", runs).split(".")[0]
    runs = by_seed([run("iql", task, seed, [1.0] * 5) for seed in (0, 2, 7, 8)])
    text = tables.made_with("finetuning_replay", runs)
    assert re.match(r"2 of \d+ runs are made \(.*\), and 2 beyond the plan \(", text)
    assert f"({task}, seeds 7, 8). Commits" in text
