"""results/grid.py: the plan of every experiment, what runs share, and runs by Ray."""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
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
import yaml

import grid
from lib.experiments import (
    BASELINES,
    EXPERIMENTS,
    METHODS,
    PICTURES,
    ROOT,
    TASKS,
    Experiment,
    Method,
)
from lib.records import is_finished, read_rows

DATA = Path(__file__).parents[1] / "data" / "sample_hopper.hdf5"
ENV = "hopper-medium-v2"
TINY = {
    "wandb": "disabled",
    "device": "cpu",
    "data": str(DATA),
    "hidden_dim": "16",
    "batch_size": "32",
    "offline_iterations": "20",
    "online_iterations": "70",
    "initial_collection_steps": "60",
    "n_episodes": "1",
    "eval_freq": "70",
    "offline_eval_freq": "1000",
    "log_freq": "10",
}
TINY_DARE = {
    "behavior_iterations": "5",
    "behavior_batch_size": "16",
    "behavior_width": "8",
    "energy_hidden": "8",
    "energy_iterations": "5",
    "energy_batch_size": "16",
    "n_support": "2",
    "n_support_states": "50",
    "diffusion_steps": "2",
}


@pytest.fixture
def program(monkeypatch, capsys):
    """Call the program; returns the lines that it printed."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["grid.py", *map(str, args)])
        grid.main()
        return capsys.readouterr().out.splitlines()

    return call


def names_of(runs):
    return [run.flags.get("name", run.script) for run in runs]


# --- Plans ---


def test_experiments_are_methods_and_tasks_that_exist():
    names = [f"table{i}" for i in (1, 2, 3, 8, 9, 10, 11)] + [f"fig{i}" for i in range(1, 15)]
    own = [
        "finetuning",
        "finetuning_cql",
        "finetuning_replay",
        "full_size",
        "longer",
        "readings",
        "regenerated",
    ]
    assert set(EXPERIMENTS) >= {*names, "paper", *own} and len(TASKS) == 13
    plans = [*EXPERIMENTS.values(), *PICTURES.values()]
    assert {m for x in plans for m in x.methods} == set(METHODS)
    assert all(set(x.tasks) <= set(TASKS) for x in EXPERIMENTS.values())


@pytest.mark.parametrize(
    "name, tasks, n_least",
    [
        ("paper", f"{ENV},umaze-v2", 40),
        ("finetuning", "halfcheetah", 10),
        ("finetuning_replay", "v2", 8),
        ("finetuning_cql", "v2", 5),
        ("longer", "v2", 5),
        ("readings", "v2", 18),
        ("regenerated", "v2", 8),
    ],
)
def test_printed_commands_are_unique_and_parse(program, monkeypatch, name, tasks, n_least):
    monkeypatch.chdir(ROOT)
    args = ["--dry_run", "--seeds", "3", "--runs_dir", "none_yet", "--tasks", tasks]
    lines = program("run", name, *args)
    commands = [line for line in lines if not line.startswith("#")]
    assert lines[0].startswith("# stage 1: ") and len(commands) >= n_least
    directories = set()
    for line in commands:
        python, script, *words = shlex.split(line)
        assert python == "python" and (ROOT / script).exists()
        config = grid.parser_of(Path(script).stem).parse_args(words)
        assert config.seed == (0 if config.name.startswith("prepare_dare") else 3)
        directories.add((config.name, config.env))
    assert len(set(commands)) == len(directories) == len(commands)


def test_seeds_of_a_task_replace_those_of_the_experiment():
    def seeds(task, **more):
        runs = grid.plan(["readings"], {}, ["dare_iv_no_exchange"], [task], **more)
        return [run.flags["seed"] for run in runs if "load_model" in run.flags]

    assert seeds("hopper") == [0, 1, 2] and seeds("halfcheetah") == [4, 5]
    assert seeds("halfcheetah", seeds=[0]) == [0]


def test_table1():
    """Its runs, and the preparing ones against a count of what the methods start from."""
    runs = grid.plan(["table1"], {})
    users = [run for run in runs if "load_model" in run.flags]
    assert len(users) == 13 * 8 * 5
    # DARE-C's behavior model is the one of DARE-I, so its preparing run comes after that one's.
    assert Counter(run.stage for run in runs) == {0: 3 * 13 * 5 + 13, 1: 13 + 7 * 13 * 5, 2: 13 * 5}
    group = {"cql": "cql", "cal_ql": "cal_ql", "edis_cql": "cal_ql", "dare_cql": "cal_ql"}
    for run in users:
        (name,), seed, env = names_of([run]), run.flags["seed"], run.flags["env"]
        expected = [(f"prepare_{group.get(name, 'iql')}", env, f"seed_{seed}")]
        expected += [(f"prepare_{name}", env, "seed_0")] * name.startswith("dare")
        assert [need.directory.parts[-3:] for need in run.needs] == expected
        assert run.flags["load_model"] == "runs/{}/{}/{}/offline.pt".format(*expected[0])
    assert all(run.flags["online_iterations"] == 0 for run in runs if run not in users)


def test_the_same_run_of_several_experiments_is_one():
    only = {"tasks": [ENV, "umaze-v2"], "seeds": [0]}
    names = ["table1", "table8", "fig5", "fig8"]
    assert len(grid.plan(names, {}, **only)) == len(grid.plan(["table1"], {}, **only))
    with pytest.raises(SystemExit, match="differ in the settings of .*--runs_dir each"):
        grid.plan(["table1", "finetuning"], {}, ["iql"], ["halfcheetah-medium-v2"], [0])


def test_stages(monkeypatch):
    """The preparing runs that each run waits for, and the chain of those that share a cache."""
    methods = "iql pex dare_iv dare_iql_no_guidance dare_iql_no_exchange dare_iql"
    others = "cal_ql dare_cql dare_iql_resample"
    both = Experiment("Both", [(methods, [ENV]), (others, [ENV])])
    monkeypatch.setitem(EXPERIMENTS, "both", both)
    runs = grid.plan(["both"], {}, seeds=[2])
    needs = {name: names_of(run.needs) for name, run in zip(names_of(runs), runs, strict=True)}
    assert needs["pex"] == needs["dare_iql_no_exchange"] == needs["iql"] == ["prepare_iql"]
    assert needs["dare_cql"] == ["prepare_cal_ql", "prepare_dare_cql"]
    assert needs["dare_iql_resample"] == ["prepare_iql", "prepare_dare_iql_resample"]
    for name in ("dare_iql", "dare_iv", "dare_iql_no_guidance"):
        assert needs[name] == ["prepare_iql", "prepare_dare_iql"]
    assert needs["prepare_dare_iql"] == needs["prepare_iql"] == []  # the first of a chain
    chain = ["prepare_dare_iql", "prepare_dare_cql", "prepare_dare_iql_resample"]
    assert [needs[name] for name in chain[1:]] == [chain[:1], chain[1:2]]


def test_settings_of_a_task_hold_for_it_alone_and_for_its_agents(monkeypatch):
    own = Experiment(
        "Own",
        [("iql dare_iql", [ENV, "antmaze-umaze-v2"])],
        configs={"iql": "results/finetuning.yaml", "dare_iql": "results/finetuning_dare.yaml"},
        task_settings={"antmaze-umaze-v2": {"offline_iterations": 60_000, "n_episodes": 20}},
    )
    monkeypatch.setitem(EXPERIMENTS, "own", own)
    runs = grid.plan(["own"], {}, seeds=[1])
    runs = [r for r in runs if not r.flags.get("name", "").startswith("prepare_dare")]
    updates = {(r.flags["env"], r.flags.get("offline_iterations")) for r in runs}
    assert updates == {("antmaze-umaze-v2", 60_000), (ENV, None)}
    assert {r.flags.get("n_episodes") for r in runs if "umaze" in r.flags["env"]} == {20}
    files = {r.flags["config_path"] for r in runs if r.script == "iql"}
    assert files == {"results/finetuning.yaml"}


def test_an_agent_with_other_settings_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", Method("Mine", "#000000", "iql", {"beta": 7}))
    monkeypatch.setitem(EXPERIMENTS, "mine", Experiment("Mine", [("mine", [ENV])]))
    with pytest.raises(SystemExit, match="another beta; make .* agents of its own: offline='mine'"):
        grid.plan(["mine"], {})
    own = Method("Mine", "#000000", "iql", {"beta": 7}, offline="mine")
    monkeypatch.setitem(METHODS, "mine", own)
    agent, run = grid.plan(["mine"], {}, seeds=[0])
    assert names_of([agent, run]) == ["prepare_mine", "mine"] and own.baseline == "iql"
    assert agent.flags["beta"] == 7 and "prepare_mine" in run.flags["load_model"]


def test_the_readmes_lines_for_a_method_of_your_own(monkeypatch, tmp_path):
    """As they stand in results/README.md; then with offline agents of its own."""
    readme = (ROOT / "results" / "README.md").read_text()
    lines = re.search(r"## A method of your own.*?```python\n(.*?)```", readme, re.S)[1]
    entry = re.search(r'^    "mine": Method\(.*\n', lines, re.M)[0]
    below, at_the_end = lines.split(entry)
    source = (ROOT / "results" / "lib" / "experiments.py").read_text()
    source = source.replace("METHODS = {\n", f"METHODS = {{\n{entry}")
    source = source.replace("\n\n@dataclass", f"\n\n{below}\n\n@dataclass", 1)
    spec = importlib.util.find_spec("lib.experiments")

    def known(source):
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # for its dataclasses
        exec(source + at_the_end, vars(module))
        return module

    mine = known(source)
    for picture in ("mine", "auc", "sign", "differences-iql"):
        assert "mine" in mine.PICTURES[picture].methods
    assert (mine.METHODS["mine"].baseline, mine.METHODS["mine"].dare) == ("iql", "dare_iql")

    algorithms = tmp_path / "algorithms"
    algorithms.mkdir()
    (algorithms / "mine.py").write_text((ROOT / "algorithms" / "dare_iql.py").read_text())
    for name in ("iql.py", "dare_iql.py"):
        (algorithms / name).symlink_to(ROOT / "algorithms" / name)
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.syspath_prepend(algorithms)
    monkeypatch.setattr(grid, "ROOT", tmp_path)
    own = Method("Mine", "#009E73", "mine", offline="mine")
    monkeypatch.setitem(METHODS, "mine", own)
    monkeypatch.setitem(BASELINES, "mine", "iql")
    plan = Experiment(**{k: v for k, v in vars(mine.EXPERIMENTS["mine"]).items()})
    monkeypatch.setitem(EXPERIMENTS, "mine", plan)
    names = Counter(names_of(grid.plan(["mine"], {})))
    assert names == {
        **dict.fromkeys(("prepare_iql", "iql", "dare_iql", "prepare_mine", "mine"), 3),
        **dict.fromkeys(("prepare_dare_iql", "prepare_mine_cache"), 1),
    }
    assert plan.needs("mine_cache", "halfcheetah-medium-v2")
    sys.modules.pop("mine")


@pytest.mark.parametrize(
    "method, message",
    [
        (None, "has other, which METHODS there lacks"),
        (Method("Mine", "#000000", "mime"), "there is no algorithms/mime.py"),
        (Method("Mine", "#000000", "iql", {"bata": 7}), "the setting bata, which algorithms/iql"),
        (Method("Mine", "#000000", "iql", offline="mime"), "give BASELINES.* the name of a method"),
    ],
)
def test_a_method_that_cannot_be_run_is_refused(monkeypatch, method, message):
    if method:
        monkeypatch.setitem(METHODS, "other", method)
    monkeypatch.setitem(EXPERIMENTS, "other", Experiment("Mine", [("other", [ENV])]))
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        grid.plan(["other"], {})


def test_variants_without_their_script_among_the_methods_are_refused(monkeypatch):
    # A copy: an entry that is taken out and put back would come last from then on.
    methods = {name: method for name, method in METHODS.items() if name != "dare_iql"}
    methods["other"] = Method("Mine", "#000000", "dare_iql")
    monkeypatch.setattr(grid, "METHODS", methods)
    monkeypatch.setitem(EXPERIMENTS, "other", Experiment("Mine", [("other", [ENV])]))
    with pytest.raises(SystemExit, match="error: METHODS .* has other and not dare_iql: "):
        grid.plan(["other"], {})


def test_states_and_what_is_left_to_do(program, tmp_path, monkeypatch):
    args = ["table8", "--methods", "iql", "--tasks", ENV, "--seeds", "0,1,2,3"]
    args += ["--runs_dir", tmp_path]

    def begin(run):
        run.directory.mkdir(parents=True)
        settings = dataclasses.asdict(grid.config_of(run))
        (run.directory / "config.yaml").write_text(yaml.safe_dump(settings))
        return settings

    def finish(run):
        steps = begin(run)["online_iterations"]
        (run.directory / "train.csv").write_text(f"phase,step\nonline,{steps}\n")
        (run.directory / "eval.csv").write_text(f"phase,step\nonline,{steps}\n")

    runs = grid.plan(["table8"], {"runs_dir": str(tmp_path)}, ["iql"], [ENV], [0, 1, 2, 3])
    agents, users = runs[:4], runs[4:]
    finish(agents[0]), finish(agents[1])
    finish(users[0]), begin(users[1])
    users[2].log.parent.mkdir(parents=True, exist_ok=True)
    users[2].log.write_text("error: out of luck\n\n")
    *lines, counts = program("list", *args)
    assert counts == "1 crashed, 3 finished, 3 missing, 1 started" and len(lines) == 8
    assert [line.split()[0] for line in lines[4:]] == ["finished", "started", "crashed", "missing"]
    left = [shlex.split(line) for line in program("run", *args, "--dry_run") if line[0] != "#"]
    names = [("prepare_iql" in words, words[words.index("--seed") + 1]) for words in left]
    assert names == [(True, "2"), (True, "3"), (False, "1"), (False, "2"), (False, "3")]
    changed = program("list", *args, "--set", "beta=7", "--set", "threads=2")
    assert Counter(line.split()[0] for line in changed[:-1]) == {
        "changed": 4,
        "missing": 3,
        "crashed": 1,
    }
    longer = program("list", *args, "--set", "online_iterations=300000")
    assert [line.split()[0] for line in longer[4:8]] == ["started", "started", "crashed", "missing"]
    assert longer[0].startswith("finished")  # an offline agent has no online steps
    shorter = program("list", *args, "--set", "online_iterations=100000")
    assert [line.split()[0] for line in shorter[4:6]] == ["changed", "changed"]
    message = f"prepare_iql/{ENV}/seed_0 has other settings of beta; move it away, or use another"
    with pytest.raises(SystemExit, match=message):
        program("run", *args, "--set", "beta=7", "--dry_run")


@pytest.mark.parametrize(
    "args, message",
    [
        (["list"], "give one or more of the experiments table1, "),
        (["list", "table99"], "give one or more of the experiments"),
        (["list", "table1", "--methods", "sac"], "no method sac"),
        (["list", "table1", "--tasks", "hopper, pong"], "have no task with pong in its name"),
        (["list", "table8", "--methods", "pex"], "these experiments have no pex; they have cql"),
        (["list", "table1", "--seeds", "one"], "--seeds are whole numbers"),
        (["list", "table1", "--set", "env=x"], "--set takes KEY=VALUE"),
        (["run", "table1", "--retries", "-1"], "--retries at least 0"),
        (["run", "table1", "--frobnicate"], "unrecognized arguments"),
        (["list", "table1", "--set", "beat=1"], "experiments has a setting beat"),
        (["list", "table8", "--set", "calibrated=true"], "cql is defined by --calibrated"),
        (["list", "table8", "--methods", "iql", "--set", "utd=few"], "a whole number, not few"),
    ],
)  # fmt: skip
def test_errors_are_one_line(program, args, message):
    with pytest.raises(SystemExit) as stop:
        program(*args)
    assert stop.value.code.startswith("error: ") and message in stop.value.code
    assert "\n" not in stop.value.code


@pytest.mark.parametrize("script, file", EXPERIMENTS["finetuning"].configs.items())
def test_the_last_four_evaluations_come_after_updates(script, file):
    words = ["--config_path", str(ROOT / file), "--env", ENV]
    config = grid.parser_of(script).parse_args(words)
    first_of_four = config.online_iterations - 3 * config.eval_freq
    assert config.initial_collection_steps < first_of_four


# --- Runs in this process ---


def test_users_start_from_the_offline_agents_and_find_the_cache(tmp_path):
    """The commands of a plan, run here: after the preparing runs nothing is made twice."""
    options = TINY | TINY_DARE | {"runs_dir": str(tmp_path), "cql_n_actions": "2"}
    runs = grid.plan(["fig13", "table1"], options, ["dare_cql_no_guidance", "dare_iql"], [ENV], [1])
    made = {}
    for (name,), run in [(names_of([run]), run) for run in runs]:
        before = set((tmp_path / "cache").glob("*.pt"))
        importlib.import_module(run.script).main(run.command[2:])
        assert is_finished(run.directory), name
        made[name] = len(set((tmp_path / "cache").glob("*.pt")) - before)
        trained = any(row["phase"] == "offline" for row in read_rows(run.directory / "train.csv"))
        assert trained == (name in ("prepare_iql", "prepare_cal_ql"))
    assert made.pop("prepare_dare_cql") == 2  # behavior model and support actions
    assert len(made) == 5 and not any(made.values())


class InlineRay:
    """What execute needs of Ray, in this process: tasks whose name contains a key of `bad` fail as
    often as its value says.
    """

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            cause = "error: out of luck"

    def __init__(self, bad, gpus):
        self.bad, self.gpus, self.order, self.asked = bad, gpus, [], {}

    def remote(self, function):
        return self

    def options(self, **asked):
        self.asked = asked
        return type("Task", (), {"remote": lambda _, command, steps, directory, *rest: directory})()

    def wait(self, refs, timeout):
        return refs[:1], refs[1:]

    def get(self, directory):
        self.order.append(Path(directory))
        for name in self.bad:
            if name in directory and self.bad[name]:
                self.bad[name] -= 1
                raise self.exceptions.RayTaskError

    def cluster_resources(self):
        return {"CPU": 2, "GPU": self.gpus}

    def available_resources(self):
        return {"CPU": 1.0}


@pytest.mark.parametrize("gpus", [0, 1])
def test_dependents_of_a_failed_run_are_skipped_and_the_others_go_on(tmp_path, capsys, gpus):
    runs = grid.plan(["table8"], {"runs_dir": str(tmp_path)}, ["iql"], [ENV], [0, 1])
    ray = InlineRay({f"prepare_iql/{ENV}/seed_1": 3, f"prepare_iql/{ENV}/seed_0": 2}, gpus)
    args = argparse.Namespace(retries=2, runs_per_gpu=4)
    assert grid.execute(runs, runs, ray, args) == 2
    assert ray.asked["num_gpus"] == gpus / 4 and ray.asked["max_retries"] == 0  # of Ray's own
    lost = [str(tmp_path / name / ENV / "seed_1") for name in ("prepare_iql", "iql")]
    tries = Counter((path.parts[-3], path.name) for path in ray.order)
    assert tries == {
        ("prepare_iql", "seed_0"): 3,
        ("prepare_iql", "seed_1"): 3,
        ("iql", "seed_0"): 1,
    }
    assert ray.order[-1] == tmp_path / "iql" / ENV / "seed_0"  # after the last try of its agent
    lines = capsys.readouterr().out.splitlines()
    assert lines.count(f"again: {lost[0]}: error: out of luck") == 2
    assert f"failed: {lost[0]}: error: out of luck" in lines
    assert f"skipped: {lost[1]} waits for {lost[0]}" in lines
    assert lines[-1] == "2 of 4 finished, 0 running, 2 failed"


# --- Runs by Ray ---


def wait_for(what, seconds=240.0):
    """First true value of a function."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.02)
    pytest.fail("nothing came")


def worker_of(folder):
    """Parent of the one process that fine-tunes in a folder."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            words = (path / "cmdline").read_text().split("\0")
            if (
                words[1:2] == ["algorithms/iql.py"]
                and str(folder) in words
                and "--name" not in words
            ):
                return int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
    return None


def test_kill_interrupt_and_failure(tmp_path):
    """A run loses its worker, then all is stopped by Ctrl-C, then the same command goes on to the
    end; a run that cannot start is in nobody's way.
    """
    pytest.importorskip("ray", reason='needs pip install -e ".[grid]"')
    sizes = TINY | {"online_iterations": "1000", "log_freq": "100"}
    sizes |= {"checkpoint_freq": "100", "eval_freq": "100"}
    broken = tmp_path / "iql" / ENV / "seed_1"
    broken.mkdir(parents=True)
    (broken / "checkpoint.pt").write_text("no checkpoint")
    words = [sys.executable, "results/grid.py", "run", "table8", "--methods", "iql"]
    words += ["--tasks", ENV, "--seeds", "0,1", "--workers", "2", "--runs_dir", str(tmp_path)]
    words += [word for pair in sizes.items() for word in ("--set", "=".join(pair))]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}

    def start(*args):
        return subprocess.Popen([*words, *args], cwd=ROOT, env=environment, text=True,
                                start_new_session=True, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT)  # fmt: skip

    log, directory = tmp_path / "iql" / ENV / "seed_0.log", tmp_path / "iql" / ENV / "seed_0"
    process = start("--retries", "1")
    try:
        wait_for(lambda: log.exists() and "online step 200" in log.read_text())
        os.kill(worker_of(tmp_path), signal.SIGKILL)
        wait_for(lambda: "resuming" in log.read_text().partition("attempt 2")[2])
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 1
        assert output.endswith("interrupted; the same command resumes from there\n")
        assert yaml.safe_load((directory / "job.yaml").read_text())["attempts"] == 2
        process = start("--retries", "1")
        output, _ = process.communicate(timeout=240)
    finally:  # a failed test: Ray's own processes end with the program
        if process.poll() is None:
            process.terminate()
            process.wait()
    *_, counts, last = output.splitlines()
    assert "Traceback" not in output and "raylet" not in output
    assert process.returncode == 1 and counts == "3 of 4 finished, 0 running, 1 failed"
    assert last == "error: 1 runs failed or were skipped; their logs say why"
    (failure,) = [line for line in output.splitlines() if line.startswith("failed: ")]
    assert failure.startswith(f"failed: {broken}: error: {broken}/checkpoint.pt is damaged")
    assert is_finished(directory) and log.read_text().count("resuming") == 2
    job = yaml.safe_load((directory / "job.yaml").read_text())
    assert job["attempts"] == 3 and job["seconds"] is None  # of the killed attempt not known
