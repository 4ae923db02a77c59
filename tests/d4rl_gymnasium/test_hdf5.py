"""Files of other programs: read by name, nothing from outside, nothing unwritten, one line each."""

import contextlib
import os
import resource
import subprocess
import sys

import h5py
import numpy as np
import pytest

import d4rl_gymnasium as d4rl
from d4rl_gymnasium import hdf5, report
from d4rl_gymnasium.data import TRANSITION_KEYS

HOPPER, N = "hopper-medium-v2", 50


def good(**changes):
    """Arrays of a good file, with `changes` (None leaves one out)."""
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.standard_normal((N, 11), dtype=np.float32),
        "actions": rng.uniform(-1, 1, (N, 3)).astype(np.float32),
        "rewards": rng.standard_normal(N, dtype=np.float32),
        "terminals": np.arange(N) % 10 == 9,
        "timeouts": np.arange(N) % 10 == 4,
    }
    return {key: array for key, array in (arrays | changes).items() if array is not None}


@pytest.fixture
def write(tmp_path):
    """Writes arrays, then does `more` with the open file; returns the path."""

    def write_file(arrays, more=lambda file: None, name="data.hdf5", **options):
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            for key, array in arrays.items():
                file.create_dataset(key, data=array, **options)
            more(file)
        return path

    return write_file


def fails(path, message):
    for load in (d4rl.get_dataset, d4rl.qlearning_dataset):
        with pytest.raises(d4rl.DatasetError, match=message) as raised:
            load(HOPPER, data=path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)
        assert "delete" not in str(raised.value)


# --- names ---


@pytest.mark.parametrize("target", ["/of/flags", "of/flags", "/of/./link"])
def test_a_soft_link_is_its_array(write, target):
    def more(file):
        file["of/flags"] = good()["timeouts"]
        file["of/link"] = h5py.SoftLink("flags")
        file["timeouts"] = h5py.SoftLink(target)

    path = write(good(timeouts=None), more)
    np.testing.assert_array_equal(d4rl.get_dataset(HOPPER, path)["timeouts"], good()["timeouts"])
    assert len(d4rl.qlearning_dataset(HOPPER, data=path)["rewards"]) == N - 6


def test_a_second_name_of_an_array_is_as_good_as_its_first(write):
    def more(file):
        file["a_first_name"] = good()["timeouts"]
        file["timeouts"] = file["a_first_name"]

    path = write(good(timeouts=None), more)
    raw = d4rl.get_dataset(HOPPER, path)
    np.testing.assert_array_equal(raw["timeouts"], raw["a_first_name"])
    assert len(d4rl.qlearning_dataset(HOPPER, data=path)["rewards"]) == N - 6


def test_links_in_a_circle_are_no_array(write):
    def more(file):
        file["rewards"] = h5py.SoftLink("/other")
        file["other"] = h5py.SoftLink("/rewards")

    fails(write(good(rewards=None), more), "has no rewards")


@pytest.mark.parametrize("kind", ["group", "empty", "link"])
def test_next_observations_that_are_no_array_are_an_error(write, kind):
    """Passed over, shuffled rows would be joined to those behind them."""

    def more(file):
        if kind == "group":
            file["next_observations/data"] = good()["observations"]
        elif kind == "empty":
            file.create_dataset("next_observations", data=h5py.Empty("f4"))
        else:
            file["next_observations"] = h5py.SoftLink("/nothing")

    path = write(good(), more)
    with pytest.raises(
        d4rl.DatasetError, match="next_observations are no array but .*: write them"
    ):
        d4rl.qlearning_dataset(HOPPER, data=path)


def test_null_arrays_groups_and_what_is_not_per_step_are_passed_over(write):
    def more(file):
        file.create_dataset("timeouts", data=h5py.Empty("f4"))
        file["infos/qpos"] = np.ones((N, 6))
        file["infos/names"] = ["a"] * N
        file["infos/deep/er"] = np.ones(N)
        file["elsewhere"] = h5py.ExternalLink("/no/such/file", "/")
        file["nowhere"] = h5py.SoftLink("/nothing")
        file["infos/elsewhere"] = h5py.ExternalLink("/no/such/file", "/")
        file["self"] = file["/"]
        file.create_dataset("huge", (10**13,), "f4", chunks=(1000,))

    raw = d4rl.get_dataset(HOPPER, write(good(timeouts=None), more))
    assert {key for key in raw if not key.startswith("self/")} == {
        *good(timeouts=None),
        "infos/qpos",
    }
    for missing in ({"rewards": None}, {"rewards": h5py.Empty("f4")}):
        fails(write(good(**missing)), "has no rewards: it is not in D4RL's format")
    fails(write(good(rewards=None) | {"rewards/inner": np.zeros(N)}), "has no rewards")


# --- nothing from outside ---


def in_other_files(folder):
    """Ways in which a file can hold what is not in it."""
    other = folder / "other.hdf5"
    with h5py.File(other, "w") as file:
        file["rewards"] = np.zeros(N, "f4")
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    layout = h5py.VirtualLayout((N,), "f4")
    layout[:] = h5py.VirtualSource(other, "rewards", (N,))

    def through(file):
        file["door"] = h5py.ExternalLink(other, "/")
        file["rewards"] = h5py.SoftLink("/door/rewards")

    def stored_in(place):
        return lambda file: file.create_dataset("rewards", (N,), "u1", external=[(place, 0, N)])

    return {
        "external link": lambda f: f.__setitem__("rewards", h5py.ExternalLink(other, "rewards")),
        "to a pipe": lambda f: f.__setitem__("rewards", h5py.ExternalLink(pipe, "rewards")),
        "soft link through an external one": through,
        "external storage": stored_in(__file__),
        "external storage in a pipe": stored_in(pipe),
        "virtual": lambda f: f.create_virtual_dataset("rewards", layout),
    }


def test_a_file_never_reaches_outside_itself(write, tmp_path):
    for way, more in in_other_files(tmp_path).items():
        path = write(good(rewards=None), more, name=f"{way}.hdf5")
        fails(path, "rewards lie in another file, which is not followed")


# --- nothing unwritten, nothing too large ---


@pytest.mark.parametrize("chunks", [(1000, 11), None])
def test_a_small_file_of_fill_values_costs_nothing(write, chunks):
    rows = 6 * 2**30 // 44

    def more(file):
        shapes = {"observations": (rows, 11), "actions": (rows, 3), "rewards": (rows,)}
        for key, shape in shapes.items():
            piece = chunks and (1000, *shape[1:])
            file.create_dataset(key, shape, "f4", chunks=piece, fillvalue=0.5)
        file.create_dataset("terminals", (rows,), bool, chunks=chunks and (1000,))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fails(write({}, more), f"observations have room for {rows:,} rows that were not all written")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # kB


def test_rows_that_a_crashed_program_left_out_are_not_zeros(write):
    def more(file):
        rewards = file.create_dataset("rewards", (N,), "f4", chunks=(10,))
        rewards[:40] = 1.0

    fails(write(good(rewards=None), more), "rewards have room for 50 rows that were not all")


def test_flags_that_are_all_0_need_not_be_written(write):
    path = write(good(timeouts=None), lambda file: file.create_dataset("timeouts", (N,), bool))
    assert not d4rl.get_dataset(HOPPER, path)["timeouts"].any()


@pytest.mark.parametrize("options", [{"compression": "gzip"}, {"chunks": True}, {"dtype": ">f8"}])
def test_however_it_is_stored_the_values_are_the_same(write, options):
    arrays = {k: x.astype(np.float32) for k, x in good().items()}
    path = write(arrays, **options)
    expected = d4rl.qlearning_dataset(HOPPER, dataset=good())
    found = d4rl.qlearning_dataset(HOPPER, data=path)
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)
        assert found[key].dtype == array.dtype


# --- types ---

NOT_NUMBERS = {
    "text": np.full(N, b"1.0"),
    "objects": np.array(["1.0"] * N, object),
    "compound": np.zeros(N, [("a", "f4"), ("b", "i4")]),
    "complex": np.zeros(N, "c8"),
    "opaque": np.array([np.void(b"abc")] * N),
}


@pytest.mark.parametrize("array", NOT_NUMBERS.values(), ids=NOT_NUMBERS)
def test_what_is_no_number_is_not_read(write, array, monkeypatch):
    path = write(good(rewards=None) | {"rewards": array})
    monkeypatch.setattr(hdf5, "read", None)
    fails(path, "rewards are no numbers")


def test_values_that_float32_cannot_hold(write):
    for key, dtype in (("observations", "f8"), ("rewards", "f8"), ("next_observations", "g")):
        array = np.zeros((N, 11) if "obs" in key else N, dtype)
        array[7] = -1e39
        fails(write(good(**{key: array})), f"{key} hold values that float32 cannot: rescale")
    path = write(good(rewards=np.full(N, -3e38)))
    assert d4rl.get_dataset(HOPPER, path)["rewards"].min() == -3e38


def test_the_smallest_integer_has_a_size(write):
    """abs(-128) is -128 in 8 bits."""
    fails(write(good(actions=np.full((N, 3), -128, "i1"))), "actions reach 128 in size")


# --- filters, and other readers ---


def unknown_filter(file):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((N,))
    properties.set_filter(32099, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple((N,))
    array = h5py.h5d.create(file.id, b"rewards", h5py.h5t.IEEE_F32LE, space, properties)
    array.write_direct_chunk((0,), bytes(100), 0)


def test_a_missing_filter_is_named_with_its_cure(write):
    path = write(good(rewards=None), unknown_filter)
    fails(path, r"rewards are compressed with a filter .*\(32099\): pip install hdf5plugin")


def test_the_filters_of_hdf5plugin_are_found_once_it_is_installed(write, tmp_path):
    hdf5plugin = pytest.importorskip("hdf5plugin")
    path = write(good(), **hdf5plugin.Blosc())
    code = f"""import sys, d4rl_gymnasium as d4rl
assert "hdf5plugin" not in sys.modules
print(d4rl.get_dataset("{HOPPER}", {str(path)!r})["rewards"].sum())"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) == pytest.approx(good()["rewards"].sum())


def test_describe_and_check_read_only_what_they_use(write, tmp_path, monkeypatch):
    more = {"infos/qpos": np.zeros((N, 6)), "infos/qvel": np.zeros((N, 6)),
            "infos/other": np.zeros(N),
            "next_observations": np.roll(good()["observations"], -1, 0)}  # fmt: skip
    path, seen = write(good(**more)), []

    def read(array, name, real=hdf5.read):
        seen.append(name)
        return real(array, name)

    monkeypatch.setattr(hdf5, "read", read)
    report.describe(HOPPER, path)
    assert sorted(seen) == sorted(TRANSITION_KEYS)
    seen.clear()
    with contextlib.suppress(d4rl.DatasetError):
        report.check(HOPPER, path, limit=1)
    assert sorted(seen) == sorted((*TRANSITION_KEYS, "infos/qpos", "infos/qvel"))
