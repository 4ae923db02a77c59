"""Minari's data sets in and out: the same transitions, their environments, one line for a fault."""

import dataclasses
import sys
import warnings

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict

import d4rl_gymnasium as d4rl
from d4rl_gymnasium import minari_io, report, tasks
from d4rl_gymnasium.__main__ import main

HOPPER, MAZE = "hopper-medium-v2", "antmaze-umaze-v2"


@pytest.fixture(autouse=True)
def d4rls_tasks():
    """Gives the tasks their own environments back."""
    yield
    for env_id in (HOPPER, MAZE):
        tasks.restore(env_id)


def test_without_the_package_the_error_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(d4rl.DatasetError, match=r"need the package minari.*\[minari\]") as raised:
        d4rl.qlearning_dataset(HOPPER, data="minari:mujoco/hopper/medium-v0")
    assert "\n" not in str(raised.value)


def test_a_data_set_of_minari_is_no_file():
    with pytest.raises(ValueError, match="minari:some/name-v0 is no file"):
        d4rl.dataset_path(HOPPER, "minari:some/name-v0")


def test_a_task_gets_its_environment_and_scores_back():
    spec = gymnasium.spec("Hopper-v5")
    tasks.substitute(HOPPER, spec, (10.0, 110.0))
    assert type(gymnasium.make(HOPPER).unwrapped).__module__.endswith("hopper_v5")
    assert d4rl.get_normalized_score(HOPPER, 60.0) == 0.5
    tasks.substitute(HOPPER, None, (0.0, 1.0))
    assert isinstance(gymnasium.make(HOPPER).unwrapped, d4rl.envs.D4RLEnv)
    assert d4rl.get_normalized_score(HOPPER, 0.25) == 0.25
    tasks.restore(HOPPER)
    assert d4rl.get_normalized_score(HOPPER, 3234.3) == 1.0
    assert gymnasium.make(HOPPER).spec.max_episode_steps == 1000


def test_an_environment_without_an_episode_limit_gets_the_tasks():
    spec = dataclasses.replace(gymnasium.spec("HalfCheetah-v5"), max_episode_steps=None)
    tasks.substitute(HOPPER, spec)
    env = gymnasium.make(HOPPER)
    env.reset(seed=0)
    truncated = [env.step(np.zeros(6))[3] for _ in range(1000)]
    tasks.restore(HOPPER)
    assert truncated[-1] and sum(truncated) == 1


# --- with the package ---


@pytest.fixture
def minari(monkeypatch, tmp_path):
    """The package, with an empty folder, and no server to ask."""
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("MINARI_REMOTE", "nowhere://at-all")
    return minari


def rollouts(env_id, lengths, seed=0, make=gymnasium.make):
    """Steps of random episodes in D4RL's layout, which end by time-out after `lengths` at most."""
    env, rng, rows = make(env_id), np.random.default_rng(seed), []
    env.reset(seed=seed)
    for length in lengths:
        observation, _ = env.reset()
        for step in range(length):
            action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
            following, reward, terminated, _, _ = env.step(action)
            timeout = step == length - 1 and not terminated
            rows.append((observation, following, action, reward, terminated, timeout))
            observation = following
            if terminated:
                break
    keys = ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts")
    arrays = {k: np.array(x) for k, x in zip(keys, zip(*rows, strict=True), strict=True)}
    return {k: x.astype(np.float32) if x.dtype == float else x for k, x in arrays.items()}


@pytest.fixture
def hopper():
    return rollouts(HOPPER, [200, 3, 1, 200, 5])


def create(minari, dataset_id, arrays, env=None, **more):
    """Writes arrays by the package's own function."""
    bounds = zip(*report.episode_bounds(arrays), strict=True)
    buffers = [
        minari.data_collector.EpisodeBuffer(
            observations=np.append(
                arrays["observations"][i:j], arrays["next_observations"][j - 1 : j], 0
            ),
            actions=arrays["actions"][i:j],
            rewards=arrays["rewards"][i:j],
            terminations=arrays["terminals"][i:j],
            truncations=arrays["timeouts"][i:j],
        )
        for i, j in bounds
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(dataset_id, buffers, env=env, **more)


def spaces(arrays):
    sizes = arrays["observations"].shape[1:], arrays["actions"].shape[1:]
    return {
        "observation_space": Box(-np.inf, np.inf, sizes[0], np.float32),
        "action_space": Box(-1, 1, sizes[1], np.float32),
    }


def write(path, arrays):
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
    return str(path)


def same(first, second):
    assert first.keys() == second.keys()
    for key, array in first.items():
        np.testing.assert_array_equal(array, second[key])
        assert array.dtype == second[key].dtype


def test_out_and_in_again_gives_the_same_transitions(minari, hopper, tmp_path, capsys):
    path = write(tmp_path / "mine.hdf5", hopper)
    main(["to-minari", HOPPER, "--data", path])
    dataset_id = "d4rl_gymnasium/hopper-medium-mine-v2"
    assert capsys.readouterr().out == f"{dataset_id}: {tmp_path / 'minari' / dataset_id}\n"
    before = d4rl.qlearning_dataset(HOPPER, data=path)
    same(d4rl.qlearning_dataset(HOPPER, data=f"minari:{dataset_id}"), before)
    arrays = d4rl.get_dataset(HOPPER, f"minari:{dataset_id}")
    same(arrays, hopper)
    main(["describe", HOPPER, "--data", f"minari:{dataset_id}", "--pictures", str(tmp_path)])
    assert f"{len(hopper['rewards'])} transitions in 5 episodes" in capsys.readouterr().out


def test_minari_loads_episodes_with_their_last_observation(minari, hopper, tmp_path):
    main(
        ["to-minari", HOPPER, "--data", write(tmp_path / "a.hdf5", hopper), "--id", "some/name-v3"]
    )
    assert list(minari.list_local_datasets()) == ["some/name-v3"]
    dataset = minari.load_dataset("some/name-v3")
    starts, ends = report.episode_bounds(hopper)
    assert (dataset.total_episodes, dataset.total_steps) == (5, len(hopper["rewards"]))
    for episode, start, end in zip(dataset.iterate_episodes(), starts, ends, strict=True):
        np.testing.assert_array_equal(episode.observations[:-1], hopper["observations"][start:end])
        np.testing.assert_array_equal(
            episode.observations[-1], hopper["next_observations"][end - 1]
        )
        np.testing.assert_array_equal(episode.rewards, hopper["rewards"][start:end])
        assert dataset.observation_space.contains(episode.observations[0])
        assert dataset.action_space.contains(episode.actions[0])
        ends_how = bool(episode.terminations[-1]), bool(episode.truncations[-1])
        assert ends_how == (hopper["terminals"][end - 1], hopper["timeouts"][end - 1])
        assert not episode.terminations[:-1].any() and not episode.truncations[:-1].any()


def test_shuffled_rows_are_no_episodes(minari, hopper, tmp_path):
    path = write(tmp_path / "a.hdf5", {key: array[::-1] for key, array in hopper.items()})
    with pytest.raises(SystemExit, match="^error: the rows are no episodes in order"):
        main(["to-minari", HOPPER, "--data", path, "--id", "name-v0"])
    assert not minari.list_local_datasets()


def test_the_environment_and_d4rls_scores_are_recorded(minari, hopper, tmp_path):
    main(["to-minari", HOPPER, "--data", write(tmp_path / "a.hdf5", hopper), "--id", "name-v0"])
    dataset = minari.load_dataset("name-v0")
    env = dataset.recover_environment()
    assert (env.spec.id, env.spec.max_episode_steps) == (HOPPER, 1000)
    first, _ = env.reset(seed=0)
    np.testing.assert_array_equal(first, gymnasium.make(HOPPER).reset(seed=0)[0])
    assert minari.get_normalized_score(dataset, 3234.3) == 1.0
    metadata = dataset.storage.metadata
    assert metadata["ref_min_score"] == d4rl.task(HOPPER).ref_min_score
    assert "a.hdf5" in metadata["description"] and metadata["requirements"] == ["mujoco==3.2.6"]
    assert metadata["author"] == {"unknown"}


@pytest.mark.parametrize(
    ("data", "words"), [("d4rl", ["CC BY 4.0"]), ("regenerated", ["not D4RL's data", "MIT"])]
)
def test_the_source_is_recorded(minari, hopper, data, words):
    minari_io.write(HOPPER, hopper, minari_io.default_id(HOPPER, data), data)
    (dataset_id,) = minari.list_local_datasets()
    assert dataset_id == f"d4rl_gymnasium/hopper-medium{'' if data == 'd4rl' else '-' + data}-v2"
    description = minari.load_dataset(dataset_id).storage.metadata["description"]
    assert all(word in description for word in words)


def test_a_file_without_next_observations_loses_steps_at_time_outs_alone(minari, hopper, tmp_path):
    bare = {key: array for key, array in hopper.items() if key != "next_observations"}
    path = write(tmp_path / "bare.hdf5", bare)
    main(["to-minari", HOPPER, "--data", path, "--id", "bare-v0"])
    dataset = minari.load_dataset("bare-v0")
    assert "no next observations" in dataset.storage.metadata["description"]
    lost = int(bare["timeouts"].sum())
    assert lost == 3 and dataset.total_steps == len(bare["rewards"]) - lost
    assert dataset.total_episodes == 4  # one of a single step that ended by time-out
    after = d4rl.qlearning_dataset(HOPPER, data="minari:bare-v0", terminate_on_end=True)
    # D4RL's function loses the same steps; and the last row, which here is a time-out.
    before = d4rl.qlearning_dataset(HOPPER, data=path)
    for key in ("observations", "actions", "rewards", "terminals"):
        np.testing.assert_array_equal(after[key], before[key][: len(after[key])])


def test_antmaze_keeps_the_episodes_that_go_on_at_the_goal(minari, tmp_path, capsys):
    def at_the_goal(env_id):
        env = gymnasium.make(env_id).unwrapped
        env.reset = lambda reset=env.reset, **seed: (reset(**seed), env.set_target([0.2, 0.1]))[0]
        return env

    # A unit of 1 step for each terminal, as `rollouts` stops there; the ant stays where it is.
    arrays = rollouts(MAZE, [4] * 6, make=at_the_goal)
    assert arrays["terminals"].all()
    arrays["timeouts"][:] = [False, False, True] * 2
    path = write(tmp_path / "maze.hdf5", arrays)
    main(["to-minari", MAZE, "--data", path, "--id", "maze-v0"])
    dataset = minari.load_dataset("maze-v0")
    assert [len(episode) for episode in dataset.iterate_episodes()] == [3, 3]
    same(
        d4rl.qlearning_dataset(MAZE, data="minari:maze-v0"), d4rl.qlearning_dataset(MAZE, data=path)
    )


def test_a_taken_or_malformed_id_and_a_failure_leave_nothing(minari, hopper, monkeypatch, tmp_path):
    minari_io.write(HOPPER, hopper, "some/name-v0", "d4rl")
    with pytest.raises(d4rl.DatasetError, match="is there already.*--id"):
        minari_io.write(HOPPER, hopper, "some/name-v0", "d4rl")
    with pytest.raises(d4rl.DatasetError, match="Minari refuses 'na me-v0'"):
        minari_io.write(HOPPER, hopper, "na me-v0", "d4rl")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(minari.dataset.minari_storage.MinariStorage, "update_metadata", killed)
    with pytest.raises(KeyboardInterrupt):
        minari_io.write(HOPPER, hopper, "other/name-v0", "d4rl")
    assert sorted(x.name for x in (tmp_path / "minari").iterdir()) == ["some"]


# --- data sets of others ---


def test_its_own_environment_and_scores_are_used_and_named(minari, capsys):
    arrays = rollouts("Hopper-v5", [60, 60])
    create(minari, "v5/hopper-v0", arrays, env="Hopper-v5", ref_min_score=10.0, ref_max_score=110.0)
    d4rl.qlearning_dataset(HOPPER, data="minari:v5/hopper-v0")
    (line,) = capsys.readouterr().out.splitlines()
    for words in (
        "v5/hopper-v0",
        "NOT comparable",
        "environment Hopper-v5",
        "10 and 110 (its own)",
    ):
        assert words in line
    env = gymnasium.make(HOPPER)
    assert type(env.unwrapped).__module__.endswith("hopper_v5")
    assert (env.spec.id, env.spec.max_episode_steps) == (HOPPER, 1000)
    assert d4rl.get_normalized_score(HOPPER, 60.0) == 0.5
    # Its state is saved and restored like that of D4RL's.
    env.reset(seed=1)
    state = d4rl.get_env_state(env)
    goes_on = [env.step(np.full(3, 0.3))[0] for _ in range(20)]
    other = gymnasium.make(HOPPER)
    d4rl.set_env_state(other, state)
    np.testing.assert_array_equal([other.step(np.full(3, 0.3))[0] for _ in range(20)], goes_on)


def test_other_data_brings_d4rls_environment_back(minari, hopper, tmp_path):
    arrays = rollouts("Hopper-v5", [60])
    create(minari, "v5/hopper-v0", arrays, env="Hopper-v5", ref_min_score=10.0, ref_max_score=110.0)
    d4rl.qlearning_dataset(HOPPER, data="minari:v5/hopper-v0")
    d4rl.qlearning_dataset(HOPPER, data=write(tmp_path / "a.hdf5", hopper))
    assert isinstance(gymnasium.make(HOPPER).unwrapped, d4rl.envs.D4RLEnv)
    assert d4rl.get_normalized_score(HOPPER, 3234.3) == 1.0


def test_without_environment_and_scores_d4rls_are_used_and_named(minari, hopper, capsys):
    create(minari, "bare-v0", hopper, **spaces(hopper))
    d4rl.qlearning_dataset(HOPPER, data="minari:bare-v0")
    line = capsys.readouterr().out
    assert f"environment D4RL's {HOPPER}, as the data set names none" in line
    assert "-20.2723 and 3234.3 (D4RL's, as the data set has none)" in line
    assert isinstance(gymnasium.make(HOPPER).unwrapped, d4rl.envs.D4RLEnv)


def test_an_episode_whose_recording_stopped_ends_by_time_out(minari, hopper):
    hopper["timeouts"][:] = False
    starts, ends = report.episode_bounds(hopper)
    create(minari, "cut-v0", hopper, **spaces(hopper))
    arrays = d4rl.get_dataset(HOPPER, "minari:cut-v0")
    np.testing.assert_array_equal(np.flatnonzero(arrays["timeouts"]), [
        end - 1 for end in ends if not hopper["terminals"][end - 1]
    ])  # fmt: skip


def failing(minari, name, hopper):
    """Makes the data set `name` with a fault of this name."""
    of_hopper = spaces(hopper)
    if name == "dict-v0":
        observation_space = Dict({"observation": of_hopper["observation_space"]})
        storage = minari.dataset.minari_storage.MinariStorage
        path = minari.storage.datasets_root_dir.get_dataset_path(name) / "data"
        path.mkdir(parents=True)
        storage.new(path, observation_space, of_hopper["action_space"]).update_metadata(
            {"dataset_id": name, "minari_version": minari.__version__}
        )
    elif name == "walker-v0":
        arrays = rollouts("Walker2d-v5", [5])
        create(minari, name, arrays, env="Walker2d-v5")
    elif name == "short-v0":
        buffer = minari.data_collector.EpisodeBuffer(
            observations=hopper["observations"][:5],
            actions=hopper["actions"][:5],
            rewards=hopper["rewards"][:5],
            terminations=hopper["terminals"][:5],
            truncations=hopper["timeouts"][:5],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            minari.create_dataset_from_buffers(name, [buffer], **of_hopper)
    elif name in ("lost-v0", "no-mujoco-v0"):
        entry = "no_such_package:Env" if name == "lost-v0" else f"{__name__}:PlainEnv"
        gymnasium.register("Temporary-v0", f"{__name__}:PlainEnv")
        create(minari, name, hopper, env="Temporary-v0", **of_hopper)
        metadata = minari.storage.datasets_root_dir.get_dataset_path(name) / "data/metadata.json"
        metadata.write_text(metadata.read_text().replace(f"{__name__}:PlainEnv", entry))
        del gymnasium.registry["Temporary-v0"]


class PlainEnv(gymnasium.Env):
    """No simulator behind the spaces of hopper."""

    observation_space = Box(-np.inf, np.inf, (11,))
    action_space = Box(-1, 1, (3,))

    def reset(self, seed=None, options=None):
        return np.zeros(11, np.float32), {}


@pytest.mark.parametrize(
    ("dataset_id", "message"),
    [
        ("nowhere-v0", "Minari cannot load 'nowhere-v0'.*minari list remote"),
        ("malformed", "Minari cannot load 'malformed'"),
        ("dict-v0", "observations of Minari's dict-v0 are Dict, only vectors"),
        ("walker-v0", r"observations have shape \(.*17\), hopper-medium-v2 .* needs \(.*11\)"),
        ("short-v0", "episode 0 of Minari's short-v0 has 5 observations and 5 steps"),
        ("lost-v0", "Temporary-v0, cannot be made .*no_such_package"),
        ("no-mujoco-v0", "no-mujoco-v0, Temporary-v0, cannot be used: .* no MuJoCo environment"),
    ],
)
def test_a_data_set_that_does_not_serve_is_one_line(minari, hopper, capsys, dataset_id, message):
    failing(minari, dataset_id, hopper)
    capsys.readouterr()
    with pytest.raises(d4rl.DatasetError, match=message) as raised:
        d4rl.qlearning_dataset(HOPPER, data=f"minari:{dataset_id}")
    assert "\n" not in str(raised.value)
    with pytest.raises(SystemExit, match="error: "):
        main(["describe", HOPPER, "--data", f"minari:{dataset_id}"])
    assert isinstance(gymnasium.make(HOPPER).unwrapped, d4rl.envs.D4RLEnv)


def test_a_script_trains_on_a_data_set_of_minari_unchanged(minari, monkeypatch, tmp_path, capsys):
    import iql

    arrays = rollouts("Hopper-v5", [100] * 4)
    create(minari, "v5/hopper-v0", arrays, env="Hopper-v5", ref_min_score=0.0, ref_max_score=1.0)
    iql.main(
        f"""--env {HOPPER} --data minari:v5/hopper-v0 --wandb disabled --device cpu --hidden_dim 8
        --batch_size 16 --offline_iterations 20 --online_iterations 40 --eval_freq 20
        --initial_collection_steps 10 --n_episodes 1 --offline_eval_freq 20 --log_freq 20
        --checkpoint_freq 20""".split()
        + ["--runs_dir", str(tmp_path / "runs")]
    )
    assert "data: Minari's v5/hopper-v0, " in capsys.readouterr().out
    rows = (tmp_path / "runs" / "iql" / HOPPER / "seed_0" / "eval.csv").read_text().splitlines()
    header = rows[0].split(",")
    last = dict(zip(header, rows[-1].split(","), strict=True))
    # By the data set's own reference scores, 0 and 1.
    assert float(last["d4rl_normalized_score"]) == pytest.approx(100 * float(last["return_mean"]))
