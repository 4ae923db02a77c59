"""Next observations of a file, episodes one by one, and the range of returns."""

import gymnasium
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import d4rl_gymnasium as d4rl

HOPPER = "hopper-medium-v2"


def steps(n, seed=0):
    """Rows in order, each with its next observation: episodes of up to 7 steps."""
    rng = np.random.default_rng(seed)
    observations = rng.standard_normal((n + 1, 11)).astype(np.float32)
    ends = np.arange(n) % 7 == 6
    following = observations[1:].copy()
    following[ends] = rng.standard_normal((ends.sum(), 11))  # and the next row starts an episode
    terminals = ends & (np.arange(n) % 2 == 0)
    return {
        "observations": observations[:-1],
        "next_observations": following,
        "actions": rng.uniform(-1, 1, (n, 3)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "terminals": terminals,
        "timeouts": ends & ~terminals,
    }


def write(path, arrays):
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


def same(found, expected):
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(found[key], array)


def test_next_observations_that_are_the_next_rows_change_nothing(tmp_path, capsys):
    arrays = steps(100)
    bare = {key: array for key, array in arrays.items() if key != "next_observations"}
    expected = d4rl.qlearning_dataset(HOPPER, dataset=bare)
    assert len(expected["rewards"]) == 100 - arrays["timeouts"].sum() - 1
    same(d4rl.qlearning_dataset(HOPPER, dataset=arrays), expected)
    same(d4rl.qlearning_dataset(HOPPER, data=write(tmp_path / "a.hdf5", arrays)), expected)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("terminate_on_end", [False, True])
def test_shuffled_transitions_keep_their_next_observations(tmp_path, capsys, terminate_on_end):
    arrays = steps(100)
    order = np.random.default_rng(1).permutation(100)
    shuffled = {key: array[order] for key, array in arrays.items()}
    path = write(tmp_path / "shuffled.hdf5", shuffled)
    found = d4rl.qlearning_dataset(HOPPER, data=path, terminate_on_end=terminate_on_end)
    del shuffled["timeouts"]
    same(found, shuffled)
    line = capsys.readouterr().out
    assert f"data: {path} has next observations that are not those of the next rows" in line
    assert found["next_observations"].dtype == np.float32


def test_one_undeclared_end_of_an_episode_is_enough(capsys):
    """Where a program forgot the time-outs, the next row is not the next observation."""
    arrays = steps(100)
    del arrays["timeouts"]
    found = d4rl.qlearning_dataset(HOPPER, dataset=arrays)
    same(found, arrays)
    assert "the given dataset has next observations" in capsys.readouterr().out


def test_next_observations_of_another_robot_are_refused():
    arrays = steps(20) | {"next_observations": np.zeros((20, 17), np.float32)}
    with pytest.raises(d4rl.DatasetError, match=r"next_observations have shape \(20, 17\)"):
        d4rl.qlearning_dataset(HOPPER, dataset=arrays)


def episodes_by_the_row(arrays, limit):
    """The episodes by D4RL's rule, one row after the other."""
    episodes, rows, count = [], [], 0
    for row in range(len(arrays["rewards"])):
        rows.append(row)
        last = arrays["timeouts"][row] if "timeouts" in arrays else count == limit - 1
        if arrays["terminals"][row] or last:
            episodes.append(rows)
            rows, count = [], 0
        count += 1
    return episodes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(2, 12), st.booleans(), st.integers(0, 2**32 - 1))
def test_sequences_are_those_of_the_plain_loop(n, limit, has_timeouts, seed):
    rng = np.random.default_rng(seed)
    arrays = steps(n, seed) | {"terminals": rng.random(n) < 0.1, "timeouts": rng.random(n) < 0.1}
    arrays["infos/goal"] = rng.standard_normal((n, 2))
    del arrays["next_observations"]  # they would not fit the flags
    if not has_timeouts:
        del arrays["timeouts"]
    env = gymnasium.make(HOPPER, max_episode_steps=limit)
    found = list(d4rl.sequence_dataset(env, arrays))
    expected = episodes_by_the_row(arrays, limit)
    assert len(found) == len(expected)
    for episode, rows in zip(found, expected, strict=True):
        same(episode, {key: array[rows] for key, array in arrays.items()})


def test_sequences_of_a_file_and_of_an_environment(tmp_path):
    arrays = steps(70)
    path = write(tmp_path / "a.hdf5", arrays)
    found = list(d4rl.sequence_dataset(HOPPER, data=path))
    assert [len(episode["rewards"]) for episode in found] == [7] * 10
    of_env = gymnasium.make(HOPPER).get_dataset(path)
    same(of_env, arrays)
    same(next(d4rl.sequence_dataset(gymnasium.make(HOPPER), of_env)), found[0])


def test_shuffled_rows_are_no_sequences():
    arrays = {key: array[::-1] for key, array in steps(70).items()}
    with pytest.raises(d4rl.DatasetError, match="rows are no episodes in order"):
        next(d4rl.sequence_dataset(HOPPER, arrays))
