"""The tables of the READMEs are made from the files, and only from them."""

import csv

import pytest

import d4rl_gymnasium as d4rl
from d4rl_gymnasium import table
from d4rl_gymnasium.d4rl_files import known_of

TASKS = [
    f"{robot}-{variant}-v2"
    for robot in ("halfcheetah", "hopper", "walker2d")
    for variant in ("medium-expert", "medium-replay", "medium")
] + [f"antmaze-{name}-v2" for name in ("medium-diverse", "medium-play", "umaze-diverse", "umaze")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "policies").mkdir()
    for name in table.TABLES:
        (tmp_path / name).write_text((table.FOLDER / name).read_text())
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", table.TABLES)
def test_the_readmes_have_the_tables_of_the_files(name):
    text = (table.FOLDER / name).read_text()
    assert table.rewritten(text, table.TABLES[name]()) == text, "run python -m d4rl_gymnasium.table"


@pytest.mark.parametrize("name, start", [("README.md", "hopper-medium-v2"),
                                         ("policies/README.md", "hopper-expert")])  # fmt: skip
def test_a_changed_number_shows_and_is_mended(folder, name, start):
    before = (folder / name).read_text()
    row = next(line for line in before.splitlines() if line.startswith(f"| {start} "))
    (folder / name).write_text(before.replace(row, row.replace("3", "4", 1)))
    assert (folder / name).read_text() != before
    with pytest.raises(
        SystemExit, match="error: the table of .*README.md is not that of the files"
    ):
        table.main(["--check"])
    table.main([])
    assert (folder / name).read_text() == before
    table.main(["--check"])


def test_missing_marks_end_in_one_line(folder):
    (folder / "README.md").write_text("# no table\n")
    with pytest.raises(SystemExit, match="error: .*README.md: it needs the lines <!-- table: "):
        table.main([])
    assert (folder / "README.md").read_text() == "# no table\n"


def test_figures_stand_beside_d4rls(monkeypatch):
    row = {name: "1.0" for name in csv_columns()} | {"env": "hopper-medium-v2"}
    monkeypatch.setattr(table, "rows", lambda: [row | {"score mean": "43.21"}])
    mean = 100 * d4rl.get_normalized_score("hopper-medium-v2", 1422.06)
    assert f"| 43.2 ({mean:.1f}) |" in table.data_tables()
    # A standard deviation has no zero to be shifted by: 378.95 of the span from -20.27 to 3,234.3.
    assert "| 1.0 (11.6) |" in table.data_tables()


def csv_columns():
    with open(table.ASSETS / "regenerated.csv", newline="") as file:
        return next(csv.reader(file))


def test_the_rows_are_the_papers_tasks_within_the_tolerances():
    rows = {row["env"]: row for row in table.rows()}
    assert list(rows) == TASKS
    for env_id, row in rows.items():
        known = known_of(env_id)
        assert (row["data"], row["transitions"]) == ("regenerated", "200000")
        assert float(row["length mean"]) == pytest.approx(known["length mean"], rel=0.15)
        if env_id.startswith("antmaze"):
            visited, free = row["visited_cells"].split(" of ")
            assert visited == free and 0 < float(row["rewarded"]) < 0.02
            if env_id != "antmaze-umaze-diverse-v2":  # D4RL's rows are too rare there: 0.004%
                assert float(row["rewarded"]) == pytest.approx(known["rewarded"], rel=0.2)
        else:
            off = 0.15 if "replay" in env_id else 0.05
            if env_id == "hopper-medium-expert-v2":
                off = 0.06  # episodes of its medium half are shorter than D4RL's, so there are more
            assert float(row["return mean"]) == pytest.approx(known["return mean"], rel=off)
