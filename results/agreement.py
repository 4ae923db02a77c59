"""How far cheaper reference actions change DARE's exchange: python results/agreement.py RUN_DIR

RUN_DIR is a finished DARE run with guided reference actions. Batches are drawn from its data and
its online buffer as fine-tuning draws them; each is scored and exchanged with the run's own setting
and with others, and a line says how the others compare with it: the correlation of the scores, the
share of rows that end in the same half, and the share of the exchanged pairs' rows in common.
"fresh noise" is the run's own setting once more: the agreement that chance leaves. Solver steps are
compared at equal noise; resampled actions have noise of their own.
"""

import argparse
import dataclasses
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))

import d4rl_gymnasium as d4rl  # noqa: E402

# Settings that are compared with the run's own.
OTHERS = {"fresh noise": {}}
OTHERS |= {f"{n} steps": {"diffusion_steps": n} for n in (30, 12, 10, 8, 6, 4)}
OTHERS |= {"resample": {"reference": "resample"}}
OTHERS |= {f"{m} references": {"n_reference": m} for m in (4, 16)}
OTHERS |= {"resample, 16 references": {"reference": "resample", "n_reference": 16}}


def load_run(path: Path):
    """Script, DARE and settings of a finished run, as they were at its end."""
    cfg_values = yaml.safe_load((path / "config.yaml").read_text())
    script = importlib.import_module("dare_iql" if "iql_tau" in cfg_values else "dare_cql")
    # The cache lies beside the run, wherever both were moved to.
    cfg = script.Config(**cfg_values | {"runs_dir": str(path.resolve().parents[2])})
    if cfg.reference != "guided" or cfg.exchange == "none" or cfg.guidance_scale == 0:
        sys.exit(f"error: {path} is not a run with guided reference actions and an exchange")
    try:
        dataset = d4rl.qlearning_dataset(
            cfg.env, data=cfg.data, regenerated_size=cfg.regenerated_size
        )
    except d4rl.DatasetError as e:
        sys.exit(f"error: {e}")
    dims = dataset["observations"].shape[1], dataset["actions"].shape[1]
    dataset["mc_returns"] = np.zeros(len(dataset["rewards"]))
    offline, online = (
        script.ReplayBuffer(*dims, size, "cpu")
        for size in (len(dataset["rewards"]), cfg.online_iterations)
    )
    scale, bias = script.reward_transform(dataset, cfg)
    dataset["rewards"] = dataset["rewards"] * scale + bias
    if script.__name__ == "dare_cql":
        dataset["mc_returns"] = script.monte_carlo_returns(dataset, cfg)
    offline.add(*(dataset[name] for name in script.Batch._fields))
    state = script.load(path / "checkpoint.pt")
    if state["phase"] != "online":
        sys.exit(f"error: {path} has not begun its online phase")
    kind = "ImplicitQLearning" if script.__name__ == "dare_iql" else "CalQL"
    agent = getattr(script, kind)(*dims, cfg, "cpu")
    agent.load_state_dict(state["agent"])
    online.load_state_dict(state["online_buffer"])
    digest = offline.digest(sum(dims))  # of states and actions alone, as in the script
    in_cache(script, cfg, "behavior", script.BEHAVIOR_FIELDS, digest)
    in_cache(script, cfg, "support", script.SUPPORT_FIELDS, digest)
    dare = script.DARE(cfg, SimpleNamespace(stop=False), agent, offline, online)
    dare.load_state_dict(state["dare"])
    return script, dare


def in_cache(script, cfg, kind: str, fields: list, digest: str) -> Path:
    """Path of what a run keeps in its cache; exits if it is gone, as anew it would take hours."""
    with script.cached(cfg, kind, fields, digest) as path:
        if not path.exists():
            sys.exit(f"error: {path} is missing; bring back the cache or repeat the run")
        return path


def others_of(dare) -> list:
    """Names of what can be compared: resampling needs the support actions of all dataset states."""
    complete = len(dare.states) == dare.offline_buffer.size
    return [name for name in OTHERS if complete or "resample" not in name]


class Rows(NamedTuple):
    """A batch of nothing but the numbers of its rows."""

    rows: torch.Tensor


def pass_of(script, dare, batch, seed: int):
    """Scores of a batch and which of its rows end in the offline half."""
    torch.manual_seed(seed)
    n, cfg = dare.cfg.n_offline, dare.cfg
    references = dare.reference_actions(batch.observations)
    scores = script.alignment_score(batch.actions, references, cfg.align)
    rows = torch.arange(len(scores))  # in the batch's place: they show who changed sides
    offline_like, _, exchanged, _ = script.exchange(
        Rows(rows[:n]), Rows(rows[n:]), scores[:n], scores[n:], cfg.max_exchange
    )
    return scores, torch.isin(rows, offline_like.rows), exchanged.item()


def compare(script, dare, seed: int) -> dict:
    """Correlation, share of equal sides, share of common exchanges and M for one batch."""
    own, found = dare.cfg, {}
    torch.manual_seed(seed)
    dare.online_buffer.n_drawable.fill_(dare.n_online)  # rows that have support actions
    offline_batch = dare.offline_buffer.sample(own.n_offline)
    online_batch = dare.online_buffer.sample(own.batch_size - own.n_offline)
    batch = script.concatenate(offline_batch, online_batch)
    start = torch.arange(own.batch_size) < own.n_offline
    scores, side, _ = pass_of(script, dare, batch, seed)
    for name in others_of(dare):
        settings = OTHERS[name]
        dare.cfg = dataclasses.replace(own, **settings)
        other = pass_of(script, dare, batch, seed + (name == "fresh noise"))
        both, any_ = (side != start) & (other[1] != start), (side != start) | (other[1] != start)
        correlation = torch.corrcoef(torch.stack([scores, other[0]]))[0, 1].item()
        common = (both.sum() / any_.sum()).item()  # NaN where neither exchanges
        found[name] = [correlation, (side == other[1]).float().mean().item(), common, other[2]]
    dare.cfg = own
    return found


@torch.no_grad()
def main():
    """Print a line for each setting: means over batches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--guidance_scale", type=float, help="instead of the run's own")
    args = parser.parse_args()
    if not (args.run_dir / "summary.yaml").exists():
        sys.exit(f"error: {args.run_dir} holds no finished run")
    torch.set_num_threads(1)
    script, dare = load_run(args.run_dir)
    if args.guidance_scale is not None:
        dare.cfg = dataclasses.replace(dare.cfg, guidance_scale=args.guidance_scale)
    batches = [compare(script, dare, 1_000 * seed) for seed in range(args.batches)]
    cfg = dare.cfg
    print(f"{cfg.name}, {cfg.env}, {Path(cfg.data).name}: {cfg.diffusion_steps} steps, guidance "
          f"{cfg.guidance_scale:g}, {args.batches} batches of {cfg.batch_size}")  # fmt: skip
    print(f"{'setting':28}{'correlation':>12}{'same half':>12}{'common':>12}{'M':>8}")
    for name in others_of(dare):
        means = np.nanmean([batch[name] for batch in batches], 0)
        print(f"{name:28}{means[0]:12.3f}{means[1]:12.3f}{means[2]:12.3f}{means[3]:8.1f}")


if __name__ == "__main__":
    main()
