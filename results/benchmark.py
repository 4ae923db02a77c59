"""Time every hot computation: python results/benchmark.py [--device cuda] [--precision bf16]

One line per computation: median milliseconds of a warm call, calls per second, and the share of
the machine's matrix-product rate in the same precision, measured beside each computation. --profile
NAME prints where the time of one goes; --output FILE.csv keeps the table with the hardware.
"""

import argparse
import csv
import dataclasses
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import mujoco
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).parents[1] / "algorithms"))

import cal_ql  # noqa: E402
import dare_cql  # noqa: E402
import dare_iql  # noqa: E402
import edis_iql  # noqa: E402
import iql  # noqa: E402
import pex  # noqa: E402
from diffusion import BehaviorModel, behavior_loss  # noqa: E402

ENV, ROWS = "hopper-medium-replay-v2", 100_000
COLUMNS = ["computation", "ms", "per_second", "share_of_products", "gflop"]


def synchronize(device):
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def duration(call, device) -> float:
    """Seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


class ProductCounter(TorchDispatchMode):
    """Floating point operations of the matrix products that run under it."""

    flop = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run and count."""
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.flop += count(*args, **(kwargs or {}), out_val=result) if count else 0
        return result


class Clock:
    """Medians of warm calls, each beside a matrix product of the same precision."""

    def __init__(self, args):
        self.device, self.repeats, self.seconds = args.device, args.repeats, args.seconds
        dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        self.x = torch.randn(args.product, args.product, dtype=dtype, device=args.device)

    def measure(self, call) -> dict:
        """Time a call until `repeats` are done or `seconds` have passed, at least three times."""
        for _ in range(2):
            call()
        with ProductCounter() as counter:
            call()
        product, times, rates = 2.0 * len(self.x) ** 3, [], []
        self.x @ self.x
        end = time.perf_counter() + self.seconds
        while len(times) < 3 or (len(times) < self.repeats and time.perf_counter() < end):
            rates.append(product / duration(lambda: self.x @ self.x, self.device))
            times.append(duration(call, self.device))
        median, flop = statistics.median(times), counter.flop
        share = flop / median / statistics.median(rates)
        return {
            "ms": f"{1e3 * median:.4g}",
            "per_second": f"{1 / median:.4g}",
            "share_of_products": f"{share:.2f}" if flop else "",
            "gflop": f"{flop / 1e9:.4g}" if flop else "",
        }


def filled_buffer(script, state_dim, action_dim, size, device):
    """A buffer of standard normal states and uniform actions."""
    buffer = script.ReplayBuffer(state_dim, action_dim, size, device)
    buffer.rows.normal_().clamp_(-1, 1)
    buffer.rows[:, buffer.widths[0] + action_dim + 1 + state_dim] = 0.0  # no terminals
    buffer.size = size
    buffer.n_drawable.fill_(size)
    return buffer


def updates(args) -> dict:
    """Updates of the agents on a batch of 256, as offline training does them."""
    calls = {}
    for name, script, agent_class, more in [
        ("iql update", iql, "ImplicitQLearning", {}),
        ("cal_ql update, 3 layers", cal_ql, "CalQL", {}),
        ("cal_ql update, 5 layers", cal_ql, "CalQL", {"q_n_hidden_layers": 5}),
    ]:
        more |= {"precision": args.precision, "cuda_graph": not args.eager}
        cfg = script.Config(env=ENV, **more)
        buffer = filled_buffer(script, 11, 3, ROWS, args.device)
        agent = getattr(script, agent_class)(*buffer.dims, cfg, args.device)
        if args.compile:
            agent.losses = torch.compile(agent.losses)
        calls[name] = offline_step(script, cfg, agent, buffer)
        if script is iql:
            pex_agent = pex.ImplicitQLearning(*buffer.dims, cfg, args.device)
            pex_agent.cfg = pex.Config(env=ENV, precision=args.precision)
            pex_agent.start_online()
            calls["pex online update"] = offline_step(pex, cfg, pex_agent, buffer)
    return calls


def offline_step(script, cfg, agent, buffer):
    """One update, sampling included, as the scripts run it."""
    return script.accelerated(
        lambda: agent.update(buffer.sample(cfg.batch_size)), cfg, agent.device
    )


def online_steps(args, runs_dir) -> dict:
    """One online update of both DARE methods with untrained diffusion, and its parts."""
    calls = {}
    for script, agent_class in [(dare_iql, "ImplicitQLearning"), (dare_cql, "CalQL")]:
        settings = {"behavior_iterations": 0, "n_support_states": 256, "energy_iterations": 0}
        settings |= {"runs_dir": runs_dir, "precision": args.precision, "guidance_scale": 3.0}
        settings |= {"compile": args.compile, "cuda_graph": not args.eager}
        cfg = script.Config(env=ENV, **settings)
        offline, online = (filled_buffer(script, 11, 3, size, args.device) for size in (ROWS, 256))
        agent = getattr(script, agent_class)(*offline.dims, cfg, args.device)
        agent.start_online()
        if args.compile:
            agent.losses = torch.compile(agent.losses)
        for more in ({}, {"diffusion_steps": 15}, {"reference": "resample"}):
            dare = dare_of(script, dataclasses.replace(cfg, **more), agent, offline, online)
            name = more.get(
                "reference", f"{more.get('diffusion_steps', cfg.diffusion_steps)} steps"
            )
            calls[f"{script.__name__} online update, {name}"] = accelerated(dare.update, dare)
            parts = parts_of(dare, offline.sample(cfg.batch_size).observations)
            calls |= {k: accelerated(part, dare) for k, part in parts.items() if k not in calls}
    return calls


def dare_of(script, cfg, agent, offline, online):
    """DARE with an untrained behavior model, ready for its updates."""
    guided = dataclasses.replace(cfg, reference="guided")
    dare = script.DARE(guided, SimpleNamespace(stop=False), agent, offline, online)
    dare.prepare()
    if cfg.reference == "resample":  # few states have support actions: take them for all
        index = torch.arange(len(offline.rows), device=agent.device) % len(dare.actions)
        dare.cfg, dare.actions, dare.has_energy = cfg, dare.actions[index], False
    return dare


def accelerated(part, dare):
    """A part of DARE as the scripts run it."""
    return dare_iql.accelerated(part, dare.cfg, dare.agent.device)


def parts_of(dare, states) -> dict:
    """What DARE's online update consists of besides the agent's update."""
    if dare.cfg.reference == "resample":
        dare.offline_buffer.sample(dare.cfg.n_offline)
        dare.online_buffer.sample(len(states) - dare.cfg.n_offline)
        return {"resampling, 256 x 16": lambda: dare.reference_actions(states)}
    steps = dare.cfg.diffusion_steps
    return {
        "energy update, 256 x 16": dare.energy_step,
        f"guided sampling, 256 states, {steps} steps": lambda: dare.reference_actions(states),
    }


def edis_steps(args) -> dict:
    """Parts of one training of EDIS: the model, its energies, generated rows."""
    cfg = edis_iql.Config(env=ENV, precision=args.precision, cuda_graph=not args.eager)
    buffers = [filled_buffer(edis_iql, 11, 3, size, args.device) for size in (ROWS, 10_000)]
    agent = edis_iql.ImplicitQLearning(*buffers[0].dims, cfg, args.device)
    edis = edis_iql.EDIS(cfg, SimpleNamespace(stop=False), agent, *buffers)
    rows = torch.cat([buffer.rows[:, : edis.n_columns] for buffer in buffers])
    edis.model.set_statistics(rows)
    table = torch.cat([edis.model.standardize(rows), torch.zeros_like(rows[:, :1])], 1)
    pairs = dict.fromkeys(edis_iql.ENERGIES, (table[:, :-1], table[:, :-1]))
    energies = [(energy, 1.0) for energy in edis.energies.values()]
    return {
        "edis: 10 updates of the model": lambda: edis.fit(
            edis.model, edis.model_losses, table, 10, cfg.model_lr
        ),
        "edis: 10 updates of the energies": lambda: edis.fit(
            edis.energies, edis.energy_losses, pairs, 10, cfg.energy_lr
        ),
        "edis: 256 rows, 128 steps": lambda: edis.generate(256, energies),
    }


def behavior_update(args) -> dict:
    """One update of the behavior model on 4,096 rows."""
    model = BehaviorModel(11, 3).to(args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, capturable=True)
    states, actions = torch.randn(4096, 11), torch.rand(4096, 3)
    states, actions = states.to(args.device), actions.to(args.device)

    def update():
        loss = behavior_loss(model, states, actions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    cfg = dare_iql.Config(env=ENV, precision=args.precision, cuda_graph=not args.eager)
    return {"behavior update, 4,096": dare_iql.accelerated(update, cfg, args.device)}


def the_rest(args) -> dict:
    """Buffer, acting, environments, evaluation."""
    cfg = iql.Config(env=ENV)
    buffer = filled_buffer(iql, 11, 3, ROWS, args.device)
    agent = iql.ImplicitQLearning(*buffer.dims, cfg, args.device)
    calls = {"buffer sample, 256": lambda: buffer.sample(256)}
    calls["acting, 1 state"] = lambda: agent.act(np.zeros((1, 11)), deterministic=False)
    for task in (ENV, "halfcheetah-medium-v2", "walker2d-medium-v2", "antmaze-umaze-v2"):
        env = gymnasium.make(task)
        env.reset(seed=0)
        action = np.zeros(env.action_space.shape)

        def steps(env=env, action=action):
            for _ in range(100):
                if any(env.step(action)[2:4]):
                    env.reset()

        calls[f"100 environment steps, {task.split('-')[0]}"] = steps
    evaluator = iql.Evaluator(cfg)
    calls["evaluation, 10 episodes, untrained"] = lambda: evaluator(agent)
    return calls


def hardware(args) -> dict:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(": ")[1] for x in lines if x.startswith("model name")), model)
    device = torch.cuda.get_device_name() if args.device == "cuda" else model
    versions = {"torch": str(torch.__version__), "mujoco": mujoco.__version__}
    settings = {k: getattr(args, k) for k in ("threads", "precision", "compile", "eager")}
    return {"device": device, **settings, **versions}


def profile(call, device):
    """Print the operators that take most of the time of one call."""
    for _ in range(2):
        call()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=kinds) as found:
        for _ in range(5):
            call()
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=20))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="compile losses and sampler")
    parser.add_argument("--eager", action="store_true", help="on CUDA, without CUDA graphs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=50, help="calls of each at most")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each at most")
    parser.add_argument("--product", type=int, default=2048, help="size of the matrix product")
    parser.add_argument("--only", default="", help="computations whose name contains this")
    parser.add_argument("--profile", default="", help="profile those that contain this")
    parser.add_argument("--output", help="CSV file to append the table to")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch sees no CUDA device; take --device cpu")
    return args


def main():
    """Measure and print."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as runs_dir, open(os.devnull, "w") as silence:
        sys.stdout, stdout = silence, sys.stdout
        calls = {**updates(args), **online_steps(args, runs_dir), **behavior_update(args)}
        calls |= {**edis_steps(args), **the_rest(args)}
        sys.stdout = stdout
    calls = {name: call for name, call in calls.items() if args.only in name}
    if not calls:
        sys.exit(f"error: no computation has {args.only!r} in its name")
    if args.profile:
        for name in (name for name in calls if args.profile in name):
            print(name)
            profile(calls[name], args.device)
        return
    clock, of_machine = Clock(args), hardware(args)
    print(", ".join(f"{k} {v}" for k, v in of_machine.items()))
    print(f"{'computation':45}{'ms':>10}{'/s':>10}{'share':>8}{'GFLOP':>12}")
    rows = []
    for name, call in calls.items():
        row = {"computation": name, **clock.measure(call)}
        rows.append({**row, **of_machine})
        ms, per_second, share, gflop = (row[k] for k in COLUMNS[1:])
        print(f"{name:45}{ms:>10}{per_second:>10}{share:>8}{gflop:>12}", flush=True)
    if args.output:
        write(Path(args.output), rows)


def write(path: Path, rows: list[dict]):
    """Append rows to a CSV file, with a header if it is new."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
