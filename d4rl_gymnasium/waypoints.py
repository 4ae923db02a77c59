"""How AntMaze data is collected: an ant led along shortest paths of cells, by D4RL's recipe.

The layouts are the `collection` maps of `assets/mazes.json`. Where the ant starts and what it has
to reach differs by task: umaze starts at the start cell and all others anywhere, play and umaze
have marked goals and diverse has goals anywhere. An episode has the length of the task's limit, 700
steps in umaze and 1,000 elsewhere, and goes on at the goal.
"""

from collections import deque

import numpy as np

from d4rl_gymnasium.antmaze import CELL_SIZE, MAZES, cell_center, cells, draw_goal, nearest_cell
from d4rl_gymnasium.goal_ant import goal_observation

# Standard deviation of the Gaussian noise on every component of an action.
ACTION_NOISE = 0.2
# Within this distance, in metres, a waypoint counts as reached.
REACHED = 1.0
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


def rewarded_goal(maze):
    """The one place, (x, y) in metres, that the rewards of a data set are given for.

    Whatever an episode's goal was, D4RL relabelled all its AntMaze files with the goal of the task,
    drawn once. Here it is the mean of that draw, so that no seed gets a corner of the cell.
    """
    maze_map = MAZES[maze]["task"]
    return cell_center(maze_map, cells(maze_map, "g")[0]) + 0.75


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

    # As in D4RL's files the ant goes on at the goal.
    ends_at_terminals = False
    info_widths = {"infos/goal": (2,), "infos/rewarded_goal": (2,)}

    def __init__(self, env, env_id, policy, rng):
        self.env, self.policy, self.rng = env, policy, rng
        self.maze, self.variant = variant_of(env_id)
        self.maze_map = MAZES[self.maze]["collection"]

    def reset(self):
        """Starts an episode with a goal of its own; returns the first observation, (29,)."""
        observation, _ = self.env.reset()
        start = draw_start(self.rng, self.maze_map, self.variant)
        if start is not None:
            observation = self.env.place(start)
        rewarded = rewarded_goal(self.maze)
        self.env.set_target(rewarded)
        cell = draw_goal_cell(self.rng, self.maze_map, self.variant)
        goal = draw_goal(self.rng, self.maze_map, cell)
        self.navigator = Navigator(self.maze_map, goal, cell, self.rng)
        self.infos = {"infos/goal": goal, "infos/rewarded_goal": rewarded}
        return observation

    def act(self, observation):
        """Returns an action, (8,) float32: drawn from the policy, with noise, within the bounds."""
        waypoint = self.navigator.waypoint(observation[:2])
        action = self.policy.act(goal_observation(observation, waypoint), self.rng)
        noise = ACTION_NOISE * self.rng.standard_normal(action.shape, dtype=np.float32)
        return np.clip(action + noise, -1.0, 1.0, dtype=np.float32)
