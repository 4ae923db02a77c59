"""Data made on this machine by D4RL's recipe, with policies that ship with the package.

D4RL drew its locomotion data from soft actor-critic runs: random = uniform actions, medium = a
policy of part of the expert's score, expert = a finished one, medium-expert = half of each,
medium-replay = what the training had seen up to medium, full-replay = all that it had seen. Its
AntMaze data come from a goal-reaching ant that is led through the maze (see `waypoints.py`). The
policies here are of the same kind but not the same. Snapshots along the training, in its order,
stand in for the replay buffer, and where no one snapshot has the returns of D4RL's medium policy,
several share its part. `policies/recipe.json` lists the policies of each task and their shares of
the rows, which `fit_recipe.py` fits to what is known of D4RL's files (`assets/d4rl.json`). It is
*like* D4RL's data, not it.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
from tqdm import tqdm

from d4rl_gymnasium.behavior import BehaviorPolicy
from d4rl_gymnasium.d4rl_files import known_of
from d4rl_gymnasium.download import DatasetError, exclusive, writing
from d4rl_gymnasium.tasks import TASKS, task
from d4rl_gymnasium.waypoints import GuidedAnt, episode_steps

POLICIES = Path(__file__).parent / "policies"
# To be raised with any change here, in the environments or in behavior.py that changes the data.
RECIPE_VERSION = 2
# A unit of work with its own random numbers, so that the data don't depend on who does which.
CHUNK_ROWS = 10_000


def regenerated_tasks():
    """The ids of the tasks that can be regenerated, sorted."""
    return [env_id for env_id in sorted(TASKS) if _policies(env_id)]


def regenerated_path(env_id, size, folder, seed=0):
    """The cache file of a task's regenerated data; other policies or recipes have other names.

    `size` is the number of transitions, 0 for D4RL's nominal size.

    Raises:
        ValueError: unknown task id.
        DatasetError: no policies for this task, or an impossible size.
    """
    digest = _digest(_policies_or_error(env_id), seed)
    return Path(folder) / f"{env_id}-regenerated-{_rows(env_id, size)}-{digest}.hdf5"


def _rows(env_id, size):
    if not isinstance(size, (int, np.integer)) or size < 0:
        raise DatasetError(
            f"cannot regenerate {size} transitions: give a whole number above 0, or 0 for as many "
            "as D4RL's file has"
        )
    return int(size) or known_of(env_id)["transitions"]


def regenerate(env_id, size, path, seed=0, processes=None):
    """Make `size` transitions of a task at `path`, in D4RL's format, unless the file is there.

    Episodes end by a terminal or by a time-out at the task's limit; the last episode of each
    policy's share is cut to fit and marked as timed out. On AntMaze every step within reach of the
    rewarded place is rewarded and terminal, and only the time-out ends the episode. There
    infos/goal is where the ant was led, and infos/rewarded_goal, which D4RL's files lack, the place
    that the rewards are for. The file's attributes mark it as regenerated and say how. A seed gives
    the same arrays with any number of processes.

    Args:
        env_id: task id, one of `regenerated_tasks()`.
        size: number of transitions; 0 for D4RL's nominal size.
        path: the file, from `regenerated_path`.
        seed: of environments and action noise.
        processes: workers; by default one for each processor.

    Raises:
        DatasetError: no policies for this task, a worker failed, or the disk can't be written.
    """
    policies, size = _policies_or_error(env_id), _rows(env_id, size)
    path = Path(path)
    with contextlib.nullcontext() if path.exists() else exclusive(path):
        if path.exists():  # finished; its folder may be one where no lock can be made
            print(f"data: regenerated {env_id} from the cache, {path}", flush=True)
            return
        print(f"data: regenerating {size:,} transitions of {env_id} at {path}", flush=True)
        # A halfcheetah can't fall, so all its episodes are of one length: none need be cut.
        known = task(env_id)
        whole = known.max_episode_steps if known.robot == "halfcheetah" else 1
        chunks = _plan(policies, size, whole)
        prefix = f"{path.stem}-chunks-"
        for left_by_killed_run in path.parent.glob(f"{prefix}*"):
            shutil.rmtree(left_by_killed_run, ignore_errors=True)  # its workers may still write
        with writing(path):
            folder = tempfile.mkdtemp(dir=path.parent, prefix=prefix)
        try:
            with writing(path):
                _run_workers(env_id, seed, chunks, folder, processes or os.cpu_count() or 1)
                arrays = _joined(chunks, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        attributes = {
            "regenerated": True,
            "env_id": env_id,
            "size": size,
            "seed": seed,
            "recipe_version": RECIPE_VERSION,
            "mujoco_version": mujoco.__version__,
            "policies": [_label(policy) for policy, _ in policies],
            "shares": [share for _, share in policies],
            "digest": _digest(policies, seed),
        }
        _write(path, arrays, attributes)


def _policies(env_id):
    """The policy files of a task and their shares of its rows, in order; None: uniform actions.

    Empty where files are missing.
    """
    if not TASKS[env_id].dataset_url:
        return []  # none of D4RL's tasks
    name = env_id.removesuffix("-v2")
    robot, variant = name.split("-", 1)
    if variant == "random":
        return [(None, 1.0)]
    if variant == "medium-expert":
        medium, expert = (_policies(f"{robot}-{half}-v2") for half in ("medium", "expert"))
        if not (medium and expert):
            return []
        return [(policy, share / 2) for policy, share in medium + expert]
    path = POLICIES / "recipe.json"
    recipe = json.loads(path.read_text()) if path.exists() else {}
    name = "antmaze" if robot == "antmaze" else name
    policies = [(POLICIES / f"{policy}.npz", x) for policy, x in recipe.get(name, {}).items()]
    return policies if all(policy.exists() for policy, _ in policies) else []


def _policies_or_error(env_id):
    policies = _policies(task(env_id).env_id)
    if not policies:
        raise DatasetError(
            f"{env_id} can't be regenerated, no policies for it ship with the package: use "
            f"--data d4rl, or one of {', '.join(regenerated_tasks())}"
        )
    return policies


def _label(policy):
    return policy.stem if policy else "random"


def _digest(policies, seed):
    """Eight hex digits of everything but task and size that the data depend on."""
    recipe = (RECIPE_VERSION, CHUNK_ROWS, seed, mujoco.__version__)
    digest = hashlib.sha256(repr(recipe).encode())
    for policy, share in policies:
        digest.update(f"{_label(policy)} {share}".encode())
        digest.update(policy.read_bytes() if policy else b"")
    return digest.hexdigest()[:8]


def _plan(policies, size, whole=1):
    """Split `size` rows into a share for each policy, rounded to a multiple of `whole` rows, and
    these into chunks, in the file's order.
    """
    chunks = []
    shares = np.cumsum([0.0, *(share for _, share in policies)])
    bounds = whole * (size * shares / shares[-1] / whole).round().astype(int)
    bounds = [*np.minimum(bounds[:-1], size).tolist(), size]
    for part, (policy, _) in enumerate(policies):
        for number, start in enumerate(range(bounds[part], bounds[part + 1], CHUNK_ROWS)):
            rows = min(CHUNK_ROWS, bounds[part + 1] - start)
            chunks.append(
                {"policy": policy and str(policy), "rows": rows, "spawn_key": [part, number]}
            )
    return chunks


def _chunk_file(folder, chunk):
    return Path(folder) / "chunk-{}-{}.npz".format(*chunk["spawn_key"])


def _run_workers(env_id, seed, chunks, folder, processes):
    """Let workers fill `folder` with a file for each chunk; raises if one of them fails.

    Plain subprocesses: `multiprocessing` would import the caller's script again in each worker.
    One thread each, as the number of threads can change the last bit of a matrix product.
    """
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    code = "import sys; from d4rl_gymnasium.regenerate import work; work(sys.argv[1])"
    processes = min(processes, len(chunks))
    workers, logs = [], [Path(folder) / f"worker-{i}.log" for i in range(processes)]
    try:
        for i, log in enumerate(logs):
            job = json.dumps([env_id, seed, folder, chunks[i::processes]])
            with open(log, "wb") as file:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-c", code, job],
                        env=os.environ | single,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                    )
                )
        failed = _watch(workers, chunks, folder)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if failed is not None:
        status = workers[failed].returncode
        said = logs[failed].read_text(errors="replace").strip().splitlines()
        if not said and status > 1:
            raise OSError(status, os.strerror(status), folder)
        reason = said[-1] if said else f"a worker ended with status {status}"
        if status < 0:
            reason = f"a worker was killed by signal {-status}, as when memory runs out"
        raise DatasetError(f"regenerating {env_id} failed ({reason}): try again, or --data d4rl")


def _watch(workers, chunks, folder):
    """Show progress until all workers have ended (None) or one has failed (its index)."""
    pending = list(chunks)
    rows = sum(chunk["rows"] for chunk in chunks)
    with tqdm(total=rows, desc="regenerating", unit=" steps", disable=None) as bar:
        while True:
            codes = [worker.poll() for worker in workers]
            for chunk in [chunk for chunk in pending if _chunk_file(folder, chunk).exists()]:
                pending.remove(chunk)
                bar.update(chunk["rows"])
            failed = [i for i, code in enumerate(codes) if code]
            if failed or None not in codes:
                return failed[0] if failed else None
            time.sleep(0.05)


def work(job):
    """What a worker process does: `job` is the JSON of [task id, seed, folder, chunks]."""
    env_id, seed, folder, chunks = json.loads(job)
    parent = os.getppid()
    for chunk in chunks:
        if os.getppid() != parent:
            return  # the process that started this one has ended
        arrays = _collect(env_id, seed, **chunk)
        final = _chunk_file(folder, chunk)
        partial = final.with_suffix(".partial")
        try:
            data = io.BytesIO()  # on a full disk np.savez ends with another error
            np.savez(data, **arrays)
            partial.write_bytes(data.getbuffer())
            os.replace(partial, final)
        except OSError as error:
            sys.exit(error.errno or 1)  # as a number: on a full disk the log can hold no message


def _collect(env_id, seed, policy, rows, spawn_key):
    """Run whole episodes until there are at least `rows` rows; returns all of them."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=spawn_key))
    env = gymnasium.make(env_id).unwrapped
    env.reset(seed=int(rng.integers(2**31)))  # seeds the resets below
    actor = _actor(env, env_id, policy, rng)
    in_maze = task(env_id).family == "antmaze"
    limit = episode_steps(env_id) if in_maze else task(env_id).max_episode_steps
    arrays = _empty(env, rows + limit, actor.info_widths)
    row = 0
    while row < rows:
        first, observation = row, actor.reset()
        for _ in range(limit):
            arrays["observations"][row] = observation
            arrays["infos/qpos"][row] = env.data.qpos
            arrays["infos/qvel"][row] = env.data.qvel
            action = actor.act(observation)
            observation, reward, terminated, _, _ = env.step(action)
            arrays["actions"][row] = action
            arrays["rewards"][row] = reward
            arrays["next_observations"][row] = observation
            arrays["terminals"][row] = terminated
            row += 1
            if terminated and actor.ends_at_terminals:
                break
        arrays["timeouts"][row - 1] = not (terminated and actor.ends_at_terminals)
        for key, value in actor.infos.items():
            arrays[key][first:row] = value
    env.close()
    return {key: array[:row] for key, array in arrays.items()}


class _LocomotionActor:
    """An actor of the locomotion tasks: a policy with its noise, or uniform actions (None)."""

    ends_at_terminals = True
    info_widths, infos = {}, {}

    def __init__(self, env, policy, rng):
        self.env, self.policy, self.rng = env, policy, rng

    def reset(self):
        return self.env.reset()[0]

    def act(self, observation):
        if self.policy is None:
            shape = self.env.action_space.shape
            return self.rng.uniform(-1.0, 1.0, shape).astype(np.float32)
        return self.policy.act(observation, self.rng)


def _actor(env, env_id, policy, rng):
    loaded = policy and BehaviorPolicy.load(policy)
    if task(env_id).family == "antmaze":
        return GuidedAnt(env, env_id, loaded, rng)
    return _LocomotionActor(env, loaded, rng)


def _empty(env, rows, info_widths):
    """Arrays under D4RL's keys and in its types; log-probabilities and metadata are left out."""
    observation, action = env.observation_space.shape, env.action_space.shape
    widths = {
        "observations": observation,
        "actions": action,
        "next_observations": observation,
        "rewards": (),
        "infos/qpos": env.data.qpos.shape,
        "infos/qvel": env.data.qvel.shape,
        **info_widths,
    }
    arrays = {key: np.zeros((rows, *width), np.float32) for key, width in widths.items()}
    return arrays | {key: np.zeros(rows, bool) for key in ("terminals", "timeouts")}


def _joined(chunks, folder):
    """The chunks' arrays in order, each share of them cut to the rows that the plan gives it."""
    shares = {}
    for chunk in chunks:
        with np.load(_chunk_file(folder, chunk), allow_pickle=False) as file:
            shares.setdefault(chunk["spawn_key"][0], []).append((chunk["rows"], dict(file)))
    parts = []
    for share in shares.values():
        rows = sum(chunk_rows for chunk_rows, _ in share)
        keys = share[0][1]
        part = {key: np.concatenate([arrays[key] for _, arrays in share])[:rows] for key in keys}
        # In AntMaze terminals end no episode, so the cut is a time-out even at one.
        part["timeouts"][-1] = "infos/goal" in part or not part["terminals"][-1]
        parts.append(part)
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _write(path, arrays, attributes):
    """Write the file whole or not at all; made in memory, for on a full disk HDF5 crashes."""
    from d4rl_gymnasium.files import write  # here, as it imports torch, which no worker needs

    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.attrs.update(attributes)
        for key, array in arrays.items():
            file.create_dataset(key, data=array, compression="gzip", compression_opts=1)
    with writing(path):
        write(path, content.getvalue())
