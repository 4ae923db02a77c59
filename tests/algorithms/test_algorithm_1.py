"""Lines 5 to 10 of Algorithm 1 as a run does them: which rows are compared, exchanged, learned."""

from types import SimpleNamespace

import pytest
import torch
from tiny_runs import AGENTS, GROUPS, rows, run

GAUSSIAN = dict(exchange="gaussian", max_exchange=1)
DIRECT = dict(exchange="direct", align="softmax_kl")


@pytest.fixture(params=GROUPS, ids=lambda group: group.dare.__name__)
def passes(request, monkeypatch, tmp_path):
    """Runs DARE with references that are known; returns what each pass looked at and did."""
    script, found = request.param.dare, []

    class Sampler:
        """References far from the first offline rows and near all others."""

        n_online = torch.tensor(3)

        def __init__(self, config, states, actions, online_states, q_function, accelerate):
            self.states, self.online_states = states, online_states
            self.q_function, self.calls = q_function, []

        def add_support(self, n_states):
            self.calls.append(f"add_support {n_states}")

        def fit_energy(self):
            self.calls.append("fit_energy")

        def train(self):
            self.calls.append("train")
            return {"energy_loss": torch.tensor(0.25)}

        def sample(self, states, offline_rows, online_rows):
            self.calls.append("sample")
            noise = torch.randn(len(states), 2, 3)
            noise[: len(offline_rows) // 2] *= 5.0
            here = {"sampler": self, "states": states, "i": offline_rows, "j": online_rows}
            halves = zip(buffers, (offline_rows, online_rows), strict=True)
            here |= {"halves": [buffer.rows(index) for buffer, index in halves]}
            found.append(here | {"references": noise})
            return noise

        def state_dict(self):
            return {}

    class Buffer(script.ReplayBuffer):
        """Keeps the buffers of the run."""

        def __init__(self, *args):
            super().__init__(*args)
            buffers.append(self)

    agent = getattr(script, AGENTS[script])
    train, buffers = agent.train, []

    def watched(trainer, batch):
        log_dict = train(trainer, batch)
        if trainer.online:
            found[-1] |= {"batch": batch, "q_target": trainer.q_target}
        return log_dict

    def passes_of(**settings):
        monkeypatch.setattr(script, "EnergyGuidedSampler", Sampler)
        monkeypatch.setattr(script, "ReplayBuffer", Buffer)
        monkeypatch.setattr(agent, "train", watched)
        sizes = dict(offline_iterations=0, online_iterations=8, initial_collection_steps=6)
        path = run(script, tmp_path, **sizes, log_freq=1, **settings)
        assert len(found) == 2
        return SimpleNamespace(script=script, path=path, found=found, buffers=buffers)

    return passes_of


@pytest.mark.parametrize("settings", [GAUSSIAN, DIRECT], ids=["gaussian", "direct"])
def test_rows_change_sides_by_their_scores(passes, settings):
    result = passes(**settings)
    script, logged = result.script, rows(result.path, "train", "online")[-2:]
    for here, row in zip(result.found, logged, strict=True):
        # Line 5: the rows that were drawn, 16 of each buffer.
        halves = here["halves"]
        assert [len(x.rewards) for x in halves] == [16, 16]
        states, actions = (torch.cat([x[k] for x in halves]) for k in (0, 1))
        assert torch.equal(here["states"], states)
        # Lines 6 to 8.
        align = settings.get("align", "gaussian_kl")
        scores = script.alignment_score(actions, here["references"], align).split(16)
        if settings["exchange"] == "gaussian":
            *expected, exchanged, separation = script.exchange(*halves, *scores, 1)
            assert exchanged == 1 < script.exchange(*halves, *scores)[2]
        else:
            *expected, exchanged, separation = script.direct_exchange(*halves, *scores)
            assert exchanged > 1
        # Line 9: the offline half stands first.
        for column, parts in zip(here["batch"], zip(*expected, strict=True), strict=True):
            assert torch.equal(column, torch.cat(parts))
        assert not torch.equal(here["batch"].actions, actions)
        names = "exchanged separation mu_offline mu_online sigma_offline sigma_online".split()
        fits = [x.mean() for x in scores] + [x.std(correction=0) for x in scores]
        for name, value in zip(names, [exchanged, separation, *fits], strict=True):
            assert float(row[name]) == pytest.approx(float(value), rel=1e-6), name
        assert float(row["energy_loss"]) == 0.25


def test_the_sampler_is_fitted_once_and_trained_before_it_draws(passes):
    """And works on the run's own data, buffer and target Q."""
    result = passes()
    sampler = result.found[0]["sampler"]
    once = ["add_support 6", "fit_energy"]
    assert sampler.calls == [*once, "train", "sample", "add_support 7", "train", "sample"]
    offline, online = (buffer.rows(slice(None)) for buffer in result.buffers)
    assert torch.equal(sampler.states, offline.observations)
    # Filled after the sampler was made, which sees it.
    assert torch.equal(sampler.online_states, online.observations)
    assert sampler.online_states[7].any()
    assert sampler.q_function is result.found[0]["q_target"]


@pytest.mark.parametrize("reference, n_rows", [("resample", 3), ("guided", 7)])
def test_resampling_draws_online_rows_with_support_actions_alone(passes, reference, n_rows):
    result = passes(reference=reference, batch_size=256)
    drawn = result.found[-1]["j"]
    assert drawn.min() == 0 and drawn.max() == n_rows - 1


def test_a_random_exchange_moves_as_many_rows_and_not_those_by_the_scores(passes):
    result = passes(exchange="random")
    for here in result.found:
        actions = torch.cat([x.actions for x in here["halves"]])
        scores = result.script.alignment_score(actions, here["references"]).split(16)
        *by_scores, exchanged, _ = result.script.exchange(*here["halves"], *scores)
        assert exchanged > 1
        expected = torch.cat([x.actions for x in by_scores])
        assert not torch.equal(here["batch"].actions, expected)
        changed = (here["batch"].actions != actions).any(1)
        assert changed[:16].sum() == changed[16:].sum() == exchanged
