"""Raises the return of a shipped expert by a search over its weights (development only).

    python -m d4rl_gymnasium.polish --env walker2d-expert-v2 --minutes 30
    python -m d4rl_gymnasium.polish --env halfcheetah-expert-v2 --over weights

Where the gradient of an actor-critic method has come to rest, a cross-entropy search still finds
better gains: a factor for each observation, a factor and an offset for each action. Each round
draws candidates, judges all of them by the same few episodes with noise, and moves the mean and the
spread of the search towards the best quarter. Where that has come to rest too, evolution strategies
(Salimans et al., 2017) still climb, over all weights of the mean.
"""

import argparse
import sys
import time

import gymnasium
import numpy as np

from d4rl_gymnasium.behavior import BehaviorPolicy
from d4rl_gymnasium.tasks import task
from d4rl_gymnasium.train_policies import (
    EVALUATION_SEED,
    POLICIES,
    episode_returns,
    goal_of,
    measure,
    store_variant,
)

CANDIDATES, BEST = 16, 4
# Smallest spread of the search, as a share of its first one.
SMALLEST = 0.2
# Rounds between looks at the mean of the search.
PATIENCE = 5
# Episodes of a look: a policy that falls in one of twenty episodes is no expert.
JUDGED_BY = 30
# Points that are judged: shares of the way to the search's mean, as short of it is safer.
PARTS = (1.0, 0.85, 0.7)
# Of the search over weights: pairs of mirrored candidates a round, the length of a step in units of
# the spread, the memory of the gradient, and that of the average of the points gone through.
PAIRS, STEP, MOMENTUM, AVERAGE = 16, 0.1, 0.9, 0.95
# What the mean of an action depends on.
MEAN_WEIGHTS = ("w0", "b0", "w1", "b1", "w_mean", "b_mean")


def with_gains(policy, gains, noise=1.0):
    """A policy with other weights.

    Args:
        policy: the `BehaviorPolicy`, S observations and A actions.
        gains: (S + 2 A,): logarithms of the factors of observations and of actions before the
            tanh, and offsets of these.
        noise: factor of the standard deviation of the noise.
    """
    weights = {name: value.copy() for name, value in policy.weights.items()}
    inputs, outputs, offsets = np.split(
        np.asarray(gains, np.float32),
        [len(weights["w0"]), len(weights["w0"]) + len(weights["b_mean"])],
    )
    weights["w0"] = weights["w0"] * np.exp(inputs)[:, None]
    weights["w_mean"] = weights["w_mean"] * np.exp(outputs)
    weights["b_mean"] = weights["b_mean"] * np.exp(outputs) + offsets
    weights["b_log_std"] = weights["b_log_std"] + np.float32(np.log(noise))
    return BehaviorPolicy(weights, env_steps=policy.env_steps)


class Search:
    """A cross-entropy search for the gains of a policy.

    Args:
        policy: the `BehaviorPolicy` to start from.
        env: its environment.
        spread: first standard deviation of the gains.
        episodes: that judge a candidate.
        noise: as in `with_gains`.
        seed: of the search.
    """

    def __init__(self, policy, env, spread=0.05, episodes=2, noise=1.0, seed=0):
        self.policy, self.env, self.noise = policy, env, noise
        self.spread, self.episodes = spread, episodes
        self.rng = np.random.default_rng(seed)
        self.mean = np.zeros(len(policy.weights["w0"]) + 2 * len(policy.weights["b_mean"]))
        self.std = np.full(len(self.mean), spread)

    def candidate(self, gains):
        """The policy with these gains."""
        return with_gains(self.policy, gains, self.noise)

    def round(self):
        """Draws and judges candidates, moves the search; returns their mean return."""
        drawn = self.mean + self.std * self.rng.standard_normal((CANDIDATES, len(self.mean)))
        seed = int(self.rng.integers(2**30))
        returns = [
            episode_returns(self.candidate(gains), self.env, self.episodes, seed, True).mean()
            for gains in drawn
        ]
        best = drawn[np.argsort(returns)[-BEST:]]
        self.mean = (self.mean + best.mean(0)) / 2
        self.std = np.maximum(0.7 * self.std + 0.3 * best.std(0), SMALLEST * self.spread)
        return float(np.mean(returns))


class WeightSearch:
    """Evolution strategies over the weights of a policy's mean.

    Args:
        policy: the `BehaviorPolicy` to start from.
        env: its environment.
        spread: standard deviation of a candidate's weights, in units of the root mean square of
            the matrix or vector that they are in.
        episodes: that judge a candidate.
        noise: as in `with_gains`.
        seed: of the search.
    """

    def __init__(self, policy, env, spread=0.003, episodes=1, noise=1.0, seed=0):
        self.policy, self.env, self.noise = policy, env, noise
        self.spread, self.episodes = spread, episodes
        self.rng = np.random.default_rng(seed)
        weights = [policy.weights[name] for name in MEAN_WEIGHTS]
        self.scale = np.concatenate(
            [np.full(value.size, np.sqrt(np.mean(value**2))) for value in weights]
        )
        self.point, self.mean, self.gradient = (np.zeros(len(self.scale)) for _ in range(3))

    def candidate(self, change):
        """The policy with its weights changed by so many times their scale."""
        changed, start = dict(self.policy.weights), 0
        for name in MEAN_WEIGHTS:
            value, end = changed[name], start + changed[name].size
            step = (change * self.scale)[start:end].reshape(value.shape)
            changed[name], start = (value + step).astype(np.float32), end
        changed["b_log_std"] = changed["b_log_std"] + np.float32(np.log(self.noise))
        return BehaviorPolicy(changed, env_steps=self.policy.env_steps)

    def round(self):
        """Judges mirrored candidates, takes a step uphill; returns their mean return.

        Steps are of one length, whatever the slope: `mean` averages the points gone through.
        """
        slope, found = np.zeros(len(self.scale)), []
        for _ in range(PAIRS):
            direction = self.rng.standard_normal(len(self.scale))
            seed = int(self.rng.integers(2**30))
            pair = [self.point + sign * self.spread * direction for sign in (1, -1)]
            up, down = (
                episode_returns(self.candidate(x), self.env, self.episodes, seed, True).mean()
                for x in pair
            )
            slope += (up - down) * direction
            found += [up, down]
        length = np.sqrt(np.mean(slope**2))
        self.gradient = MOMENTUM * self.gradient + (1 - MOMENTUM) * slope / max(length, 1e-8)
        self.point = self.point + STEP * self.spread * self.gradient
        self.mean = AVERAGE * self.mean + (1 - AVERAGE) * self.point
        return float(np.mean(found))


SEARCHES = {"gains": Search, "weights": WeightSearch}


def polish(args):
    """Searches until D4RL's return is reached or time is up and writes the best expert found."""
    goal = goal_of(args.env)
    env = gymnasium.make(args.env)
    robot, variant = task(args.env).robot, args.env.removesuffix("-v2").split("-", 1)[1]
    policy = BehaviorPolicy.load(POLICIES / f"{robot}-{variant}.npz")
    options = {"spread": args.spread, "episodes": args.episodes, "noise": args.noise}
    given = {name: value for name, value in options.items() if value is not None}
    search = SEARCHES[args.over](policy, env, seed=args.seed, **given)

    def judged(policy):
        return episode_returns(policy, env, JUDGED_BY, EVALUATION_SEED, stochastic=True).mean()

    best = search.candidate(search.mean)
    best_return, end, rounds = judged(best), time.monotonic() + 60 * args.minutes, 0
    while time.monotonic() < end and best_return < goal:
        mean = search.round()
        rounds += 1
        if rounds % PATIENCE == 0:
            found = [search.candidate(part * search.mean) for part in PARTS]
            returns = [judged(candidate) for candidate in found]
            parts = ", ".join(f"{x:,.0f}" for x in returns)
            print(f"round {rounds}: candidates {mean:,.0f}, {PARTS} of the way {parts}", flush=True)
            if max(returns) > best_return:
                best, best_return = found[int(np.argmax(returns))], max(returns)
    measure(env, best)
    store_variant(best, robot, variant, goal)


def main(args=None):
    """Runs the command line; an error ends in one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--env", required=True, help="expert task, such as hopper-expert-v2")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--over", choices=list(SEARCHES), default="gains")
    parser.add_argument("--spread", type=float, help="initial spread; gains: 0.05, weights: 0.003")
    parser.add_argument("--episodes", type=int, help="of a candidate; gains: 2, weights: 1")
    parser.add_argument("--noise", type=float, default=1.0, help="factor of the policy's noise")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(args)
    try:
        polish(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
