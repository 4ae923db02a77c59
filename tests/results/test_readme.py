"""The tables of the README are made from the files in results/, and only from them."""

import csv
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def readme(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results")
    return importlib.import_module("readme")


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_every_table_of_the_readme_is_made_from_results(readme, name):
    text = (ROOT / name).read_text()
    assert readme.rewritten(name, text) == text, "run python results/readme.py"


def test_a_changed_number_shows(readme):
    for name, sections in readme.SECTIONS.items():
        text = (ROOT / name).read_text()
        for section in sections:
            begin = text.index(f"<!-- {section}: python results/readme.py -->")
            number = begin + re.search(r"\| [+-]?\d", text[begin:]).end()
            changed = text[:number] + "9" + text[number:]
            assert changed != text == readme.rewritten(name, changed)


def test_missing_marks_are_an_error(readme):
    with pytest.raises(ValueError, match="it needs the lines <!-- data: .*<!-- end of data"):
        readme.rewritten("README.md", "# A README without tables\n")


def test_the_data_sets_are_those_of_the_paper(readme):
    with open(ROOT / "results" / "regenerated.csv", newline="") as f:
        rows = {row["env"]: row for row in csv.DictReader(f)}
    tasks = importlib.import_module("pairs").TASKS
    assert set(tasks) <= set(rows) and len(tasks) == 13
    for task in tasks:
        assert rows[task]["data"] == "regenerated" and rows[task]["transitions"] == "200000"
        if task.startswith("antmaze"):
            visited, free = rows[task]["visited_cells"].split(" of ")
            assert visited == free and float(rows[task]["success_rate"]) > 0
        elif task.endswith("-medium-v2"):
            assert 25 <= float(rows[task]["score mean"]) <= 60
        elif task.endswith("-replay-v2"):
            assert float(rows[task]["score 0%"]) < 2 < 25 < float(rows[task]["score 100%"])
    assert float(rows["antmaze-umaze-v2"]["success_rate"]) >= 0.5
