"""Trains the behavior policies that ship with the package (development only).

    pip install -e ".[policies]"
    python -m d4rl_gymnasium.train_policies train --env hopper-medium-v2 --directory runs/sac
    python -m d4rl_gymnasium.train_policies select --env hopper-medium-v2 --directory runs/sac
    python -m d4rl_gymnasium.train_policies match --env hopper-medium-v2 --policy NAME

`train` runs soft actor-critic, or TQC, in D4RL's physics and keeps snapshots of the actor and their
returns; given again, it goes on where it was stopped. `select` picks from the snapshots what
the data of a task needs: expert and medium the one whose mean return is nearest that of D4RL's
file, the replays a ladder of snapshots. `match` raises the noise of a shipped policy that is too
good for a task. The policy that collects AntMaze data is made with --env goal-reaching-ant-v0.
"""

import argparse
import csv
import os
import shutil
import sys
from pathlib import Path

import gymnasium
import numpy as np

from d4rl_gymnasium import goal_ant
from d4rl_gymnasium.antmaze import GOAL_RADIUS
from d4rl_gymnasium.behavior import BehaviorPolicy
from d4rl_gymnasium.d4rl_files import known_of
from d4rl_gymnasium.sac import TRAINED, Run
from d4rl_gymnasium.tasks import TASKS, get_normalized_score, task
from d4rl_gymnasium.waypoints import GuidedAnt

POLICIES = Path(__file__).parent / "policies"
EVALUATION_SEED = 10_000
COLUMNS = [
    "step", "deterministic_mean", "deterministic_std", "stochastic_mean", "stochastic_std",
    "deterministic_normalized", "stochastic_normalized", "hours",
]  # fmt: skip
# Of a policy file, in bytes: it ships with the package.
LARGEST_FILE = 200_000
# Of a selected policy's mean return, from that of D4RL's file.
TOLERANCE = {"expert": 0.03, "medium": 0.05}
# Where a goal-reaching ant is judged: the longest ways.
JUDGED_IN = "antmaze-large-diverse-v2"


def episode_returns(policy, env, episodes, seed, stochastic):
    """Returns the undiscounted returns, (episodes,), of a policy with or without its noise."""
    rng = np.random.default_rng(seed)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        done = False
        while not done:
            action = policy.act(observation, rng if stochastic else None)
            observation, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += reward
            done = terminated or truncated
    return returns


def score(env_id, returns):
    """D4RL's normalized score, 0 to 100, of episode returns; NaN for the goal-reaching ant."""
    return 100 * get_normalized_score(env_id, np.mean(returns)) if env_id in TASKS else np.nan


def snapshot(run, env, episodes):
    """Evaluates the current actor, saves it, and appends a row to the log of returns."""
    policy, env_id = run.policy, env.spec.id
    plain = episode_returns(policy, env, episodes, EVALUATION_SEED, stochastic=False)
    noisy = episode_returns(policy, env, episodes, EVALUATION_SEED, stochastic=True)
    policy.env_steps, policy.normalized_score = run.step, score(env_id, noisy)
    policy.return_mean, policy.return_std = noisy.mean(), noisy.std()
    policy.save(run.directory / f"snapshot-{run.step:07d}.npz")
    numbers = [plain.mean(), plain.std(), noisy.mean(), noisy.std()]
    numbers += [score(env_id, plain), score(env_id, noisy)]
    row = [run.step, *(f"{number:.1f}" for number in numbers), f"{run.hours():.3f}"]
    # Rows from after the last checkpoint give way to those of the continued run.
    rows = [old for old in read_log(run.directory) if int(old["step"]) < run.step]
    write_log(run.directory, [*(old.values() for old in rows), row])
    print(*(f"{name}={value}" for name, value in zip(COLUMNS, row, strict=True)), flush=True)


def read_log(directory):
    """The rows of a run's log of returns, as dictionaries of strings; empty where there is none."""
    path = directory / "returns.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def finished_log(directory):
    """The rows of a log that has some; else a ValueError."""
    rows = read_log(directory)
    if not rows:
        raise ValueError(f"{directory} has no returns.csv with rows: run train first")
    return rows


def write_log(directory, rows):
    """Writes a run's log of returns, whole or not at all."""
    partial = directory / "returns.partial"
    with open(partial, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    os.replace(partial, directory / "returns.csv")


def train(args):
    """Trains up to `args.steps` steps and leaves snapshots and a log in `args.directory`."""
    run = Run(args.directory, args)
    env = gymnasium.make(args.env)
    try:
        if run.step == 0:
            snapshot(run, env, args.eval_episodes)
        while run.step < args.steps:
            run.advance(min(args.eval_freq - run.step % args.eval_freq, args.steps - run.step))
            snapshot(run, env, args.eval_episodes)
            run.save()
    finally:
        run.close()


def load_snapshot(directory, row):
    """The policy of a row of the log."""
    return BehaviorPolicy.load(directory / f"snapshot-{int(row['step']):07d}.npz")


def remeasure(env, directory, row, episodes=50):
    """Loads a snapshot of the log and measures it afresh, without the luck of its selection."""
    policy = load_snapshot(directory, row)
    measure(env, policy, episodes)
    return policy


def measure(env, policy, episodes=50):
    """Measures a policy by episodes with its noise and puts the numbers into its fields."""
    noisy = episode_returns(policy, env, episodes, 2 * EVALUATION_SEED, stochastic=True)
    policy.return_mean, policy.return_std = noisy.mean(), noisy.std()
    policy.normalized_score = score(env.spec.id, noisy)
    print(
        f"step {policy.env_steps}: with noise {policy.return_mean:,.0f} ± {policy.return_std:,.0f} "
        f"({policy.normalized_score:.1f})",
        flush=True,
    )


def store(policy, name):
    """Writes a policy of the package; one that is too large to ship is a ValueError."""
    path = POLICIES / f"{name}.npz"
    partial = path.with_name(f".{name}.npz")
    policy.save(partial)
    if partial.stat().st_size > LARGEST_FILE:
        partial.unlink()
        raise ValueError(f"{name} takes more than {LARGEST_FILE:,} bytes: train a narrower actor")
    os.replace(partial, path)


def select_ladder(env, args, rows, name):
    """Writes snapshots, spread evenly over the rows of a log, as NAME-0 and so on."""
    indices = np.linspace(0, len(rows) - 1, args.ladder).round().astype(int)
    for number, index in enumerate(indices):
        policy = remeasure(env, Path(args.directory), rows[index], args.eval_episodes)
        store(policy, f"{name}-{number}")


def select(args):
    """Writes the policies of a task and the log of returns into `POLICIES`.

    The data is gathered with the policy's noise, so it is the noisy policy that is judged.
    """
    env, directory = gymnasium.make(args.env), Path(args.directory)
    robot, variant = args.env.removesuffix("-v2").split("-", 1)
    rows = finished_log(directory)
    if args.until is not None:
        rows = [row for row in rows if int(row["step"]) <= args.until]
    if variant.endswith("-replay"):
        select_ladder(env, args, rows, f"{robot}-{variant.removeprefix('medium-')}")
    else:
        goal = goal_of(args.env)
        rows = sorted(rows, key=lambda row: abs(float(row["stochastic_mean"]) - goal))[:3]
        found = (remeasure(env, directory, row) for row in rows)
        policy = min(found, key=lambda policy: abs(policy.return_mean - goal))
        store_variant(policy, robot, variant, goal)
    shutil.copyfile(directory / "returns.csv", POLICIES / f"{robot}-{variant}-returns.csv")


def goal_of(env_id):
    """Mean return of D4RL's file of an expert or medium task; of another task a ValueError."""
    if env_id.removesuffix("-v2").split("-", 1)[1] not in TOLERANCE:
        raise ValueError(f"{env_id} has no single policy: name an expert or medium task")
    return known_of(env_id)["return mean"]


def store_variant(policy, robot, variant, goal):
    """Writes an expert or medium policy; says so where its return is too far from D4RL's."""
    error = policy.return_mean / goal - 1
    print(f"return {policy.return_mean:,.0f}, D4RL's file {goal:,.0f}: {100 * error:+.1f}%")
    if abs(error) > TOLERANCE[variant]:
        print(f"more than {100 * TOLERANCE[variant]:.0f}% off: train longer, or document it")
    store(policy, f"{robot}-{variant}")


def match(args):
    """Writes a shipped policy anew with as much more noise as gives it the return of D4RL's file.

    Bisects the logarithm of the factor of the noise before the tanh, between 0 and 2.
    """
    env, goal = gymnasium.make(args.env), goal_of(args.env)
    policy = BehaviorPolicy.load(POLICIES / f"{args.policy}.npz")
    quiet, low, high = policy.weights["b_log_std"], 0.0, 2.0
    for _ in range(7):
        middle = (low + high) / 2
        policy.weights["b_log_std"] = quiet + middle
        noisy = episode_returns(policy, env, args.eval_episodes, EVALUATION_SEED, stochastic=True)
        low, high = (middle, high) if noisy.mean() > goal else (low, middle)
        print(f"noise times {np.exp(middle):.2f}: {noisy.mean():,.0f}", flush=True)
    measure(env, policy)
    robot, variant = args.env.removesuffix("-v2").split("-", 1)
    store_variant(policy, robot, variant, goal)


def maze_success(policy, episodes, seed=EVALUATION_SEED):
    """Share of episodes in which an ant, led as in the data, comes within 0.5 m of its goal."""
    env = gymnasium.make(JUDGED_IN).unwrapped
    env.reset(seed=seed)
    ant = GuidedAnt(env, JUDGED_IN, policy, np.random.default_rng(seed))
    successes = 0
    for _ in range(episodes):
        observation = ant.reset()
        for _ in range(task(JUDGED_IN).max_episode_steps):
            observation = env.step(ant.act(observation))[0]
            if np.hypot(*(observation[:2] - ant.infos["infos/goal"])) <= GOAL_RADIUS:
                successes += 1
                break
    return successes / episodes


def select_ant(args):
    """Writes the ant that collects AntMaze data, ant-goal, and its log into `POLICIES`.

    The fastest ant need not be the best one among walls. So of eight snapshots, spread evenly over
    those with more than half of the highest return, it is the one that reaches the most goals in
    the large maze, led as it is when it collects; `normalized_score` is that share, 0 to 100.
    """
    directory = Path(args.directory)
    rows = finished_log(directory)
    half = max(float(row["stochastic_mean"]) for row in rows) / 2
    able = [row for row in rows if float(row["stochastic_mean"]) > half]
    chosen = np.unique(np.linspace(0, len(able) - 1, 8).round().astype(int))
    candidates = [load_snapshot(directory, able[index]) for index in chosen]
    for policy in candidates:
        policy.normalized_score = 100 * maze_success(policy, 20)
        print(f"step {policy.env_steps}: {policy.normalized_score:.0f}% of goals", flush=True)
    ant = max(candidates, key=lambda policy: policy.normalized_score)
    ant.normalized_score = 100 * maze_success(ant, 50, seed=2 * EVALUATION_SEED)
    print(f"ant-goal, step {ant.env_steps}: {ant.normalized_score:.0f}% of other goals")
    store(ant, "ant-goal")
    shutil.copyfile(directory / "returns.csv", POLICIES / "ant-returns.csv")


def parse(args=None):
    """The settings of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["train", "select", "match"])
    parser.add_argument("--env", default="hopper-medium-v2", help="task id to train in, or "
                        f"{goal_ant.ENV_ID}")  # fmt: skip
    parser.add_argument("--directory", help="folder for snapshots and the log")
    parser.add_argument("--until", type=int, help="select from snapshots up to this step")
    parser.add_argument("--ladder", type=int, default=8, help="snapshots that a replay is made of")
    parser.add_argument("--policy", help="name of the shipped policy to match")
    parser.add_argument("--algorithm", choices=sorted(TRAINED), default="sac")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1_000_000, help="environment steps")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--actor_lr", type=float, default=3e-4)
    parser.add_argument("--critic_lr", type=float, default=7e-4)
    parser.add_argument("--policy_delay", type=int, default=2, help="critic updates per actor one")
    parser.add_argument("--actor_width", type=int, default=128, help="units of its two layers")
    parser.add_argument("--critic_width", type=int, default=256, help="units of its two layers")
    parser.add_argument("--learning_starts", type=int, default=5_000, help="uniform first steps")
    parser.add_argument("--eval_freq", type=int, default=10_000, help="steps between snapshots")
    parser.add_argument("--eval_episodes", type=int, default=10)
    args = parser.parse_args(args)
    if args.env != goal_ant.ENV_ID and (task(args.env).family == "antmaze"):
        raise ValueError(f"the policy for AntMaze is trained in {goal_ant.ENV_ID}")
    needed = "policy" if args.command == "match" else "directory"
    if getattr(args, needed) is None:
        raise ValueError(f"{args.command} needs --{needed}")
    return args


def main(args=None):
    """Runs the command line; an error ends in one line."""
    try:
        args = parse(args)
        choose = select_ant if args.env == goal_ant.ENV_ID else select
        {"train": train, "select": choose, "match": match}[args.command](args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
