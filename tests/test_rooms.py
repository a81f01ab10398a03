"""Imports run one way, by folder: nothing lower imports anything higher."""

import ast
from pathlib import Path

from tests.conftest import ROOT

# From the ground up; what shares a line is one room.
ROOMS = [
    "util.runtime",
    "data",
    "backbone",
    "util.evaluation",
    "util.storage",
    "util.audit",
    "methods",
    "util.report",
    "util.cli",
    "util.training",
    "train_pretrain train_forget test",
    "scripts",
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms.split()}


def floor_of(module: str) -> int | None:
    return next((floor for room, floor in FLOOR.items() if f"{module}.".startswith(f"{room}.")), None)


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_one_way():
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*.py") if not {".venv", "tests", "exps"} & {*path.parts}]
    upwards = []
    for path in files:
        here = floor_of(".".join(path.with_suffix("").parts))
        upwards += [f"{path} imports {name}" for name in imported(ROOT / path) if (floor_of(name) or 0) > (here or 0)]
    assert len(files) > 50
    assert not upwards
