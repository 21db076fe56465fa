"""What a report shows of a run, from the files of its folder."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from opsd_train.config import options

STEPS_SHOWN = 12  # of which rollouts are in a page, as many before the last as between the others


def read_run(folder: Path, name: str) -> dict[str, Any]:
    """Plain values, for JSON.

    Raises:
        OSError: it is no run folder.
        ValueError: a file in it is not what a run writes; the message says where.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml")
    text = path.read_text(encoding="utf-8")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must hold `key: value` lines")
    return {
        "name": name,
        "divergence": text.splitlines()[0].lstrip("# ") if text.startswith("#") else "",
        "config": config,
        "changed": [key for key, value in config.items() if value != defaults().get(key)],
        "metrics": list(rows_of(folder / "metrics.jsonl")),
        "rollouts": some_steps(list(rows_of(folder / "tokens.jsonl"))),
        "summary": json_of(folder / "summary.json"),
        "scores": json_of(folder / "evaluation" / "scores.json"),
    }


def defaults() -> dict[str, Any]:
    """Of the options that have one, as config.yaml would hold them."""
    values = {f.name: f.default for f in options()}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value is not dataclasses.MISSING
    }


def some_steps(rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a few steps, the first and the last among them: a page is to open at once."""
    steps = sorted({r["step"] for r in rollouts})
    if len(steps) > STEPS_SHOWN:
        last = len(steps) - 1
        steps = [steps[i * last // (STEPS_SHOWN - 1)] for i in range(STEPS_SHOWN)]
    return [r for r in rollouts if r["step"] in steps]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, none if there is no file. One that a kill cut short is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith("\n"):
                yield parsed(line, f"{path}, line {number}")


def json_of(path: Path) -> dict[str, Any]:
    return parsed(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}


def parsed(text: str, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: must be an object, got {type(value).__name__}")
    return value
