"""Compile what a run will launch, in parallel, into Triton's cache, where the run then finds it.

    python benchmarks/gpu/compile.py FOLDER [--jobs 15] [--seconds 150] [--script ...]

A script, or else everything that `make gpu` runs, is run once without launching anything (see
launches.py), and each kernel that it asks for is compiled as soon as it is known, in a process of
its own that is ended after --each seconds: one kernel that takes minutes delays nothing else. What
is needed first goes first, and of that the kernels that took long before, by
benchmarks/results/compile.csv. compile.csv in the folder says of each what it took, and what it
takes of a multiprocessor, and is written as they come.

With --arch no GPU is needed: kernels are compiled for one that is not there, as far as what asks
for them runs on a CPU.
"""

import argparse
import importlib
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are imported
sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu import launches
from benchmarks.gpu import run as gpu
from benchmarks.gpu.launches import Launch
from benchmarks.lib import report
from benchmarks.lib.hashes import settle_hashes

# Kernels of tests are compiled too; before this folder, whose modules have names of theirs.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "benchmarks" / "results" / "compile.csv"
EACH = 40.0  # seconds


@dataclass(frozen=True)
class Compiled:
    kernel: str  # module:name
    digest: str  # see `Launch`
    seconds: float  # of a processor
    registers: int = 0  # a thread
    spilled: int = 0  # bytes a thread
    shared: int = 0  # bytes a program
    failure: str = ""


class Pool:
    """Compiles launches in at most `jobs` processes at a time, each in one that ends with it."""

    def __init__(
        self, jobs: int, each: float = EACH, expected: dict[str, float] | None = None
    ) -> None:
        self.jobs, self.each = jobs, each
        self.expected = expected or {}  # seconds, by kernel
        self.known: set[str] = set()
        self.waiting: list[tuple[int, float, int, Launch]] = []  # a heap
        self.running: dict[Connection, tuple[Any, Launch, float]] = {}
        self.done: list[Compiled] = []
        self._context = multiprocessing.get_context("fork")  # what is imported here is there too

    def add(self, found: Iterable[tuple[int, Launch]], most: int | None = None) -> None:
        """Those that are new, each with when it is needed; `most` of them all together."""
        for when, launch in found:
            if launch.digest in self.known or len(self.known) == most:
                continue
            self.known.add(launch.digest)
            with suppress(ImportError):  # which then is the failure of its own process
                importlib.import_module(launch.kernel.partition(":")[0])
            longest = -self.expected.get(launch.kernel, 0.0)
            heappush(self.waiting, (when, longest, len(self.known), launch))

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def step(self, seconds: float = 0.2) -> list[Compiled]:
        """Start what there is room for, and return what ended within some seconds."""
        while self.waiting and len(self.running) < self.jobs:
            *_, launch = heappop(self.waiting)
            ours, theirs = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_compile, args=(launch, theirs))
            process.start()
            theirs.close()
            self.running[ours] = process, launch, time.monotonic()
        if not self.running:
            time.sleep(seconds)
            return []
        ended = []
        for connection in wait(list(self.running), seconds):
            assert isinstance(connection, Connection)
            process, launch, start = self.running.pop(connection)
            try:
                ended.append(connection.recv())
            except EOFError:
                ended.append(_failed(launch, start, "its process ended"))
            process.join()
        for connection, (_process, launch, start) in list(self.running.items()):
            if time.monotonic() - start > self.each:
                self._end(connection)
                ended.append(_failed(launch, start, f"more than {self.each:.0f} s"))
        self.done += ended
        return ended

    def stop(self) -> None:
        """End what still runs."""
        for connection in list(self.running):
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        process, _launch, _start = self.running.pop(connection)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with the assembler that it may wait for
        with suppress(ProcessLookupError):
            process.kill()  # where it had not come to lead a group
        process.join()


def _failed(launch: Launch, start: float, why: str) -> Compiled:
    return Compiled(launch.kernel, launch.digest, time.monotonic() - start, failure=why)


def _compile(launch: Launch, told: Connection) -> None:
    """In a process of its own."""
    os.setpgid(0, 0)
    start = time.monotonic()
    try:
        from triton import knobs, runtime
        from triton.backends.compiler import GPUTarget

        from benchmarks.gpu.resources import registers_of

        knobs.compilation.listener = None  # what is compiled here was missed by nobody
        settle_hashes()
        runtime.driver.set_active(launches.NoDriver(GPUTarget(*launch.target)))
        kernel, args, kwargs = launch.loads()
        compiled = kernel.warmup(*args, grid=(1,), **kwargs)
        times = os.times()  # the assembler's are those of a child
        registers, spilled, _matrix = registers_of(compiled)
        result = Compiled(
            launch.kernel,
            launch.digest,
            sum(times[:4]),
            registers,
            spilled,
            compiled.metadata.shared,
        )
    except Exception as error:
        why = str(error).strip().partition("\n")[0][:80] or type(error).__name__
        result = _failed(launch, start, why)
    told.send(result)


def expected_seconds(path: Path) -> dict[str, float]:
    """By kernel, the mean of what an earlier run took."""
    if not path.exists():
        return {}
    seconds: dict[str, list[float]] = {}
    for row in report.read(path, Compiled)[1]:
        seconds.setdefault(row.kernel, []).append(row.seconds)
    return {kernel: statistics.mean(times) for kernel, times in seconds.items()}


class Follower:
    """The launches that others write to files, as they come; with each when it is needed."""

    def __init__(self, paths: dict[Path, int]) -> None:
        self._when, self._read = paths, dict.fromkeys(paths, 0)

    def __call__(self) -> list[tuple[int, Launch]]:
        found = []
        for path, when in self._when.items():
            if path.exists():
                with path.open() as file:
                    file.seek(self._read[path])
                    whole = file.read().rpartition("\n")[0]  # the last line may be half there
                self._read[path] += len(whole)
                found += [(when, launches.read(line)) for line in whole.splitlines() if line]
        return found


def compile_launches(
    commands: dict[str, tuple[int, list[str]]],
    folder: Path,
    pool: Pool,
    seconds: float,
    arch: str | None = None,
    most: int | None = None,
) -> tuple[float, list[str]]:
    """Run commands without launching what they ask for, and compile that, for some seconds at most.

    Args:
        commands: by name, with when they are needed.
        folder: for compile.csv, and for what the commands print.
        pool: which holds the results.
        arch: of a GPU that is not there.
        most: kernels at most.

    Returns:
        The seconds until all commands had ended, and which of them could not be run.
    """
    start = time.monotonic()
    setting = f"{arch or 'this GPU'}, {pool.jobs} processes on {os.cpu_count()} cores"
    recorded, recorders = 0.0, []
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        paths = {Path(temporary) / name: when for name, (when, _) in commands.items()}
        try:
            for path, (_, command) in zip(paths, commands.values(), strict=True):
                # Where it is not set, tests without a GPU set it.
                variables = {"OPSD_RECORD": str(path), "TRITON_INTERPRET": "0"}
                variables |= {"OPSD_ARCH": arch} if arch else {}
                with (folder / f"record-{path.name}.txt").open("w") as printed:
                    recorders.append(
                        subprocess.Popen(
                            command,
                            cwd=ROOT,
                            env=gpu.environment() | variables,
                            stdout=printed,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            follow = Follower(paths)
            while time.monotonic() - start < seconds:
                recording = any(recorder.poll() is None for recorder in recorders)
                if recording:
                    recorded = time.monotonic() - start
                pool.add(follow(), most)
                if pool.idle and not recording:
                    break
                if pool.step():
                    report.write(folder / "compile.csv", setting, pool.done)
        finally:
            pool.stop()
            statuses = [recorder.poll() for recorder in recorders]
            gpu.end(*recorders, grace=1.0)
    return recorded, [
        f"{name}: exit status {status}, see record-{name}.txt"
        for (name, (_, command)), status in zip(commands.items(), statuses, strict=True)
        # Tests fail in a record: what they compare was never computed.
        if status not in (None, 0) and not (status == 1 and "pytest" in command)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for compile.csv, and what is printed meanwhile")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--seconds", type=float, default=150, help="for all of it")
    parser.add_argument("--each", type=float, default=EACH, help="seconds for a kernel")
    parser.add_argument("--arch", help="of a GPU that is not there, as sm_90")
    parser.add_argument("--only", nargs="+", help="some of what make gpu runs, by name")
    parser.add_argument("--sample", type=int, help="kernels at most")
    parser.add_argument(
        "--script", nargs=argparse.REMAINDER, help="instead, with its arguments: the last option"
    )
    args = parser.parse_args()
    commands = gpu.recorded_commands(rehearsed=args.arch is not None)
    if args.only:
        if unknown := set(args.only) - set(commands):
            parser.error(f"--only {' '.join(unknown)}: not one of {', '.join(commands)}")
        commands = {name: commands[name] for name in args.only}
    if args.script:
        commands = {"script": (0, [sys.executable, "-m", "benchmarks.gpu.launches", *args.script])}
    pool, start = Pool(args.jobs, args.each, expected_seconds(RECORDED)), time.monotonic()
    recorded, failed = compile_launches(
        commands, args.folder, pool, args.seconds, args.arch, args.sample
    )
    print("\n".join([summary(pool, recorded, time.monotonic() - start), *failed]))
    nothing = bool(pool.done) and all(c.failure for c in pool.done)
    return int(nothing or bool(failed))


def summary(pool: Pool, recorded: float, elapsed: float) -> str:
    """What was compiled, and what was not."""
    failed = [c for c in pool.done if c.failure]
    lines = [
        f"{len(pool.done) - len(failed)} of {len(pool.known)} kernels compiled in {elapsed:.0f} s "
        f"({sum(c.seconds for c in pool.done):.0f} s of processors, the slowest "
        f"{max((c.seconds for c in pool.done), default=0):.0f} s); recorded in {recorded:.0f} s"
    ]
    lines += [f"  {c.kernel} {c.digest}: {c.failure} ({c.seconds:.0f} s)" for c in failed]
    spilled = sorted((c for c in pool.done if c.spilled), key=lambda c: -c.spilled)
    lines += [f"  {c.kernel} {c.digest} spills {c.spilled} bytes a thread" for c in spilled[:5]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
