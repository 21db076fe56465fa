"""What results have in common: where they are from, and how they are kept."""

import csv
import platform
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import sources

# Why a method has no figures.
NOT_INSTALLED = "not installed"
DOES_NOT_FIT = "does not fit"  # it takes more than there is, and was not tried

# What such cards have, as nvidia-smi tells it.
GPU_GIB = {"24 GB": 24.0, "80 GB": 79.6, "141 GB": 140.4}
PEERS = ("trl", "liger-kernel", "orda-kernel", "cut-cross-entropy")


def machine(device: torch.device) -> str:
    """Hardware, driver and versions, on one line."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    for peer in PEERS:
        with suppress(PackageNotFoundError):
            versions += f", {peer} {version(peer)}"
    if device.type == "cuda":
        import triton

        driver = Path("/proc/driver/nvidia/version")
        words = driver.read_text().split() if driver.exists() else []
        number = next((word for word in words if word[0].isdigit() and "." in word), "unknown")
        name = torch.cuda.get_device_name(device)
        return f"{name}, driver {number}, {versions}, triton {triton.__version__}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads, {versions}"


def write(path: Path, setting: str, rows: list[Any]) -> None:
    """A csv of dataclasses. Its first lines are comments: the setting, and which code the rows are
    of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(f"# {setting}\n# {sources.line()}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


class Results:
    """Rows of a benchmark as they come: shown, and kept in the csv, should time be up.

    Args:
        name: of the files.
        setting: see `write`; it may grow.
        folder: of the files, or None to keep nothing.
        show: prints a row.
        kind: of the rows, to go on with those that the csv holds already; None to begin anew.
    """

    def __init__(
        self,
        name: str,
        setting: str,
        folder: Path | None,
        show: Callable[[Any], None],
        kind: type | None = None,
    ) -> None:
        self.path = None if folder is None else folder / f"{name}.csv"
        self.setting, self.show, self.rows = setting, show, list[Any]()
        if kind is not None and self.path is not None and self.path.exists():
            self.setting = _read(self.path)[0][0]
            self.rows = read(self.path, kind)[1]

    def holds(self, **values: Any) -> bool:
        """Whether there is a row with these values."""
        return any(
            all(getattr(row, name) == value for name, value in values.items()) for row in self.rows
        )

    def add(self, row: Any) -> None:
        """A method that is not installed is shown, and not kept."""
        self.show(row)
        if getattr(row, "failure", "") == NOT_INSTALLED:
            return
        self.rows.append(row)
        if self.path is not None:
            write(self.path, self.setting, self.rows)

    def finish(self, summary: Callable[[Path], str], plot: Callable[[Path, Path], None]) -> None:
        """Print what `summary` makes of the csv, and write it and the picture beside the csv;
        nothing without a folder, or without rows."""
        if self.path is None or not self.rows:
            return
        text = summary(self.path)
        self.path.with_suffix(".md").write_text(text + "\n")
        plot(self.path, self.path.with_suffix(".png"))
        print(f"\n{text}")


def read(path: Path, kind: type) -> tuple[str, list[Any]]:
    """The setting of what `write` wrote, with what `source` says, and its rows."""
    kinds: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    comments, lines = _read(path)
    rows = [
        kind(**{name: kinds[name](value) for name, value in line.items()})
        for line in csv.DictReader(lines)
    ]
    return "; ".join(filter(None, [comments[0], source(path)])), rows


def source(path: Path) -> str:
    """Which commit the rows of a csv are of, and whether the kernels have changed since; empty if
    it does not say."""
    comments, _ = _read(path)
    return sources.described(comments[1]) if len(comments) > 1 else ""


def _read(path: Path) -> tuple[list[str], list[str]]:
    """The comments of a csv, and its other lines."""
    lines = path.read_text().splitlines()
    comments = [line for line in lines[:2] if line.startswith("# ")]
    return [line.removeprefix("# ").strip() for line in comments], lines[len(comments) :]


def table(head: list[str], rows: list[list[str]]) -> str:
    """As Markdown; rows of ours in bold."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cells in rows:
        strong = "**" if cells[0].startswith("ours") else ""
        lines.append("| " + " | ".join(f"{strong}{c}{strong}" for c in cells) + " |")
    return "\n".join(lines)


def by_method(
    corner: str, rows: list[Any], column: Callable[[Any], str], cell: Callable[[Any], str]
) -> str:
    """A line for each method and a column for each of what `column` names, in their order, as
    Markdown; what was not reached is a dash."""
    columns = dict.fromkeys(column(row) for row in rows)
    cells = {(row.method, column(row)): cell(row) for row in rows}
    body = [
        [method, *(cells.get((method, name), "–") for name in columns)]
        for method in dict.fromkeys(row.method for row in rows)
    ]
    return table([corner, *columns], body)


def not_recorded(rows: list[Any], methods: Iterable[str]) -> list[str]:
    """A line that names the methods that have no row; none if there are none."""
    missing = [method for method in methods if method not in {row.method for row in rows}]
    return [f"Not recorded: {'; '.join(missing)}."] if missing else []


def is_result(row: Any) -> bool:
    """Whether a row holds figures, or that memory did not suffice, which is a result too."""
    return row.failure in ("", "out of memory", DOES_NOT_FIT)


def complete(rows: list[Any]) -> list[Any]:
    """The rows of the methods that have a result wherever another has one."""
    results = Counter(row.method for row in rows if is_result(row))
    most = max(results.values(), default=0)
    return [row for row in rows if results[row.method] == most > 0]


def style(axis: Any, *, log: bool = False) -> None:
    """How every picture's axes look."""
    if log:
        from matplotlib.ticker import LogLocator, NullFormatter

        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def caption(figure: Any, setting: str) -> None:
    """Below a picture: where its figures are from."""
    characters = int(figure.get_figwidth() * 26)  # of this size, on a line
    lines = textwrap.fill(setting, characters)
    figure.supxlabel(lines, fontsize=5, color="#777777", x=0.995, ha="right")


def memory_lines(axis: Any, x: float) -> None:
    """The memories that users have, across a picture in GiB; their names begin at x."""
    for name, gib in GPU_GIB.items():
        axis.axhline(gib, color="#999999", linewidth=0.8, linestyle="--")
        axis.text(x, gib, name, fontsize=7, color="#666666", va="bottom")
