"""Training of the behavior policies: a stopped run goes on as if it had not been, and selection."""

import csv
import json

import gymnasium
import numpy as np
import pytest

from d4rl_gymnasium import goal_ant, sac, train_policies
from d4rl_gymnasium.behavior import BehaviorPolicy
from d4rl_gymnasium.train_policies import main

HOPPER = "hopper-medium-v2"


# --- the goal-reaching ant ---


@pytest.fixture
def ant():
    env = gymnasium.make(goal_ant.ENV_ID)
    env.reset(seed=0)
    return env


def test_the_policy_sees_posture_speed_and_an_offset_of_length_ten(ant):
    base = ant.unwrapped
    base.set_target([3.0, -4.0])
    seen = ant.step(np.zeros(8))[0]
    np.testing.assert_array_equal(seen[:13], base.data.qpos[2:])
    np.testing.assert_array_equal(seen[13:27], base.data.qvel)
    offset = base.goal - base.data.qpos[:2]
    np.testing.assert_allclose(seen[27:], 10 * offset / np.hypot(*offset))
    observation = np.arange(29.0)
    np.testing.assert_array_equal(goal_ant.goal_observation(observation, (0.0, 1.0))[27:], 0.0)


def test_the_reward_is_progress_towards_the_goal_in_metres_per_second(ant):
    base = ant.unwrapped
    base.set_target([9.0, 0.0])
    total, before = 0.0, np.hypot(*(base.goal - base.data.qpos[:2]))
    for _ in range(50):
        action = ant.action_space.sample()
        _, reward, *_ = ant.step(action)
        total += reward * 0.1
    np.testing.assert_allclose(total, before - np.hypot(*(base.goal - base.data.qpos[:2])))


def test_a_reached_goal_gives_way_to_the_next_within_the_disk(ant):
    base = ant.unwrapped
    places = []
    for _ in range(300):
        base.set_target(base.data.qpos[:2] + 0.1)
        _, _, _, _, info = base.step(np.zeros(8))
        assert info["success"]
        places.append(base.goal - base.data.qpos[:2])
    radii = np.hypot(*np.transpose(places))
    assert radii.max() <= 10
    # The radius is uniform: quartiles at 2.5, 5 and 7.5.
    np.testing.assert_allclose(np.quantile(radii, [0.25, 0.5, 0.75]), [2.5, 5, 7.5], atol=1.2)
    assert np.abs(np.mean(places, 0)).max() < 1


def test_an_episode_ends_after_200_steps_or_upside_down(ant):
    ends = [ant.step(np.zeros(8))[2:4] for _ in range(200)]
    assert ends == [(False, False)] * 199 + [(False, True)]
    qpos = ant.unwrapped.init_qpos.copy()
    for quaternion, terminated in (
        ([1, 0, 0, 0], False),
        ([0, 0, 0, 1], False),
        ([0, 1, 0, 0], True),
    ):
        ant.reset()
        qpos[2], qpos[3:7] = 2.0, quaternion
        ant.unwrapped.set_state(qpos, np.zeros(14))
        assert ant.step(np.zeros(8))[2] == terminated


def test_the_plane_has_no_walls_and_the_ant_of_the_mazes(ant):
    plane, maze = ant.unwrapped.model, gymnasium.make("antmaze-umaze-v2").unwrapped.model
    np.testing.assert_array_equal(plane.body_mass[1:], maze.body_mass[1:])
    np.testing.assert_array_equal(plane.actuator_gear, maze.actuator_gear)
    assert maze.ngeom - plane.ngeom == 18  # the walls of umaze


def test_antmaze_itself_is_not_trained_in():
    with pytest.raises(SystemExit, match=f"error: .*{goal_ant.ENV_ID}"):
        main(["train", "--env", "antmaze-umaze-v2", "--directory", "nowhere"])


# --- runs ---


def command(directory, steps, env=HOPPER, **settings):
    settings = {
        "learning_starts": 60, "eval_freq": 80, "eval_episodes": 2, "batch_size": 16,
        "actor_width": 16, "critic_width": 16,
    } | settings  # fmt: skip
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return ["train", "--env", env, "--directory", str(directory), "--steps", str(steps), *flags]


def numbers_of(directory):
    """Everything a run leaves behind but the hours."""
    with np.load(directory / "checkpoint.npz", allow_pickle=False) as file:
        arrays = {name: file[name].tobytes() for name in file.files if name != "state"}
        state = json.loads(file["state"].item())
    del state["seconds"]
    rows = [{**row, "hours": ""} for row in train_policies.read_log(directory)]
    replay = np.fromfile(directory / "replay.f32", np.float32)
    last = sorted(directory.glob("snapshot-*.npz"))[-1].read_bytes()
    return arrays, state, rows, replay.tobytes(), last


@pytest.mark.parametrize(
    "env, algorithm", [(HOPPER, "sac"), (goal_ant.ENV_ID, "sac"), (HOPPER, "tqc")]
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, capsys, env, algorithm):
    pytest.importorskip("sbx")
    main(command(tmp_path / "whole", 240, env, algorithm=algorithm))
    main(command(tmp_path / "parts", 160, env, algorithm=algorithm))
    # What a process leaves that was killed after its last checkpoint.
    directory = tmp_path / "parts"
    (directory / "checkpoint.partial").write_bytes(b"half a checkpoint")
    rows = [row.values() for row in train_policies.read_log(directory)]
    train_policies.write_log(directory, [*rows, ["240", *["0.0"] * 7]])
    with open(directory / "replay.f32", "ab") as file:
        file.write(np.full(100, np.nan, np.float32).tobytes())
    capsys.readouterr()
    main(command(directory, 240, env, algorithm=algorithm))
    assert "continuing at step 160 of 240" in capsys.readouterr().out
    assert numbers_of(directory) == numbers_of(tmp_path / "whole")
    assert [row["step"] for row in train_policies.read_log(directory)] == ["0", "80", "160", "240"]
    learned = [BehaviorPolicy.load(directory / f"snapshot-{n:07d}.npz") for n in (0, 80, 240)]
    assert (learned[0].weights["w0"] != learned[2].weights["w0"]).any()


def test_a_folder_of_another_run_is_refused(tmp_path):
    pytest.importorskip("sbx")
    main(command(tmp_path, 80))
    for change, flag in [({"seed": 1}, "seed"), ({"critic_lr": 1e-4}, "critic_lr"),
                         ({"algorithm": "tqc"}, "algorithm")]:  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            main(command(tmp_path, 80, **change))
        assert stop.value.code.startswith("error: ") and f"--{flag} " in stop.value.code
    with pytest.raises(SystemExit, match="error: .*at step 80"):
        main(command(tmp_path, 40))


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    pytest.importorskip("sbx")
    settings = train_policies.parse(command(tmp_path, 80))
    run = sac.Run(tmp_path, settings)
    with pytest.raises(SystemExit, match="error: another process trains in"):
        main(command(tmp_path, 80))
    run.close()
    main(command(tmp_path, 80))


def test_transitions_are_stored_as_they_happened(tmp_path):
    pytest.importorskip("sbx")
    main(command(tmp_path, 160))
    settings = train_policies.parse(command(tmp_path, 160))
    run = sac.Run(tmp_path, settings)
    parts = np.split(run.replay.rows, run.replay.bounds, axis=1)
    observations, actions, rewards, terminated, following = parts
    assert [part.shape for part in parts] == [(160, 11), (160, 3), (160, 1), (160, 1), (160, 11)]
    joined = (following[:-1] == observations[1:]).all(1)
    # No time limit within 160 steps: only a fall starts an episode.
    np.testing.assert_array_equal(joined, terminated[:-1, 0] == 0)
    assert terminated.any() and np.abs(actions).max() <= 1
    env = gymnasium.make(HOPPER).unwrapped
    env.reset(seed=0)
    env.set_state(np.append(0, observations[100, :5]), observations[100, 5:])
    assert env.step(actions[100])[1] == pytest.approx(rewards[100, 0], abs=1e-3)
    batch = run.replay.sample(64)
    drawn = np.hstack([x.numpy() for x in (batch.observations, batch.actions, batch.rewards)])
    stored = {row.tobytes() for row in np.hstack([observations, actions, rewards])}
    assert {row.tobytes() for row in drawn} <= stored
    run.close()


# --- selection ---


def save_snapshots(directory, scores, observation_size, action_size):
    """A log with the given scores, and a snapshot for each row; returns are 100 times the score."""
    directory.mkdir()
    sizes = {
        "0": (observation_size, 4),
        "1": (4, 4),
        "_mean": (4, action_size),
        "_log_std": (4, action_size),
    }
    weights = {f"w{name}": np.zeros(shape) for name, shape in sizes.items()}
    weights |= {f"b{name}": np.zeros(shape[1]) for name, shape in sizes.items()}
    rows = []
    for number, value in enumerate(scores):
        step = 10_000 * number
        BehaviorPolicy(weights, env_steps=step).save(directory / f"snapshot-{step:07d}.npz")
        rows.append([step, 0, 0, 100 * value, 0, value, value, 0])
    train_policies.write_log(directory, rows)


@pytest.fixture
def selection(tmp_path, monkeypatch):
    """A run of 12 snapshots whose measured returns are those of its log, and an empty POLICIES."""
    returns = [1, 50, 100, 200, 2800, 2900, 2700, 4000, 4850, 4990, 5100, 4000]
    save_snapshots(tmp_path / "run", np.array(returns) / 100, 17, 6)
    (tmp_path / "policies").mkdir()
    monkeypatch.setattr(train_policies, "POLICIES", tmp_path / "policies")

    def measured(policy, env, episodes, seed, stochastic):
        noise = policy.weights["b_log_std"].mean()
        return np.full(episodes, returns[policy.env_steps // 10_000] - 1000.0 * noise)

    monkeypatch.setattr(train_policies, "episode_returns", measured)

    def run(command, env, *flags):
        main([command, "--env", env, *flags])
        return {p.stem: BehaviorPolicy.load(p) for p in (tmp_path / "policies").glob("*.npz")}

    run.directory, run.policies = str(tmp_path / "run"), tmp_path / "policies"
    return run


def test_expert_and_medium_are_those_with_d4rls_returns(selection, capsys):
    found = selection("select", "walker2d-expert-v2", "--directory", selection.directory)
    assert found["walker2d-expert"].env_steps == 90_000  # 4,990 of 4,920.51
    assert found["walker2d-expert"].return_mean == 4990
    found = selection("select", "walker2d-medium-v2", "--directory", selection.directory)
    assert found["walker2d-medium"].env_steps == 50_000 and len(found) == 2
    printed = capsys.readouterr().out
    assert "return 2,900, D4RL's file 2,852: +1.7%" in printed and "train longer" not in printed
    with open(selection.policies / "walker2d-medium-returns.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 12
    early = ["--directory", selection.directory, "--until", "30000"]
    assert selection("select", "walker2d-medium-v2", *early)["walker2d-medium"].env_steps == 30_000
    assert "more than 5% off: train longer" in capsys.readouterr().out


def test_the_ladders(selection):
    flags = ["--directory", selection.directory, "--until", "50000", "--ladder", "3"]
    found = selection("select", "walker2d-medium-replay-v2", *flags)
    assert {name: policy.env_steps for name, policy in found.items()} == {
        "walker2d-replay-0": 0, "walker2d-replay-1": 20_000, "walker2d-replay-2": 50_000,
    }  # fmt: skip
    found = selection("select", "walker2d-full-replay-v2", "--directory", selection.directory)
    steps = [found[f"walker2d-full-replay-{number}"].env_steps for number in range(8)]
    assert steps == [0, 20_000, 30_000, 50_000, 60_000, 80_000, 90_000, 110_000]


def test_noise_is_raised_until_the_return_is_d4rls(selection):
    selection("select", "walker2d-expert-v2", "--directory", selection.directory)
    found = selection("match", "walker2d-medium-v2", "--policy", "walker2d-expert")
    # 4,990 less 1,000 for each unit of the noise's logarithm, which goes up to 2.
    assert found["walker2d-medium"].return_mean == pytest.approx(2990, abs=20)
    (selection.policies / "walker2d-medium.npz").rename(selection.policies / "walker2d-good.npz")
    found = selection("match", "walker2d-medium-v2", "--policy", "walker2d-good")
    assert found["walker2d-medium"].return_mean == pytest.approx(2852, abs=20)
    np.testing.assert_allclose(found["walker2d-medium"].weights["b_log_std"], 2.14, atol=0.03)


@pytest.mark.parametrize("command, flag", [("match", "policy"), ("select", "directory")])
def test_a_missing_flag_is_named(command, flag):
    with pytest.raises(SystemExit, match=f"error: {command} needs --{flag}"):
        main([command, "--env", HOPPER])


def test_the_ant_that_reaches_most_goals_is_selected(tmp_path, monkeypatch):
    save_snapshots(tmp_path / "run", [1, 8, 10, 7, 6, 5.5, 4], 29, 8)
    (tmp_path / "policies").mkdir()
    monkeypatch.setattr(train_policies, "POLICIES", tmp_path / "policies")
    monkeypatch.setattr(
        train_policies, "maze_success", lambda policy, *_, **__: policy.env_steps / 100_000
    )
    main(["select", "--env", goal_ant.ENV_ID, "--directory", str(tmp_path / "run")])
    chosen = BehaviorPolicy.load(tmp_path / "policies" / "ant-goal.npz")
    # Of those with more than half of the highest return, steps 10,000 to 50,000.
    assert chosen.env_steps == 50_000 and chosen.normalized_score == 50.0
    assert (tmp_path / "policies" / "ant-returns.csv").exists()


@pytest.mark.parametrize("there", [True, False])
def test_a_goal_counts_when_the_led_ant_comes_near_it(monkeypatch, there):
    class Ant(train_policies.GuidedAnt):
        def act(self, observation):
            if there:
                self.env.place(self.infos["infos/goal"])
            return np.zeros(8)

    monkeypatch.setattr(train_policies, "GuidedAnt", Ant)
    # Seven starts in 46 cells: none of them in the cell of its goal.
    assert train_policies.maze_success(None, 7, seed=1) == float(there)


def test_a_policy_too_large_to_ship_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(train_policies, "POLICIES", tmp_path)
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal((1, 1)) for name in
               ("b0", "w1", "b1", "w_mean", "b_mean", "w_log_std", "b_log_std")}  # fmt: skip
    weights["w0"] = rng.standard_normal((400, 400))
    small = weights | {"w0": np.ones((1, 1))}
    train_policies.store(BehaviorPolicy(small), "walker2d-expert")
    with pytest.raises(ValueError, match="more than 200,000 bytes"):
        train_policies.store(BehaviorPolicy(weights), "walker2d-expert")
    (kept,) = tmp_path.iterdir()
    assert BehaviorPolicy.load(kept).weights["w0"] == 1


def test_selection_without_a_log_says_so(tmp_path):
    for env in ("walker2d-medium-v2", "goal-reaching-ant-v0"):
        with pytest.raises(SystemExit, match="has no returns.csv with rows: run train first"):
            main(["select", "--env", env, "--directory", str(tmp_path)])
