"""The energy-guided sampler: its cache, its support actions, its energy and what it draws."""

import _thread
import copy
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

import diffusion.sampler
from d4rl_gymnasium.files import DamagedFileError, load, save
from diffusion import BehaviorModel, EnergyGuidedSampler, sample_actions, training
from diffusion.sampler import cached_behavior, cached_support

S, A, N = 3, 2, 40
SETTINGS = dict(
    env="hopper-medium-v2", device="cpu", precision="fp32", mixing_ratio=0.5, reference="guided",
    n_reference=1, guidance_scale=3.0, diffusion_steps=3, behavior_seed=0, behavior_iterations=6,
    behavior_batch_size=8, behavior_lr=1e-3, behavior_lr_decay=False,
    behavior_width=8, n_support=4, n_support_states=0,
    energy_hidden=8, energy_beta=2.0, energy_normalize=True, energy_iterations=5,
    energy_batch_size=16, energy_lr=1e-3,
)  # fmt: skip


@pytest.fixture
def data():
    """Observations [N, S] and actions [N, A] of a dataset."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(N, S, generator=generator)
    return states, 2 * torch.rand(N, A, generator=generator) - 1


def config_of(runs_dir, **settings):
    return SimpleNamespace(**SETTINGS | settings, runs_dir=str(runs_dir))


def same(update):
    return update


def q_of(states, actions):
    """A Q function in closed form."""
    return states[..., 0] * actions[..., 0] + 2 * actions[..., 1]


def sampler_of(runs_dir, data, online_states=None, q_function=q_of, accelerate=same, **settings):
    torch.manual_seed(5)  # of the energy's weights
    online_states = torch.randn(300, S) if online_states is None else online_states
    config = config_of(runs_dir, **settings)
    return EnergyGuidedSampler(config, *data, online_states, q_function, accelerate)


def names_of(runs_dir):
    """Kinds of the files in the cache, without locks."""
    files = sorted(p.name for p in (runs_dir / "cache").glob("*.pt"))
    return [name.split("-hopper")[0] for name in files]


# --- The cache ---


def test_a_model_and_its_support_actions_are_made_once(tmp_path, data, capsys):
    first = sampler_of(tmp_path, data)
    assert "cache hit" not in capsys.readouterr().out
    (cached,) = tmp_path.glob("cache/behavior-*.pt")
    cached.with_name(f"{cached.name}.partial").write_bytes(b"of a process that was killed")
    again = sampler_of(tmp_path, data)
    output = capsys.readouterr().out
    assert "cache hit: behavior from" in output and "cache hit: support-0 from" in output
    assert names_of(tmp_path) == ["behavior", "support-0"]
    assert torch.equal(first.support, again.support) and torch.equal(first.states, again.states)
    for x, y in zip(first.behavior.parameters(), again.behavior.parameters(), strict=True):
        assert torch.equal(x, y) and not x.requires_grad and not y.requires_grad
    assert not list(tmp_path.glob("cache/*.partial"))


def test_a_cached_file_that_holds_something_else_is_refused(tmp_path, data):
    sampler_of(tmp_path, data)
    for file in tmp_path.glob("cache/*.pt"):
        save(file, {"behavior": {}, "rows": torch.zeros(3)})
        with pytest.raises(DamagedFileError, match=f"{file.name} does not hold what"):
            sampler_of(tmp_path, data)
        file.unlink()


@pytest.mark.parametrize(
    "name", [*diffusion.sampler.BEHAVIOR_FIELDS, "env", "states", "actions", "code"]
)
def test_what_changes_the_model_changes_its_file(tmp_path, data, monkeypatch, name):
    cached_behavior(config_of(tmp_path), *data, same)
    settings = {"precision": "bf16", "env": "walker2d-medium-v2"}
    states, actions = (x.clone() for x in data)
    changed = {}
    if name == "states":
        states[-1, -1] += 1e-6
    elif name == "actions":
        actions[0, 0] += 1e-6
    elif name == "code":  # a comment in any file of diffusion/
        folder = tmp_path / "diffusion"
        shutil.copytree(training.__file__.rsplit("/", 1)[0], folder)
        with open(folder / "process.py", "a") as file:
            file.write("# changed\n")
        monkeypatch.setattr(diffusion.sampler, "__file__", str(folder / "sampler.py"))
    else:
        changed[name] = settings.get(name, 2 * getattr(config_of(tmp_path), name) or 1)
    cached_behavior(config_of(tmp_path, **changed), states, actions, same)
    assert len(list((tmp_path / "cache").glob("behavior-*.pt"))) == 2


@pytest.mark.parametrize("name", ["n_support", "diffusion_steps", "n_support_states"])
def test_what_changes_the_support_actions_changes_their_file_alone(tmp_path, data, name):
    sampler_of(tmp_path, data)
    sampler_of(tmp_path, data, **{name: 5})
    assert len(names_of(tmp_path)) == 3 and names_of(tmp_path).count("behavior") == 1


def test_weights_are_rounded_once_to_what_every_product_rounds_them_to(tmp_path, data):
    first, again = (cached_behavior(config_of(tmp_path, precision="bf16"), *data, same)
                    for _ in range(2))  # fmt: skip
    (path,) = tmp_path.glob("cache/behavior-*.pt")
    in_fp32 = copy.deepcopy(first).float()
    in_fp32.load_state_dict(load(path)["behavior"])
    drawn = []
    for model in (first, again, in_fp32):
        with torch.autocast("cpu", torch.bfloat16):
            generator = torch.Generator().manual_seed(1)
            drawn.append(sample_actions(model, data[0], generator=generator))
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    assert first.time_features.frequencies.dtype == torch.float32
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "changed", [dict(energy_lr=1e-2), dict(guidance_scale=1.0), dict(energy_beta=1.0)]
)
def test_what_does_not_change_them_finds_them(tmp_path, data, changed):
    sampler_of(tmp_path, data)
    sampler_of(tmp_path, data, **changed)
    assert names_of(tmp_path) == ["behavior", "support-0"]


def test_without_need_no_support_actions_are_drawn(tmp_path, data):
    sampler = sampler_of(tmp_path, data, guidance_scale=0)
    sampler.add_support(5)
    sampler.fit_energy()
    assert names_of(tmp_path) == ["behavior"] and sampler.train() == {}


def marked_support(behavior, states, n, steps, **_):
    """Support actions [B, n, A] that tell which state they belong to."""
    return (states[:, None, :A] + 1).repeat(1, n, 1)


@pytest.mark.parametrize("n_states", [0, 7])
def test_cached_support_actions_belong_to_their_states(tmp_path, data, monkeypatch, n_states):
    monkeypatch.setattr(diffusion.sampler, "draw_support_actions", marked_support)
    found = [sampler_of(tmp_path, data, n_support_states=n_states) for _ in range(2)]
    for sampler in found:
        assert len(sampler.states) == (n_states or N)
        expected = marked_support(None, sampler.states, 4, None)
        assert torch.equal(sampler.support, expected)
    assert torch.equal(found[0].states, found[1].states)
    # Distinct rows of the data.
    rows = (found[0].states[:, None] == data[0]).all(-1)
    assert (rows.sum(1) == 1).all() and (rows.sum(0) <= 1).all()
    # All of them in their order; of some a random choice.
    assert torch.equal(found[0].states, data[0][: len(rows)]) == (n_states == 0)


def test_resampling_has_support_actions_of_all_states(tmp_path, data):
    sampler = sampler_of(tmp_path, data, reference="resample", n_support_states=7)
    assert len(sampler.support) == N and torch.equal(sampler.states, data[0])


def test_the_caller_draws_as_if_the_cached_parts_were_not_made(tmp_path, data):
    after = []
    for runs_dir in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):  # made, found, made
        torch.manual_seed(3)
        config = config_of(runs_dir)
        cached_support(config, *data, cached_behavior(config, *data, same))
        after.append(torch.get_rng_state())
    torch.manual_seed(3)
    assert all(torch.equal(state, torch.get_rng_state()) for state in after)


def test_the_behavior_seed_decides_the_model_and_its_draws(tmp_path, data):
    found = []
    for k, seed in enumerate([0, 0, 1]):
        torch.manual_seed(k)
        found.append(sampler_of(tmp_path / str(k), data, behavior_seed=seed).support)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_the_behavior_seed_decides_the_initial_weights(tmp_path, data):
    settings = ({"behavior_seed": k, "behavior_iterations": 0} for k in (0, 1))
    a, b = (cached_behavior(config_of(tmp_path, **x), *data, same) for x in settings)
    assert not torch.equal(a.output.weight, b.output.weight)


def test_a_second_process_says_for_what_it_waits_and_stops_at_ctrl_c(
    tmp_path, data, capsys, monkeypatch
):
    cached_behavior(config_of(tmp_path), *data, same)
    (file,) = (tmp_path / "cache").glob("behavior-*.pt")
    content = file.read_bytes()
    file.unlink()
    held, finished = threading.Event(), threading.Event()

    def other():  # in a thread of its own, since a lock knows who holds it
        with FileLock(f"{file}.lock"):
            held.set()
            finished.wait(60)
            file.write_bytes(content)

    thread = threading.Thread(target=other)
    thread.start()
    assert held.wait(60)

    def said(*words, **options):  # by `locked`, once it waits
        print(*words, **options)
        threading.Timer(0.2, _thread.interrupt_main).start()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("d4rl_gymnasium.files.print", said, raising=False)
        cached_behavior(config_of(tmp_path), *data, same)
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"waiting for {file}, which another process is making"
    )
    # Once the other is done, it is there.
    timer = threading.Timer(0.5, finished.set)
    timer.start()
    cached_behavior(config_of(tmp_path), *data, lambda update: pytest.fail("trained again"))
    thread.join()


def test_an_interrupted_training_goes_on(tmp_path, data, monkeypatch):
    monkeypatch.setattr(training, "REPORT_EVERY", 2)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    calls, losses = [], training.behavior_loss

    def stopped(*args):
        calls.append(None)
        if len(calls) == 7:  # update 5: two looks at held-out rows came before
            raise KeyboardInterrupt
        return losses(*args)

    expected = cached_behavior(config_of(tmp_path / "whole"), *data, same)
    monkeypatch.setattr(training, "behavior_loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        cached_behavior(config_of(tmp_path), *data, same)
    found = cached_behavior(config_of(tmp_path), *data, same)
    assert len(calls) == 7 + 3  # it went on from update 4 of 6, and looked once more
    for x, y in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(x, y)


# --- Support actions of online states ---


def test_online_states_get_support_actions_in_chunks(tmp_path, data, monkeypatch):
    sizes = []

    def watched(behavior, states, *args, **options):
        sizes.append(len(states))
        return marked_support(behavior, states, *args, **options)

    monkeypatch.setattr(diffusion.sampler, "draw_support_actions", watched)
    monkeypatch.setattr(diffusion.sampler, "SUPPORT_CHUNK", 4)
    online_states = torch.randn(30, S)
    sampler = sampler_of(tmp_path, data, online_states)
    sizes.clear()  # of the dataset
    added = []
    for n in range(6, 16):
        sampler.add_support(n)
        added.append(sampler.n_added)
        assert sampler.n_online == sampler.n_added
    assert added == [6] * 4 + [10] * 4 + [14] * 2 and sizes == [6, 4, 4]
    assert torch.equal(sampler.online_support[:14], marked_support(None, online_states[:14], 4, 0))
    assert (sampler.online_support[14:] == 0).all()


def test_few_online_states_get_support_actions_sooner(tmp_path, data, monkeypatch):
    """Else the energy and `resample` would see a handful of states only, for a hundred steps."""
    monkeypatch.setattr(diffusion.sampler, "SUPPORT_CHUNK", 4)
    sampler = sampler_of(tmp_path, data)
    added = []
    for n in range(1, 13):
        sampler.add_support(n)
        added.append(sampler.n_added)
    assert added == [1, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 12]


def test_states_that_come_later_are_seen(tmp_path, data):
    """The online states are a view of a buffer that fills up."""
    online_states = torch.zeros(30, S)
    sampler = sampler_of(tmp_path, data, online_states)
    online_states[:5] = torch.randn(5, S)
    torch.manual_seed(0)
    sampler.add_support(5)
    torch.manual_seed(0)
    expected = sample_actions(sampler.behavior, online_states[:5], 4, steps=3)
    assert torch.equal(sampler.online_support[:5], expected)


# --- The energy ---


def ready(tmp_path, data, **settings):
    sampler = sampler_of(tmp_path, data, **settings)
    sampler.add_support(20)
    return sampler


def test_energies_are_q_in_units_of_its_usual_spread(tmp_path, data):
    sampler, spreads = ready(tmp_path, data), []
    for k in range(3):
        states, support = torch.randn(6, S), torch.randn(6, 4, A) * (k + 1)
        q = torch.stack([q_of(s.expand(4, -1), a) for s, a in zip(states, support, strict=True)])
        spreads.append(q.std(1).mean())
        expected = 2.0 * q / torch.stack(spreads).mean()  # of few updates the plain mean
        torch.testing.assert_close(sampler.energies(states, support), expected)
    assert sampler.n_spreads == 3
    raw = ready(tmp_path, data, energy_normalize=False)
    torch.testing.assert_close(raw.energies(states, support), 2.0 * q)
    assert raw.n_spreads == 0 and raw.q_spread == 1


def test_the_spread_of_many_updates_forgets_the_first(tmp_path, data):
    """A running mean over the last thousand or so."""
    sampler = ready(tmp_path, data)
    sampler.n_spreads.fill_(5000.0)
    sampler.q_spread.fill_(2.0)
    states, support = torch.randn(6, S), torch.randn(6, 4, A)
    spread = q_of(states[:, None].expand(-1, 4, -1), support).std(1).mean()
    sampler.energies(states, support)
    torch.testing.assert_close(sampler.q_spread, 2.0 + 0.001 * (spread - 2.0))


def test_fitting_lowers_the_loss(tmp_path, data):
    """Well below that of a network that knows nothing, the entropy's bound log K."""
    settings = dict(energy_iterations=400, energy_lr=1e-2, energy_hidden=32, energy_batch_size=64)
    sampler = ready(tmp_path, data, **settings)
    before = torch.stack([sampler.train()["energy_loss"] for _ in range(5)]).mean()
    sampler.fit_energy()
    after = torch.stack([sampler.train()["energy_loss"] for _ in range(20)]).mean()
    assert after < before - 0.05
    assert sampler.n_spreads == 5 + 400 + 20


def test_an_update_changes_the_energy_and_the_spread_alone(tmp_path, data):
    torch.manual_seed(0)
    q_function = torch.nn.Bilinear(S, A, 1)

    def q(states, actions):
        return q_function(states.contiguous(), actions).squeeze(-1)

    sampler = ready(tmp_path, data, q_function=q)
    names = ("support", "online_support", "states", "online_states", "n_online")
    kept = [getattr(sampler, name) for name in names] + list(sampler.behavior.parameters())
    kept += list(q_function.parameters())
    before = [x.detach().clone() for x in kept]
    weights = [x.detach().clone() for x in sampler.energy.parameters()]
    loss = sampler.train()["energy_loss"]
    assert loss.shape == () and not loss.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(kept, before, strict=True))
    assert all(p.grad is None for p in [*q_function.parameters(), *sampler.behavior.parameters()])
    # All but the output's bias, a constant to the softmax: its gradient is rounding, or exactly 0.
    changing = list(sampler.energy.parameters())[:-1]
    assert not any(map(torch.equal, changing, weights))
    assert sampler.n_spreads == 1 and sampler.q_spread != 1


def test_offline_and_online_states_come_in_the_proportion_of_the_batches(
    tmp_path, data, monkeypatch
):
    """And each with its own support actions; of online states those that have some."""
    monkeypatch.setattr(diffusion.sampler, "draw_support_actions", marked_support)
    seen, loss = [], diffusion.sampler.energy_loss

    def watched(model, states, support, energies):
        seen.append((states, support, energies))
        return loss(model, states, support, energies)

    monkeypatch.setattr(diffusion.sampler, "energy_loss", watched)
    online_states = 100 + torch.randn(300, S)
    sampler = sampler_of(
        tmp_path, data, online_states, energy_batch_size=400, mixing_ratio=0.25, n_support_states=7
    )
    sampler.add_support(20)
    sampler.train()
    ((states, support, energies),) = seen
    assert torch.equal(support, marked_support(None, states, 4, None))
    n_offline = 100
    assert (states[:n_offline] < 50).all() and (states[n_offline:] > 50).all()
    pools = [sampler.states, online_states[:20]]
    for half, pool in zip((states[:n_offline], states[n_offline:]), pools, strict=True):
        is_row = (half[:, None] == pool).all(-1)
        assert (is_row.sum(1) == 1).all() and is_row.any(0).all()  # all are drawn in the long run
    q = q_of(states[:, None].expand(-1, 4, -1), support)
    torch.testing.assert_close(energies, 2.0 * q / sampler.q_spread)


def test_updates_are_made_by_what_accelerates_them(tmp_path, data):
    """The behavior model's and the fit of the energy; not those that are part of an update."""
    made = []

    def counting(update):
        made.append(0)
        k = len(made) - 1

        def counted():
            made[k] += 1
            return update()

        return counted

    sampler = ready(tmp_path, data, accelerate=counting)
    assert made == [6]
    sampler.fit_energy()
    sampler.train()
    assert made == [6, 5]


# --- Reference actions ---


def test_guided_reference_actions_are_samples_with_the_energy(tmp_path, data):
    sampler = ready(tmp_path, data, n_reference=3)
    sampler.fit_energy()
    states = torch.randn(6, S)
    torch.manual_seed(1)
    found = sampler.sample(states, torch.zeros(3, dtype=int), torch.zeros(3, dtype=int))
    torch.manual_seed(1)
    expected = sample_actions(sampler.behavior, states, 3, sampler.energy, 3.0, 3)
    assert found.shape == (6, 3, A) and torch.equal(found, expected)
    torch.manual_seed(1)
    assert not torch.equal(found, sample_actions(sampler.behavior, states, 3, steps=3))


def test_without_guidance_they_are_those_of_the_behavior(tmp_path, data):
    sampler, states = sampler_of(tmp_path, data, guidance_scale=0), torch.randn(6, S)
    torch.manual_seed(1)
    found = sampler.sample(states, torch.zeros(3, dtype=int), torch.zeros(3, dtype=int))
    torch.manual_seed(1)
    assert torch.equal(found, sample_actions(sampler.behavior, states, steps=3))


def test_resampled_actions_are_those_of_the_rows_drawn_by_q(tmp_path, data):
    """Of the support actions of each row's own state, with probability softmax(s beta_E Q)."""
    draws, online_states = 20_000, torch.randn(300, S)
    settings = dict(reference="resample", n_reference=draws, energy_normalize=False)
    settings |= dict(energy_beta=0.5, guidance_scale=2.0)
    sampler = sampler_of(tmp_path, data, online_states, **settings)
    sampler.add_support(20)
    for support in (sampler.support, sampler.online_support):
        support.uniform_(-1, 1)  # drawn ones may coincide at the bounds
    offline_rows, online_rows = torch.tensor([7, 0]), torch.tensor([5, 5, 1])
    states = torch.cat([data[0][offline_rows], online_states[online_rows]])
    support = torch.cat([sampler.support[offline_rows], sampler.online_support[online_rows]])
    torch.manual_seed(0)
    found = sampler.sample(states, offline_rows, online_rows)
    assert found.shape == (5, draws, A)
    is_action = (found[:, :, None] == support[:, None]).all(-1)
    assert (is_action.sum(-1) == 1).all()
    expected = (2.0 * 0.5 * q_of(states[:, None].expand(-1, 4, -1), support)).softmax(-1)
    torch.testing.assert_close(is_action.float().mean(1), expected, rtol=0, atol=0.015)
    assert (expected.amax(-1) - expected.amin(-1)).min() > 0.05  # else the test would see nothing


# --- Checkpoints ---


@pytest.mark.parametrize(
    "settings", [{}, {"reference": "resample"}, {"guidance_scale": 0}], ids=str
)
def test_a_sampler_goes_on_from_its_state(tmp_path, data, settings):
    online_states = torch.randn(300, S)
    first, other = (sampler_of(tmp_path, data, online_states, **settings) for _ in range(2))
    first.add_support(20)
    first.fit_energy()
    states, rows = torch.randn(6, S), torch.tensor([0, 3, 19])
    first.sample(states, rows, rows)
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    results = []
    for sampler in (first, other):
        torch.manual_seed(2)
        loss = sampler.train()
        sampler.add_support(130)
        state = sampler.state_dict()
        assert state.pop("behavior") == first.state_dict()["behavior"]
        results.append((loss, sampler.sample(states, rows, rows), state))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    if sampler.has_support:
        assert sampler.n_online == sampler.n_added == 130
        assert not (sampler.online_support[20:130] == 0).all()


def test_a_resumed_sampler_says_that_its_behavior_model_is_another(tmp_path, data, capsys):
    sampler = sampler_of(tmp_path, data)
    state = copy.deepcopy(sampler.state_dict())
    sampler.load_state_dict(state)
    assert "another behavior model" not in capsys.readouterr().out
    with torch.no_grad():
        next(sampler.behavior.parameters()).mul_(1.001)
    sampler.load_state_dict(state)
    assert "resuming with another behavior model" in capsys.readouterr().out
    del state["behavior"]  # a checkpoint of before
    sampler.load_state_dict(state)
    assert not capsys.readouterr().out


def test_progress_is_printed_at_tenths_and_after_a_minute(monkeypatch, capsys):
    now = iter([0.0, 20.0, 61.0, 90.0, 120.0, 150.0, 300.0])
    monkeypatch.setattr(diffusion.sampler.time, "monotonic", lambda: next(now))
    report = diffusion.sampler.progress("it", 100)
    for done in (1, 2, 3, 25, 26):
        report(done)
    report(100, held_out_loss=0.5)
    assert capsys.readouterr().out.splitlines() == [
        "it: 2 of 100 after 1 min",
        "it: 25 of 100 after 2 min",
        "it: 100 of 100 after 5 min, held out loss 0.5000",
    ]


def test_a_model_is_one_of_its_states_and_actions(tmp_path, data):
    sampler = sampler_of(tmp_path, data)
    assert isinstance(sampler.behavior, BehaviorModel) and sampler.behavior.action_dim == A
    assert sampler.behavior.state_features.in_features == S
