"""What `make gpu` left in the folders of benchmarks/results."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib import report


@dataclass(frozen=True)
class Gpu:
    """A folder that `make gpu` wrote."""

    folder: Path

    @property
    def hardware(self) -> str:
        """Hardware, driver and versions, on one line."""
        return (self.folder / "hardware.txt").read_text().strip()

    @property
    def name(self) -> str:
        return self.hardware.partition(", driver")[0].partition(" x ")[2]

    @property
    def versions(self) -> str:
        return versions(self.hardware, "torch", "triton")

    @property
    def ended(self) -> str:
        """How each step ended; empty if none has."""
        path = self.folder / "summary.txt"
        return (path.read_text() if path.exists() else "").partition("\n")[2].rstrip()

    @property
    def tests(self) -> str:
        """What became of the tests."""
        step = re.search(r"^tests .*\n((?: .*\n?)*)", self.ended, re.MULTILINE)
        if step is None:
            return "neither"
        outcomes = [line.split(maxsplit=1)[1] for line in step[1].splitlines()]
        if all(outcome == "ok" or outcome.startswith("ok;") for outcome in outcomes):
            return "tested"
        passed, failed = (
            sum(int(n) for n in re.findall(rf"(\d+) {verdict}", step[1]))
            for verdict in ("passed", "failed")
        )
        return f"{passed} tests passed, {failed} failed; not all ran"

    def csv(self, name: str) -> Path | None:
        path = self.folder / f"{name}.csv"
        return path if path.exists() else None

    def rows(self, name: str, kind: type) -> list[Any]:
        """The rows of a csv; none if it is not there."""
        path = self.csv(name)
        return [] if path is None else report.read(path, kind)[1]


def gpus(results: Path) -> list[Gpu]:
    return [Gpu(path.parent) for path in sorted(results.glob("*/hardware.txt"))]


def versions(setting: str, *packages: str) -> str:
    """The versions of some packages, out of a line that `report.machine` wrote."""
    known = re.findall(rf"\b({'|'.join(packages)}) ([^,;\s]+)", setting)
    return ", ".join(f"{package} {version}" for package, version in known)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
