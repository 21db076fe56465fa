"""A page put together from its parts.

Whatever a model has written stays text: it is JSON in a block that is not run, with < escaped, and
the script makes text nodes of it. Should that fail, the policy lets no script run but the one
whose hash it names, and nothing be fetched.
"""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path

from opsd_train.report.reading import read_run

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
    unfinished = output.with_name(f"{output.name}.unfinished")
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(output)


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
