"""Which code a result is of: its commit, and a digest of the kernels.

Both stand in the second line of every csv that `report.write` writes. A page compares the digest
with that of the kernels as they are, without git, so that it works in any copy of this tree.
"""

import ast
import io
import os
import re
import subprocess
import tokenize
from functools import cache
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of opsd_kernels: what neither time nor memory nor accuracy of a loss depends on.
OTHERS = re.compile(
    r"(adapting/|trl/|verl/|(.*/)?(__init__|reference|loss|module|checks|arguments|scalars|description|"
    r"head_of_model|known_models|head_check|_ops|debug|replay|env|versions|sparse|top_k|rest|"
    r"gathered)\.py)"
)
CHANGED = "the kernels have changed since"


def line() -> str:
    """The commit and the digest, for a line of a result."""
    return f"commit {commit()}, kernels {kernels_digest()}"


def described(of: str) -> str:
    """What a page says of a result with this `line`: its commit, and whether the kernels are still
    those that were measured; nothing of a result without such a line."""
    known = re.fullmatch(r"commit (.+), kernels (\w+)", of)
    if known is None:
        return ""
    return f"commit {known[1]}" + (f", {CHANGED}" if known[2] != kernels_digest() else "")


@cache
def commit() -> str:
    """The commit of this tree, and its date. OPSD_COMMIT names it where git does not, as in a
    copy."""
    if named := os.environ.get("OPSD_COMMIT"):
        return named
    # What is recorded changes while it is recorded.
    sources = ("--", ":/", ":(top,exclude)benchmarks/results")
    name = _git("log", "-1", "--format=%h of %cs")
    changes = _git("status", "--porcelain", "-uno", *sources)
    if not name:
        return "unknown"
    return f"{name} and changes" if changes else name


def _git(*arguments: str) -> str:
    try:
        told = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return told.stdout.strip()


@cache
def kernels_digest() -> str:
    """Of the kernels as they are."""
    folder = ROOT / "opsd_kernels"
    return digest({str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*.py")})


def digest(files: dict[str, str]) -> str:
    """Of the text of the files of opsd_kernels, by name: it stays the same when files are renamed,
    and when comments, docstrings, imports or spaces change."""
    hashes = sorted(
        sha256(_code(text).encode()).hexdigest()
        for name, text in files.items()
        if not OTHERS.match(name)
    )
    return sha256(" ".join(hashes).encode()).hexdigest()[:12]


def _code(text: str) -> str:
    """Without comments, docstrings, imports and spaces."""
    lines = [line.encode() for line in text.splitlines()]  # ast counts bytes
    for start, end in _removed(text):
        for number in range(start[0], end[0] + 1):
            kept = lines[number]
            first = start[1] if number == start[0] else 0
            last = end[1] if number == end[0] else len(kept)
            lines[number] = kept[:first] + b" " * (last - first) + kept[last:]
    return re.sub(r"\s+", "", b"\n".join(lines).decode())


Place = tuple[int, int]  # line and byte, both from 0


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _removed(text: str) -> list[tuple[Place, Place]]:
    found = []
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        parts: list[ast.stmt] = []
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            parts = node.body[:1]
        if isinstance(node, ast.ClassDef):  # docstrings of fields
            parts = [part for part in node.body if _is_string(part)]
        if isinstance(node, ast.Import | ast.ImportFrom):
            parts = [node]
        for part in parts:
            assert part.end_lineno is not None
            assert part.end_col_offset is not None
            end = part.end_lineno - 1, part.end_col_offset
            found.append(((part.lineno - 1, part.col_offset), end))
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:  # up to the end of its line
            row, column = token.start[0] - 1, token.start[1]
            of_line = [len(part.encode()) for part in (lines[row][:column], lines[row])]
            found.append(((row, of_line[0]), (row, of_line[1])))
    return found
