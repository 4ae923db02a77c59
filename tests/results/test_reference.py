"""results/reference.py: what it measures of a policy, and a small run from end to end."""

import sys
from pathlib import Path

import pytest
import torch

import dare_iql
import reference
from d4rl_gymnasium.files import save
from lib.records import read_rows

DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"


def test_measures_of_known_actions():
    """Q is the sum of an action's components; the support actions are 0, 0.2, 0.4 and 0.6."""
    states = torch.zeros(5, 3)
    support = torch.tensor([0.0, 0.2, 0.4, 0.6])[None, :, None].expand(5, -1, 2)

    def q_function(states, actions):
        return actions.sum(-1)

    spread = torch.tensor([0.0, 0.4, 0.8, 1.2]).std().item()
    for action, gain, distance, at_bounds in [
        (0.4, 0.2 / spread, 0.0, 0.0),
        (1.0, 1.4 / spread, 0.4 * 2**0.5, 1.0),
    ]:
        found = reference.measure(
            lambda states, a=action: torch.full((5, 2), a),
            lambda states: support,
            states,
            q_function,
        )
        expected = {"q_gain": gain, "distance": distance, "at_bounds": at_bounds}
        assert found == pytest.approx(expected, abs=1e-6)


def test_a_row_for_each_policy(monkeypatch, tmp_path):
    sizes = dict(hidden_dim=8, n_hidden=1)
    config = dare_iql.TrainConfig(env="hopper-medium-v2", device="cpu", **sizes)
    agent = dare_iql.ImplicitQLearning(11, 3, config)
    save(tmp_path / "offline.pt", {"trainer": agent.state_dict()})
    settings = dict(data=DATA, device="cpu", runs_dir=tmp_path, n_episodes=2, n_support=2)
    settings |= dict(n_support_states=20, behavior_iterations=5, behavior_batch_size=8)
    settings |= dict(behavior_width=8, energy_hidden=8, energy_iterations=2, diffusion_steps=2)
    settings |= dict(energy_batch_size=8, guidance_scale=2, **sizes)
    flags = [x for key, value in settings.items() for x in (f"--{key}", str(value))]
    table = tmp_path / "table.csv"
    command = ["reference.py", str(tmp_path / "offline.pt"), "--csv", str(table), "--scales", "3"]
    monkeypatch.setattr(sys, "argv", [*command, "--env", "hopper-medium-v2", *flags])
    reference.main()
    reference.main()
    rows = read_rows(table)
    names = ["agent", "unguided", "guided 3", "resampled 2"]
    assert [row["policy"] for row in rows] == 2 * names
    assert rows[:4] == rows[4:]  # seeded
    assert {row["episodes"] for row in rows} == {2}
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    for path, flag, said in [
        (tmp_path / "foreign.csv", [], "foreign.csv has other columns"),
        (table, ["--hidden_dim", "9"], "offline.pt does not hold what this version reads there"),
    ]:
        command[3] = str(path)
        monkeypatch.setattr(sys, "argv", [*command, "--env", "hopper-medium-v2", *flags, *flag])
        with pytest.raises(SystemExit, match=said):
            reference.main()
    assert all(float(row["error"]) >= 0 and float(row["distance"]) >= 0 for row in rows)
