"""EDIS: energies against known ratios of densities, generated transitions, and where they go."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_runs import assert_equal, assert_same_end, checkpoint, directory, interrupt, last_line
from test_runs import one_thread, rows, run  # noqa: F401

import cal_ql
import d4rl_gymnasium as d4rl
import edis_cql
import edis_iql
import iql
from diffusion import alpha_sigma, perturb, solve

BOTH = [(iql, edis_iql, "ImplicitQLearning"), (cal_ql, edis_cql, "CalQL")]
IDS = ["edis_iql", "edis_cql"]
N_OFFLINE, N_ONLINE = 20_000, 4_000

pytestmark = pytest.mark.usefixtures("one_thread")


# --- A linear system: s, a = k s + c, r = s / 2 + a and s' = 0.8 s + b a, all with noise ---


class System:
    """Gaussian rows (s, a, r, s'): mean [4], and rows = mean + noise @ mixing.T."""

    def __init__(self, mean, std, k, c, std_a, b=0.5):
        s, action = torch.tensor([std, 0.0, 0.0, 0.0]), torch.tensor([k * std, std_a, 0.0, 0.0])
        reward, next_s = torch.tensor([0.0, 0.0, 0.1, 0.0]), torch.tensor([0.0, 0.0, 0.0, 0.1])
        self.mixing = torch.stack([s, action, s / 2 + action + reward, 0.8 * s + b * action + next_s])
        a = k * mean + c
        self.mean = torch.tensor([mean, a, mean / 2 + a, 0.8 * mean + b * a])

    def draw(self, n):
        """Rows [n, 4] and, for a terminal, s' > 1.5."""
        return self.mean + torch.randn(n, 4) @ self.mixing.T

    def log_density(self, model, x_t, t, n_columns):
        """Of the first columns of standardized rows, noised at t, [N]."""
        alpha, sigma = alpha_sigma(t)
        mean = alpha * (self.mean - model.mean[:4]) / model.std[:4]
        mixing = self.mixing / model.std[:4, None]
        covariance = alpha**2 * mixing @ mixing.T + sigma**2 * torch.eye(4)
        mean, covariance = mean[:n_columns], covariance[:n_columns, :n_columns]
        return torch.distributions.MultivariateNormal(mean, covariance).log_prob(x_t[:, :n_columns])


OFFLINE, ONLINE = System(0.0, 1.0, -0.3, 0.0, 0.3), System(1.0, 0.4, 0.0, 0.1, 0.2)
POLICY = System(1.0, 0.4, 0.2, 0.2, 0.2)  # at the online states
MODEL = System(0.1, 1.1, -0.2, 0.0, 0.4, b=0.3)


def policy(state, deterministic):
    """Actions [N, 1] of POLICY for states [N, 1]."""
    assert not deterministic
    return (0.2 * state + 0.2 + 0.2 * np.random.default_rng(5).standard_normal(state.shape)).astype(
        np.float32
    )


def with_terminals(columns, terminal):
    return torch.cat([columns, terminal(columns[:, 3:]).float()], 1)


def edis_of(terminal, **settings):
    """EDIS between an offline and an online buffer of the linear system."""
    cfg = edis_iql.Config(env="hopper-medium-v2", edis_freq=10, **settings)
    buffers = [edis_iql.ReplayBuffer(1, 1, n, "cpu") for n in (N_OFFLINE, N_ONLINE)]
    for buffer, system in zip(buffers, (OFFLINE, ONLINE), strict=True):
        buffer.load_state_dict({"rows": with_terminals(system.draw(len(buffer.rows)), terminal)})
    run = SimpleNamespace(stop=False, added=[], stop_on_nan=None)
    run.add = run.added.append
    return edis_iql.EDIS(cfg, run, SimpleNamespace(device="cpu", act=policy), *buffers)


def test_energies_are_the_log_ratios_of_the_noised_densities(monkeypatch):
    """Up to a constant at each t. The model is a Gaussian too, and terminals are constant."""
    torch.manual_seed(0)
    edis = edis_of(torch.zeros_like, energy_hidden=64, energy_batch_size=128)
    data = torch.cat([buffer.rows for buffer in edis.buffers])
    edis.model.set_statistics(data)
    of_model = with_terminals(MODEL.draw(20_000), torch.zeros_like)
    monkeypatch.setattr(edis, "generate", lambda n, _: edis.model.standardize(of_model))
    pairs = edis.contrasts(data, edis.model.standardize(data))
    edis.fit(edis.energies, edis.energy_losses, pairs, 1_500, 2e-3, decay=True)

    def log_density(system, x_t, t, n_columns=4):
        return system.log_density(edis.model, x_t, t, n_columns)

    def of_data(x_t, t):
        shares = torch.tensor([N_OFFLINE, N_ONLINE]).log() - math.log(N_OFFLINE + N_ONLINE)
        both = torch.stack([log_density(x, x_t, t) for x in (OFFLINE, ONLINE)], 1)
        return (shares + both).logsumexp(1)

    exact = {
        "state": lambda x, t: log_density(ONLINE, x, t) - of_data(x, t),
        "action": lambda x, t: log_density(POLICY, x, t, 2) - log_density(ONLINE, x, t, 2),
        "dynamics": lambda x, t: of_data(x, t) - log_density(MODEL, x, t),
    }
    for name, energy in edis.energies.items():
        for time in (1e-3, 0.1, 0.3, 0.6):
            t, positives = torch.tensor(time), edis_iql.draw(pairs[name][0], 4_000)
            x_t = perturb(positives, t, torch.randn_like(positives))
            wanted = exact[name](x_t, t)
            with torch.no_grad():
                error = energy(x_t, t) - wanted
            print(name, time, wanted.std().item(), error.std().item(), (error.std()/wanted.std()).item())
