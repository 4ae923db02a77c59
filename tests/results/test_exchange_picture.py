"""results/exchange.py, scores.py, deviation.py: returns and AUC by hand, a small run end to end."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dare_iql
import deviation
import exchange
import reference
import scores
from d4rl_gymnasium.files import load, save
from lib.records import read_rows

DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
ENV = "hopper-medium-v2"


def transitions(states, next_states, rewards, terminals):
    """A batch with one-dimensional states."""
    columns = [torch.tensor(x, dtype=torch.float32) for x in (states, next_states)]
    rewards, terminals = (torch.tensor(x, dtype=torch.float32) for x in (rewards, terminals))
    actions = torch.zeros(len(rewards), 1)
    state, next_state = (x[:, None] for x in columns)
    return dare_iql.TensorBatch(state, actions, rewards, next_state, terminals)


def test_returns_end_where_an_episode_does(monkeypatch):
    """Three episodes: one that terminates, one cut short, and one cut short after HORIZON steps."""
    monkeypatch.setattr(exchange, "HORIZON", 3)
    states = [0, 1, 10, 11, 20, 21, 22, 23]
    next_states = [1, 2, 11, 12, 21, 22, 23, 24]
    rows = transitions(states, next_states, [1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 0, 0, 0, 0, 0, 0])
    found = exchange.returns_to_go(rows, 0.5)
    unknown = np.nan
    expected = [1 + 2 / 2, 2, unknown, unknown, 5 + 6 / 2 + 7 / 4 + 8 / 8, 6 + 7 / 2 + 8 / 4]
    np.testing.assert_allclose(found, [*expected, unknown, unknown])


@pytest.mark.parametrize(
    "rule, exchanged", [({}, 0.4), ({"max_exchange": 4}, 0.25), ({"exchange": "random"}, 0.4)]
)
def test_returns_and_q_are_those_of_the_rows_that_move_and_stay(monkeypatch, rule, exchanged):
    """Bad rows, of reward -1, lie at action 3, good ones at 0; the reference is 0."""
    n, n_bad = 200, {"offline": 80, "online": 120}

    def half(n_bad):
        bad = torch.arange(n) < n_bad
        reward = torch.where(bad, -1.0, 1.0)
        found = transitions(range(n), range(n), reward.tolist(), [1] * n)
        return found._replace(actions=torch.where(bad, 3.0, 0.0)[:, None])

    def in_order(high, size):
        return torch.arange(*size)

    settings = {"exchange": "gaussian", "max_exchange": 1000, "n_offline": 16, "seed": 0}
    settings |= {"reference": "guided", "env": "x", "discount": 0.9, "precision": "fp32"}
    config = SimpleNamespace(**settings | {"align": "gaussian_kl"} | rule)
    sampler = SimpleNamespace(sample=lambda states, i, j: torch.zeros(len(states), 1, 1))
    trainer = SimpleNamespace(q_target=lambda states, actions: 10 * actions[:, 0])
    run = dare_iql, config, 7, trainer, sampler, *map(half, n_bad.values())
    monkeypatch.setattr(exchange, "restored", lambda folder: run)
    monkeypatch.setattr(exchange, "N_ROWS", n)
    monkeypatch.setattr(torch, "randint", in_order)  # each row once
    found = exchange.rows_of(Path("runs/name/env/seed_0"))
    groups = {row["group"]: row for row in found if "group" in row}
    assert found[0]["exchanged"] == pytest.approx(exchanged)
    m = round(exchanged * n)
    assert {k: row["n"] for k, row in groups.items()} == {
        "offline, kept": n - m,
        "offline, moved": m,
        "online, kept": n - m,
        "online, moved": m,
    }
    means = {k: (row["return"], row["q"]) for k, row in groups.items()}
    if config.exchange == "random":
        assert -1 < means["offline, moved"][0] < 1
        return
    assert means["offline, moved"] == (-1, 30) and means["online, moved"] == (1, 0)
    bad = (n_bad["offline"] - m) / (n - m)
    assert means["offline, kept"] == pytest.approx((1 - 2 * bad, 30 * bad))


def test_the_newest_fifth_of_the_online_rows_is_told_apart_by_itself(monkeypatch):
    """It alone lies far from the reference, at a score of 4.5."""
    n = 100
    rows = transitions(range(n), range(n), [0] * n, [1] * n)
    offline = rows._replace(actions=torch.where(torch.arange(n) % 2 == 1, 1.0, 0.1)[:, None])
    online = rows._replace(actions=torch.where(torch.arange(n) < 80, 0.5, 3.0)[:, None])
    sampler = SimpleNamespace(
        sample=lambda states, i, j: torch.zeros(len(states), 1, 1),
        **{"n_online": torch.tensor(n), "q_spread": torch.ones(()), "n_spreads": torch.zeros(())},
    )
    config = dare_iql.TrainConfig(env="hopper-medium-v2", device="cpu")
    run = dare_iql, config, 60, None, sampler, offline, online
    monkeypatch.setattr(scores, "restored", lambda folder: run)
    monkeypatch.setattr(scores, "N_ROWS", 2_000)
    first, *_ = scores.rows_of(Path("runs/dare_iql/hopper-medium-v2/seed_0"))
    assert first["auc_newest"] == 1
    assert first["auc"] == pytest.approx(0.6, abs=0.05)  # of 0.005 and 0.5 against 0.125, 4.5
    assert first["mu_offline"] == pytest.approx(0.25, abs=0.02)
    assert first["mu_online"] == pytest.approx(1.0, abs=0.1)


def test_reference_policies_are_guided_and_resampled_by_q(monkeypatch):
    """Support actions are 0 and 1, with the action as energy: s = 50 takes 1 alone."""
    support = torch.tensor([0.0, 1.0])[None, :, None].expand(200, -1, 1)
    sampler = SimpleNamespace(behavior=None, energy="f", energies=lambda s, a: a[..., 0])
    config = SimpleNamespace(diffusion_steps=3, n_support=2, guidance_scale=50.0)
    monkeypatch.setattr(reference, "draw_support_actions", lambda b, s, *sizes: support)

    def sample(behavior, states, n, energy, scale, steps):
        return torch.full((len(states), n, 1), float(scale))

    monkeypatch.setattr(reference, "sample_actions", sample)
    _, found = reference.policies(sampler, None, config, [1.0, 3.0])
    states = torch.zeros(200, 1)
    assert (found["resampled 50"](states) == 1).all()
    drawn = [found[k](states)[0, 0].item() for k in ("unguided", "guided 1", "guided 3")]
    assert drawn == [0, 1, 3]
    config.guidance_scale = 0.0
    _, found = reference.policies(sampler, None, config, [])
    assert 0.3 < found["resampled 0"](states).mean() < 0.7


def test_the_deviation_is_the_mean_over_the_components(tmp_path):
    actor = {"log_std": torch.tensor([0.0, 2.0])}
    save(tmp_path / "x.pt", {"trainer": {"actor": actor}, "step": 7})
    expected = pytest.approx((1 + math.e**2) / 2), 7
    assert deviation.std_of(tmp_path / "x.pt") == expected


def test_auc_is_the_share_of_pairs_and_ties_count_half():
    x, y = torch.randint(6, (40,)).float(), torch.randint(2, 9, (25,)).float()
    pairs = (x[:, None] < y).double() + (x[:, None] == y).double() / 2
    assert scores.auc(x, y) == pytest.approx(pairs.mean().item(), abs=1e-12)
    assert scores.auc(x, x) == pytest.approx(0.5, abs=1e-12) and scores.auc(y - 10, x) == 1.0


def test_readings_are_distinct_and_one_is_the_runs_own():
    found = scores.readings(8.0)
    assert {"guidance_scale": 8.0, "n_reference": 1, "align": "gaussian_kl"} in found
    assert len({tuple(x.values()) for x in found}) == len(found) == 7
    assert len(scores.readings(1.0)) == 5
    assert {x["guidance_scale"] for x in scores.readings(0.0)} == {0.0}  # it has no energy
    assert {x["guidance_scale"] for x in scores.readings(0.0, "resample")} == {0.0, 1.0}
    own = [x["align"] for x in scores.readings(8.0, align="mahalanobis")]  # of an edited script
    assert len(own) == 8 and own[-2:] == ["softmax_kl", "mahalanobis"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Command line of small runs of dare_iql.py in a folder of this module."""
    settings = dict(data=DATA, device="cpu", n_episodes=1, n_support=2, n_support_states=20)
    settings |= dict(behavior_iterations=5, behavior_batch_size=8, behavior_width=8)
    settings |= dict(energy_hidden=8, energy_iterations=2, energy_batch_size=8, diffusion_steps=2)
    settings |= dict(hidden_dim=8, batch_size=16, offline_iterations=2, log_freq=10)
    settings |= dict(initial_collection_steps=30, eval_freq=100, wandb="disabled")
    settings |= dict(env=ENV, runs_dir=tmp_path_factory.mktemp("runs"))
    return [x for key, value in settings.items() for x in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def train(flags):
    """Runs dare_iql.py to an online step, and returns the run's folder."""

    def run(name, step, *more):
        dare_iql.main([*flags, "--name", name, "--online_iterations", str(step), *more])
        return Path(flags[-1], name, ENV, "seed_0")

    return run


@pytest.fixture(scope="module")
def folder(train):
    """A guided run, at step 90."""
    return train("dare_iql", 90)


@pytest.fixture
def call(monkeypatch):
    """Calls main of a program with a command line, after which its table is read."""
    monkeypatch.setattr(exchange, "N_ROWS", 200)
    monkeypatch.setattr(scores, "N_ROWS", 200)

    def table_of(program, *args):
        monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, args)])
        program.main()
        return read_rows(args[args.index("--csv") + 1])

    return table_of


def test_two_steps_of_a_run_are_described_and_drawn(tmp_path, train, folder, call, capsys):
    table, picture = tmp_path / "rows.csv", tmp_path / "x.png"
    args = "--csv", table, "--picture", picture
    first = call(exchange, train("two_steps", 60), *args)
    assert call(exchange, train("two_steps", 90), *args)[: len(first)] == first
    rows = call(exchange, folder.parents[1].with_name("two_steps") / ENV / "seed_0", *args)
    assert rows[: len(first)] == first  # the same step again takes its place
    assert {row["step"] for row in rows} == {60, 90}
    for step in (60, 90):
        bins = [row for row in rows if row["step"] == step and "score" in row]
        width = bins[1]["score"] - bins[0]["score"]
        for half in ("offline", "online"):
            assert 0.9 < sum(row[half] for row in bins) * width < 1.0 + 1e-4
        groups = {row["group"]: row["n"] for row in rows if row["step"] == step and "group" in row}
        assert set(groups) == {
            f"{x}, {y}" for x in ("offline", "online") for y in ("kept", "moved")
        }
        assert 0 < sum(groups.values()) <= 400
    assert picture.stat().st_size > 5_000
    assert "step 90: online, moved: " in capsys.readouterr().out
    both = call(exchange, folder, *args)  # another run: a table may have several
    assert both[: len(rows)] == rows and {row["name"] for row in both} == {"two_steps", "dare_iql"}


def test_readings_of_a_score_do_not_depend_on_their_order(
    tmp_path, train, folder, call, monkeypatch
):
    table, readings = tmp_path / "auc.csv", scores.readings
    rows = call(scores, folder, "--csv", table)
    assert len(rows) == 7 and {row["step"] for row in rows} == {90}
    assert all(0 <= row[k] <= 1 for row in rows for k in ("auc", "auc_newest"))
    assert len({(row["auc"], row["mu_offline"], row["mu_online"]) for row in rows}) == 7
    assert call(scores, folder, "--csv", table) == rows  # the same step again takes its place
    monkeypatch.setattr(scores, "readings", lambda *args: readings(*args)[::-1])
    assert call(scores, folder, "--csv", table) == rows[::-1]

    resampled = train("resample", 60, "--reference", "resample")
    monkeypatch.setattr(scores, "readings", readings)
    once = [r for r in call(scores, resampled, "--csv", table) if r["name"] == "resample"]
    monkeypatch.setattr(scores, "readings", lambda *args: readings(*args)[::-1])
    again = [r for r in call(scores, resampled, "--csv", table) if r["name"] == "resample"]
    assert again == once[::-1]
    assert len({(row["auc"], row["mu_offline"], row["mu_online"]) for row in once}) == 7


def test_scores_are_the_same_with_a_behavior_model_that_is_fitted_again(tmp_path, train, call):
    folder = train("no_cache", 60)
    rows = call(scores, folder, "--csv", tmp_path / "auc.csv")
    cached = list((folder.parents[2] / "cache").glob("*.pt"))
    for file in cached:
        file.unlink()
    assert cached and call(scores, folder, "--csv", tmp_path / "auc.csv") == rows


def test_the_deviation_of_a_run_is_that_of_its_files(tmp_path, folder, call):
    table = tmp_path / "std.csv"
    row, *_ = call(deviation, folder, "--csv", table)
    assert call(deviation, folder, "--csv", table) == [row]  # the same run again takes its place
    assert [row[k] for k in ("method", "seed", "step")] == ["dare_iql", 0, 90]
    for name, column in (("offline.pt", "before"), ("checkpoint.pt", "after")):
        log_std = load(folder / name)["trainer"]["actor"]["log_std"]
        assert row[column] == pytest.approx(log_std.exp().mean().item(), rel=1e-5)


def test_what_is_no_run_with_a_known_exchange_is_refused(tmp_path, train, call, monkeypatch):
    table = tmp_path / "rows.csv"
    for program in (exchange, scores, deviation):
        with pytest.raises(SystemExit, match="has no config.yaml: name the folder of a run"):
            call(program, tmp_path, "--csv", table)
    with pytest.raises(SystemExit, match="is no run of dare_iql.py, or a copy"):
        call(exchange, train("none", 60, "--exchange", "none"), "--csv", table)
    monkeypatch.setitem(dare_iql.CHOICES, "exchange", ("gaussian", "classifier"))
    folder = train("classifier", 60)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("exchange: gaussian", "exchange: classifier"))
    with pytest.raises(SystemExit, match="has --exchange classifier: add this rule to rows_of"):
        call(exchange, folder, "--csv", table)
    assert not table.exists()
