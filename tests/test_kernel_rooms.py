"""The rooms of opsd_kernels: which imports which. No file needs a file that needs it."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "opsd_kernels"

# What each room, or module beside them, imports of the others: only what is above it.
ARROWS: dict[str, set[str]] = {
    "_ops": set(),
    "divergence": set(),
    "products": set(),
    "scalars": {"divergence"},
    "description": {"divergence", "scalars"},
    "heads": {"_ops"},
    "problem": {"divergence", "heads"},
    "kernels": {"divergence", "heads", "problem", "products"},
    "gathered": {"kernels"},
    "debug": {"description", "problem"},
    "schedules": {
        "_ops",
        "debug",
        "divergence",
        "gathered",
        "heads",
        "kernels",
        "problem",
        "products",
    },
    "versions": set(),
    "checks": {
        "description",
        "divergence",
        "heads",
        "kernels",
        "problem",
        "scalars",
        "schedules",
        "versions",
    },
    "autograd": {"checks", "divergence", "problem", "schedules"},
    "rest": {
        "_ops",
        "autograd",
        "checks",
        "divergence",
        "gathered",
        "heads",
        "problem",
        "schedules",
    },
    "support": {"autograd", "divergence", "schedules"},
    "loss": {
        "autograd",
        "checks",
        "description",
        "divergence",
        "heads",
        "rest",
        "scalars",
        "support",
    },
    "sparse": {"checks", "divergence", "heads", "loss", "rest", "scalars", "support"},
    "replay": {"debug", "problem", "schedules"},
    "env": {"kernels", "schedules"},
    "top_k": {"checks", "divergence", "heads", "schedules"},
    "module": {"checks", "description", "heads", "loss", "scalars"},
    "head_check": {"heads"},
    # Of the package's mathematics nothing but names: the oracle is what proves it.
    "reference": {
        "checks",
        "description",
        "divergence",
        "heads",
        "loss",
        "scalars",
        "sparse",
        "top_k",
    },
    "adapting": {"scalars"},
    "trl": {"adapting", "checks", "head_check", "heads", "loss", "sparse", "top_k"},
    "verl": {"adapting", "heads", "loss", "top_k"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports, wherever in the file."""
    path = FILES[module]
    package = path.parent.relative_to(ROOT).parts
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            assert node.level or base[0] != "opsd_kernels", f"{path}: imports here are relative"
            name = ".".join(base)
            of_names = {f"{name}.{alias.name}" for alias in node.names}
            # A package that a submodule is imported from counts only for other names of it.
            found |= of_names if of_names <= FILES.keys() else of_names | {name}
    return found & FILES.keys() - {module}


GRAPH = {module: imported(module) for module in FILES}


def test_rooms_import_one_way():
    above = set[str]()
    for room, arrows in ARROWS.items():
        assert arrows <= above, f"{room} imports what is not above it"
        above.add(room)
    found: dict[str, set[str]] = {}
    for module in FILES.keys() - {"opsd_kernels"}:
        room = module.split(".")[1]
        rooms = {other.split(".")[1] for other in GRAPH[module] - {"opsd_kernels"}}
        found.setdefault(room, set()).update(rooms - {room})
    assert found == ARROWS
    oracle = FILES["opsd_kernels.reference"].read_text(encoding="utf-8")
    assert re.findall(r"divergence import (.*)|import divergence", oracle) == ["Family"]


def test_no_file_needs_one_that_needs_it():
    list(TopologicalSorter(GRAPH).static_order())  # raises a CycleError
