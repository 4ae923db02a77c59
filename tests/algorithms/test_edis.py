"""EDIS: energies against known ratios of densities, generated transitions, and where they go."""

import csv
import math
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import assert_equal, checkpoint
from torch._dynamo.testing import CompileCounter

import cal_ql
import d4rl_gymnasium as d4rl
import edis_cql
import edis_iql
import iql
from diffusion import alpha_sigma, perturb, solve

SCRIPTS = [edis_iql, edis_cql]
NAMES = [script.__name__ for script in SCRIPTS]
EACH = pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
ENV = "hopper-medium-v2"
BASELINE = dict(
    env=ENV, data=str(DATA), wandb="disabled", device="cpu", hidden_dim=16, batch_size=32,
    offline_iterations=20, offline_eval_freq=1_000, online_iterations=130, n_episodes=1,
    initial_collection_steps=60, eval_freq=1_000, log_freq=25, checkpoint_freq=50,
)  # fmt: skip
SHORT = dict(
    edis_start=70, edis_freq=30, model_width=8, model_depth=2, model_iterations=20,
    model_batch_size=16, energy_hidden=8, energy_iterations=10, energy_batch_size=16,
    n_negatives=2, n_unguided=20, n_generated=40, n_denoising_steps=3,
)  # fmt: skip
TINY = dict(model_width=8, model_depth=1, model_iterations=5, energy_hidden=8, energy_iterations=5)
TINY |= dict(n_unguided=20, n_generated=10, n_denoising_steps=2)
N_OFFLINE, N_ONLINE = 20_000, 4_000
ENERGIES = ("state", "action", "dynamics")
NOISE = 0.1  # of r and s' in the system below


class System:
    """Rows (s, a, r, s'): a = k s + c, r = s / 2 + a and s' = 0.8 s + b a, all with noise."""

    def __init__(self, mean, std, k, c, std_a, b=0.5):
        s, action, r, next_s = torch.diag(torch.tensor([std, std_a, NOISE, NOISE]))
        action = action + k * s
        self.mixing = torch.stack([s, action, r + s / 2 + action, next_s + 0.8 * s + b * action])
        a = k * mean + c
        self.mean = torch.tensor([mean, a, mean / 2 + a, 0.8 * mean + b * a])

    def draw(self, n, terminal):
        """Rows [n, 5]; terminal is s' above that number."""
        x = self.mean + torch.randn(n, 4) @ self.mixing.T
        return torch.cat([x, (x[:, 3:] > terminal).float()], 1)

    def log_density(self, model, x_t, t, n_columns=4):
        """Of the first columns of standardized rows [N, W], noised at t; [N]."""
        alpha, sigma = alpha_sigma(t)
        mean = alpha * (self.mean - model.mean[:4]) / model.std[:4]
        mixing = alpha * self.mixing / model.std[:4, None]
        covariance = mixing @ mixing.T + sigma**2 * torch.eye(4)
        mean, covariance = mean[:n_columns], covariance[:n_columns, :n_columns]
        return torch.distributions.MultivariateNormal(mean, covariance).log_prob(x_t[:, :n_columns])


OFFLINE, ONLINE = System(0.0, 1.0, -0.3, 0.0, 0.3), System(1.0, 0.4, 0.0, 0.1, 0.2)
POLICY = System(1.0, 0.4, 0.2, 0.2, 0.2)  # acts at the online states
MODEL = System(0.1, 1.1, -0.2, 0.0, 0.4, b=0.3)  # has other states, actions and dynamics


class Policy:
    """Acts as POLICY does."""

    def act(self, state):
        """Actions [N, 1] at states [N, 1]."""
        noise = np.random.default_rng(5).standard_normal(state.shape)
        return (0.2 * state + 0.2 + 0.2 * noise).astype(np.float32)


def edis_of(script=edis_iql, terminal=math.inf, **settings):
    """EDIS with the policy, an offline and an online buffer of the linear system."""
    config = script.TrainConfig(env=ENV, device="cpu", **settings)
    buffers = [script.ReplayBuffer(1, 1, n) for n in (N_OFFLINE, N_ONLINE)]
    for buffer, system in zip(buffers, (OFFLINE, ONLINE), strict=True):
        buffer.load_state_dict({"rows": system.draw(len(buffer._data), terminal)})
    return script.EDIS(config, Policy(), 1, 1), buffers


def test_every_training_is_compiled(monkeypatch):
    """A training compiles its two updates; by torch's default the fifth one would go without."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    edis, buffers = edis_of(**TINY | {"model_iterations": 1, "energy_iterations": 1})
    edis.config.compile = True  # without a C++ compiler the configuration would refuse it
    compiled = []
    for _ in range(5):
        counter.clear()
        edis.fit(*buffers)
        compiled.append(counter.frame_count)
    assert min(compiled) >= 2


def rows_of(buffers):
    return torch.cat([buffer.state_dict()["rows"] for buffer in buffers])


# --- Energies ---


def test_the_contrastive_loss_is_that_of_a_hand_made_number(monkeypatch):
    def noised(x, *shape):
        assert shape == (len(x), 1)  # one t for a positive and its negatives
        return torch.full(shape, 0.5), None, x

    monkeypatch.setattr(edis_iql, "noised", noised)
    positives = torch.tensor([[2.0, 9.0], [0.0, 9.0]])
    negatives = torch.tensor([[[1.0, 9.0], [0.0, 9.0]], [[0.0, 9.0], [0.0, 9.0]]])

    def loss(negatives):
        return edis_iql.contrastive_loss(lambda x, t: x[..., 0], positives, negatives).item()

    of_first = math.log(1 + math.exp(-1) + math.exp(-2))
    assert loss(negatives) == pytest.approx((of_first + math.log(3)) / 2)
    negatives[0, 1, 0] = 2.0
    of_first = math.log(1 + math.exp(-1) + 1)
    assert loss(negatives) == pytest.approx((of_first + math.log(3)) / 2)


def test_times_and_noise_of_the_diffusion():
    torch.manual_seed(0)
    x = torch.randn(20_000, 3, 2)
    t, noise, x_t = edis_iql.noised(x, 20_000, 1)
    assert t.shape == (20_000, 1) and 1e-3 <= t.min() and t.max() <= 1
    assert (t < 0.25).float().mean().item() == pytest.approx(0.5, abs=0.015)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    alpha, sigma = alpha_sigma(t)
    torch.testing.assert_close(x_t, alpha[..., None] * x + sigma[..., None] * noise)


def test_energies_are_the_log_ratios_of_the_noised_densities(monkeypatch):
    """Up to a constant at each t. The model's rows are Gaussian too."""
    torch.manual_seed(0)
    edis, buffers = edis_of(energy_hidden=32, energy_batch_size=128)
    data, online = rows_of(buffers)[:, :4], buffers[1].state_dict()["rows"][:, :4]
    edis.model = model = edis_iql.TransitionModel(data, 8, 2)
    unguided = model.standardize(MODEL.draw(20_000, math.inf)[:, :4])
    monkeypatch.setattr(edis, "sample", lambda n, energies: unguided)
    minimise = edis.minimise

    def finely(title, losses, network, iterations, lr):
        minimise(title, losses, network, 1_000, 3e-3)
        return minimise(title, losses, network, 500, 5e-4)

    monkeypatch.setattr(edis, "minimise", finely)
    losses = edis.fit_energies(data, online)
    assert list(losses) == [f"{name}_loss" for name in ENERGIES]

    def log_density(system, x_t, t, n_columns=4):
        return system.log_density(model, x_t, t, n_columns)

    def of_data(x_t, t):
        shares = torch.tensor([N_OFFLINE, N_ONLINE]).log() - math.log(N_OFFLINE + N_ONLINE)
        both = torch.stack([log_density(system, x_t, t) for system in (OFFLINE, ONLINE)], 1)
        return (shares + both).logsumexp(1)

    exact = {
        "state": lambda x, t: log_density(ONLINE, x, t) - of_data(x, t),
        "action": lambda x, t: log_density(POLICY, x, t, 2) - log_density(ONLINE, x, t, 2),
        "dynamics": lambda x, t: of_data(x, t) - log_density(MODEL, x, t),
    }
    by_policy = online.clone()
    by_policy[:, 1:2] = torch.from_numpy(Policy().act(online[:, :1].numpy()))
    positives = {"state": online, "action": by_policy, "dynamics": data}
    for name, energy in edis.energies.items():
        for time in (1e-3, 0.03, 0.1, 0.3):
            t, x = torch.tensor(time), edis_iql.draw(model.standardize(positives[name]), 4_000)
            x_t = perturb(x, t, torch.randn_like(x))
            wanted = exact[name](x_t, t)
            with torch.no_grad():
                error, spread = (energy(x_t, t) - wanted).std().item(), wanted.std().item()
            limit = 0.1 + 0.3 * spread if time > 1e-3 else 0.7 * spread
            assert error < limit < spread, f"{name} at {time}: {error} of {spread}"


def test_an_energy_of_the_whole_row_guides_exactly_and_one_of_the_noised_state_does_not():
    """States (s, s') with s' = s, exact scores and energies; the mean is to move from 0 to 1."""

    def guided_mean(energy_gradient):
        def noise_prediction(x_t, t):
            alpha, sigma = alpha_sigma(t)
            # The covariance of x_t is alpha^2 [[1, 1], [1, 1]] + sigma^2 I.
            total = x_t.sum(1, keepdim=True) / (2 * alpha**2 + sigma**2)
            score = -(x_t - alpha**2 * total) / sigma**2
            return -sigma * (score + energy_gradient(alpha, sigma))

        noise = torch.randn(4_000, 1, dtype=torch.float64).expand(-1, 2)
        return solve(noise_prediction, noise, 128).mean().item()

    torch.manual_seed(0)
    both, first = torch.ones(2, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    # log N(x_t; alpha, ...) - log N(x_t; 0, ...), of which x_t has the coefficient
    of_row = guided_mean(lambda alpha, sigma: alpha / (2 * alpha**2 + sigma**2) * both)
    of_state = guided_mean(lambda alpha, sigma: alpha * first)
    assert of_row == pytest.approx(1, abs=0.05)
    assert 0.5 < of_state < 0.7


# --- The model's average ---


@pytest.mark.parametrize("ema", [0.0, 0.8, 0.995])
def test_rows_are_drawn_from_the_average_of_the_weights(ema):
    """Every ten updates, with the share of EDIS's code: a copy up to update 100, then slower."""
    torch.manual_seed(0)
    edis, _ = edis_of(model_ema=ema)
    network, weights = torch.nn.Linear(1, 1), []
    average = deepcopy(network).requires_grad_(False)

    def losses():
        weights.append(network.weight.item())
        return {"loss": -network.weight.sum()}

    edis.minimise("test", losses, network, 400, 0.1, average)
    weights = [*weights[1:], network.weight.item()]  # after each update
    expected = math.nan
    for i in range(0, 400, 10):
        age = max(0, i - 100)  # ema_pytorch: decay 1 - (1 + age)^(-2/3), at most ema
        decay = min(ema, 1 - 1 / (1 + age) ** (2 / 3))
        expected = decay * expected + (1 - decay) * weights[i] if decay else weights[i]
    assert average.weight.item() == pytest.approx(expected, abs=1e-4)
    assert (average.weight.item() == pytest.approx(weights[390], abs=1e-6)) == (ema == 0)


def test_a_training_starts_from_new_weights_and_samples_from_their_average(monkeypatch):
    torch.manual_seed(0)
    edis, buffers = edis_of(model_width=8, model_depth=1, model_iterations=101)
    rows, models = rows_of(buffers), []

    def watched(title, losses, network, *sizes, average):
        models.append((network, network.input.weight.clone()))
        return minimise(title, losses, network, *sizes, average=average)

    minimise = edis.minimise
    monkeypatch.setattr(edis, "minimise", watched)
    for _ in range(2):
        edis.fit_model(rows[:, :4], rows[:, 4:])
        network = models[-1][0]
        # At update 100 the average is a copy, the last update: all its weights are new.
        for found, wanted in zip(edis.model.parameters(), network.parameters(), strict=True):
            assert torch.equal(found, wanted) and not found.requires_grad
    (first, start), (second, restart) = models
    assert first is not second and not torch.equal(start, restart)


# --- Generated transitions ---


@pytest.fixture(scope="module")
def trained():
    """EDIS of a system with terminals s' > 1, after a training, and its data."""
    torch.manual_seed(0)
    sizes = {"model_width": 64, "model_depth": 3, "model_iterations": 2_500, "model_lr": 3e-3}
    sizes |= {"energy_hidden": 32, "energy_iterations": 600, "energy_lr": 2e-3}
    sizes |= {"n_denoising_steps": 32, "n_unguided": 4_000, "n_generated": 4_000}
    edis, buffers = edis_of(terminal=1.0, **sizes, energy_batch_size=128, model_ema=0.9)
    assert not edis.generated.size
    losses = edis.fit(*buffers)
    assert list(losses) == [f"{name}_loss" for name in ("model", "terminal", *ENERGIES)]
    return edis, rows_of(buffers)


def generated(edis, *names):
    """Transitions, 4,000 of them, under the energies of these names."""
    torch.manual_seed(1)
    x = edis.sample(4_000, [(edis.energies[name], 1.0) for name in names])
    return edis_iql.TensorBatch(*edis.model.restore(x)[:, range(5)].split(1, 1))


def residuals(batch, order=slice(None)):
    """Spread of r - s / 2 - a and of s' - 0.8 s - a / 2, which is the noise of the system."""
    reward = batch.rewards[order] - batch.observations / 2 - batch.actions
    next_s = batch.next_observations[order] - 0.8 * batch.observations - batch.actions / 2
    return reward.std().item(), next_s.std().item()


def moments(batch):
    return torch.stack([batch.observations.mean(), batch.observations.std()])


def test_generated_transitions_obey_the_dynamics(trained):
    for names in ([], ["state"], ENERGIES):
        batch = generated(trained[0], *names)
        assert all(NOISE / 1.5 < x < 1.5 * NOISE for x in residuals(batch)), names
        assert all(x > 3 * NOISE for x in residuals(batch, torch.randperm(4_000)))


def test_unguided_transitions_are_distributed_as_the_data(trained):
    edis, data = trained
    columns = torch.cat(generated(edis), 1)
    assert ((columns.mean(0) - data.mean(0)).abs() < 0.15 * data.std(0)).all()
    assert (columns[:, :4].std(0) / data.std(0)[:4] - 1).abs().max() < 0.1


def test_guidance_moves_states_and_actions_to_the_online_ones(trained):
    edis, _ = trained
    unguided, guided = generated(edis), generated(edis, *ENERGIES)
    target = torch.tensor([1.0, 0.4])
    before, after = (moments(x) - target for x in (unguided, guided))
    assert (after.abs() < before.abs() / 3).all(), (before, after)
    # The action's energy moves actions alone, from those of the data to the policy's 0.4.
    online = generated(edis, "state").actions.mean()
    assert abs(online - 0.1) < 0.08
    assert abs(guided.actions.mean() - 0.4) < abs(online - 0.4) / 2.5


def test_generated_rows_end_where_the_data_do(trained):
    batch = trained[0].generated.rows(slice(None))
    terminal = batch.next_observations[:, 0] > 1
    assert 0.1 < terminal.float().mean() < 0.5
    assert batch.terminals[terminal].mean() > 0.9 and batch.terminals[~terminal].mean() < 0.05
    assert (batch.terminals >= 0).all() and (batch.terminals <= 1).all()


def test_generated_rows_are_within_the_ranges_of_the_data(trained):
    edis, data = trained
    found = edis.generated.state_dict()["rows"]
    assert found.shape == (4_000, 5)
    assert (data.amin(0) <= found.amin(0)).all() and (found.amax(0) <= data.amax(0)).all()


def test_a_second_training_replaces_the_rows(trained):
    """The generated buffer stays the same tensor, which a CUDA graph may draw from."""
    torch.manual_seed(0)
    edis, buffers = edis_of(**TINY)
    edis.fit(*buffers)
    first, address = edis.generated.state_dict()["rows"], edis.generated._data.data_ptr()
    edis.fit(*buffers)
    second = edis.generated.state_dict()["rows"]
    assert first.shape == second.shape == (10, 5) and not torch.equal(first, second)
    assert edis.generated._data.data_ptr() == address


def test_a_constant_column_is_generated_as_it_is():
    rows = torch.cat([torch.randn(500, 3), torch.full((500, 1), 0.3), torch.zeros(500, 1)], 1)
    torch.manual_seed(0)
    model = edis_iql.TransitionModel(rows, 8, 2).requires_grad_(False)
    found = model.restore(edis_iql.sample_transitions(model, [], 50, 4))
    assert (found[:, 3:5] == rows[0, 3:]).all() and found.isfinite().all()
    torch.testing.assert_close(model.restore(model.standardize(rows))[:, :5], rows)


def test_the_scales_are_those_of_the_settings(monkeypatch):
    torch.manual_seed(0)
    scales = {"state_guidance": 0.5, "action_guidance": 0.0, "dynamics_guidance": 2.0}
    edis, buffers = edis_of(**scales, **TINY)
    calls, sample = [], edis.sample
    monkeypatch.setattr(edis, "sample", lambda n, energies: calls.append(energies) or sample(n, []))
    edis.fit(*buffers)
    assert calls[0] == []  # the negatives of the dynamics' energy
    assert [scale for _, scale in calls[1]] == [0.5, 0.0, 2.0]
    assert [energy for energy, _ in calls[1]] == [edis.energies[name] for name in ENERGIES]


def test_a_scale_of_0_leaves_an_energy_out(trained):
    model, energies = trained[0].model, [(x, 0.0) for x in trained[0].energies.values()]
    samples = []
    for guidance in ([], energies):
        torch.manual_seed(2)
        samples.append(edis_iql.sample_transitions(model, guidance, 100, 8))
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=0)


def test_a_scale_multiplies_the_gradient(trained):
    """A scale of 1/2 is halfway between no guidance and full guidance in the noise predicted."""
    (edis, _), predictions, noise = trained, [], torch.randn(50, 4)

    def first_prediction(noise_prediction, initial_noise, steps, bound):
        return noise_prediction(noise, torch.tensor(0.3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edis_iql, "solve", first_prediction)
        for scale in (0.0, 0.5, 1.0):
            guidance = [(edis.energies["state"], scale)]
            predictions.append(edis_iql.sample_transitions(edis.model, guidance, 50, 8))
    torch.testing.assert_close(predictions[0] + predictions[2], 2 * predictions[1])
    x_t = noise.clone().requires_grad_()
    energy = edis.energies["state"](x_t, torch.tensor(0.3)).sum()
    sigma = alpha_sigma(torch.tensor(0.3))[1]
    change = -sigma * torch.autograd.grad(energy, x_t)[0]
    torch.testing.assert_close(predictions[2] - predictions[0], change)


# --- Runs ---


def run(runs_dir, script, **more):
    """Directory of a tiny run; `more` overrides."""
    settings = BASELINE | (SHORT if script in SCRIPTS else {})
    if script in (cal_ql, edis_cql):
        settings |= dict(cql_n_actions=2, q_n_hidden_layers=1)
    script.train(script.TrainConfig(**settings | {"runs_dir": str(runs_dir)} | more))
    return Path(runs_dir, script.__name__, ENV, "seed_0")


@pytest.mark.parametrize("baseline, script", [(iql, edis_iql), (cal_ql, edis_cql)], ids=NAMES)
def test_without_a_training_the_run_is_its_baseline(tmp_path, capsys, baseline, script):
    """And says so, before it reads the data."""
    expected = checkpoint(run(tmp_path, baseline))
    capsys.readouterr()
    found = checkpoint(run(tmp_path, script, edis_start=1_000, **always_generated(script)))
    said = "no model is trained up to --edis_start: no update has generated rows\n"
    assert capsys.readouterr().out.startswith(said)
    for key in ("trainer", "rng", "online_buffer"):
        assert_equal(found[key], expected[key])


def always_generated(script):
    """Settings for generated rows in all updates after the first training, EDIS-C's only way."""
    return {"generated_updates": 0} if script is edis_iql else {}


def agent_of(script):
    return script.ImplicitQLearning if script is edis_iql else script.CalQL


def online_batches(monkeypatch, runs_dir, script, **more):
    """States [32, 11] and last columns [32] of every online batch, and the run's rows by source."""
    train, batches, made = agent_of(script).train, [], []

    def watched(self, batch):
        if self.online:
            batches.append((batch.observations.clone(), batch[-1].clone()))
        return train(self, batch)

    fit = script.EDIS.fit

    def watched_fit(self, *buffers):
        losses = fit(self, *buffers)
        made.append(self.generated.state_dict()["rows"][:, :11])
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(agent_of(script), "train", watched)
        patch.setattr(script.EDIS, "fit", watched_fit)
        path = run(runs_dir, script, **more)
    data = d4rl.qlearning_dataset(ENV, data=str(DATA))["observations"]
    online = checkpoint(path)["online_buffer"]["rows"][:, :11]
    sources = {"data": torch.from_numpy(data), "online": online}
    sources |= {f"made {i}": rows for i, rows in enumerate(made)}
    return batches, {name: [x.numpy().tobytes() for x in rows] for name, rows in sources.items()}


def counts(states, sources, *names):
    """How many of the states are from each of the sources; together they are all."""
    states = [x.numpy().tobytes() for x in states]
    found = [sum(x in set(sources[name]) for x in states) for name in names]
    assert sum(found) == len(states)
    return found


def test_by_default_20_updates_at_each_training_draw_generated_rows(monkeypatch, tmp_path):
    """As in EDIS's code: in place of the step's update. All other rows are drawn uniformly."""
    config = edis_iql.TrainConfig(env=ENV, device="cpu")
    assert (config.edis_start, config.edis_freq, config.generated_updates) == (10_000, 10_000, 20)
    batches, sources = online_batches(monkeypatch, tmp_path, edis_iql)
    # Steps 60 to 129 have updates; at 70 and 100 a model is trained.
    assert len(batches) == 70 - 2 + 2 * 20
    at_training = {10: "made 0", 10 + 20 + 29: "made 1"}
    of_step, number, online, expected, variance = 60, 0, 0, 0.0, 0.0
    n_data = len(sources["data"])
    while number < len(batches):
        n_updates = 20 if number in at_training else 1
        for states, _ in batches[number : number + n_updates]:
            if number in at_training:
                assert counts(states[:16], sources, at_training[number]) == [16]
                assert counts(states[16:], sources, "online") == [16]
            else:
                so_far = {**sources, "online": sources["online"][:of_step]}
                online += counts(states, so_far, "data", "online")[1]
                share = of_step / (n_data + of_step)
                expected, variance = expected + 32 * share, variance + 32 * share * (1 - share)
        number, of_step = number + n_updates, of_step + 1
    assert of_step == 130
    # Of 2,176 rows about 400 are online; half and half would be 1,088.
    assert abs(online - expected) < 5 * math.sqrt(variance) < 100


def test_every_real_row_is_drawn(monkeypatch, tmp_path):
    """Of data and online rows, in both halves of the batch, the first and the last row too."""
    more = dict(batch_size=512, initial_collection_steps=100, edis_start=1_000)
    batches, sources = online_batches(monkeypatch, tmp_path, edis_iql, **more)
    assert len(batches) == 30
    for half in (slice(256), slice(256, 512)):
        drawn = {x.numpy().tobytes() for states, _ in batches for x in states[half]}
        assert drawn >= set(sources["data"]) | set(sources["online"][:100])


@EACH
def test_generated_rows_in_all_updates_from_a_step_on(monkeypatch, tmp_path, script):
    """The offline half is of the data until the first training, then of the last model's rows."""
    batches, sources = online_batches(monkeypatch, tmp_path, script, **always_generated(script))
    assert len(batches) == 70
    for number, (states, last_column) in enumerate(batches):
        source = "data" if number < 10 else "made 0" if number < 40 else "made 1"
        assert counts(states[:16], sources, source) == [16]
        assert counts(states[16:], sources, "online") == [16]
        if script is edis_iql:  # terminals
            assert (last_column >= 0).all() and (last_column <= 1).all()
        else:  # Monte-Carlo returns, which generated rows have none of
            assert ((last_column[:16] == edis_cql.UNFINISHED) == (number >= 10)).all()


@EACH
def test_the_first_training_is_at_the_first_update_at_the_earliest(monkeypatch, tmp_path, script):
    assert edis_cql.TrainConfig(env=ENV, device="cpu").edis_start == 0  # EDIS-C's default
    more = {"edis_start": 0, **always_generated(script)}
    batches, sources = online_batches(monkeypatch, tmp_path, script, **more)
    assert len(batches) == 70 and {"made 0", "made 1", "made 2"} < set(sources)
    for number, (states, _) in enumerate(batches):
        assert counts(states[:16], sources, f"made {number // 30}") == [16]


@pytest.fixture(scope="module", params=SCRIPTS, ids=NAMES)
def finished(request, tmp_path_factory):
    """Script and directory of a run with trainings at steps 70 and 100."""
    return request.param, run(tmp_path_factory.mktemp("finished"), request.param)


def test_the_losses_of_a_training_have_a_row_of_their_own(finished):
    _, path = finished
    columns = [f"{name}_loss" for name in ("model", "terminal", *ENERGIES)]
    with open(path / "train.csv", newline="") as file:
        online = [row for row in csv.DictReader(file) if row["phase"] == "online"]
    trainings = [row for row in online if row["model_loss"]]
    assert [int(row["step"]) for row in trainings] == [70, 100]
    assert all(0 < float(row[name]) < 5 for row in trainings for name in columns)
    assert not any(row["q_loss"] for row in trainings)
    others = [row for row in online if row not in trainings]
    assert [int(row["step"]) for row in others] == [25, 50, 75, 100, 125, 130]
    assert not any(row[name] for row in others for name in columns)


@pytest.mark.parametrize("owner, name, at", [("agent", "train", 90), ("EDIS", "sample", 3)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    finished, tmp_path, monkeypatch, owner, name, at
):
    """At an update, and in the second training, which is done again."""
    script, expected = finished
    patched, calls = agent_of(script) if owner == "agent" else script.EDIS, []
    function = getattr(patched, name)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == at:
            raise KeyboardInterrupt
        return function(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(patched, name, interrupted)
        run(tmp_path, script)
    state = checkpoint(Path(tmp_path, script.__name__, ENV, "seed_0"))
    assert state["phase"] == "online" and state["step"] in (50, 100)
    found, expected = checkpoint(run(tmp_path, script)), checkpoint(expected)
    for key in ("trainer", "rng", "online_buffer", "generated", "step"):
        assert_equal(found[key], expected[key])


@pytest.mark.parametrize(
    "settings, named",
    [({"model_lr": 1e9}, "model_loss"), ({"energy_lr": 1e9}, "(state|action|dynamics)_loss")],
)
def test_a_training_that_breaks_ends_the_run(tmp_path, settings, named):
    message = f"{named} is not finite in a training of EDIS's model"
    with pytest.raises(FloatingPointError, match=message):
        run(tmp_path, edis_iql, **settings)
    state = checkpoint(Path(tmp_path, "edis_iql", ENV, "seed_0"))
    assert state["step"] == 50 and len(state["generated"]["rows"]) == 0
