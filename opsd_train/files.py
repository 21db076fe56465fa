"""Files that are there whole, or not; files with a JSON object a line, which are added to; and
config files."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml


def write_through(path: Path, data: bytes) -> None:
    """Write a file, and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, text: str) -> None:
    """Write a file which at any instant is there whole, the old or the new one."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    write_through(unfinished, text.encode())
    unfinished.replace(path)


def as_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add lines to a file, and wait until they are on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(as_lines(rows))
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file's lines; none if there is no file. A last line that was cut short, as
    by a kill, is left out.

    Raises:
        ValueError: another line is no JSON object.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith("\n"):
                yield _object(line, f"{path}, line {number}", remedy="; remove the line")


def remove_cut_line(path: Path) -> None:
    """Remove a last line without its end, before others are added."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file holds; an empty one if there is no file.

    Raises:
        ValueError: it holds something else.
    """
    return _object(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}


def _object(text: str, place: str, remedy: str = "") -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error}){remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be an object, got {type(value).__name__}{remedy}")
    return value


class UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice; YAML's own loader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = key.value, key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if name in seen:
                raise ValueError(f"{name} is there twice, in lines {seen[name]} and {line}")
            seen[name] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a config file.

    Raises:
        OSError: it cannot be read. ValueError: it is not a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: must be text in UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold `key: value` lines, got {type(values).__name__}")
    return values
