"""Who knows CORL's files finds their names here, in their order."""

import ast
import json
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CORL = json.loads((REPOSITORY / "tests" / "data" / "corl_names.json").read_text())


def top_level(script):
    """Classes, functions and constants at the top of a script, and its settings, in order."""
    names, settings = [], []
    for node in ast.parse((REPOSITORY / "algorithms" / f"{script}.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets]
        if getattr(node, "name", None) == "TrainConfig":
            settings = [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)]
    return {"top_level": names, "settings": settings}


@pytest.mark.parametrize(
    "script, kind, least",
    [
        ("iql", "top_level", 17),
        ("iql", "settings", 19),
        ("cal_ql", "top_level", 12),
        ("cal_ql", "settings", 30),
    ],
)
def test_corls_names_in_corls_order(script, kind, least):
    ours, corls = top_level(script)[kind], CORL[script][kind]
    kept = [name for name in ours if name in corls]
    assert len(kept) >= least
    assert kept == [name for name in corls if name in ours]
