"""What the exchange does in a DARE-I run, as in Fig. 1c.

    python results/exchange.py runs/dare_iql/hopper-medium-v2/seed_0 --csv rows.csv --picture x.png

The argument is the folder of a run of dare_iql.py, or of a copy, with its checkpoint.pt at any
online step with updates. For several steps give the run a smaller --online_iterations, call this
program, and go on with a larger one. Each call appends its rows to --csv, where those of the same
run and step are replaced, and draws --picture from all rows of this run there.

2,500 rows of the data and 2,500 online ones are scored by the checkpoint's reference policy. The
table has the separation point and the share of rows exchanged; for each of 40 bins of the score the
densities of both halves; and for the rows that the exchange moves and for those that it leaves
their number, mean Q and mean discounted return, all over the rows whose return is known: the
episode terminates after them, or goes on for 500 steps.
"""

import argparse
import importlib
import sys
from pathlib import Path

import matplotlib.style
import numpy as np
import torch

import d4rl_gymnasium as d4rl
from lib.experiments import ROOT

sys.path.insert(0, str(ROOT / "algorithms"))
from d4rl_gymnasium.files import contents_of, load, save_figure  # noqa: E402
from d4rl_gymnasium.runs import errors_in_one_line, parse  # noqa: E402
from diffusion import EnergyGuidedSampler  # noqa: E402
from figures import STYLE, grid  # noqa: E402
from lib.records import add_rows, read_rows  # noqa: E402

N_ROWS, N_BINS, BATCH, HORIZON = 2_500, 40, 250, 500
RUN = "env", "name", "seed"


def returns_to_go(rows, discount: float) -> np.ndarray:
    """Discounted returns [N] of consecutive transitions; NaN where too little of them is known.

    A return is known if the episode terminates, or goes on for HORIZON steps.
    """
    rewards, terminals = rows.rewards.double().numpy(), rows.terminals.numpy() > 0
    follows = (rows.next_observations[:-1] == rows.observations[1:]).all(1).numpy()
    returns, known = np.zeros(len(rewards)), np.zeros(len(rewards), bool)
    steps = 0
    for i in reversed(range(len(rewards))):
        goes_on = i + 1 < len(rewards) and follows[i] and not terminals[i]
        steps = steps + 1 if goes_on else 1
        ends = terminals[i] or (goes_on and known[i + 1])
        known[i] = ends or steps >= HORIZON
        returns[i] = rewards[i] + discount * (returns[i + 1] if goes_on else 0.0)
    return np.where(known, returns, np.nan)


@torch.enable_grad()  # for a behavior model that the cache lacks
def restored(folder: Path):
    """Script, config, step, agent, sampler, data and filled online buffer of a run's checkpoint.

    Raises:
        SystemExit: the run is none of DARE-I with an exchange, or has not begun to update online.
    """
    if not (folder / "config.yaml").exists():
        sys.exit(f"error: {folder} has no config.yaml: name the folder of a run")
    with contents_of(folder / "checkpoint.pt"):
        state = load(folder / "checkpoint.pt")
        settings = state["settings"]
    file = ROOT / "algorithms" / f"{settings['script']}.py"
    script = importlib.import_module(settings["script"]) if file.exists() else None
    is_dare = hasattr(script, "exchange") and hasattr(script, "ImplicitQLearning")
    if not is_dare or settings["exchange"] == "none":
        sys.exit(f"error: {folder} is no run of dare_iql.py, or a copy of it, with an exchange")
    flags = ["--config_path", str(folder / "config.yaml"), "--device", "cpu"]
    flags += ["--compile", "false", "--runs_dir", str(folder.parents[2])]
    config = parse(script.TrainConfig, flags)
    if state["phase"] != "online" or state["step"] <= config.initial_collection_steps:
        sys.exit(f"error: {folder} has no updates online yet: let it go on")
    torch.set_num_threads(config.threads)
    source = {"data": config.data, "regenerated_size": config.regenerated_size}
    dataset = d4rl.qlearning_dataset(config.env, **source)
    script.modify_reward(dataset, config)
    dims = dataset["observations"].shape[1], dataset["actions"].shape[1]
    offline = script.ReplayBuffer(*dims, len(dataset["rewards"]))
    offline.load_d4rl_dataset(dataset)
    online = script.ReplayBuffer(*dims, len(state["online_buffer"]["rows"]))
    online.load_state_dict(state["online_buffer"])
    trainer = script.ImplicitQLearning(*dims, config)
    trainer.load_state_dict(state["trainer"])
    data = offline.rows(slice(None))
    sampler = EnergyGuidedSampler(
        config, data.observations, data.actions, online.rows(slice(None)).observations,
        trainer.q_target, lambda update: update,
    )  # fmt: skip
    with contents_of(folder / "checkpoint.pt"):
        sampler.load_state_dict(state["sampler"])
    return script, config, state["step"], trainer, sampler, data, online.rows(slice(None))


def scores_of(script, config, sampler, rows, index, half: str) -> torch.Tensor:
    """Alignment scores of the rows with these numbers, of the data or of the online buffer."""
    none, found = index[:0], []
    for part in index.split(BATCH):
        of_half = (part, none) if half == "offline" else (none, part)
        with torch.autocast("cpu", torch.bfloat16, config.precision == "bf16"):
            references = sampler.sample(rows.observations[part], *of_half)
        found.append(script.alignment_score(rows.actions[part], references, config.align))
    return torch.cat(found)


@torch.no_grad()
def rows_of(folder: Path) -> list[dict]:
    """The rows that a run adds to the table."""
    script, config, step, trainer, sampler, data, online = restored(folder)
    torch.manual_seed(config.seed)
    # Resampled references exist for online rows that have support actions.
    n_online = len(online.rewards)
    if config.reference == "resample":
        n_online = int(sampler.n_online)
    index = {"offline": torch.randint(len(data.rewards), (N_ROWS,))}
    index["online"] = torch.randint(n_online, (N_ROWS,))
    halves = {"offline": data, "online": online}
    x, y = (scores_of(script, config, sampler, halves[k], index[k], k) for k in halves)
    # The row numbers take the places of a batch's columns, and say afterwards which rows moved.
    numbers = torch.arange(2 * N_ROWS)
    columns = len(script.TensorBatch._fields)
    batches = [script.TensorBatch(*[part] * columns) for part in numbers.split(N_ROWS)]
    if config.exchange == "direct":
        first, _, exchanged, separation = script.direct_exchange(*batches, x, y)
    elif config.exchange in ("gaussian", "random"):
        cap = config.max_exchange * N_ROWS / config.n_offline
        rule = cap, config.exchange == "random"
        first, _, exchanged, separation = script.exchange(*batches, x, y, *rule)
    else:
        sys.exit(f"error: {folder} has --exchange {config.exchange}: add this rule to rows_of")
    is_offline = torch.isin(numbers, first.rewards)
    moved = {"offline": ~is_offline[:N_ROWS], "online": is_offline[N_ROWS:]}

    base = {"env": config.env, "name": folder.parts[-3], "seed": config.seed, "step": step}
    base |= {"separation": separation.item(), "exchanged": exchanged.item() / N_ROWS}
    edges = np.linspace(0, torch.cat([x, y]).quantile(0.99).item(), N_BINS + 1)
    densities = [np.histogram(half, edges)[0] / N_ROWS / np.diff(edges) for half in (x, y)]
    rows = [
        {**base, "score": (low + high) / 2, "offline": a, "online": b}
        for low, high, a, b in zip(edges[:-1], edges[1:], *densities, strict=True)
    ]
    for half, transitions in halves.items():
        i = index[half]
        q = trainer.q_target(transitions.observations[i], transitions.actions[i]).double().numpy()
        returns = returns_to_go(transitions, config.discount)[i]
        for group, chosen in (("kept", ~moved[half].numpy()), ("moved", moved[half].numpy())):
            chosen = chosen & np.isfinite(returns)
            row = {**base, "group": f"{half}, {group}", "n": int(chosen.sum())}
            if chosen.any():
                row |= {"q": float(q[chosen].mean()), "return": float(returns[chosen].mean())}
            rows.append(row)
    return rows


def draw(rows: list[dict]):
    """A panel for each step: the densities of both halves' scores, and the separation point."""
    steps = sorted({int(row["step"]) for row in rows})
    text = "Densities of the alignment scores of offline and online rows; dashed: the separation "
    text += f"point. {rows[0]['name']}, {rows[0]['env']}, seed {int(rows[0]['seed'])}."
    titles = [f"online step {step:,}" for step in steps]
    figure, axes = grid(titles, "alignment score", text)
    for ax, step in zip(axes, steps, strict=True):
        found = [row for row in rows if row["step"] == step and "score" in row]
        score = [row["score"] for row in found]
        for half, color in (("offline", "#0072B2"), ("online", "#D55E00")):
            density = [row[half] for row in found]
            ax.fill_between(score, density, color=color, alpha=0.2, lw=0)
            ax.plot(score, density, color=color, label=half)
        ax.axvline(found[0]["separation"], color="0.3", ls="--", lw=0.8)
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("density")
    axes[0].legend()
    return figure


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a DARE-I run")
    parser.add_argument("--csv", type=Path, required=True, help="table to append the rows to")
    parser.add_argument("--picture", type=Path, help="PNG of all rows of this run")
    args = parser.parse_args()
    if args.picture and args.picture.suffix != ".png":
        parser.error("--picture must end in .png")
    with errors_in_one_line():
        new = rows_of(args.run.resolve())
        add_rows(args.csv, new, (*RUN, "step"), own="separation")
        print(f"step {new[0]['step']:,}: {100 * new[0]['exchanged']:.1f}% of each half exchanged")
        for row in (row for row in new if "q" in row):
            means = f"mean Q {row['q']:.1f}, return {row['return']:.1f}"
            print(f"step {row['step']:,}: {row['group']}: {row['n']} rows, {means}")
        if args.picture:
            with matplotlib.style.context(STYLE):
                run = [new[0][k] for k in RUN]
                rows = [row for row in read_rows(args.csv) if [row[k] for k in RUN] == run]
                save_figure(args.picture, draw(rows))


if __name__ == "__main__":
    main()
