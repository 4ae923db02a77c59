"""The solver and the guided sampler against exact answers, and the sampler's contract."""

import pytest
import torch
from gaussian_mixtures import MIXTURES, Mixture, energy_distance_ratio, spread_normal

from diffusion import (
    BehaviorModel,
    EnergyModel,
    alpha_sigma,
    draw_support_actions,
    perturb,
    sample_actions,
    solve,
)

POINTS = 2**14
# Energy distance to exact samples, in units of that between two exact sets of 20,000.
LIMIT = 1.5
SLOPE = torch.tensor([3.0, -2.0], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def dimension(mixture):
    return mixture.means.shape[1]


def path_error(mixture, steps, fine):
    noise = spread_normal(len(fine), dimension(mixture))
    return (solve(mixture.noise, noise, steps) - fine).norm(dim=1).mean().item()


class ExactBehavior:
    """Stands for a BehaviorModel that has learned a mixture perfectly, whatever the state."""

    def __init__(self, mixture):
        self.mixture, self.action_dim = mixture, dimension(mixture)

    def embed_states(self, states):
        return states

    def predict(self, actions_t, embedded_states, t):
        return self.mixture.noise(actions_t, t)


class ExactEnergy:
    """Stands for an EnergyModel with f = E_t / scale for the energy slope . a_0."""

    def __init__(self, mixture, slope, scale):
        self.mixture, self.slope, self.scale = mixture, slope, scale

    def embed_states(self, states):
        return states

    def predict(self, actions_t, embedded_states, t):
        return self.mixture.energy(actions_t, t, self.slope) / self.scale

    def gradient(self, actions_t, embedded_states, t):
        with torch.enable_grad():
            actions_t = actions_t.detach().requires_grad_()
            total = self.predict(actions_t, embedded_states, t).sum()
            return torch.autograd.grad(total, actions_t)[0]


# --- The process and the helpers' closed forms ---


def test_process_matches_the_stochastic_differential_equation():
    t = torch.linspace(1e-3, 1, 2001, dtype=torch.float64)
    alpha, sigma = alpha_sigma(t)
    rate = torch.gradient(alpha.log(), spacing=(t,))[0]
    torch.testing.assert_close(rate[5:-5], -0.5 * (0.1 + 19.9 * t[5:-5]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    actions, noise = spread_normal(2001, 3), spread_normal(2001, 3, seed=1)
    torch.testing.assert_close(
        perturb(actions, t, noise), alpha[:, None] * actions + sigma[:, None] * noise
    )


@pytest.mark.parametrize("name", MIXTURES)
def test_exact_score_and_energy_agree(name):
    mixture = MIXTURES[name]
    slope = SLOPE[: dimension(mixture)]
    x = spread_normal(512, len(slope)).requires_grad_()
    for t in (0.01, 0.1, 0.5):
        gradient = torch.autograd.grad(mixture.energy(x, t, slope).sum(), x)[0]
        _, sigma = alpha_sigma(torch.tensor(t, dtype=torch.float64))
        difference = (mixture.noise(x, t) - mixture.tilted(slope).noise(x, t)) / sigma
        torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-8)


def test_energy_distance_ratio_is_that_of_random_sets():
    mixture, size = MIXTURES["1d"], 2000
    generator = torch.Generator().manual_seed(0)
    shifted = Mixture(mixture.weights, mixture.means + 0.05, mixture.stds)

    def mean_distance(other):
        total = 0.0
        for _ in range(200):
            x, y = other.sample(size, generator)[:, 0], mixture.sample(size, generator)[:, 0]
            grid = torch.cat([x, y]).sort().values
            difference = sum(
                sign * torch.searchsorted(z.sort().values, grid[:-1], right=True)
                for z, sign in ((x, 1), (y, -1))
            )
            total += (2 * (difference / size) ** 2 * grid.diff()).sum().item() / 200
        return total

    exact = mixture.spread_sample(POINTS)
    ratio = energy_distance_ratio(shifted.spread_sample(POINTS, seed=2), exact, size)
    assert mean_distance(shifted) / mean_distance(mixture) == pytest.approx(ratio, rel=0.25)
    assert energy_distance_ratio(mixture.spread_sample(POINTS, seed=2), exact) < 1.05


# --- The solver ---


@pytest.mark.parametrize("name", MIXTURES)
def test_fifteen_steps_sample_the_exact_distribution(name):
    mixture = MIXTURES[name]
    samples = solve(mixture.noise, spread_normal(POINTS, dimension(mixture)), steps=15)
    assert energy_distance_ratio(samples, mixture.spread_sample(POINTS)) < LIMIT
    assert mixture.share_off(samples) < 1e-3


@pytest.mark.parametrize("name", MIXTURES)
def test_the_error_falls_with_second_order(name):
    mixture = MIXTURES[name]
    fine = solve(mixture.noise, spread_normal(4096, dimension(mixture)), steps=600)
    steps = torch.tensor([20.0, 40.0, 80.0])
    errors = torch.tensor([path_error(mixture, int(n), fine) for n in steps])
    design = torch.stack([steps.log(), torch.ones(3)], dim=1)
    slope = torch.linalg.lstsq(design, errors.log()[:, None]).solution[0].item()
    assert slope < -1.8, errors


@pytest.mark.parametrize("steps, limit", [(15, 0.006), (10, 0.014), (8, 0.03)])
def test_few_steps_stay_near_the_exact_path(steps, limit):
    for name, mixture in MIXTURES.items():
        fine = solve(mixture.noise, spread_normal(4096, dimension(mixture)), steps=300)
        assert path_error(mixture, steps, fine) < limit, name


def time_of(log_ratio):
    """Inverse of log(alpha / sigma) as a function of t."""
    x = 2 * 19.9 * torch.log1p(torch.exp(-2 * log_ratio))
    return x / ((0.1**2 + x).sqrt() + 0.1) / 19.9


def singlestep(noise, x, steps):
    """DPM-Solver-2 (Lu et al. 2022a) at even times, its odd last step of first order: CEP's."""
    times, i = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64), 0
    while i < steps:
        order = min(2, steps - i)
        (alpha, sigma), (next_alpha, next_sigma) = map(alpha_sigma, (times[i], times[i + order]))
        start, end = (alpha / sigma).log(), (next_alpha / next_sigma).log()
        predicted = noise(x, times[i])
        if order == 2:
            middle = time_of((start + end) / 2)
            middle_alpha, middle_sigma = alpha_sigma(middle)
            half = middle_sigma * torch.expm1((end - start) / 2)
            predicted = noise(middle_alpha / alpha * x - half * predicted, middle)
        x = next_alpha / alpha * x - next_sigma * torch.expm1(end - start) * predicted
        i += order
    return x


@pytest.mark.parametrize("name", MIXTURES)
def test_eight_steps_are_better_than_fifteen_of_the_earlier_solver(name):
    mixture = MIXTURES[name]
    noise = spread_normal(4096, dimension(mixture))
    fine = solve(mixture.noise, noise, 300)
    earlier, dense = (singlestep(mixture.noise, noise, n) for n in (15, 600))
    assert (dense - fine).norm(dim=1).mean() < 1e-3  # they converge to the same path
    error = (earlier - fine).norm(dim=1).mean().item()
    assert path_error(mixture, 10, fine) < error / 5
    assert path_error(mixture, 8, fine) < error / 2
    assert mixture.share_off(solve(mixture.noise, noise, 8)) <= mixture.share_off(earlier)


def test_bounds_of_the_actions_do_not_change_data_within_them():
    mixture = MIXTURES["1d"]
    noise = spread_normal(4096, 1)
    inside = Mixture(mixture.weights, mixture.means, 0.3 * mixture.stds)
    free, bounded = (solve(inside.noise, noise, 15, limit) for limit in (None, 1.0))
    torch.testing.assert_close(free, bounded, rtol=0, atol=1e-6)


def test_a_solver_without_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        solve(MIXTURES["1d"].noise, spread_normal(4, 1), steps=0)


# --- Guidance ---


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("direction, scale", [(1.0, 1.0), (-1.0, 2.0)])
def test_guided_samples_follow_the_tilted_density(name, direction, scale, monkeypatch):
    mixture = MIXTURES[name]
    slope = direction * SLOPE[: dimension(mixture)]

    def evenly_spread(shape, **_):
        return spread_normal(POINTS, dimension(mixture)).reshape(shape)

    # Evenly spread noise in place of random numbers takes the scatter out of the comparison.
    monkeypatch.setattr(torch, "randn", evenly_spread)
    samples = sample_actions(
        ExactBehavior(mixture),
        torch.zeros(POINTS // 4, 1, dtype=torch.float64),
        n_samples=4,
        energy=ExactEnergy(mixture, slope, scale),
        guidance_scale=scale,
        steps=15,
        max_action=None,
    ).flatten(0, 1)
    assert energy_distance_ratio(samples, mixture.tilted(slope).spread_sample(POINTS)) < LIMIT
    assert energy_distance_ratio(samples, mixture.spread_sample(POINTS)) > 100


class CurvedEnergy:
    """The exact E_t of a standard normal behavior and the energy -curvature / 2 a_0^2."""

    def __init__(self, curvature):
        self.curvature = curvature

    def embed_states(self, states):
        return states

    def gradient(self, actions_t, embedded_states, t):
        alpha, sigma = alpha_sigma(t)
        return -self.curvature * alpha**2 / (1 + self.curvature * sigma**2) * actions_t


@pytest.mark.parametrize("scale", [1.0, 3.0, 8.0])
def test_a_guidance_scale_above_one_is_narrower_than_the_scaled_energy(scale, monkeypatch):
    # Along the exact path log a changes by s / 2 log(1 + curvature): a variance of 4^-s here.
    normal = Mixture([1.0], [[0.0]], [1.0])
    noise = spread_normal(POINTS, 1)
    monkeypatch.setattr(torch, "randn", lambda shape, **_: noise.reshape(shape))
    samples = sample_actions(
        ExactBehavior(normal),
        torch.zeros(POINTS, 1, dtype=torch.float64),
        energy=CurvedEnergy(3.0),
        guidance_scale=scale,
        steps=200,
        max_action=None,
    )
    assert samples.var().item() == pytest.approx(4**-scale, rel=0.05)
    weights = (-1.5 * scale * noise**2).exp()  # resampling: the behavior times exp(s Q)
    resampled = ((weights * noise**2).sum() / weights.sum()).item()
    assert resampled == pytest.approx(1 / (1 + 3 * scale), rel=0.01)


def test_bounds_keep_steep_guidance_on_the_data():
    # An energy that does not fade with the noise, as an imperfect network's: it moves the clean
    # action at t = 1 by scale / alpha, 450, and all samples to a corner unless bounds hold them.
    class SteepEnergy(ExactEnergy):
        def predict(self, actions_t, embedded_states, t):
            return actions_t.sum(-1)

    mixture = MIXTURES["2d"]
    few, fine = (
        sample_actions(
            ExactBehavior(mixture),
            torch.zeros(2000, 1, dtype=torch.float64),
            energy=SteepEnergy(mixture, None, None),
            guidance_scale=3.0,
            steps=steps,
            generator=seeded(),
        )
        for steps in (15, 300)
    )
    assert (few - fine).norm(dim=-1).mean() < 0.01
    assert (few == 1).all(dim=-1).double().mean() < 0.1


# --- The sampler's contract ---


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return BehaviorModel(5, 3, width=32), EnergyModel(5, 3, hidden=16)


STATES = spread_normal(6, 5).float()


def test_without_energy_or_scale_nothing_is_guided(networks):
    behavior, energy = networks

    def sample(**options):
        return sample_actions(behavior, STATES, 2, max_action=None, generator=seeded(), **options)

    plain = sample()
    assert torch.equal(sample(energy=energy), plain)
    assert torch.equal(sample(guidance_scale=3.0), plain)
    assert (sample(energy=energy, guidance_scale=3.0) - plain).abs().max() > 1e-3


def test_the_generator_decides_the_sample(networks):
    behavior, energy = networks
    options = {"n_samples": 3, "energy": energy, "guidance_scale": 2.0, "max_action": None}
    first, again, other = (
        sample_actions(behavior, STATES, generator=seeded(s), **options) for s in (1, 1, 2)
    )
    assert first.shape == (6, 3, 3)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_samples_of_a_state_equal_those_of_its_copies(networks):
    behavior, energy = networks
    options = {"energy": energy, "guidance_scale": 2.0, "max_action": None}
    together = sample_actions(behavior, STATES, 4, generator=seeded(), **options)
    copies = STATES.repeat_interleave(4, dim=0)
    apart = sample_actions(behavior, copies, 1, generator=seeded(), **options)
    torch.testing.assert_close(together.flatten(0, 1), apart.flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_sampling_leaves_no_graph_and_no_gradients(networks):
    behavior, energy = networks
    actions = sample_actions(behavior, STATES, energy=energy, guidance_scale=2.0, steps=3)
    assert not actions.requires_grad
    assert all(p.grad is None for network in networks for p in network.parameters())


def test_actions_are_clamped_to_the_bounds(networks):
    behavior, _ = networks
    torch.nn.init.constant_(behavior.output.bias, -3.0)
    unbounded, bounded = (
        sample_actions(behavior, STATES, max_action=m, generator=seeded()) for m in (None, 0.5)
    )
    assert unbounded.abs().max() > 1
    assert bounded.abs().max() == 0.5


def test_reduced_precision_keeps_the_state_in_single(networks):
    behavior, energy = networks
    options = {"energy": energy, "guidance_scale": 2.0, "n_samples": 2}
    full = sample_actions(behavior, STATES, generator=seeded(), **options)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = sample_actions(behavior, STATES, generator=seeded(), **options)
    assert reduced.dtype == torch.float32
    assert 0 < (reduced - full).abs().mean() < 0.05


def test_a_first_call_in_inference_mode_spoils_no_later_gradient(networks):
    behavior, energy = networks
    with torch.inference_mode():
        sample_actions(behavior, STATES, steps=7)
    assert torch.isfinite(
        sample_actions(behavior, STATES, energy=energy, guidance_scale=1.0, steps=7)
    ).all()


@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
def test_the_sampler_is_one_graph(networks, guidance_scale):
    behavior, energy = networks
    options = {"energy": energy, "guidance_scale": guidance_scale, "steps": 3, "max_action": None}
    # No break: nothing in it waits for the device or branches on data.
    traced = torch.compile(sample_actions, fullgraph=True, backend="eager")
    torch.manual_seed(1)
    expected = sample_actions(behavior, STATES, 2, **options)
    torch.manual_seed(1)
    torch.testing.assert_close(traced(behavior, STATES, 2, **options), expected)


def test_support_actions_are_samples_of_each_chunk(networks):
    behavior, _ = networks
    done = []
    torch.manual_seed(1)
    actions = draw_support_actions(behavior, STATES, 4, 5, chunk=4, on_progress=done.append)
    torch.manual_seed(1)
    expected = [sample_actions(behavior, s, 4, steps=5) for s in STATES.split(4)]
    assert torch.equal(actions, torch.cat(expected))
    assert done == [4, 6]


# --- The networks ---


def test_networks_depend_on_time_and_state_and_a_shared_time_equals_one_per_row(networks):
    actions = spread_normal(6, 3).float()
    for network in networks:
        shared = network(actions, STATES, torch.tensor(0.3))
        torch.testing.assert_close(shared, network(actions, STATES, torch.full((6,), 0.3)))
        torch.testing.assert_close(shared, network(actions, STATES, 0.3))
        assert (shared - network(actions, STATES, 0.31)).abs().max() > 1e-4
        assert (shared - network(actions, STATES.flip(0), 0.3)).abs().max() > 1e-3


@pytest.mark.parametrize("bf16", [False, True])
def test_the_gradient_of_the_energy_is_that_of_autograd(networks, bf16):
    energy, actions = networks[1], spread_normal(6, 3).float()[:, None].requires_grad_()
    rounding = {"rtol": 0.05, "atol": 1e-3} if bf16 else {"rtol": 1e-6, "atol": 1e-7}
    with torch.autocast("cpu", torch.bfloat16, bf16):
        embedded, t = energy.embed_states(STATES)[:, None], torch.tensor(0.3)
        (expected,) = torch.autograd.grad(energy.predict(actions, embedded, t).sum(), actions)
        found = energy.gradient(actions, embedded, t)
        with torch.no_grad():  # as in sampling, where an edited energy may take torch.func.grad
            edited = torch.func.grad(lambda x: energy.predict(x, embedded, t).sum())(actions)
    torch.testing.assert_close(edited.float(), expected.float(), **rounding)
    assert expected.abs().min() > 1e-4
    torch.testing.assert_close(found.float(), expected.float(), **rounding)


def test_states_broadcast_over_their_actions(networks):
    actions = spread_normal(12, 3).float().reshape(6, 2, 3)
    for network in networks:
        together = network(actions, STATES[:, None], 0.3)
        apart = [network(actions[:, k], STATES, 0.3) for k in range(2)]
        torch.testing.assert_close(together, torch.stack(apart, dim=1))


def test_behavior_model_has_the_published_size():
    # Chen et al. (2022): 32 state features, 128-wide embedding, blocks 512-256-128-128-256-512.
    model = BehaviorModel(11, 3)
    blocks = [model.down_wide, model.down_middle, model.down_narrow]
    blocks += [model.bottom, model.up_middle, model.up_wide]
    assert [b.second.out_features for b in blocks] == [512, 256, 128, 128, 256, 512]
    assert model.state_features.out_features == 32
    assert model.embedding.out_features == 128
    assert len(model.time_features(0.5)) == 32
