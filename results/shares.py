"""Where the time of an environment step goes: python results/shares.py [--sizes study]

Each method runs for --steps environment steps with updates, on a CPU, at the sizes of the paper
(default) or of the study, from untrained networks and without evaluations. A line gives the
milliseconds of a step by part; --csv keeps the table with the hardware.
"""

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import torch
from attempt import ROOT, hardware
from collect import write_table
from experiments import EXPERIMENTS, METHODS, Experiment
from grid import fields_of, make_run, script_module

# Part of a step: classes and methods of the scripts whose own time it is. A time that passes in
# none of them is the rest: buffers, logs, the loop.
PARTS = {
    "environment": [("TrainingEnv", "step")],
    "acting": [("ImplicitQLearning", "act"), ("CalQL", "act")],
    "agent's update": [("ImplicitQLearning", "update"), ("CalQL", "update")],
    "reference actions": [("DARE", "reference_actions")],
    "energy": [("DARE", "energy_step")],
    "support actions": [("DARE", "draw_online_support")],
    "scores and exchange": [("DARE", "__call__")],
}
BEFORE = 20  # environment steps with updates before the clock starts
TINY = {  # what would only delay the first online step
    "regenerated_size": 5_000,
    "offline_iterations": 0,
    "behavior_iterations": 0,
    "energy_iterations": 0,
    "n_support_states": 256,
    "initial_collection_steps": 400,  # more than a batch, so that rows differ
    "n_episodes": 1,
    "eval_freq": 1_000_000,
    "device": "cpu",
    "wandb": "disabled",
}


class Clock:
    """Seconds by part, without those of parts that run inside it, between two steps."""

    def __init__(self, start: int, end: int):
        self.start, self.end, self.steps, self.result = start, end, 0, {}
        self.seconds, self.open, self.last = Counter(), ["rest"], time.perf_counter()

    def switch(self):
        """Count the time since the last switch for the part that is open."""
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now

    def timed(self, part: str, method):
        """A method whose time is counted; an environment step ends the step."""

        def call(*args, **kwargs):
            self.switch()
            self.open.append(part)
            try:
                return method(*args, **kwargs)
            finally:
                self.switch()
                self.open.pop()
                if part == "environment":
                    self.end_step()

        return call

    def end_step(self):
        """Forget what was before the start; keep what was before the end."""
        self.steps += 1
        if self.steps == self.start:
            self.seconds.clear()
        if self.steps == self.end:
            self.result = dict(self.seconds)


def measure(method: str, env: str, experiment: Experiment, steps: int) -> dict:
    """Milliseconds of an environment step by part."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        more = {k: v for k, v in TINY.items() if k in fields_of(METHODS[method][0])}
        start = TINY["initial_collection_steps"] + BEFORE
        more["online_iterations"] = start + steps
        run = make_run(method, env, 0, experiment, more | {"runs_dir": folder})
        script = script_module(run.script)
        clock = Clock(start, start + steps)
        for part, methods in PARTS.items():
            for owner, name in methods:
                if found := getattr(getattr(script, owner, None), name, None):
                    timed = clock.timed(part, found)
                    patches.enter_context(patch.object(getattr(script, owner), name, timed))
        silence = patches.enter_context(open(os.devnull, "w"))
        patches.enter_context(contextlib.redirect_stdout(silence))
        script.main(run.command[2:])
    ms = {part: 1e3 * clock.result.get(part, 0.0) / steps for part in (*PARTS, "rest")}
    return {"method": method, "ms per step": sum(ms.values())} | ms


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=["paper", "study"], default="paper")
    parser.add_argument("--env", default="hopper-medium-replay-v2", help="task")
    parser.add_argument("--methods", default="iql,pex,dare_iql,dare_iql_resample,cal_ql,dare_cql",
                        help=f"of {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--steps", type=int, default=300, help="environment steps that are timed")
    parser.add_argument("--csv", type=Path, help="file for the table")
    args = parser.parse_args()
    methods = args.methods.split(",")
    if unknown := [method for method in methods if method not in METHODS]:
        sys.exit(f"error: no method {unknown[0]}; there are {', '.join(METHODS)}")
    paper, output = (
        Experiment([], settings={"data": "regenerated"}),
        args.csv and args.csv.resolve(),
    )
    os.chdir(ROOT)
    rows = []
    for method in methods:
        experiment = EXPERIMENTS["study"] if args.sizes == "study" else paper
        row = measure(method, args.env, experiment, args.steps)
        if not rows:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        shown = [f"{x:.2f}" if isinstance(x, float) else x for x in row.values()]
        print(f"| {' | '.join(shown)} |", flush=True)
        command = shlex.join(["python", "results/shares.py", *sys.argv[1:]])
        facts = {"hardware": hardware(), "torch": str(torch.__version__), "command": command}
        rows.append({k: f"{x:.3f}" if isinstance(x, float) else x for k, x in row.items()} | facts)
    if output:
        write_table(rows, output)


if __name__ == "__main__":
    main()
