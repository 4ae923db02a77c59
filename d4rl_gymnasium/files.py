"""Files that are written whole or not at all, and read only if they are intact."""

import hashlib
import io
import os
import pickle
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout


class DamagedFileError(OSError):
    """A file is not what was written; the message is one line that says what to do."""


def write(path: Path, data: bytes | str):
    """Write a file, whole or not at all, and onto the disk before it takes its name.

    Raises:
        OSError: it cannot be written; `filename` is the path.
    """
    data = data.encode() if isinstance(data, str) else data
    partial = path.with_name(f"{path.name}.tmp")
    try:
        if partial.is_symlink():  # else what it leads to would be overwritten
            partial.unlink()
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        if partial.is_file():
            partial.unlink()
        if isinstance(error, OSError):  # a full disk names no file
            blamed = partial if partial.is_dir() else path
            raise OSError(error.errno, error.strerror or str(error), str(blamed)) from error
        raise


def save_figure(path: Path, figure):
    """Write a figure of matplotlib's, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:])
    write(path, data.getvalue())


def save(path: Path, state: dict):
    """Write tensors and plain Python values, whole or not at all.

    Raises:
        ValueError: there is something else in it, which `load` would refuse.
        OSError: the file cannot be written.
    """
    data = io.BytesIO()
    torch.save(state, data)
    data.seek(0)
    try:
        torch.load(data, map_location="meta", weights_only=True)  # reads no numbers of tensors
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not written: a state_dict may hold tensors and plain Python values only, "
            "no values of numpy or objects of your own"
        ) from error
    write(path, data.getvalue())


def load(path: Path) -> dict:
    """Read what `save` wrote, onto the CPU, without unpickling code.

    Raises:
        DamagedFileError: the file is cut, changed, or nothing that `save` writes.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        try:
            parts = zipfile.ZipFile(file)
            # torch.load compares no checksum, and takes a part with attributes for a folder.
            if parts.testzip() or any(part.external_attr for part in parts.infolist()):
                raise ValueError("a checksum does not fit")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of zipfile, zlib, pickle or torch, by where the damage is
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DamagedFileError(
                f"{path} is damaged ({reason}): put a copy of it back, or move it away and make it "
                "anew"
            ) from error


def digest(path: str | Path) -> str:
    """What tells a file's text from another's: the first 12 digits of its SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


@contextmanager
def contents_of(path: Path):
    """For a block that uses what a file holds: what is missing or does not fit is the file's fault.

    Raises:
        DamagedFileError: in place of the error.
    """
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        # torch says which weights do not fit in its second line.
        lines = (missing or type(error).__name__).splitlines()[:2]
        reason = " ".join(line.strip() for line in lines)
        raise DamagedFileError(
            f"{path} does not hold what this version reads there ({reason}): put the right one "
            "there, move it away and make it anew, or mend what reads it if you edited that"
        ) from error


@contextmanager
def locked(path: Path):
    """Hold the lock of a file that is to be made once; say so when another process has it."""
    lock = FileLock(f"{path}.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting for {path}, which another process is making", flush=True)
        held = lock.acquire()
    with held:
        yield
