"""Runs the experiments of the paper and of results/: python results/grid.py list table1

    python results/grid.py list EXPERIMENT ...           state of every run
    python results/grid.py run EXPERIMENT ... --dry_run  the plain commands, stage by stage
    python results/grid.py run EXPERIMENT ...            run what is not finished, with Ray

An experiment is methods x tasks x seeds (lib/experiments.py); a run that several of them share is
made once. Each offline agent is trained once, by a run named prepare_<baseline>, and fine-tuning
starts from its offline.pt; the sampler's cache is filled by a run named prepare_<method>. Paths
(--runs_dir, data, configuration files) are relative to the repository.
"""

import argparse
import dataclasses
import functools
import importlib
import math
import os
import shlex
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from d4rl_gymnasium.runs import parser_of as parser_of_class
from d4rl_gymnasium.runs import refusal
from lib.attempt import attempt, last_line
from lib.experiments import CACHE, EXPERIMENTS, METHODS, ROOT, Experiment, Method, words
from lib.records import PREPARING, is_finished, read_yaml

METHODS_FILE = "results/lib/experiments.py"

# --- Runs ---


@dataclass(frozen=True)
class Run:
    """One command and the preparing runs that it waits for."""

    script: str
    flags: dict
    needs: tuple["Run", ...] = ()

    @property
    def folder(self) -> Path:
        """Where the run writes, from the repository."""
        flags = self.flags
        name, seed = flags.get("name", self.script), f"seed_{flags['seed']}"
        return Path(flags.get("runs_dir", "runs"), name, flags["env"], seed)

    @property
    def directory(self) -> Path:
        """Where the run writes."""
        return ROOT / self.folder

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
        """Settings of which the run in the directory has other values than this one.

        If that run has fewer online steps, this is no change: the command goes on from there.
        """
        if not (old := read_yaml(self.directory / "config.yaml")):
            return []
        free = set(script_module(self.script).FREE) - {"online_iterations"}
        if old.get("online_iterations", math.inf) < self.steps:
            free.add("online_iterations")
        new = dataclasses.asdict(config_of(self))
        return [k for k, v in new.items() if k not in free and v != old.get(k)]

    @property
    def steps(self) -> int:
        """Online steps that the run is to have."""
        return config_of(self).online_iterations

    @property
    def state(self) -> str:
        """Finished, crashed (its log ends in an error), started or missing; or changed."""
        if self.changed:
            return "changed"
        if is_finished(self.directory, self.steps):
            return "finished"
        if last_line(self.log).startswith("error:"):
            return "crashed"
        return "started" if (self.directory / "config.yaml").exists() else "missing"


def script_module(script: str):
    """A script as a module, for its TrainConfig and the fields that it compares."""
    if (folder := str(ROOT / "algorithms")) not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(script)


@functools.cache
def parser_of(script: str):
    """The parser of a script's command line."""
    return parser_of_class(script_module(script).TrainConfig)


def fields_of(script: str) -> set[str]:
    """Names of a script's settings."""
    return {field.name for field in dataclasses.fields(script_module(script).TrainConfig)}


def config_of(run: Run):
    """Settings of a run, as the script itself reads them.

    Raises:
        SystemExit: it would refuse them.
    """
    flags = run.flags
    if "config_path" in flags:
        flags = flags | {"config_path": ROOT / flags["config_path"]}
    try:
        return parser_of(run.script).parse_args(Run(run.script, flags).command[2:])
    except Exception as e:
        sys.exit(f"error: {refusal(e)}; the command was {shlex.join(run.command)}")


# --- Plans ---


def make_run(
    name: str, method: Method, env: str, seed: int, experiment: Experiment, options: dict, **more
) -> Run:
    """The run of a method without what it waits for; `options` are settings for all runs."""
    known, config = fields_of(method.script), experiment.configs.get(method.script)
    flags = {"config_path": config} if config else {}
    flags |= {"env": env, "seed": seed, **method.settings, **experiment.settings}
    flags |= experiment.task_settings.get(env, {})
    flags |= {k: v for k, v in options.items() if k in known} | more
    return Run(method.script, flags if name == method.script else flags | {"name": name})


def agent_run(method: Method, env: str, seed: int, experiment: Experiment, options: dict) -> Run:
    """The run that trains the offline agent a method starts from."""
    make = functools.partial(make_run, f"{PREPARING}{method.agent}", METHODS[method.agent])
    return make(env, seed, experiment, options, online_iterations=0)


def sampler_run(name: str, env: str, experiment: Experiment, options: dict) -> Run:
    """The run that fills the cache with a method's behavior model and support actions.

    An untrained agent is enough for them, and no other seed needs others.
    """
    method = METHODS[name]
    if "reference" not in method.settings:  # a variant that needs what the method itself does
        name, method = method.script, METHODS[method.script]
    less = {"offline_iterations": 0, "online_iterations": 0, "n_episodes": 1}
    name = f"{PREPARING}{name}{CACHE if method.agent == name else ''}"
    return make_run(name, method, env, 0, experiment, options, **less)


def has_reference(method: Method) -> bool:
    """Whether it needs a behavior model."""
    return "reference" in fields_of(method.script) and method.settings.get("exchange") != "none"


def check_agent(run: Run, agent: Run):
    """Refuse a run that would refuse the agent, before hours have gone into training it.

    Raises:
        SystemExit: their settings differ in what --load_model compares.
    """
    mine, others = (dataclasses.asdict(config_of(x)) for x in (run, agent))
    fields = script_module(run.script).OFFLINE_FIELDS
    if differing := [key for key in fields if mine[key] != others.get(key)]:
        sys.exit(f"error: {shlex.join(run.command)} cannot start from the offline agent of "
                 f"{shlex.join(agent.command)}, which has another {', '.join(differing)}; "
                 "make them equal in the configuration files, or give the method offline agents of "
                 f"its own: offline={run.directory.parts[-3]!r} in {METHODS_FILE}")  # fmt: skip


def check_method(name: str):
    """Refuse a method that cannot be run.

    Raises:
        SystemExit: it has no entry, script or offline agent, or its script has no such setting.
    """
    if name not in METHODS:
        sys.exit(f"error: an experiment in {METHODS_FILE} has {name}, which METHODS there lacks")
    method = METHODS[name]
    if not (ROOT / "algorithms" / f"{method.script}.py").exists():
        sys.exit(f"error: {name} of {METHODS_FILE} has the script {method.script}: "
                 f"there is no algorithms/{method.script}.py")  # fmt: skip
    if method.agent not in METHODS:
        sys.exit(f"error: {name} has no offline agent: give BASELINES[{method.script!r}] in "
                 f"{METHODS_FILE} the name of a method")  # fmt: skip
    if has_reference(method) and method.script not in METHODS:
        sys.exit(f"error: METHODS of {METHODS_FILE} has {name} and not {method.script}: variants "
                 "share its behavior model, so name it too")  # fmt: skip
    if unknown := set(method.settings) - fields_of(method.script):
        sys.exit(f"error: {name} of {METHODS_FILE} has the setting {min(unknown)}, which "
                 f"algorithms/{method.script}.py has not")  # fmt: skip


def plan(names: list[str], options: dict, methods=None, tasks=None, seeds=None) -> list[Run]:
    """Runs of experiments, the preparing ones first.

    Args:
        names: keys of EXPERIMENTS.
        options: settings of all runs whose script has them.
        methods: names of methods, or None for all.
        tasks: parts of task names, or None for all.
        seeds: seeds instead of the experiments' own, or None.

    Raises:
        SystemExit: two experiments give one run different settings, an agent cannot be shared, a
            method cannot be run, or no script has an option.
    """
    runs, last_sampler, checked, scripts = {}, {}, set(), set()
    for method in dict.fromkeys(method for x in names for method in EXPERIMENTS[x].methods):
        check_method(method)
        scripts.add(METHODS[method].script)
    if unknown := [key for key in options if not any(key in fields_of(s) for s in scripts)]:
        sys.exit(f"error: no script of these experiments has a setting {unknown[0]}")

    def add(run: Run) -> Run:
        other = runs.setdefault(run.directory, run)
        if (other.script, other.flags) != (run.script, run.flags):
            sys.exit(f"error: experiments differ in the settings of {run.directory}; "
                     "run them with a --runs_dir each")  # fmt: skip
        return other

    for experiment in (EXPERIMENTS[name] for name in names):
        for name, env, seed in dict.fromkeys(
            (method, task, seed)
            for part, envs in experiment.parts
            for method in part.split()
            for task in envs
            for seed in (experiment.seeds_of(task) if seeds is None else seeds)
            if (methods is None or method in methods)
            and (tasks is None or any(text in task for text in tasks))
        ):
            method = METHODS[name]
            check_options(name, options)
            agent = add(agent_run(method, env, seed, experiment, options))
            needs = [agent]
            if has_reference(method):
                sampler = sampler_run(name, env, experiment, options)
                if sampler.directory not in runs:
                    # After the one before, which makes what they have in common.
                    sampler = dataclasses.replace(sampler, needs=last_sampler.get(env, ()))
                    last_sampler[env] = (sampler,)
                needs.append(add(sampler))
            load_model = {"load_model": str(agent.folder / "offline.pt")}
            run = make_run(name, method, env, seed, experiment, options, **load_model)
            run = add(dataclasses.replace(run, needs=tuple(needs)))
            if (name, env) not in checked:  # one seed stands for all
                check_agent(run, agent)
                checked.add((name, env))
    return sorted(runs.values(), key=lambda run: run.stage)


def check_options(method: str, options: dict):
    """Refuse a --set that would make a method another one; its length is no part of it."""
    taken = [k for k in options if k in METHODS[method].settings and k != "online_iterations"]
    if taken:
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


def start_ray(args):
    """Start Ray on this machine, or join the cluster at args.address; returns the module."""
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


def execute(runs: list[Run], todo: list[Run], ray, args) -> int:
    """Give Ray every run of `todo` once those that it waits for are finished.

    Returns:
        How many failed, or were skipped as they wait for one that did.
    """
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    task = ray.remote(attempt).options(
        num_cpus=1, num_gpus=1 / args.runs_per_gpu if has_gpus else 0, max_retries=0
    )  # fmt: skip
    finished, failed = {run.directory for run in runs} - {run.directory for run in todo}, set()
    waiting, running, tries, shown = list(todo), {}, Counter(), None
    try:
        while waiting or running:
            for run in list(waiting):
                needs = {need.directory for need in run.needs}
                if needs & failed:
                    print(f"skipped: {run.directory} waits for {min(needs & failed)}", flush=True)
                    failed.add(run.directory)
                elif needs <= finished:
                    words = run.command, run.steps, str(run.directory), str(run.log)
                    running[task.remote(*words)] = run
                    tries[run.directory] += 1
                else:
                    continue
                waiting.remove(run)
            for ref in ray.wait(list(running), timeout=1)[0] if running else []:
                run = running.pop(ref)
                reason = failure(ray, ref, run)
                if not reason:
                    finished.add(run.directory)
                elif tries[run.directory] <= args.retries:
                    print(f"again: {run.directory}: {reason}", flush=True)
                    waiting.append(run)
                else:
                    print(f"failed: {run.directory}: {reason}", flush=True)
                    failed.add(run.directory)
            used = ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0)
            n_running = min(round(used), len(running))
            counts = f"{len(finished)} of {len(runs)} finished, {n_running} running"
            counts += f", {len(failed)} failed"
            if counts != shown:
                print(counts, flush=True)
            shown = counts
    except KeyboardInterrupt:
        print("stopping: the running ones save a checkpoint", flush=True)
        for ref in running:
            ray.cancel(ref)
        ray.wait(list(running), num_returns=len(running))
        sys.exit("interrupted; the same command resumes from there")
    return len(failed)


def failure(ray, ref, run: Run) -> str:
    """Why a run that has come to its end has failed, in one line; "" if it has not."""
    try:
        ray.get(ref)
        return ""
    except ray.exceptions.RayTaskError as e:
        return (str(e.cause) or type(e.cause).__name__).splitlines()[0]
    except ray.exceptions.RayError as e:
        return f"{type(e).__name__}; the last line was: {last_line(run.log)}"


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
    parser.add_argument("--methods", type=words, help="names of methods, commas between")
    parser.add_argument("--tasks", type=words, help="parts of task names, commas between")
    parser.add_argument("--seeds", type=words, help="instead of the experiment's, commas between")
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
    if unknown := set(args.methods or []) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    plans = [EXPERIMENTS[name] for name in args.experiments]
    methods = list(dict.fromkeys(method for plan in plans for method in plan.methods))
    for method in args.methods or []:
        if method not in methods:
            parser.error(f"these experiments have no {method}; they have {', '.join(methods)}")
    for part in args.tasks or []:
        if not any(part in task for plan in plans for task in plan.tasks):
            parser.error(f"these experiments have no task with {part} in its name")
    if not all(seed.isdecimal() for seed in args.seeds or []):
        parser.error("--seeds are whole numbers with commas between")
    args.seeds = [int(seed) for seed in args.seeds] if args.seeds else None
    args.options = {"runs_dir": args.runs_dir} if args.runs_dir else {}
    for pair in args.set:
        key, equals, value = pair.partition("=")
        if key in ("env", "seed", "name", "runs_dir", "config_path", "load_model") or not equals:
            parser.error(f"--set takes KEY=VALUE of a setting of the runs, got {pair}")
        args.options[key] = value
    return args


def interrupt(*_):
    """SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt


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
                     "move it away, or use another --runs_dir")  # fmt: skip
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
    n_failed = execute(runs, todo, ray, args)
    ray.shutdown()
    if n_failed:
        sys.exit(f"error: {n_failed} runs failed or were skipped; their logs say why")


if __name__ == "__main__":
    main()
