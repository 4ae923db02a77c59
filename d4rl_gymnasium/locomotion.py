"""D4RL's Gym-MuJoCo tasks: the rewards, terminals and resets of Gym 0.23's "-v2" classes."""

import math

import numpy as np

from d4rl_gymnasium.envs import RENDER_MODES, D4RLEnv


class _PlanarEnv(D4RLEnv):
    """A planar robot rewarded for its speed along x; the observation leaves out x."""

    healthy_reward: float
    control_cost: float
    max_observed_speed: float

    def step(self, action):
        """One control step; returns (observation, reward, terminated, False, info)."""
        x_before = self.data.qpos[0]
        effort = self._simulate(action)
        x_after = self.data.qpos[0]
        x_velocity = (x_after - x_before) / self.dt
        reward = x_velocity + self.healthy_reward - self.control_cost * effort
        if self.render_mode == "human":
            self.render()
        info = {"x_position": float(x_after), "x_velocity": float(x_velocity)}
        return self._observation(), float(reward), not self._is_healthy(), False, info

    def _observation(self):
        bound = self.max_observed_speed
        velocity = np.minimum(np.maximum(self.data.qvel, -bound), bound)
        return np.concatenate((self.data.qpos[1:], velocity))

    def _is_healthy(self):
        raise NotImplementedError

    def reset_model(self):
        """Draws the initial state, U(-0.005, 0.005) around rest, and returns its observation."""
        noise = self.np_random.uniform(-0.005, 0.005, self.model.nq + self.model.nv)
        self.set_state(
            self.init_qpos + noise[: self.model.nq], self.init_qvel + noise[self.model.nq :]
        )
        return self._observation()


class HopperEnv(_PlanarEnv):
    """D4RL's Hopper (observation 11, action 3); falling ends the episode."""

    metadata = {"render_modes": RENDER_MODES, "render_fps": 125}
    robot = "hopper"
    xml = "hopper.xml"
    n_substeps = 4
    observation_size = 11
    camera = {"trackbodyid": 2, "distance": 3.0, "lookat": (0.0, 0.0, 1.15), "elevation": -20.0}
    healthy_reward = 1.0
    control_cost = 1e-3
    max_observed_speed = 10.0

    def _is_healthy(self):
        x, height, angle, *joints = self.data.qpos.tolist()
        # NaN compares false, so a diverged simulation counts as fallen.
        return (
            math.isfinite(x)
            and 0.7 < height < math.inf
            and -0.2 < angle < 0.2
            and all(-100 < value < 100 for value in joints + self.data.qvel.tolist())
        )


class Walker2dEnv(_PlanarEnv):
    """D4RL's Walker2d (observation 17, action 6); falling ends the episode."""

    metadata = {"render_modes": RENDER_MODES, "render_fps": 125}
    robot = "walker2d"
    xml = "walker2d.xml"
    n_substeps = 4
    observation_size = 17
    camera = {"trackbodyid": 2, "distance": 4.0, "lookat": (0.0, 0.0, 1.15), "elevation": -20.0}
    healthy_reward = 1.0
    control_cost = 1e-3
    max_observed_speed = 10.0

    def _is_healthy(self):
        height, angle = self.data.qpos[1:3].tolist()
        return 0.8 < height < 2.0 and -1.0 < angle < 1.0


class HalfCheetahEnv(_PlanarEnv):
    """D4RL's HalfCheetah (observation 17, action 6); it never terminates."""

    metadata = {"render_modes": RENDER_MODES, "render_fps": 20}
    robot = "halfcheetah"
    xml = "half_cheetah.xml"
    n_substeps = 5
    observation_size = 17
    camera = {"distance": 4.0}
    healthy_reward = 0.0
    control_cost = 0.1
    max_observed_speed = math.inf

    def _is_healthy(self):
        return True

    def reset_model(self):
        """Draws qpos from U(-0.1, 0.1) and qvel from 0.1 N(0, 1) around rest."""
        qpos = self.init_qpos + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        qvel = self.init_qvel + 0.1 * self.np_random.standard_normal(self.model.nv)
        self.set_state(qpos, qvel)
        return self._observation()
