"""Times the hot computations: python results/benchmark.py [--device cuda] [--precision bf16]

One line per computation: median milliseconds of a warm call, calls per second, and the share of
the machine's matrix-product rate in the same precision, measured beside each call. --against times
CORL's and CEP's classes beside ours, by your checkouts of both, and prints how many times faster
ours are. --scripts times whole scripts, by short runs: milliseconds of an offline update and of an
online step. --profile NAME prints where the time of one computation goes; --output FILE.csv appends
the table.
"""

import argparse
import contextlib
import importlib
import io
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import diffusion
from lib.attempt import git_commit, hardware
from lib.checkouts import calls_of
from lib.experiments import ROOT, words
from lib.records import append, read_rows

sys.path.insert(0, str(ROOT / "algorithms"))

ENV, ROWS, STATE_DIM, ACTION_DIM = "hopper-medium-replay-v2", 100_000, 11, 3
WIDTHS = {"computation": 45, "ms": 10, "per_second": 12, "share_of_products": 19, "gflop": 10}
RATIO_WIDTHS = {"computation": 40, "ours": 15, "times_as_fast": 15, "quartiles": 15}
RATIO_WIDTHS |= {"their_ms": 10, "our_ms": 10, "rounds": 8}


class Clock:
    """Medians of warm calls, each beside a matrix product of the same precision."""

    def __init__(self, args):
        self.device, self.repeats, self.seconds = args.device, args.repeats, args.seconds
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        # Processor seconds, of which other programs take none, where one thread does all the work.
        one_thread = args.device == "cpu" and args.threads == 1
        self.now = time.process_time if one_thread else time.perf_counter
        self.x = torch.randn(args.product, args.product, dtype=dtype, device=args.device)

    def duration(self, call, n: int = 1) -> float:
        """Seconds of n calls."""
        self.synchronize()
        start = self.now()
        for _ in range(n):
            call()
        self.synchronize()
        return self.now() - start

    def synchronize(self):
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def measure(self, call) -> dict:
        """Time a call until `repeats` are done or `seconds` have passed, at least three times."""
        with FlopCounterMode(display=False) as counter:  # of matrix products
            call()
        warm_up(call)
        product, times, rates = 2.0 * len(self.x) ** 3, [], []
        self.x @ self.x
        end = time.perf_counter() + self.seconds
        while len(times) < 3 or (len(times) < self.repeats and time.perf_counter() < end):
            rates.append(product / self.duration(lambda: self.x @ self.x))
            times.append(self.duration(call))
        median, flop = statistics.median(times), counter.get_total_flops()
        share = flop / median / statistics.median(rates)
        return {
            "ms": f"{1e3 * median:.4g}",
            "per_second": f"{1 / median:.4g}",
            "share_of_products": f"{share:.2f}" if flop else "",
            "gflop": f"{flop / 1e9:.4g}" if flop else "",
        }

    def compare(self, theirs, ours: dict) -> list[dict]:
        """How many times faster ours are, in rounds that time all one after the other, so that what
        else the machine does meets all alike.
        """
        calls = {"theirs": theirs, **ours}
        for call in calls.values():
            warm_up(call)
        n = 1 + int(0.05 / self.duration(theirs))  # calls that are timed together
        rounds, end = [], time.perf_counter() + self.seconds
        while len(rounds) < 3 or (len(rounds) < self.repeats and time.perf_counter() < end):
            rounds.append({name: self.duration(call, n) for name, call in calls.items()})
        rows = []
        for name in ours:
            ratios = [times["theirs"] / times[name] for times in rounds]
            low, median, high = statistics.quantiles(ratios, n=4)
            row = {"ours": name, "times_as_fast": f"{median:.2f}"}
            row |= {"quartiles": f"{low:.2f} to {high:.2f}", "rounds": len(rounds)}
            for key, column in (("theirs", "their_ms"), (name, "our_ms")):
                row[column] = f"{1e3 / n * statistics.median(x[key] for x in rounds):.4g}"
            rows.append(row)
        return rows


def warm_up(call):
    """Call a few times: compiles, and records where the call is a CUDA graph."""
    for _ in range(4):
        call()


def dataset() -> dict:
    """Columns of a made-up dataset: random numbers and zeros."""
    data = {
        "observations": np.random.randn(ROWS, STATE_DIM).clip(-1, 1),
        "actions": np.random.uniform(-1, 1, (ROWS, ACTION_DIM)),
        "next_observations": np.random.randn(ROWS, STATE_DIM).clip(-1, 1),
    }
    return data | {name: np.zeros(ROWS) for name in ("rewards", "terminals", "mc_returns")}


def diffusion_batch(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """States [4096, S] and support actions [4096, 16, A]."""
    shape = 4096, 16, ACTION_DIM
    return torch.randn(4096, STATE_DIM, device=device), torch.rand(shape, device=device)


def agents(args) -> dict:
    """Updates on a batch of 256 as in offline training, sampling and acting."""
    calls, accelerated = {}, ("precision", "compile", "cuda_graph", "device")
    settings = {"env": ENV} | {name: getattr(args, name) for name in accelerated}
    for name, script, agent, more in [
        ("iql update", "iql", "ImplicitQLearning", {}),
        ("cal_ql update, 3 layers", "cal_ql", "CalQL", {}),
        ("cal_ql update, 5 layers", "cal_ql", "CalQL", {"q_n_hidden_layers": 5}),
    ]:
        module = importlib.import_module(script)
        config = module.TrainConfig(**settings, **more)
        buffer = module.ReplayBuffer(STATE_DIM, ACTION_DIM, ROWS, args.device)
        buffer.load_d4rl_dataset(dataset())
        trainer = getattr(module, agent)(STATE_DIM, ACTION_DIM, config)

        def update(trainer=trainer, buffer=buffer, config=config):
            return trainer.train(buffer.sample(config.batch_size))

        calls[name] = module.accelerate(update, config)
        if script == "iql":
            calls["buffer sample, 256"] = lambda buffer=buffer: buffer.sample(256)
            state = np.zeros((1, STATE_DIM))
            calls["acting, 1 state"] = lambda trainer=trainer, state=state: trainer.act(state)
    return calls


def sampler(args) -> dict:
    """Training of the behavior model and of the energy, and reference actions, at full size."""
    iql = importlib.import_module("iql")
    behavior = diffusion.BehaviorModel(STATE_DIM, ACTION_DIM).to(args.device)
    energy = diffusion.EnergyModel(STATE_DIM, ACTION_DIM).to(args.device)
    states, actions = diffusion_batch(args.device)
    target = iql.TwinQ(STATE_DIM, ACTION_DIM, n_hidden=3).to(args.device)  # CEP's size
    target.requires_grad_(False)

    def step(model, loss):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, capturable=True)

        def update():
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return update

    def guided(steps):
        return lambda: diffusion.sample_actions(behavior, states[:256], 1, energy, 3.0, steps)

    def energy_loss():
        q = target(states[:256, None].expand(-1, 16, -1), actions[:256])
        return diffusion.energy_loss(energy, states[:256], actions[:256], 3.0 * q)

    calls = {
        "behavior update, 4,096": step(
            behavior, lambda: diffusion.behavior_loss(behavior, states, actions[:, 0])
        ),
        "energy update, 256 x 16": step(energy, energy_loss),
        "guided sampling, 256 states, 10 steps": guided(10),
        "guided sampling, 256 states, 15 steps": guided(15),
    }
    names = "precision", "compile", "cuda_graph", "device"
    config = iql.TrainConfig(env=ENV, **{name: getattr(args, name) for name in names})
    return {name: iql.accelerate(call, config) for name, call in calls.items()}


def environments(args) -> dict:
    """Environment steps."""
    calls = {}
    for task in (ENV, "halfcheetah-medium-v2", "walker2d-medium-v2", "antmaze-umaze-v2"):
        env = gymnasium.make(task)
        env.reset(seed=0)
        action = np.zeros(env.action_space.shape)

        def steps(env=env, action=action):
            for _ in range(100):
                if any(env.step(action)[2:4]):
                    env.reset()

        calls[f"100 environment steps, {task.split('-')[0]}"] = steps
    return calls


def time_script(script: str, args) -> dict:
    """Milliseconds of an offline update and of an online step, from a short run's train.csv.

    Untrained behavior models and energies take as long as trained ones.
    """
    module, n = importlib.import_module(script), args.steps
    settings = {"env": ENV, "seed": 0, "name": script, "n_episodes": 1}
    settings |= {"data": "regenerated", "regenerated_size": 5_000}
    settings |= {"wandb": "disabled", "device": args.device, "precision": args.precision}
    settings |= {"offline_iterations": 2 * n, "online_iterations": 500 + 2 * n, "log_freq": n}
    settings |= {"initial_collection_steps": 500, "eval_freq": 10**6, "offline_eval_freq": 10**6}
    settings |= {"behavior_iterations": 0, "energy_iterations": 0, "n_support_states": 256}
    settings |= {k: getattr(args, k) for k in ("threads", "compile", "cuda_graph")}
    if args.config:
        settings = {"config_path": args.config} | settings
    known = {"config_path", *module.TrainConfig.__dataclass_fields__}
    with tempfile.TemporaryDirectory() as folder:
        words = [str(x) for k, v in (settings | {"runs_dir": folder}).items() if k in known
                 for x in (f"--{k}", v)]  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            module.main(words)
        rows = read_rows(Path(folder, script, ENV, "seed_0", "train.csv"))
    found = {"script": script}
    for phase in ("offline", "online"):
        last = [row for row in rows if row["phase"] == phase and "q_loss" in row][-1]
        found[f"ms per {phase} step"] = f"{1e3 / last['steps_per_second']:.4g}"
    return found


def profile(call, device: str):
    """Print the operators that take most of the time of five calls."""
    for _ in range(5):
        call()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(5):
            call()
    key = f"self_{device}_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=20))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="compile updates and sampler")
    parser.add_argument("--cuda_graph", action="store_true", help="on CUDA, replay graphs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=50, help="calls of each at most")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each at most")
    parser.add_argument("--product", type=int, default=2048, help="size of the matrix product")
    parser.add_argument("--against", type=Path, nargs="+", default=[], metavar="FOLDER",
                        help="your checkouts of CORL and of CEP, to compare with")  # fmt: skip
    parser.add_argument("--only", default="", help="computations whose name contains this")
    parser.add_argument("--profile", default="", help="profile those that contain this")
    parser.add_argument("--scripts", type=words, default=[], help="time these, as in iql,dare_iql")
    parser.add_argument("--config", help="configuration file of --scripts: sizes, for instance")
    parser.add_argument("--steps", type=int, default=200, help="steps of --scripts to time")
    parser.add_argument("--output", type=Path, help="CSV file to append the table to")
    args = parser.parse_args()
    for script in args.scripts:
        if not (ROOT / "algorithms" / f"{script}.py").exists():
            parser.error(f"there is no algorithms/{script}.py")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch sees no CUDA device; use --device cpu")
    return args


def print_row(row: dict, widths: dict):
    """Print a line of a table."""
    print("".join(f"{row[name]:>{width}}" for name, width in widths.items()), flush=True)


def compare(args, machine: dict) -> list[dict]:
    """Print and return the rows of --against: ours as it is and compiled, theirs in fp32."""
    data, batch, theirs = dataset(), diffusion_batch(args.device), {}
    for folder in args.against:
        theirs |= calls_of(folder, data, *batch, args.device)
    last = "guided sampling, 256 states, 15 steps"
    if last in theirs:  # ours needs fewer steps for the same error: see algorithms/README.md
        theirs["guided sampling, 256 states, 10 steps"] = theirs[last]
    if not (theirs := {name: call for name, call in theirs.items() if args.only in name}):
        sys.exit(f"error: no computation of theirs has {args.only!r} in its name")
    ours, plain = {}, argparse.Namespace(**vars(args) | {"compile": False})
    for name, x in {args.precision: plain, f"{args.precision}, compiled": args}.items():
        if x is plain or args.compile:
            ours[name] = {**agents(x), **sampler(x)}
    clock, rows = Clock(args), []
    print_row({name: name for name in RATIO_WIDTHS}, RATIO_WIDTHS)
    for computation, call in theirs.items():
        load = os.getloadavg()[0]
        for row in clock.compare(call, {name: x[computation] for name, x in ours.items()}):
            rows.append({"computation": computation, **row, "load": f"{load:.1f}", **machine})
            print_row(rows[-1], RATIO_WIDTHS)
    return rows


def main():
    """Measure and print."""
    args = parse()
    torch.set_num_threads(args.threads)
    # All computations are compiled in one process; beyond the limit they would stay eager.
    torch._dynamo.config.recompile_limit = 100
    torch.manual_seed(0)
    settings = {k: getattr(args, k) for k in ("threads", "precision", "compile", "cuda_graph")}
    machine = {"hardware": hardware(), **settings, "torch": str(torch.__version__)}
    machine |= {"commit": git_commit(), "command": shlex.join(["python", *sys.argv])}
    if args.device == "cuda" and (gpu := torch.cuda.get_device_name()) not in machine["hardware"]:
        machine["hardware"] += f", {gpu}"
    if args.against:
        return append(args.output, compare(args, machine))
    if args.scripts:
        rows = [time_script(script, args) | machine for script in args.scripts]
        for row in rows:
            print(", ".join(f"{k} {v}" for k, v in row.items()))
        return append(args.output, rows)
    calls = {**agents(args), **sampler(args), **environments(args)}
    calls = {name: call for name, call in calls.items() if (args.profile or args.only) in name}
    if not calls:
        sys.exit(f"error: no computation has {args.profile or args.only!r} in its name")
    if args.profile:
        for name, call in calls.items():
            print(name)
            profile(call, args.device)
        return None
    clock, rows = Clock(args), []
    print(", ".join(f"{k} {v}" for k, v in machine.items()))
    print_row({name: name for name in WIDTHS}, WIDTHS)
    for name, call in calls.items():
        row = {"computation": name, **clock.measure(call)}
        print_row(row, WIDTHS)
        rows.append(row | machine)
    return append(args.output, rows)


if __name__ == "__main__":
    main()
