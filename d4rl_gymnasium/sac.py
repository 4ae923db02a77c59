"""Soft actor-critic or TQC by sbx, in runs that can be stopped and continued (development only).

A run's folder holds `replay.f32`, every transition of the run, `checkpoint.npz`, all the rest that
the next step depends on, and the lock that keeps a second process out. A run that was stopped, in
whatever way, goes on from its last checkpoint with the same numbers as one that was not, on the
same machine and with the same versions of the libraries.
"""

import json
import os
import time
from pathlib import Path

import gymnasium
import numpy as np
from filelock import FileLock, Timeout

from d4rl_gymnasium.behavior import BehaviorPolicy
from d4rl_gymnasium.envs import get_env_state, set_env_state

# Eight steps, then eight updates: one compiled call instead of eight.
STEPS_PER_UPDATE = 8
# Settings that must stay the same when a run is continued.
SETTINGS = (
    "env", "algorithm", "seed", "batch_size", "actor_lr", "critic_lr", "policy_delay",
    "actor_width", "critic_width", "learning_starts",
)  # fmt: skip
# What an agent's policy trains.
TRAINED = {
    "sac": ("actor_state", "qf_state"),
    "tqc": ("actor_state", "qf1_state", "qf2_state"),
}


class Replay:
    """Every transition of a run, in a file that is written as the run goes on.

    A row is observation, action, reward, terminated and next observation in float32. Rows are never
    changed, so those of a checkpoint are intact whenever the process ends.
    """

    def __init__(self, path, capacity, observation_size, action_size, seed):
        width = 2 * observation_size + action_size + 2
        mode = "r+" if path.exists() else "w+"
        self.rows = np.memmap(path, np.float32, mode, shape=(capacity, width))
        self.bounds = np.cumsum([observation_size, action_size, 1, 1])
        self.size = 0
        self.rng = np.random.default_rng([seed, 1])

    def add(self, observation, action, reward, terminated, next_observation):
        """Stores one transition."""
        self.rows[self.size] = np.concatenate(
            (observation, action, (reward, terminated), next_observation)
        )
        self.size += 1

    def sample(self, batch_size, env=None):
        """Draws rows with replacement, as sbx wants them; it passes an `env` of no use here."""
        import torch
        from stable_baselines3.common.type_aliases import ReplayBufferSamples

        rows = self.rows[self.rng.integers(self.size, size=batch_size)]
        parts = [torch.from_numpy(part) for part in np.split(rows, self.bounds, axis=1)]
        observations, actions, rewards, dones, next_observations = parts
        return ReplayBufferSamples(observations, actions, next_observations, dones, rewards)


def make_agent(env, settings):
    """An sbx agent that is only updated: a `Run` collects and stores its transitions.

    Args:
        env: the environment to train in.
        settings: an object with the attributes `SETTINGS`.
    """
    # Small matrices gain nothing from threads, which wait for each other on a busy machine.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    from sbx import SAC, TQC
    from stable_baselines3.common.logger import Logger

    actor, critic = [settings.actor_width] * 2, [settings.critic_width] * 2
    agent = {"sac": SAC, "tqc": TQC}[settings.algorithm](
        "MlpPolicy",
        env,
        learning_rate=settings.actor_lr,
        qf_learning_rate=settings.critic_lr,
        batch_size=settings.batch_size,
        policy_delay=settings.policy_delay,
        policy_kwargs={"net_arch": {"pi": actor, "qf": critic}, "layer_norm": True},
        seed=settings.seed,
        buffer_size=1,  # a `Replay` takes its place
    )
    agent.set_logger(Logger(None, []))
    return agent


def actor_of(agent, env_steps):
    """Copies the weights of an sbx actor with two hidden layers into a `BehaviorPolicy`."""
    layers = agent.policy.actor_state.params["params"]
    weights = {}
    for layer, suffix in enumerate(("0", "1", "_mean", "_log_std")):
        weights[f"w{suffix}"] = np.asarray(layers[f"Dense_{layer}"]["kernel"])
        weights[f"b{suffix}"] = np.asarray(layers[f"Dense_{layer}"]["bias"])
    return BehaviorPolicy(weights, env_steps=env_steps)


def _agent_state(agent, algorithm):
    """All that the next update depends on, as one tree of arrays."""
    trained = [getattr(agent.policy, name) for name in TRAINED[algorithm]]
    return trained, agent.ent_coef_state, agent.key


class Run:
    """A training run in a folder, started or continued: `advance` and `save` alternate.

    Args:
        directory: the run's folder, made if need be.
        settings: an object with the attributes `SETTINGS` and `steps`, the length of the run, which
            may be another than before.

    Raises:
        ValueError: another process trains there, or the run was started with other settings.
    """

    def __init__(self, directory, settings):
        self.directory, self.settings = Path(directory), settings
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.directory / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another process trains in {self.directory}") from None
        try:
            self._start()
        except BaseException:
            self._lock.release()
            raise

    def _start(self):
        settings = self.settings
        self.env = gymnasium.make(settings.env)
        self.step, self.seconds, self._clock = 0, 0.0, time.monotonic()
        self.rng = np.random.default_rng([settings.seed, 0])
        sizes = self.env.observation_space.shape[0], self.env.action_space.shape[0]
        replay = self.directory / "replay.f32"
        self.replay = Replay(replay, settings.steps, *sizes, settings.seed)
        self.agent = make_agent(self.env, settings)
        self.agent.replay_buffer = self.replay
        self.observation, _ = self.env.reset(seed=settings.seed)
        if (self.directory / "checkpoint.npz").exists():
            self._load()
        self.policy = actor_of(self.agent, self.step)

    def advance(self, steps):
        """Collects `steps` transitions and makes as many updates."""
        for _ in range(steps):
            self._collect()
            if self.step > self.settings.learning_starts and self.step % STEPS_PER_UPDATE == 0:
                self.agent.train(STEPS_PER_UPDATE, self.settings.batch_size)
                self.policy = actor_of(self.agent, self.step)

    def _collect(self):
        if self.step < self.settings.learning_starts:
            action = self.rng.uniform(-1.0, 1.0, self.env.action_space.shape).astype(np.float32)
        else:
            action = self.policy.act(self.observation, self.rng)
        following, reward, terminated, truncated, _ = self.env.step(action)
        self.replay.add(self.observation, action, reward, terminated, following)
        self.observation = self.env.reset()[0] if terminated or truncated else following
        self.step += 1

    def hours(self):
        """Hours that the run has taken, from its checkpoints and since."""
        return (self.seconds + time.monotonic() - self._clock) / 3600

    def save(self):
        """Writes the checkpoint, whole or not at all, after the transitions that it counts on."""
        import jax

        self.replay.rows.flush()
        state = {
            "settings": {name: getattr(self.settings, name) for name in SETTINGS},
            "step": self.step,
            "seconds": 3600 * self.hours(),
            "updates": self.agent._n_updates,
            "rng": self.rng.bit_generator.state,
            "replay_rng": self.replay.rng.bit_generator.state,
            "env": get_env_state(self.env),
            "observation": self.observation.tolist(),
        }
        tree = _agent_state(self.agent, self.settings.algorithm)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        partial = self.directory / "checkpoint.partial"
        with open(partial, "wb") as file:
            np.savez(file, *leaves, state=json.dumps(state))
        os.replace(partial, self.directory / "checkpoint.npz")

    def _load(self):
        import jax

        path = self.directory / "checkpoint.npz"
        with np.load(path, allow_pickle=False) as file:
            state = json.loads(file["state"].item())
            leaves = [jax.numpy.asarray(file[f"arr_{i}"]) for i in range(len(file.files) - 1)]
        # Runs from before there was a choice are SAC's.
        for name, value in {"algorithm": "sac", **state["settings"]}.items():
            if value != getattr(self.settings, name):
                raise ValueError(f"{path} is of a run with --{name} {value}: use another folder")
        if state["step"] > self.settings.steps:
            raise ValueError(f"{path} is at step {state['step']:,}: raise --steps to at least that")
        structure = jax.tree.structure(_agent_state(self.agent, self.settings.algorithm))
        trained, self.agent.ent_coef_state, self.agent.key = jax.tree.unflatten(structure, leaves)
        for name, value in zip(TRAINED[self.settings.algorithm], trained, strict=True):
            setattr(self.agent.policy, name, value)
        self.agent._n_updates = state["updates"]
        self.step = self.replay.size = state["step"]
        self.seconds, self._clock = state["seconds"], time.monotonic()
        self.rng.bit_generator.state = state["rng"]
        self.replay.rng.bit_generator.state = state["replay_rng"]
        set_env_state(self.env, state["env"])
        self.observation = np.array(state["observation"])
        print(f"continuing at step {self.step:,} of {self.settings.steps:,}", flush=True)

    def close(self):
        """Lets another process continue the run."""
        self.env.close()
        self._lock.release()
