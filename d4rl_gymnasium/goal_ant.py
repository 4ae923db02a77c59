"""Training ground of the goal-reaching ant, whose policy collects AntMaze data (development only).

The ant and its physics are AntMaze's, on a plane without walls. As in D4RL's recipe the goal is
drawn in a disk of 10 m and the policy sees the posture, the velocities and the goal's offset. The
offset is scaled to length 10, as D4RL does when it collects: so the policy is trained on just what
it will see. The reward is the progress towards the goal in metres per second, in place of D4RL's
negative distance, which cannot be told from an offset of constant length.
"""

import math

import gymnasium
import numpy as np

from d4rl_gymnasium.antmaze import GOAL_RADIUS, AntEnv

ENV_ID = "goal-reaching-ant-v0"
OFFSET_LENGTH = 10.0
DISK_RADIUS = 10.0
# Short, so that it learns to start and to turn as well as to run.
EPISODE_STEPS = 200


def goal_observation(observation, goal):
    """What the policy sees, (29,): qpos[2:15], qvel and the goal's offset scaled to length 10.

    Args:
        observation: the ant's qpos and qvel, (29,).
        goal: (x, y) in metres; at the ant's own place the offset is 0.
    """
    offset_x, offset_y = goal[0] - observation[0], goal[1] - observation[1]
    distance = math.hypot(offset_x, offset_y)
    scale = OFFSET_LENGTH / distance if distance > 0 else 0.0
    return np.concatenate((observation[2:], (scale * offset_x, scale * offset_y)))


class GoalReachingAntEnv(AntEnv):
    """An ant rewarded for its speed towards the goal (observation 29, see `goal_observation`).

    A goal that is reached, within 0.5 m, gives way to the next one, again within 10 m of the ant.
    The episode ends when the ant has turned over, which in a maze it seldom recovers from.
    """

    def __init__(self, render_mode=None, **renderer_options):
        super().__init__(["r"], render_mode, **renderer_options)

    def step(self, action):
        """One control step; returns (observation, reward in m/s, terminated, False, info)."""
        before = self._distance()
        self._simulate(action)
        distance = self._distance()
        reached = distance <= GOAL_RADIUS
        if reached:
            self.set_target(self._draw_goal())
        if self.render_mode == "human":
            self.render()
        info = {"goal": self.goal.copy(), "success": reached}
        return self._observation(), (before - distance) / self.dt, self._upside_down(), False, info

    def _observation(self):
        return goal_observation(super()._observation(), self.goal)

    def _draw_goal(self):
        # Radius, not area, is uniform, as in D4RL's disk.
        angle = self.np_random.uniform(0.0, 2 * math.pi)
        radius = self.np_random.uniform(0.0, DISK_RADIUS)
        return self.data.qpos[:2] + radius * np.array((math.cos(angle), math.sin(angle)))

    def _upside_down(self):
        # The vertical component of the torso's own vertical axis, from its quaternion.
        x, y = self.data.qpos[4:6].tolist()
        return 1 - 2 * (x * x + y * y) < 0

    def _get_reset_info(self):
        return {"goal": self.goal.copy(), "success": False}


if ENV_ID not in gymnasium.registry:
    gymnasium.register(
        ENV_ID, "d4rl_gymnasium.goal_ant:GoalReachingAntEnv", max_episode_steps=EPISODE_STEPS
    )
