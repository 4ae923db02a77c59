"""One attempt at a run: its process, log and job.yaml."""

import _thread
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import yaml

import lib.attempt
from lib.attempt import attempt, git_commit, joined, last_line
from lib.experiments import ROOT
from lib.records import is_finished

DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
COMMAND = ["python", "algorithms/iql.py", "--env", "hopper-medium-v2", "--data", str(DATA)]
COMMAND += """--wandb disabled --device cpu --hidden_dim 8 --batch_size 8 --offline_iterations 1
    --online_iterations 2 --initial_collection_steps 1 --n_episodes 1 --eval_freq 2
    --log_freq 1""".split()


def test_an_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(lib.attempt, "git_commit", lambda: "abc1234")
    directory, log = tmp_path / "iql" / "hopper-medium-v2" / "seed_0", tmp_path / "log"
    words = [*COMMAND, "--runs_dir", str(tmp_path)]
    with pytest.raises(RuntimeError, match="error: --beta must be from 0 to .*, not -1"):
        attempt([*words, "--beta", "-1"], 2, str(directory), str(log))
    attempt(words, 2, str(directory), str(log))
    job = yaml.safe_load((directory / "job.yaml").read_text())
    assert job["attempts"] == 2 and job["commit"] == "abc1234" and " x " in job["hardware"]
    assert job["command"] == " ".join(words) and job["torch"][0].isdecimal()
    assert 0.5 < job["seconds"] < 240 and 0.1 < job["peak_memory_gb"] < 2
    assert last_line(log).startswith("curve: ") and "attempt 2: python" in log.read_text()
    before = log.read_text()
    attempt(words, 2, str(directory), str(log))  # it is finished
    assert log.read_text() == before
    words += ["--online_iterations", "4"]
    monkeypatch.setattr(lib.attempt, "git_commit", lambda: "def5678")
    attempt(words, 4, str(directory), str(log))  # goes on
    assert is_finished(directory, 4)
    job = yaml.safe_load((directory / "job.yaml").read_text())
    assert job["commit"] == "abc1234 and def5678" and " and " not in job["hardware"]


def test_a_run_that_another_grid_finishes_meanwhile_is_left_as_it_is(tmp_path, monkeypatch):
    """And its cost with it."""
    directory, log = tmp_path / "iql" / "hopper-medium-v2" / "seed_0", tmp_path / "log"

    class Lock:
        def __init__(self, path):
            assert path == directory.with_suffix(".lock")

        def __enter__(self):  # the other grid's run ends
            (directory / "job.yaml").write_text("seconds: 7.5\n")
            monkeypatch.setattr(lib.attempt, "is_finished", lambda *_: True)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(lib.attempt, "FileLock", Lock)
    attempt(COMMAND, 2, str(directory), str(log))
    assert (directory / "job.yaml").read_text() == "seconds: 7.5\n" and not log.exists()


def test_what_several_attempts_were_made_with():
    assert joined(None, "a") == joined("a", "a") == "a" and joined(None, None) is None
    assert joined("a", "b") == joined("a and b", "b") == "a and b"
    assert joined("a", None) == "a and unknown"


def test_a_cancelled_attempt_saves_and_stops_also_under_nohup(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    directory, log = tmp_path / "iql" / "hopper-medium-v2" / "seed_0", tmp_path / "log"
    words = [*COMMAND, "--runs_dir", str(tmp_path), "--offline_iterations", "3000"]

    def cancel():  # as Ray does, once the run trains
        while not (directory / "train.csv").exists():
            time.sleep(0.1)
        _thread.interrupt_main()

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        threading.Thread(target=cancel, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            attempt(words, 2, str(directory), str(log))
    finally:
        signal.signal(signal.SIGINT, before)
    assert last_line(log).startswith("interrupted;")


def test_a_commit_is_dirty_with_a_changed_file_or_a_new_script(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.attempt, "ROOT", tmp_path)
    (tmp_path / "algorithms").mkdir()
    file = tmp_path / "README.md"
    file.write_text("one")
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    assert re.fullmatch("[0-9a-f]{7,}", git_commit())
    (tmp_path / "notes.txt").write_text("of no script")
    assert not git_commit().endswith("-dirty")
    script = tmp_path / "algorithms" / "mine.py"
    script.write_text("")
    assert git_commit().endswith("-dirty")
    script.unlink()
    file.write_text("two")
    assert git_commit().endswith("-dirty")


def test_last_line(tmp_path):
    assert last_line(tmp_path / "none") == ""
    (tmp_path / "log").write_text("one\ntwo \n\n")
    assert last_line(tmp_path / "log") == "two"
