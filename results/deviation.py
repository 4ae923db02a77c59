"""How wide is a run's policy? python results/deviation.py RUN... [--csv FILE]

The arguments are folders of runs of the IQL group. Call it where the runs were started, since
their --load_model may be relative. A row for each has the standard deviation of the policy, the
mean over the components of the action: in the offline agent that fine-tuning started from, and in
the run's checkpoint.pt (of PEX: of its new policy). In newer runs its logarithm is also in
train.csv (log_std). The rows are appended to --csv; that of the same run is replaced.
"""

import argparse
import sys
from pathlib import Path

from d4rl_gymnasium.files import contents_of, load
from d4rl_gymnasium.runs import errors_in_one_line
from lib.records import add_rows, read_yaml

KEY = "method", "env", "seed"


def std_of(file: Path) -> tuple[float, int]:
    """Mean standard deviation of the policy in a checkpoint or offline agent, and its step."""
    with contents_of(file):
        state = load(file)
        return state["trainer"]["actor"]["log_std"].exp().mean().item(), state.get("step", 0)


def row_of(folder: Path) -> dict:
    """What a run adds to the table."""
    settings = read_yaml(folder / "config.yaml")
    if not settings:
        sys.exit(f"error: {folder} has no config.yaml: name the folder of a run")
    before, _ = std_of(Path(settings["load_model"] or folder / "offline.pt").expanduser())
    after, step = std_of(folder / "checkpoint.pt")
    row = {"method": folder.parts[-3], "env": settings["env"], "seed": settings["seed"]}
    return row | {"step": step, "before": before, "after": after}


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of the IQL group")
    parser.add_argument("--csv", type=Path, help="table to append the rows to")
    args = parser.parse_args()
    with errors_in_one_line():
        new = [row_of(folder.resolve()) for folder in args.runs]
        for row in new:
            print(*(f"{x:.3f}" if isinstance(x, float) else x for x in row.values()))
        if args.csv:
            add_rows(args.csv, new, KEY, own="before")


if __name__ == "__main__":
    main()
