"""Regenerated data: true transitions of the physics, whole episodes, the same bits every time."""

import errno
import json
import os
import sys
import threading
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest

import d4rl_gymnasium as d4rl
from d4rl_gymnasium import d4rl_files
from d4rl_gymnasium import regenerate as module
from d4rl_gymnasium.behavior import BehaviorPolicy

REPLAY = "hopper-medium-replay-v2"
D4RL_KEYS = {
    "observations": (11,),
    "next_observations": (11,),
    "actions": (3,),
    "rewards": (),
    "terminals": (),
    "timeouts": (),
    "infos/qpos": (6,),
    "infos/qvel": (6,),
}


def save_policy(path, bias, noise=0.1):
    """A policy whose actions scatter around tanh(bias), whatever it observes."""
    shapes = {"0": (11, 4), "1": (4, 4), "_mean": (4, 3), "_log_std": (4, 3)}
    weights = {f"w{name}": np.zeros(shape) for name, shape in shapes.items()}
    weights |= {f"b{name}": np.zeros(shape[1]) for name, shape in shapes.items()}
    weights["b_mean"] += bias
    weights["b_log_std"] += np.log(noise)
    BehaviorPolicy(weights).save(path)


def make_policies(folder):
    folder.mkdir(exist_ok=True)
    for number in (0, 1, 2, 10):
        save_policy(folder / f"hopper-replay-{number}.npz", bias=number / 10 - 0.5)
    save_policy(folder / "hopper-medium.npz", bias=0.0)
    save_policy(folder / "hopper-expert.npz", bias=0.3)
    shares = {
        "hopper-medium-replay": {0: 0.25, 1: 0.25, 2: 0.1, 10: 0.4},
        "hopper-full-replay": {0: 0.5, 3: 0.5},
    }
    recipe = {
        name: {f"hopper-replay-{number}": share for number, share in parts.items()}
        for name, parts in shares.items()
    }
    recipe |= {f"hopper-{name}": {f"hopper-{name}": 1.0} for name in ("medium", "expert")}
    (folder / "recipe.json").write_text(json.dumps(recipe))


@pytest.fixture
def policies(tmp_path, monkeypatch):
    """A folder with the policies of hopper, and small chunks, so that there are many."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "POLICIES", tmp_path / "policies")
    monkeypatch.setattr(module, "CHUNK_ROWS", 70)
    make_policies(tmp_path / "policies")
    return tmp_path / "policies"


@pytest.fixture(scope="module")
def replay_file(tmp_path_factory):
    """500 transitions of the four replay policies, by two processes."""
    folder = tmp_path_factory.mktemp("replay")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POLICIES", folder / "policies")
        patch.setattr(module, "CHUNK_ROWS", 70)
        make_policies(folder / "policies")
        module.regenerate(REPLAY, 500, folder / "replay.hdf5", processes=2)
    return folder / "replay.hdf5"


@pytest.fixture
def replay(replay_file):
    return d4rl.get_dataset(REPLAY, replay_file)


def test_keys_and_types_are_d4rls(replay):
    assert {key: array.shape for key, array in replay.items()} == {
        key: (500, *width) for key, width in D4RL_KEYS.items()
    }
    for key, array in replay.items():
        assert array.dtype == (bool if key in ("terminals", "timeouts") else np.float32)


def test_attributes_mark_the_file(replay_file):
    with h5py.File(replay_file) as file:
        attributes = dict(file.attrs)
    assert attributes["regenerated"]
    assert attributes["size"] == 500
    assert attributes["seed"] == 0
    assert attributes["recipe_version"] == module.RECIPE_VERSION
    assert attributes["mujoco_version"] == "3.2.6"
    assert list(attributes["policies"]) == [f"hopper-replay-{n}" for n in (0, 1, 2, 10)]


def test_every_row_is_a_step_of_the_physics(replay):
    env = gymnasium.make(REPLAY).unwrapped
    env.reset(seed=0)
    for row in range(0, 500, 7):
        env.set_state(
            replay["infos/qpos"][row].astype(float), replay["infos/qvel"][row].astype(float)
        )
        observation, reward, terminated, _, _ = env.step(replay["actions"][row])
        # The state is stored in float32, and a contact can magnify its rounding.
        np.testing.assert_allclose(observation, replay["next_observations"][row], atol=2e-3)
        np.testing.assert_allclose(reward, replay["rewards"][row], atol=2e-3)
        assert terminated == replay["terminals"][row]


def test_no_transition_joins_two_episodes(replay):
    ends = replay["terminals"] | replay["timeouts"]
    assert ends[-1]
    assert not (replay["terminals"] & replay["timeouts"]).any()
    joined = (replay["next_observations"][:-1] == replay["observations"][1:]).all(axis=1)
    np.testing.assert_array_equal(joined, ~ends[:-1])


def test_shares_are_those_of_the_recipe_and_in_order(replay):
    means = [share.mean() for share in np.split(replay["actions"], [125, 250, 300])]
    np.testing.assert_allclose(means, np.tanh([-0.5, -0.4, -0.3, 0.5]), atol=0.03)
    # Only the last episode of a share may be cut.
    assert set(np.flatnonzero(replay["timeouts"]) + 1) <= {125, 250, 300, 500}


def test_episodes_start_and_act_differently(replay):
    ends = np.flatnonzero(replay["terminals"] | replay["timeouts"])
    starts = np.append(0, ends[:-1] + 1)
    assert len(starts) > 8
    assert len(np.unique(replay["observations"][starts], axis=0)) == len(starts)
    assert np.abs(replay["infos/qpos"][starts] - [0, 1.25, 0, 0, 0, 0]).max() < 0.00501
    biases = np.repeat([-0.5, -0.4, -0.3, 0.5], [125, 125, 50, 200])
    noise = np.arctanh(replay["actions"]) - biases[:, None]
    assert 0.09 < noise.std() < 0.11
    assert len(np.unique(replay["actions"], axis=0)) == 500


def test_the_number_of_processes_changes_no_bit(replay, policies, tmp_path):
    path = tmp_path / "one.hdf5"
    module.regenerate(REPLAY, 500, path, processes=1)
    again = d4rl.get_dataset(REPLAY, path)
    assert {key: array.tobytes() for key, array in again.items()} == {
        key: array.tobytes() for key, array in replay.items()
    }


def test_a_second_request_is_a_cache_hit_that_says_so(policies, capsys):
    path = d4rl.dataset_path("hopper-medium-v2", "regenerated", 150)
    (path.parent / f"{path.stem}-chunks-of-a-killed-run").mkdir(parents=True)
    first = d4rl.get_dataset("hopper-medium-v2", "regenerated", 150)
    assert path.name.startswith("hopper-medium-v2-regenerated-150-")
    assert path.parent.name == "regenerated"
    assert "regenerating 150 transitions" in capsys.readouterr().out
    stamp = path.stat().st_mtime_ns
    again = d4rl.qlearning_dataset("hopper-medium-v2", data="regenerated", regenerated_size=150)
    assert f"regenerated hopper-medium-v2 from the cache, {path}" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == stamp
    kept = ~first["timeouts"][:-1]
    np.testing.assert_array_equal(again["rewards"], first["rewards"][:-1][kept])
    assert set(path.parent.iterdir()) == {path, path.with_name(path.name + ".lock")}


def test_other_policies_recipes_and_seeds_have_other_files(policies, tmp_path, monkeypatch):
    def path(env_id=REPLAY, size=500, seed=0):
        return module.regenerated_path(env_id, size, tmp_path, seed)

    before = path()
    assert path() == before
    others = {path(size=501), path(seed=1), path("hopper-medium-v2")}
    save_policy(policies / "hopper-replay-2.npz", bias=0.7)
    others.add(path())
    recipe = (policies / "recipe.json").read_text()
    (policies / "recipe.json").write_text(recipe.replace("0.1,", "0.15,"))
    others.add(path())
    monkeypatch.setattr(module, "RECIPE_VERSION", module.RECIPE_VERSION + 1)
    others.add(path())
    monkeypatch.setattr(module.mujoco, "__version__", "3.2.7")
    others.add(path())
    assert len(others) == 7
    assert before not in others


def test_medium_expert_is_half_and_half(policies):
    found = module._policies("hopper-medium-expert-v2")
    assert [(path.stem, share) for path, share in found] == [
        ("hopper-medium", 0.5),
        ("hopper-expert", 0.5),
    ]
    chunks = module._plan(module._policies("hopper-medium-expert-v2"), 301)
    assert [(chunk["spawn_key"], chunk["rows"]) for chunk in chunks] == [
        ([0, 0], 70), ([0, 1], 70), ([0, 2], 10), ([1, 0], 70), ([1, 1], 70), ([1, 2], 11),
    ]  # fmt: skip


def test_shares_of_whole_episodes():
    shares = [(None, 0.24), (None, 0.5), (None, 0.26)]
    for size, rows in (10_000, [2000, 5000, 3000]), (700, [0, 700, 0]):
        chunks = module._plan(shares, size, whole=1000)
        totals = [0, 0, 0]
        for chunk in chunks:
            totals[chunk["spawn_key"][0]] += chunk["rows"]
        assert totals == rows


def test_random_is_uniform_and_episodes_end_at_the_limit(policies):
    data = d4rl.get_dataset("halfcheetah-random-v2", "regenerated", 1200)
    np.testing.assert_array_equal(np.flatnonzero(data["timeouts"]), [999, 1199])
    assert not data["terminals"].any()
    deciles = np.quantile(data["actions"], np.arange(0.1, 1.0, 0.1))
    np.testing.assert_allclose(deciles, np.linspace(-0.8, 0.8, 9), atol=0.05)


@pytest.mark.parametrize(
    "env_id", ["antmaze-umaze-v2", "walker2d-medium-v2", "hopper-full-replay-v2"]
)
def test_a_task_without_policies_names_those_with(policies, env_id):
    with pytest.raises(d4rl.DatasetError, match=f"{env_id} can't be regenerated") as raised:
        d4rl.get_dataset(env_id, "regenerated")
    makeable = module.regenerated_tasks()
    assert [name for name in makeable if name.startswith("hopper")] == [
        f"hopper-{variant}-v2"
        for variant in ("expert", "medium-expert", "medium-replay", "medium", "random")
    ]
    assert ", ".join(makeable) in str(raised.value)


def test_size_0_is_that_of_d4rls_file(policies, monkeypatch):
    monkeypatch.setitem(d4rl_files.FILES[REPLAY], "transitions", [90, "here"])
    assert d4rl.dataset_path(REPLAY, "regenerated", 0) == d4rl.dataset_path(
        REPLAY, "regenerated", 90
    )
    assert len(d4rl.get_dataset(REPLAY, "regenerated", 0)["rewards"]) == 90


@pytest.mark.parametrize("size", [-5, 1.5, "many"])
def test_an_impossible_size_is_named(policies, size):
    with pytest.raises(d4rl.DatasetError, match=f"cannot regenerate {size} transitions"):
        d4rl.get_dataset(REPLAY, "regenerated", size)


def test_a_failed_worker_is_one_clear_error_and_leaves_no_file(policies):
    (policies / "hopper-medium.npz").write_bytes(b"not a policy")
    with pytest.raises(d4rl.DatasetError, match="regenerating hopper-medium-v2 failed") as raised:
        d4rl.get_dataset("hopper-medium-v2", "regenerated", 100)
    assert "\n" not in str(raised.value)
    folder = d4rl.dataset_path("hopper-medium-v2", "regenerated", 100).parent
    assert [file.suffix for file in folder.iterdir()] == [".lock"]


def test_a_full_disk_under_the_workers_is_named(policies, monkeypatch, tmp_path):
    """Their logs on it hold no word, so they say it by their exit status."""
    monkeypatch.setattr(module, "_collect", lambda *_, **__: {"rewards": np.zeros(3)})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    job = json.dumps(["hopper-medium-v2", 0, str(tmp_path), [{"policy": 0, "spawn_key": [0, 0]}]])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Path, "write_bytes", full)
        module.work(job)
    assert stop.value.code == errno.ENOSPC
    worker = tmp_path / "worker"
    worker.write_text(f"#!/bin/sh\nexit {errno.ENOSPC}\n")
    worker.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(worker))
    path = d4rl.dataset_path("hopper-medium-v2", "regenerated", 100)
    with pytest.raises(d4rl.DatasetError) as raised:
        d4rl.get_dataset("hopper-medium-v2", "regenerated", 100)
    assert str(raised.value).startswith(f"cannot write {path} (No space left on device): make room")
    assert [file.suffix for file in path.parent.iterdir()] == [".lock"]


def test_a_disk_that_fills_at_the_last_write_is_named_and_nothing_is_left(policies, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    request = ("hopper-random-v2", "regenerated", 60)
    with pytest.raises(d4rl.DatasetError, match="cannot write .*No space left on device"):
        d4rl.get_dataset(*request)
    assert [file.suffix for file in d4rl.dataset_path(*request).parent.iterdir()] == [".lock"]


def test_two_requests_at_once_make_one_file(policies, monkeypatch):
    runs = []
    run_workers = module._run_workers

    def counted(*args):
        runs.append(args)
        run_workers(*args)

    monkeypatch.setattr(module, "_run_workers", counted)
    request = ("hopper-random-v2", "regenerated", 60)
    threads = [threading.Thread(target=d4rl.get_dataset, args=request) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert len(runs) == 1
    assert d4rl.dataset_path(*request).exists()


def test_the_shipped_policies_make_every_task():
    assert module.regenerated_tasks() == sorted(d4rl.TASKS)
    for path in module.POLICIES.glob("*.npz"):
        assert path.stat().st_size <= 200_000
