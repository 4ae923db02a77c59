"""Records of runs that were never made."""

import numpy as np
import yaml

from lib.records import Record, csv_text

HC, H, W = (f"{robot}-medium-v2" for robot in ("halfcheetah", "hopper", "walker2d"))
MAZE = "antmaze-umaze-v2"
PAPER = {"data": "d4rl", "offline_iterations": 1_000_000, "online_iterations": 200_000}
SMALL = {"data": "regenerated", "offline_iterations": 20_000, "online_iterations": 40_000}
SMALL |= {"regenerated_size": 200_000, "batch_size": 256, "hidden_dim": 256}
SIZES = "data regenerated (200,000 transitions), 20,000 offline updates, 40,000 online steps, "
SIZES += "batches of 256, layers of 256"


def run(method, env, seed, scores, train=(), **settings):
    """A record whose online evaluations lie evenly between step 0 and the last."""
    settings = SMALL | {"eval_freq": 10_000, "initial_collection_steps": 0} | settings
    steps = np.linspace(0, settings["online_iterations"], len(scores)).astype(int)
    rows = [{"phase": "online", "step": int(s), "d4rl_normalized_score": float(x)}
            for s, x in zip(steps, scores, strict=True)]  # fmt: skip
    return Record(method, env, seed, settings, rows, list(train))


def flat(method, env, values, **settings):
    """Runs with a constant score each, seeds 0, 1, ..."""
    return [run(method, env, i, [x] * 5, **settings) for i, x in enumerate(values)]


def exchange_rows(values):
    """Log rows of the means of both halves and of the exchanged pairs."""
    return [
        {"phase": "online", "step": 100 * i, "mu_offline": a, "mu_online": b, "separation": 1.5,
         "exchanged": m}
        for i, (a, b, m) in enumerate(values)
    ]  # fmt: skip


def write_runs(records, runs_dir):
    """Lay records down as the scripts do, finished."""
    for record in records:
        folder = runs_dir / record.method / record.env / f"seed_{record.seed}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(record.settings))
        end = {"phase": "online", "step": record.settings["online_iterations"]}
        (folder / "eval.csv").write_text(csv_text(record.eval))
        (folder / "train.csv").write_text(csv_text([*record.train, end]))
    return runs_dir
