"""Which reading of the alignment score tells the halves of a run's batches apart?

    python results/scores.py runs/dare_iql/hopper-medium-v2/seed_* --csv scores.csv

The arguments are folders of runs of dare_iql.py, or of a copy of it, with their checkpoint.pt. At
each checkpoint 2,500 rows of the data and 2,500 online ones are scored anew, by the agent's Q and
the run's reference (guided or resampled), with other guidance scales s, numbers of reference
actions and divergences than the run's. s = 0 is the behavior itself; s = 1 of guided references
needs the run's energy, and is left out where it has none. Each line has

- auc: the probability that an offline row scores lower than an online one; 0.5: the scores do not
  tell the halves apart;
- auc_newest: the same against the newest fifth of the online rows alone;
- mu_offline, mu_online: the mean scores.

The rows are appended to --csv; those of the same run and step are replaced.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from d4rl_gymnasium.runs import errors_in_one_line
from exchange import N_ROWS, restored, scores_of
from lib.records import add_rows

KEY = "env", "name", "seed", "step"
MEASURES = "auc", "auc_newest", "mu_offline", "mu_online"


def readings(scale: float, reference: str = "guided", align: str = "gaussian_kl") -> list[dict]:
    """Settings of the scores that are compared, for a run with these of its own."""
    has_no_energy = reference == "guided" and scale == 0
    scales = [0.0] if has_no_energy else dict.fromkeys((0.0, 1.0, scale))
    found = [
        {"guidance_scale": s, "n_reference": n, "align": "gaussian_kl"}
        for n in (1, 16)
        for s in scales
    ]
    others = [name for name in dict.fromkeys(("softmax_kl", align)) if name != "gaussian_kl"]
    return found + [{"guidance_scale": scale, "n_reference": 1, "align": name} for name in others]


def auc(offline: torch.Tensor, online: torch.Tensor) -> float:
    """Share of pairs whose offline score is the lower one; of equal ones half."""
    below = torch.searchsorted(offline.sort()[0], online).double()
    up_to = torch.searchsorted(offline.sort()[0], online, right=True).double()
    return ((below + up_to) / 2).mean().item() / len(offline)


@torch.no_grad()
def rows_of(folder: Path) -> list[dict]:
    """A row for each reading of the score, at a run's checkpoint."""
    script, config, step, _, sampler, data, online = restored(folder)
    halves = {"offline": data, "online": online}
    n_online = int(sampler.n_online) if config.reference == "resample" else len(online.rewards)
    torch.manual_seed(config.seed)
    before = sampler.q_spread.clone(), sampler.n_spreads.clone()
    index = {
        "offline": torch.randint(len(data.rewards), (N_ROWS,)),
        "online": torch.randint(n_online, (N_ROWS,)),
        "newest": torch.randint(n_online * 4 // 5, n_online, (N_ROWS,)),
    }
    base = {"env": config.env, "name": folder.parts[-3], "seed": config.seed, "step": step}
    base |= {"reference": config.reference}
    rows = []
    for reading in readings(config.guidance_scale, config.reference, config.align):
        torch.manual_seed(config.seed)  # the readings share their draws,
        for mean, old in zip((sampler.q_spread, sampler.n_spreads), before, strict=True):
            mean.copy_(old)  # and Q's spread, which sample() updates
        changed = sampler.config = replace(config, **reading)
        x, y, newest = (
            scores_of(script, changed, sampler, halves[half], index[group], half)
            for group, half in (("offline", "offline"), ("online", "online"), ("newest", "online"))
        )
        row = {"auc": auc(x, y), "auc_newest": auc(x, newest)}
        row |= {"mu_offline": x.mean().item(), "mu_online": y.mean().item()}
        rows.append(base | reading | row)
    return rows


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of DARE-I runs")
    parser.add_argument("--csv", type=Path, help="table to append the rows to")
    args = parser.parse_args()
    with errors_in_one_line():
        for folder in args.runs:
            new = rows_of(folder.resolve())
            for row in new:
                print(*(f"{x:.3f}" if k in MEASURES else x for k, x in row.items()))
            if args.csv:
                add_rows(args.csv, new, KEY, own="auc_newest")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
