"""A run that was stopped ends as if it had not been, bit for bit, and so does one that goes on."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import (
    AGENTS,
    assert_equal,
    assert_same_end,
    checkpoint,
    config_of,
    directory,
    interrupt,
    rows,
    rows_without_rates,
    run,
)

import dare_iql
import diffusion.sampler
import diffusion.training
import iql

# --- Interruption ---

DYING_RUN = """
import os, signal, sys
sys.path.insert(0, {algorithms!r})
import {script} as script

agent, train, save = script.{agent}, script.{agent}.train, script.save
script.Run.plot = lambda run: None

def dying_train(trainer, batch):
    if trainer.total_it == {updates}:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(trainer, batch)

def dying_save(path, state):
    if (state.get("phase"), state.get("step")) == ("online", {saved_step}):
        path.with_name("checkpoint.pt.tmp").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, state)

agent.train, script.save = dying_train, dying_save
script.train(script.TrainConfig(**{settings!r}))
"""


def test_a_run_that_is_killed_three_times_ends_as_if_it_had_not_been(
    group, finished, tmp_path, capsys
):
    """While it trains offline and online, and while it writes a checkpoint."""
    names = {"script": group.dare.__name__, "agent": AGENTS[group.dare]}
    names["algorithms"] = str(Path(group.dare.__file__).parent)
    names["settings"] = asdict(config_of(group.dare, tmp_path))
    deaths = [(130, None, ""), (None, 150, "offline step 100"), (330, None, "online step 100")]
    for updates, saved_step, resumed in deaths:
        code = DYING_RUN.format(updates=updates, saved_step=saved_step, **names)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code]
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300
        )
        assert child.returncode == -signal.SIGKILL, child.stderr
        assert ("resuming" in child.stdout) == bool(resumed)
        assert f"at {resumed}\n" in child.stdout or not resumed
    path = run(group.dare, tmp_path)
    assert "at online step 150\n" in capsys.readouterr().out
    assert_same_end(path, finished)
    names = "config.yaml eval.csv train.csv checkpoint.pt offline.pt lock"
    assert {p.name for p in path.iterdir()} == set(names.split())


def test_a_run_that_is_interrupted_wherever_it_may_be_ends_as_if_it_had_not_been(
    monkeypatch, group, finished, tmp_path, capsys
):
    """Ctrl-C again and again; the next call goes on, although tracebacks hold the last one."""
    stops, script = [], group.dare
    monkeypatch.setattr(diffusion.training, "REPORT_EVERY", 10)
    monkeypatch.setattr(diffusion.training, "SAVE_SECONDS", 0.0)
    places = [  # where, at which call, and from where the call after it goes on
        (group.agent, "train", 130, "offline step 100"),
        (script, "eval_actor", 1, "offline step 150"),
        (diffusion.training, "behavior_loss", 25, "offline step 200"),
        (diffusion.sampler, "draw_support_actions", 1, "offline step 200"),
        (script.EnergyGuidedSampler, "fit_energy", 1, "online step 50"),
        (diffusion.sampler, "energy_loss", 5, "online step 50"),
        (script.EnergyGuidedSampler, "sample", 75, "online step 100"),
    ]
    for owner, name, at, resumed in places:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stop:
            interrupt(patch, owner, name, at)
            run(script, tmp_path)
        stops.append(stop)
        path = directory(tmp_path, script)
        # All else is written from the checkpoint.
        (path / "eval.csv").write_text("garbled")
        (path / "train.csv").unlink(missing_ok=True)
        state = checkpoint(path)
        assert f"{state['phase']} step {state['step']}" == resumed, name
    assert state["n_sums"] == 20 and state["sums"].keys() >= set(group.columns)
    capsys.readouterr()
    path = run(script, tmp_path)
    assert f"at {resumed}\n" in capsys.readouterr().out
    assert_same_end(path, finished)


def test_going_on_with_an_edited_script_is_said(monkeypatch, tmp_path, capsys):
    run(iql, tmp_path, offline_iterations=50, online_iterations=0)
    run(iql, tmp_path, offline_iterations=50, online_iterations=70)
    assert "at online step 0\n" in capsys.readouterr().out
    monkeypatch.setattr(iql, "digest", lambda path: "of another text")
    run(iql, tmp_path, offline_iterations=50, online_iterations=80)
    assert "at online step 70, with an edited script\n" in capsys.readouterr().out


def test_a_run_that_is_stopped_after_its_first_evaluation_does_not_evaluate_again(
    monkeypatch, group, baseline, tmp_path, capsys
):
    script, load_model = group.baseline, str(baseline / "offline.pt")
    evaluated, eval_actor, act = [], script.eval_actor, getattr(script, AGENTS[script]).act

    def counted(envs, trainer, *args):
        evaluated.append(trainer.total_it.item())
        return eval_actor(envs, trainer, *args)

    def stopping(trainer, state, deterministic=False):
        if not deterministic:
            raise KeyboardInterrupt
        return act(trainer, state, deterministic)

    monkeypatch.setattr(script, "eval_actor", counted)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(getattr(script, AGENTS[script]), "act", stopping)
        run(script, tmp_path, load_model=load_model)
    assert evaluated == [200]
    path = run(script, tmp_path, load_model=load_model)
    assert f"agent: {load_model}, seed 0, 200 updates\n" in capsys.readouterr().out
    assert evaluated == [200, 240, 340]
    # Started from an offline agent: the phase before is not there, and all else is as if it was.
    assert rows(path, "eval") == rows(baseline, "eval", "online")
    assert rows_without_rates(path) == rows_without_rates(baseline, "online")


def test_checkpoints_also_come_by_the_clock(monkeypatch, group, tmp_path):
    """Ten minutes after the last one, whatever the settings say."""
    saved, save = [], group.baseline.save
    monkeypatch.setattr(
        group.baseline, "save", lambda path, x: (saved.append(x.get("step")), save(path, x))
    )
    clock = iter(range(0, 10**9, 70))
    monkeypatch.setattr(group.baseline.time, "perf_counter", lambda: next(clock))
    sizes = dict(offline_iterations=20, online_iterations=0, checkpoint_freq=1000)
    run(group.baseline, tmp_path, **sizes, log_freq=1000)
    steps = saved[:-2]  # then come offline.pt and online step 0
    assert steps[-1] == 20 and 3 <= len(steps) <= 7
    # The clock is looked at twice a step.
    assert all(3 <= b - a <= 6 for a, b in zip(steps[:-2], steps[1:-1], strict=True))


# --- Going on beyond the end, and from an offline agent ---


def test_a_finished_run_goes_on_when_it_gets_more_steps(group, finished, cached_runs, capsys):
    """And ends like one that had them from the start."""
    path = run(group.dare, cached_runs, online_iterations=120)
    assert checkpoint(path)["step"] == 120
    run(group.dare, cached_runs)
    assert "at online step 120\n" in capsys.readouterr().out
    assert_same_end(path, finished)


def test_learning_rates_are_those_of_the_settings_not_of_the_agent(group, baseline, tmp_path):
    for script in (group.baseline, group.dare):
        rate = "policy_lr" if hasattr(script, "CalQL") else "actor_lr"
        settings = {"load_model": str(baseline / "offline.pt"), "qf_lr": 0.002, rate: 0.003}
        if script is group.dare:
            settings["exchange"] = "none"
        path = run(script, tmp_path, **settings, online_iterations=120)
        groups = checkpoint(path)["trainer"]["optimizer"]["param_groups"]
        rates = [float(x["lr"]) for x in (groups[0], groups[-1])]
        assert rates == pytest.approx([0.002, 0.003])


def test_fine_tuning_from_offline_pt_equals_the_uninterrupted_run(
    group, finished, baseline, cached_runs
):
    """Also from the baseline's, which is the same agent, and by a path that moves."""
    file = cached_runs / "agent.pt"
    shutil.copy(baseline / "offline.pt", file)
    path = run(group.dare, cached_runs, load_model=str(file))
    found, expected = checkpoint(path), checkpoint(finished)
    for state in (found, expected):
        del state["env"]["env"]["action_space_np_random"]
    for part in ("trainer", "online_buffer", "env", "sampler", "rng"):
        assert_equal(found[part], expected[part], part)
    assert rows(path, "eval") == rows(finished, "eval", "online")
    assert rows_without_rates(path) == rows_without_rates(finished, "online")


# --- Graphics cards ---


@pytest.fixture
def one_gpu(monkeypatch):
    """A machine on which the random state of one card can be had; the state that it got."""
    states = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.arange(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", states.append)
    return states


def started(config):
    """A run that has read its checkpoint."""
    found = iql.Run(config)
    found.start()
    return found


def test_a_checkpoint_holds_the_random_state_of_one_gpu(one_gpu, tmp_path):
    """So that it can be gone on with where fewer are to be seen."""
    config = config_of(iql, tmp_path)
    config.device = "cuda"
    optimizer = torch.optim.Adam([torch.zeros(2)])
    parts = {"trainer": SimpleNamespace(optimizer=optimizer, state_dict=dict)}
    started(config).save("offline", 5, parts)
    resumed = started(config)
    assert resumed.restore("offline", {}) == 5
    (state,) = one_gpu
    assert torch.equal(state, torch.arange(16, dtype=torch.uint8))


def test_a_checkpoint_of_a_gpu_is_gone_on_with_on_a_cpu_and_back(one_gpu, tmp_path):
    optimizer = torch.optim.Adam([torch.zeros(2)])
    parts = {"trainer": SimpleNamespace(optimizer=optimizer, state_dict=dict)}
    for step, (saving, resuming) in enumerate([("cuda", "cpu"), ("cpu", "cuda")]):
        config = config_of(iql, tmp_path)
        config.device = saving
        started(config).save("offline", step, parts)
        config.device = resuming
        assert started(config).restore("offline", {}) == step
    assert one_gpu == []


def test_sums_of_a_checkpoint_go_to_the_device(tmp_path):
    """Stood for by the meta device, which refuses to be mixed with the CPU as well."""
    config = config_of(dare_iql, tmp_path)
    optimizer = torch.optim.Adam([torch.zeros(2)])
    parts = {"trainer": SimpleNamespace(optimizer=optimizer, state_dict=dict)}
    first = dare_iql.Run(config)
    first.start()
    first.add({"q_loss": torch.tensor(2.0)})
    first.save("offline", 5, parts)
    config.device = "meta"
    resumed = dare_iql.Run(config)
    resumed.start()
    resumed.add({"q_loss": torch.tensor(2.0, device="meta")})
    assert resumed.n_sums == 2 and resumed.sums["q_loss"].is_meta
