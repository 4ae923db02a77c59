"""What the files promise their readers: a diff that is DARE alone, short functions, no imports."""

import ast
import difflib
import itertools
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
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
NAMES = sorted({name for pair in PAIRS for name in pair[:2]})
SCRIPTS = [REPOSITORY / "algorithms" / name for name in NAMES]
DARES = [variant for _, variant, mark in PAIRS if mark == "# DARE"]
MAX_LINES = {
    "iql.py": 640,
    "dare_iql.py": 850,
    "cal_ql.py": 780,
    "dare_cql.py": 990,
    "pex.py": 700,
    "edis_iql.py": 925,
    "edis_cql.py": 1050,
}
MAX_HUNKS, MAX_DELETED, MAX_FUNCTION, MAX_DIFFUSION = 10, 5, 45, 700
# Definitions of one name that are another thing in each script, and in each group of methods
OF_THE_SCRIPT = {"TrainConfig", "ImplicitQLearning", "CalQL", "train"}
OF_THE_GROUP = {"TensorBatch", "modify_reward", "TwinQ"}
EXCHANGE = "# --- Alignment and exchange (DARE) ---"


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
    assert len(of_baseline) >= 4
    assert [x for x in of_variant if x in of_baseline] == of_baseline


def section(name, rail):
    """Lines of one section of a script."""
    lines = lines_of(name)
    start = lines.index(rail)
    ends = [i for i in range(start + 1, len(lines)) if lines[i] in rails(lines)]
    return lines[start : ends[0]]


@pytest.mark.parametrize("variant", DARES)
def test_the_exchange_is_the_same_text_everywhere(variant):
    found = section(variant, EXCHANGE)
    assert 60 < len(found) < 115
    assert found == section("dare_iql.py", EXCHANGE)


def inner_function(name, function):
    """Text of a function inside of train()."""
    lines = lines_of(name)
    tree = ast.parse("\n".join(lines))
    (train,) = [x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "train"]
    (node,) = [x for x in train.body[-1].body if getattr(x, "name", "") == function]
    return lines[node.lineno - 1 : node.end_lineno]


@pytest.mark.parametrize("variant", DARES)
def test_a_pass_of_algorithm_1_is_the_same_text_everywhere(variant):
    found = inner_function(variant, "dare_update")
    assert 15 < len(found) < 30
    assert found == inner_function("dare_iql.py", "dare_update")


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
    assert {"soft_update", "ReplayBuffer", "eval_actor", "return_reward_range", "MLP"} <= shared
    assert {"Run", "accelerate", "train", "main"} <= shared
    differing = {name for name in shared if of_first[name] != of_second[name]}
    groups = [{"cal_ql.py", "dare_cql.py", "edis_cql.py"} & {x} for x in (first, second)]
    same_group = bool(groups[0]) == bool(groups[1])
    assert differing <= OF_THE_SCRIPT | (set() if same_group else OF_THE_GROUP)


def functions(path):
    """Name and length in lines of every function of a file, decorators not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", SCRIPTS + DIFFUSION, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_functions_are_short(path):
    too_long = {name: n for name, n in functions(path) if n >= MAX_FUNCTION and name != "train"}
    assert not too_long


@pytest.mark.parametrize("name", NAMES)
def test_scripts_are_short(name):
    assert len(lines_of(name)) <= MAX_LINES[name]


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


def needs_diffusion(path):
    """Baselines know nothing of the behavior model."""
    return path.stem.startswith(("dare", "edis"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_stand_alone(path):
    """A script may use the two packages, and neither another script nor any other file here."""
    used = {x for x in imported(path) if x in PACKAGES}
    assert used == (
        {"d4rl_gymnasium", "diffusion"} if needs_diffusion(path) else {"d4rl_gymnasium"}
    )
    folders = ["", "algorithms", "tests", "results", *PACKAGES]
    local = {p.stem for folder in folders for p in (REPOSITORY / folder).glob("[!.]*")}
    assert {"iql", "dare_iql", "cal_ql", "dare_cql", "tests", "algorithms"} <= local
    assert not set(imported(path)) & (local - set(PACKAGES) - set(sys.stdlib_module_names))
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    called = {ast.unparse(n.func) for n in calls}
    assert not called & {"__import__", "importlib.import_module", "sys.path.insert"}
