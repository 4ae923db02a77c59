"""--precision: fp32 is exact, bf16 rounds the networks' products alone."""

import torch
from tiny_runs import AGENTS, SCRIPTS

S, A, B = 5, 2, 64


def agent_of(script, precision):
    sizes = dict(hidden_dim=32, batch_size=B, precision=precision)
    config = script.TrainConfig(env="hopper-medium-v2", device="cpu", **sizes)
    torch.manual_seed(0)
    agent = getattr(script, AGENTS[script])(S, A, config)
    agent.start_online()
    return agent


def batch_of(script):
    generator = torch.Generator().manual_seed(1)
    s, a, s2 = (torch.randn(B, k, generator=generator) for k in (S, A, S))
    columns = [s, a.tanh(), s[:, 0], s2, torch.zeros(B), torch.zeros(B)]
    return script.TensorBatch(*columns[: len(script.TensorBatch._fields)])


def updates(script, precision, n=3):
    """What is logged of the last of a few updates, and the agent."""
    agent, batch = agent_of(script, precision), batch_of(script)
    torch.manual_seed(2)
    update = script.accelerate(lambda: agent.train(batch), agent.config)
    return [update() for _ in range(n)][-1], agent


@SCRIPTS
def test_fp32_is_exact(script):
    found, _ = updates(script, "fp32")
    agent, batch = agent_of(script, "fp32"), batch_of(script)
    torch.manual_seed(2)
    expected = [agent.train(batch) for _ in range(3)][-1]
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@SCRIPTS
def test_bf16_rounds_products_and_keeps_losses_and_weights_in_fp32(script):
    found, agent = updates(script, "bf16")
    expected, _ = updates(script, "fp32")
    assert found.keys() == expected.keys()
    assert all(x.dtype == torch.float32 for x in found.values())
    parameters = [p for group in agent.optimizer.param_groups for p in group["params"]]
    assert all(p.dtype == torch.float32 for p in parameters)
    losses = [k for k in found if k.endswith("loss") or k == "regularizer"]
    for name in losses:
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=0.02)
    assert any(found[k] != expected[k] for k in losses)


@SCRIPTS
def test_outputs_of_networks_are_fp32(script):
    agent, batch = agent_of(script, "bf16"), batch_of(script)

    def compute():
        outputs = [agent.qf(batch.observations, batch.actions), *agent.actor(batch.observations)]
        return outputs, batch.observations @ batch.observations.T

    outputs, product = script.accelerate(compute, agent.config)()
    assert all(x.dtype == torch.float32 for x in outputs)
    assert product.dtype == torch.bfloat16
