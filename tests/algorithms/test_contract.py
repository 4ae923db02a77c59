"""What the files promise their readers: a diff that is DARE alone, short functions, no imports."""

import ast
import difflib
import itertools
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = sorted((REPOSITORY / "algorithms").glob("*.py"))
NAMES = [path.name for path in SCRIPTS]
DIFFUSION = sorted((REPOSITORY / "diffusion").glob("*.py"))
PACKAGES = ["d4rl_gymnasium", "diffusion"]
# Baseline, variant, the mark of a hunk
PAIRS = [
    ("iql.py", "dare_iql.py", "# DARE"),
    ("cal_ql.py", "dare_cql.py", "# DARE"),
    ("iql.py", "pex.py", "# PEX"),
    ("iql.py", "edis_iql.py", "# EDIS"),
    ("cal_ql.py", "edis_cql.py", "# EDIS"),
]
# Definitions of one name that are another thing in each group of methods
OF_THE_GROUP = {"Config", "Batch", "TwinQ", "reward_transform", "fine_tune", "main"}
MAX_HUNKS, MAX_DELETED, MAX_FUNCTION, MAX_DIFFUSION = 10, 5, 45, 490


def lines_of(name):
    return (REPOSITORY / "algorithms" / name).read_text().splitlines()


def hunks(before, after):
    """Deleted and added lines of each hunk of a diff without context."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    changes = [x for x in matcher.get_opcodes() if x[0] != "equal"]
    return [(before[i:j], after[k:m]) for _, i, j, k, m in changes]


def rails(lines):
    """Section lines `# --- Name ---`."""
    return [x for x in lines if x.startswith("# --- ") and x.endswith(" ---")]


@pytest.mark.parametrize("baseline, variant, mark", PAIRS)
def test_the_diff_to_the_baseline_is_the_method_alone(baseline, variant, mark):
    found = hunks(lines_of(baseline), lines_of(variant))
    assert 0 < len(found) <= MAX_HUNKS
    assert sum(len(deleted) for deleted, _ in found) <= MAX_DELETED
    for _, added in found:
        assert any(mark in line for line in added), "\n".join(added)


@pytest.mark.parametrize("baseline, variant, mark", PAIRS)
def test_the_variant_has_the_sections_of_its_baseline(baseline, variant, mark):
    of_baseline, of_variant = rails(lines_of(baseline)), rails(lines_of(variant))
    assert len(of_baseline) >= 5
    assert [x for x in of_variant if x in of_baseline] == of_baseline


def section(name, rail):
    """Lines of one section of a script."""
    lines = lines_of(name)
    start = lines.index(rail)
    ends = [i for i in range(start + 1, len(lines)) if lines[i] in rails(lines)]
    return lines[start : ends[0]]


@pytest.mark.parametrize(
    "method, rail, length",
    [
        ("dare", "# --- Alignment and exchange (DARE) ---", 200),
        ("edis", "# --- Transition model and energies (EDIS) ---", 150),
    ],
)
def test_a_method_is_the_same_text_in_both_groups(method, rail, length):
    of_iql, of_cql = section(f"{method}_iql.py", rail), section(f"{method}_cql.py", rail)
    assert len(of_iql) > length
    assert of_iql == of_cql


def definitions(name):
    """Text of every function and class at the top of a script, with its decorators."""
    lines, found = lines_of(name), {}
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = lines[first - 1 : node.end_lineno]
    return found


@pytest.mark.parametrize("first, second", list(itertools.combinations(NAMES, 2)))
def test_a_shared_definition_is_the_same_text(first, second):
    of_first, of_second = definitions(first), definitions(second)
    shared = of_first.keys() & of_second.keys()
    assert {"Parser", "ReplayBuffer", "MLP", "Evaluator", "Run", "cached", "TrainingEnv"} <= shared
    of_one_method = {"Config", "fine_tune"}  # a method's own settings and its loop
    of_one_method |= {"ImplicitQLearning", "CalQL"}  # and its losses
    if {first, second} in [set(pair[:2]) for pair in PAIRS]:
        excepted = of_one_method
    else:
        excepted = of_one_method | OF_THE_GROUP
    differing = {name for name in shared if of_first[name] != of_second[name]}
    assert differing <= excepted


def functions(path):
    """Name and length in lines of every function of a file, decorators not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", SCRIPTS + DIFFUSION, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_functions_are_short(path):
    too_long = {name: n for name, n in functions(path) if n > MAX_FUNCTION}
    assert not too_long


def test_diffusion_is_short():
    assert sum(len(path.read_text().splitlines()) for path in DIFFUSION) <= MAX_DIFFUSION


def imported(path):
    """Top-level names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_stand_alone(path):
    """A script may use the two packages, and neither another script nor any other file here."""
    folders = ["", "algorithms", "tests", "results", *PACKAGES]
    local = {p.stem for folder in folders for p in (REPOSITORY / folder).glob("[!.]*")}
    assert {"iql", "dare_iql", "cal_ql", "dare_cql", "tests", "algorithms"} <= local
    assert not set(imported(path)) & (local - set(PACKAGES) - set(sys.stdlib_module_names))
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    called = {ast.unparse(n.func) for n in calls}
    assert not called & {"__import__", "importlib.import_module", "sys.path.insert"}
