"""Whole runs at tiny sizes: equal methods, files, interruption and resumption, cache, refusals."""

import csv
import gc
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock

import cal_ql
import d4rl_gymnasium as d4rl
import dare_cql
import dare_iql
import edis_cql
import edis_iql
import iql
import pex

DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
ENV = "hopper-medium-v2"
TRUNK = f"""--env {ENV} --wandb disabled --device cpu --hidden_dim 16 --batch_size 32
    --offline_iterations 200 --online_iterations 200 --initial_collection_steps 60 --n_episodes 2
    --eval_freq 100 --offline_eval_freq 100 --log_freq 25 --checkpoint_freq 50""".split()
TRUNK += ["--data", str(DATA)]
DARE = """--behavior_iterations 50 --behavior_batch_size 32 --behavior_width 8 --energy_hidden 8
    --energy_iterations 20 --energy_batch_size 16 --n_support 2 --n_support_states 50
    --diffusion_steps 2""".split()
EDIS = """--edis_freq 100 --model_width 8 --model_depth 2 --model_iterations 20
    --model_batch_size 16 --energy_hidden 8 --energy_iterations 10 --energy_batch_size 16
    --n_negatives 2 --n_unguided 20 --n_generated 40 --n_denoising_steps 3""".split()
# The Lagrange multiplier and the max-target backup are AntMaze's, the rewards nearly so.
CQL = """--cql_n_actions 4 --cql_lagrange true --cql_max_target_backup true --reward_scale 10
    --reward_bias -5""".split()
DARE_COLUMNS = """exchanged tau mu_offline mu_online sigma_offline sigma_online
    energy_loss""".split()


class Group(NamedTuple):
    """A baseline, DARE on it, and what differs between the groups."""

    baseline: ModuleType
    dare: ModuleType
    agent: str  # class of the agent
    networks: list  # its parts with weights
    columns: list  # of train.csv: losses and means that vary
    learning_rates: list  # online
    settings: list  # two settings other than the tiny run's, in the order of Config

    @property
    def method(self):
        """Kind of the cached offline agent."""
        return self.baseline.__name__


GROUPS = [
    Group(
        iql,
        dare_iql,
        "ImplicitQLearning",
        ["qf", "vf", "actor", "q_target"],
        ["value_loss", "q_loss", "actor_loss", "q", "v"],
        [3e-4] * 3,
        ["--beta", "5", "--sac_alpha", "0.1"],
    ),
    Group(
        cal_ql,
        dare_cql,
        "CalQL",
        ["qf", "actor", "q_target", "factors"],
        ["q_loss", "regularizer", "actor_loss", "q", "log_pi", "alpha", "alpha_prime"],
        [3e-4, 1e-4],
        ["--cql_temp", "0.5", "--max_exchange", "7"],
    ),
]


@pytest.fixture(scope="module", params=GROUPS, ids=lambda group: group.method)
def group(request):
    return request.param


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny networks are fastest on one thread, and sums are those of the child processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(runs_dir, script, *more):
    """Command line of a tiny run; `more` overrides."""
    of_dare = DARE if script in (dare_iql, dare_cql) else []
    of_edis = EDIS if script in (edis_iql, edis_cql) else []
    of_cql = CQL if script in (cal_ql, dare_cql, edis_cql) else []
    return [*TRUNK, *of_dare, *of_edis, *of_cql, "--runs_dir", str(runs_dir), *more]


def run(runs_dir, script, *more):
    """A script's main in this process, which afterwards has its signal handlers and locks back."""
    names = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(name) for name in names]
    try:
        script.main(arguments(runs_dir, script, *more))
    finally:
        for name, handler in zip(names, handlers, strict=True):
            signal.signal(name, handler)
    return directory(runs_dir, script)


def directory(runs_dir, script):
    return Path(runs_dir, script.__name__, ENV, "seed_0")


def last_line(runs_dir, script, *more):
    """The one line with which a run ends early."""
    try:
        run(runs_dir, script, *more)
    except SystemExit as stop:
        message = stop.code
    else:
        pytest.fail("the run came to its end")
    gc.collect()  # the run is gone as a process is, and its lock with it
    assert isinstance(message, str) and "\n" not in message
    return message


def checkpoint(path):
    return torch.load(path / "checkpoint.pt", weights_only=True)


def rows(path, name, phase=None):
    with open(path / f"{name}.csv", newline="") as file:
        return [r for r in csv.DictReader(file) if phase in (None, r["phase"])]


def rows_without_rates(path):
    return [{k: v for k, v in r.items() if k != "steps_per_second"} for r in rows(path, "train")]


def assert_equal(found, expected, where="checkpoint"):
    """Equal to the last bit, wherever in dictionaries and lists the tensors are."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert found == expected, where


def assert_same_end(path, expected):
    """Same final state: networks, optimizers, buffers, generators, environment; same scores."""
    found, wanted = checkpoint(path), checkpoint(expected)
    for state in (found, wanted):
        del state["csv_sizes"]  # rates have as many digits as they like
        # Gymnasium's generator of random actions: neither seeded nor drawn from.
        del state["env"]["env"]["action_space_np_random"]
    assert_equal(found, wanted)
    assert (path / "eval.csv").read_text() == (expected / "eval.csv").read_text()


@pytest.fixture(scope="module")
def finished(group, tmp_path_factory):
    """Directory of a DARE run that nothing interrupted, with a runs_dir and cache of its own."""
    return run(tmp_path_factory.mktemp("finished"), group.dare)


@pytest.fixture(scope="module")
def baseline(group, tmp_path_factory):
    """Directory of a finished run of the baseline, with a runs_dir and cache of its own."""
    return run(tmp_path_factory.mktemp("baseline"), group.baseline)


@pytest.fixture
def cached_runs(finished, tmp_path):
    """A runs_dir that holds the cache of `finished` and no run."""
    shutil.copytree(finished.parents[2] / "cache", tmp_path / "cache")
    return tmp_path


# --- Files of a run ---


def test_files_of_a_finished_run(finished):
    names = "config.yaml eval.csv train.csv checkpoint.pt curve.png summary.yaml lock"
    assert {p.name for p in finished.iterdir()} == set(names.split())
    cfg = yaml.safe_load((finished / "config.yaml").read_text())
    assert (cfg["hidden_dim"], cfg["guidance_scale"]) == (16, 8.0)
    assert (finished / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    state = checkpoint(finished)
    assert (state["phase"], state["step"]) == ("online", 200)
    assert state["agent"]["iterations"] == 200 + 140
    assert len(state["online_buffer"]["rows"]) == 200
    n_states, *shape = state["dare"]["online_actions"].shape
    assert 61 <= n_states <= 200 and shape == [2, 3]


def test_fine_tuning_uses_the_online_losses_and_a_constant_rate(group, finished, baseline):
    for path in (finished, baseline):
        agent = checkpoint(path)["agent"]
        assert agent["online"] is True
        rates = [g["lr"] for g in agent["optimizer"]["param_groups"]]
        assert rates == group.learning_rates


def test_eval_csv(finished):
    found = rows(finished, "eval")
    columns = "phase step return_mean return_std normalized_score success_rate"
    assert list(found[0]) == columns.split()
    steps = "offline 100, offline 200, online 0, online 100, online 200"
    assert ", ".join(f"{r['phase']} {r['step']}" for r in found) == steps
    for row in found:
        score = 100 * (float(row["return_mean"]) + 20.272305) / (3234.3 + 20.272305)  # D4RL's
        assert float(row["normalized_score"]) == pytest.approx(score)
        assert float(row["return_std"]) >= 0 and row["success_rate"] == ""
    # Fine-tuning starts from the offline agent, and evaluations are seeded.
    assert found[1]["return_mean"] == found[2]["return_mean"] != found[3]["return_mean"]


def test_train_csv(group, finished):
    assert {"steps_per_second", *group.columns, *DARE_COLUMNS} <= set(rows(finished, "train")[0])
    for phase in ("offline", "online"):
        found = rows(finished, "train", phase)
        assert [int(r["step"]) for r in found] == list(range(25, 201, 25))
        for row in found:
            updated = phase == "offline" or int(row["step"]) > 60
            assert float(row["steps_per_second"]) > 0
            assert all((row[k] != "") == updated for k in group.columns)
            assert all((row[k] != "") == (updated and phase == "online") for k in DARE_COLUMNS)
    exchanged = [float(r["exchanged"]) for r in found if r["exchanged"]]
    assert 0 <= min(exchanged) < max(exchanged) <= 16


@pytest.mark.parametrize("group", GROUPS[1:], indirect=True, ids=["cal_ql"])
def test_monte_carlo_returns_of_the_online_buffer(finished):
    """An episode's returns are there once it has ended, interrupted or not; the last one waits."""
    found = checkpoint(finished)["online_buffer"]["rows"]
    buffer = cal_ql.ReplayBuffer(11, 3, len(found), "cpu")
    buffer.load_state_dict({"rows": found})
    batch = buffer.batch(found)
    dataset = {k: x.numpy() for k, x in batch._asdict().items()}
    dataset["terminals"] = dataset["terminals"].astype(bool)
    starts = cal_ql.episode_starts(dataset)
    cfg = cal_ql.Config(env=ENV)
    expected = torch.from_numpy(cal_ql.monte_carlo_returns(dataset, cfg)).float()
    ended = starts[-1] if not dataset["terminals"][-1] else len(found)
    assert len(starts) > 5 and 0 < ended < len(found)
    torch.testing.assert_close(batch.mc_returns[:ended], expected[:ended])
    assert (batch.mc_returns[ended:] == cal_ql.UNFINISHED).all()


@pytest.mark.parametrize("group", GROUPS[1:], indirect=True, ids=["cal_ql"])
def test_agent_of_a_cql_run_has_the_statistics_of_the_data(finished):
    observations = torch.from_numpy(d4rl.qlearning_dataset(ENV, data=DATA)["observations"])
    agent = checkpoint(finished)["agent"]
    for network in ("qf", "q_target", "actor"):
        mean, std = (agent[network][f"standardize.{k}"] for k in ("mean", "std"))
        torch.testing.assert_close(mean, observations.mean(0))
        torch.testing.assert_close(std, observations.std(0, correction=0) + 1e-3)


def test_rewards_and_returns_of_both_buffers(monkeypatch, tmp_path):
    """Both buffers hold 10 r - 5, and the returns are made of these."""
    step, add, raw, added = cal_ql.TrainingEnv.step, cal_ql.ReplayBuffer.add, [], []

    def watched_step(self, action):
        transition = step(self, action)
        raw.append(transition[2])
        if len(raw) == 8:  # an episode that ends by time-out
            transition = (*transition[:4], False, True)
        return transition

    def watched_add(self, *columns):
        added.append(columns)
        add(self, *columns)

    monkeypatch.setattr(cal_ql.TrainingEnv, "step", watched_step)
    monkeypatch.setattr(cal_ql.ReplayBuffer, "add", watched_add)
    path = run(tmp_path, cal_ql, *"--offline_iterations 1 --online_iterations 12".split())
    (_, _, rewards, _, terminals, returns), *online = added
    dataset = d4rl.qlearning_dataset(ENV, data=DATA)
    np.testing.assert_allclose(rewards, 10 * dataset["rewards"] - 5, rtol=1e-6)
    np.testing.assert_allclose([row[2][0] for row in online], [10 * r - 5 for r in raw])
    end = int(np.flatnonzero(terminals)[0])
    gaps = (dataset["observations"][1:] != dataset["next_observations"][:-1]).any(1)
    first = min(end, int(np.flatnonzero(gaps)[0])) + 1  # length of the first episode
    discounts = 0.99 ** np.arange(first)
    assert first > 5
    np.testing.assert_allclose(returns[0], (discounts * rewards[:first]).sum(), rtol=1e-5)
    found = checkpoint(path)["online_buffer"]["rows"][:, -1]
    assert found[7].item() == pytest.approx(10 * raw[7] - 5)
    assert found[:8].isfinite().all() and (found[8:] == cal_ql.UNFINISHED).all()


def test_summary(finished):
    summary = yaml.safe_load((finished / "summary.yaml").read_text())
    scores = [float(r["normalized_score"]) for r in rows(finished, "eval", "online")]
    assert summary["offline_score"] == scores[0]
    assert summary["last_four_mean"] == pytest.approx(sum(scores[1:]) / 2)
    assert summary["best"] == max(scores)


def test_a_finished_run_is_not_started_again(group, finished):
    before = {p: p.read_bytes() for p in finished.iterdir()}
    message = last_line(finished.parents[2], group.dare)
    assert message.startswith(f"error: {finished} is finished")
    assert {p: p.read_bytes() for p in finished.iterdir()} == before


# --- The baseline and the cache ---


def test_dare_without_exchange_and_online_loss_is_its_baseline(group, baseline, tmp_path):
    path = run(tmp_path, group.dare, "--exchange", "none", "--online_loss", "none")
    assert_same_end(path, baseline)
    for found, expected in zip(rows(path, "train"), rows(baseline, "train"), strict=True):
        assert all(found[k] == expected[k] for k in ["phase", "step", *group.columns])


def test_the_methods_share_the_offline_agent(group, finished, baseline, cached_runs, capsys):
    path = run(cached_runs, group.baseline)
    assert f"cache hit: {group.method} from" in capsys.readouterr().out
    # From the cache the baseline goes the way that it goes alone, and where DARE started.
    assert_same_end(path, baseline)
    scores = [rows(p, "eval", "online")[0]["normalized_score"] for p in (path, finished)]
    assert scores[0] == scores[1]
    assert rows(path, "eval", "offline") == rows(finished, "eval", "offline")


def test_a_cache_hit_changes_no_result(group, finished, cached_runs, capsys):
    path = run(cached_runs, group.dare)
    output = capsys.readouterr().out
    for kind in (group.method, "behavior", "support"):
        assert f"cache hit: {kind} from" in output
    assert_same_end(path, finished)


@pytest.mark.parametrize("name", ["behavior_model", "offline_support"])
def test_behavior_seed_does_not_reach_the_draws_of_the_run(monkeypatch, group, cached_runs, name):
    function, states = getattr(group.dare, name), []

    def watched(*args):
        states.append(torch.get_rng_state())
        result = function(*args)
        states.append(torch.get_rng_state())
        return result

    monkeypatch.setattr(group.dare, name, watched)
    run(cached_runs, group.dare, "--online_iterations", "0", "--behavior_seed", "1")
    assert len(states) == 2 and torch.equal(*states)


def test_other_offline_settings_miss_the_cache(group, cached_runs, capsys):
    sizes = "--offline_iterations 40 --online_iterations 0 --utd 2".split()
    run(cached_runs, group.dare, *sizes)
    output = capsys.readouterr().out
    assert f"cache hit: {group.method}" not in output and "cache hit: behavior" in output
    assert len(list((cached_runs / "cache").glob(f"{group.method}-*.pt"))) == 2


def test_cql_has_an_offline_agent_of_its_own(tmp_path, capsys):
    """Under another name, since its settings are not those of a Cal-QL run."""
    sizes = "--offline_iterations 30 --online_iterations 70".split()
    settings = {"cal_ql": [], "cql": ["--calibrated", "false", "--name", "cql"]}
    for name, more in settings.items():
        run(tmp_path, cal_ql, *sizes, *more)
        assert (tmp_path / name / ENV / "seed_0" / "summary.yaml").exists()
    assert "cache hit" not in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("cal_ql-*.pt"))) == 2
    offline = [rows(tmp_path / name / ENV / "seed_0", "train", "offline") for name in settings]
    # The returns are above Q at first: the calibrated regularizer is the larger one.
    assert float(offline[0][0]["regularizer"]) > float(offline[1][0]["regularizer"])
    message = last_line(tmp_path, cal_ql, *sizes, "--calibrated", "false")
    assert message.startswith("error: ") and "is finished; take another --seed or --name" in message


def test_both_groups_share_the_behavior_model(tmp_path, capsys):
    sizes = "--offline_iterations 5 --online_iterations 0".split()
    run(tmp_path, dare_iql, *sizes)
    assert "cache hit" not in capsys.readouterr().out
    run(tmp_path, dare_cql, *sizes)
    output = capsys.readouterr().out
    assert "cache hit: behavior from" in output and "cache hit: cal_ql" not in output
    assert len(list((tmp_path / "cache").glob("behavior-*.pt"))) == 1


def test_direct_exchange_without_guidance_is_another_run(group, finished, cached_runs):
    online_loss = "expectile" if group.method == "iql" else "none"
    settings = f"""--exchange direct --guidance_scale 0 --online_loss {online_loss}
        --align softmax_kl --n_reference 3 --utd 2 --max_exchange 4 --online_iterations 100"""
    path = run(cached_runs, group.dare, *settings.split())
    assert checkpoint(path)["agent"]["iterations"] == 200 + 2 * 40
    row = rows(path, "train", "online")[-1]
    assert row["step"] == "100" and row["energy_loss"] == "" and float(row["exchanged"]) > 4
    (other,) = (r for r in rows(finished, "train", "online") if r["step"] == "100")
    assert all(row[k] != other[k] for k in [*group.columns, "tau"])


def test_resampled_reference_actions(group, finished, cached_runs, capsys):
    """No energy network, whose loss is not there; support actions of all states, also online."""
    path = run(cached_runs, group.dare, "--reference", "resample", "--checkpoint_freq", "150")
    state, last = checkpoint(path), rows(path, "train", "online")[-1]
    assert last["energy_loss"] == "" and float(last["exchanged"]) > 0 and float(last["tau"]) > 0
    assert state["dare"]["optimizer"]["state"] == {} and state["dare"]["n_spreads"] == 140
    assert len(state["dare"]["online_actions"]) > 60
    kinds = [x.name.split("-")[0] for x in (cached_runs / "cache").glob("support-*.pt")]
    assert len(kinds) == 2 and "cache hit: behavior" in capsys.readouterr().out
    assert last["tau"] != rows(finished, "train", "online")[-1]["tau"]


# --- Interruption ---

DYING_RUN = """
import os, signal, sys
sys.path.insert(0, {algorithms!r})
import torch
import {script} as script

torch.set_num_threads(1)
agent, update, save = script.{agent}, script.{agent}.update, torch.save

def dying_update(self, batch):
    if self.iterations == {updates}:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, batch)

def dying_save(state, path):
    save(state, path)
    if (state.get("phase"), state.get("step")) == ("online", {saved_step}):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

agent.update, torch.save = dying_update, dying_save
script.main({args!r})
"""


@pytest.mark.parametrize(
    "death, resumed",
    [
        ({"updates": 130, "saved_step": None}, "offline step 100"),
        ({"updates": 275, "saved_step": None}, "online step 100"),
        ({"updates": None, "saved_step": 150}, "online step 100"),  # half of a checkpoint written
    ],
    ids=["offline", "online", "writing a checkpoint"],
)
def test_a_killed_run_ends_as_if_it_had_not_been(group, finished, tmp_path, capsys, death, resumed):
    names = {"script": group.dare.__name__, "agent": group.agent}
    algorithms, args = str(Path(dare_iql.__file__).parent), arguments(tmp_path, group.dare)
    code = DYING_RUN.format(algorithms=algorithms, args=args, **names, **death)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == -signal.SIGKILL, child.stderr
    path = run(tmp_path, group.dare)
    assert f"from {resumed}\n" in capsys.readouterr().out
    assert_same_end(path, finished)
    assert rows_without_rates(path) == rows_without_rates(finished)


def interrupt(monkeypatch, owner, name, at):
    """Sends SIGINT to this process in the call number `at` of a method."""
    method, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.fixture
def interrupted(monkeypatch, group, cached_runs):
    """Directory of a run that Ctrl-C has ended at online step 130."""
    with monkeypatch.context() as patch:
        interrupt(patch, getattr(group.dare, group.agent), "update", 70)
        message = last_line(cached_runs, group.dare)
    path = directory(cached_runs, group.dare)
    assert "interrupted at online step 130" in message
    state = checkpoint(path)
    assert (state["phase"], state["step"], state["agent"]["iterations"]) == ("online", 130, 270)
    assert not (path / "summary.yaml").exists()
    return path


def test_after_ctrl_c_the_same_command_goes_on(group, interrupted, finished, capsys, monkeypatch):
    monkeypatch.chdir(interrupted.parents[2])  # the path may be spelt otherwise, or have moved
    run(".", group.dare)
    assert "from online step 130\n" in capsys.readouterr().out
    assert_same_end(interrupted, finished)
    steps = [[r["step"] for r in rows(p, "train", "online")] for p in (interrupted, finished)]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("phase", ["support", "energy"])
def test_ctrl_c_before_the_first_exchange(monkeypatch, group, finished, tmp_path, phase):
    with monkeypatch.context() as patch:
        if phase == "support":
            interrupt(patch, group.dare, "draw_support_actions", 1)
        else:
            interrupt(patch, group.dare.DARE, "energy_step", 5)
        message = last_line(tmp_path, group.dare)
    assert message.endswith(f"interrupted in the {phase} phase; the same command starts it afresh")
    path = run(tmp_path, group.dare)
    assert_same_end(path, finished)
    assert rows_without_rates(path) == rows_without_rates(finished)


def test_ctrl_c_during_an_evaluation_saves_the_step_that_it_names(monkeypatch, group, tmp_path):
    interrupt(monkeypatch, group.dare.Evaluator, "__call__", 1)
    often = "--checkpoint_freq 1000 --offline_eval_freq 30".split()
    message = last_line(tmp_path, group.dare, *often)
    state = checkpoint(directory(tmp_path, group.dare))
    assert f"interrupted at {state['phase']} step {state['step']};" in message


def test_an_unfinished_run_wants_its_own_settings_and_an_intact_checkpoint(group, interrupted):
    runs_dir, names = interrupted.parents[2], ["config.yaml", "train.csv", "eval.csv"]
    files = [interrupted / name for name in names]
    before = [p.read_bytes() for p in files]
    message = last_line(runs_dir, group.dare, *group.settings, "--utd", "1")
    assert message.startswith(f"error: {interrupted} has other settings of ")
    named = message.split("settings of ")[1].split(";")[0]
    assert {f"--{name}" for name in named.split(", ")} == set(group.settings[::2])

    with FileLock(interrupted / "lock"):
        assert last_line(runs_dir, group.dare).startswith("error: another process is training in")
    assert [p.read_bytes() for p in files] == before

    file = interrupted / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-5000])
    message = last_line(runs_dir, group.dare)
    assert message.startswith(f"error: cannot read {file}") and "delete it" in message
    assert [p.read_bytes() for p in files] == before


# --- Failures ---


@pytest.mark.parametrize(
    "settings, phase", [(["--qf_lr", "1e30"], "offline"), (["--energy_lr", "1e30"], "online")]
)
def test_a_loss_that_is_not_finite_ends_the_run(group, cached_runs, settings, phase):
    message = last_line(cached_runs, group.dare, *settings)
    path = directory(cached_runs, group.dare)
    assert message.startswith("error: ") and str(path / "checkpoint.pt") in message
    losses = group.columns[:3] if phase == "offline" else ["energy_loss"]
    assert message.split()[1] in losses and phase in message
    state = checkpoint(path)
    assert state["phase"] == phase
    for name in group.networks:
        assert all(torch.isfinite(x).all() for x in state["agent"][name].values())
    assert not (path / "summary.yaml").exists()


@pytest.mark.parametrize(
    "updates, phase, step", [(50, "offline", 0), (215, "online", 50), (240, "online", 50)]
)
def test_weights_that_break_with_finite_losses_are_not_saved(
    monkeypatch, group, cached_runs, updates, phase, step
):
    """As from a gradient that overflows: the loss before it is finite, and so is every mean."""
    agent_class = getattr(group.dare, group.agent)
    update = agent_class.update

    def breaking_update(agent, batch):
        metrics = update(agent, batch)
        if agent.iterations == updates:
            next(agent.actor.parameters()).data.fill_(math.nan)
        return metrics

    monkeypatch.setattr(agent_class, "update", breaking_update)
    if phase == "offline":
        shutil.rmtree(cached_runs / "cache")
    message = last_line(cached_runs, group.dare)
    assert message.startswith("error: ") and "not finite" in message and phase in message
    state = checkpoint(directory(cached_runs, group.dare))
    assert (state["phase"], state["step"]) == (phase, step)
    assert all(x.isfinite().all() for x in state["agent"]["actor"].values())


@pytest.mark.parametrize("script", [iql, dare_iql, cal_ql, dare_cql, pex, edis_iql, edis_cql])
def test_an_unknown_data_path_ends_in_one_line(tmp_path, script):
    file = tmp_path / "no_such_file.hdf5"
    message = last_line(tmp_path / "runs", script, "--data", str(file))
    assert message.startswith("error: ") and str(file) in message
    assert not (tmp_path / "runs").exists()


def test_no_compiler_ends_in_one_line(tmp_path, monkeypatch, group):
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = last_line(tmp_path, group.baseline, "--compile", "true")
    assert message.startswith("error: --compile needs a C++ compiler")
    assert not any(tmp_path.iterdir())
