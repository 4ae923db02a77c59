"""Downloads against a real HTTP server on loopback whose faults are scripted per request."""

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from d4rl_gymnasium.download import DatasetError, DownloadError, download

BODY = bytes(range(256)) * 400
SHA256 = hashlib.sha256(BODY).hexdigest()
FAST = {"sha256": SHA256, "first_delay": 0.01, "stall_timeout": 10}


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY; the n-th request behaves as the n-th word of server.script says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        with server.guard:
            server.ranges.append(self.headers.get("Range"))
            step = server.script.pop(0) if server.script else "ok"
        if isinstance(step, int):
            self.send_error(step)
        elif step == "drop":
            self.close_connection = True
        else:
            self._body(step)

    def _body(self, step):
        start = 0
        if self.headers.get("Range") and step != "no-range":
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        if start >= len(BODY):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(BODY)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            start = 0 if step == "wrong-range" else start
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        if step == "no-length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        body = BODY[start:]
        if step == "slow":
            time.sleep(1)
        if step in ("truncate", "stall"):
            body = body[: len(body) // 2]
        self.server.sent += len(body)
        self.wfile.write(body)
        if step == "stall":
            self.wfile.flush()
            self.server.release.wait(10)
        if step != "ok":
            self.close_connection = True


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.script, server.ranges, server.sent = [], [], 0
    server.guard, server.release = threading.Lock(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/data/file.hdf5"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "file.hdf5"


def part_of(path):
    """The partial file of an earlier try."""
    path.parent.mkdir(exist_ok=True)
    return path.with_name(path.name + ".part")


def files_of(path):
    return sorted(x.name for x in path.parent.iterdir() if x.suffix != ".lock")


def test_success_leaves_the_whole_file_and_no_partial_one(server, path):
    assert download(server.url, path, **FAST) == path
    assert path.read_bytes() == BODY
    assert files_of(path) == ["file.hdf5"]


def test_a_present_file_is_not_fetched_again(server, path):
    path.parent.mkdir()
    path.write_bytes(b"already here")
    download(server.url, path, **FAST)
    assert path.read_bytes() == b"already here"
    assert server.ranges == []


@pytest.mark.parametrize("code", [403, 404])
def test_a_client_error_is_final(server, path, code):
    server.script = [code] * 9
    with pytest.raises(DatasetError, match=f"{server.url}: HTTP {code}"):
        download(server.url, path, **FAST)
    assert len(server.ranges) == 1
    assert not path.exists()


@pytest.mark.parametrize("fault", [500, 503, 429, "drop"])
def test_a_passing_fault_is_retried(server, path, fault):
    server.script = [fault, fault]
    download(server.url, path, **FAST)
    assert path.read_bytes() == BODY
    assert len(server.ranges) == 3


def test_it_gives_up_with_the_reason_after_the_given_attempts(server, path):
    server.script = [503] * 9
    with pytest.raises(DatasetError, match="HTTP 503 .*3 times in a row") as raised:
        download(server.url, path, attempts=3, **FAST)
    assert len(server.ranges) == 3
    assert "\n" not in str(raised.value)


def test_the_delay_doubles(server, path, monkeypatch):
    delays = []
    monkeypatch.setattr("d4rl_gymnasium.download.time.sleep", delays.append)
    server.script = [503] * 9
    with pytest.raises(DatasetError):
        download(server.url, path, sha256=SHA256, attempts=4)
    assert delays == [1.0, 2.0, 4.0]


def test_a_refused_connection_is_retried_and_named(server, path):
    server.shutdown()
    server.server_close()
    with pytest.raises(DatasetError, match="refused, 2 times in a row"):
        download(server.url, path, attempts=2, **FAST)


@pytest.mark.parametrize("fault", ["truncate", "stall"])
def test_a_cut_body_is_continued_where_it_stopped(server, path, fault):
    server.script = [fault]
    download(server.url, path, **FAST | {"stall_timeout": 1})
    assert path.read_bytes() == BODY
    assert server.ranges == [None, f"bytes={len(BODY) // 2}-"]
    assert server.sent == len(BODY)


def test_a_stall_ends_after_the_time_out(server, path):
    server.script = ["stall"]
    before = time.monotonic()
    with pytest.raises(DatasetError, match="timed out"):
        download(server.url, path, attempts=1, **FAST | {"stall_timeout": 2})
    assert time.monotonic() - before < 5
    assert part_of(path).stat().st_size == len(BODY) // 2


def test_a_later_call_continues_the_partial_file(server, path):
    server.script = ["truncate"]
    with pytest.raises(DatasetError, match=f"closed after 51,200 of {len(BODY):,} bytes"):
        download(server.url, path, attempts=1, **FAST)
    assert not path.exists()
    download(server.url, path, **FAST)
    assert path.read_bytes() == BODY
    assert server.sent == len(BODY)


def test_progress_starts_the_count_of_attempts_anew(server, path):
    server.script = ["truncate"] * 6
    download(server.url, path, attempts=2, **FAST)
    assert path.read_bytes() == BODY


def test_the_same_half_again_and_again_is_no_progress(server, path, monkeypatch):
    monkeypatch.setattr(_Handler, "_body", _half_without_ranges)
    with pytest.raises(DatasetError, match="3 times in a row"):
        download(server.url, path, attempts=3, **FAST)
    assert server.ranges[0] is None
    assert len(server.ranges) == 3


def _half_without_ranges(self, step):
    self.send_response(200)
    self.send_header("Content-Length", str(len(BODY)))
    self.end_headers()
    self.wfile.write(BODY[: len(BODY) // 2])
    self.close_connection = True


def test_a_server_that_ignores_ranges_sends_the_file_anew(server, path):
    part_of(path).write_bytes(b"x" * 1000)
    server.script = ["no-range"]
    download(server.url, path, **FAST)
    assert path.read_bytes() == BODY
    assert server.ranges == ["bytes=1000-"]


def test_a_complete_partial_file_only_gets_its_name(server, path):
    part_of(path).write_bytes(BODY)
    download(server.url, path, **FAST)
    assert path.read_bytes() == BODY
    assert server.sent == 0


def test_a_partial_file_longer_than_the_servers_is_dropped(server, path):
    part_of(path).write_bytes(BODY + b"more")
    download(server.url, path, **FAST)
    assert path.read_bytes() == BODY


def test_a_wrong_range_is_not_appended(server, path):
    part_of(path).write_bytes(BODY[:1000])
    server.script = ["wrong-range"]
    download(server.url, path, **FAST)
    assert path.read_bytes() == BODY


def test_a_body_without_length_ends_with_the_connection(server, path):
    server.script = ["no-length"]
    download(server.url, path, **FAST)
    assert path.read_bytes() == BODY


def test_two_threads_and_one_download(server, path, capsys):
    server.script = ["slow"]
    threads = [
        threading.Thread(target=download, args=(server.url, path), kwargs=FAST) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert path.read_bytes() == BODY
    assert server.sent == len(BODY)
    assert "waiting for another process" in capsys.readouterr().out


def test_two_processes_and_one_download(server, path):
    server.script = ["slow"]
    code = "from sys import argv; from d4rl_gymnasium.download import download as get\n"
    code += "get(*argv[1:3], sha256=argv[3])"
    command = [sys.executable, "-c", code, server.url, str(path), SHA256]
    children = [subprocess.Popen(command, env=dict(os.environ)) for _ in range(2)]
    assert [child.wait(40) for child in children] == [0, 0]
    assert path.read_bytes() == BODY
    assert server.sent == len(BODY)


def test_a_folder_that_cannot_be_made_is_one_clear_error(server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DatasetError, match="cannot write .*D4RL_DATASET_DIR"):
        download(server.url, tmp_path / "file" / "data.hdf5", **FAST)


def test_a_full_disk_is_not_mistaken_for_a_bad_line(server, path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    monkeypatch.setattr("builtins.open", lambda *args, real=open: real("/dev/full", args[1]))
    with pytest.raises(DatasetError, match="No space left on device.*make room"):
        download(server.url, path, **FAST)
    assert len(server.ranges) == 1


def test_another_sum_never_gets_the_name(server, path):
    with pytest.raises(DownloadError, match=f"SHA-256 {SHA256}, not {'0' * 64}.*login page"):
        download(server.url, path, **FAST | {"sha256": "0" * 64})
    assert files_of(path) == [] and len(server.ranges) == 1
    download(server.url, path, **FAST)
    assert path.read_bytes() == BODY


def test_a_partial_file_that_was_changed_is_found_by_its_sum(server, path):
    part_of(path).write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match="another file"):
        download(server.url, path, **FAST)
    assert server.ranges == ["bytes=1000-"] and files_of(path) == []


@pytest.mark.parametrize("make", ["link", "dangling", "pipe"])
def test_a_link_in_the_place_of_a_partial_file_is_refused(server, path, tmp_path, make):
    path.parent.mkdir()
    name, precious = "file.hdf5.part", tmp_path / "precious"
    if make == "pipe":
        os.mkfifo(path.parent / name)
    else:
        (path.parent / name).symlink_to(precious)
    if make == "link":
        precious.write_text("of another program")
    with pytest.raises(DatasetError, match=f"{name} is not a regular file.*: move it"):
        download(server.url, path, **FAST)
    assert server.ranges == [] and not path.exists()
    assert precious.exists() == (make == "link")
    assert make != "link" or precious.read_text() == "of another program"


def test_a_file_system_without_locks_is_one_line(server, path, monkeypatch):
    def acquire(lock, timeout):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("d4rl_gymnasium.download.FileLock.acquire", acquire)
    with pytest.raises(DatasetError, match="has no locks: set D4RL_DATASET_DIR"):
        download(server.url, path, **FAST)


def test_the_file_is_on_the_disk_before_it_has_its_name(server, path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    download(server.url, path, **FAST)
    assert synced == [len(BODY)]
