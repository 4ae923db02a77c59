"""What the two losses teach is compared with closed forms; the training loop is interrupted."""

from types import SimpleNamespace

import pytest
import torch
from gaussian_mixtures import Mixture, energy_distance_ratio

from d4rl_gymnasium.files import DamagedFileError
from diffusion import (
    BehaviorModel,
    EnergyModel,
    behavior_loss,
    energy_loss,
    perturb,
    sample_actions,
    train_behavior,
    training,
)
from diffusion.process import alpha_sigma


def conditional_mixture(states, size=1.0):
    """Two modes whose places and weights depend on the state: [B, 1], batch shape [B, 1]."""
    states = states.double()[:, None]
    centres = torch.tensor([[-0.5, 0.4], [0.5, -0.3]], dtype=torch.float64)
    moves = torch.tensor([[0.2, 0.3], [-0.2, 0.3]], dtype=torch.float64)
    weights = torch.cat([0.4 + 0.2 * states, 0.6 - 0.2 * states], dim=-1)
    stds = torch.tensor([0.2, 0.15], dtype=torch.float64).expand_as(weights)
    return Mixture(weights, size * (centres + states[..., None] * moves), size * stds)


def draw(mixture, n, generator):
    """Actions [B, n, A] of a conditional mixture."""
    k = torch.multinomial(mixture.weights[:, 0], n, replacement=True, generator=generator)
    rows = torch.arange(len(k))[:, None]
    means, stds = mixture.means[rows, 0, k], mixture.stds[rows, 0, k]
    noise = torch.randn(means.shape, dtype=torch.float64, generator=generator)
    return means + stds[..., None] * noise


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- What the losses teach ---

# Far apart modes, because at t = 0.9 only alpha = 0.017 of the action is left to learn from.
SIZE = 20.0
SLOPE = torch.tensor([0.15, -0.15], dtype=torch.float64)


@pytest.fixture(scope="module")
def trained_energy():
    torch.manual_seed(0)
    model, generator, updates = EnergyModel(1, 2, hidden=32), seeded(1), 1800
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        states = 2 * torch.rand(128, 1, generator=generator) - 1
        support = draw(conditional_mixture(states, SIZE), 16, generator)
        energies = (support @ SLOPE).float()
        loss = energy_loss(model, states, support.float(), energies, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_energy_loss_is_minimised_by_the_exact_intermediate_energy(trained_energy, t):
    states, generator = torch.linspace(-1, 1, 32)[:, None], seeded(2)
    mixture, time = conditional_mixture(states, SIZE), torch.tensor(t, dtype=torch.float64)
    actions = draw(mixture, 256, generator)
    noise = torch.randn(actions.shape, dtype=torch.float64, generator=generator)
    actions_t = perturb(actions, time.expand(32, 256), noise)
    exact = mixture.energy(actions_t, time, SLOPE)
    with torch.no_grad():
        learned = trained_energy(actions_t.float(), states[:, None], time.float()).double()
    # What depends on the state and t alone is free.
    exact, learned = (x - x.mean(dim=1, keepdim=True) for x in (exact, learned))
    assert (exact * learned).sum() / (exact.norm() * learned.norm()) > 0.98
    assert (exact * learned).sum() / exact.square().sum() == pytest.approx(1, abs=0.15)


def best_slope(n_support, n_states=4096):
    """Of f = slope * 3 alpha_t a_t under the energy loss, for nu_0 = N(0, 1) and beta_E Q = 3 a.

    A slope of 1 is the exact energy: given a_t the action is N(alpha_t a_t, sigma_t^2).
    """
    slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
    support = torch.randn(n_states, n_support, 1, dtype=torch.float64, generator=seeded(3))

    def model(actions_t, states, t):
        alpha, _ = alpha_sigma(t)
        return slope * 3 * alpha * actions_t[..., 0]

    for _ in range(8):  # Newton's method on a convex function
        loss = energy_loss(model, support[:, 0], support, 3 * support[..., 0], seeded(4))
        (gradient,) = torch.autograd.grad(loss, slope, create_graph=True)
        (curvature,) = torch.autograd.grad(gradient, slope)
        slope.data -= gradient.detach() / curvature
    return slope.item()


def test_few_support_actions_teach_a_flatter_energy():
    """Of two draws none is often a good one; more of them lead to the exact energy."""
    two, sixteen, many = best_slope(2), best_slope(16), best_slope(512, 1024)
    assert 0.5 < two < 0.6 < 0.7 < sixteen < 0.76 < 0.86 < many < 0.95


def config_of(updates, batch_size=32, lr=1e-3, seed=0, decay=False):
    """The settings of a DARE script that train_behavior uses."""
    return SimpleNamespace(
        behavior_iterations=updates, behavior_batch_size=batch_size, behavior_lr=lr,
        behavior_seed=seed, behavior_lr_decay=decay,
    )  # fmt: skip


def test_behavior_model_matches_a_conditional_distribution_of_two_modes(tmp_path):
    generator = seeded(0)
    states = 2 * torch.rand(100_000, 1, generator=generator) - 1
    actions = draw(conditional_mixture(states), 1, generator)[:, 0].float()
    torch.manual_seed(0)
    model = BehaviorModel(1, 2, width=32)
    config = config_of(1400, 1024, 4e-3, decay=True)
    loss = train_behavior(model, states, actions, config, tmp_path / "model")
    assert loss < 0.13
    tested = torch.tensor([[-0.8], [-0.2], [0.3], [0.8]])
    samples = sample_actions(model, tested, 8192, max_action=None, generator=generator).double()
    for state, x in zip(tested, samples, strict=True):
        mixture = conditional_mixture(state[None])
        mixture = Mixture(mixture.weights[0, 0], mixture.means[0, 0], mixture.stds[0, 0])
        nearest = (x[:, None] - mixture.means).norm(dim=-1).argmin(dim=1)
        for k in range(2):
            mode = x[nearest == k]
            assert len(mode) / len(x) == pytest.approx(mixture.weights[k].item(), abs=0.06)
            assert (mode.mean(dim=0) - mixture.means[k]).abs().max() < 0.05
            assert mode.std(dim=0).mean() == pytest.approx(mixture.stds[k].item(), rel=0.2)
        assert mixture.share_off(x) < 0.01
        assert energy_distance_ratio(x, mixture.spread_sample(2**13), size=250) < 2


def test_sizes_are_those_of_the_source():
    """App. B.5: four hidden layers as in CEP; times of Chen et al. (2022)."""
    energy = EnergyModel(11, 3)
    linears = [layer for layer in energy.layers if isinstance(layer, torch.nn.Linear)]
    assert [m.out_features for m in (energy.state_layer, *linears)] == [256] * 4 + [1]
    torch.manual_seed(0)
    scales = torch.cat([BehaviorModel(11, 3).time_features.frequencies for _ in range(50)])
    assert scales.std().item() == pytest.approx(30, rel=0.1)


def test_losses_of_networks_that_know_nothing():
    torch.manual_seed(0)
    states, actions = torch.randn(4096, 3), torch.rand(4096, 2)
    behavior, energy = BehaviorModel(3, 2, width=16), EnergyModel(3, 2, hidden=8)
    torch.nn.init.zeros_(behavior.output.weight)
    torch.nn.init.zeros_(behavior.output.bias)
    assert behavior_loss(behavior, states, actions).item() == pytest.approx(1, abs=0.05)
    # Of state and time alone, so the same for the actions of a state, which share one time.
    torch.nn.init.zeros_(energy.action_layer.weight)
    torch.nn.init.constant_(energy.layers[-1].weight, 100.0)
    support = actions.reshape(256, 16, 2)
    loss = energy_loss(energy, states[:256], support, support.sum(-1))
    torch.testing.assert_close(loss, torch.tensor(16.0).log())


# --- The training loop ---

DATA = torch.randn(500, 3, generator=seeded(0)), torch.rand(500, 2, generator=seeded(1)) * 2 - 1


def new_model(seed=0):
    torch.manual_seed(seed)
    return BehaviorModel(3, 2, width=16)


def train(model, path, updates=60, settings=None, **options):
    return train_behavior(model, *DATA, config_of(updates, **settings or {}), path, **options)


def assert_same_weights(first, second):
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def often_reported(monkeypatch):
    """And kept at every report."""
    monkeypatch.setattr(training, "REPORT_EVERY", 25)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)


@pytest.mark.parametrize("decay", [False, True])
def test_an_interrupted_training_ends_with_the_same_weights(
    decay, tmp_path, monkeypatch, often_reported
):
    whole, whole_reports, reports = new_model(), [], []
    settings = {"decay": decay}

    def collect(found):
        return lambda done, **losses: found.append((done, losses))

    whole_loss = train(
        whole, tmp_path / "whole", settings=settings, on_progress=collect(whole_reports)
    )
    losses, calls = behavior_loss, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) > 52:  # 50 updates and two looks at held-out rows
            raise MemoryError
        return losses(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "behavior_loss", killed)
        with pytest.raises(MemoryError):
            train(new_model(), tmp_path / "model", settings=settings)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.partial", "whole.partial"]
    resumed = new_model(seed=1)
    path = tmp_path / "model"
    loss = train(resumed, path, settings=settings, on_progress=collect(reports))
    assert loss == whole_loss
    assert [n for n, _ in reports] == [60]  # it was kept after 50 updates
    assert reports == whole_reports[2:]
    assert_same_weights(resumed, whole)
    again = new_model(seed=2)
    assert train(again, path, settings=settings) == whole_loss
    assert_same_weights(again, whole)


def test_the_training_is_kept_when_the_last_time_is_long_ago(tmp_path, monkeypatch, often_reported):
    """At most SAVE_SECONDS and one report, and always at the end."""
    monkeypatch.setattr(training, "SAVE_SECONDS", 300.0)
    clock, saved, save = iter(range(0, 10**6, 200)), [], training.save
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(training, "save", lambda path, x: (saved.append(x["step"]), save(path, x)))
    train(new_model(), tmp_path / "model", updates=160)
    assert saved == [50, 100, 150, 160]


def test_a_training_that_is_through_only_gives_its_model(tmp_path, often_reported):
    whole, again = new_model(), new_model(seed=1)
    loss = train(whole, tmp_path / "model")
    assert train(again, tmp_path / "model", accelerate=lambda update: pytest.fail) == loss
    assert_same_weights(again, whole)


def test_the_seed_decides_the_training(tmp_path):
    first, again, other = new_model(), new_model(), new_model()
    for i, (model, seed) in enumerate([(first, 3), (again, 3), (other, 4)]):
        train(model, tmp_path / str(i), updates=3, settings={"seed": seed})
    assert_same_weights(first, again)
    assert not torch.equal(first.output.weight, other.output.weight)


def in_bf16(update):
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)(update)


def test_reduced_precision_does_not_use_stale_weights(tmp_path):
    reduced, nested, full = new_model(), new_model(), new_model()
    train(full, tmp_path / "full")
    train(reduced, tmp_path / "reduced", accelerate=in_bf16)
    train(nested, tmp_path / "nested", accelerate=lambda f: in_bf16(in_bf16(f)))
    assert_same_weights(nested, reduced)
    assert not torch.equal(reduced.output.weight, full.output.weight)
    torch.testing.assert_close(reduced.output.weight, full.output.weight, rtol=0, atol=0.01)


def test_progress_is_reported_with_the_mean_since_the_last_report(
    tmp_path, monkeypatch, often_reported
):
    values = iter(range(1000))

    def counted(model, *_):
        return model.output.bias.sum() * 0 + next(values)

    monkeypatch.setattr(training, "behavior_loss", counted)
    reports = []
    last = train(
        new_model(),
        tmp_path / "model",
        on_progress=lambda done, loss, held_out_loss: reports.append((done, loss, held_out_loss)),
    )
    # The look at held-out rows after each 25 updates takes a number too.
    assert reports == [(25, 12.0, 25.0), (50, 38.0, 51.0), (60, 56.5, 62.0)]
    assert last == 56.5


def test_held_out_rows_are_a_twentieth_that_is_never_trained_on(tmp_path, monkeypatch):
    states = torch.arange(1000.0)[:, None].expand(-1, 3)
    seen, loss = [], behavior_loss

    def watched(model, states, actions):
        seen.append(set(states[:, 0].int().tolist()))
        return loss(model, states / 1000, actions)

    monkeypatch.setattr(training, "behavior_loss", watched)
    train_behavior(new_model(), states, torch.rand(1000, 2), config_of(200), tmp_path / "model")
    *trained_on, held_out = seen
    assert held_out == {x for x in range(1000) if x // 10 % 20 == 10}
    assert set.union(*trained_on) == set(range(1000)) - held_out


def test_held_out_rows_that_are_looked_at_come_from_all_five_blocks(monkeypatch):
    monkeypatch.setattr(training, "HELD_OUT_ROWS", 20)
    rows = torch.arange(1000.0)[:, None]
    (trained_on, _), (held_out, _) = training._hold_out(rows, rows)
    assert len(trained_on) == 950  # all others, however many are looked at
    assert len(held_out) <= 20
    assert {int(x) // 200 for x in held_out} == {0, 1, 2, 3, 4}


def test_overfitting_is_said(tmp_path, often_reported, capsys):
    """Random actions of few states: what is learned by heart misleads elsewhere."""
    torch.manual_seed(0)
    states, actions = torch.randn(40, 3), torch.rand(40, 2) * 2 - 1
    model = BehaviorModel(3, 2, width=64)
    train_behavior(model, states, actions, config_of(50, 64, 1e-4), tmp_path / "short")
    assert "overfitted" not in capsys.readouterr().out
    train_behavior(model, states, actions, config_of(400, 64, 3e-3), tmp_path / "long")
    assert "behavior model: overfitted, held-out loss up from" in capsys.readouterr().out


def test_the_rate_warms_up_and_decays_to_zero(tmp_path, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def noted(optimizer):
        rates.append(optimizer.param_groups[0]["lr"].item())
        return step(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    train(new_model(), tmp_path / "constant", updates=3)
    assert rates == pytest.approx([1e-3] * 3)
    rates.clear()
    train(new_model(), tmp_path / "decayed", updates=200, settings={"decay": True})
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3], rel=2e-3)
    assert rates[99] == pytest.approx(5e-4) and rates[-1] == pytest.approx(0, abs=1e-9)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_a_loss_that_is_not_finite_stops_and_is_not_kept(tmp_path, often_reported):
    states, actions = DATA[0].clone(), DATA[1]
    states[7] = float("nan")
    with pytest.raises(FloatingPointError, match="behavior loss is not finite by update 25"):
        train_behavior(new_model(), states, actions, config_of(100, 256), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_weights_broken_by_the_last_update_are_not_returned(tmp_path, monkeypatch):
    def infinite_slope(model, *_):
        return (0 * model.output.bias).sqrt().sum()

    monkeypatch.setattr(training, "behavior_loss", infinite_slope)
    with pytest.raises(FloatingPointError, match="not finite by update 1:"):
        train(new_model(), tmp_path / "model", updates=1)
    assert not list(tmp_path.iterdir())


def test_a_foreign_or_broken_partial_file_is_refused(tmp_path):
    path = tmp_path / "model"
    train(new_model(), path, updates=2)
    for settings in ({"seed": 1}, {"batch_size": 16}, {"lr": 0.1}, {"decay": True}):
        with pytest.raises(DamagedFileError, match="2 updates of another training"):
            train(new_model(), path, updates=2, settings=settings)
    with pytest.raises(DamagedFileError, match="2 updates of another training"):
        train(new_model(), path, updates=1)
    partial = tmp_path / "model.partial"
    partial.write_bytes(partial.read_bytes()[:1000])
    with pytest.raises(DamagedFileError, match="model.partial is damaged .*move it away"):
        train(new_model(), path)
