"""results/benchmark.py: that every computation runs and is counted."""

import sys

import pytest
import torch

import benchmark
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


def test_products_are_counted():
    layer, x = torch.nn.Linear(7, 5), torch.randn(3, 7)
    with benchmark.ProductCounter() as counter:
        layer(x).sum().backward()
    assert counter.flop == 2 * (2 * 3 * 7 * 5)  # forward, and the gradient of the weights


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
    with pytest.raises(SystemExit, match="error: .*has other columns; take another --output"):
        program("--only", "buffer", "--output", path)
    with pytest.raises(SystemExit, match="error: no computation has 'sac' in its name"):
        program("--only", "sac")


def test_scripts(program, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text("hidden_dim: 8\nbatch_size: 8\n")
    out = program("--scripts", "iql", "--steps", 3, "--config", config, "--output",
                  tmp_path / "times.csv")  # fmt: skip
    (row,) = read_rows(tmp_path / "times.csv")
    assert row["script"] == "iql" and "ms per offline step" in out
    assert row["ms per offline step"] > 0 and row["ms per online step"] > 0
