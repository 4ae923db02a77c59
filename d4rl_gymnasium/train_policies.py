"""Trains the behavior policies that ship with the package (development only).

    pip install -e ".[policies]"
    python -m d4rl_gymnasium.train_policies train --env hopper-medium-v2 --directory runs/sac
    python -m d4rl_gymnasium.train_policies select --env hopper-medium-v2 --directory runs/sac

`train` runs soft actor-critic (sbx) in D4RL's physics and keeps a snapshot of the actor and its
returns every 10,000 steps; `select` picks from them the policies that D4RL's recipe asks for.
"""

import argparse
import csv
import shutil
import time
from pathlib import Path

import gymnasium
import numpy as np

from d4rl_gymnasium.behavior import BehaviorPolicy
from d4rl_gymnasium.tasks import get_normalized_score

POLICIES = Path(__file__).parent / "policies"
EVALUATION_SEED = 10_000
COLUMNS = [
    "step", "deterministic_mean", "deterministic_std", "stochastic_mean", "stochastic_std",
    "deterministic_normalized", "stochastic_normalized", "hours",
]  # fmt: skip


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


def actor_of(model):
    """Copies the weights of an sbx SAC actor with two hidden layers into a `BehaviorPolicy`."""
    layers = model.policy.actor_state.params["params"]
    weights = {}
    for layer, suffix in enumerate(("0", "1", "_mean", "_log_std")):
        weights[f"w{suffix}"] = np.asarray(layers[f"Dense_{layer}"]["kernel"])
        weights[f"b{suffix}"] = np.asarray(layers[f"Dense_{layer}"]["bias"])
    return BehaviorPolicy(weights, env_steps=model.num_timesteps)


def snapshot(model, env, directory, started):
    """Evaluates the current actor, saves it, and appends a row to the log of returns."""
    policy = actor_of(model)
    plain = episode_returns(policy, env, 10, EVALUATION_SEED, stochastic=False)
    noisy = episode_returns(policy, env, 10, EVALUATION_SEED, stochastic=True)
    env_id = env.spec.id
    scores = [100 * get_normalized_score(env_id, returns.mean()) for returns in (plain, noisy)]
    policy.return_mean, policy.return_std = noisy.mean(), noisy.std()
    policy.normalized_score = scores[1]
    policy.save(directory / f"snapshot-{model.num_timesteps:07d}.npz")
    hours = (time.monotonic() - started) / 3600
    numbers = [plain.mean(), plain.std(), noisy.mean(), noisy.std(), *scores]
    row = [model.num_timesteps, *(f"{number:.1f}" for number in numbers), f"{hours:.3f}"]
    with open(directory / "returns.csv", "a", newline="") as file:
        csv.writer(file).writerow(row)
    print(*(f"{name}={value}" for name, value in zip(COLUMNS, row, strict=True)), flush=True)


def train(args):
    """Trains SAC for `args.steps` steps and leaves snapshots and a log in `args.directory`."""
    from sbx import SAC

    directory = Path(args.directory)
    directory.mkdir(parents=True)
    with open(directory / "returns.csv", "w", newline="") as file:
        csv.writer(file).writerow(COLUMNS)
    model = SAC(
        "MlpPolicy",
        gymnasium.make(args.env),
        learning_rate=args.actor_lr,
        qf_learning_rate=args.critic_lr,
        batch_size=args.batch_size,
        learning_starts=5_000,
        # Eight steps, then eight updates: one compiled call instead of eight.
        train_freq=8,
        gradient_steps=8,
        policy_delay=args.policy_delay,
        policy_kwargs={"net_arch": {"pi": [128, 128], "qf": [256, 256]}, "layer_norm": True},
        seed=args.seed,
    )
    env = gymnasium.make(args.env)
    started = time.monotonic()
    snapshot(model, env, directory, started)
    while model.num_timesteps < args.steps:
        model.learn(10_000, reset_num_timesteps=False)
        snapshot(model, env, directory, started)
        model.save(directory / "checkpoint")


def remeasure(env, directory, row):
    """Loads a snapshot of the log and measures it afresh, without the luck of its selection."""
    policy = BehaviorPolicy.load(directory / f"snapshot-{int(row['step']):07d}.npz")
    noisy = episode_returns(policy, env, 50, 2 * EVALUATION_SEED, stochastic=True)
    policy.return_mean, policy.return_std = noisy.mean(), noisy.std()
    policy.normalized_score = 100 * get_normalized_score(env.spec.id, noisy.mean())
    plain = episode_returns(policy, env, 20, 2 * EVALUATION_SEED, stochastic=False)
    score = 100 * get_normalized_score(env.spec.id, plain.mean())
    print(f"step {policy.env_steps}: with noise {policy.normalized_score:.1f}, without {score:.1f}")
    return policy


def select(args):
    """Writes expert, medium and replay policies and the log of returns into `POLICIES`.

    The data is gathered with the policy's noise, so it is the noisy policy that is judged: expert
    is the best snapshot, medium the one before it whose score is nearest a third of the expert's
    (as D4RL's), replay-0 to replay-7 are spread evenly from the random start to medium.
    """
    env, directory = gymnasium.make(args.env), Path(args.directory)
    with open(directory / "returns.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    best = sorted(rows, key=lambda row: -float(row["stochastic_mean"]))[:3]
    expert = max((remeasure(env, directory, row) for row in best), key=lambda p: p.return_mean)
    goal = expert.normalized_score / 3
    earlier = [row for row in rows if int(row["step"]) < expert.env_steps]
    nearest = sorted(earlier, key=lambda row: abs(float(row["stochastic_normalized"]) - goal))[:3]
    medium = min(
        (remeasure(env, directory, row) for row in nearest),
        key=lambda policy: abs(policy.normalized_score - goal),
    )
    until = [row for row in rows if int(row["step"]) <= medium.env_steps]
    robot = args.env.split("-")[0]
    expert.save(POLICIES / f"{robot}-expert.npz")
    medium.save(POLICIES / f"{robot}-medium.npz")
    for number, index in enumerate(np.linspace(0, len(until) - 1, 8).round().astype(int)):
        remeasure(env, directory, until[index]).save(POLICIES / f"{robot}-replay-{number}.npz")
    shutil.copyfile(directory / "returns.csv", POLICIES / f"{robot}-returns.csv")


def main():
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["train", "select"])
    parser.add_argument("--env", default="hopper-medium-v2", help="task id to train in")
    parser.add_argument("--directory", required=True, help="folder for snapshots and the log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1_000_000, help="environment steps")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--actor_lr", type=float, default=3e-4)
    parser.add_argument("--critic_lr", type=float, default=7e-4)
    parser.add_argument("--policy_delay", type=int, default=2, help="critic updates per actor one")
    args = parser.parse_args()
    {"train": train, "select": select}[args.command](args)


if __name__ == "__main__":
    main()
