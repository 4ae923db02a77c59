"""Downloads that survive bad connections and servers: resume, retries, time-out, checksum, lock."""

import contextlib
import hashlib
import http.client
import os
import stat
import time
import urllib.error
import urllib.request
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

CHUNK_BYTES = 1 << 20
# Worth another try although the client is blamed: request time-out, too many requests (RFC 9110,
# RFC 6585).
RETRIED_CLIENT_ERRORS = (408, 429)


class DatasetError(Exception):
    """A problem with a data file or its download, told in one line: what is wrong, what to do."""

    def __init__(self, message):
        super().__init__(one_line(message))  # a path may hold a line break


class DownloadError(DatasetError):
    """The server did not give the file."""


class _Retry(Exception):
    """The attempt failed for a reason that the next one may not meet."""


def one_line(text):
    """`text`, an exception for instance, as a string without line breaks."""
    return " ".join(str(text).split())


@contextlib.contextmanager
def writing(path, variable="D4RL_DATASET_DIR"):
    """Turn a file system error inside the block into a `DatasetError` about `path`.

    `variable` of the environment says where it lies.
    """
    try:
        yield
    except OSError as error:
        reason = one_line(error.strerror or error)
        raise DatasetError(
            f"cannot write {path} ({reason}): make room or get permission to write there, or set "
            f"{variable} to another folder"
        ) from error


@contextlib.contextmanager
def exclusive(path):
    """Hold the lock of `path`, a file beside it with `.lock` appended; say so when it must wait.

    The lock is the operating system's: it is free as soon as its holder ends, in whatever way. The
    empty lock file stays, since removing it would let two waiting processes hold a lock each.
    """
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"data: waiting for another process that makes {path}", flush=True)
            lock.acquire()
        except NotImplementedError as error:
            raise DatasetError(
                f"the file system of {path} has no locks: set D4RL_DATASET_DIR to a folder of "
                "another one"
            ) from error
    try:
        yield
    finally:
        lock.release()


def download(url, path, *, sha256, attempts=5, first_delay=1.0, stall_timeout=30.0):
    """Fetch `url` to `path` unless it is there, and return `path`.

    The body goes to `path` + `.part`, which a later call continues. It gets its name when it has
    the length that the server announced and the given sum. Server errors, lost connections and
    stalls are retried with exponential backoff; other client errors (403, 404) are final.

    Args:
        url: `http` or `https` address.
        path: where the finished file goes; its folder is made.
        sha256: of the whole file in hexadecimal digits; what has another sum is dropped.
        attempts: tries in a row that bring nothing new before it gives up.
        first_delay: seconds before the second try; doubles with each further one.
        stall_timeout: seconds without a byte after which a connection counts as lost.

    Raises:
        DownloadError: the download failed, with the reason.
        DatasetError: the disk can't be written.
    """
    path, part = Path(path), Path(f"{path}.part")
    if path.exists():  # finished; its folder may be one where no lock can be made
        return path
    with exclusive(path):
        if not path.exists():
            print(f"data: downloading {url} to {path}", flush=True)
            _refuse_link(part)
            _fetch_with_retries(url, part, attempts, first_delay, stall_timeout)
            with writing(path):
                found = _sha256(part)
                if found == sha256:
                    os.replace(part, path)
                else:
                    part.unlink()
        if not path.exists():
            raise DownloadError(
                f"cannot download {url}: what came is another file (SHA-256 {found}, not "
                f"{sha256}), as when a proxy or a login page answers in its place"
            )
    return path


def _refuse_link(path):
    """The downloader writes to a file of its own alone, not to what a link, say, leads to."""
    with writing(path), contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise DatasetError(f"{path} is not a regular file but, say, a link: move it away")


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(CHUNK_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _fetch_with_retries(url, part, attempts, first_delay, stall_timeout):
    """Complete `part`. Only growth past its largest size so far starts the count of tries anew,
    so a server that always sends the same half from the start can't keep it going for ever.
    """
    failures, largest = 0, _size(part)
    while True:
        try:
            return _fetch_once(url, part, stall_timeout)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in RETRIED_CLIENT_ERRORS:
                raise DownloadError(f"cannot download {url}: {reason}") from error
        except (OSError, http.client.HTTPException, _Retry) as error:
            reason = one_line(getattr(error, "reason", error)) or type(error).__name__
        failures = 1 if _size(part) > largest else failures + 1
        largest = max(largest, _size(part))
        if failures >= attempts:
            raise DownloadError(f"cannot download {url}: {reason}, {failures} times in a row")
        delay = first_delay * 2 ** (failures - 1)
        print(f"data: {reason}; trying again in {delay:g} s", flush=True)
        time.sleep(delay)


def _fetch_once(url, part, stall_timeout):
    """One request that continues `part`; returns when it is complete, else raises."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"User-Agent": "d4rl_gymnasium"})
    if start:  # if it is part of another file, the checksum will not fit
        request.add_header("Range", f"bytes={start}-")
    try:
        response = urllib.request.urlopen(request, timeout=stall_timeout)
    except urllib.error.HTTPError as error:
        if not (start and error.code == 416):
            raise
        error.close()
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return  # it was complete: an earlier process ended just before the renaming
        part.unlink()
        raise _Retry("the partial file does not fit the server's file") from error
    with response:
        if response.status != 206:
            start = 0  # the server ignores ranges: it sends the whole file
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise _Retry("the server sent another range than the one asked for")
        _write_body(response, part, start)


def _write_body(response, part, start):
    """Store the body from byte `start` of `part` on and compare its length with the announced."""
    # None where the server announces no length: then the end of the stream is all there is.
    total = None if response.length is None else start + response.length
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None)
    with bar, writing(part), open(part, "ab" if start else "wb") as file:
        while data := _read(response):
            file.write(data)
            bar.update(len(data))
        file.flush()
        os.fsync(file.fileno())
    if total is not None and _size(part) != total:
        raise _Retry(f"the connection closed after {_size(part):,} of {total:,} bytes")


def _read(response):
    try:
        # read1 hands over what has arrived, so a stall loses none of it.
        return response.read1(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _Retry(f"the connection broke ({error or type(error).__name__})") from error


def _size(path):
    return path.stat().st_size if path.exists() else 0
