"""Arrays of an HDF5 file: never from outside that file, and none that was not written."""

import contextlib
import math
import os
import stat

import h5py

from d4rl_gymnasium.download import DatasetError, one_line

MOST_LINKS = 16  # that one name may lead through, so that a circle of them ends
NUMBERS = "fiub"  # kinds of numpy types: float, int, unsigned, bool


@contextlib.contextmanager
def opened(path):
    """Open a file for reading; a fault of it inside the block is a `DatasetError` in one line."""
    try:
        # Looked at first: opening a named pipe would wait for its writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DatasetError(f"{path} is no regular file: name an HDF5 file")
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DatasetError(
            f"cannot read {path} ({one_line(error.strerror or error)}): get permission to read it, "
            "or name another file"
        ) from error
    try:
        # Some network file systems have no locks.
        with h5py.File(path, "r", locking="best-effort") as file:
            yield file
    except MemoryError as error:
        raise DatasetError(f"{path} does not fit into memory: use a smaller file") from error
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"{path} {_fault(path, one_line(error))}") from error


def _fault(path, reason):
    """What an error of HDF5 means, and what to do."""
    if "unable to lock file" in reason or "file is already open" in reason:
        fault = "is open in another program, which may still write to it: close it there, or wait"
        if "h5clear" in reason:
            fault += f"; if that program has crashed, run h5clear -s {path}"
        return fault
    if "truncated file" in reason:
        return f"is truncated ({reason}): copy it here anew, or name another file"
    if not h5py.is_hdf5(path):
        return f"is not an HDF5 file ({reason}): name another file"
    return f"is damaged, or being written ({reason}): use an intact copy of it"


def find(file, name):
    """The array that `name` leads to, by hard or soft links, as an `h5py.Dataset` that is not read.

    None where nothing, a group or a null array has that name.

    Raises:
        DatasetError: it lies in another file.
    """
    item = _follow(file, name)
    if not isinstance(item, h5py.Dataset) or item.shape is None:
        return None
    if item.external or item.is_virtual:
        raise _outside(file, name)
    return item


def _follow(file, name):
    place, parts, n_links = file, name.split("/"), 0
    while parts:
        part = parts.pop(0)
        if part in ("", "."):
            continue
        link = place.get(part, getlink=True) if isinstance(place, h5py.Group) else None
        if isinstance(link, h5py.ExternalLink):
            raise _outside(file, name)
        if isinstance(link, h5py.SoftLink) and n_links < MOST_LINKS:
            n_links += 1
            parts = link.path.split("/") + parts
            place = file if link.path.startswith("/") else place
        elif isinstance(link, h5py.HardLink):
            place = place[part]
        else:
            return None
    return place


def _outside(file, name):
    return DatasetError(
        f"{file.filename}: {name} lie in another file, which is not followed: write all arrays "
        "into one file"
    )


def names(file):
    """The names in the file and in its groups such as infos; `metadata` is left out."""
    found = []
    for name in _own(file):
        item = _follow(file, name)
        if isinstance(item, h5py.Dataset):
            found.append(name)
        elif isinstance(item, h5py.Group) and name != "metadata":
            found += [f"{name}/{inner}" for inner in _own(item)]
    return found


def _own(group):
    return [x for x in group if not isinstance(group.get(x, getlink=True), h5py.ExternalLink)]


def read(array, name):
    """The values of an `h5py.Dataset` from `find`.

    Rows that were never written would read as 0, and could be more than memory holds.

    Raises:
        DatasetError: a filter that it is compressed with is missing, or it was not written whole.
    """
    path = array.file.filename
    properties = array.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        code, _, _, label = properties.get_filter(i)
        if not _has_filter(code):
            filter_name = f"{code} {label.decode(errors='replace')}".strip()
            raise DatasetError(
                f"{path}: {name} are compressed with a filter that is not installed here "
                f"({filter_name}): pip install hdf5plugin, or write the file with gzip"
            )
    if array.shape == array.shape[:1] and array.dtype.itemsize == 1:
        whole = True  # flags, of which a program need not write those that are 0
    elif array.chunks:
        pieces = zip(array.shape, array.chunks, strict=True)
        whole = array.id.get_num_chunks() >= math.prod(-(-n // size) for n, size in pieces)
    else:
        whole = array.id.get_storage_size() > 0
    if not whole and array.size:  # one without rows is never written
        raise DatasetError(
            f"{path}: {name} have room for {len(array):,} rows that were not all written: write "
            "the file to its end"
        )
    return array[()]


def _has_filter(code):
    if not h5py.h5z.filter_avail(code):
        with contextlib.suppress(ImportError):
            import hdf5plugin  # noqa: F401  registers the filters that it brings
    return h5py.h5z.filter_avail(code)
