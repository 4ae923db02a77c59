"""What cannot be done ends in one line and changes nothing."""

import io

import pytest
import torch
from filelock import FileLock, Timeout
from tiny_runs import AGENTS, SCRIPTS, contents, directory, interrupt, last_line, run


@pytest.fixture(scope="module")
def stopped(group, tmp_path_factory):
    """Directory of a baseline's run that was stopped at online step 130."""
    runs_dir = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, getattr(group.baseline, AGENTS[group.baseline]), "train", 40 + 70)
        run(group.baseline, runs_dir, offline_iterations=40)
    return directory(runs_dir, group.baseline)


def refused(group, path, **settings):
    """The line with which the run is refused, which leaves all of its files as they are."""
    before = contents(path)
    message = last_line(group.baseline, path.parents[2], offline_iterations=40, **settings)
    assert contents(path) == before
    assert message.startswith("error: ")
    return message


def test_a_finished_run_is_not_started_again(group, finished):
    before = contents(finished)
    message = last_line(group.dare, finished.parents[2])
    assert message == f"error: {finished} is finished: use another --seed or --name"
    assert contents(finished) == before


def test_other_settings_are_refused(group, stopped):
    message = refused(group, stopped, discount=0.9, utd=2, batch_size=16)
    assert message.startswith(f"error: {stopped} was run with another ")
    named = message.split("with another ")[1].split(":")[0]
    # In the order of TrainConfig, with the values that go on.
    assert named == "utd (1), batch_size (32), discount (0.99)"
    assert message.endswith(": use another --name")


def test_another_script_is_refused(group, stopped):
    """A variant that kept the name of what it was copied from."""
    before, runs_dir = contents(stopped), stopped.parents[2]
    name = group.baseline.__name__
    message = last_line(group.dare, runs_dir, name=name, offline_iterations=40)
    assert message.startswith(f"error: {stopped} was run with another ")
    assert "script" in message and "exchange" in message
    assert contents(stopped) == before


def test_fewer_steps_than_are_done_are_refused(group, stopped):
    message = refused(group, stopped, online_iterations=90)
    assert message.startswith(f"error: {stopped} is finished")


def test_a_second_process_in_the_same_directory_is_refused(group, stopped):
    with FileLock(stopped / "lock"):
        message = refused(group, stopped)
    assert message == f"error: another process is training in {stopped}"


def flip_a_bit(data):
    """In a weight."""
    trainer = torch.load(io.BytesIO(data), weights_only=True)["trainer"]
    weights = next(iter(trainer["actor"].values())).numpy().tobytes()
    changed = bytearray(data)
    changed[data.index(weights)] ^= 1
    return bytes(changed)


def test_a_damaged_checkpoint_is_refused(group, stopped):
    file = stopped / "checkpoint.pt"
    intact = file.read_bytes()
    try:
        file.write_bytes(flip_a_bit(intact))
        message = refused(group, stopped)
    finally:
        file.write_bytes(intact)
    assert message.startswith(f"error: {file} is damaged (")
    assert message.endswith("): put a copy of it back, or move it away and make it anew")


def no_optimizer(state):
    del state["trainer"]["optimizer"]


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda state: state.update(phase="afterwards"), "afterwards step 100 is impossible"),
        (lambda state: state.update(step=101), "online step 101 is impossible"),
        (lambda state: state.update(phase="offline"), "offline step 100 is impossible"),
        (lambda state: state.pop("settings"), "'settings' is missing"),
        (lambda state: state.pop("rng"), "'rng' is missing"),
        (lambda state: state.pop("env"), "'env' is missing"),
        (no_optimizer, "'optimizer' is missing"),
        (lambda state: state["trainer"]["actor"].popitem(), "Error(s) in loading"),
        (lambda state: state.update(rng=torch.zeros(3)), "ByteTensor"),
    ],
)
def test_a_checkpoint_that_cannot_be_is_refused(group, stopped, change, reason):
    """By an edit, or a script of another version."""
    file = stopped / "checkpoint.pt"
    intact = file.read_bytes()
    try:
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)
        message = refused(group, stopped)
    finally:
        file.write_bytes(intact)
    assert message.startswith(f"error: {file} does not hold what this version reads there (")
    assert reason in message


def test_a_checkpoint_behind_a_dangling_link_is_no_new_run(group, stopped, tmp_path):
    path = directory(tmp_path, group.baseline)
    path.mkdir(parents=True)
    (path / "checkpoint.pt").symlink_to(tmp_path / "unmounted" / "checkpoint.pt")
    message = last_line(group.baseline, tmp_path, offline_iterations=40)
    assert message.startswith(f"error: {path / 'checkpoint.pt'}: No such file or directory: ")
    assert (path / "checkpoint.pt").is_symlink()


def test_the_checkpoint_is_read_under_the_lock(monkeypatch, group, stopped):
    """Else a process that just ends could write a newer one in between."""
    read, load = [], group.baseline.load

    def locked(path):
        with pytest.raises(Timeout):
            FileLock(stopped / "lock", timeout=0, is_singleton=False).acquire()
        read.append(path)
        return load(path)

    monkeypatch.setattr(group.baseline, "load", locked)
    refused(group, stopped, online_iterations=90)
    assert read == [stopped / "checkpoint.pt"]


# --- Agents of --load_model ---


def test_a_checkpoint_is_no_offline_agent(group, stopped, tmp_path):
    file = stopped / "checkpoint.pt"
    message = last_line(group.baseline, tmp_path, load_model=str(file))
    assert message == f"error: {file} is a checkpoint: use the run's offline.pt"


def test_an_agent_of_other_settings_is_refused(group, baseline, tmp_path):
    file = baseline / "offline.pt"
    settings = {"load_model": str(file), "discount": 0.9, "hidden_dim": 8}
    message = last_line(group.baseline, tmp_path, **settings)
    assert message == f"error: {file} was trained with another discount, hidden_dim"
    assert not (directory(tmp_path, group.baseline) / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["no_such_file.pt", "damaged.pt", "support.pt"])
def test_a_file_that_is_no_offline_agent_is_refused(group, baseline, tmp_path, name):
    file = tmp_path / name
    if name == "damaged.pt":
        file.write_bytes(flip_a_bit((baseline / "offline.pt").read_bytes()))
    elif name == "support.pt":
        torch.save({"rows": torch.zeros(3), "support": torch.zeros(3, 2)}, file)
    message = last_line(group.baseline, tmp_path, load_model=str(file))
    assert message.startswith("error: ") and str(file) in message


# --- Data and machine ---


@SCRIPTS
def test_an_unknown_data_path_ends_in_one_line(tmp_path, script):
    file = tmp_path / "no_such_file.hdf5"
    message = last_line(script, tmp_path / "runs", data=str(file))
    assert message.startswith("error: ") and str(file) in message
    assert not (tmp_path / "runs").exists()


def test_a_runs_dir_that_is_a_file_ends_in_one_line(group, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    message = last_line(group.baseline, file)
    assert message.startswith("error: ") and str(file) in message


def test_a_full_disk_ends_in_one_line(monkeypatch, group, tmp_path):
    """And the checkpoint of the last time stays."""
    save, calls = group.baseline.save, []

    def full(path, state):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(path))
        save(path, state)

    monkeypatch.setattr(group.baseline, "save", full)
    sizes = dict(offline_iterations=20, online_iterations=0, checkpoint_freq=10)
    message = last_line(group.baseline, tmp_path, **sizes)
    path = directory(tmp_path, group.baseline)
    reason = f"{path / 'checkpoint.pt'}: No space left on device"
    assert message == f"error: {reason}: make room, then the same command resumes"
    assert torch.load(path / "checkpoint.pt")["step"] == 10
