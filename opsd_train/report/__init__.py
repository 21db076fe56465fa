"""The report: one page that shows what runs did, and needs nothing beside itself.

It is page.html with page.css, page.js and what the files of run folders hold. It is written at the
end of a run, by run/, and by `python -m opsd_train.report`. Nothing here computes what it shows:
figures are those of metrics.jsonl, tokens.jsonl and evaluation/.

Whatever a model has written stays text: it is JSON in a block that is not run, with < escaped, and
the script makes text nodes of it. Should that fail, the policy lets no script run but the one
whose hash it names, and nothing be fetched.
"""

import base64
import dataclasses
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsd_train.config import options
from opsd_train.files import read_json, read_lines, read_yaml, replace_file

HERE = Path(__file__).parent


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Write a page on one run, or on several beside each other.

    Raises:
        OSError, ValueError: as `read_run`, or the page cannot be written.
    """
    names = short_names(folders)
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    style, script = (part(f"page.{kind}") for kind in ("css", "js"))
    page = part("page.html")
    for mark, text in {
        "<!-- policy -->": (
            f"default-src 'none'; script-src '{hash_of(script)}'; style-src '{hash_of(style)}'; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        "<!-- title -->": html.escape(" · ".join(names)),
        "<!-- style -->": style,
        "<!-- script -->": script,
        # Last: what stands in it is not looked at.
        "<!-- data -->": as_data({"runs": runs}),
    }.items():
        page = page.replace(mark, text)
    replace_file(output, page)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or whole paths where two have the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(f.resolve()) for f in folders]


def as_data(value: object) -> str:
    """JSON that no element can end or begin in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def hash_of(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def part(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


STEPS_SHOWN = 12  # steps with rollouts in a page, at equal distances


def read_run(folder: Path, name: str) -> dict[str, Any]:
    """Plain values, for JSON.

    Raises:
        OSError: it is no run folder.
        ValueError: a file in it is not what a run writes; the message says where.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml")
    config, text = read_yaml(path), path.read_text(encoding="utf-8")
    return {
        "name": name,
        "divergence": text.splitlines()[0].lstrip("# ") if text.startswith("#") else "",
        "config": config,
        "changed": [key for key, value in config.items() if value != defaults().get(key)],
        "metrics": list(read_lines(folder / "metrics.jsonl")),
        "rollouts": some_steps(list(read_lines(folder / "tokens.jsonl"))),
        "summary": read_json(folder / "summary.json"),
        "scores": read_json(folder / "evaluation" / "scores.json"),
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
