"""One attempt at a run of grid.py, made in a worker of Ray: its process, log and job.yaml."""

import ctypes
import importlib.metadata
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from d4rl_gymnasium.files import write
from lib.experiments import ROOT
from lib.records import is_finished, read_yaml

POLL_SECONDS = 0.2
LOCK_SECONDS = 60.0  # that an attempt waits for the end of the one before


def attempt(command: list[str], steps: int, directory: str, log: str):
    """Run a command to its end and write job.yaml; nothing is done for a run that has its steps.

    `steps` are the online steps of the command. Another attempt at the run, of another grid, is
    waited for.

    Raises:
        RuntimeError: it failed, or another process holds the run's directory.
        KeyboardInterrupt: the task was cancelled; the command was told to stop.
    """
    # Under nohup a worker starts with interrupts ignored, but a task is cancelled by one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory.with_suffix(".lock")):
        if not is_finished(directory, steps):
            attempt_alone(command, directory, Path(log))


def attempt_alone(command: list[str], directory: Path, log: Path):
    """`attempt`, while no other one is made at the run."""
    try:  # the script's own lock: it may run without a grid, or its worker may just have died
        with FileLock(directory / "lock", timeout=LOCK_SECONDS):
            pass
    except Timeout:
        raise RuntimeError(f"another process is training in {directory}") from None
    path = directory / "job.yaml"
    job = read_yaml(path)
    spent, memory = job.get("seconds", 0.0), job.get("peak_memory_gb", 0.0)
    made = {"commit": git_commit(), "hardware": hardware()}
    made["torch"] = importlib.metadata.version("torch")
    made = {k: joined(job.get(k), now) for k, now in made.items()}
    # Empty until the attempt's end: they stay unknown if it is killed with its worker.
    costs = {"seconds": None, "peak_memory_gb": None, "attempts": job.get("attempts", 0) + 1}
    job = {"command": shlex.join(command), **made, **costs}
    write(path, yaml.safe_dump(job, sort_keys=False))
    code, usage, cancelled = run_command(command, log, job["attempts"])
    if spent is not None:
        job["seconds"] = round(spent + usage.ru_utime + usage.ru_stime, 2)
    if memory is not None:
        job["peak_memory_gb"] = round(max(memory, usage.ru_maxrss / 2**20), 3)
    write(path, yaml.safe_dump(job, sort_keys=False))
    if cancelled:
        raise KeyboardInterrupt
    if code:
        reason = last_line(log)
        if not reason.startswith("error:"):
            reason = f"error: exit status {code}, the last line was: {reason}"
            with open(log, "a") as f:
                print(reason, file=f)
        raise RuntimeError(reason)


def run_command(command: list[str], log: Path, number: int) -> tuple:
    """Run a command with its output appended to a log.

    Returns:
        Exit status, resource usage, and whether it was told to stop by a KeyboardInterrupt.
    """
    libc, parent, cancelled = ctypes.CDLL(None), os.getpid(), False

    def die_with_the_worker():
        libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    with open(log, "a") as f:
        print(f"attempt {number}: {shlex.join(command)}", file=f, flush=True)
        # In a session of its own, out of reach of the terminal's Ctrl-C: a second signal to a
        # script, after the first one's SIGTERM, would stop it in the midst of stopping.
        process = subprocess.Popen(
            [sys.executable, *command[1:]], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=f, stderr=f,
            start_new_session=True, preexec_fn=die_with_the_worker,
        )  # fmt: skip
    while True:  # a cancelled task is interrupted between two lines, not within a waiting call
        try:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return process.returncode, usage, cancelled
            time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            cancelled = True
            os.kill(process.pid, signal.SIGTERM)


def joined(earlier: str | None, now: str | None) -> str | None:
    """What earlier attempts at a run were made with, and this one if that is another."""
    if not earlier:
        return now
    return " and ".join(dict.fromkeys([*earlier.split(" and "), now or "unknown"]))


def git_commit() -> str | None:
    """Commit of the repository, with -dirty if it is not what runs; None outside git."""

    def git(*args):
        return subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True)

    commit = git("rev-parse", "--short", "HEAD")
    if commit.returncode:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no").stdout
    changed += git("status", "--porcelain", "--", "algorithms", "diffusion").stdout  # new files too
    return commit.stdout.strip() + ("-dirty" if changed else "")


def hardware() -> str:
    """CPU model x cores, and the name of the GPU that the task was given."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    found = f"{models[0] if models else 'CPU'} x {os.cpu_count()}"
    if (gpu := os.environ.get("CUDA_VISIBLE_DEVICES")) and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", "-i", gpu]
        found += ", " + subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def last_line(path: Path) -> str:
    """Last line of a log that is not empty; "" where there is none."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, path.stat().st_size - 4096))
            lines = f.read().decode(errors="replace").split("\n")
    except FileNotFoundError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
