"""D4RL's AntMaze tasks: an ant in a maze of boxes that has to come near a goal."""

import json
import math

import mujoco
import numpy as np

from d4rl_gymnasium.envs import ASSETS, RENDER_MODES, D4RLEnv, set_original_masses

MAZES = json.loads((ASSETS / "mazes.json").read_text())
CELL_SIZE = 4.0
GOAL_RADIUS = 0.5
# D4RL's ant: what its XML sets differently from Gymnasium's ant.xml.
_TIMESTEP = 0.02
_GEAR = 30.0
_SOLREF = (0.02, 1.0)
_SOLIMP = (0.8, 0.8, 0.01, 0.5, 2.0)


def cells(maze_map, kind):
    """Lists the (row, column) of the cells of a map that are `kind`: '#', 'r', 'g' or '.'."""
    return [
        (row, column)
        for row, line in enumerate(maze_map)
        for column, letter in enumerate(line)
        if letter == kind
    ]


def start_cell(maze_map):
    """Returns the (row, column) of a map's one start cell."""
    return next((row, line.index("r")) for row, line in enumerate(maze_map) if "r" in line)


def cell_center(maze_map, cell):
    """Returns the (x, y) of a cell's centre in metres; the centre of the start cell is 0, 0."""
    start_row, start_column = start_cell(maze_map)
    row, column = cell
    return CELL_SIZE * np.array([column - start_column, row - start_row], dtype=np.float64)


def nearest_cell(maze_map, xy):
    """Returns the (row, column) of the cell that an (x, y) in metres lies in."""
    start_row, start_column = start_cell(maze_map)
    return start_row + round(xy[1] / CELL_SIZE), start_column + round(xy[0] / CELL_SIZE)


def draw_goal(rng, maze_map, cell):
    """Draws a goal (x, y) in a cell with D4RL's noise; as there, coordinates below 0 become 0."""
    noise = rng.uniform(0.0, 1.0, 2) + rng.uniform(0.0, 0.5, 2)
    return np.maximum(cell_center(maze_map, cell) + noise, 0.0)


def _maze_spec(ant_xml, maze_map):
    """Turns Gymnasium's ant into D4RL's and puts it among walls, with a marker for the goal."""
    spec = mujoco.MjSpec.from_file(ant_xml)
    spec.option.timestep = _TIMESTEP
    for actuator in spec.actuators:
        actuator.gear[0] = _GEAR
    for cell in cells(maze_map, "#"):
        spec.worldbody.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=[*cell_center(maze_map, cell), CELL_SIZE / 4],
            size=[CELL_SIZE / 2, CELL_SIZE / 2, CELL_SIZE / 4],
            contype=1,
            conaffinity=1,
            rgba=[0.7, 0.5, 0.3, 1.0],
        )
    for geom in spec.geoms:
        geom.solref, geom.solimp = _SOLREF, _SOLIMP
    # A site is drawn but takes no part in the physics. It can be moved later only when it is
    # compiled away from its body's origin.
    spec.worldbody.add_site(
        name="goal", pos=[1, 1, 0], size=[GOAL_RADIUS] * 3, rgba=[0.8, 0.1, 0.1, 0.6]
    )
    return spec


class AntEnv(D4RLEnv):
    """D4RL's ant (observation 29, action 8) among the walls of a map, with a goal.

    The observation is qpos, qvel of the ant. The goal, an (x, y) in metres, is not part of it: it
    is `goal` in the info dictionary of `reset` and `step`.
    """

    metadata = {"render_modes": RENDER_MODES, "render_fps": 10}
    robot = "ant"
    xml = "ant.xml"
    n_substeps = 5
    observation_size = 29

    def __init__(self, maze_map, render_mode=None, **renderer_options):
        self.maze_map = maze_map
        self.goal = np.zeros(2)
        height, width = len(self.maze_map), len(self.maze_map[0])
        middle = cell_center(self.maze_map, ((height - 1) / 2, (width - 1) / 2))
        self.camera = {
            "distance": 1.3 * CELL_SIZE * max(height, width),
            "lookat": (*middle, 0.0),
            "elevation": -60.0,
        }
        super().__init__(render_mode, **renderer_options)

    def _initialize_simulation(self):
        model = _maze_spec(self.fullpath, self.maze_map).compile()
        # Frames may be larger than MuJoCo's default buffer.
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, self.width)
        model.vis.global_.offheight = max(model.vis.global_.offheight, self.height)
        set_original_masses(model, self.robot)
        return model, mujoco.MjData(model)

    def _distance(self):
        """Metres from the ant's torso to the goal."""
        x, y = self.data.qpos[:2].tolist()
        return math.hypot(x - self.goal[0], y - self.goal[1])

    def _observation(self):
        return np.concatenate((self.data.qpos, self.data.qvel))

    def reset_model(self):
        """Draws the ant's state, U(-0.1, 0.1) in qpos and 0.1 N(0, 1) in qvel, and the goal."""
        qpos = self.init_qpos + self.np_random.uniform(-0.1, 0.1, self.model.nq)
        qvel = self.init_qvel + 0.1 * self.np_random.standard_normal(self.model.nv)
        self.set_target(self._draw_goal())
        self.set_state(qpos, qvel)
        return self._observation()

    def _draw_goal(self):
        """Draws the (x, y) of an episode's goal."""
        raise NotImplementedError

    def set_state(self, qpos, qvel):
        """Sets positions (15,) and velocities (14,); the orientation's quaternion is normalized.

        MuJoCo 2.0 normalized it in place, so D4RL's first observation holds a unit quaternion.
        """
        super().set_state(qpos, qvel)
        mujoco.mj_normalizeQuat(self.model, self.data.qpos)

    def place(self, xy):
        """Moves the ant as it is to (x, y), in metres; returns the observation."""
        qpos = self.data.qpos.copy()
        qpos[:2] = xy
        self.set_state(qpos, self.data.qvel.copy())
        return self._observation()

    def set_target(self, xy):
        """Puts the goal at `xy`, in metres, until the next reset draws another."""
        goal = np.array(xy, dtype=np.float64)
        if goal.shape != (2,):
            raise ValueError(f"a goal is (x, y), but its shape is {goal.shape}")
        self.goal = goal
        self.model.site("goal").pos[:2] = goal

    def task_state(self):
        """The goal."""
        return {"goal": self.goal.tolist()}

    def set_task_state(self, state):
        """Takes a dictionary that `task_state` made."""
        self.set_target(state["goal"])


class AntMazeEnv(AntEnv):
    """D4RL's AntMaze: reward 1 and the end within 0.5 m of the goal.

    `maze` is "umaze", "medium" or "large". The goal is drawn anew at each reset around the same
    cell. The info dictionary of `reset` and `step` also holds `success`.
    """

    def __init__(self, maze, render_mode=None, **renderer_options):
        super().__init__(MAZES[maze]["task"], render_mode, **renderer_options)

    def step(self, action):
        """One control step; returns (observation, reward, terminated, False, info)."""
        self._simulate(action)
        success = self._distance() <= GOAL_RADIUS
        if self.render_mode == "human":
            self.render()
        info = {"goal": self.goal.copy(), "success": success}
        return self._observation(), float(success), success, False, info

    def _draw_goal(self):
        return draw_goal(self.np_random, self.maze_map, cells(self.maze_map, "g")[0])

    def _get_reset_info(self):
        return {"goal": self.goal.copy(), "success": False}
