"""Data files: D4RL's own transitions to the last bit, and one clear error for each fault.

`sample_hopper.hdf5` and the digests of what D4RL 1.1 made of it were recorded with that program.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

import d4rl_gymnasium as d4rl
from d4rl_gymnasium import data as data_module
from d4rl_gymnasium.download import DownloadError

SAMPLE = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
RECORDED = json.loads((SAMPLE.parent / "sample_hopper_qlearning.json").read_text())
HOPPER = "hopper-medium-v2"


def digests(arrays):
    return {
        key: {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
        for key, array in arrays.items()
    }


def plain_loop(arrays, limit, terminate_on_end):
    """The kept rows by D4RL's rule, one row after the other."""
    rows, count = [], 0
    for row in range(len(arrays["terminals"]) - 1):
        terminal = arrays["terminals"][row]
        last = arrays["timeouts"][row] if "timeouts" in arrays else count == limit - 1
        if terminal or last:
            count = 0
        if last and not terminate_on_end:
            continue
        rows.append(row)
        count += 1
    return rows


def random_arrays(n, seed=0, dims=(11, 3)):
    rng = np.random.default_rng(seed)
    return {
        "observations": rng.standard_normal((n, dims[0]), dtype=np.float32),
        "actions": rng.uniform(-1, 1, (n, dims[1])).astype(np.float32),
        "rewards": rng.standard_normal(n, dtype=np.float32),
        "terminals": rng.random(n) < 0.1,
        "timeouts": rng.random(n) < 0.1,
    }


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def sample_is_d4rls(monkeypatch):
    """Makes the sample the file that D4RL's server has for the task."""
    content = SAMPLE.read_bytes()
    known = dataclasses.replace(
        d4rl.task(HOPPER),
        dataset_bytes=len(content),
        dataset_sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setitem(d4rl.TASKS, HOPPER, known)


@pytest.fixture
def write(tmp_path):
    """Writes an HDF5 file of 20 good rows, with `changes` to its arrays (None leaves one out)."""

    def write_file(**changes):
        path = tmp_path / "data.hdf5"
        with h5py.File(path, "w") as file:
            for key, array in (random_arrays(20) | changes).items():
                if array is not None:
                    file[key] = array
        return path

    return write_file


@pytest.mark.parametrize("terminate_on_end", [False, True])
def test_transitions_are_those_of_d4rl_to_the_last_bit(terminate_on_end):
    result = d4rl.qlearning_dataset(HOPPER, data=str(SAMPLE), terminate_on_end=terminate_on_end)
    assert digests(result) == RECORDED[f"terminate_on_end_{terminate_on_end}"]


def test_transitions_without_timeouts_are_those_of_d4rl(tmp_path, capsys):
    path = tmp_path / "old.hdf5"
    shutil.copy(SAMPLE, path)
    with h5py.File(path, "a") as file:
        del file["timeouts"]
    env = gymnasium.make(HOPPER, max_episode_steps=30)
    assert digests(d4rl.qlearning_dataset(env, data=path)) == RECORDED["no_timeouts_key_30"]
    assert "no timeouts: an episode without a terminal is taken to end after 30 steps" in (
        capsys.readouterr().out
    )


def test_a_given_dataset_replaces_the_file():
    raw = d4rl.get_dataset(HOPPER, SAMPLE)
    result = d4rl.qlearning_dataset(HOPPER, data="not read", dataset=raw)
    assert digests(result) == RECORDED["terminate_on_end_False"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.integers(2, 60), st.integers(2, 12), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1)
)
def test_any_data_gives_what_the_plain_loop_gives(n, limit, has_timeouts, terminate_on_end, seed):
    arrays = random_arrays(n, seed)
    if not has_timeouts:
        del arrays["timeouts"]
    env = gymnasium.make(HOPPER, max_episode_steps=limit)
    rows = plain_loop(arrays, limit, terminate_on_end)
    if not rows:
        with pytest.raises(d4rl.DatasetError, match="no transition"):
            d4rl.qlearning_dataset(env, dataset=arrays, terminate_on_end=terminate_on_end)
        return
    result = d4rl.qlearning_dataset(env, dataset=arrays, terminate_on_end=terminate_on_end)
    for key in ("observations", "actions", "rewards", "terminals"):
        np.testing.assert_array_equal(result[key], arrays[key][rows])
    np.testing.assert_array_equal(
        result["next_observations"], arrays["observations"][np.array(rows) + 1]
    )


def test_an_id_has_the_episode_limit_of_its_task():
    arrays = random_arrays(2500) | {"terminals": np.zeros(2500, bool)}
    del arrays["timeouts"]
    rewards = d4rl.qlearning_dataset(HOPPER, dataset=arrays)["rewards"]
    np.testing.assert_array_equal(rewards, np.delete(arrays["rewards"], [999, 1999, 2499]))


def test_episodes_start_behind_a_terminal_and_where_observations_do_not_join():
    observations = np.arange(7.0)[:, None] * np.ones(2)
    following = observations + 1
    following[4, 1] = 0  # only one number differs
    terminals = np.array([0, 1, 0, 0, 0, 0, 1], np.float32)
    dataset = {"observations": observations, "next_observations": following, "terminals": terminals}
    assert d4rl.episode_starts(dataset).tolist() == [0, 2, 5]


def test_a_large_dataset_takes_no_loop_over_rows():
    arrays = random_arrays(300_000)
    before = time.process_time()
    d4rl.qlearning_dataset(HOPPER, dataset=arrays)
    # 0.05 s here; a Python loop over the rows takes over 1 s.
    assert time.process_time() - before < 0.5


def test_raw_arrays_are_those_of_the_file():
    raw = d4rl.get_dataset(gymnasium.make(HOPPER), SAMPLE)
    with h5py.File(SAMPLE) as file:
        assert set(raw) == {*file} - {"infos"} | {"infos/qpos", "infos/qvel"}
        for key, array in raw.items():
            np.testing.assert_array_equal(array, file[key][()])
            assert array.dtype == file[key].dtype


def test_metadata_and_columns_of_one(tmp_path, write):
    path = write(rewards=np.ones((20, 1), np.float32))
    with h5py.File(path, "a") as file:
        file["metadata/policy/bias"] = np.zeros(20)
        file["metadata/algorithm"] = "SAC"
        file["version"] = 2
    raw = d4rl.get_dataset(HOPPER, path)
    assert set(raw) == set(random_arrays(2))
    assert raw["rewards"].shape == (20,)


@pytest.mark.parametrize("robot", ["hopper", "walker2d", "halfcheetah", "antmaze"])
def test_the_shapes_are_those_of_the_environments(robot):
    for env_id, known in d4rl.TASKS.items():
        if env_id.startswith(robot):
            env = gymnasium.make(env_id)
            dims = (env.observation_space.shape[0], env.action_space.shape[0])
            assert (known.observation_dim, known.action_dim) == dims
            env.close()
            return


# Each fault: changes to a good file, then what the message has to say.
FAULTS = {
    "missing key": ({"actions": None}, r"no actions.*it has observations, rewards, terminals"),
    "two missing keys": ({"actions": None, "rewards": None}, "no actions, rewards"),
    "observations of another robot": (
        {"observations": np.zeros((20, 17), np.float32)},
        r"observations have shape \(20, 17\).*needs \(20, 11\)",
    ),
    "actions of another robot": (
        {"actions": np.zeros((20, 6), np.float32)},
        r"actions have shape \(20, 6\).*needs \(20, 3\)",
    ),
    "rewards too short": (
        {"rewards": np.zeros(19)},
        r"rewards have shape \(19,\).*equally many rows",
    ),
    "terminals too long": ({"terminals": np.zeros(21, bool)}, r"terminals have shape \(21,\)"),
    "timeouts too short": ({"timeouts": np.zeros(3, bool)}, r"timeouts have shape \(3,\)"),
    "a scalar": ({"observations": 1.0}, r"observations have shape \(\)"),
    "NaN observation": ({"observations": np.full((20, 11), np.nan)}, "observations hold NaN"),
    "infinite rewards": (
        {"rewards": np.where(np.arange(20) % 7 == 3, np.inf, 0)},
        "rewards hold NaN or infinite values in 3 of 20 rows, the first is 3",
    ),
    "NaN action": ({"actions": np.full((20, 3), np.nan)}, "actions hold NaN"),
    "NaN terminal": ({"terminals": np.full(20, np.nan)}, "terminals hold values other than 0"),
    "action out of bounds": ({"actions": np.full((20, 3), -1.001)}, "actions reach 1.001"),
    "text": ({"rewards": ["a"] * 20}, "rewards are no numbers"),
    "empty": (
        {key: array[:0] for key, array in random_arrays(1).items()},
        "is empty",
    ),
}


@pytest.mark.parametrize("load", [d4rl.get_dataset, d4rl.qlearning_dataset])
@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_a_bad_file_is_one_clear_error(write, load, changes, message):
    path = write(**changes)
    with pytest.raises(d4rl.DatasetError, match=message) as raised:
        load(HOPPER, data=path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_bad_given_dataset_is_named_so():
    with pytest.raises(d4rl.DatasetError, match="the given dataset.*rewards hold NaN"):
        d4rl.qlearning_dataset(HOPPER, dataset=random_arrays(5) | {"rewards": np.full(5, np.nan)})


def test_one_row_has_no_transition(write):
    path = write(**random_arrays(1))
    with pytest.raises(d4rl.DatasetError, match="no transition with a next observation"):
        d4rl.qlearning_dataset(HOPPER, data=path)


def test_an_action_rounded_past_its_bound_is_no_fault(write):
    path = write(actions=np.full((20, 3), np.nextafter(np.float32(1), np.float32(2))))
    assert len(d4rl.get_dataset(HOPPER, path)["actions"]) == 20


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"x" * 5000])
def test_a_file_that_is_not_hdf5(tmp_path, content):
    path = tmp_path / "data.hdf5"
    path.write_bytes(content)
    with pytest.raises(d4rl.DatasetError, match="data.hdf5 is not an HDF5 file.*name another"):
        d4rl.get_dataset(HOPPER, path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_file(tmp_path, share):
    path = tmp_path / "data.hdf5"
    content = SAMPLE.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(d4rl.DatasetError, match="data.hdf5 is truncated .*copy it here anew"):
        d4rl.get_dataset(HOPPER, path)


def test_a_damaged_file(tmp_path):
    path = tmp_path / "data.hdf5"
    content = bytearray(SAMPLE.read_bytes())
    with h5py.File(SAMPLE) as file:
        chunk = file["observations"].id.get_chunk_info(0)
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    with pytest.raises(d4rl.DatasetError, match="data.hdf5 is damaged.*use an intact copy"):
        d4rl.get_dataset(HOPPER, path)


@pytest.mark.parametrize("name", ["nowhere.hdf5", "."])
def test_a_path_without_a_file_says_what_data_can_be(tmp_path, name):
    with pytest.raises(d4rl.DatasetError, match="is not a file: --data is d4rl, regenerated or"):
        d4rl.get_dataset(HOPPER, tmp_path / name)


def test_an_unknown_task_is_named_with_its_nearest():
    with pytest.raises(ValueError, match="hopper-medum-v2.*hopper-medium-v2"):
        d4rl.get_dataset("hopper-medum-v2", SAMPLE)
    with pytest.raises(ValueError, match="a task id or an environment"):
        d4rl.get_dataset(object(), SAMPLE)


def test_the_cache_is_d4rls(cache, monkeypatch):
    name = "hopper_medium-v2.hdf5"
    assert d4rl.dataset_path(HOPPER) == cache / name
    monkeypatch.delenv("D4RL_DATASET_DIR")
    assert d4rl.dataset_path(HOPPER) == Path.home() / ".d4rl" / "datasets" / name
    assert d4rl.dataset_path(HOPPER, "~/mine.hdf5") == Path.home() / "mine.hdf5"


def test_a_cached_file_needs_no_network(cache, monkeypatch, sample_is_d4rls):
    monkeypatch.setattr("urllib.request.urlopen", None)
    shutil.copy(SAMPLE, d4rl.dataset_path(HOPPER))
    result = d4rl.qlearning_dataset(gymnasium.make(HOPPER))
    assert digests(result) == RECORDED["terminate_on_end_False"]


@pytest.mark.parametrize("data", ["d4rl", "regenerated"])
def test_a_cached_file_needs_no_lock(cache, monkeypatch, sample_is_d4rls, data):
    """Where the folder is another user's, say."""
    path = d4rl.dataset_path(HOPPER, data)
    path.parent.mkdir(exist_ok=True)
    shutil.copy(SAMPLE, path)
    monkeypatch.setattr(FileLock, "acquire", None)
    assert len(d4rl.get_dataset(HOPPER, data)["rewards"]) == 400


def test_a_path_that_cannot_be_looked_at_is_one_clear_error(monkeypatch):
    with pytest.raises(d4rl.DatasetError, match="cannot look for the data ~nobody-here/x.hdf5"):
        d4rl.get_dataset(HOPPER, "~nobody-here/x.hdf5")

    def closed(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(d4rl.DatasetError, match="Permission denied.*: name another path, or set"):
        d4rl.get_dataset(HOPPER, "/closed/x.hdf5")


@pytest.mark.parametrize("env_id", [HOPPER, "antmaze-umaze-v2"])
def test_a_failed_download_names_url_path_and_the_other_way(cache, monkeypatch, env_id):
    def fail(url, path, sha256):
        raise DownloadError(f"cannot download {url}: HTTP 404 Not Found")

    monkeypatch.setattr(data_module, "download", fail)
    with pytest.raises(d4rl.DatasetError) as raised:
        d4rl.get_dataset(env_id)
    message = str(raised.value)
    for part in (
        d4rl.task(env_id).dataset_url,
        str(d4rl.dataset_path(env_id)),
        "--data regenerated",
        "HTTP 404",
    ):
        assert part in message
    assert "\n" not in message


def test_a_download_lands_in_the_cache(cache, monkeypatch, sample_is_d4rls):
    def copy(url, path, sha256):
        assert url == d4rl.task(HOPPER).dataset_url
        assert sha256 == hashlib.sha256(SAMPLE.read_bytes()).hexdigest()
        shutil.copy(SAMPLE, path)

    monkeypatch.setattr(data_module, "download", copy)
    assert len(d4rl.get_dataset(HOPPER)["rewards"]) == 400
    assert (cache / "hopper_medium-v2.hdf5").exists()


def test_another_file_does_not_pass_for_d4rls(cache):
    path = d4rl.dataset_path(HOPPER)
    shutil.copy(SAMPLE, path)
    size = f"{len(SAMPLE.read_bytes()):,} bytes, not 152,756,557"
    with pytest.raises(d4rl.DatasetError, match=f"name of D4RL's file but {size}: move it away"):
        d4rl.get_dataset(HOPPER)
    assert len(d4rl.get_dataset(HOPPER, path)["rewards"]) == 400  # as the message says


def test_the_sums_of_d4rls_files_are_known():
    sums = {known.dataset_sha256 for known in d4rl.TASKS.values()}
    assert len(sums) == 24 and all(re.fullmatch("[0-9a-f]{64}", digest) for digest in sums)
    assert all(5e7 < known.dataset_bytes < 5e8 for known in d4rl.TASKS.values())
    maze = d4rl.task("antmaze-medium-play-v2")
    assert (maze.dataset_bytes, maze.dataset_sha256[:8]) == (231_110_764, "c9fec1c1")


# --- where the file is, and who else uses it ---


def test_a_file_that_another_program_writes_is_named_as_that(write):
    path = write()
    code = f"import h5py; f = h5py.File({str(path)!r}, 'a'); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        writer.stdout.readline()
        with pytest.raises(d4rl.DatasetError, match="is open in another program") as raised:
            d4rl.get_dataset(HOPPER, path)
        writer.communicate("done\n")
    assert "delete" not in str(raised.value) and "damaged" not in str(raised.value)
    assert len(d4rl.get_dataset(HOPPER, path)["rewards"]) == 20


def test_a_file_whose_writer_crashed_names_the_cure(tmp_path):
    path = tmp_path / "data.hdf5"
    code = f"""import h5py, os; f = h5py.File({str(path)!r}, 'w', libver='latest')
f['x'] = 1; f.swmr_mode = True; f.flush(); os._exit(0)"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(d4rl.DatasetError, match="is open in .*crashed, run h5clear -s .*data.hdf5"):
        d4rl.get_dataset(HOPPER, path)


def test_a_file_without_leave_to_read_it_is_one_line(write, monkeypatch):
    path = write()
    path.chmod(0)
    if os.access(path, os.R_OK):  # as root

        def closed(name, *args, real=open):
            if name == path:
                raise PermissionError(13, "Permission denied", str(path))
            return real(name, *args)

        monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(d4rl.DatasetError, match="cannot read .*Permission denied.*get permission"):
        d4rl.get_dataset(HOPPER, path)


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_pipe_or_socket_is_refused_not_waited_for(cache, monkeypatch, kind, in_cache):
    monkeypatch.chdir(cache)  # the name of a socket must be short
    name = d4rl.dataset_path(HOPPER).name
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "pipe":
            os.mkfifo(name)
        else:
            listener.bind(name)
        with pytest.raises(d4rl.DatasetError, match="is no regular file"):
            d4rl.get_dataset(HOPPER, "d4rl" if in_cache else name)


def test_a_line_break_in_a_path_does_not_break_the_line(tmp_path):
    with pytest.raises(d4rl.DatasetError) as raised:
        d4rl.get_dataset(HOPPER, tmp_path / "a\nb.hdf5")
    assert "a b.hdf5 is not a file" in str(raised.value) and "\n" not in str(raised.value)
