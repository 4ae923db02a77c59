"""Files that are written whole or not at all, and read only if they are intact."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import torch


class DamagedFileError(OSError):
    """A file is not what was written; the message is one line that says what to do."""


def write(path: Path, data: bytes | str):
    """Write a file, whole or not at all, and onto the disk before it takes its name."""
    data = data.encode() if isinstance(data, str) else data
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save(path: Path, state: dict):
    """Write tensors and plain Python values, whole or not at all."""
    data = io.BytesIO()
    torch.save(state, data)
    write(path, data.getvalue())


def load(path: Path) -> dict:
    """Read what `save` wrote, onto the CPU, without unpickling code.

    Raises:
        DamagedFileError: the file is cut, changed, or nothing that `save` writes.
        OSError: the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # compares each part with its checksum, which torch.load does not
                raise ValueError("a checksum does not fit")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise DamagedFileError(
            f"{path} is damaged ({reason}): put a copy of it back, or move it away to start afresh"
        ) from error
