"""python -m d4rl_gymnasium describe and check: numbers by hand, and faults that must show."""

import csv
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest

import d4rl_gymnasium as d4rl
from d4rl_gymnasium import report
from d4rl_gymnasium.__main__ import main

SAMPLE = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
HOPPER, MAZE = "hopper-medium-v2", "antmaze-umaze-v2"


def arrays_of(path):
    with h5py.File(path) as file:
        found = {}
        file.visititems(lambda k, x: found.update({k: x[()]}) if hasattr(x, "shape") else None)
    return found


def written(path, arrays):
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return path


@pytest.fixture(scope="module")
def maze_file(tmp_path_factory):
    """60 steps of an ant that is set down all over the maze, some of them at the goal."""
    env = gymnasium.make(MAZE).unwrapped
    env.reset(seed=0)
    rng, rows = np.random.default_rng(0), []
    goal = np.array([0.5, 8.5])
    places = [goal, [0.0, 0.0], [4.0, 0.0], [8.0, 4.0], [4.0, 8.0]]
    for step in range(60):
        if step % 12 == 0:
            qpos = env.init_qpos + rng.uniform(-0.1, 0.1, 15)
            qpos[:2] = places[step // 12]
            env.set_state(qpos, 0.1 * rng.standard_normal(14))
            env.set_target(goal)
        action = rng.uniform(-1, 1, 8).astype(np.float32)
        before = env.data.qpos.copy(), env.data.qvel.copy()
        observation = np.concatenate(before)
        _, reward, terminated, _, _ = env.step(action)
        rows.append((observation, action, reward, terminated, step % 12 == 11, *before, goal, goal))
    keys = "observations actions rewards terminals timeouts infos/qpos infos/qvel"
    keys += " infos/goal infos/rewarded_goal"
    arrays = {k: np.array(x) for k, x in zip(keys.split(), zip(*rows, strict=True), strict=True)}
    floats = {k: x.astype(np.float32) for k, x in arrays.items() if x.dtype == np.float64}
    arrays["timeouts"] &= ~arrays["terminals"]
    return written(tmp_path_factory.mktemp("maze") / "maze.hdf5", arrays | floats)


# --- describe ---


def test_numbers_of_a_file_by_hand():
    arrays = arrays_of(SAMPLE)
    found, dataset = report.describe(HOPPER, str(SAMPLE))
    returns, lengths, total, length = [], [], 0.0, 0
    ended = arrays["terminals"] | arrays["timeouts"]
    for i, (reward, end) in enumerate(zip(arrays["rewards"].astype(float), ended, strict=True)):
        total, length = total + reward, length + 1
        if end or i == len(ended) - 1:
            returns, lengths = [*returns, total], [*lengths, length]
            total, length = 0.0, 0
    assert (found["transitions"], found["episodes"]) == (400, len(returns))
    assert (found["terminals"], found["timeouts"]) == (10, int(arrays["timeouts"].sum()))
    assert found["return"]["mean"] == pytest.approx(np.mean(returns))
    assert found["return"]["0%"] == pytest.approx(min(returns))
    assert found["return"]["90%"] == pytest.approx(np.percentile(returns, 90))
    assert found["length"]["100%"] == max(lengths)
    scores = 100 * d4rl.get_normalized_score(HOPPER, np.array(returns))
    assert found["score"]["50%"] == pytest.approx(np.median(scores))
    saturated = (np.abs(arrays["actions"]) > 0.99).mean()
    assert found["action_saturation"] == pytest.approx(saturated)
    assert dataset["rewards"].shape == (400,) and "success_rate" not in found


def test_an_episode_that_the_end_of_the_file_cuts_counts():
    dataset = {"terminals": np.array([0, 1, 0, 0]), "timeouts": np.zeros(4)}
    starts, ends = report.episode_bounds(dataset)
    assert (starts.tolist(), ends.tolist()) == ([0, 2], [2, 4])
    dataset["timeouts"][3] = 1
    assert report.episode_bounds(dataset)[1].tolist() == [2, 4]
    assert report.episode_bounds({"terminals": np.zeros(3)})[1].tolist() == [3]


def test_visited_cells_and_success_of_a_maze(maze_file):
    found, dataset = report.describe(MAZE, str(maze_file))
    visited, free = report.visited_cells(MAZE, dataset)
    assert free == {(1, 1), (1, 2), (1, 3), (2, 3), (3, 1), (3, 2), (3, 3)}
    # Goal, start, right of the start, the corridor up, and left of it on the way back.
    assert visited == {(3, 1), (1, 1), (1, 2), (2, 3), (3, 2)}
    assert found["visited_cells"] == "5 of 7"
    # Five episodes, however many of the steps at the goal are terminal; the first one starts there.
    assert found["terminals"] > 1
    assert (found["episodes"], found["success_rate"]) == (5, 0.2)
    assert found["return"]["100%"] > 1 and found["score"]["100%"] == 100
    assert report.episode_bounds(dataset, in_maze=True)[0].tolist() == [0, 12, 24, 36, 48]


@pytest.mark.parametrize("env", [HOPPER, MAZE])
def test_describe_prints_and_draws(capsys, tmp_path, env, maze_file):
    folder, file = tmp_path / "pictures", SAMPLE if env == HOPPER else maze_file
    main(["describe", env, "--data", str(file), "--pictures", str(folder)])
    printed, png = capsys.readouterr().out, folder / f"{env}.png"
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and f"picture: {png}" in printed
    assert printed.startswith(f"{env}: {400 if env == HOPPER else 60} transitions in ")
    assert ("free cells visited 5 of 7" in printed) == (env == MAZE)


def test_describe_makes_a_table_of_several_tasks(tmp_path):
    table, envs = tmp_path / "table.csv", [HOPPER, "hopper-expert-v2"]
    folder = ["--pictures", str(tmp_path), "--csv", str(table)]
    main(["describe", *envs, "--data", str(SAMPLE), *folder])
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["env"] for row in rows] == envs and rows[0]["data"] == str(SAMPLE)
    found, _ = report.describe(HOPPER, str(SAMPLE))
    assert int(rows[0]["episodes"]) == found["episodes"] and rows[0]["transitions"] == "400"
    assert float(rows[0]["score mean"]) == pytest.approx(found["score"]["mean"], abs=0.051)
    with pytest.raises(SystemExit, match="hoper"):
        main(["describe", HOPPER, "hoper-medium-v2", "--data", str(SAMPLE), *folder])


# --- check ---


def test_the_simulator_reproduces_a_recorded_file(capsys):
    main(["check", str(SAMPLE), HOPPER])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("400 transitions replayed from their infos")
    assert lines[1].startswith("observations: 383 of 383 agree (100.00%)")
    assert lines[2].startswith("rewards: 400 of 400 agree (100.00%)")
    assert lines[3] == "terminals: 400 of 400 agree (100.00%)"


def test_a_file_without_states_is_replayed_from_its_observations(tmp_path):
    arrays = {k: x for k, x in arrays_of(SAMPLE).items() if not k.startswith("infos/")}
    arrays["observations"][7, -1] = 10.0  # a clipped velocity: the state is not known
    found = report.check(HOPPER, written(tmp_path / "bare.hdf5", arrays))
    assert (found["states"], found["transitions"]) == ("observations", 399)
    assert found["rewards"]["agree"] == found["rewards"]["compared"] == 399
    # The row before the clipped one now leads elsewhere.
    assert found["observations"]["agree"] == found["observations"]["compared"] - 1


def test_infos_that_are_not_the_states_before_the_steps(maze_file, tmp_path):
    """D4RL's AntMaze files have the states after them, its v2 locomotion files clipped ones."""
    arrays = arrays_of(maze_file)
    for key in ("infos/qpos", "infos/qvel"):
        arrays[key] = np.roll(arrays[key], -1, axis=0)
    found = report.check(MAZE, written(tmp_path / "after.hdf5", arrays))
    assert (found["states"], found["transitions"]) == ("observations", 60)
    assert found["observations"]["agree"] == found["observations"]["compared"] > 0
    arrays = arrays_of(SAMPLE)
    for key in ("infos/qvel", "observations"):
        arrays[key][7, -1] = -10.0
    found = report.check(HOPPER, written(tmp_path / "clipped.hdf5", arrays))
    assert (found["states"], found["transitions"]) == ("infos", 399)
    assert found["rewards"]["agree"] == found["rewards"]["compared"] == 399
    # The row before the clipped one now leads elsewhere.
    assert found["observations"]["agree"] == found["observations"]["compared"] - 1


def test_maze_rewards_are_checked_where_the_goals_are_known(maze_file, tmp_path):
    found = report.check(MAZE, maze_file)
    assert found["transitions"] == 60
    for name in ("observations", "rewards", "terminals"):
        assert found[name]["agree"] == found[name]["compared"] > 0
    arrays = arrays_of(maze_file)
    elsewhere = arrays | {"infos/rewarded_goal": arrays["infos/rewarded_goal"] + 3}
    moved = report.check(MAZE, written(tmp_path / "moved.hdf5", elsewhere))
    assert moved["rewards"]["agree"] == 60 - int(arrays["rewards"].sum()) < 60
    del arrays["infos/rewarded_goal"]
    unknown = report.check(MAZE, written(tmp_path / "bare.hdf5", arrays))
    assert unknown["rewards"] == {"compared": 0, "agree": 0}
    lines = report.check_text(MAZE, "bare.hdf5", unknown).splitlines()
    assert "rewards: nothing to compare, the file has no infos/rewarded_goal" in lines


def test_shuffled_rows_are_replayed_to_their_own_next_observations(tmp_path):
    """As a cloud of transitions they can be checked; they are no episodes to describe."""
    arrays = {k: x for k, x in arrays_of(SAMPLE).items() if not k.startswith("infos/")}
    arrays["next_observations"] = np.roll(arrays["observations"], -1, axis=0)
    inside = np.flatnonzero(~(arrays["terminals"] | arrays["timeouts"]))[:-1]
    rows = np.random.default_rng(0).permutation(inside)
    path = written(tmp_path / "shuffled.hdf5", {k: x[rows] for k, x in arrays.items()})
    found = report.check(HOPPER, path)
    for name in ("observations", "rewards", "terminals"):
        assert found[name]["agree"] == found[name]["compared"] == len(rows)
    with pytest.raises(d4rl.DatasetError, match="no episodes in order"):
        report.describe(HOPPER, path)


def test_without_timeouts_episodes_are_cut_at_the_limit(tmp_path):
    """As d4rl.sequence_dataset cuts them: 1,000, 999 and 501 rows."""
    n = 2_500
    arrays = {"observations": np.zeros((n, 11)), "actions": np.zeros((n, 3))}
    arrays |= {"rewards": np.ones(n), "terminals": np.zeros(n, bool)}
    found, _ = report.describe(HOPPER, written(tmp_path / "no_timeouts.hdf5", arrays))
    assert (found["episodes"], found["timeouts"]) == (3, "no such key")
    assert found["length"]["mean"] == pytest.approx(n / 3)


@pytest.mark.parametrize("key, n", [("actions", 60), ("rewards", 60), ("terminals", 60)])
def test_a_file_of_other_physics_fails(capsys, tmp_path, key, n):
    arrays = arrays_of(SAMPLE)
    arrays[key][:n] = ~arrays[key][:n] if key == "terminals" else arrays[key][:n] / 2
    file = written(tmp_path / "other.hdf5", arrays)
    with pytest.raises(SystemExit) as stop:
        main(["check", str(file), HOPPER])
    assert (
        stop.value.code.startswith("error: this is not the physics")
        and str(file) in stop.value.code
    )
    name = "observations" if key == "actions" else key
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith(name)]
    assert "(100.00%)" not in line


def test_limit_draws_rows_by_the_seed():
    found = [report.check(HOPPER, SAMPLE, limit=30, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2] and found[0]["transitions"] == 30


@pytest.mark.parametrize(
    "args, part",
    [
        (["describe", "hoper-medium-v2"], "hopper-medium-v2"),
        (["describe", HOPPER, "--data", "no_such.hdf5"], "no_such.hdf5"),
        (["check", "no_such.hdf5", HOPPER], "no_such.hdf5"),
        (["check", str(SAMPLE), "walker2d-medium-v2"], "use a file of this task"),
    ],
)
def test_errors_end_in_one_line(args, part):
    with pytest.raises(SystemExit) as stop:
        main(args)
    message = stop.value.code
    assert message.startswith("error: ") and part in message and "\n" not in message


@pytest.mark.parametrize(
    "flags, least", [(["--limit", "0"], 1), (["--limit", "-390"], 1), (["--seed", "-1"], 0)]
)
def test_numbers_out_of_range_are_refused(capsys, flags, least):
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(SAMPLE), HOPPER, *flags])
    assert f"must be a whole number from {least} to 10^8" in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "describe", interrupted)
    with pytest.raises(SystemExit, match="^error: interrupted$"):
        main(["describe", HOPPER, "--data", str(SAMPLE), "--pictures", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
