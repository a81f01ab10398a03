"""Imports run one way, by folder: nothing lower imports anything higher."""

import ast
from graphlib import TopologicalSorter
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


FILES = [path.relative_to(ROOT) for path in ROOT.rglob("*.py") if not {".venv", "tests", "exps"} & {*path.parts}]


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def test_imports_run_one_way():
    upwards = []
    for path in FILES:
        here = floor_of(module_of(path))
        upwards += [f"{path} imports {name}" for name in imported(ROOT / path) if (floor_of(name) or 0) > (here or 0)]
    assert len(FILES) > 50
    assert not upwards


def test_no_imports_run_in_a_circle():
    modules = {module_of(path): path for path in FILES}
    needed = {}
    for module, path in modules.items():
        names = {name if name in modules else name.rpartition(".")[0] for name in imported(ROOT / path)}
        needed[module] = (names & modules.keys()) - {module}
    assert {*TopologicalSorter(needed).static_order()} == modules.keys()  # raises CycleError


def test_files_and_functions_are_short():
    sizes = {path: len((ROOT / path).read_text().splitlines()) for path in FILES}
    assert not {path: size for path, size in sizes.items() if size > 250}
    nodes = [(path, node) for path in FILES for node in ast.walk(ast.parse((ROOT / path).read_text()))]
    functions = {(str(path), node.name): node for path, node in nodes if isinstance(node, ast.FunctionDef)}
    assert not [name for name, node in functions.items() if node.end_lineno - node.lineno >= 45]
