"""EDIS: energies against known ratios of densities, generated transitions, and where they go."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_runs import (
    DATA,
    assert_equal,
    assert_same_end,
    checkpoint,
    directory,
    interrupt,
    last_line,
)
from test_runs import rows as csv_rows
from test_runs import run as run_script

import cal_ql
import d4rl_gymnasium as d4rl
import edis_cql
import edis_iql
import iql
from diffusion import alpha_sigma, perturb, solve

SCRIPTS = pytest.mark.parametrize("script", [edis_iql, edis_cql], ids=["edis_iql", "edis_cql"])
PAIRS = [(iql, edis_iql), (cal_ql, edis_cql)]
N_OFFLINE, N_ONLINE = 20_000, 4_000
SHORT = """--offline_iterations 20 --offline_eval_freq 20 --online_iterations 130 --eval_freq 100
    --edis_freq 50""".split()
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


def act(state, deterministic):
    """Actions [N, 1] of POLICY at states [N, 1]."""
    assert not deterministic
    noise = np.random.default_rng(5).standard_normal(state.shape)
    return (0.2 * state + 0.2 + 0.2 * noise).astype(np.float32)


def edis_of(script=edis_iql, terminal=math.inf, **settings):
    """EDIS between an offline and an online buffer of the linear system."""
    cfg = script.Config(env="hopper-medium-v2", edis_freq=10, **settings)
    buffers = [script.ReplayBuffer(1, 1, n, "cpu") for n in (N_OFFLINE, N_ONLINE)]
    for buffer, system in zip(buffers, (OFFLINE, ONLINE), strict=True):
        columns = system.draw(len(buffer.rows), terminal)
        buffer.load_state_dict({"rows": columns})
    added = []
    run = SimpleNamespace(stop=False, add=added.append, added=added, stop_on_nan=sys.exit)
    return script.EDIS(cfg, run, SimpleNamespace(device="cpu", act=act), *buffers)


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
    edis = edis_of(energy_hidden=32, energy_batch_size=128)
    data = torch.cat([buffer.rows[:, :4] for buffer in edis.buffers])
    edis.model.set_statistics(data)
    unguided = edis.model.standardize(MODEL.draw(20_000, math.inf)[:, :4])
    monkeypatch.setattr(edis, "generate", lambda n, energies: unguided)
    pairs = edis.contrasts(data, edis.model.standardize(data))
    edis.fit(edis.energies, edis.energy_losses, pairs, 1_500, 3e-3, decay=True)

    def log_density(system, x_t, t, n_columns=4):
        return system.log_density(edis.model, x_t, t, n_columns)

    def of_data(x_t, t):
        shares = torch.tensor([N_OFFLINE, N_ONLINE]).log() - math.log(N_OFFLINE + N_ONLINE)
        both = torch.stack([log_density(system, x_t, t) for system in (OFFLINE, ONLINE)], 1)
        return (shares + both).logsumexp(1)

    exact = {
        "state": lambda x, t: log_density(ONLINE, x, t) - of_data(x, t),
        "action": lambda x, t: log_density(POLICY, x, t, 2) - log_density(ONLINE, x, t, 2),
        "dynamics": lambda x, t: of_data(x, t) - log_density(MODEL, x, t),
    }
    for name, energy in edis.energies.items():
        for time in (1e-3, 0.03, 0.1, 0.3):
            t, positives = torch.tensor(time), edis_iql.draw(pairs[name][0], 4_000)
            x_t = perturb(positives, t, torch.randn_like(positives))
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


# --- Generated transitions ---


@pytest.fixture(scope="module")
def trained():
    """EDIS of a system with terminals s' > 1, after a training."""
    torch.manual_seed(0)
    sizes = {"model_width": 64, "model_depth": 3, "model_iterations": 2_500, "model_lr": 3e-3}
    sizes |= {"energy_hidden": 32, "energy_iterations": 600, "energy_lr": 2e-3}
    sizes |= {"n_denoising_steps": 32, "n_unguided": 4_000, "n_generated": 4_000}
    edis = edis_of(terminal=1.0, **sizes, energy_batch_size=128)
    assert edis(0) is edis(9) is edis.buffers[0] and not edis.run.added
    assert edis(10) is edis.generated
    return edis


def generated(edis, *names):
    """Transitions, 4,000 of them, under the energies of these names."""
    torch.manual_seed(1)
    x = edis.generate(4_000, [(edis.energies[name], 1.0) for name in names])
    with torch.no_grad():
        return edis.generated.batch(edis.model.restore(x))


def residuals(batch, order=slice(None)):
    """Spread of r - s / 2 - a and of s' - 0.8 s - a / 2, which is the noise of the system."""
    reward = batch.rewards[order] - batch.observations / 2 - batch.actions
    next_s = batch.next_observations[order] - 0.8 * batch.observations - batch.actions / 2
    return reward.std().item(), next_s.std().item()


def moments(batch):
    return torch.stack([batch.observations.mean(), batch.observations.std()])


def test_generated_transitions_obey_the_dynamics(trained):
    for names in ([], ["state"], edis_iql.ENERGIES):
        batch = generated(trained, *names)
        assert all(NOISE / 1.5 < x < 1.5 * NOISE for x in residuals(batch)), names
        assert all(x > 3 * NOISE for x in residuals(batch, torch.randperm(4_000)))


def test_unguided_transitions_are_distributed_as_the_data(trained):
    data = torch.cat([buffer.rows for buffer in trained.buffers])
    columns = torch.cat([x.view(4_000, -1) for x in generated(trained)], 1)
    assert ((columns.mean(0) - data.mean(0)).abs() < 0.15 * data.std(0)).all()
    assert (columns[:, :4].std(0) / data.std(0)[:4] - 1).abs().max() < 0.1


def test_guidance_moves_states_and_actions_to_the_online_ones(trained):
    unguided, guided = generated(trained), generated(trained, *edis_iql.ENERGIES)
    target = torch.tensor([1.0, 0.4])
    before, after = (moments(x) - target for x in (unguided, guided))
    assert (after.abs() < before.abs() / 3).all(), (before, after)
    # The action's energy moves actions alone, from those of the data to the policy's 0.4.
    online = generated(trained, "state").actions.mean()
    assert abs(online - 0.1) < 0.08
    assert abs(guided.actions.mean() - 0.4) < abs(online - 0.4) / 2.5


def test_generated_rows_end_where_the_data_do(trained):
    batch = trained.generated.batch(trained.generated.rows)
    terminal = batch.next_observations > 1
    assert 0.1 < terminal.float().mean() < 0.5
    assert batch.terminals[terminal].mean() > 0.9 and batch.terminals[~terminal].mean() < 0.05
    assert (batch.terminals >= 0).all() and (batch.terminals <= 1).all()


def test_generated_rows_are_within_the_ranges_of_the_data(trained):
    data = torch.cat([buffer.rows for buffer in trained.buffers])
    found = trained.generated.rows
    assert (data.amin(0) <= found.amin(0)).all() and (found.amax(0) <= data.amax(0)).all()


def test_a_constant_column_is_generated_as_it_is():
    rows = torch.cat([torch.randn(500, 3), torch.full((500, 1), 0.3), torch.zeros(500, 1)], 1)
    torch.manual_seed(0)
    model = edis_iql.TransitionModel(5, 8, 2).requires_grad_(False)
    model.set_statistics(rows)
    found = model.restore(edis_iql.sample_transitions(model, [], 50, 4))
    assert (found[:, 3:5] == rows[0, 3:]).all() and found.isfinite().all()
    torch.testing.assert_close(model.restore(model.standardize(rows))[:, :5], rows)


def test_a_scale_of_0_leaves_an_energy_out(trained):
    plain = edis_of(state_guidance=0.0, action_guidance=0.0, dynamics_guidance=0.0)
    assert not plain.scales and not plain.energies
    model, energies = trained.model, [(x, 0.0) for x in trained.energies.values()]
    samples = []
    for guidance in ([], energies):
        torch.manual_seed(2)
        samples.append(edis_iql.sample_transitions(model, guidance, 100, 8))
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=0)
    one = edis_of(state_guidance=0.5, action_guidance=0.0, dynamics_guidance=0.0)
    assert one.scales == {"state": 0.5} and list(one.energies) == ["state"]


def test_a_scale_multiplies_the_gradient(trained):
    """A scale of 1/2 is halfway between no guidance and full guidance in the noise predicted."""
    predictions, noise = [], torch.randn(50, 4)

    def first_prediction(noise_prediction, initial_noise, steps, bound):
        return noise_prediction(noise, torch.tensor(0.3))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edis_iql, "solve", first_prediction)
        for scale in (0.0, 0.5, 1.0):
            guidance = [(trained.energies["state"], scale)]
            predictions.append(edis_iql.sample_transitions(trained.model, guidance, 50, 8))
    torch.testing.assert_close(predictions[0] + predictions[2], 2 * predictions[1])
    x_t = noise.clone().requires_grad_()
    energy = trained.energies["state"](x_t, torch.tensor(0.3)).sum()
    sigma = alpha_sigma(torch.tensor(0.3))[1]
    change = -sigma * torch.autograd.grad(energy, x_t)[0]
    torch.testing.assert_close(predictions[2] - predictions[0], change)


# --- Runs ---


def run_short(runs_dir, script, *more):
    return run_script(runs_dir, script, *SHORT, *more)


@pytest.mark.parametrize("baseline, script", PAIRS, ids=["edis_iql", "edis_cql"])
def test_without_a_training_the_run_is_its_baseline(tmp_path, capsys, baseline, script):
    expected = run_script(tmp_path, baseline, *SHORT[:-2])
    found = run_short(tmp_path, script, "--edis_freq", "0")
    assert f"cache hit: {baseline.__name__} from" in capsys.readouterr().out
    assert_same_end(found, expected)
    # So is a run whose training is yet to come; its checkpoint has the untrained networks too.
    run_short(tmp_path, script, "--edis_freq", "1000", "--name", "late")
    late = checkpoint(next((tmp_path / "late").glob("*/seed_0")))
    for key in ("agent", "rng", "online_buffer"):
        assert_equal(late[key], checkpoint(expected)[key])


@SCRIPTS
def test_the_offline_half_of_a_batch(tmp_path, monkeypatch, script):
    """The data first, what the model generated from online step 90 on; the online half is real."""
    agent = script.ImplicitQLearning if script is edis_iql else script.CalQL
    update, batches = agent.update, []

    def watched(self, batch):
        if self.online:
            batches.append([x.clone().view(len(x), -1) for x in batch])
        return update(self, batch)

    monkeypatch.setattr(agent, "update", watched)
    state = checkpoint(run_short(tmp_path, script, "--edis_freq", "90"))
    made, online = state["edis"]["generated"]["rows"], state["online_buffer"]["rows"]
    dataset = d4rl.qlearning_dataset("hopper-medium-v2", data=DATA)
    sources = {"data": torch.from_numpy(dataset["observations"]), "made": made, "online": online}
    sources = {name: {row.numpy().tobytes() for row in x[:, :11]} for name, x in sources.items()}
    assert len(batches) == 70 and len(made) == 40
    for number, batch in enumerate(batches):
        states = [row.numpy().tobytes() for row in batch[0]]
        assert set(states[:16]) <= sources["data" if number < 30 else "made"]
        assert set(states[16:]) <= sources["online"]
    half = torch.cat(batches[-1], 1)[:16]
    assert all((made == row).all(1).any() for row in half)
    assert ((half[:, 26] >= 0) & (half[:, 26] <= 1)).all()  # terminals
    if script is edis_cql:
        assert (half[:, -1] == script.UNFINISHED).all()
        assert (torch.cat(batches[29], 1)[:16, -1] != script.UNFINISHED).all()


@pytest.fixture(scope="module", params=[edis_iql, edis_cql], ids=["edis_iql", "edis_cql"])
def finished(request, tmp_path_factory):
    """Script and directory of a run with trainings at steps 50 and 100."""
    return request.param, run_short(tmp_path_factory.mktemp("finished"), request.param)


def test_losses_are_logged_where_there_is_a_training(finished):
    script, path = finished
    columns = [f"{name}_loss" for name in ("model", "terminal", *edis_iql.ENERGIES)]
    found = {int(r["step"]): [r[k] for k in columns] for r in csv_rows(path, "train", "online")}
    for step in (25, 50, 75, 100, 125, 130):
        trained = step in (75, 125)
        assert all(0 < float(x) < 5 for x in found[step]) if trained else not any(found[step])


@pytest.mark.parametrize("owner, name, at", [("agent", "update", 70), ("EDIS", "heed_stop", 45)])
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    finished, tmp_path, monkeypatch, owner, name, at
):
    """At an update, and in the second training, which is done again."""
    script, expected = finished
    agent = "ImplicitQLearning" if script is edis_iql else "CalQL"
    with monkeypatch.context() as patch:
        interrupt(patch, getattr(script, agent if owner == "agent" else owner), name, at)
        message = last_line(tmp_path, script, *SHORT)
    step = checkpoint(directory(tmp_path, script))["step"]
    if owner == "agent":
        assert "interrupted at online step 110" in message and step == 110
    else:
        assert "interrupted in EDIS's training" in message and step == 100
    assert_same_end(run_short(tmp_path, script), expected)


@SCRIPTS
@pytest.mark.parametrize(
    "settings, named", [("--model_lr 1e30", "model_loss"), ("--energy_lr 1e30", "state_loss")]
)
def test_a_training_that_breaks_ends_the_run(tmp_path, script, settings, named):
    message = last_line(tmp_path, script, *SHORT, *settings.split())
    path = directory(tmp_path, script)
    assert message.startswith(f"error: {named} is not finite at online step 50; ")
    assert str(path / "checkpoint.pt") in message
    state = checkpoint(path)
    assert state["step"] == 50 and len(state["edis"]["generated"]["rows"]) == 0
