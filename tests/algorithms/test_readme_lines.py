"""The programs in algorithms/README.md, as they stand there."""

import re
import sys
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
import torch.nn as nn
from tiny_runs import DATA, ENV, rows, run

import d4rl_gymnasium as d4rl
import iql

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "algorithms" / "README.md").read_text()


def execute(monkeypatch, mark, *args):
    """Run the program behind a mark in the README with other arguments; returns its variables."""
    program = re.search(f"<!-- {mark} -->\n```bash\n.*? <<'EOF'\n(.*?)\nEOF\n", README, re.S)[1]
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["-", *map(str, args)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    variables = {}
    exec(program, variables)
    return variables


@pytest.mark.parametrize("name, phase", [("offline.pt", "offline"), ("checkpoint.pt", "online")])
def test_an_agent_is_evaluated_as_in_its_run_and_filmed(
    monkeypatch, capsys, tmp_path, group, finished, name, phase
):
    """The pictures are made up here, since MuJoCo's need a process of their own (test_envs)."""
    make = gym.make

    def made(env_id, render_mode=None, **size):
        if render_mode is None:  # of an evaluation
            return make(env_id, **size)
        assert render_mode == "rgb_array" and size == {"width": 240, "height": 240}
        env = make(env_id)
        pictures = iter(range(10**6))
        env.render = lambda: np.full((24, 24, 3), next(pictures) % 256, np.uint8)
        return env

    monkeypatch.setattr(gym, "make", made)
    film = tmp_path / "episode.gif"
    variables = execute(monkeypatch, "film", finished / name, film)
    scores = [row["d4rl_normalized_score"] for row in rows(finished, "eval", phase)]
    assert f"score {float(scores[-1])}\n" in capsys.readouterr().out
    pictures = imageio.imread(film)
    assert len(pictures) == len(variables["frames"][::4]) > 1  # 125 a second are too many
    assert imageio.immeta(film)["duration"] == pytest.approx(32, abs=5)


class Corl(nn.Module):
    """Networks with the names and shapes of CORL's."""

    def __init__(self, *dims, last=None):
        super().__init__()
        layers = [
            x for a, b in zip(dims, dims[1:], strict=False) for x in (nn.Linear(a, b), nn.ReLU())
        ]
        self.net = nn.Sequential(*layers[:-1], last or nn.Identity())


def test_an_agent_of_corls_is_fine_tuned(monkeypatch, tmp_path):
    torch.manual_seed(0)
    q1, q2, v = Corl(14, 256, 256, 1), Corl(14, 256, 256, 1), Corl(11, 256, 256, 1)
    policy, log_std = Corl(11, 256, 256, 3, last=nn.Tanh()), torch.tensor([-0.1, -0.2, -0.3])
    state = {"qf": nn.ModuleDict({"q1": q1, "q2": q2}), "vf": nn.ModuleDict({"v": v})}
    state = {name: part.state_dict() for name, part in state.items()}
    state["actor"] = nn.ModuleDict({"net": policy}).state_dict() | {"log_std": log_std}
    schedule = {"base_lrs": [3e-4], "T_max": 1000, "last_epoch": 1000, "_step_count": 1001}
    state |= {"q_optimizer": torch.optim.Adam(q1.parameters()).state_dict()}
    torch.save(state | {"actor_lr_schedule": schedule, "total_it": 1000}, tmp_path / "corl.pt")

    execute(monkeypatch, "corl", tmp_path / "corl.pt", ENV, DATA, tmp_path / "offline.pt")
    settings = dict(load_model=str(tmp_path / "offline.pt"), normalize_reward=True, hidden_dim=256)
    agents, evaluate = [], iql.eval_actor
    monkeypatch.setattr(
        iql,
        "eval_actor",
        lambda envs, agent, *args: (agents.append(agent), evaluate(envs, agent, *args))[1],
    )
    run(iql, tmp_path, **settings, online_iterations=0, n_episodes=1)
    (agent,) = agents

    dataset = d4rl.qlearning_dataset(ENV, data=DATA)
    raw, action = (torch.from_numpy(dataset[k][:50]) for k in ("observations", "actions"))
    mean, std = dataset["observations"].mean(0), dataset["observations"].std(0) + 1e-3
    seen = (raw - torch.from_numpy(mean)) / torch.from_numpy(std)
    with torch.no_grad():
        q = [net.net(torch.cat([seen, action], 1))[:, 0] for net in (q1, q2)]
        close = dict(rtol=1e-4, atol=1e-5)
        for found, expected in zip(agent.qf.both(raw, action), q, strict=True):
            torch.testing.assert_close(found, expected, **close)
        torch.testing.assert_close(agent.q_target(raw, action), torch.min(*q), **close)
        torch.testing.assert_close(agent.vf(raw), v.net(seen)[:, 0], **close)
        torch.testing.assert_close(agent.actor(raw)[0], policy.net(seen), **close)
    assert torch.equal(agent.actor.log_std, log_std)
