"""results/grid.py: the plan of every experiment, what runs share, and real runs by Ray."""

import argparse
import contextlib
import csv
import dataclasses
import functools
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

import iql

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "results"
DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
ENV = "hopper-medium-v2"
EXPERIMENTS = [f"table{i}" for i in (1, 2, 3, 8, 9, 10, 11)] + [f"fig{i}" for i in range(1, 15)]
EXPERIMENTS += ["paper", "study"]
TINY = """wandb=disabled device=cpu hidden_dim=16 batch_size=32 offline_iterations=60
    online_iterations=200 initial_collection_steps=60 n_episodes=1 eval_freq=100
    offline_eval_freq=50 log_freq=25 checkpoint_freq=50""".split()
TINY += [f"data={DATA}"]
TINY_DARE = """behavior_iterations=20 behavior_batch_size=32 behavior_width=8 energy_hidden=8
    energy_iterations=20 energy_batch_size=16 n_support=2 n_support_states=50
    diffusion_steps=2""".split()


@pytest.fixture
def grid(monkeypatch):
    monkeypatch.syspath_prepend(RESULTS)
    return importlib.import_module("grid")


@pytest.fixture
def program(grid, monkeypatch, capsys):
    """Call the program; gives the lines that it printed."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["grid.py", *map(str, args)])
        grid.main()
        return capsys.readouterr().out.splitlines()

    return call


def options(pairs):
    return [word for pair in pairs for word in ("--set", pair)]


@functools.cache
def parser(script):
    module = importlib.import_module(script)
    return module.Parser(module.Config, allow_abbrev=False)


def config(line):
    """Settings of a printed command, by the script's own parser."""
    python, script, *words = shlex.split(line)
    assert python == "python" and (REPOSITORY / script).exists()
    return parser(Path(script).stem).parse_args(words)


# --- Plans ---


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_printed_commands_are_unique_and_parse(program, monkeypatch, name):
    monkeypatch.chdir(REPOSITORY)
    lines = program("run", name, "--dry_run", "--seeds", "3", "--runs_dir", "none_yet")
    commands = [line for line in lines if not line.startswith("#")]
    assert lines[0].startswith("# stage 1: ") and len(commands) > 2
    directories = set()
    for line in commands:
        cfg = config(line)
        assert cfg.seed == (0 if cfg.name.startswith("prepare_dare") else 3)
        directories.add((cfg.name, cfg.env, cfg.seed))
    assert len(set(commands)) == len(directories) == len(commands)


def test_experiments_are_methods_and_tasks_that_exist(grid):
    tasks = set(grid.EXPERIMENTS["table1"].parts[0][1])
    assert set(grid.EXPERIMENTS) == set(EXPERIMENTS) and len(tasks) == 13
    used = {m for x in grid.EXPERIMENTS.values() for part, _ in x.parts for m in part.split()}
    assert used == set(grid.METHODS)
    for experiment in grid.EXPERIMENTS.values():
        assert all(env in tasks for _, envs in experiment.parts for env in envs)


def test_the_runs_of_a_figure_are_those_that_it_shows(grid):
    figures = importlib.import_module("figures").FIGURES
    names = [name for name in figures if name.isdecimal()]
    assert len(names) == 13
    for name in names:
        ((methods, tasks),) = grid.EXPERIMENTS[f"fig{name}"].parts
        plan = figures[name]
        assert (set(methods.split()), tasks) == ({plan.main, *plan.others}, plan.tasks), name


def test_table1(grid):
    """Its runs, and the preparing ones against a count of what the runs' settings differ in."""
    runs = grid.plan(["table1"], {})
    users = [run for run in runs if "prepare" not in run.flags.get("name", "")]
    assert len(users) == 13 * 8 * 5 and Counter(run.stage for run in runs) == {0: 208, 1: 520}
    agents, behaviors = set(), set()
    for run in users:
        cfg = grid.config_of(run)
        kind = "iql" if hasattr(cfg, "iql_tau") else ("cql", "cal_ql")[cfg.calibrated]
        agents.add((f"prepare_{kind}", cfg.env, cfg.seed))
        behaviors |= {("prepare_dare", cfg.env, 0)} if hasattr(cfg, "exchange") else set()
        needs = {need.directory.parts[-3:] for need in run.needs}
        expected = {(f"prepare_{kind}", cfg.env, f"seed_{cfg.seed}")}
        expected |= {("prepare_dare", cfg.env, "seed_0")} if hasattr(cfg, "exchange") else set()
        assert needs == expected
    assert len(agents) == 3 * 13 * 5 and len(behaviors) == 13
    found = {(r.flags["name"], r.flags["env"], r.flags["seed"]) for r in runs if r not in users}
    assert found == agents | behaviors
    assert all(run.flags["online_iterations"] == 0 for run in runs if run not in users)


def test_the_same_run_of_several_experiments_is_one(grid):
    names = ["table1", "table8", "fig5", "fig8"]
    assert len(grid.plan(names, {})) == len(grid.plan(["table1"], {}))


def test_experiments_that_differ_in_a_run_are_refused(grid):
    with pytest.raises(SystemExit, match="differ in the settings of .*--runs_dir each"):
        grid.plan(["table1", "study"], {}, tasks=["hopper-medium-v2"], methods=["iql"], seeds=[0])


def test_stages_of_the_study(grid):
    runs = grid.plan(["study"], {}, tasks=["hopper-medium-replay"], seeds=[2])
    found = {run.flags.get("name", run.script): run for run in runs}
    needs = {k: sorted(x.flags["name"] for x in run.needs) for k, run in found.items()}
    assert needs["pex"] == needs["dare_iql_no_exchange"] == ["prepare_iql"]
    assert needs["dare_cql"] == ["prepare_cal_ql", "prepare_dare_cql"]  # of another precision
    assert needs["prepare_dare_resample"] == ["prepare_dare"]
    resample = ["prepare_dare", "prepare_dare_resample", "prepare_iql"]
    assert needs["dare_iql_resample"] == resample and found["dare_iql_resample"].stage == 2
    for name in found.keys() - {"dare_iql_resample", "dare_cql", "cal_ql", "pex", "iql"}:
        expected = ["prepare_dare"] * ("exchange" not in name) + ["prepare_iql"]
        assert "prepare" in name or needs[name] == expected, name


def test_settings_of_a_task_hold_for_it_alone_and_for_what_it_shares(grid):
    runs = grid.plan(["study"], {}, tasks=["umaze", "walker2d"], seeds=[1])
    trained = [r for r in runs if not r.flags.get("name", "").startswith("prepare_dare")]
    updates = {(r.flags["env"], r.flags.get("offline_iterations")) for r in trained}
    assert updates == {("antmaze-umaze-v2", 60_000), ("walker2d-medium-v2", None)}
    maze = [r for r in trained if "umaze" in r.flags["env"]]
    assert {r.flags["n_episodes"] for r in maze} == {20} and len(maze) > 5


def test_settings_that_cannot_be_shared_are_refused(grid, monkeypatch):
    monkeypatch.setitem(grid.METHODS, "dare_iql", ("dare_iql", {"beta": 7}))
    with pytest.raises(SystemExit, match="no run prepares the offline part .* make them equal"):
        grid.plan(["table1"], {}, methods=["dare_iql"], seeds=[0])


def test_states_and_what_is_left_to_do(program, tmp_path):
    args = [
        "table1",
        "--methods",
        "iql,pex",
        "--tasks",
        ENV,
        "--seeds",
        "0,1",
        "--runs_dir",
        tmp_path,
    ]
    for i in range(2):
        (tmp_path / "iql" / ENV / f"seed_{i}").mkdir(parents=True)
        settings = config(f"python algorithms/iql.py --env {ENV} --seed {i}")
        text = yaml.safe_dump(dataclasses.asdict(settings))
        (tmp_path / "iql" / ENV / f"seed_{i}" / "config.yaml").write_text(text)
    (tmp_path / "iql" / ENV / "seed_1.log").write_text("error: out of luck\n\n")
    *lines, counts = program("list", *args)
    assert counts == "1 crashed, 4 missing, 1 started" and len(lines) == 6
    assert lines[2].split()[0] == "started" and lines[3].split()[0] == "crashed"
    for method in ("iql", "pex"):
        (tmp_path / method / ENV / "seed_0").mkdir(parents=True, exist_ok=True)
        (tmp_path / method / ENV / "seed_0" / "summary.yaml").touch()
    lines = program("run", *args, "--dry_run")
    assert [line for line in lines if "--seed 0" in line] == []
    assert [line.split()[1] for line in lines if line[0] != "#"] == [
        "algorithms/iql.py", "algorithms/iql.py", "algorithms/pex.py"
    ]  # fmt: skip
    changed = program("list", *args, "--set", "beta=7", "--set", "threads=2")
    assert [line.split()[0] for line in changed[:4]] == ["missing", "missing", "changed", "changed"]
    message = f"iql/{ENV}/seed_0 has other settings of beta; delete it, or take another --runs_dir"
    with pytest.raises(SystemExit, match=message):
        program("run", *args, "--set", "beta=7", "--dry_run")


@pytest.mark.parametrize(
    "args, message",
    [
        (["list"], "give one or more of the experiments table1, "),
        (["list", "table99"], "give one or more of the experiments"),
        (["list", "table1", "--methods", "sac"], "no method sac"),
        (["list", "table1", "--tasks", "pong"], "no run of these --methods and --tasks"),
        (["list", "table1", "--seeds", "one"], "--seeds are whole numbers"),
        (["list", "table1", "--set", "beat=1"], "no script has a setting beat"),
        (["list", "table1", "--set", "env=x"], "--set takes KEY=VALUE"),
        (["list", "table8", "--set", "calibrated=true"], "cql is defined by --calibrated"),
        (["list", "table8", "--set", "n_episodes=few"], "n_episodes takes a value of type int"),
        (["run", "table1", "--retries", "-1"], "--retries at least 0"),
        (["run", "table1", "--frobnicate"], "unrecognized arguments"),
    ],
)
def test_errors_are_one_line(program, args, message):
    with pytest.raises(SystemExit) as stop:
        program(*args)
    assert stop.value.code.startswith("error: ") and message in stop.value.code
    assert "\n" not in stop.value.code


# --- Real runs ---


@pytest.fixture
def one_thread():
    threads, handlers = torch.get_num_threads(), [signal.getsignal(s) for s in (2, 15)]
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in zip((2, 15), handlers, strict=True):
        signal.signal(number, handler)


def test_users_find_all_that_they_share_in_the_cache(grid, tmp_path, one_thread, capsys):
    """The commands of the plan, run here: after the preparing runs nothing is made twice."""
    pairs = dict(pair.split("=") for pair in [*TINY, *TINY_DARE])
    pairs |= {"runs_dir": str(tmp_path), "online_iterations": "70", "cql_n_actions": "2"}
    methods = ["cql", "cal_ql", "dare_cql", "dare_iql", "dare_iql_no_guidance", "dare_iql_resample",
               "pex"]  # fmt: skip
    names = ["table1", "fig4", "resample"]
    grid.EXPERIMENTS["resample"] = grid.Experiment([("dare_iql_resample", [ENV])])
    try:
        runs = grid.plan(names, pairs, methods, [ENV], [1])
    finally:
        del grid.EXPERIMENTS["resample"]
    assert [run.stage for run in runs] == [0] * 4 + [1] * 7 + [2]
    made, hits = {}, {}
    for run in runs:
        before = set((tmp_path / "cache").glob("*.pt"))
        importlib.import_module(run.script).main(run.command[2:])
        name = run.flags.get("name", run.script)
        made[name] = {p.name.split("-")[0] for p in set((tmp_path / "cache").glob("*.pt")) - before}
        found = [x.split()[2] for x in capsys.readouterr().out.splitlines() if "cache hit" in x]
        hits[name] = found
    assert made.pop("prepare_dare") == {"iql", "behavior", "support"}  # an untrained agent
    assert made.pop("prepare_dare_resample") == {"support"}
    for name, kind in (("iql", "iql"), ("cal_ql", "cal_ql"), ("cql", "cal_ql")):
        assert made.pop(f"prepare_{name}") == {kind}
    assert len(made) == 7 and not any(made.values())
    assert hits["dare_cql"] == ["cal_ql", "behavior", "support"]
    assert hits["dare_iql"] == hits["dare_iql_resample"] == ["iql", "behavior", "support"]
    assert hits["dare_iql_no_guidance"] == ["iql", "behavior"]
    assert hits["cql"] == ["cal_ql"] and hits["pex"] == ["iql"]


def rows(path, name):
    """Rows of a CSV file without its times."""
    with open(path / f"{name}.csv", newline="") as f:
        return [
            {k: v for k, v in row.items() if k != "steps_per_second"} for row in csv.DictReader(f)
        ]


def command_lines():
    """Parent and words of every process."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            yield parent, (path / "cmdline").read_text().split("\0")


def wait_for(what, seconds=240.0):
    """First true value of a function."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.02)
    pytest.fail("nothing came")


@pytest.fixture
def start(tmp_path):
    """Starts the program on two workers, in a process group of its own, and never leaves it."""
    started = []
    yield lambda *args: started.append(popen(tmp_path, *args)) or started[-1]
    for process in started:
        if process.poll() is None:  # a failed test: Ray's own processes end with the program
            process.terminate()
            process.wait()


def popen(tmp_path, *args):
    words = [sys.executable, "results/grid.py", "run", "table1", "--tasks", ENV, "--workers", "2"]
    words += ["--runs_dir", str(tmp_path), *args]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, cwd=REPOSITORY, env=environment, text=True,
                            start_new_session=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip


class InlineRay:
    """What execute needs of Ray, in this process: the tasks whose name contains `bad` fail."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            cause = "error: out of luck"

    def __init__(self, bad):
        self.bad, self.order, self.asked = bad, [], {}

    def remote(self, function):
        return self

    def options(self, **asked):
        self.asked = asked
        return type("Task", (), {"remote": lambda _, command, directory, *rest: directory})()

    def wait(self, refs, timeout):
        return refs[:1], refs[1:]

    def get(self, directory):
        self.order.append(directory)
        if self.bad in directory:
            raise self.exceptions.RayTaskError

    def cluster_resources(self):
        return {"CPU": 2, "GPU": self.gpus}

    def available_resources(self):
        return {"CPU": 1.0}


@pytest.mark.parametrize("gpus", [0, 1])
def test_dependents_of_a_failed_run_are_skipped_and_the_others_go_on(grid, tmp_path, capsys, gpus):
    runs = grid.plan(["table1"], {"runs_dir": str(tmp_path)}, ["dare_iql", "cql"], [ENV], [0, 1])
    ray, progress = InlineRay(bad="prepare_iql/hopper-medium-v2/seed_1"), grid.Progress(runs, runs)
    ray.gpus = gpus
    args = argparse.Namespace(retries=2, runs_per_gpu=4)
    grid.execute(runs, progress, ray, args)
    assert ray.asked["num_gpus"] == gpus / 4 and ray.asked["max_retries"] == 2
    lost = [str(tmp_path / name / ENV / "seed_1") for name in ("prepare_iql", "dare_iql")]
    assert {str(path) for path in progress.failed} == set(lost)
    assert len(ray.order) == len(set(ray.order)) == len(runs) - 1 and lost[1] not in ray.order
    order = [Path(path) for path in ray.order]
    for run in runs:
        if run.directory in order:
            assert all(order.index(x.directory) < order.index(run.directory) for x in run.needs)
    lines = capsys.readouterr().out.splitlines()
    assert f"failed: {lost[0]}: error: out of luck" in lines
    assert f"skipped: {lost[1]} waits for {lost[0]}" in lines
    assert lines[-1] == f"{len(runs) - 2} of {len(runs)} finished, 0 running, 2 failed"


def log_of(tmp_path, method):
    path = tmp_path / method / ENV / "seed_0.log"
    return path.read_text() if path.exists() else ""


def worker_of(tmp_path, script):
    """Parent of the process of a script that is not a preparing run."""
    (found,) = [parent for parent, words in command_lines() if words[1:2] == [script]
                and str(tmp_path) in words and "--name" not in words]  # fmt: skip
    return found


def test_kill_interrupt_and_failure(start, tmp_path, one_thread):
    """iql loses its worker, then all is stopped by Ctrl-C, then the same command goes on to the
    end; a run that cannot start is in nobody's way.
    """
    pytest.importorskip("ray")
    broken = tmp_path / "edis_iql" / ENV / "seed_0"
    broken.mkdir(parents=True)
    (broken / "config.yaml").write_text("beta: 5.0\n")
    sizes = ["online_iterations=1500", "checkpoint_freq=250", "eval_freq=250"]
    args = ["--methods", "iql,pex,edis_iql", "--seeds", "0"]
    args += options([*TINY, *sizes])
    process = start(*args, "--retries", "1")
    wait_for(lambda: "online step 250" in log_of(tmp_path, "iql"))
    os.kill(worker_of(tmp_path, "algorithms/iql.py"), signal.SIGKILL)
    wait_for(lambda: "online step 500" in log_of(tmp_path, "iql").partition("attempt 2")[2])
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1 and output.endswith("the same command goes on from there\n")
    log, run = log_of(tmp_path, "iql"), tmp_path / "iql" / ENV / "seed_0"
    killed, step = re.findall(
        rf"(?:going on with {run} from|interrupted at) online step ([\d,]+)", log
    )
    assert int(killed.replace(",", "")) in (0, 250, 500)  # one interval at most
    assert yaml.safe_load((run / "job.yaml").read_text())["attempts"] == 2

    process = start(*args, "--retries", "0")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1, output
    *_, counts, last = output.splitlines()
    assert counts == "3 of 4 finished, 0 running, 1 failed"
    assert last == "error: 1 runs failed or were skipped; their logs say why"
    (failure,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert failure.startswith(f"failed: {broken}: error: {broken} has other settings of ")
    assert f"going on with {run} from online step {int(step):,}" in log_of(tmp_path, "iql")
    assert all("cache hit: iql from" in log_of(tmp_path, method) for method in ("iql", "pex"))
    assert log_of(tmp_path, "prepare_iql").count("offline step 50") == 1
    check_jobs(tmp_path)
    undisturbed = tmp_path / "undisturbed"
    words = shlex.split(log.splitlines()[0].removeprefix("attempt 1: "))[2:]
    iql.main([str(undisturbed) if word == str(tmp_path) else word for word in words])
    step = int(step.replace(",", ""))
    for name in ("eval", "train"):
        found, expected = rows(run, name), rows(undisturbed / "iql" / ENV / "seed_0", name)
        # With the agent from the cache there are no offline rows in train.csv; and the means of the
        # row that Ctrl-C fell into are those of the steps after it.
        expected = [row for row in expected if name == "eval" or row["phase"] == "online"]
        if name == "train" and step % 25:
            del found[step // 25], expected[step // 25]
        assert found == expected and len(expected) > 5


def check_jobs(tmp_path):
    """job.yaml of a run that was killed, interrupted and ended, and of an undisturbed one."""
    job = yaml.safe_load((tmp_path / "iql" / ENV / "seed_0" / "job.yaml").read_text())
    assert job["attempts"] == 3 and job["seconds"] is None  # of the killed attempt not known
    job = yaml.safe_load((tmp_path / "prepare_iql" / ENV / "seed_0" / "job.yaml").read_text())
    assert job["attempts"] == 1 and 1 < job["seconds"] < 120 and 0.1 < job["peak_memory_gb"] < 2
    assert job["command"].startswith("python algorithms/iql.py --env") and " x " in job["hardware"]


@pytest.mark.parametrize("script", ["iql", "pex", "dare_iql", "cal_ql", "dare_cql"])
def test_the_last_four_evaluations_of_the_study_come_after_updates(grid, script):
    path = RESULTS.parent / grid.EXPERIMENTS["study"].configs[script]
    cfg = yaml.safe_load(path.read_text())
    cfg = {k: int(v) for k, v in cfg.items() if k.endswith(("iterations", "steps", "freq"))}
    first_of_four = cfg["online_iterations"] - 3 * cfg["eval_freq"]
    assert cfg["initial_collection_steps"] < first_of_four
