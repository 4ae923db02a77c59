"""A run as a function of a notebook: stopped and called again, in threads, from edited copies."""

import importlib.util
import signal
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from tiny_runs import (
    AGENTS,
    SCRIPTS,
    assert_same_end,
    checkpoint,
    config_of,
    directory,
    interrupt,
    last_line,
    rows,
    run,
)

SHORT = dict(offline_iterations=20, online_iterations=20, initial_collection_steps=10)
SHORT |= dict(n_episodes=1, offline_eval_freq=20)


def test_the_stop_button_releases_the_lock(monkeypatch, group, tmp_path):
    """Although the notebook keeps the traceback, and with it the run."""
    agent = getattr(group.baseline, AGENTS[group.baseline])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as kept:
        interrupt(patch, agent, "train", 5)
        run(group.baseline, tmp_path, **SHORT)
    path = directory(tmp_path, group.baseline)
    with FileLock(path / "lock", timeout=0):
        assert kept.value.__traceback__ is not None
    run(group.baseline, tmp_path, **SHORT)
    assert checkpoint(path)["step"] == 20


def test_ctrl_c_on_the_command_line_ends_in_one_line(monkeypatch, group, tmp_path):
    interrupt(monkeypatch, getattr(group.baseline, AGENTS[group.baseline]), "train", 5)
    message = last_line(group.baseline, tmp_path, **SHORT)
    assert message == "interrupted; the same command resumes from the last checkpoint"


@SCRIPTS
def test_no_signal_handler_stays_behind(script, tmp_path):
    names = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    before = [signal.getsignal(name) for name in names]
    # The run starts, and ends because its data is not there or because it is through.
    last_line(script, tmp_path, data="no_such_file.hdf5")
    assert [signal.getsignal(name) for name in names] == before
    run(script, tmp_path, **SHORT)
    assert [signal.getsignal(name) for name in names] == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_run_in_a_thread_is_one_in_the_main_thread(group, baseline, tmp_path):
    thread = threading.Thread(target=run, args=(group.baseline, tmp_path))
    thread.start()
    thread.join()
    assert_same_end(directory(tmp_path, group.baseline), baseline)


def test_a_folder_named_tilde_is_the_home_folder(monkeypatch, group, tmp_path):
    """Of runs, the cache, and --load_model."""
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    run(group.dare, "~/runs", **SHORT)
    assert (directory(home / "runs", group.dare) / "checkpoint.pt").exists()
    assert {p.name.split("-")[0] for p in (home / "runs" / "cache").glob("*.pt")} == {
        "behavior",
        "support",
    }
    agent = directory("~/runs", group.dare) / "offline.pt"
    run(group.baseline, "~/runs", **SHORT, load_model=str(agent))
    assert rows(directory(home / "runs", group.baseline), "train", "offline") == []
    assert list(work.iterdir()) == []


def edited_copy(script, path, old, new):
    """A script of one's own: a copy with one line changed, imported."""
    source = Path(script.__file__).read_text()
    assert source.count(old) == 1
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_edited_loss_is_trained_and_filed_under_the_name_of_the_copy(
    monkeypatch, group, tmp_path
):
    """Beside a run of the loss before, whose offline agent it must not get."""
    old, new, column, name = group.edit
    copy = edited_copy(group.baseline, tmp_path / "my_variant.py", old, new)
    monkeypatch.setattr(copy.Run, "plot", lambda run: None)
    paths = [run(group.baseline, tmp_path, **SHORT), directory(tmp_path, copy, "my_variant")]
    settings = asdict(config_of(group.baseline, tmp_path, **SHORT))
    del settings["name"]
    copy.train(copy.TrainConfig(**settings))
    before, after = (float(rows(path, "train", "offline")[-1][column]) for path in paths)
    assert before != 0.0 == after
    agents = [torch.load(path / "offline.pt", weights_only=True)["trainer"] for path in paths]
    assert agents[0]["total_it"] == agents[1]["total_it"] == 20
    same = [torch.equal(*x) for x in zip(*(agent[name].values() for agent in agents), strict=True)]
    assert not all(same)
