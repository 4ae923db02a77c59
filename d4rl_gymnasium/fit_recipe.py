"""Fits each policy's share of a task's rows to what is known of D4RL's file (development only).

    python -m d4rl_gymnasium.fit_recipe

measures the shipped policies, 100 episodes each with their noise, and writes
`policies/recipe.json`. In a task's data every policy has a share, and the shares are chosen so that
the mean and the standard deviation of the returns and the mean length of the episodes come near
D4RL's: these, or rather the first two moments, are linear in the shares of the episodes.
"""

import argparse
import json

import gymnasium
import numpy as np
from scipy.optimize import nnls

from d4rl_gymnasium.behavior import BehaviorPolicy
from d4rl_gymnasium.d4rl_files import known_of
from d4rl_gymnasium.files import write
from d4rl_gymnasium.regenerate import POLICIES

ROBOTS = ("halfcheetah", "hopper", "walker2d")
# Snapshots around the score of D4RL's medium policy that share its part; one where one has it all.
MEDIUM = {
    "halfcheetah": ["medium"],
    "hopper": ["medium"],
    "walker2d": ["medium", "full-replay-1", "full-replay-2", "full-replay-3", "full-replay-6"],
}
# What the best episodes of medium-replay come from, beside the snapshots up to medium.
BEST_OF_REPLAY = {
    "halfcheetah": ["medium"],
    "hopper": ["full-replay-3"],
    "walker2d": ["full-replay-2", "full-replay-6"],
}
# Pull of the shares towards equal ones, against errors relative to D4RL's figures.
EVENNESS = 0.03
SURELY = 1e6  # weight of the condition that the shares add up to 1
SEED = 30_000


def episodes_of(policy, env, episodes):
    """Returns and lengths of episodes of a policy with its noise, both (episodes,)."""
    rng = np.random.default_rng(SEED)
    returns, lengths = np.zeros(episodes), np.zeros(episodes)
    for episode in range(episodes):
        observation, _ = env.reset(seed=SEED + episode)
        done = False
        while not done:
            action = policy.act(observation, rng)
            observation, reward, terminated, truncated, _ = env.step(action)
            returns[episode] += reward
            lengths[episode] += 1
            done = terminated or truncated
    return returns, lengths


def fitted(moments, targets, evenness=EVENNESS):
    """Shares of the episodes, (n,): least squares of the moments' relative errors.

    Args:
        moments: (m, n), each of the m moments for each of the n policies.
        targets: (m,), what their weighted means are to be.
        evenness: pull towards equal shares.
    """
    n = moments.shape[1]
    pull = evenness**0.5 * np.eye(n)
    rows = np.vstack([moments / targets[:, None], pull, np.full(n, SURELY)])
    aims = np.concatenate([np.ones(len(targets)), pull.sum(1) / n, [SURELY]])
    return nnls(rows, aims)[0]


def shares_of(known, measured):
    """Shares of the rows, by policy name, for the returns and lengths that are `measured`."""
    mean, std, length = (known[name] for name in ("return mean", "return std", "length mean"))
    moments = [(r.mean(), (r**2).mean(), n.mean()) for r, n in measured.values()]
    moments = np.array(moments).T
    weights = fitted(moments, np.array([mean, mean**2 + std**2, length]))
    rows = weights * moments[2]
    shares = (rows / rows.sum()).round(3)
    return {name: float(x) for name, x in zip(measured, shares, strict=True) if x > 0}


def recipe(robot, episodes):
    """The shares of all tasks of a robot but random and medium-expert, by task and policy."""
    env = gymnasium.make(f"{robot}-medium-v2")
    found = {path.stem: BehaviorPolicy.load(path) for path in POLICIES.glob(f"{robot}-*.npz")}
    in_order = sorted(found, key=lambda name: (found[name].env_steps, name))
    ladder = [name for name in in_order if name.startswith(f"{robot}-replay-")]
    medium, best = ([f"{robot}-{name}" for name in of[robot]] for of in (MEDIUM, BEST_OF_REPLAY))
    measured = {
        name: episodes_of(found[name], env, episodes)
        for name in in_order
        if name in {*ladder, *medium, *best}
    }

    def shares(variant, names):
        known = known_of(f"{robot}-{variant}-v2")
        return shares_of(known, {name: measured[name] for name in measured if name in names})

    full = [name for name in in_order if name.startswith(f"{robot}-full-replay-")]
    return {
        f"{robot}-medium": shares("medium", medium),
        f"{robot}-medium-replay": shares("medium-replay", ladder + best),
        f"{robot}-expert": {f"{robot}-expert": 1.0},
        f"{robot}-full-replay": dict.fromkeys(full, 1 / len(full)),
    }


def main(args=None):
    """Write the recipe of the robots named, or of all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("robots", nargs="*", default=ROBOTS)
    parser.add_argument("--episodes", type=int, default=100, help="to measure each policy by")
    args = parser.parse_args(args)
    found = {"antmaze": {"ant-goal": 1.0}}
    for robot in args.robots:
        found |= recipe(robot, args.episodes)
    path = POLICIES / "recipe.json"
    recipes = (json.loads(path.read_text()) if path.exists() else {}) | found
    write(path, json.dumps(recipes, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
