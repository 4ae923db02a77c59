"""Whole runs at tiny sizes: what they write, which methods agree, what other settings change."""

import math
import time

import pytest
import torch
import yaml
from tiny_runs import (
    AGENTS,
    SETTINGS,
    assert_equal,
    assert_same_end,
    checkpoint,
    config_of,
    directory,
    last_line,
    rows,
    run,
)

import iql

DARE_COLUMNS = """exchanged exchanged_by_chance auc separation mu_offline mu_online
    sigma_offline sigma_online energy_loss""".split()


# --- Files of a run ---


def test_files_of_a_finished_run(finished):
    names = "config.yaml eval.csv train.csv checkpoint.pt offline.pt curve.png lock"
    assert {p.name for p in finished.iterdir()} == set(names.split())
    assert (finished / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    state = checkpoint(finished)
    assert (state["phase"], state["step"]) == ("online", 200)
    assert state["trainer"]["total_it"] == 200 + 140
    assert len(state["online_buffer"]["rows"]) == 200
    # Support actions of the 60 states of the first exchange and of as many more; then of 100 more.
    assert list(state["sampler"]["online_support"].shape) == [120, 2, 3]


def test_config_yaml_makes_the_same_settings_again(group, finished):
    """But for the run's name and place, which another script or another run has of its own."""
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert (settings["hidden_dim"], settings["guidance_scale"]) == (16, 8.0)
    assert not {"name", "runs_dir"} & settings.keys()
    assert group.dare.TrainConfig(**settings, runs_dir=str(finished.parents[2])) == config_of(
        group.dare, finished.parents[2]
    )


def test_fine_tuning_uses_the_online_losses_and_a_constant_rate(group, finished, baseline):
    for path in (finished, baseline):
        trainer = checkpoint(path)["trainer"]
        assert trainer["online"] is True
        rates = [float(g["lr"]) for g in trainer["optimizer"]["param_groups"]]
        assert rates == pytest.approx(group.learning_rates, rel=1e-7)


def test_eval_csv(finished):
    found = rows(finished, "eval")
    columns = "phase step return_mean return_std d4rl_normalized_score"
    assert list(found[0]) == columns.split()
    steps = "offline 100, offline 200, online 0, online 100, online 200"
    assert ", ".join(f"{r['phase']} {r['step']}" for r in found) == steps
    for row in found:
        score = 100 * (float(row["return_mean"]) + 20.272305) / (3234.3 + 20.272305)  # D4RL's
        assert float(row["d4rl_normalized_score"]) == pytest.approx(score)
        assert float(row["return_std"]) >= 0
    # Fine-tuning starts from the offline agent, and evaluations are seeded.
    assert found[1]["return_mean"] == found[2]["return_mean"] != found[3]["return_mean"]


def test_train_csv(group, finished):
    assert {"steps_per_second", *group.columns, *DARE_COLUMNS} <= set(rows(finished, "train")[0])
    for phase in ("offline", "online"):
        found = rows(finished, "train", phase)
        assert [int(r["step"]) for r in found] == list(range(40, 201, 40))
        for row in found:
            updated = phase == "offline" or int(row["step"]) > 60
            assert float(row["steps_per_second"]) > 0
            assert all((row[k] != "") == updated for k in group.columns)
            assert all((row[k] != "") == (updated and phase == "online") for k in DARE_COLUMNS)
    exchanged = [float(r["exchanged"]) for r in found if r["exchanged"]]
    assert 0 <= min(exchanged) < max(exchanged) <= 16
    assert all(0 < float(r["auc"]) < 1 for r in found if r["auc"])


@pytest.mark.parametrize("name", ["eval.csv", "train.csv", "config.yaml"])
def test_lines_end_in_one_way(finished, name):
    text = (finished / name).read_bytes()
    assert b"\r" not in text and text.endswith(b"\n") and b"\n\n" not in text


def test_rows_are_means_over_the_steps_since_the_last_row(monkeypatch, group, tmp_path):
    """Of 2 updates a step, some before a checkpoint and some after it."""
    logged, script = [], group.baseline
    agent = getattr(script, AGENTS[script])
    train = agent.train

    def watched(*args):
        log_dict = train(*args)
        logged.append(log_dict["q"].item())
        return log_dict

    monkeypatch.setattr(agent, "train", watched)
    sizes = dict(offline_iterations=0, online_iterations=10, initial_collection_steps=2)
    path = run(script, tmp_path, **sizes, log_freq=4, checkpoint_freq=3, utd=2)
    assert len(logged) == 16
    means = [sum(logged[i:j]) / (j - i) for i, j in ((0, 4), (4, 12), (12, 16))]
    found = rows(path, "train")
    assert [r["step"] for r in found] == ["4", "8", "10"]
    assert [float(r["q"]) for r in found] == pytest.approx(means, rel=1e-5)


def test_the_end_of_a_run_names_its_scores(group, tmp_path, capsys):
    """The last four evaluations, or those that there are; the agent's before fine-tuning first."""
    sizes = dict(offline_iterations=0, online_iterations=6, initial_collection_steps=5)
    sizes |= dict(eval_freq=1, n_episodes=1)
    path = run(group.baseline, tmp_path, **sizes)
    scores = [float(r["d4rl_normalized_score"]) for r in rows(path, "eval", "online")]
    assert len(scores) == 7
    before, last = f"{scores[0]:.1f}", f"{sum(scores[-4:]) / 4:.1f}"
    expected = f"score before fine-tuning {before}, mean of the last four evaluations {last}\n"
    assert expected in capsys.readouterr().out


# --- Which methods agree ---


def test_dare_without_exchange_and_online_loss_is_its_baseline(group, baseline, tmp_path):
    path = run(group.dare, tmp_path, exchange="none", online_loss="none")
    assert_same_end(path, baseline, settings=False)
    assert not (tmp_path / "cache").exists()


def test_the_offline_agents_of_a_group_are_the_same(group, finished, baseline):
    found, expected = (torch.load(p / "offline.pt")["trainer"] for p in (finished, baseline))
    assert_equal(found, expected)
    assert found["online"] is False and found["total_it"] == 200
    assert rows(baseline, "eval", "offline") == rows(finished, "eval", "offline")


def test_a_config_of_the_baseline_is_filed_under_the_method_that_reads_it(
    group, baseline, tmp_path
):
    settings = yaml.safe_load((baseline / "config.yaml").read_text())
    sizes = dict(offline_iterations=0, online_iterations=0)
    own = SETTINGS[group.dare] | settings | sizes | {"exchange": "none"}
    group.dare.train(group.dare.TrainConfig(**own, runs_dir=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == [group.dare.__name__]


def test_a_cached_behavior_model_changes_no_result(group, finished, cached_runs, capsys):
    path = run(group.dare, cached_runs)
    output = capsys.readouterr().out
    for kind in ("behavior", "support-50"):
        assert f"cache hit: {kind} from" in output
    assert_same_end(path, finished)


def test_steps_per_second_are_those_of_steps_alone(monkeypatch, group, finished, cached_runs):
    """Not of evaluations, which take hours here, nor of the behavior model's training."""
    clock, script, sampler = time.perf_counter, group.dare, group.dare.EnergyGuidedSampler
    late, eval_actor = [0.0], script.eval_actor

    def slow(function):
        def slowed(*args, **kwargs):
            late[0] += 10_000.0
            return function(*args, **kwargs)

        return slowed

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    monkeypatch.setattr(script, "eval_actor", slow(eval_actor))
    monkeypatch.setattr(script, "EnergyGuidedSampler", slow(sampler))
    sizes = dict(online_iterations=120, eval_freq=40, load_model=str(finished / "offline.pt"))
    path = run(script, cached_runs, **sizes)
    assert late[0] == 50_000.0
    rates = [float(r["steps_per_second"]) for r in rows(path, "train")]
    assert len(rates) == 3 and min(rates) > 0.1


def test_steps_per_second_count_the_wait_for_a_gpu(tmp_path, monkeypatch):
    """The means of a log row wait until a GPU has made its updates, 8 hours later here."""
    clock, late = time.perf_counter, [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])

    class OnGPU(float):
        def __truediv__(self, n):
            return self

        def item(self):
            late[0] += 8 * 3600.0
            return 1.0

    files = iql.Run(config_of(iql, tmp_path))
    with files.lock:
        files.start()
        files.sums, files.n_sums, files.n_steps = {"q": OnGPU()}, 1, 1_000
        files.log_means("offline", 1_000)
    assert files.rows["train"][0]["steps_per_second"] < 1


# --- Other settings ---


def test_direct_exchange_without_guidance_is_another_run(group, finished, cached_runs):
    settings = dict(exchange="direct", guidance_scale=0, online_loss=group.online_loss)
    settings |= dict(align="softmax_kl", n_reference=3, utd=2, max_exchange=4)
    path = run(group.dare, cached_runs, **settings, online_iterations=120)
    assert checkpoint(path)["trainer"]["total_it"] == 200 + 2 * 60
    row = rows(path, "train", "online")[-1]
    assert row["step"] == "120" and "energy_loss" not in row and float(row["exchanged"]) > 4
    (other,) = (r for r in rows(finished, "train", "online") if r["step"] == "120")
    assert all(row[k] != other[k] for k in [*group.columns, "separation"])


def test_halves_of_other_sizes_are_no_exchange(monkeypatch, group, finished, cached_runs):
    def one_way(offline_batch, online_batch, *rest):
        batches = offline_batch, type(online_batch)(*(x[:-1] for x in online_batch))
        return *batches[::-1], torch.ones(()), torch.zeros(())

    monkeypatch.setattr(group.dare, "exchange", one_way)
    with pytest.raises(AssertionError):
        run(group.dare, cached_runs)


def test_resampled_reference_actions(group, finished, cached_runs, capsys):
    """No energy network is trained; support actions of all states, also online."""
    path = run(group.dare, cached_runs, reference="resample", checkpoint_freq=150)
    state, last = checkpoint(path), rows(path, "train", "online")[-1]
    assert "energy_loss" not in last
    assert float(last["exchanged"]) > 0 and float(last["separation"]) > 0
    assert state["sampler"]["optimizer"]["state"] == {} and state["sampler"]["n_spreads"] == 140
    assert len(state["sampler"]["online_support"]) == 120
    kinds = {x.name.rsplit("-hopper")[0] for x in (cached_runs / "cache").glob("*.pt")}
    assert kinds == {"behavior", "support-50", "support-0"}
    assert "cache hit: behavior" in capsys.readouterr().out
    assert last["separation"] != rows(finished, "train", "online")[-1]["separation"]


def test_what_updates_log_is_summed_by_name_and_anew_with_other_names(group, tmp_path):
    run = group.dare.Run(config_of(group.dare, tmp_path))
    run.sums, run.n_sums = {}, 0  # as of a new run's checkpoint
    for log_dict in ({"q": 1.0, "v": 10.0}, {"v": 20.0, "q": 2.0}):
        run.add({name: torch.tensor(x) for name, x in log_dict.items()})
    assert (run.sums, run.n_sums) == ({"q": 3.0, "v": 30.0}, 2)
    run.add({"q": torch.tensor(5.0), "log_std": torch.tensor(7.0)})  # of an edited script
    assert (run.sums, run.n_sums) == ({"q": 5.0, "log_std": 7.0}, 1)


def test_what_is_logged_with_a_gradient_is_summed_without(group, tmp_path):
    """Else each sum would hold the graphs of all updates, and its checkpoint could not go on."""
    run = group.dare.Run(config_of(group.dare, tmp_path))
    run.sums, run.n_sums = {}, 0
    loss = torch.tensor(2.0, requires_grad=True)
    for _ in range(2):
        run.add({"classifier_loss": 3 * loss})
    assert run.sums == {"classifier_loss": 12.0} and not run.sums["classifier_loss"].requires_grad


# --- Losses and weights that are not finite ---


@pytest.mark.parametrize(
    "settings, phase", [({"qf_lr": 1e9}, "offline"), ({"energy_lr": 1e9}, "online")]
)
def test_a_loss_that_is_not_finite_ends_the_run(group, finished, cached_runs, settings, phase):
    if phase == "online":
        settings |= {"load_model": str(finished / "offline.pt")}
    message = last_line(group.dare, cached_runs, **settings, checkpoint_freq=1000)
    named = ["energy_loss"] if phase == "online" else group.columns
    start, names = message.split(": ", 1)[1].split(": ")
    assert start.startswith(f"not finite at {phase} step ") and names.split(", ")[0] in named
    found = rows(directory(cached_runs, group.dare), "train") if phase == "online" else []
    assert all(math.isfinite(float(r[k])) for r in found for k in r if r[k] and k != "phase")


@pytest.mark.parametrize(
    "updates, phase, reason, saved",
    [
        (50, "offline", "a weight is not finite at offline step 50", None),
        (30, "online", "a weight is not finite at online step 50", 0),
        (80, "online", "a weight is not finite at online step 100", 50),
        (15, "online", "the action has a NaN: [nan nan nan]", 0),
    ],
)
def test_weights_that_break_with_finite_losses_are_not_saved(
    monkeypatch, group, baseline, tmp_path, updates, phase, reason, saved
):
    """As from a gradient that overflows: the loss before it is finite."""
    script, calls = group.baseline, []
    agent = getattr(script, AGENTS[script])
    train = agent.train

    def breaking(trainer, batch):
        log_dict = train(trainer, batch)
        calls.append(None)
        if len(calls) == updates:
            next(trainer.actor.parameters()).data.fill_(math.nan)
        return log_dict

    monkeypatch.setattr(agent, "train", breaking)
    sizes = dict(log_freq=1000, offline_iterations=50, initial_collection_steps=20)
    if phase == "online":
        sizes |= {"load_model": str(baseline / "offline.pt")}
    assert last_line(script, tmp_path, **sizes) == f"error: {reason}"
    path = directory(tmp_path, script)
    if saved is None:
        assert not (path / "checkpoint.pt").exists()
    else:
        state = checkpoint(path)
        assert (state["phase"], state["step"]) == (phase, saved)
        assert all(x.isfinite().all() for x in state["trainer"]["actor"].values())
