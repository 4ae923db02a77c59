"""Reference policies as agents: does guidance beat the behavior it guides, and stay on its support?

    python results/reference.py runs/iql/hopper-medium-v2/seed_0/offline.pt --env hopper-medium-v2 \
        --data regenerated --behavior_iterations 10000 --behavior_batch_size 512

The first argument is an offline agent of IQL, whose Q guides; the others are settings of
dare_iql.py, but for device and precision: it computes on the CPU in fp32. DARE-I's alignment scores
are distances from these policies. A row for each policy is printed and appended to --csv:

- score: normalized, mean and standard error over --n_episodes episodes;
- q_gain: Q of its actions less the mean Q of support actions, in units of Q's spread over these;
- distance: to the nearest of K support actions of the state, drawn anew;
- at_bounds: share of action components at a bound.

The last three are means over 1,000 states of the data. Policies: support actions (unguided
samples), guided ones with each of --scales, resampled support actions, and the agent itself.
"""

import argparse
import sys
from pathlib import Path

import torch

import d4rl_gymnasium as d4rl
from lib.experiments import ROOT

sys.path.insert(0, str(ROOT / "algorithms"))
import dare_iql  # noqa: E402
from d4rl_gymnasium.files import contents_of, load  # noqa: E402
from d4rl_gymnasium.runs import errors_in_one_line, parse  # noqa: E402
from diffusion import EnergyGuidedSampler, draw_support_actions, sample_actions  # noqa: E402
from lib.records import append  # noqa: E402

NUMBERS = ["score", "error", "q_gain", "distance", "at_bounds"]
COLUMNS = ["env", "energy_iterations", "energy_beta", "policy", "episodes", *NUMBERS]
N_STATES = 1_000


class Reference:
    """A policy for eval_actor: `draw` maps states [N, S] to actions [N, A]."""

    def __init__(self, draw):
        self.draw = draw

    @torch.no_grad()
    def act(self, states, deterministic=True):
        """Actions [N, A] at states [N, S]; these policies have no mean to take."""
        return self.draw(torch.as_tensor(states, dtype=torch.float32)).numpy()


def policies(sampler, trainer, config, scales):
    """What draws actions [N, A] at states [N, S], by name."""
    steps = config.diffusion_steps

    def support(states):
        return draw_support_actions(sampler.behavior, states, config.n_support, steps)

    def guided(scale):
        return lambda states: sample_actions(
            sampler.behavior, states, 1, sampler.energy, scale, steps
        )[:, 0]

    def resampled(states):
        actions = support(states)
        logits = config.guidance_scale * sampler.energies(states, actions)
        drawn = torch.distributions.Categorical(logits=logits).sample()
        return actions.take_along_dim(drawn[:, None, None], 1)[:, 0]

    found = {"agent": lambda states: trainer.actor(states)[0], "unguided": guided(0.0)}
    found |= {f"guided {scale:g}": guided(scale) for scale in scales}
    return support, found | {f"resampled {config.guidance_scale:g}": resampled}


def measure(draw, support, states, q_function):
    """q_gain, distance and at_bounds of a policy at states [N, S]."""
    others, actions = support(states), draw(states)
    q = q_function(states[:, None].expand(-1, others.shape[1], -1), others)
    gain = (q_function(states, actions) - q.mean(1)).mean() / q.std(1).mean()
    distance = (others - actions[:, None]).norm(dim=-1).amin(1).mean()
    at_bounds = (actions.abs() > 0.999).float().mean()
    return {"q_gain": gain.item(), "distance": distance.item(), "at_bounds": at_bounds.item()}


def run(args, config):
    """Fit the energy to the agent's Q, then print and store a row for each policy."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    source = {"data": config.data, "regenerated_size": config.regenerated_size}
    dataset = d4rl.qlearning_dataset(config.env, **source)
    states, actions = (torch.from_numpy(dataset[k]) for k in ("observations", "actions"))
    trainer = dare_iql.ImplicitQLearning(states.shape[1], actions.shape[1], config)
    with contents_of(args.agent):
        trainer.load_state_dict(load(args.agent)["trainer"])
    some = states[torch.randperm(len(states))[:N_STATES]]
    sampler = EnergyGuidedSampler(
        config, states, actions, some,
        trainer.q_target, lambda update: dare_iql.accelerate(update, config),
    )  # fmt: skip
    sampler.add_support(len(some))
    sampler.fit_energy()
    envs = d4rl.make_eval_envs(config.env, config.n_episodes)
    support, found = policies(sampler, trainer, config, args.scales)
    for name, draw in found.items():
        torch.manual_seed(config.seed)
        row = {"env": config.env, "energy_iterations": config.energy_iterations}
        row |= {"energy_beta": config.energy_beta, "policy": name}
        row["episodes"] = config.n_episodes
        with torch.no_grad():
            row |= measure(draw, support, some, trainer.q_target)
        n_episodes = config.n_episodes
        returns = dare_iql.eval_actor(envs, Reference(draw), n_episodes, config.eval_seed)
        scores = 100 * d4rl.get_normalized_score(config.env, returns)
        row |= {"score": scores.mean(), "error": scores.std(ddof=1) / n_episodes**0.5}
        print(*(f"{k} {row[k]:.3g}" if k in NUMBERS else row[k] for k in COLUMNS), flush=True)
        row = {k: f"{row[k]:.4g}" if k in NUMBERS else str(row[k]) for k in COLUMNS}
        append(args.csv, [row])


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("agent", type=Path, help="offline.pt of iql.py")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0, 10.0], help="s")
    parser.add_argument("--csv", type=Path, help="table to append the rows to")
    args, settings = parser.parse_known_args()
    with errors_in_one_line():
        settings += ["--device", "cpu", "--precision", "fp32"]
        run(args, parse(dare_iql.TrainConfig, settings))


if __name__ == "__main__":
    main()
