"""What a run stores of its episodes, what it trains on, and that its seed decides both."""

import pytest
import torch
from tiny_runs import AGENTS, SCRIPTS, checkpoint, run

import d4rl_gymnasium as d4rl
import dare_cql
import dare_iql
from d4rl_gymnasium.files import load

NO_UPDATES = {"offline_iterations": 0, "online_iterations": 12, "initial_collection_steps": 11}


def filled(script, path):
    """The online buffer of a run's checkpoint."""
    rows = checkpoint(path)["online_buffer"]["rows"]
    buffer = script.ReplayBuffer(11, 3, len(rows))
    buffer.load_state_dict({"rows": rows})
    return buffer.rows(slice(None))


@SCRIPTS
def test_episodes_are_stored_as_they_happened(monkeypatch, tmp_path, script):
    """The first is cut, and its target goes on with V(s'); the second ends by a terminal."""
    step, reset, calls, actions = d4rl.ResumableEnv.step, d4rl.ResumableEnv.reset, [], []

    def ending(env, action):
        calls.append("step")
        actions.append(torch.from_numpy(action.copy()))
        n = calls.count("step")
        return *step(env, action)[:2], n == 10, n == 5, {}

    def watched(env, **kwargs):
        calls.append("reset")
        return reset(env, **kwargs)

    monkeypatch.setattr(d4rl.ResumableEnv, "step", ending)
    monkeypatch.setattr(d4rl.ResumableEnv, "reset", watched)
    rows = filled(script, run(script, tmp_path, **NO_UPDATES))
    episode = ["reset", *["step"] * 5]
    assert calls == [*episode, *episode, "reset", "step", "step"]
    assert rows.terminals.nonzero().flatten().tolist() == [9]
    assert torch.equal(rows.actions, torch.stack(actions))
    joined = (rows.next_observations[:-1] == rows.observations[1:]).all(1)
    assert (~joined).nonzero().flatten().tolist() == [4, 9]
    # The seed is the run's, not each episode's.
    assert len(rows.observations[[0, 5, 10]].unique(dim=0)) == 3


@SCRIPTS
def test_the_seed_decides_networks_draws_and_the_environment(tmp_path, script):
    paths = [run(script, tmp_path, **NO_UPDATES, seed=s).with_name(f"seed_{s}") for s in (0, 1)]
    first, other = map(checkpoint, paths)
    assert not torch.equal(first["rng"], other["rng"])
    assert not torch.equal(*(filled(script, path).observations[0] for path in paths))
    agents = [load(path / "offline.pt")["trainer"]["actor"] for path in paths]
    names = [name for name in agents[0] if name.endswith("weight")]
    assert names and not any(torch.equal(agents[0][k], agents[1][k]) for k in names)


@pytest.mark.parametrize("exchange", [{"exchange": "none"}, {"max_exchange": 0}], ids=str)
@SCRIPTS
def test_offline_rows_stand_first_and_have_their_share(monkeypatch, tmp_path, script, exchange):
    if script not in (dare_iql, dare_cql):
        exchange = {}
    agent, batches = getattr(script, AGENTS[script]), []
    train = agent.train

    def watched(trainer, batch):
        batches.append(batch.observations.clone())
        return train(trainer, batch)

    monkeypatch.setattr(agent, "train", watched)
    settings = NO_UPDATES | {"offline_iterations": 2, "online_iterations": 14}
    settings |= {"mixing_ratio": 0.25} | exchange
    online = filled(script, run(script, tmp_path, **settings)).observations
    n_online = [0, 0, 24, 24, 24]  # of 32 rows: two offline updates, three online
    for states, n in zip(batches, n_online, strict=True):
        is_online = (states[:, None] == online).all(-1).any(1)
        assert is_online.tolist() == [False] * (32 - n) + [True] * n
