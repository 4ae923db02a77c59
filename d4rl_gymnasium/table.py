"""The tables of this package's READMEs: regenerated data beside D4RL's, and the policies.

    python -m d4rl_gymnasium.table [--check]

The data's rows, which `describe ... --csv` writes, are in `assets/regenerated.csv`, D4RL's figures
in `assets/d4rl.json`, the policies' in their files and in `policies/recipe.json`.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

from d4rl_gymnasium.behavior import BehaviorPolicy
from d4rl_gymnasium.envs import ASSETS
from d4rl_gymnasium.files import write
from d4rl_gymnasium.regenerate import POLICIES
from d4rl_gymnasium.report import d4rls

FOLDER = Path(__file__).parent
MARKS = "<!-- table: python -m d4rl_gymnasium.table -->", "<!-- end of table -->"


def rows():
    """The rows of `assets/regenerated.csv`, dictionaries of strings."""
    with open(ASSETS / "regenerated.csv", newline="") as file:
        return list(csv.DictReader(file))


def _beside(row, name, digits=1, factor=1):
    """Our figure, and D4RL's where it is known."""
    known = d4rls(row["env"]).get(name)
    ours = f"{factor * float(row[name]):,.{digits}f}"
    return ours if known is None else f"{ours} ({factor * known:,.{digits}f})"


def _markdown(header, lines):
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def data_tables():
    """The tables of the data as Markdown: locomotion, then AntMaze."""
    locomotion, mazes = [], []
    for row in rows():
        if row["env"].startswith("antmaze"):
            mazes.append([
                row["env"],
                _beside(row, "length mean", 0),
                _beside(row, "rewarded", 3, 100),
                f"{100 * float(row['success_rate']):.0f}",
                row["visited_cells"],
            ])  # fmt: skip
        else:
            between = f"{row['score 10%']}, {row['score 50%']}, {row['score 90%']}"
            locomotion.append([
                row["env"],
                *(_beside(row, f"score {name}") for name in ("mean", "std", "0%", "100%")),
                between,
                _beside(row, "length mean", 0),
            ])  # fmt: skip
    head = ["task", "mean score", "std", "lowest", "highest", "10%, 50%, 90%", "episode length"]
    maze_head = ["task", "episode length", "rewarded rows, %", "episodes with a reward, %",
                 "cells visited"]  # fmt: skip
    return _markdown(head, locomotion) + "\n" + _markdown(maze_head, mazes)


def policy_table():
    """The table of the locomotion policies as Markdown, by robot and steps of training."""
    recipe, lines = json.loads((POLICIES / "recipe.json").read_text()), []
    policies = {path.stem: BehaviorPolicy.load(path) for path in POLICIES.glob("*.npz")}
    del policies["ant-goal"]
    order = sorted(policies, key=lambda name: (name.split("-")[0], policies[name].env_steps, name))
    for name in order:
        policy, robot = policies[name], name.split("-")[0]
        shares = [recipe[f"{robot}-{part}"].get(name, 0) for part in ("medium", "medium-replay")]
        lines.append([
            name,
            f"{policy.env_steps:,}",
            f"{policy.return_mean:,.0f} ± {policy.return_std:,.0f}",
            f"{policy.normalized_score:.1f}",
            *(f"{100 * share:.1f}" if share else "" for share in shares),
        ])  # fmt: skip
    head = ["file", "steps", "return with its noise", "normalized", "% of medium", "% of replay"]
    return _markdown(head, lines)


# What stands between the marks of each README.
TABLES = {"README.md": data_tables, "policies/README.md": policy_table}


def rewritten(readme, table):
    """The text of a README with a table made anew; a ValueError where its marks are missing."""
    begin, end = map(readme.find, MARKS)
    if begin < 0 or end < begin:
        raise ValueError(f"it needs the lines {MARKS[0]} and {MARKS[1]}")
    return f"{readme[: begin + len(MARKS[0])]}\n\n{table}\n{readme[end:]}"


def main(args=None):
    """Write or check the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail if they differ")
    args = parser.parse_args(args)
    for name, table in TABLES.items():
        path = FOLDER / name
        try:
            old = path.read_text()
            new = rewritten(old, table())
        except (OSError, ValueError) as error:
            sys.exit(f"error: {path}: {error}")
        if args.check and new != old:
            sys.exit(f"error: the table of {path} is not that of the files: "
                     "run python -m d4rl_gymnasium.table")  # fmt: skip
        if new != old:
            write(path, new)


if __name__ == "__main__":
    main()
