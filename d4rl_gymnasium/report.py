"""What a data set holds, and whether the simulator here is the one that made it."""

import csv
import io
from pathlib import Path

import gymnasium
import numpy as np

from d4rl_gymnasium.antmaze import CELL_SIZE, MAZES, cell_center, cells, start_cell
from d4rl_gymnasium.d4rl_files import known_of
from d4rl_gymnasium.data import STEP_KEYS, TRANSITION_KEYS, DatasetError, get_dataset
from d4rl_gymnasium.files import save_figure, write
from d4rl_gymnasium.tasks import get_normalized_score, task
from d4rl_gymnasium.transitions import is_in_order, require_order, timeouts_of
from d4rl_gymnasium.waypoints import free_cells, variant_of

QUANTILES = (0, 10, 50, 90, 100)
# An action component counts as at its bound, 1, from this size on.
SATURATED = 0.99
# States are stored in float32; a contact amplifies its rounding of 6e-8.
TOLERANCE = 1e-3
# An ant moves less than this in a step, in metres.
ANT_STEP = 1.0


def episode_bounds(dataset, in_maze=False):
    """First row of each episode (n,) and the row after its last one (n,).

    In a maze, an ant that has reached the goal goes on there: D4RL's files mark every step at the
    goal as terminal. There a terminal ends an episode only where the ant is elsewhere afterwards.
    """
    ended = dataset["terminals"].astype(bool)
    if in_maze:
        jumps = np.abs(np.diff(dataset["observations"][:, :2], axis=0)).max(1) > ANT_STEP
        ended = ended & np.append(jumps, True)
    if "timeouts" in dataset:
        ended = ended | dataset["timeouts"].astype(bool)
    ends = np.flatnonzero(ended) + 1
    if not len(ends) or ends[-1] < len(ended):
        ends = np.append(ends, len(ended))  # the file ends within an episode
    return np.append(0, ends[:-1]), ends


def describe(env_id, data="d4rl", regenerated_size=200_000):
    """Numbers that describe a data set of a task, and the arrays that a picture needs.

    Args:
        env_id: task id.
        data: as in `get_dataset`.
        regenerated_size: as in `get_dataset`.

    Returns:
        dict of numbers: transitions, episodes, terminals, timeouts, length, return and score (each
        with its quantiles, mean and standard deviation over episodes), action_saturation (share of
        action components at the bounds), and of AntMaze success_rate, rewarded (share of rows) and
        visited_cells; and the dataset.

    Raises:
        ValueError, DatasetError: as in `get_dataset`, or the rows are not in the order of their
            episodes. Where there are no timeouts, episodes are cut at the limit.
    """
    keys = STEP_KEYS if data in ("d4rl", "regenerated") else TRANSITION_KEYS
    dataset = get_dataset(env_id, data, regenerated_size, keys=(*keys, "infos/goal"))
    has_timeouts = "timeouts" in dataset
    dataset["timeouts"] = timeouts_of(dataset, task(env_id).max_episode_steps, behind_timeout=1)
    require_order(dataset, dataset["terminals"].astype(bool) | dataset["timeouts"])
    in_maze = task(env_id).family == "antmaze"
    starts, ends = episode_bounds(dataset, in_maze)
    returns = np.add.reduceat(dataset["rewards"].astype(np.float64), starts)
    # The task would have ended an AntMaze episode at the first of its rewards.
    task_returns = np.minimum(returns, 1) if in_maze else returns
    found = {
        "transitions": len(dataset["rewards"]),
        "episodes": len(starts),
        "terminals": int(dataset["terminals"].sum()),
        "timeouts": int(dataset["timeouts"].sum()) if has_timeouts else "no such key",
        "length": _summary(ends - starts),
        "return": _summary(returns),
        "score": _summary(100 * get_normalized_score(env_id, task_returns)),
        "action_saturation": float((np.abs(dataset["actions"]) > SATURATED).mean()),
    }
    if in_maze:
        visited, free = visited_cells(env_id, dataset)
        found["success_rate"] = float((returns > 0).mean())
        found["rewarded"] = float((dataset["rewards"] > 0).mean())
        found["visited_cells"] = f"{len(visited)} of {len(free)}"
    return found, dataset


def _summary(values):
    quantiles = {f"{q}%": float(np.percentile(values, q)) for q in QUANTILES}
    return {**quantiles, "mean": float(np.mean(values)), "std": float(np.std(values))}


def visited_cells(env_id, dataset):
    """Free cells of a task's maze in which the ant was, and all free cells; sets of (row, col)."""
    maze = MAZES[variant_of(env_id)[0]]["task"]
    free, start = set(free_cells(maze)), np.array(start_cell(maze))
    columns_rows = np.round(dataset["observations"][:, :2] / CELL_SIZE).astype(int)
    found = {(int(row), int(col)) for col, row in np.unique(columns_rows, axis=0) + start[::-1]}
    return found & free, free


def d4rls(env_id):
    """The figures known of D4RL's own file of a task, by the names of `row`; with those of scores.

    Scores follow from returns, except on AntMaze, where none are known.
    """
    known = known_of(env_id)
    returns = {name: value for name, value in known.items() if name.startswith("return ")}
    scores = {
        name.replace("return", "score"): 100 * float(get_normalized_score(env_id, value))
        for name, value in returns.items()
    }
    if "score std" in scores:  # a difference: the zero of the scale does not matter
        scores["score std"] -= 100 * float(get_normalized_score(env_id, 0.0))
    return known | scores


def text(env_id, found):
    """The numbers of `describe` as lines, those known of D4RL's own file below them."""
    known = d4rls(env_id)
    lines = [f"{env_id}: {found['transitions']:,} transitions in {found['episodes']:,} episodes"]
    if {"transitions", "episodes"} <= known.keys():
        lines[0] += f" (D4RL's file: {known['transitions']:,} in {known['episodes']:,})"
    lines += [f"terminals {found['terminals']:,}, timeouts {found['timeouts']}"]
    header = "".join(f"{name:>10}" for name in found["return"])
    lines += [f"{'per episode':12}{header}"]
    for name in ("length", "return", "score"):
        values = "".join(f"{value:10.1f}" for value in found[name].values())
        lines.append(f"{name:12}{values}")
        theirs = [known.get(f"{name} {quantile}") for quantile in found[name]]
        if theirs != [None] * len(theirs):
            values = "".join(" " * 10 if x is None else f"{x:10.1f}" for x in theirs)
            lines.append(f"{'  D4RL':12}{values}".rstrip())
    if "success_rate" in found:
        lines.append(f"success rate {found['success_rate']:.3f}, "
                     f"free cells visited {found['visited_cells']}")  # fmt: skip
        lines.append(f"rewarded rows {100 * found['rewarded']:.3f}%")
        if "rewarded" in known:
            lines[-1] += f", in D4RL's file about {100 * known['rewarded']:.3f}%"
    lines.append(f"action components at the bounds: {100 * found['action_saturation']:.1f}%")
    return "\n".join(lines)


def row(env_id, data, found):
    """The numbers of `describe` as a row of a table, a dictionary."""
    flat = {"env": env_id, "data": data}
    for name, value in found.items():
        if isinstance(value, dict):
            flat |= {f"{name} {quantile}": f"{x:.1f}" for quantile, x in value.items()}
        else:
            flat[name] = f"{value:.5f}" if isinstance(value, float) else value
    return flat


def write_csv(rows, path):
    """Write rows with the union of their columns, whole or not at all."""
    columns, file = list(dict.fromkeys(name for one in rows for name in one)), io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(Path(path), file.getvalue())


def picture(env_id, dataset, path):
    """Draw a PNG: the episodes' scores, or for AntMaze where the ant was, started and had to go."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    in_maze = task(env_id).family == "antmaze"
    starts, _ = episode_bounds(dataset, in_maze)
    if in_maze:
        _draw_maze(ax, env_id, dataset, starts)
    else:
        returns = np.add.reduceat(dataset["rewards"].astype(np.float64), starts)
        ax.hist(100 * get_normalized_score(env_id, returns), bins=50, color="C0")
        for score, name in ((0, "random"), (100, "expert")):
            ax.axvline(score, color="0.4", ls="--", lw=1)
            ax.annotate(name, (score, 1), xycoords=("data", "axes fraction"), ha="center",
                        va="bottom", color="0.4")  # fmt: skip
        ax.set(xlabel="normalized score of an episode", ylabel="episodes")
    ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{env_id}: {len(dataset['rewards']):,} transitions", fontsize=10)
    save_figure(Path(path), figure)


def _draw_maze(ax, env_id, dataset, starts):
    from matplotlib.patches import Rectangle

    maze = MAZES[variant_of(env_id)[0]]["task"]
    for wall in cells(maze, "#"):
        corner = cell_center(maze, wall) - CELL_SIZE / 2
        ax.add_patch(Rectangle(corner, CELL_SIZE, CELL_SIZE, color="0.75", lw=0))
    xy = dataset["observations"][:: max(1, len(dataset["rewards"]) // 50_000), :2]
    ax.scatter(*xy.T, s=1, color="C0", alpha=0.2, lw=0, label="visited", rasterized=True)
    ax.scatter(*dataset["observations"][starts, :2].T, s=12, color="C1", label="starts")
    if "infos/goal" in dataset:
        goals = np.unique(dataset["infos/goal"][starts], axis=0)
        ax.scatter(*goals.T, s=20, marker="*", color="C3", label="goals")
    ax.set(aspect="equal", xlabel="x (m)", ylabel="y (m)")
    legend = ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    legend.legend_handles[0].set(alpha=1.0, sizes=[12])


def check(env_id, path, limit=20_000, seed=0):
    """Replay transitions of a D4RL file in the simulator and compare what comes out.

    A transition starts from infos/qpos and infos/qvel of its row; where the file has none, from
    its observation, which lacks only x (rows with a velocity at the observation's bound are left
    out). Compared are the observation of the next row, within an episode, the reward and the
    terminal. On AntMaze the last two need infos/rewarded_goal, which regenerated files have. D4RL's
    infos/goal is where the ant was led, and its rewards are for another place, drawn once for a
    file and not recorded.

    Args:
        env_id: task id.
        path: an HDF5 file in D4RL's format.
        limit: transitions to replay at most, drawn at random.
        seed: of the draw.

    Returns:
        dict: states ("infos" or "observations"), transitions (replayed), and for observations,
        rewards and terminals the number compared, the number that agree (to 1e-3 of 1 + |value|)
        and the median, 99% quantile and maximum of the error.

    Raises:
        ValueError, DatasetError: as in `get_dataset`, or nothing can be replayed.
    """
    infos = ("infos/qpos", "infos/qvel", "infos/rewarded_goal")
    dataset = get_dataset(env_id, str(path), keys=(*TRANSITION_KEYS, *infos))
    wrapped = gymnasium.make(env_id)  # with the rescaling of actions that register_task adds
    wrapped.reset(seed=seed)
    env = wrapped.unwrapped
    qpos, qvel, usable, states = _states(env, dataset)
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(usable))[:limit]
    if not len(rows):
        raise DatasetError(f"{path} has no transition that can be replayed")
    maze = task(env_id).family == "antmaze"
    _, ends = episode_bounds(dataset, maze)
    last = np.zeros(len(usable), bool)
    last[ends - 1] = True
    in_order = is_in_order(dataset, last)
    judged = not maze or "infos/rewarded_goal" in dataset
    errors = {"observations": [], "rewards": [], "terminals": []}
    for row in rows:
        if maze and judged:
            env.set_target(dataset["infos/rewarded_goal"][row])
        env.set_state(qpos[row], qvel[row])
        observation, reward, terminated, _, _ = wrapped.step(dataset["actions"][row])
        if not in_order:
            expected = dataset["next_observations"][row]
            errors["observations"].append(_error(observation, expected))
        elif not last[row]:
            expected = dataset["observations"][row + 1]
            errors["observations"].append(_error(observation, expected))
        if judged:
            errors["rewards"].append(_error(reward, dataset["rewards"][row]))
            errors["terminals"].append(float(terminated != dataset["terminals"][row]))
    wrapped.close()
    found = {name: _agreement(np.array(values)) for name, values in errors.items()}
    return {"states": states, "transitions": len(rows), **found}


def _states(env, dataset):
    """Positions (N, nq), velocities (N, nv), which rows can be replayed (N,), and their source.

    The infos of D4RL's AntMaze files are the states after the steps, and those of its v2 hopper and
    walker2d files come from observations, whose velocities are clipped. So infos are taken where
    they are the observations' states, and rows with a velocity at the bound are left out.
    """
    observations = dataset["observations"].astype(np.float64)
    positions, velocities = np.split(observations, [observations.shape[1] - env.model.nv], axis=1)
    hidden = env.model.nq - positions.shape[1]  # x of the planar robots
    bound = getattr(env, "max_observed_speed", np.inf)
    if {"infos/qpos", "infos/qvel"} <= dataset.keys():
        qpos, qvel = dataset["infos/qpos"], dataset["infos/qvel"]
        seen = np.hstack([qpos[:, hidden:], np.clip(qvel, -bound, bound)])
        if np.isclose(seen, observations, rtol=TOLERANCE, atol=TOLERANCE).all(1).mean() > 0.5:
            return qpos, qvel, (np.abs(qvel) != bound).all(1), "infos"
    positions = np.hstack([np.zeros((len(positions), hidden)), positions])
    return positions, velocities, (np.abs(velocities) < bound).all(1), "observations"


def _error(found, expected):
    """Largest error in units of 1 + |expected|."""
    return float(np.max(np.abs(found - expected) / (1 + np.abs(expected))))


def _agreement(errors):
    if not len(errors):
        return {"compared": 0, "agree": 0}
    found = {"compared": len(errors), "agree": int((errors <= TOLERANCE).sum())}
    quantiles = zip(("median", "99%", "largest"), np.percentile(errors, [50, 99, 100]), strict=True)
    return found | {name: float(value) for name, value in quantiles}


def check_text(env_id, path, found):
    """The numbers of `check` as lines."""
    lines = [f"{path} as {env_id}: {found['transitions']:,} transitions replayed from their "
             f"{found['states']}"]  # fmt: skip
    for name in ("observations", "rewards", "terminals"):
        result = found[name]
        if not result["compared"]:
            why = "" if name == "observations" else ", the file has no infos/rewarded_goal"
            lines.append(f"{name}: nothing to compare{why}")
            continue
        share = 100 * result["agree"] / result["compared"]
        errors = ", ".join(f"{k} {result[k]:.1e}" for k in ("median", "99%", "largest"))
        lines.append(
            f"{name}: {result['agree']:,} of {result['compared']:,} agree ({share:.2f}%)"
            + (f"; error {errors}" if name != "terminals" else "")
        )
    return "\n".join(lines)
