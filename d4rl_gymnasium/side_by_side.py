"""Environments side by side, for evaluation: an episode in each, stepped on a few threads."""

import os
from concurrent.futures import ThreadPoolExecutor

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space


class EvalEnvs(VectorEnv):
    """`n` environments of a task; one whose episode has ended stays put until the next reset.

    What comes out does not depend on the number of threads.

    Args:
        env_id: id of the environments for `gymnasium.make`.
        n: number of environments.
        n_threads: a few suffice: only MuJoCo's steps, 4/5 of the time, run outside Python's lock.
        options: further arguments of `gymnasium.make`, such as `render_mode`.
    """

    def __init__(self, env_id, n, n_threads=None, **options):
        self.envs = [gymnasium.make(env_id, **options) for _ in range(n)]
        first = self.envs[0]
        self.num_envs, self.spec, self.render_mode = n, first.spec, first.render_mode
        self.metadata = {**first.metadata, "autoreset_mode": AutoresetMode.DISABLED}
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        self.observation_space = batch_space(first.observation_space, n)
        self.action_space = batch_space(first.action_space, n)
        self.n_threads = n_threads or min(8, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self.n_threads)
        self._states = np.zeros(self.observation_space.shape, first.observation_space.dtype)
        self._terminated, self._truncated = np.zeros((2, n), bool)

    def reset(self, *, seed=None, options=None):
        """Start an episode in each environment, in environment i with the seed `seed` + i.

        Returns:
            observations [n, S] and a dictionary of infos.
        """
        super().reset(seed=seed)
        infos = {}
        for i, env in enumerate(self.envs):
            of_env = None if seed is None else seed + i
            self._states[i], info = env.reset(seed=of_env, options=options)
            infos = self._add_info(infos, info, i)
        self._terminated[:] = self._truncated[:] = False
        return self._states.copy(), infos

    def step(self, actions):
        """Act in each environment whose episode goes on.

        Args:
            actions: [n, A]; those of ended episodes are not looked at.

        Returns:
            observations [n, S], rewards [n], terminated [n], truncated [n] and a dictionary of
            infos of the environments that were stepped. An ended episode repeats its last
            observation and how it ended, with reward 0.
        """
        if len(actions) != self.num_envs:
            raise ValueError(f"need {self.num_envs} actions, got {len(actions)}")
        rewards, env_infos = np.zeros(self.num_envs), [{}] * self.num_envs

        def step_some(rows):
            for i in rows:
                result = self.envs[i].step(actions[i])
                self._states[i], rewards[i], *ended, env_infos[i] = result
                self._terminated[i], self._truncated[i] = ended

        running = np.flatnonzero(~(self._terminated | self._truncated))
        list(self._pool.map(step_some, np.array_split(running, self.n_threads)))
        infos = {}
        for i in running:
            infos = self._add_info(infos, env_infos[i], i)
        ended = self._terminated.copy(), self._truncated.copy()
        return self._states.copy(), rewards, *ended, infos

    def render(self):
        """Return what each environment renders."""
        return tuple(env.render() for env in self.envs)

    def close_extras(self, **kwargs):
        """End the threads and close the environments."""
        self._pool.shutdown()
        for env in self.envs:
            env.close()


def make_eval_envs(env_id, n, **options):
    """Make `n` environments of a task that are stepped side by side; see `EvalEnvs`."""
    return EvalEnvs(env_id, n, **options)
