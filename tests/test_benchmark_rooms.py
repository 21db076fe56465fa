"""The rooms of benchmarks/: which imports which. A file imports only what does not need it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [path for path in sorted((ROOT / "benchmarks").rglob("*.py")) if path.name != "__init__.py"]

# What each room imports of the others; "" are the benchmarks on the front page.
ARROWS: dict[str, set[str]] = {
    "lib": set(),
    "": {"lib"},
    "gpu": {"", "lib"},
    "history": {"", "lib"},
    "more": {"", "lib"},
    "token_efficiency": {"", "lib"},
    "real_model": {"lib", "token_efficiency"},
    "pages": {"", "gpu", "history", "lib", "more", "real_model", "token_efficiency"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    """The room that a module is in; "" for the benchmarks on the front page."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else ""


def imported(path: Path) -> set[str]:
    """Modules of benchmarks/ that a file imports, wherever in the file."""
    known = {module_of(file) for file in FILES}
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & known


# Without a module that is run by its name, and imports itself by it.
GRAPH = {module_of(path): imported(path) - {module_of(path)} for path in FILES}


def test_rooms_import_one_way():
    above = set[str]()
    for room, arrows in ARROWS.items():
        assert arrows <= above, f"{room} imports what is not above it"
        above.add(room)
    found: dict[str, set[str]] = {}
    for module, others in GRAPH.items():
        room = room_of(module)
        found.setdefault(room, set()).update({room_of(other) for other in others} - {room})
    assert found == ARROWS


def test_no_file_waits_for_another_that_waits_for_it():
    list(TopologicalSorter(GRAPH).static_order())  # raises a CycleError
