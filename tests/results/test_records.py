"""Finished runs, their records, and pairs of them."""

import numpy as np
import pytest
import yaml
from synthetic import HC, H, flat, run, write_runs

from lib import records
from lib.experiments import EXPERIMENTS


@pytest.fixture
def directory(tmp_path):
    """A finished run of 200 online steps with an evaluation every 60."""
    folder = tmp_path / "iql" / H / "seed_3"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{online_iterations: 200, eval_freq: 60}")
    (folder / "train.csv").write_text("phase,step,q_loss\noffline,50,1\nonline,200,1\n")
    scores = "offline,50,9\nonline,0,1\nonline,180,2\n"
    (folder / "eval.csv").write_text(f"phase,step,d4rl_normalized_score\n{scores}")
    return folder


def test_a_run_is_finished_with_its_last_log_row_and_its_last_evaluation(directory):
    assert records.is_finished(directory)
    evaluations = (directory / "eval.csv").read_text()
    (directory / "eval.csv").write_text(evaluations.replace("online,180", "online,120"))
    assert not records.is_finished(directory)  # killed in the last evaluation
    (directory / "eval.csv").write_text(evaluations)
    (directory / "train.csv").write_text("phase,step,q_loss\nonline,199,1\n")
    assert not records.is_finished(directory)
    (directory / "train.csv").unlink()
    assert not records.is_finished(directory)
    assert not records.is_finished(directory.parent)


def test_a_run_without_online_steps_is_finished_with_its_score_at_step_0(directory):
    (directory / "config.yaml").write_text("{online_iterations: 0, eval_freq: 60}")
    (directory / "train.csv").write_text("phase,step,q_loss\noffline,50,1\n")
    (directory / "eval.csv").write_text("phase,step,d4rl_normalized_score\noffline,50,9\n")
    assert not records.is_finished(directory)
    (directory / "eval.csv").write_text("phase,step,d4rl_normalized_score\nonline,0,9\n")
    assert records.is_finished(directory)


def test_records_are_read_back(tmp_path):
    scores = [2.5, *(10 * i + 0.125 for i in range(1, 7))]
    train = [{"phase": "offline", "step": 5}, {"phase": "online", "step": 1, "separation": 0.5}]
    first = run("dare_iql", H, 3, scores, train, online_iterations=60, eval_freq=10)
    runs = write_runs([first], tmp_path / "runs")
    job = {"commit": "12e4567", "seconds": None, "hardware": "2 cores"}
    (runs / "dare_iql" / H / "seed_3" / "job.yaml").write_text(yaml.safe_dump(job))
    prepared = run("prepare_iql", H, 0, [1], online_iterations=0, seconds=5.5)
    write_runs([prepared], runs)  # no result
    unfinished = write_runs([run("pex", H, 0, [1, 2])], runs) / "pex" / H / "seed_0"
    (unfinished / "train.csv").unlink()
    records.write_records(runs, tmp_path / "records")
    for path in (runs, tmp_path / "records"):
        (found,) = records.read_records(path)
        assert (found.method, found.env, found.seed) == ("dare_iql", H, 3)
        assert found.settings["data"] == "regenerated" and found.settings["batch_size"] == 256
        assert found.settings["commit"] == "12e4567" and "seconds" not in found.settings
        assert found.offline_score == 2.5 and found.best == 60.125 and found.n_steps == 60
        assert found.last_four == pytest.approx((30 + 40 + 50 + 60) / 4 + 0.125)
        assert found.scores()[0].tolist() == [0, 10, 20, 30, 40, 50, 60]
        assert [x.tolist() for x in found.log("separation")] == [[1], [0.5]]
    (row,) = records.read_rows(tmp_path / "records" / "prepared.csv")
    assert row == {"prepared": "iql", "env": H, "seed": 0, "seconds": 5.5}
    assert "offline" not in (tmp_path / "records" / "train.csv").read_text()


def test_the_best_score_may_be_that_before_fine_tuning_and_log_rows_are_online():
    train = [{"phase": "offline", "step": 5, "q": 7.0}, {"phase": "online", "step": 1, "q": 2.0}]
    record = run("iql", H, 0, [9, 1, 2], train)
    assert record.best == 9 and [x.tolist() for x in record.log("q")] == [[1], [2.0]]


def test_a_step_is_reached_with_its_evaluation_and_log_row():
    record = run("iql", H, 0, [1, 2], [{"phase": "online", "step": 10}], online_iterations=10)
    assert record.reached(10)
    record.eval.pop()
    assert not record.reached(10)


def test_runs_that_were_never_online_have_no_train_csv(tmp_path):
    runs = write_runs([run("iql", H, 0, [7.5], online_iterations=0)], tmp_path / "runs")
    (runs / "iql" / H / "seed_0" / "train.csv").write_text("phase,step\noffline,5\n")
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "train.csv").write_text("of earlier runs\n")
    records.write_records(runs, tmp_path / "records")
    assert not (tmp_path / "records" / "train.csv").exists()
    (found,) = records.read_records(tmp_path / "records")
    assert found.offline_score == 7.5


def test_runs_are_cut_where_all_of_them_have_been(tmp_path):
    """Of runs that were stopped, those that have reached the step."""
    long = run("iql", H, 0, [1, 2, 3, 4], online_iterations=30)
    short = run("iql", H, 1, [1, 2], online_iterations=10)
    for record, last in ((long, 30), (short, 10)):
        record.train = [{"phase": "online", "step": x, "q_loss": 1.0} for x in range(5, last, 5)]
    long.settings["seconds"] = 9.5
    runs = write_runs([long, short], tmp_path / "runs")
    for path in runs.glob("*/*/*/config.yaml"):  # none is finished
        path.write_text(path.read_text().replace("online_iterations: ", "online_iterations: 9"))
    with pytest.raises(ValueError, match="has no finished run"):
        records.write_records(runs, tmp_path / "records")
    records.write_records(runs, tmp_path / "records", until=20)
    (found,) = records.read_records(tmp_path / "records")
    assert found.seed == 0 and found.n_steps == 20
    assert "seconds" not in found.settings  # they are of more steps
    assert found.scores()[1].tolist() == [1, 2, 3]
    assert found.log("q_loss")[0].tolist() == [5, 10, 15, 20]
    with pytest.raises(ValueError, match="no run that has reached online step 40"):
        records.write_records(runs, tmp_path / "records", until=40)


def test_runs_of_another_machine_are_added(tmp_path):
    """Two directories, one after the other, make the files of both together."""
    job = {"commit": "12e4567", "hardware": "2 cores"}

    def make(folder, seeds, score):
        train = [{"phase": "online", "step": 1.0, "q_loss": 123456.5}]
        more = {"online_iterations": 40, "eval_freq": 10, "max_exchange": 1_000_000}
        found = [run("dare_iql", H, seed, [score] * 5, train, **more, **job) for seed in seeds]
        prepared = [run("prepare_iql", H, seed, [1], online_iterations=0, **job) for seed in seeds]
        return write_runs([*found, *prepared], tmp_path / folder)

    make("both", [0, 10], 1.25)
    make("both", [2], 7.5)
    records.write_records(tmp_path / "both", tmp_path / "expected")
    folder = tmp_path / "records"
    with pytest.raises(ValueError, match="has neither finished runs nor runs.csv"):
        records.write_records(make("first", [0, 10, 2], 1.25), folder, add=True)
    records.write_records(tmp_path / "first", folder)
    records.write_records(make("second", [2], 7.5), folder, add=True)
    assert {r.seed: r.last_four for r in records.read_records(folder)} == {
        0: 1.25,
        10: 1.25,
        2: 7.5,
    }
    for name in ("runs", "eval", "train", "prepared"):
        lines = [
            (x / f"{name}.csv").read_text().splitlines() for x in (folder, tmp_path / "expected")
        ]
        assert sorted(lines[0]) == sorted(lines[1])
        assert lines[0][0] == lines[1][0] and lines[0].count(lines[0][1]) == 1
    assert ",1000000," in (folder / "runs.csv").read_text()


def test_one_experiment_is_collected_of_a_directory_with_several(tmp_path):
    mine, other = "halfcheetah-medium-replay-v2", "halfcheetah-medium-v2"
    names = (
        ("iql", mine),
        ("dare_iql", mine),
        ("dare_iql", other),
        ("edis_iql", mine),
        ("cal_ql", mine),
    )
    for method, env in names:
        write_runs([run(method, env, 7, [1] * 5)], tmp_path / "runs")
    for name, env in (("iql", mine), ("iql", other), ("dare_iql", mine), ("cal_ql", mine)):
        prepared = run(f"prepare_{name}", env, 0, [1], online_iterations=0, commit="12e4567")
        write_runs([prepared], tmp_path / "runs")
    experiment, folder = EXPERIMENTS["full_size"], tmp_path / "records"
    records.write_records(tmp_path / "runs", folder, experiment=experiment)
    found = [(r.method, r.env, r.seed) for r in records.read_records(folder)]
    assert found == [("dare_iql", mine, 7), ("iql", mine, 7)]
    found = [(x["prepared"], x["env"]) for x in records.read_rows(folder / "prepared.csv")]
    assert found == [("dare_iql", mine), ("iql", mine)]
    experiment = EXPERIMENTS["table3"]
    with pytest.raises(ValueError, match="has no finished run of 'Ten updates a step"):
        records.write_records(tmp_path / "runs", folder, experiment=experiment)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(ValueError, match="has neither finished runs nor runs.csv"):
        records.read_records(tmp_path)
    with pytest.raises(ValueError, match="has no finished run"):
        records.write_records(tmp_path, tmp_path / "records")
    record = run("iql", H, 0, [1, 2], eval_freq=40_000)
    del record.settings["hidden_dim"]
    write_runs([record], tmp_path)
    with pytest.raises(ValueError, match=f"iql/{H}/seed_0 does not say its hidden_dim"):
        records.read_records(tmp_path)


def test_the_origin_names_the_data_without_its_folder():
    assert run("iql", H, 0, [1], data="/somewhere/mixed.hdf5").sizes.startswith("data mixed.hdf5,")
    assert "minari:a/b-v0" in run("iql", H, 0, [1], data="minari:a/b-v0").sizes


def test_matched_runs_share_seed_origin_and_steps():
    group = flat("iql", H, [1, 2, 3]) + flat("iql", HC, [1])
    other = [run("pex", H, s, [0, 5, 6], online_iterations=20_000) for s in (1, 2, 3)]
    other[0].settings["batch_size"] = 64
    ((first, second),) = records.matched(records.by_seed(group + other), ["iql", "pex"], H)
    assert (first.seed, second.seed) == (2, 2)
    assert first.scores()[0].tolist() == [0, 10_000, 20_000] and first.n_steps == 20_000
    assert records.matched(records.by_seed(group), ["iql", "pex"], H) == []


def test_runs_that_were_evaluated_at_other_steps_are_no_pair():
    """Their last four evaluations would be of other parts of fine-tuning."""
    found = [run("iql", H, 0, [1] * 5), run("dare_iql", H, 0, [1] * 41)]
    assert records.matched(records.by_seed(found), ["iql", "dare_iql"], H) == []
    long = run("dare_iql", H, 0, [1] * 9, online_iterations=80_000)
    (pair,) = records.matched(records.by_seed([found[0], long]), ["iql", "dare_iql"], H)
    assert [r.n_steps for r in pair] == [40_000, 40_000]


def test_a_run_that_was_moved_away_is_none(tmp_path):
    runs = write_runs([run("iql", H, 0, [1] * 5), run("iql", H, 1, [2] * 5)], tmp_path)
    for name in ("seed_0_old", "seed_0_2"):  # int("0_2") is 2
        (runs / "iql" / H / name).mkdir()
        for file in (runs / "iql" / H / "seed_0").iterdir():
            (runs / "iql" / H / name / file.name).write_text(file.read_text())
    assert [record.seed for record in records.read_records(runs)] == [0, 1]


def test_what_is_not_finished_is_named(tmp_path):
    runs = write_runs([run("iql", H, 0, [1] * 5), run("iql", H, 1, [2] * 5)], tmp_path)
    (runs / "iql" / H / "seed_1" / "train.csv").write_text("phase,step\nonline,39000\n")
    assert records.unfinished(runs) == [f"iql/{H}/seed_1"]
    assert [record.seed for record in records.read_records(runs)] == [0]


def test_shorter_runs_that_are_finished_are_collected_too(tmp_path):
    short = run("iql", H, 1, [2] * 4, online_iterations=30_000)
    runs = write_runs([run("iql", H, 0, [1] * 6, online_iterations=50_000), short], tmp_path)
    assert [r.n_steps for r in records.read_runs(runs, until=40_000)] == [40_000, 30_000]


def test_records_without_their_evaluations_are_refused(tmp_path):
    runs = write_runs([run("iql", H, 0, [1] * 5)], tmp_path / "runs")
    records.write_records(runs, tmp_path / "records")
    (tmp_path / "records" / "eval.csv").unlink()
    with pytest.raises(ValueError, match=f"no evaluation of iql/{H}/seed_0: collect the records"):
        records.read_records(tmp_path / "records")


def test_rows_are_added_in_place_of_their_like_and_to_no_other_table(tmp_path):
    path = tmp_path / "rows.csv"
    records.add_rows(path, [{"name": "a", "step": 1, "auc": 0.25}], ("name", "step"), own="auc")
    new = [{"name": "a", "step": step, "auc": 0.5} for step in (1.0, 2.0)]
    records.add_rows(path, new, ("name", "step"), own="auc")
    assert records.read_rows(path) == new
    with pytest.raises(SystemExit, match="rows.csv is another program's table, without std"):
        records.add_rows(path, [{"name": "a", "step": 1, "std": 1.0}], ("name", "step"), own="std")
    assert records.read_rows(path) == new


def test_floats_are_written_to_six_digits():
    text = records.csv_text([{"a": 1 / 3, "b": 7}, {"a": np.float64(2e9), "c": "x"}])
    assert text == "a,b,c\n0.333333,7,\n2000000000,,x\n"  # a whole number stays one
