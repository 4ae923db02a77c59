"""IQL: CORL's recorded updates, and the pieces that they do not cover."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import recorded

import iql

DATA = Path(__file__).parents[1] / "data"


def test_three_updates_equal_corl():
    file = dict(np.load(DATA / "iql_three_updates.npz"))
    config = iql.TrainConfig(
        env="hopper-medium-v2", device="cpu", hidden_dim=32, offline_iterations=1000, batch_size=64
    )
    agent = iql.ImplicitQLearning(11, 3, config)
    nets = {"qf": agent.qf, "q_target": agent.q_target, "vf": agent.vf, "actor": agent.actor}
    for name, net in nets.items():
        net.load_state_dict(recorded(file, f"init/{name}/"))
    for i in range(3):
        rows = recorded(file, f"batch{i}/")
        log_dict = agent.train(
            iql.TensorBatch(
                rows["observations"],
                rows["actions"],
                rows["rewards"].flatten(),
                rows["next_observations"],
                rows["dones"].flatten(),
            )
        )
        for loss in ("value_loss", "q_loss", "actor_loss"):
            expected = torch.as_tensor(file[f"log{i}/{loss}"]).float()
            torch.testing.assert_close(log_dict[loss], expected.reshape(()), rtol=1e-5, atol=1e-5)
        for name, net in nets.items():
            # The target moves by 0.005 of Adam's step of 3e-4 in the first update.
            atol = 3e-7 if name == "q_target" else 1e-5
            for key, expected in recorded(file, f"after{i}/{name}/").items():
                torch.testing.assert_close(net.state_dict()[key], expected, rtol=0, atol=atol)


def test_the_two_q_start_apart_and_the_target_as_their_copy():
    agent = iql.ImplicitQLearning(5, 2, iql.TrainConfig(env="hopper-medium-v2", device="cpu"))
    pairs = zip(agent.qf.q1.parameters(), agent.qf.q2.parameters(), strict=True)
    assert not any(torch.equal(*pair) for pair in pairs)
    pairs = zip(agent.qf.parameters(), agent.q_target.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_acting_is_the_policys_mean_or_a_draw_within_the_bounds():
    agent = iql.ImplicitQLearning(5, 2, iql.TrainConfig(env="hopper-medium-v2", device="cpu"))
    states = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    mean, _ = agent.actor(states)
    np.testing.assert_array_equal(agent.act(states.numpy(), deterministic=True), mean.detach())
    torch.manual_seed(1)
    drawn = agent.act(states.numpy())
    torch.manual_seed(1)
    np.testing.assert_array_equal(drawn, agent.actor.sample(states)[0][0].detach())
    assert drawn.shape == (200, 2) and np.abs(drawn).max() == 1


def test_a_full_buffer_is_an_error_and_no_row_is_lost_silently():
    buffer = iql.ReplayBuffer(2, 1, buffer_size=1)
    row = np.zeros(2), np.zeros(1), 0.0, np.zeros(2), False
    buffer.add_transition(*row)
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        buffer.add_transition(*row)
