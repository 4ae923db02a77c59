"""Command line: python -m d4rl_gymnasium describe ENV, check FILE ENV, to-minari ENV."""

import argparse
import sys
from pathlib import Path

from d4rl_gymnasium import minari_io, report
from d4rl_gymnasium.data import TRANSITION_KEYS, DatasetError, get_dataset
from d4rl_gymnasium.tasks import task
from d4rl_gymnasium.transitions import timeouts_of

AGREEING = 0.99  # of a comparison; below it the file is taken for one of other physics


def describe(args):
    """Print what data sets hold, draw their pictures, and put the numbers into a table."""
    rows = []
    for env in args.env:
        found, dataset = report.describe(env, args.data, args.regenerated_size)
        print(report.text(env, found))
        path = Path(args.pictures, f"{env}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        report.picture(env, dataset, path)
        print(f"picture: {path}", flush=True)
        rows.append(report.row(env, args.data, found))
        if args.csv:
            report.write_csv(rows, args.csv)


def check(args):
    """Replay a file in the simulator; fail where less than 99% of a comparison agrees."""
    found = report.check(args.env, args.file, args.limit, args.seed)
    print(report.check_text(args.env, args.file, found))
    compared = [found[k] for k in ("observations", "rewards", "terminals") if found[k]["compared"]]
    if any(result["agree"] < AGREEING * result["compared"] for result in compared):
        sys.exit(f"error: this is not the physics that made {args.file}: another task's file, or "
                 "another version of the simulator")  # fmt: skip


def to_minari(args):
    """Write a data set for Minari to load."""
    dataset = get_dataset(args.env, args.data, args.regenerated_size, keys=TRANSITION_KEYS)
    dataset["timeouts"] = timeouts_of(dataset, task(args.env).max_episode_steps)
    dataset_id = args.id or minari_io.default_id(args.env, args.data)
    path = minari_io.write(args.env, dataset, dataset_id, args.data)
    print(f"{dataset_id}: {path}")


def _add_data(parser, **several):
    parser.add_argument("env", metavar="ENV", help="task id", **several)
    parser.add_argument(
        "--data", default="d4rl", help="d4rl, regenerated, minari:ID or an HDF5 file"
    )
    parser.add_argument(
        "--regenerated_size", type=int, default=200_000, help="transitions to make (0: D4RL's size)"
    )


def main(args=None):
    """Run the command line; an error ends in one line."""
    parser = argparse.ArgumentParser(prog="python -m d4rl_gymnasium", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("describe", help="what a data set holds, with a picture")
    _add_data(one, nargs="+")
    one.add_argument("--pictures", default=".", metavar="FOLDER", help="where ENV.png goes")
    one.add_argument("--csv", metavar="FILE", help="table to write, a row for each task")
    one.set_defaults(run=describe)
    other = commands.add_parser("check", help="does the simulator reproduce a D4RL file?")
    other.add_argument("file", metavar="FILE", help="HDF5 file in D4RL's format")
    other.add_argument("env", metavar="ENV", help="task id")
    other.add_argument("--limit", type=int, default=20_000, help="transitions at most, at random")
    other.add_argument("--seed", type=int, default=0, help="of the draw")
    other.set_defaults(run=check)
    third = commands.add_parser("to-minari", help="write a data set for Minari to load")
    _add_data(third)
    third.add_argument("--id", help="of the new data set (default: named after the task)")
    third.set_defaults(run=to_minari)
    args = parser.parse_args(args)
    try:
        for env in args.env if isinstance(args.env, list) else [args.env]:
            task(env)
        args.run(args)
    except (DatasetError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


if __name__ == "__main__":
    main()
