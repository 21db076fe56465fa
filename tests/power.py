"""Does the fast suite find what the whole suite finds? `make test-power`

    python tests/power.py [PART_OF_A_FILE_NAME ...] [--every N] [--jobs 2]

One fault of faults.py after the other is planted in a copy of this tree, and the tests that reach
its file run there until one fails: those of `make test`, and if none of them does those of `make
test-slow`. What fails then has to pass without the fault, or it would prove nothing. The script
ends with 1 unless the fast suite finds all that the whole suite finds.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?|\S+\.py)(?: - |$)", re.MULTILINE)


@dataclass(frozen=True)
class Found:
    fault: Fault
    by: str | None  # "fast", "slow", or None
    test: str
    seconds: float


def main() -> int:
    options = parse()
    faults = [f for f in FAULTS if any(part in f.file for part in options.parts or [""])]
    faults = faults[:: options.every]
    for fault in faults:
        check(fault)
    with tempfile.TemporaryDirectory() as folder:
        copies: Queue[Path] = Queue()
        for i in range(options.jobs):
            copies.put(copy_tree(Path(folder) / str(i)))
        with ThreadPoolExecutor(options.jobs) as pool:
            results = []
            for found in pool.map(lambda fault: plant(fault, copies), faults):
                results.append(found)
                print(line(found), flush=True)
    by_fast = sum(found.by == "fast" for found in results)
    by_slow = sum(found.by == "slow" for found in results)
    print(
        f"{len(results)} faults: {by_fast} found by the fast suite, "
        f"{by_fast + by_slow} by the whole suite"
    )
    return int(by_slow > 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="faults of files whose names contain one of these")
    parser.add_argument("--every", type=int, default=1, help="each n-th of them alone")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    return parser.parse_args()


def check(fault: Fault) -> None:
    """A fault can be planted: its text is there once, and so are its tests.

    Raises:
        ValueError: it cannot.
    """
    count = (ROOT / fault.file).read_text().count(fault.old)
    if count != 1:
        raise ValueError(f"{fault.file} has {fault.old!r} {count} times, not once: see faults.py")
    if fault.old == fault.new:
        raise ValueError(f"the fault in {fault.file} is none: {fault.old!r}")
    for path in paths_of(fault):
        if not (ROOT / path).exists():
            raise ValueError(f"{path}, which is to reach {fault.file}, is not there")


def paths_of(fault: Fault) -> list[str]:
    return [f"tests/test_{name}.py" for name in dict.fromkeys(fault.tests.split())]


def copy_tree(to: Path) -> Path:
    """What git tracks, or would."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def plant(fault: Fault, copies: "Queue[Path]") -> Found:
    """Plant a fault in a free copy, see which tests find it, and mend it again."""
    copy, start = copies.get(), time.monotonic()
    path = copy / fault.file
    text = path.read_text()
    found = Found(fault, None, "", 0)
    try:
        for suite, marked in (("fast", "not slow"), ("slow", "slow")):
            path.write_text(text.replace(fault.old, fault.new))
            test = first_failure(copy, marked, paths_of(fault))
            path.write_text(text)
            if test is not None:
                if (of_none := first_failure(copy, marked, [test])) is not None:
                    raise RuntimeError(f"{of_none} fails without the fault in {fault.file} too")
                found = Found(fault, suite, test, time.monotonic() - start)
                break
        else:
            found = Found(fault, None, "", time.monotonic() - start)
    finally:
        path.write_text(text)
        copies.put(copy)
    return found


def first_failure(copy: Path, marked: str, tests: list[str]) -> str | None:
    """The name of the first test that fails in a copy, if one does."""
    chosen = f"{marked} and not vllm and not swift and not verl and not dist"
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", chosen]
    result = subprocess.run(
        [sys.executable, "-B", "-m", "pytest", *options, *tests],
        cwd=copy,
        env=environment(copy),
        capture_output=True,
        text=True,
    )
    if result.returncode in (0, 5):  # all pass, or none is of this suite
        return None
    if failed := FAILED.search(result.stdout):
        return failed[1]
    raise RuntimeError(result.stdout[-3000:] + result.stderr[-3000:])


def environment(copy: Path) -> dict[str, str]:
    """The copy's packages, whichever are installed."""
    return os.environ | {"PYTHONPATH": str(copy)}


def line(found: Found) -> str:
    by = {None: "NOT FOUND", "fast": "found", "slow": "FOUND BY THE SLOW ALONE"}[found.by]
    return f"{by:10} {found.seconds:5.0f} s  {found.fault.file}: {found.fault.new}  {found.test}"


if __name__ == "__main__":
    sys.exit(main())
