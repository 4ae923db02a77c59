"""results/benchmark.py: that every computation runs and is counted."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

import benchmark
from lib.checkouts import calls_of
from lib.records import read_rows


@pytest.fixture
def program(monkeypatch, capsys):
    """Call the program; returns what it printed."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "--seconds", "0.01", "--repeats", "3",
                                          "--product", "64", *map(str, args)])  # fmt: skip
        threads = torch.get_num_threads()
        benchmark.main()
        torch.set_num_threads(threads)
        return capsys.readouterr().out

    return call


def test_computations(program, tmp_path):
    path = tmp_path / "times.csv"
    for name in ("iql", "cal_ql update, 3", "buffer", "acting", "energy", "100 environment"):
        assert name in program("--only", name, "--output", path)
    rows = {row["computation"]: row for row in read_rows(path)}
    assert len(rows) == 9
    for name, row in rows.items():
        assert row["ms"] > 0 and row["per_second"] == pytest.approx(1e3 / row["ms"], rel=0.01)
        assert ("gflop" in row) == (not name.startswith(("buffer", "100"))), name
    # Of 16 layers of IQL's update, forward and backward, 256 rows.
    assert rows["iql update"]["gflop"] == 0.5243
    assert "aten::" in program("--profile", "buffer")
    path.write_text("other,columns\n1,2\n")
    with pytest.raises(
        SystemExit, match="error: .*has other columns; these rows are in .*csv"
    ) as end:
        program("--only", "buffer", "--output", path)
    assert read_rows(Path(str(end.value).split()[-1]))[0]["ms"] > 0
    assert path.read_text() == "other,columns\n1,2\n"
    with pytest.raises(SystemExit, match="error: no computation has 'sac' in its name"):
        program("--only", "sac")


def test_scripts(program, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text("hidden_dim: 8\nbatch_size: 8\nname: mine\nseed: 3\n")
    out = program("--scripts", "iql", "--steps", 3, "--config", config, "--output",
                  tmp_path / "times.csv")  # fmt: skip
    (row,) = read_rows(tmp_path / "times.csv")
    assert row["script"] == "iql" and "ms per offline step" in out
    assert row["ms per offline step"] > 0 and row["ms per online step"] > 0


def test_ratios_are_paired_in_rounds(monkeypatch):
    """A machine that slows down between the rounds changes every time and no ratio."""
    args = argparse.Namespace(device="cpu", threads=1, precision="fp32", product=2, repeats=5,
                              seconds=60.0)  # fmt: skip
    clock = benchmark.Clock(args)
    seconds = {"a": 0.3, "b": 0.1, "c": 0.2}
    order = iter([0] + [i for i in range(1, 6) for _ in seconds])  # the first one counts the calls

    def duration(call, n=1):
        return n * seconds[call()] * (1 + next(order))

    monkeypatch.setattr(clock, "duration", duration)
    rows = clock.compare(lambda: "a", {"b": lambda: "b", "c": lambda: "c"})
    assert [row["ours"] for row in rows] == ["b", "c"]
    assert [row["times_as_fast"] for row in rows] == ["3.00", "1.50"]
    assert rows[0]["quartiles"] == "3.00 to 3.00" and rows[0]["rounds"] == 5
    assert (rows[0]["their_ms"], rows[0]["our_ms"]) == ("1200", "400")  # of the third round


def busy():
    """Takes longer than an update of IQL."""
    for _ in range(2_000_000):
        pass


def test_against(program, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "calls_of", lambda *args: {"iql update": busy})
    path = tmp_path / "ratios.csv"
    program("--against", "somewhere", "--output", path)
    (row,) = read_rows(path)
    assert row["computation"] == "iql update" and row["times_as_fast"] > 0.5
    assert row["command"].startswith("python") and {"commit", "hardware", "load"} <= row.keys()
    with pytest.raises(SystemExit, match="error: no computation of theirs has 'sac' in its name"):
        program("--against", "somewhere", "--only", "sac")
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="error: .* is no checkout of CORL .* or CEP"):
        calls_of(tmp_path, {}, None, None, "cpu")
