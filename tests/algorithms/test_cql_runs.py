"""What runs of the CQL group have of their own: returns, statistics of the data, CQL itself."""

import numpy as np
import pytest
import torch
from tiny_runs import (
    DATA,
    ENV,
    GROUPS,
    assert_equal,
    checkpoint,
    config_of,
    directory,
    last_line,
    rows,
    run,
)

import cal_ql
import d4rl_gymnasium as d4rl
import dare_cql
import dare_iql

# The runs that all tests share, of this group alone
CQL_GROUP = pytest.mark.parametrize("group", GROUPS[1:], indirect=True, ids=["cal_ql"])


@CQL_GROUP
def test_monte_carlo_returns_of_the_online_buffer(finished):
    """An episode's returns are there once it has ended; those of the last one wait."""
    found = checkpoint(finished)["online_buffer"]["rows"]
    buffer = cal_ql.ReplayBuffer(11, 3, len(found))
    buffer.load_state_dict({"rows": found})
    batch = buffer.rows(slice(None))
    dataset = {k: x.numpy() for k, x in batch._asdict().items()}
    starts = d4rl.episode_starts(dataset | {"terminals": dataset["terminals"].astype(bool)})
    config = config_of(cal_ql, finished.parents[2])
    expected = torch.from_numpy(cal_ql.get_return_to_go(dataset, config)).float()
    ended = starts[-1] if not dataset["terminals"][-1] else len(found)
    assert len(starts) > 5 and 0 < ended < len(found)
    torch.testing.assert_close(batch.mc_returns[:ended], expected[:ended])
    assert (batch.mc_returns[ended:] == cal_ql.UNFINISHED).all()


def test_returns_of_both_buffers_are_those_of_their_rewards(monkeypatch, tmp_path):
    """Both buffers hold 10 r - 5; an episode that ends by time-out has its returns too."""
    raw, buffers, step = [], [], d4rl.ResumableEnv.step

    class Buffer(cal_ql.ReplayBuffer):
        def __init__(self, *args):
            super().__init__(*args)
            buffers.append(self)

    def watched(env, action):
        transition = step(env, action)
        raw.append(transition[1])
        return (*transition[:2], False, len(raw) == 8, {})

    monkeypatch.setattr(cal_ql, "ReplayBuffer", Buffer)
    monkeypatch.setattr(d4rl.ResumableEnv, "step", watched)
    sizes = dict(offline_iterations=1, online_iterations=12, initial_collection_steps=11)
    run(cal_ql, tmp_path, **sizes)
    offline, online = (buffer.rows(slice(None)) for buffer in buffers)
    dataset = d4rl.qlearning_dataset(ENV, data=DATA)
    rewards = 10 * dataset["rewards"] - 5
    np.testing.assert_allclose(offline.rewards, rewards, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(online.rewards, 10 * np.array(raw) - 5, rtol=1e-5, atol=1e-5)
    end = d4rl.episode_starts(dataset)[1]
    assert end > 5
    expected = (0.99 ** np.arange(end) * rewards[:end]).sum()
    np.testing.assert_allclose(offline.mc_returns[0], expected, rtol=1e-5)
    expected = (0.99 ** np.arange(8) * (10 * np.array(raw[:8]) - 5)).sum()
    np.testing.assert_allclose(online.mc_returns[0], expected, rtol=1e-5)
    assert online.mc_returns[7] == online.rewards[7]
    assert (online.mc_returns[8:] == cal_ql.UNFINISHED).all()


@CQL_GROUP
def test_the_agent_has_the_statistics_of_the_data(finished):
    observations = torch.from_numpy(d4rl.qlearning_dataset(ENV, data=DATA)["observations"])
    trainer = checkpoint(finished)["trainer"]
    for network in ("qf", "q_target", "actor"):
        mean, std = trainer[network]["mean"], trainer[network]["std"]
        torch.testing.assert_close(mean, observations.mean(0))
        torch.testing.assert_close(std, observations.std(0, correction=0) + 1e-3)


def test_cql_is_cal_ql_without_calibration(tmp_path):
    """Under a name of its own, since its settings are not those of a Cal-QL run."""
    sizes = dict(offline_iterations=40, online_iterations=0)
    run(cal_ql, tmp_path, **sizes)
    run(cal_ql, tmp_path, **sizes, calibrated=False, name="cql")
    paths = [directory(tmp_path, cal_ql, name) for name in ("cal_ql", "cql")]
    regularizers = [float(rows(path, "train")[0]["regularizer"]) for path in paths]
    # The returns are above Q at first: the calibrated regularizer is the larger one.
    assert regularizers[0] > regularizers[1]
    message = last_line(cal_ql, tmp_path, **sizes, calibrated=False)
    assert "was run with another calibrated (True):" in message


def test_both_groups_share_the_behavior_model(tmp_path, capsys):
    sizes = dict(offline_iterations=0, online_iterations=0)
    run(dare_iql, tmp_path, **sizes)
    assert "cache hit" not in capsys.readouterr().out
    run(dare_cql, tmp_path, **sizes)
    output = capsys.readouterr().out
    assert "cache hit: behavior from" in output and "cache hit: support-50 from" in output
    samplers = [checkpoint(directory(tmp_path, s))["sampler"] for s in (dare_iql, dare_cql)]
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 2
    assert_equal(samplers[0].keys(), samplers[1].keys())
