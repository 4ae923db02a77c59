"""How AntMaze data is collected: shortest paths, waypoints, starts and goals, a file's flags."""

import itertools

import gymnasium
import numpy as np
import pytest

import d4rl_gymnasium as d4rl
from d4rl_gymnasium import goal_ant, report, waypoints
from d4rl_gymnasium import regenerate as module
from d4rl_gymnasium.__main__ import main
from d4rl_gymnasium.antmaze import CELL_SIZE, MAZES, cell_center, cells, draw_goal, nearest_cell
from d4rl_gymnasium.behavior import BehaviorPolicy
from d4rl_gymnasium.waypoints import Navigator, free_cells

MAPS = {name: maps["collection"] for name, maps in MAZES.items()}
UMAZE, PLAY, DIVERSE = "antmaze-umaze-v2", "antmaze-medium-play-v2", "antmaze-large-diverse-v2"
ANTMAZE = [env_id for env_id, known in d4rl.TASKS.items() if known.family == "antmaze"]


# --- paths ---


def distances(maze_map):
    """Steps between all pairs of free cells, by Floyd and Warshall's relaxation."""
    free = [
        (row, column)
        for row, line in enumerate(maze_map)
        for column, letter in enumerate(line)
        if letter != "#"
    ]
    steps = np.full((len(free), len(free)), np.inf)
    for i, j in itertools.product(range(len(free)), repeat=2):
        away = abs(free[i][0] - free[j][0]) + abs(free[i][1] - free[j][1])
        if away <= 1:
            steps[i, j] = away
    for k in range(len(free)):
        steps = np.minimum(steps, steps[:, k, None] + steps[None, k])
    return free, steps


@pytest.mark.parametrize("name", MAPS)
def test_paths_are_shortest_between_all_pairs_of_free_cells(name):
    free, steps = distances(MAPS[name])
    assert sorted(free) == free_cells(MAPS[name])
    assert np.isfinite(steps).all()
    for j, target in enumerate(free):
        towards = waypoints.next_cells(MAPS[name], target)
        assert towards.keys() == set(free) and towards[target] == target
        for i, start in enumerate(free):
            cell, length = start, 0
            while cell != target:
                (row, column), (next_row, next_column) = cell, towards[cell]
                assert abs(row - next_row) + abs(column - next_column) == 1
                cell, length = towards[cell], length + 1
            assert length == steps[i, j]


@pytest.mark.parametrize("name", MAPS)
def test_the_collection_maps_have_the_walls_of_the_tasks(name):
    assert cells(MAPS[name], "#") == cells(MAZES[name]["task"], "#")


def test_the_nearest_cell():
    maze = MAPS["medium"]
    for cell in free_cells(maze):
        for offset in ([0, 0], [1.9, -1.9], [-1.9, 1.9]):
            assert nearest_cell(maze, cell_center(maze, cell) + offset) == cell


# --- waypoints ---


def in_a_wall(maze_map, xy):
    """Whether one of the places (n, 2) is."""
    walls = np.array([cell_center(maze_map, wall) for wall in cells(maze_map, "#")])
    return np.abs(walls[:, None] - xy).max(-1).min() < CELL_SIZE / 2


def walk(navigator, xy, speed, steps):
    """The places of a point that goes straight for each waypoint, until it is at the goal."""
    places = [np.array(xy)]
    for _ in range(steps):
        way = navigator.waypoint(places[-1]) - places[-1]
        distance = np.hypot(*way)
        places.append(places[-1] + way * min(1.0, speed / max(distance, 1e-9)))
        if np.hypot(*(places[-1] - navigator.goal)) <= 0.5:
            return places
    raise AssertionError(f"from {xy} the goal {navigator.goal} was not reached")


@pytest.mark.parametrize("name", MAPS)
def test_a_point_reaches_every_goal_and_crosses_no_wall(name):
    maze, rng = MAPS[name], np.random.default_rng(0)
    free, steps = distances(maze)
    for (i, start), (j, target) in itertools.product(enumerate(free), repeat=2):
        goal = draw_goal(rng, maze, target)
        navigator = Navigator(maze, goal, target, rng)
        xy = cell_center(maze, start) + rng.uniform(-1.9, 1.9, 2)
        # At most a cell's diagonal for each step of the path and half of one at both ends.
        places = walk(navigator, xy, 0.4, int((steps[i, j] + 2) * CELL_SIZE * 2**0.5 / 0.4))
        assert not in_a_wall(maze, np.array(places))


def test_a_waypoint_stays_until_it_is_reached():
    maze, rng = MAPS["large"], np.random.default_rng(0)
    goal = np.array(cell_center(maze, (7, 9)))
    navigator = Navigator(maze, goal, (7, 9), rng)
    first = navigator.waypoint([0.0, 0.0])
    following = waypoints.next_cells(maze, (7, 9))[1, 1]
    offset = first - cell_center(maze, following)
    assert (offset >= 0).all() and (offset <= 1.5).all()
    for share in (0.3, 0.5, 0.7):
        np.testing.assert_array_equal(navigator.waypoint(share * first), first)
    assert (navigator.waypoint(first) != first).any()
    # Pushed to another part of the maze, it gets a way from there.
    pushed = navigator.waypoint(cell_center(maze, (1, 10)))
    assert nearest_cell(maze, pushed - 0.75) == waypoints.next_cells(maze, (7, 9))[1, 10]


def test_in_the_cell_of_the_goal_and_next_to_it_the_goal_is_the_waypoint():
    maze = MAPS["umaze"]
    goal = np.array([0.7, 8.7])
    navigator = Navigator(maze, goal, (3, 1), np.random.default_rng(0))
    for xy in ([4.0, 8.0], [1.0, 9.0], [0.7, 8.7], [-1.0, 7.0]):
        np.testing.assert_array_equal(navigator.waypoint(xy), goal)


# --- starts and goals ---


@pytest.mark.parametrize("env_id", ANTMAZE)
def test_goals_are_marked_or_anywhere_with_d4rls_noise(env_id):
    name, variant = waypoints.variant_of(env_id)
    maze, rng = MAPS[name], np.random.default_rng(0)
    expected = free_cells(maze) if variant == "diverse" else cells(maze, "g")
    drawn = [waypoints.draw_goal_cell(rng, maze, variant) for _ in range(200 * len(expected))]
    counts = [drawn.count(cell) for cell in expected]
    assert sum(counts) == len(drawn) and min(counts) > 140 and max(counts) < 260
    goals = np.array([draw_goal(rng, maze, cell) - cell_center(maze, cell) for cell in drawn])
    assert goals.min() >= 0 and goals.max() <= 1.5
    # U(0, 1) + U(0, 0.5): mean 0.75, variance 1/12 + 1/48.
    np.testing.assert_allclose(goals.mean(0), 0.75, atol=0.06)
    np.testing.assert_allclose(goals.var(0), 5 / 48, atol=0.02)


@pytest.mark.parametrize("env_id", ANTMAZE)
def test_starts_are_anywhere_but_in_umaze(env_id):
    name, variant = waypoints.variant_of(env_id)
    maze, rng = MAPS[name], np.random.default_rng(0)
    starts = [waypoints.draw_start(rng, maze, variant) for _ in range(2000)]
    if env_id == UMAZE:
        assert starts == [None] * 2000
        return
    expected = set(free_cells(maze))
    if variant == "play":
        expected -= set(cells(maze, "g"))
    assert {nearest_cell(maze, start) for start in starts} == expected
    offsets = [start - cell_center(maze, nearest_cell(maze, start)) for start in starts]
    assert np.min(offsets) >= 0 and 0.95 < np.max(offsets) <= 1


@pytest.mark.parametrize("env_id", ANTMAZE)
def test_rewards_are_for_a_place_that_the_task_can_draw(env_id):
    env = gymnasium.make(env_id).unwrapped
    env.reset(seed=0)
    goals = np.array([env.reset()[1]["goal"] for _ in range(2000)])
    assert np.abs(goals - waypoints.rewarded_goal(env_id)).max(1).min() < 0.1


# --- the collected file ---


def save_ant(path, seed=0):
    """A policy with random weights that sees what the goal-reaching ant sees."""
    rng = np.random.default_rng(seed)
    shapes = {"0": (29, 16), "1": (16, 16), "_mean": (16, 8), "_log_std": (16, 8)}
    weights = {f"w{name}": 0.3 * rng.standard_normal(shape) for name, shape in shapes.items()}
    weights |= {f"b{name}": np.zeros(shape[1]) for name, shape in shapes.items()}
    weights["w_mean"] *= 0.03
    weights["w_log_std"] *= 0.03
    weights["b_log_std"] -= 2.0
    BehaviorPolicy(weights).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("antmaze")
    (folder / "policies").mkdir()
    save_ant(folder / "policies" / "ant-goal.npz")
    (folder / "policies" / "recipe.json").write_text('{"antmaze": {"ant-goal": 1.0}}')
    return folder


@pytest.fixture
def policies(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "POLICIES", folder / "policies")
    monkeypatch.setattr(module, "CHUNK_ROWS", 1500)
    return folder / "policies"


@pytest.fixture(scope="module")
def files(folder):
    """4,000 steps of each kind of task, by two processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "POLICIES", folder / "policies")
        patch.setattr(module, "CHUNK_ROWS", 1500)
        for env_id in (UMAZE, PLAY, DIVERSE):
            module.regenerate(env_id, 4000, folder / f"{env_id}.hdf5", processes=2)
    return {env_id: folder / f"{env_id}.hdf5" for env_id in (UMAZE, PLAY, DIVERSE)}


@pytest.mark.parametrize("env_id", [UMAZE, PLAY, DIVERSE])
def test_episodes_end_by_time_out_and_nowhere_else(files, env_id):
    data = d4rl.get_dataset(env_id, files[env_id])
    limit = {UMAZE: 701, PLAY: 1001, DIVERSE: 1001}[env_id]
    # A chunk of 1,500 rows holds whole episodes; the last one is cut.
    assert set(np.flatnonzero(data["timeouts"]) + 1) == {*range(limit, 4000, limit), 4000}
    joined = (data["next_observations"][:-1] == data["observations"][1:]).all(axis=1)
    np.testing.assert_array_equal(joined, ~data["timeouts"][:-1])


@pytest.mark.parametrize("env_id", [UMAZE, PLAY, DIVERSE])
def test_rows_have_d4rls_keys_and_one_goal_an_episode(files, env_id):
    data = d4rl.get_dataset(env_id, files[env_id])
    widths = {
        "observations": (29,), "next_observations": (29,), "actions": (8,), "rewards": (),
        "terminals": (), "timeouts": (), "infos/qpos": (15,), "infos/qvel": (14,),
        "infos/goal": (2,), "infos/rewarded_goal": (2,),
    }  # fmt: skip
    assert {key: array.shape[1:] for key, array in data.items()} == widths
    np.testing.assert_array_equal(
        data["observations"], np.hstack([data["infos/qpos"], data["infos/qvel"]])
    )
    name, variant = waypoints.variant_of(env_id)
    changes = (data["infos/goal"][1:] != data["infos/goal"][:-1]).any(1)
    np.testing.assert_array_equal(changes, data["timeouts"][:-1])
    goals = np.unique(data["infos/goal"], axis=0)
    allowed = free_cells(MAPS[name]) if variant == "diverse" else cells(MAPS[name], "g")
    assert {nearest_cell(MAPS[name], goal - 0.75) for goal in goals} <= set(allowed)
    expected = np.broadcast_to(waypoints.rewarded_goal(env_id), (4000, 2))
    np.testing.assert_array_equal(data["infos/rewarded_goal"], expected.astype(np.float32))


@pytest.mark.parametrize("env_id", [UMAZE, PLAY, DIVERSE])
def test_starts_of_a_file(files, env_id):
    data = d4rl.get_dataset(env_id, files[env_id])
    starts = np.append(0, np.flatnonzero(data["timeouts"][:-1]) + 1)
    places = data["observations"][starts, :2]
    assert (np.abs(places).max() < 0.11) == (env_id == UMAZE)
    assert len(np.unique(places, axis=0)) == len(starts)
    joints = data["observations"][starts, 7:15]
    assert 0.05 < np.abs(joints).max() <= 0.1


def test_actions_are_the_policys_with_noise_within_the_bounds(folder, policies):
    env = gymnasium.make(UMAZE).unwrapped
    env.reset(seed=0)
    loaded = BehaviorPolicy.load(policies / "ant-goal.npz")
    ant = waypoints.GuidedAnt(env, UMAZE, loaded, np.random.default_rng(0))
    observation = ant.reset()
    mean = loaded.act(goal_ant.goal_observation(observation, ant.navigator.waypoint([0, 0])))
    actions = np.array([ant.act(observation) for _ in range(2000)])
    assert actions.dtype == np.float32 and np.abs(actions).max() <= 1
    inside = np.abs(mean) < 0.4
    assert inside.any()
    # The policy's own noise, exp(log std) through tanh, adds to the 0.2.
    assert (actions.std(0)[inside] > 0.2).all()
    np.testing.assert_allclose(actions.mean(0)[inside], mean[inside], atol=0.04)


@pytest.mark.parametrize("env_id", [UMAZE, DIVERSE])
def test_the_number_of_processes_changes_no_bit(files, policies, tmp_path, env_id):
    module.regenerate(env_id, 4000, tmp_path / "one.hdf5", processes=1)
    one, two = (
        d4rl.get_dataset(env_id, tmp_path / "one.hdf5"),
        d4rl.get_dataset(env_id, files[env_id]),
    )
    assert {k: x.tobytes() for k, x in one.items()} == {k: x.tobytes() for k, x in two.items()}


def test_another_seed_gives_another_file(files, policies, tmp_path):
    module.regenerate(UMAZE, 800, tmp_path / "other.hdf5", seed=1, processes=1)
    other = d4rl.get_dataset(UMAZE, tmp_path / "other.hdf5")
    assert (other["actions"][:700] != d4rl.get_dataset(UMAZE, files[UMAZE])["actions"][:700]).any()


@pytest.mark.parametrize("env_id", [UMAZE, PLAY, DIVERSE])
def test_the_simulator_reproduces_the_file(files, env_id):
    found = report.check(env_id, files[env_id], limit=300)
    for name in ("observations", "rewards", "terminals"):
        # The states are stored in float32; a contact that begins can magnify the rounding.
        assert found[name]["agree"] >= 0.98 * found[name]["compared"] > 0


@pytest.mark.parametrize("env_id", [UMAZE, PLAY, DIVERSE])
def test_describe_counts_the_episodes_and_draws_the_maze(files, capsys, tmp_path, env_id):
    main(["describe", env_id, "--data", str(files[env_id]), "--pictures", str(tmp_path)])
    printed = capsys.readouterr().out
    episodes = -(-4000 // waypoints.episode_steps(env_id))
    assert printed.startswith(f"{env_id}: 4,000 transitions in {episodes} episodes (D4RL's file: ")
    assert "rewarded rows " in printed
    assert "success rate" in printed and "free cells visited" in printed
    assert (tmp_path / f"{env_id}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


class Teleporter:
    """In place of an ant: goes 0.3 m a step towards the waypoint, whatever the walls."""

    def __init__(self, env):
        self.env = env

    def act(self, observation, rng):
        offset = observation[-2:]
        xy = self.env.data.qpos[:2] + 0.3 * offset / np.hypot(*offset)
        self.env.place(xy)
        return np.zeros(8, np.float32)


def test_a_mover_is_rewarded_for_one_place_and_does_not_stay_at_its_goal():
    env = gymnasium.make(UMAZE).unwrapped
    env.reset(seed=0)
    ant = waypoints.GuidedAnt(env, UMAZE, Teleporter(env), np.random.default_rng(0))
    observation, places, rewards, terminals = ant.reset(), [], [], []
    for _ in range(2000):
        observation, reward, terminated, _, _ = env.step(ant.act(observation))
        places.append(observation[:2])
        rewards.append(reward)
        terminals.append(terminated)
    assert rewards == [float(terminal) for terminal in terminals]
    near = np.hypot(*(np.array(places) - waypoints.rewarded_goal(UMAZE)).T) <= 0.5
    np.testing.assert_array_equal(near, np.array(rewards) == 1)
    # From the start to the goal, then around in its cell and the one next to it.
    arrived = np.flatnonzero(np.hypot(*(places - ant.infos["infos/goal"]).T) <= 0.5)[0]
    after = places[arrived + 1 :]
    assert {nearest_cell(MAPS["umaze"], xy) for xy in after} == {(3, 1), (3, 2)}
    assert np.ptp(after, axis=0).min() > 2
    assert 0 < near.mean() < 0.1


def test_the_cells_around():
    assert sorted(waypoints.around(MAPS["umaze"], (3, 1))) == [(3, 1), (3, 2)]
    assert sorted(waypoints.around(MAPS["medium"], (5, 6))) == [(4, 6), (5, 6), (6, 6)]


def test_without_the_policy_the_error_is_one_line(policies, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "POLICIES", tmp_path)
    with pytest.raises(d4rl.DatasetError, match=f"{PLAY} can't be regenerated") as raised:
        d4rl.get_dataset(PLAY, "regenerated", 1000)
    assert "\n" not in str(raised.value)
    assert not any(env_id.startswith("antmaze") for env_id in module.regenerated_tasks())


def test_with_the_policy_all_antmaze_tasks_can_be_made(policies):
    assert set(ANTMAZE) <= set(module.regenerated_tasks())
    paths = {d4rl.dataset_path(env_id, "regenerated", 1000) for env_id in ANTMAZE}
    assert len(paths) == 6
