"""DARE-C's loss, Eq. 14, row by row."""

import pytest
import torch
from test_cal_ql import N_OFFLINE, A, B, agent_of, batch_of, config_of, terms

import cal_ql
import dare_cql
from dare_cql import TensorBatch


def gradients_by_row(agent, batch, term):
    """Size of the gradient with respect to Q(s, a) of each row of the batch, [B]."""
    actions = batch.actions.clone().requires_grad_()
    states = batch.observations.clone().requires_grad_()
    loss = terms(agent, batch._replace(actions=actions, observations=states))[term]
    return sum(g.abs().sum(-1) for g in torch.autograd.grad(loss, [actions, states]))


@pytest.mark.parametrize("lagrange", [False, True])
def test_eq_14_has_r_on_offline_like_rows_and_td_on_all(lagrange):
    config = config_of(dare_cql, cql_lagrange=lagrange)
    agent, batch = agent_of(config, dare_cql, online=True), batch_of(B)
    of_td, of_r = (gradients_by_row(agent, batch, term) for term in (0, 1))
    assert (of_td > 0).all()
    assert (of_r[:N_OFFLINE] > 0).all() and (of_r[N_OFFLINE:] == 0).all()


@pytest.mark.parametrize("lagrange", [False, True])
def test_eq_14_divides_by_the_whole_batch(lagrange):
    """R of Eq. 14 is the sum of R over the offline-like rows over the size of the batch."""
    more = {"cql_lagrange": lagrange, "cql_target_action_gap": 0.8}
    agent, batch = agent_of(config_of(dare_cql, **more), dare_cql, online=True), batch_of(B)
    found = terms(agent, batch)
    alone = TensorBatch(*(x[:N_OFFLINE] for x in batch))
    q = agent.qf.both(alone.observations, alone.actions)
    torch.manual_seed(5)
    torch.randn(B, 1, A)  # the target's action comes first
    policy, next_policy = agent.actor(alone.observations), agent.actor(alone.next_observations)
    expected = agent.conservative_regularizer(alone, q, policy, next_policy)
    gap = 0.8 * lagrange  # taken off R of the offline-like rows alone
    torch.testing.assert_close(found[1], 10.0 * (expected - gap).sum() / B)
    baseline = terms(agent_of(config_of(**more), online=True), batch)
    torch.testing.assert_close(found[0], baseline[0])  # the TD term is Cal-QL's
    torch.testing.assert_close(found[2], baseline[2])
    assert found[1] < baseline[1]


@pytest.mark.parametrize("online_loss, online", [("none", True), ("td", False), ("none", False)])
def test_elsewhere_dare_c_is_cal_ql(online_loss, online):
    batch = batch_of(B, mc_returns=0.3)
    agents = [
        agent_of(config_of(dare_cql, online_loss=online_loss), dare_cql, online),
        agent_of(config_of(), cal_ql, online),
    ]
    for _ in range(2):
        logged = []
        for agent in agents:
            torch.manual_seed(2)
            logged.append(agent.train(batch))
        assert logged[0].keys() == logged[1].keys()
        assert all(torch.equal(logged[0][k], logged[1][k]) for k in logged[0])


def test_updates_leave_no_graph_behind():
    """A target that required a gradient would hold the graphs of all updates before it."""
    agent = agent_of(config_of(dare_cql), dare_cql, online=True)
    for _ in range(2):
        logged = agent.train(batch_of(B))
    kept = [*agent.q_target.parameters(), *logged.values()]
    assert not any(x.requires_grad or x.grad_fn for x in kept)
