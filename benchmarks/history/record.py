"""Append the row of a release to releases.csv.

    make test ARGS=--junitxml=report.xml
    python benchmarks/history/record.py --tests report.xml

The figures are those of the recorded files, of the report of the tests, and launches that are
counted here. A release has one row: a second is refused. `--commit COMMIT` makes the row of a past
release from the files recorded in that commit, without launches.
"""

import argparse
import csv
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import memory
from benchmarks.lib import report, sources
from benchmarks.lib.allocations import fake_device
from benchmarks.lib.gpu_work import recorded_launches
from benchmarks.lib.peers import METHODS
from benchmarks.lib.shapes import MODELS

RELEASES = Path(__file__).with_name("releases.csv")
SPEED, MEMORY, RESOURCES = (
    f"benchmarks/results/{name}.csv" for name in ("speed", "memory", "resources")
)
LOGIT_FREE, ROW_WORKSPACE = "ours, logit-free", "ours, row workspace"
# What the figures are of: docs/benchmarks.md says it beside the table.
TIMED = {"N": "1024", "D": "512", "V": "32768", "method": ROW_WORKSPACE}
MODEL, N = "qwen3-8b", 16384
COUNTED = {"device": "counted", "model": MODEL, "N": str(N)}
COMPILED = {"arch": "sm_90", "dtype": "bfloat16", "divergence": "JSD"}
NAN = float("nan")

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Release:
    """A row. What is not known is NaN."""

    version: str
    commit: str
    floors_float32: float  # time on a CPU, as a multiple of three products
    floors_bfloat16: float
    floors_of: str  # the commit that was timed
    logit_free_mib: float
    row_workspace_mib: float
    memory_of: str  # the commit that was counted
    instructions: float  # for an entry of the vocabulary
    logit_free_launches: float = NAN
    row_workspace_launches: float = NAN
    tests: float = NAN  # that passed
    tests_s: float = NAN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tests", type=Path, help="a report of pytest --junitxml")
    parser.add_argument("--commit", help="of a past release")
    args = parser.parse_args()
    try:
        row = release(args.commit, args.tests)
        append(RELEASES, row)
    except ValueError as error:
        sys.exit(str(error))
    print("\n".join(f"{name}: {value}" for name, value in asdict(row).items()))


def release(commit: str | None = None, tests: Path | None = None) -> Release:
    """The row of the code as it is, or as it was in a commit."""
    speed, speed_of = recorded(SPEED, commit)
    counted, counted_of = recorded(MEMORY, commit)
    compiled, _ = recorded(RESOURCES, commit)
    floors_float32, floors_bfloat16 = (
        figure(speed, "floors", **TIMED, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    logit_free_mib, row_workspace_mib = (
        figure(counted, "counted_mib", **COUNTED, method=method)
        for method in (LOGIT_FREE, ROW_WORKSPACE)
    )
    launches = [NAN, NAN] if commit else [count_launches(m) for m in (LOGIT_FREE, ROW_WORKSPACE)]
    return Release(
        version(text_of("opsd_kernels/__init__.py", commit)),
        last_commit(commit) if commit else sources.commit(),
        floors_float32,
        floors_bfloat16,
        speed_of,
        logit_free_mib,
        row_workspace_mib,
        counted_of,
        sum(figure(compiled, "instructions", **COMPILED, kernel=k) for k in ("lse", "pair")),
        *launches,
        *(read_tests(tests) if tests else ()),
    )


def recorded(name: str, commit: str | None) -> tuple[Rows, str]:
    """The rows of a recorded file, and the commit of the code that they are of: as the file says,
    or else the one in which the file was recorded."""
    lines = text_of(name, commit).splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
    said = [line.removeprefix("# commit ") for line in lines[:2] if line.startswith("# commit ")]
    return rows, said[0].partition(", kernels ")[0] if said else last_commit(commit, name)


def figure(rows: Rows, column: str, **wanted: str) -> float:
    """Of the one row that has these values."""
    found = [row[column] for row in rows if all(row[k] == v for k, v in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{column} of {wanted} is in {len(found)} rows; it must be in one")
    return float(found[0])


def count_launches(method: str) -> float:
    """Of kernels and operations, for one loss and its gradient on a GPU."""
    D, V = MODELS[MODEL]
    with fake_device("cuda"):
        h_S = torch.empty(N, D, dtype=torch.bfloat16)
        h_T, W = torch.empty_like(h_S), torch.empty(V, D, dtype=h_S.dtype)
        with recorded_launches() as names:
            memory.forward_and_backward(METHODS[method], h_S, h_T, W)
    return float(len(names))


def read_tests(path: Path) -> tuple[float, float]:
    """How many tests passed, and the seconds of all.

    Raises:
        ValueError: some failed.
    """
    suite = next(ElementTree.parse(path).iter("testsuite"))
    ran, skipped, *failed = (
        int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors")
    )
    if any(failed):
        raise ValueError(f"{path}: {sum(failed)} tests failed; a release has none")
    return float(ran - skipped), float(suite.attrib["time"])


def version(text: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith("__version__ = "))
    return line.split('"')[1]


def text_of(name: str, commit: str | None) -> str:
    """Of a file as it is, or as it was in a commit."""
    return git("show", f"{commit}:{name}") if commit else (sources.ROOT / name).read_text()


def last_commit(commit: str | None, *names: str) -> str:
    """Up to a commit, that which changed a file of these names; as `sources.commit` says it."""
    return git("log", "-1", "--format=%h of %cs", commit or "HEAD", "--", *names).strip()


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=sources.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def append(path: Path, row: Release) -> None:
    """To a csv of releases, which is there or not.

    Raises:
        ValueError: the csv has a row of that version.
    """
    before = read(path)
    if any(other.version == row.version for other in before):
        raise ValueError(f"{path} has a row of {row.version}; a release has one")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Release)])
        if not before:
            writer.writeheader()
        writer.writerow(asdict(row))


def read(path: Path) -> list[Release]:
    """The rows of a csv of releases; none if it is not there."""
    if not path.exists():
        return []
    kinds: dict[str, Callable] = {field.name: field.type for field in fields(Release)}  # type: ignore[misc]
    with path.open(newline="") as file:
        return [
            Release(**{name: kinds[name](value) for name, value in line.items()})
            for line in csv.DictReader(file)
        ]


def summary(path: Path = RELEASES) -> str:
    """A line for each release, the newest first, as Markdown."""
    head = ["release", "time", "memory", "launches", "instructions an entry", "tests"]
    body = []
    for row in reversed(read(path)):
        cells = [
            f"{row.version} ({row.commit})",
            f"{row.floors_float32:.2f}, {row.floors_bfloat16:.2f} ({row.floors_of})",
            f"{row.logit_free_mib:,.0f} MiB, {row.row_workspace_mib:,.0f} MiB ({row.memory_of})",
            f"{row.logit_free_launches:,.0f}, {row.row_workspace_launches:,.0f}",
            f"{row.instructions:.1f}",
            f"{row.tests:,.0f} in {row.tests_s / 60:.1f} minutes",
        ]
        body.append(["–" if "nan" in cell else cell for cell in cells])
    return report.table(head, body)


if __name__ == "__main__":
    main()
