"""The rooms of opsd_train: which imports which, by which door, and what each says of itself."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "opsd_train"

# What each room, or module beside them, imports of the others: only what is above it.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "records": set(),
    "config": {"errors", "files"},
    "presets": {"errors", "files"},
    "data": {"config", "errors", "records"},
    "models": {"config"},
    "sampling": {"config", "data", "errors", "models", "records"},
    "opsd": {"config", "data", "models", "records", "sampling"},
    "grading": {"data", "errors", "records", "sampling"},
    "evaluation": set(),
    "report": {"config", "files"},
    "run": {
        *("config", "data", "errors", "files", "grading", "models", "opsd", "records"),
        *("report", "sampling"),
    },
    "demo": {"config", "data", "errors", "models", "records", "run"},
    "command_line": {"config", "errors", "presets", "run"},
    "evaluate": {
        *("command_line", "config", "data", "demo", "errors", "files", "grading", "models"),
        *("presets", "records", "report", "run", "sampling"),
    },
    "export": {"command_line", "models", "run"},
    "from_gguf": {"command_line", "models", "run"},
    "__main__": {"command_line", "demo", "run"},
}
ROOMS = [name for name in ARROWS if (PACKAGE / name).is_dir()]
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def place_of(path: Path) -> str:
    """The room that a file is in, or the module that it is."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def read(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> list[tuple[str, str]]:
    """Modules and what is imported from them ("" for the module itself), wherever in the file."""
    found = []
    for node in ast.walk(read(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def own_imports(path: Path) -> list[tuple[str, str, str]]:
    """Of this package: room, module and name."""
    found = [(m, name) for m, name in imports(path) if m.split(".")[0] == "opsd_train"]
    for module, name in found:
        assert module != "opsd_train", f"{path}: import {name} from opsd_train.{name}"
    return [(module.split(".")[1], module, name) for module, name in found]


def exported(room: str) -> set[str]:
    """The names at a room's door: those that it defines, and those of the room's files. It imports
    the latter as themselves: type checkers take them for exported only then."""
    names = set()
    for node in read(PACKAGE / room / "__init__.py").body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.add(ast.unparse(node.targets[0]))
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names if alias.name == alias.asname}
    return names


def test_imports_run_one_way():
    above: set[str] = set()
    for name, arrows in ARROWS.items():
        assert arrows <= above, f"{name} imports what is not above it"
        above.add(name)
    found: dict[str, set[str]] = {}
    for path in FILES:
        place = place_of(path)
        found.setdefault(place, set()).update({room for room, *_ in own_imports(path)} - {place})
    assert found == ARROWS


def test_no_file_waits_for_another_that_waits_for_it():
    """Within a room as well."""
    graph = {}
    for path in FILES:
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        graph[module.removesuffix(".__init__")] = {module for _, module, _ in own_imports(path)}
    order = list(TopologicalSorter(graph).static_order())  # raises a CycleError
    assert set(order) == set(graph), "an import of a module that is not there"


def test_a_room_is_entered_by_its_door():
    for path in FILES:
        for room, module, name in own_imports(path):
            if room == place_of(path) and path.name != "__main__.py":
                assert module != f"opsd_train.{room}", f"{path} goes through its own room's door"
            elif room in ROOMS:
                assert module == f"opsd_train.{room}", f"{path} does not go through a door"
                assert name in exported(room), f"{path}: {name} is not at the door of {room}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_door_says_what_lives_there_and_leads_there(room):
    path = PACKAGE / room / "__init__.py"
    first, _, rest = (ast.get_docstring(read(path)) or "").partition("\n\n")
    assert first.endswith(".")
    assert len(rest) > 80, "what lives there, and what does not"
    assert exported(room)


def test_every_file_says_what_it_holds():
    for path in FILES:
        assert ast.get_docstring(read(path)), path


def test_the_front_page_lists_what_there_is_from_the_top():
    text = ast.get_docstring(read(PACKAGE / "__init__.py")) or ""
    listed = re.findall(r"^(\w+(?:/|\.py)) {2,}\w", text, flags=re.MULTILINE)
    here = [f"{name}/" if name in ROOMS else f"{name}.py" for name in ARROWS]
    assert [*listed, "__main__.py"] == here


def test_no_room_knows_the_demo():
    for path in FILES:
        if place_of(path) in ROOMS:
            text = path.read_text(encoding="utf-8")
            # The preset that is run where none is named.
            assert text.count("small-world") == (place_of(path) == "presets"), path


def test_the_algorithm_knows_no_files_and_no_console():
    for path in (PACKAGE / "opsd").glob("*.py"):
        modules = {module.split(".")[0] for module, _ in imports(path)}
        assert not modules & {"json", "os", "pathlib", "rich", "safetensors", "shutil", "yaml"}
        calls = [node for node in ast.walk(read(path)) if isinstance(node, ast.Call)]
        assert not {"open", "print"} & {ast.unparse(call.func) for call in calls}


def test_the_former_name_of_a_room_still_imports():
    from opsd_train.evaluation.math_answers import said_dropped

    from opsd_train import grading
    from opsd_train.evaluation import MathGrader

    assert MathGrader is grading.MathGrader
    assert said_dropped.__doc__ == grading.said_dropped.__doc__
