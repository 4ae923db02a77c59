"""Files that are written whole or not at all, and read only if they are intact."""

import errno
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from d4rl_gymnasium.files import DamagedFileError, contents_of, load, save, save_figure, write

STATE = {
    "weights": torch.arange(12.0).reshape(3, 4),
    "count": torch.tensor(7),
    "rows": {"eval": [{"phase": "online", "step": 3, "score": 0.1}], "none": None},
}


def assert_state(found):
    assert found.keys() == STATE.keys() and found["rows"] == STATE["rows"]
    assert torch.equal(found["weights"], STATE["weights"]) and found["count"] == 7


@pytest.fixture
def file(tmp_path):
    save(tmp_path / "state.pt", STATE)
    return tmp_path / "state.pt"


def test_what_was_saved_is_loaded(file):
    assert_state(load(file))
    assert [p.name for p in file.parent.iterdir()] == ["state.pt"]


def test_what_could_not_be_loaded_is_not_saved(file):
    before = file.read_bytes()
    with pytest.raises(
        ValueError, match="state.pt is not written: .* no values of numpy or objects"
    ):
        save(file, STATE | {"threshold": np.float64(0.5)})
    assert file.read_bytes() == before and [p.name for p in file.parent.iterdir()] == ["state.pt"]


@pytest.mark.parametrize("data", ["text\n", b"\x00\r\n\xff", "ü\n"])
def test_data_is_written_as_it_is(tmp_path, data):
    write(tmp_path / "file", data)
    assert (tmp_path / "file").read_bytes() == (data.encode() if isinstance(data, str) else data)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_alone(monkeypatch, file, function, error):
    before = file.read_bytes()

    def fail(*_):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        save(file, {"weights": torch.zeros(100)})
    assert [p.name for p in file.parent.iterdir()] == ["state.pt"]
    assert file.read_bytes() == before


def test_a_full_disk_names_the_file(monkeypatch, tmp_path):
    """Also under a picture."""

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name, function, content in [("a.pt", save, {}), ("b.png", save_figure, Figure())]:
        with pytest.raises(OSError) as error:
            function(tmp_path / name, content)
        assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("blamed", ["state.pt", "state.pt.tmp"])
def test_a_folder_in_the_way_is_named(tmp_path, blamed):
    (tmp_path / blamed).mkdir()
    with pytest.raises(IsADirectoryError) as error:
        save(tmp_path / "state.pt", STATE)
    assert error.value.filename == str(tmp_path / blamed)
    assert [p.name for p in tmp_path.iterdir()] == [blamed]


def test_a_left_over_of_a_kill_is_replaced(file):
    file.with_name("state.pt.tmp").write_bytes(b"half of it")
    save(file, STATE)
    assert [p.name for p in file.parent.iterdir()] == ["state.pt"]


@pytest.mark.parametrize(
    "use, reason",
    [
        (lambda state: state["step"], "'step' is missing"),
        (lambda state: state["rows"].weights, "no attribute"),
        (lambda state: state["count"]["x"], "."),
        (lambda state: torch.nn.Linear(3, 4).load_state_dict(state), "Error(s) in loading"),
    ],
)
def test_contents_that_do_not_fit_are_the_fault_of_the_file(file, use, reason):
    with pytest.raises(DamagedFileError) as error, contents_of(file):
        use(load(file))
    message = str(error.value)
    assert message.startswith(f"{file} does not hold what this version reads there (")
    assert reason in message and "\n" not in message and "move it away" in message


def test_other_errors_are_not(file):
    with pytest.raises(FloatingPointError), contents_of(file):
        raise FloatingPointError("a loss")


def test_a_file_is_on_the_disk_before_it_takes_its_name(monkeypatch, file):
    """A machine that loses its power just after the renaming has the old or the new file."""
    events, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(descriptor):
        events.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    def watched_replace(source, target):
        events.append((Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write(file, "12345")
    assert events == [5, ("state.pt.tmp", "state.pt")]


def test_a_reader_beside_a_writer_sees_whole_files_alone(file):
    """One of two states, 50 times each, while they take turns."""
    states, done, written = [STATE["weights"], torch.ones(3000)], threading.Event(), []

    def turns():
        try:
            for i in range(100):
                save(file, {"weights": states[i % 2]})
                written.append(i)
        finally:  # else the reader would wait for ever
            done.set()

    writer = threading.Thread(target=turns)
    writer.start()
    n_read = 0
    while not done.is_set() or not n_read:
        found = load(file)["weights"]
        assert any(torch.equal(found, x) for x in states)
        n_read += 1
    writer.join()
    assert len(written) == 100


def assert_damaged(file):
    """Loading fails in one line that names the file."""
    with pytest.raises(DamagedFileError) as error:
        load(file)
    message = str(error.value)
    assert message.startswith(f"{file} is damaged (") and "\n" not in message


def test_what_a_link_in_the_way_leads_to_is_left_alone(tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / "file.tmp").symlink_to(other)
    write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()
    assert other.read_text() == "mine"


def test_a_changed_bit_is_seen_or_does_not_matter(file):
    """Wherever it is: in the numbers, the names, the sizes, the checksums or the padding."""
    data, n_damaged = file.read_bytes(), 0
    for i in range(0, len(data), 5):
        changed = bytearray(data)
        changed[i] ^= 1 << i // 5 % 8
        file.write_bytes(changed)
        try:
            found = load(file)
        except DamagedFileError:
            n_damaged += 1
        else:
            assert_state(found)
    assert n_damaged > 150


def test_a_changed_bit_of_a_number_is_seen(file):
    data = file.read_bytes()
    numbers = STATE["weights"].numpy().tobytes()
    assert data.count(numbers) == 1
    for i in range(data.index(numbers), data.index(numbers) + len(numbers)):
        changed = bytearray(data)
        changed[i] ^= 1
        file.write_bytes(changed)
        assert_damaged(file)


def test_a_part_that_is_marked_as_a_folder_is_seen(file):
    """PyTorch would leave its numbers as they come with the memory."""
    data, mark = bytearray(file.read_bytes()), 38  # bytes into an entry of the table of contents
    entries = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    for i in entries:
        data[i + mark] ^= 0x10
        file.write_bytes(data)
        assert_damaged(file)
        data[i + mark] ^= 0x10
    assert len(entries) >= 3


def test_a_cut_file_is_seen(file):
    data = file.read_bytes()
    for n in range(0, len(data), 16):
        file.write_bytes(data[:n])
        assert_damaged(file)


@pytest.mark.parametrize("data", [b"", b"some text\n", b"PK\x03\x04", pickle.dumps({"a": 1})])
def test_another_file_is_refused(file, data):
    file.write_bytes(data)
    assert_damaged(file)


class Command:
    """Unpickling it would run a command."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_no_code_is_unpickled(monkeypatch, file):
    monkeypatch.chdir(file.parent)
    torch.save({"state": Command()}, file)
    assert_damaged(file)
    assert [p.name for p in file.parent.iterdir()] == ["state.pt"]


def test_a_missing_file_is_no_damaged_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no_such_file.pt"):
        load(tmp_path / "no_such_file.pt")
