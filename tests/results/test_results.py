"""The programs in results/ that compare runs and settings."""

import csv
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

import dare_iql

RESULTS = Path(__file__).parents[2] / "results"
DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
ENV = "hopper-medium-v2"


@pytest.fixture
def program(monkeypatch):
    """Import a program of results/ and call it with arguments."""
    monkeypatch.syspath_prepend(RESULTS)

    def call(name, *args):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        module.main()

    return call


@pytest.mark.parametrize("support", [0, 30])
def test_agreement_of_a_run(tmp_path, program, capsys, monkeypatch, support):
    args = f"""--env {ENV} --data '{DATA}' --wandb disabled --device cpu --hidden_dim 8
        --batch_size 32 --offline_iterations 10 --online_iterations 60 --n_episodes 1
        --initial_collection_steps 40 --behavior_iterations 10 --energy_iterations 5
        --behavior_batch_size 16 --behavior_width 8 --energy_hidden 8 --energy_batch_size 8
        --n_support 2 --n_support_states {support} --diffusion_steps 8 --runs_dir '{tmp_path}'"""
    dare_iql.main(shlex.split(args))
    run = tmp_path / "dare_iql" / ENV / "seed_0"
    capsys.readouterr()
    program("agreement", run, "--batches", 3)
    found = {
        re.split(r"\s{2,}", line)[0]: [float(x) for x in re.split(r"\s{2,}", line)[1:]]
        for line in capsys.readouterr().out.splitlines()
        if re.search(r"\s{2,}-?\d", line)
    }
    assert len(found) == (9 if support else 11)  # resampling needs the support of all states
    assert found["8 steps"][:3] == [1.0, 1.0, 1.0]  # the run's own setting
    for name in ("fresh noise", "16 references") + (() if support else ("resample",)):
        correlation, same, common, exchanged = found[name]
        assert correlation < 1 and 0 <= common <= same <= 1 and 0 < exchanged <= 16, name
    assert found["30 steps"][0] > found["fresh noise"][0]


def finished_run(path, scores, qs):
    path.mkdir(parents=True)
    (path / "summary.yaml").write_text(yaml.safe_dump({"last_four_mean": 7.0}))
    for name, column, values in [("eval", "normalized_score", scores), ("train", "q", qs)]:
        with open(path / f"{name}.csv", "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["phase", "step", column, "steps_per_second"])
            writer.writerows(["offline", i, x, 10] for i, x in enumerate(values))


def test_compare(tmp_path, program, capsys):
    for seed, shift in [(0, 1.0), (1, 3.0)]:
        finished_run(tmp_path / "a" / ENV / f"seed_{seed}", [1, 10, 20], [5, 50])
        finished_run(tmp_path / "b" / ENV / f"seed_{seed}", [1, 10, 20 + shift], [5, 50 - shift])
    finished_run(tmp_path / "a" / ENV / "seed_2", [0, 0, 0], [0, 0])  # of no other's
    program("compare", tmp_path, "a", "b", "--csv", tmp_path / "single.csv")
    lines = capsys.readouterr().out.splitlines()
    expected = [f"| {ENV} | offline score | 2 | 20.0 ± 0.0 | 22.0 ± 1.0 | +2.0 | +1.0 to +3.0 |"]
    expected += [f"| {ENV} | mean offline score | 2 | 15.0 ± 0.0 | 16.0 ± 0.5 | +1.0 "
                 "| +0.5 to +1.5 |"]  # fmt: skip
    expected += [f"| {ENV} | offline mean Q | 2 | 50.0 ± 0.0 | 48.0 ± 1.0 | -2.0 | -3.0 to -1.0 |"]
    assert lines[2:5] == expected and len(lines) == 6
    with open(tmp_path / "single.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 8 and rows[0]["quantity"] == "offline score" and rows[0]["b"] == "21.0"
    with pytest.raises(SystemExit, match="no seed in .* is finished by both a and c"):
        program("compare", tmp_path, "a", "c")


def test_records_are_read_back(tmp_path, program, monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    collect = importlib.import_module("collect")
    run = tmp_path / "runs" / "dare_iql" / ENV / "seed_3"
    finished_run(run, [1, 2], [5, 6])
    (run / "config.yaml").write_text(yaml.safe_dump({"seed": 3, "data": "regenerated"}))
    (run / "eval.csv").write_text(
        "phase,step,normalized_score,success_rate\noffline,5,1.5,\nonline,0,2.5,\n"
        + "".join(f"online,{i},{10 * i + 0.125},\n" for i in range(1, 7))
    )
    (run / "train.csv").write_text("phase,step,tau\noffline,5,\nonline,1,0.5\n")
    finished_run(tmp_path / "runs" / "prepare_dare" / ENV / "seed_0", [1], [5])  # no result
    (run / "job.yaml").write_text(yaml.safe_dump({"commit": "abc", "seconds": None}))
    first = collect.read_records(tmp_path / "runs")
    collect.write_records(first, tmp_path / "records")
    second = collect.read_records(tmp_path / "records")
    assert len(first) == len(second) == 1
    for record in first + second:
        assert (record.method, record.env, record.seed) == ("dare_iql", ENV, 3)
        assert record.settings["data"] == "regenerated" and record.settings["seed"] == 3
        assert record.settings["commit"] == "abc" and "seconds" not in record.settings
        assert record.offline_score == 2.5 and record.best == 60.125
        assert record.last_four == pytest.approx((30 + 40 + 50 + 60) / 4 + 0.125)
        assert record.scores("offline")[0].tolist() == [5]
        assert record.train[-1] == {"phase": "online", "step": 1, "tau": 0.5}
    with pytest.raises(FileNotFoundError, match="neither finished runs nor runs.csv"):
        collect.read_records(tmp_path)


def test_a_commit_is_text(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    collect = importlib.import_module("collect")
    rows = [{"phase": "online", "step": 0, "normalized_score": 1.0}]
    for seed, commit in enumerate(("4829103", "12e4567")):
        record = collect.Record("iql", ENV, seed, {"commit": commit, "beta": 3.0}, rows, rows)
        collect.write_records([record], tmp_path / commit)
        (found,) = collect.read_records(tmp_path / commit)
        assert found.settings["commit"] == commit and found.settings["beta"] == 3.0


def test_the_table_of_finished_runs(tmp_path, program, capsys):
    run = tmp_path / "runs" / "iql" / ENV / "seed_1"
    finished_run(run, [1, 2], [5, 6])
    config = {"name": "iql", "env": ENV, "data": "a/b.hdf5", "offline_iterations": 2_000}
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"online_iterations": 10}))
    scores = {"offline_score": 2.0, "last_four_mean": 7.0, "best": 9.0}
    (run / "summary.yaml").write_text(yaml.safe_dump(scores))
    (run / "train.csv").write_text("phase,q_loss,steps_per_second\noffline,1,50\nonline,,90\n")
    args = ["--csv", tmp_path / "all.csv", "--records", tmp_path / "records"]
    program("collect", tmp_path / "runs", *args)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"| iql | {ENV} | b.hdf5 | 2,000 | 10 | 1 | 2.0 ± 0.0 | 7.0 ± 0.0 |")
    assert last.endswith("| 9.0 ± 0.0 | 50 | cached |")
    with open(tmp_path / "all.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["normalized_score"] for row in rows] == ["1", "2"] and rows[0]["seed"] == "1"
    assert (tmp_path / "records" / "runs.csv").exists()
    assert not (tmp_path / "records" / "prepared.csv").exists()
    other = tmp_path / "runs" / "prepare_dare" / ENV / "seed_0"
    finished_run(other, [1], [5])
    (other / "job.yaml").write_text(yaml.safe_dump({"seconds": 5.5, "hardware": "2 cores"}))
    program("collect", tmp_path / "runs", *args)
    with open(tmp_path / "records" / "prepared.csv", newline="") as f:
        (row,) = csv.DictReader(f)
    assert row == {"prepared": "dare", "env": ENV, "seed": "0", "seconds": "5.5",
                   "hardware": "2 cores"}  # fmt: skip
    with pytest.raises(SystemExit, match="no finished run"):
        program("collect", tmp_path / "records")


def test_parts_of_a_step_add_up_and_count_their_own_time_alone(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    shares, now = importlib.import_module("shares"), [0.0]
    monkeypatch.setattr(shares.time, "perf_counter", lambda: now[0])

    def takes(seconds, *inner):
        def method():
            now[0] += seconds
            for call in inner:
                call()

        return method

    clock = shares.Clock(2, 4)
    energy = clock.timed("energy", takes(3.0))
    update = clock.timed("agent's update", takes(5.0, energy, takes(1.0), energy))
    step = clock.timed("environment", takes(0.5))
    for _ in range(6):  # of which the third and the fourth count
        now[0] += 0.25
        update()
        step()
    assert clock.result == {"agent's update": 12, "energy": 12, "environment": 1, "rest": 0.5}


def test_shares_of_a_step(tmp_path, program, capsys, monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    shares = importlib.import_module("shares")
    more = {"data": DATA, "batch_size": 16, "initial_collection_steps": 20, "diffusion_steps": 2}
    more |= {"n_support": 2, "behavior_width": 8, "hidden_dim": 16, "energy_hidden": 8}
    monkeypatch.setattr(shares, "TINY", shares.TINY | more)
    methods = ["iql", "dare_iql", "dare_iql_resample"]
    program("shares", "--env", ENV, "--methods", ",".join(methods), "--steps", 110,
            "--csv", tmp_path / "shares.csv")  # fmt: skip
    assert capsys.readouterr().out.count("\n") == 5
    with open(tmp_path / "shares.csv", newline="") as f:
        rows = {row["method"]: row for row in csv.DictReader(f)}
    for row in rows.values():
        parts = {k: float(row[k]) for k in [*shares.PARTS, "rest"]}
        assert sum(parts.values()) == pytest.approx(float(row["ms per step"]), abs=0.01)
        assert parts["environment"] > 0 and parts["acting"] > 0 and parts["agent's update"] > 0
        assert (parts["energy"] > 0) == (row["method"] == "dare_iql")
        assert (parts["reference actions"] > 0) == (row["method"] != "iql")
        assert (parts["support actions"] > 0) == (row["method"] != "iql")
    with pytest.raises(SystemExit, match="no method sac; there are cql, "):
        program("shares", "--methods", "iql,sac")
