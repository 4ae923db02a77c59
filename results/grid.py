"""The paper's experiments and the study as data, and a runner: python results/grid.py list table1

    python results/grid.py list EXPERIMENT ...         state of every run
    python results/grid.py run EXPERIMENT ... --dry_run  the plain commands, stage by stage
    python results/grid.py run EXPERIMENT ...          run what is not finished, with Ray

An experiment is methods x tasks x seeds; a run that several of them have is one run. Offline
agents, behavior models and support actions are made before the runs that take them from the cache.
Paths (--runs_dir, data, configuration files) are relative to the repository.
"""

import argparse
import dataclasses
import functools
import importlib
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml
from attempt import ROOT, attempt, last_line
from experiments import EXPERIMENTS, METHODS, PREPARING, Experiment

# What the data that are hashed for the cache's keys depend on, beside the fields of the key.
DATA_FIELDS = "data", "regenerated_size"
REWARD_FIELDS = "normalize_reward", "reward_scale", "reward_bias", "is_sparse_reward", "discount"
# A run goes on with any value of these.
FREE_FIELDS = "device compile cuda_graph threads wandb project runs_dir".split()


# --- Runs ---


@dataclass(frozen=True)
class Run:
    """One command and the preparing runs that it waits for."""

    script: str
    flags: dict
    needs: tuple = ()

    @property
    def directory(self) -> Path:
        """Where the run writes."""
        f = self.flags
        name = f.get("name", self.script)
        return ROOT / f.get("runs_dir", "runs") / name / f["env"] / f"seed_{f['seed']}"

    @property
    def log(self) -> Path:
        """What the run printed, all attempts one after the other."""
        return self.directory.with_suffix(".log")

    @property
    def command(self) -> list[str]:
        """Words of the command line."""
        flags = [str(word) for k, v in self.flags.items() for word in (f"--{k}", v)]
        return ["python", f"algorithms/{self.script}.py", *flags]

    @property
    def stage(self) -> int:
        """0 of a run that waits for none, else one more than those it waits for."""
        return max((run.stage + 1 for run in self.needs), default=0)

    @property
    def changed(self) -> list[str]:
        """Settings of which the run in the directory has other values than this one."""
        if not (path := self.directory / "config.yaml").exists():
            return []
        old, new = yaml.safe_load(path.read_text()), dataclasses.asdict(config_of(self))
        return [k for k, v in new.items()
                if k not in FREE_FIELDS and v not in ("auto", old.get(k))]  # fmt: skip

    @property
    def state(self) -> str:
        """Finished, crashed (its log ends in an error), started or missing; or changed."""
        if self.changed:
            return "changed"
        if (self.directory / "summary.yaml").exists():
            return "finished"
        if last_line(self.log).startswith("error:"):
            return "crashed"
        return "started" if (self.directory / "config.yaml").exists() else "missing"


@functools.cache
def script_module(script: str):
    """A script as a module, for its Parser and the fields of its cache keys."""
    folder = str(ROOT / "algorithms")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(script)


def fields_of(script: str) -> set[str]:
    """Names of a script's settings."""
    return {field.name for field in dataclasses.fields(script_module(script).Config)}


@functools.cache
def script_parser(script: str):
    """The script's own parser, whose making takes longer than many parsings."""
    module = script_module(script)
    return module.Parser(module.Config, allow_abbrev=False)


def config_of(run: Run):
    """Settings of a run, by the script's own parser."""
    flags = run.flags
    if "config_path" in flags:
        flags = flags | {"config_path": ROOT / flags["config_path"]}
    try:
        return script_parser(run.script).parse_args(Run(run.script, flags).command[2:])
    except SystemExit as e:
        sys.exit(f"{e}; the command was {shlex.join(run.command)}")


def shared_parts(run: Run) -> dict[str, tuple]:
    """What a run takes from the cache: kind and all that the part depends on."""
    module, cfg = script_module(run.script), config_of(run)

    def values(cfg, names):
        return tuple((k, getattr(cfg, k)) for k in names if hasattr(cfg, k))

    data = values(cfg, DATA_FIELDS)
    agent = values(cfg, [*module.OFFLINE_FIELDS, *REWARD_FIELDS])
    found = {"offline": (module.OFFLINE_METHOD, *data, *agent)}
    if getattr(cfg, "exchange", "none") == "none":
        return found
    found["behavior"] = (*data, *values(cfg, module.BEHAVIOR_FIELDS))
    if cfg.reference == "resample":  # which gives all states their support actions
        cfg = dataclasses.replace(cfg, n_support_states=0)
    if cfg.reference == "resample" or cfg.guidance_scale > 0:
        found["support"] = (*data, *values(cfg, module.SUPPORT_FIELDS))
    return found


def make_run(method: str, env: str, seed: int, experiment: Experiment, options: dict) -> Run:
    """The run of a method without what it waits for; `options` are settings for all runs."""
    script, settings = METHODS[method]
    known = fields_of(script)
    config = experiment.configs.get(script)
    flags = {"config_path": config} if config else {}
    flags |= {"env": env, "seed": seed, **settings, **experiment.settings}
    flags |= experiment.task_settings.get(env, {})
    flags |= {k: v for k, v in options.items() if k in known}
    return Run(script, flags if method == script else flags | {"name": method})


def preparing_run(kind: str, key: tuple, user: Run, experiment: Experiment, options: dict) -> Run:
    """The run that makes a shared part.

    Raises:
        SystemExit: no method in PREPARING makes it, for want of equal settings.
    """
    methods, more = PREPARING[kind]
    for method in methods.split():
        seed = more.get("seed", user.flags["seed"])
        run = make_run(method, user.flags["env"], seed, experiment, options)
        kind_of_name = method if kind == "offline" else method.replace("dare_iql", "dare")
        run = Run(run.script, run.flags | more | {"name": f"prepare_{kind_of_name}"})
        if shared_parts(run).get(kind) == key:
            return run
    sys.exit(
        f"error: no run prepares the {kind} part of {shlex.join(user.command)}: its settings agree "
        f"with none of {methods}; make them equal in the configuration files"
    )


def with_needs(run: Run, prepared: dict, experiment: Experiment, options: dict) -> Run:
    """The run with the preparing runs that it waits for; `prepared` has those known by now."""
    needs = []
    for kind, key in shared_parts(run).items():
        if (kind, key) not in prepared:
            made = preparing_run(kind, key, run, experiment, options)
            if kind == "support":  # which are drawn from a behavior model
                behavior = prepared["behavior", shared_parts(made)["behavior"]]
                waits = behavior.directory != made.directory
                made = dataclasses.replace(made, needs=(behavior,) if waits else ())
            prepared[kind, key] = made
        needs.append(prepared[kind, key])
    unique = {need.directory: need for need in needs}
    return dataclasses.replace(run, needs=tuple(unique.values()))


def plan(names: list[str], options: dict, methods=None, tasks=None, seeds=None) -> list[Run]:
    """Runs of experiments, the preparing ones first.

    Args:
        names: keys of EXPERIMENTS.
        options: settings of all runs whose script has them.
        methods: names of methods, or None for all.
        tasks: parts of task names, or None for all.
        seeds: seeds instead of the experiments' own, or None.

    Raises:
        SystemExit: two experiments give one run different settings, or parts cannot be shared.
    """
    runs, prepared = {}, {}
    for name in names:
        experiment = EXPERIMENTS[name]
        triples = [
            (method, env, seed)
            for part, envs in experiment.parts
            for method in part.split()
            for env in envs
            for seed in (experiment.seeds if seeds is None else seeds)
            if (methods is None or method in methods)
            and (tasks is None or any(task in env for task in tasks))
        ]
        for triple in dict.fromkeys(triples):
            check_options(triple[0], options)
            run = make_run(*triple, experiment, options)
            run = with_needs(run, prepared, experiment, options)
            for new in (*(x for need in run.needs for x in need.needs), *run.needs, run):
                if runs.setdefault(new.directory, new).command != new.command:
                    sys.exit(f"error: experiments differ in the settings of {new.directory}; "
                             "run them with a --runs_dir each")  # fmt: skip
    return sorted(runs.values(), key=lambda run: run.stage)


def check_options(method: str, options: dict):
    """Refuse a --set that would make a method another one; its length is no part of it."""
    if taken := [k for k in options if k in METHODS[method][1] and k != "online_iterations"]:
        sys.exit(f"error: {method} is defined by --{taken[0]}; leave --set {taken[0]} out, "
                 "or choose other --methods")  # fmt: skip


def unfinished(runs: list[Run]) -> list[Run]:
    """Runs to do: the unfinished ones, of the preparing ones those that an unfinished one needs."""
    prepares = {need.directory for run in runs for need in run.needs}
    needed, found = set(), []
    for run in reversed(runs):
        wanted = run.directory not in prepares or run.directory in needed
        if wanted and run.state != "finished":
            needed |= {need.directory for need in run.needs}
            found.append(run)
    return found[::-1]


# --- Running ---


def git_commit() -> str | None:
    """Commit of the repository, with -dirty when tracked files are changed; None outside git."""

    def git(*args):
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)

    commit = git("rev-parse", "--short", "HEAD")
    if commit.returncode:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no").stdout
    return commit.stdout.strip() + ("-dirty" if changed else "")


def start_ray(args):
    """Start Ray on this machine, or join the cluster at args.address; gives the module."""
    if sys.platform != "linux":
        sys.exit("error: run is for Linux, where a run ends with its worker; use --dry_run")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        sys.exit('error: run needs Ray; pip install -e ".[grid]", or use --dry_run')
    settings = {"log_to_driver": False, "logging_level": "ERROR"}
    if args.address:
        settings["address"] = args.address
    else:
        settings |= {"address": "local", "num_cpus": args.workers or os.cpu_count()}
        settings |= {"include_dashboard": False, "object_store_memory": 80 << 20}
    try:
        ray.init(**settings)
    except Exception as e:  # of Ray's own kinds and plain ones: a busy machine, a wrong address
        sys.exit(f"error: Ray did not start ({str(e).splitlines()[0]}); try again, or --dry_run")
    return ray


class Progress:
    """Which runs are done (their directories); the counts are printed when they have changed."""

    def __init__(self, runs: list[Run], todo: list[Run]):
        self.total, self.shown = len(runs), None
        self.finished = {x.directory for x in runs} - {x.directory for x in todo}
        self.failed = set()  # or skipped

    def show(self, n_running: int):
        """One line."""
        line = (f"{len(self.finished)} of {self.total} finished, {n_running} running, "
                f"{len(self.failed)} failed")  # fmt: skip
        if line != self.shown:
            print(line, flush=True)
        self.shown = line


def execute(runs: list[Run], progress: Progress, ray, args):
    """Give Ray every run once those that it waits for are finished, until none is left."""
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    task = ray.remote(attempt).options(
        num_cpus=1, num_gpus=1 / args.runs_per_gpu if has_gpus else 0,
        max_retries=args.retries, retry_exceptions=[RuntimeError],
    )  # fmt: skip
    commit, waiting, tasks = git_commit(), list(runs), {}
    try:
        while waiting or tasks:
            for run in list(waiting):
                lost = [need for need in run.needs if need.directory in progress.failed]
                if lost:
                    print(f"skipped: {run.directory} waits for {lost[0].directory}", flush=True)
                    progress.failed.add(run.directory)
                elif all(need.directory in progress.finished for need in run.needs):
                    words = run.command, str(run.directory), str(run.log), commit
                    tasks[task.remote(*words)] = run
                else:
                    continue
                waiting.remove(run)
            done = ray.wait(list(tasks), timeout=1)[0] if tasks else []
            for ref in done:
                report(ray, ref, tasks.pop(ref), progress)
            used = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)
            progress.show(min(round(used), len(tasks)))
    except KeyboardInterrupt:
        print("stopping: the running ones save a checkpoint", flush=True)
        for ref in tasks:
            ray.cancel(ref)
        ray.wait(list(tasks), num_returns=len(tasks))
        sys.exit("interrupted; the same command goes on from there")


def report(ray, ref, run: Run, progress: Progress):
    """Count a run that has come to its end; one line if it has failed."""
    try:
        ray.get(ref)
        progress.finished.add(run.directory)
    except ray.exceptions.RayError as e:
        died = f"{type(e).__name__}; the last line was: {last_line(run.log)}"
        reason = e.cause if isinstance(e, ray.exceptions.RayTaskError) else died
        print(f"failed: {run.directory}: {str(reason).splitlines()[0]}", flush=True)
        progress.failed.add(run.directory)


def interrupt(*_):
    """SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt


# --- Command line ---


class OneLineParser(argparse.ArgumentParser):
    """Errors end in one line."""

    def error(self, message):
        """Exit with one line."""
        sys.exit(f"error: {message}; see --help")


def parse_arguments() -> argparse.Namespace:
    """The command line, with lists split and names checked."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("action", choices=["list", "run"])
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--methods", help="names of methods, commas between")
    parser.add_argument("--tasks", help="parts of task names, commas between")
    parser.add_argument("--seeds", help="seeds instead of the experiment's own, commas between")
    parser.add_argument("--runs_dir", help="default: runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="a setting of all runs whose script has it; repeatable")  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print the commands only")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one a CPU core")
    parser.add_argument("--address", help="of a Ray cluster with this folder at the same path")
    parser.add_argument("--runs_per_gpu", type=int, default=1, help="default: 1")
    parser.add_argument("--retries", type=int, default=3, help="of a run that crashes; default: 3")
    args = parser.parse_args()
    if not args.experiments or set(args.experiments) - set(EXPERIMENTS):
        parser.error(f"give one or more of the experiments {', '.join(EXPERIMENTS)}")
    if args.workers and args.address:
        parser.error("--workers is for this machine; a cluster at --address has its own number")
    if min(args.runs_per_gpu, args.workers or 1, args.retries + 1) < 1:
        parser.error("--runs_per_gpu and --workers are at least 1, --retries at least 0")
    for name in ("methods", "tasks", "seeds"):
        if text := getattr(args, name):
            setattr(args, name, [word.strip() for word in text.split(",")])
    if unknown := set(args.methods or []) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    if not all(seed.isdecimal() for seed in args.seeds or []):
        parser.error("--seeds are whole numbers with commas between")
    args.seeds = [int(seed) for seed in args.seeds] if args.seeds else None
    args.options = parse_options(parser, args)
    return args


def parse_options(parser: OneLineParser, args) -> dict:
    """--set and --runs_dir as settings of all runs."""
    options = {"runs_dir": args.runs_dir} if args.runs_dir else {}
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if key in ("env", "seed", "name", "runs_dir", "config_path") or not equals:
            parser.error(f"--set takes KEY=VALUE of a setting of the runs, got {pair}")
        if not any(key in fields_of(script) for script in {s for s, _ in METHODS.values()}):
            parser.error(f"no script has a setting {key}")
        options[key] = value
    return options


def main():
    """List or run experiments."""
    args = parse_arguments()
    runs = plan(args.experiments, args.options, args.methods, args.tasks, args.seeds)
    if not runs:
        sys.exit("error: these experiments have no run of these --methods and --tasks")
    if args.action == "list":
        states = [run.state for run in runs]
        for run, state in zip(runs, states, strict=True):
            print(f"{state:9} {os.path.relpath(run.directory, ROOT)}")
        print(", ".join(f"{n} {state}" for state, n in sorted(Counter(states).items())))
        return
    for run in runs:
        if fields := run.changed:
            sys.exit(f"error: {run.directory} has other settings of {', '.join(fields)}; "
                     "delete it, or take another --runs_dir")  # fmt: skip
    todo = unfinished(runs)
    if args.dry_run:
        for i, run in enumerate(todo):
            if i == 0 or run.stage != todo[i - 1].stage:
                print(f"# stage {run.stage + 1}: {sum(r.stage == run.stage for r in todo)} runs"
                      + " that wait for the stage before" * (run.stage > 0))  # fmt: skip
            print(shlex.join(run.command))
        return
    ray = start_ray(args)
    signal.signal(signal.SIGTERM, interrupt)
    progress = Progress(runs, todo)
    execute(todo, progress, ray, args)
    ray.shutdown()
    if progress.failed:
        sys.exit(f"error: {len(progress.failed)} runs failed or were skipped; their logs say why")


if __name__ == "__main__":
    main()
