"""Whole runs at tiny sizes for the tests of the scripts, and how what they wrote is compared."""

import csv
import signal
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import cal_ql
import dare_cql
import dare_iql
import iql
import pex

DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
ENV = "hopper-medium-v2"
# Rows of train.csv and checkpoints fall on different steps, so that a checkpoint holds sums.
TRUNK = dict(
    env=ENV, data=str(DATA), wandb="disabled", device="cpu", hidden_dim=16, batch_size=32,
    offline_iterations=200, online_iterations=200, initial_collection_steps=60, n_episodes=2,
    eval_freq=100, offline_eval_freq=100, log_freq=40, checkpoint_freq=50,
)  # fmt: skip
DARE = dict(
    behavior_iterations=50, behavior_batch_size=32, behavior_width=8, energy_hidden=8,
    energy_iterations=20, energy_batch_size=16, n_support=2, n_support_states=50, diffusion_steps=2,
)  # fmt: skip
# The Lagrange multiplier and the max-target backup are AntMaze's, the rewards nearly so.
CQL = dict(
    cql_n_actions=4, cql_lagrange=True, cql_max_target_backup=True, reward_scale=10.0,
    reward_bias=-5.0,
)  # fmt: skip
# A tiny run's own settings of every script
SETTINGS = {iql: {}, dare_iql: DARE, pex: {}, cal_ql: CQL, dare_cql: CQL | DARE}
SCRIPTS = pytest.mark.parametrize("script", list(SETTINGS), ids=lambda script: script.__name__)
AGENTS = {script: "ImplicitQLearning" for script in (iql, dare_iql, pex)}
AGENTS |= {script: "CalQL" for script in (cal_ql, dare_cql)}


class Group(NamedTuple):
    """A baseline, DARE on it, and what differs between the groups."""

    baseline: ModuleType
    dare: ModuleType
    columns: list  # of train.csv: losses and means that vary
    learning_rates: list  # online
    online_loss: str  # another than the default
    edit: tuple  # a line of the baseline, one that makes a loss 0, that loss, what it trains

    @property
    def agent(self):
        """The class of the agent in DARE's script."""
        return getattr(self.dare, AGENTS[self.dare])


GROUPS = [
    Group(
        iql,
        dare_iql,
        ["value_loss", "q_loss", "actor_loss", "q", "v", "log_std"],
        [3e-4] * 3,
        "expectile",
        (
            "return (torch.abs(tau - (u < 0).float()) * u**2).mean()",
            "return 0.0 * u.mean()",
            "value_loss",
            "vf",
        ),
    ),
    Group(
        cal_ql,
        dare_cql,
        ["policy_loss", "log_pi", "alpha", "alpha_prime", "q_loss", "regularizer", "q"],
        [3e-4, 1e-4],
        "none",
        (
            'return (self.factors["log_alpha"].exp().detach() * log_pi - q).mean(), log_pi',
            "return 0.0 * log_pi.mean(), log_pi",
            "policy_loss",
            "actor",
        ),
    ),
]


def config_of(script, runs_dir, **settings):
    """Settings of a tiny run; those given override."""
    own = SETTINGS[script] | {"runs_dir": str(runs_dir)}
    return script.TrainConfig(**{**TRUNK, **own, **settings})


def directory(runs_dir, script, name=None):
    """Where a tiny run writes."""
    return Path(runs_dir, name or script.__name__, ENV, "seed_0")


def run(script, runs_dir, *, curve=False, **settings):
    """Train in this process and return the run's directory; the curve takes half of the time."""
    config = config_of(script, runs_dir, **settings)
    if curve:
        script.train(config)
    else:
        with mock.patch.object(script.Run, "plot"):
            script.train(config)
    return directory(runs_dir, script, config.name)


def last_line(script, runs_dir, **settings):
    """The one line with which main() ends early; parsing a command line would take a second."""
    config = config_of(script, runs_dir, **settings)
    with (
        mock.patch.object(script, "parse", lambda *_: config),
        mock.patch.object(script.Run, "plot"),
        pytest.raises(SystemExit) as stop,
    ):
        script.main([])
    message = stop.value.code
    assert isinstance(message, str) and message and "\n" not in message
    return message


def interrupt(monkeypatch, owner, name, at):
    """Make the call number `at` of a function as if Ctrl-C was pressed in it."""
    function, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(None)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)


def contents(path):
    """Bytes of the files of a directory, by name."""
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


def checkpoint(path):
    """What checkpoint.pt of a run's directory holds."""
    return torch.load(path / "checkpoint.pt", weights_only=True)


def rows(path, name, phase=None):
    """Rows of eval.csv or train.csv, of one phase or all."""
    with open(path / f"{name}.csv", newline="") as file:
        return [r for r in csv.DictReader(file) if phase in (None, r["phase"])]


def rows_without_rates(path, phase=None):
    """Rows of train.csv but for the steps per second, which no two runs share."""
    found = rows(path, "train", phase)
    return [{k: v for k, v in r.items() if k != "steps_per_second"} for r in found]


def recorded(file, prefix):
    """Tensors of a file of recorded numbers whose names begin with `prefix`, without it."""
    return {k[len(prefix) :]: torch.from_numpy(v) for k, v in file.items() if k.startswith(prefix)}


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


def assert_same_end(path, expected, settings=True):
    """Same final state: networks, optimizers, buffers, generators, environment; same rows."""
    found, wanted = checkpoint(path), checkpoint(expected)
    for state in (found, wanted):
        del state["wandb"]  # the run's id there
        for row in state["rows"]["train"]:
            del row["steps_per_second"]
        # Gymnasium's generator of random actions: neither seeded nor drawn from.
        del state["env"]["env"]["action_space_np_random"]
        for name in ["runs_dir"] if settings else list(state["settings"]):
            del state["settings"][name]
        if not settings:  # of another script
            del state["source"]
    assert_equal(found, wanted)
    assert (path / "eval.csv").read_bytes() == (expected / "eval.csv").read_bytes()
    assert rows_without_rates(path) == rows_without_rates(expected)
