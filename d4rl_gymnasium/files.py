"""Files that are written whole or not at all, and read only if they are intact."""

import io
import os
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
                f"{path} is damaged ({reason}): put a copy of it back, or move it away to start "
                "afresh"
            ) from error
