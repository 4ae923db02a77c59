"""How AntMaze data is collected: an ant led along shortest paths of cells, by D4RL's recipe.

The layouts are the `collection` maps of `assets/mazes.json`. Where the ant starts and what it has
to reach differs by task: umaze starts at the start cell and all others anywhere, play and umaze
have marked goals and diverse has goals anywhere. No goal ends an episode: D4RL's ant runs on at
full speed past the goal and comes back to it, and so a place there is seldom occupied. Ours, which
can stop, is led around in the goal's cell and the cells next to it instead.
"""

from collections import deque

import numpy as np

from d4rl_gymnasium.antmaze import (
    CELL_SIZE,
    GOAL_RADIUS,
    MAZES,
    cell_center,
    cells,
    draw_goal,
    nearest_cell,
)
from d4rl_gymnasium.goal_ant import goal_observation

# Standard deviation of the Gaussian noise on every component of an action.
ACTION_NOISE = 0.2
# Within this distance, in metres, a waypoint counts as reached.
REACHED = 1.0
# How far from a cell's centre in x and y, in metres, an ant is led at its goal.
ROAMED = 1.5
_NEIGHBOURS = ((-1, 0), (0, 1), (1, 0), (0, -1))


def free_cells(maze_map):
    """Lists the (row, column) of all cells that are no wall, by row and column."""
    return sorted(cell for kind in ".rg" for cell in cells(maze_map, kind))


def next_cells(maze_map, target):
    """The step towards a cell from everywhere: a dict from each free cell to the next on a
    shortest path to `target`, which leads to itself. Of two equal ways it is always the same one.
    """
    free = set(free_cells(maze_map))
    towards, queue = {target: target}, deque([target])
    while queue:
        cell = queue.popleft()
        for row, column in _NEIGHBOURS:
            neighbour = cell[0] + row, cell[1] + column
            if neighbour in free and neighbour not in towards:
                towards[neighbour] = cell
                queue.append(neighbour)
    return towards


def variant_of(env_id):
    """The names of an AntMaze task's maze and of its variant: "umaze", "diverse" or "play"."""
    _, maze, *variant = env_id.removesuffix("-v2").split("-")
    return maze, variant[0] if variant else "umaze"


def draw_start(rng, maze_map, variant):
    """Draws where an episode starts, (x, y) in metres: None is the start cell of the task.

    D4RL draws a free cell that is no marked goal, and a place in it.
    """
    if variant == "umaze":
        return None
    taken = cells(maze_map, "g") if variant == "play" else []
    choices = [cell for cell in free_cells(maze_map) if cell not in taken]
    cell = choices[rng.integers(len(choices))]
    return cell_center(maze_map, cell) + rng.uniform(0.0, CELL_SIZE / 4, 2)


def draw_goal_cell(rng, maze_map, variant):
    """Draws the (row, column) of an episode's goal."""
    choices = free_cells(maze_map) if variant == "diverse" else cells(maze_map, "g")
    return choices[rng.integers(len(choices))]


def episode_steps(env_id):
    """Steps of an episode of the data, 701 or 1,001: D4RL's time-out comes a step late, and
    umaze-diverse, whose task ends after 700 steps, was collected in longer episodes.
    """
    return 701 if env_id == "antmaze-umaze-v2" else 1001


def rewarded_goal(env_id):
    """The one place, (x, y) in metres, that the rewards of a task's data are given for.

    Whatever an episode's goal was, D4RL relabelled each AntMaze file with the goal of the task,
    drawn once. How many rows are rewarded depends on that draw: here it is a place within its range
    at which their share is about that of D4RL's file (`rewarded` in `assets/mazes.json`, metres
    from the centre of the cell).
    """
    maze, variant = variant_of(env_id)
    maze_map = MAZES[maze]["task"]
    return cell_center(maze_map, cells(maze_map, "g")[0]) + MAZES[maze]["rewarded"][variant]


def around(maze_map, cell):
    """Lists a cell and the free cells next to it."""
    free = free_cells(maze_map)
    row, column = cell
    return [cell, *(next_to for r, c in _NEIGHBOURS if (next_to := (row + r, column + c)) in free)]


class Navigator:
    """Leads from anywhere in a maze to a goal, one cell of a shortest path after the other.

    A waypoint lies in the cell next to the one that the ant is in, at a place drawn like a goal's.
    Two such cells make a rectangle without walls, so the straight way is free. A new waypoint is
    due when this one is reached, and when the ant has left the two cells. D4RL draws its waypoint
    anew at every step and counts an ant that has passed the centre of a cell as in it, which leads
    around corners from two sides and into them from the others.
    """

    def __init__(self, maze_map, goal, goal_cell, rng):
        self.maze_map, self.goal, self.goal_cell, self.rng = maze_map, goal, goal_cell, rng
        self.towards = next_cells(maze_map, goal_cell)
        self._cells, self._waypoint = (), None

    def waypoint(self, xy):
        """Returns where to go from (x, y); both in metres."""
        cell = nearest_cell(self.maze_map, xy)
        # Where the torso leans over a wall, the waypoint stays.
        if cell in self.towards and (cell not in self._cells or self._is_reached(cell, xy)):
            following = self.towards[cell]
            self._cells = (cell, following)
            if following == self.goal_cell:
                self._waypoint = self.goal
            else:
                self._waypoint = draw_goal(self.rng, self.maze_map, following)
        return self._waypoint

    def _is_reached(self, cell, xy):
        away = np.hypot(xy[0] - self._waypoint[0], xy[1] - self._waypoint[1])
        return cell == self._cells[1] and away < REACHED


class GuidedAnt:
    """The data-collecting ant of one AntMaze task: a goal-reaching policy that a `Navigator` leads.

    Args:
        env: the task's environment, unwrapped; its rewards come to be for `rewarded_goal`.
        env_id: the task.
        policy: a `BehaviorPolicy` that sees `goal_observation`.
        rng: `numpy.random.Generator` of starts, goals, waypoints and action noise.
    """

    # As in D4RL's files a rewarded step does not end the episode.
    ends_at_terminals = False
    info_widths = {"infos/goal": (2,), "infos/rewarded_goal": (2,)}

    def __init__(self, env, env_id, policy, rng):
        self.env, self.policy, self.rng = env, policy, rng
        maze, self.variant = variant_of(env_id)
        self.maze_map = MAZES[maze]["collection"]
        self.rewarded = rewarded_goal(env_id)

    def reset(self):
        """Starts an episode with a goal of its own; returns the first observation, (29,)."""
        observation, _ = self.env.reset()
        start = draw_start(self.rng, self.maze_map, self.variant)
        if start is not None:
            observation = self.env.place(start)
        self.env.set_target(self.rewarded)
        cell = draw_goal_cell(self.rng, self.maze_map, self.variant)
        goal = draw_goal(self.rng, self.maze_map, cell)
        self.navigator = Navigator(self.maze_map, goal, cell, self.rng)
        self.roams_in = None  # cells, once the goal is reached
        self.infos = {"infos/goal": goal, "infos/rewarded_goal": self.rewarded}
        return observation

    def act(self, observation):
        """Returns an action, (8,) float32: drawn from the policy, with noise, within the bounds."""
        self._lead_on(observation[:2])
        waypoint = self.navigator.waypoint(observation[:2])
        action = self.policy.act(goal_observation(observation, waypoint), self.rng)
        noise = ACTION_NOISE * self.rng.standard_normal(action.shape, dtype=np.float32)
        return np.clip(action + noise, -1.0, 1.0, dtype=np.float32)

    def _lead_on(self, xy):
        """Gives an ant that has reached its goal, or its last place there, another place."""
        away = np.hypot(*(xy - self.navigator.goal))
        if self.roams_in is None and away <= GOAL_RADIUS:
            self.roams_in = around(self.maze_map, self.navigator.goal_cell)
        elif self.roams_in is None or away >= REACHED:
            return
        cell = self.roams_in[self.rng.integers(len(self.roams_in))]
        place = cell_center(self.maze_map, cell) + self.rng.uniform(-ROAMED, ROAMED, 2)
        self.navigator = Navigator(self.maze_map, place, cell, self.rng)
