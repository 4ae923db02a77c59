"""One attempt at a run: its process, log and job.yaml."""

import _thread
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from lib.attempt import attempt, last_line
from lib.experiments import ROOT
from lib.records import is_finished

DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
COMMAND = ["python", "algorithms/iql.py", "--env", "hopper-medium-v2", "--data", str(DATA)]
COMMAND += """--wandb disabled --device cpu --hidden_dim 8 --batch_size 8 --offline_iterations 1
    --online_iterations 2 --initial_collection_steps 1 --n_episodes 1 --eval_freq 2
    --log_freq 1""".split()


def test_an_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    directory, log = tmp_path / "iql" / "hopper-medium-v2" / "seed_0", tmp_path / "log"
    words = [*COMMAND, "--runs_dir", str(tmp_path)]
    with pytest.raises(RuntimeError, match="error: --beta must be from 0 to .*, not -1"):
        attempt([*words, "--beta", "-1"], 2, str(directory), str(log), "abc1234")
    attempt(words, 2, str(directory), str(log), "abc1234")
    job = yaml.safe_load((directory / "job.yaml").read_text())
    assert job["attempts"] == 2 and job["commit"] == "abc1234" and " x " in job["hardware"]
    assert job["command"] == " ".join(words) and job["torch"][0].isdecimal()
    assert 0.5 < job["seconds"] < 240 and 0.1 < job["peak_memory_gb"] < 2
    assert last_line(log).startswith("curve: ") and "attempt 2: python" in log.read_text()
    before = log.read_text()
    attempt(words, 2, str(directory), str(log), "abc1234")  # it is finished
    assert log.read_text() == before
    words += ["--online_iterations", "4"]
    attempt(words, 4, str(directory), str(log), "abc1234")  # goes on
    assert is_finished(directory, 4)


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
            attempt(words, 2, str(directory), str(log), "abc1234")
    finally:
        signal.signal(signal.SIGINT, before)
    assert last_line(log).startswith("interrupted;")


def test_last_line(tmp_path):
    assert last_line(tmp_path / "none") == ""
    (tmp_path / "log").write_text("one\ntwo \n\n")
    assert last_line(tmp_path / "log") == "two"
