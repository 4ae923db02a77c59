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
        path = Path(args.pictures, f"{env}.png").expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        report.picture(env, dataset, path)
        print(f"picture: {path}", flush=True)
        rows.append(report.row(env, args.data, found))
        if args.csv:
            report.write_csv(rows, Path(args.csv).expanduser())


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


def _whole(least):
    """A type of argparse: a whole number from `least` to 10^8."""

    def number(text):
        if not text.isdecimal() or not least <= int(text) <= 10**8:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to 10^8")
        return int(text)

    return number


def _add_data(parser, **env_options):
    parser.add_argument("env", metavar="ENV", help="task id", **env_options)
    parser.add_argument(
        "--data", default="d4rl", help="d4rl, regenerated, minari:ID or an HDF5 file"
    )
    parser.add_argument(
        "--regenerated_size", type=_whole(0), default=200_000,
        help="transitions to make (0: D4RL's size)",
    )  # fmt: skip


def main(args=None):
    """Run the command line; an error ends in one line."""
    parser = argparse.ArgumentParser(prog="python -m d4rl_gymnasium", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("describe", help="what a data set holds, with a picture")
    _add_data(command, nargs="+")
    command.add_argument("--pictures", default=".", metavar="FOLDER", help="where ENV.png goes")
    command.add_argument("--csv", metavar="FILE", help="table to write, a row for each task")
    command.set_defaults(run=describe)
    command = commands.add_parser("check", help="does the simulator reproduce a D4RL file?")
    command.add_argument("file", metavar="FILE", help="HDF5 file in D4RL's format")
    command.add_argument("env", metavar="ENV", help="task id")
    command.add_argument("--limit", type=_whole(1), default=20_000,
                         help="transitions at most, at random")  # fmt: skip
    command.add_argument("--seed", type=_whole(0), default=0, help="of the draw")
    command.set_defaults(run=check)
    command = commands.add_parser("to-minari", help="write a data set for Minari to load")
    _add_data(command)
    command.add_argument("--id", help="of the new data set (default: named after the task)")
    command.set_defaults(run=to_minari)
    args = parser.parse_args(args)
    try:
        for env in args.env if isinstance(args.env, list) else [args.env]:
            task(env)
        args.run(args)
    except (DatasetError, OSError, ValueError, RuntimeError) as error:  # the last of h5py, pathlib
        sys.exit(f"error: {error}")
    except MemoryError:
        sys.exit("error: too little memory: use a smaller file or size")
    except KeyboardInterrupt:
        sys.exit("error: interrupted")


if __name__ == "__main__":
    main()
