"""What a GPU can tell in two calls of six minutes, the most valuable first.

    make gpu PYTHON=python3 [OUT=folder]

runs this in an environment that has what environment.txt lists; wheels.txt lists what the peers
need besides. Nothing is installed or downloaded. In this order:

    compile         what the other steps launch, in parallel
    tests           every operation at a real size against float64; streams, memory, waiting
    speed           time and memory of the loss beside its peers; then accuracy, cross-entropy
    training        a whole step of Qwen3-8B; collectives of one process
    profile, tune   where the row workspace's time goes; which tiles are fastest

Each step has a limit; when its time is up its processes are ended, and what it has is kept. All of
it is packed into OUT/results.tar.gz, again and again: a second call finds that file, takes up what
is not done, and repeats nothing. Unpacked in benchmarks/results it is what the pages are made of.

    python benchmarks/gpu/run.py --rehearse --output folder

takes the same way without a GPU, in small: two calls, the first of them cut short. Whatever a CPU
can see go wrong ends it with exit status 1: a command that is refused, tests that select nothing, a
package that nobody has listed, a result that is missing or repeated.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.lib import report, sources

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LIMIT = 340  # seconds of a call
ARCHIVE = "results.tar.gz"
STATE = "state.json"
MOVE_IT = "move it away, or give another folder"
PACKED_EVERY = 15.0  # seconds
LARGEST = 16 * 2**20  # bytes of an archive that can be brought back
# In a record, numbers mean nothing and a test may fail anywhere; it is to reach its next launch.
PYTEST = ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p"]
PYTEST += ["benchmarks.gpu.launches"]
RECORDED_PYTEST = ["-O", *PYTEST, "--assert=plain", "-q", "--tb=line"]
REAL_SIZES = ["tests/test_gpu.py", "-k", "real_size"]
OTHERS = ["tests/test_gpu.py", "-k", "not real_size"]
TINY = ["--tiny", "--device", "cpu"]
OUTPUT = ["--output", "{output}"]


@dataclass(frozen=True)
class Step:
    """Processes that run at the same time: of each the name, and what Python is to run. {output}
    stands for the folder, {seconds} for the time there is."""

    name: str
    seconds: float  # at most
    processes: dict[str, list[str]]
    recorded: dict[str, list[str]] = field(default_factory=dict)  # to learn what is launched
    rehearsal: dict[str, list[str]] = field(default_factory=dict)  # in place of the processes
    results: tuple[str, ...] = ()  # files that it leaves
    goes_on: bool = False  # whether it takes --items, and goes on with what its csv holds
    least: float = 10  # seconds; with less it is left for the next call


def _script(name: str, *arguments: str) -> list[str]:
    return [f"benchmarks/{name}.py", *arguments]


OURS = ["ours, logit-free", "ours, row workspace"]
COMPILE = _script("gpu/compile", "{output}", "--seconds", "{seconds}")
TIMES = _script("gpu/times")
ACCURACY = _script("accuracy", "--vocabulary", "151936", "--features", "2048", "--methods", *OURS)
CROSS_ENTROPY = _script("more/cross_entropy", "--tokens", "16384", "--methods", *OURS)
ONE_PROCESS = _script("gpu/one_process")
TRAINING = _script("gpu/training")
PROFILE = _script("gpu/profile_rows", *OUTPUT)
TUNE = _script("gpu/tune")
# What a CPU does of them.
SMALL_ACCURACY = ["--tokens", "4", "--vocabulary", "300", "--features", "16"]
SMALL_CROSS_ENTROPY = ["--quick", "--tokens", "8", "--dtype", "float32"]
SMALL_RECORD = {
    "speed": ["--tiny"],
    "accuracy": SMALL_ACCURACY,
    "cross-entropy": SMALL_CROSS_ENTROPY,
    "training": ["--tiny"],
    "one-process": TINY,
}
WITHOUT_KERNELS = ["--methods", "ours, row workspace"]

STEPS = [
    Step(
        "compile",
        100,
        {"compile": COMPILE},
        rehearsal={"compile": [*COMPILE, "--arch", "sm_90", "--sample", "2"]},
        results=("compile.csv",),
    ),
    Step(
        "tests",
        80,
        {"operations": [*PYTEST, *REAL_SIZES], "others": [*PYTEST, *OTHERS]},
        {
            "operations": [*RECORDED_PYTEST, *REAL_SIZES],
            "others": [*RECORDED_PYTEST, *OTHERS],
        },
        {
            "operations": [*PYTEST, "tests/test_operations.py", "-m", "slow or not slow"],
            "real-sizes": [*PYTEST, *REAL_SIZES, "--collect-only", "-q"],
            "others": [*PYTEST, *OTHERS, "--collect-only", "-q"],
        },
        ("operations-ended.txt",),  # and, of real sizes, operations.csv
    ),
    Step(
        "speed",
        140,
        {"speed": [*TIMES, *OUTPUT]},
        {"speed": [*TIMES, "--dry"]},
        {"speed": [*TIMES, *OUTPUT, *TINY, "--repeats", "1"]},
        ("speed.csv", "memory.csv", "trained.csv"),
        goes_on=True,
    ),
    Step(
        "accuracy",
        40,
        {
            "accuracy": [*ACCURACY, "eager, bf16 logits", "TRL", "Liger, fused", "Liger, chunked",
                         "ORDA", *OUTPUT],
        },
        {"accuracy": ACCURACY},
        {"accuracy": [*ACCURACY, *OUTPUT, *SMALL_ACCURACY, *WITHOUT_KERNELS]},
        ("accuracy.csv",),
        least=30,
    ),
    Step(
        "cross-entropy",
        35,
        {"cross-entropy": [*CROSS_ENTROPY, "eager", "Liger", "CCE", *OUTPUT]},
        {"cross-entropy": [*CROSS_ENTROPY, "--tokens", "2048"]},
        {"cross-entropy": [*CROSS_ENTROPY, *OUTPUT, *SMALL_CROSS_ENTROPY, *WITHOUT_KERNELS]},
        ("cross_entropy.csv",),
        least=25,
    ),
    Step(
        "training",
        170,
        {"training": [*TRAINING, *OUTPUT]},
        {"training": [*TRAINING, "--dry"]},
        {"training": [*TRAINING, *OUTPUT, *TINY]},
        ("training.csv", "training.md"),
        goes_on=True,
        least=60,
    ),
    Step(
        "one process",
        25,
        {"one-process": [*ONE_PROCESS, *OUTPUT]},
        {"one-process": ONE_PROCESS},
        {"one-process": [*ONE_PROCESS, *OUTPUT, *TINY]},
        ("one_process.csv",),
        least=20,
    ),
    Step(
        "profile",
        20,
        {"profile": PROFILE},
        rehearsal={"profile": [*PROFILE, *TINY]},
        results=("profile.csv", "profile.txt"),
        least=15,
    ),
    Step(
        "tune",
        70,
        {"tune": [*TUNE, *OUTPUT, "--seconds", "{seconds}"]},
        rehearsal={"tune": [*TUNE, "--dry", "--vocabulary", "1024", "--features", "32"]},
        least=40,
    ),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-results"),
                        help=f"folder of {ARCHIVE} (default: gpu-results)")  # fmt: skip
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for this call")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, in small")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="steps")
    args = parser.parse_args()
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False; --rehearse needs none")
    steps = [step for step in STEPS if not args.only or step.name in args.only]
    if args.rehearse:
        return rehearse(args.output, steps)
    hardware = f"{torch.cuda.device_count()} x {report.machine(torch.device('cuda'))}"
    call = Call(args.output, slug(torch.cuda.get_device_name()), hardware)
    try:
        call.run(steps, args.limit)
    except ValueError as error:
        parser.error(str(error))
    return int(call.failed("tests"))


def slug(name: str) -> str:
    """Of a GPU, for the name of its folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Call:
    """One call: it unpacks what the last one left, goes through the steps, and packs.

    Args:
        output: the folder of the archive.
        name: of the folder in it.
        hardware: and versions, on one line.
        rehearsed: without a GPU.
        items: that a step which can go on takes up at most; None: all.
    """

    def __init__(
        self,
        output: Path,
        name: str,
        hardware: str,
        rehearsed: bool = False,
        items: int | None = None,
    ) -> None:
        self.archive, self.name = output / ARCHIVE, name
        self.here, self.hardware = hardware, [hardware]  # of earlier calls first, if it differs
        self.rehearsed, self.items = rehearsed, items
        self.ended: dict[str, dict[str, str]] = {}  # how each step's processes did
        self.seconds: dict[str, float] = {}
        self.taken: list[str] = []  # steps, by this call
        self._packed = 0.0

    def run(self, steps: list[Step], limit: float) -> None:
        """Raises:
        ValueError: the archive is of other code, or of another kind of GPU.
        """
        end = time.monotonic() + limit
        self.archive.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            self.folder = Path(temporary) / self.name
            self.folder.mkdir()
            self._unpack()
            (self.folder / "hardware.txt").write_text(self.hardware[0] + "\n")
            for step in steps:
                left = end - time.monotonic()
                if self.is_done(step) and (self.rehearsed or step.name != "compile"):
                    continue
                if left < step.least:
                    self.ended.setdefault(step.name, {})["step"] = "no time left"
                    continue
                self._take(step, left if self.rehearsed else min(step.seconds, left), steps)
            self.pack()

    def is_done(self, step: Step) -> bool:
        """Whether all its processes have ended by themselves."""
        told = self.ended.get(step.name, {})
        names = step.rehearsal if self.rehearsed else step.processes
        return all(told.get(name, STOPPED).startswith(("ok", "exit")) for name in names)

    def failed(self, name: str) -> bool:
        return any(not told.startswith("ok") for told in self.ended.get(name, {}).values())

    def _take(self, step: Step, limit: float, steps: list[Step]) -> None:
        start = time.monotonic()
        self.taken.append(step.name)
        commands = step.rehearsal if self.rehearsed else step.processes
        if step.name == "compile":
            wanted = [name for s in steps if not self.is_done(s) for name in s.recorded]
            if not wanted:
                return
            commands = {name: [*of, "--only", *wanted] for name, of in commands.items()}
        if step.goes_on and self.items is not None:
            commands = {name: [*of, "--items", str(self.items)] for name, of in commands.items()}
        told = run(commands, limit, self.folder, self.here, self.rehearsed, self._pack_soon)
        if step.goes_on and self.items is not None:
            told = dict.fromkeys(told, f"{STOPPED} after {self.items} items")
        took = self.seconds.get(step.name, 0.0) + time.monotonic() - start
        self.ended[step.name], self.seconds[step.name] = told, took
        lines = self._lines(step.name)
        print("\n".join(lines), flush=True)
        self.pack()

    def _lines(self, name: str) -> list[str]:
        told = self.ended[name]
        of_process = [
            f"  {process:<13} {'; '.join(filter(None, (how, *notes(self.folder, process))))}"
            for process, how in told.items()
        ]
        return [f"{name:<13} {self.seconds.get(name, 0.0):6.1f} s", *of_process]

    def _pack_soon(self) -> None:
        if time.monotonic() - self._packed > PACKED_EVERY:
            self.pack()

    def pack(self) -> None:
        """Write the archive anew, all of it or nothing."""
        summary = [*self.hardware, *(line for name in self.ended for line in self._lines(name))]
        (self.folder / "summary.txt").write_text("\n".join(summary) + "\n")
        state = {"source": sources.line(), "hardware": self.hardware, "ended": self.ended,
                 "seconds": self.seconds}  # fmt: skip
        (self.folder / STATE).write_text(json.dumps(state, indent=1) + "\n")
        unfinished = self.archive.with_suffix(".unfinished")
        with tarfile.open(unfinished, "w:gz") as tar:
            tar.add(self.folder, self.name)
        os.replace(unfinished, self.archive)
        self._packed = time.monotonic()

    def _unpack(self) -> None:
        if not self.archive.exists():
            return
        with tarfile.open(self.archive) as tar:
            tar.extractall(self.folder.parent, filter="data")
        path = self.folder / STATE
        if not path.exists():
            raise ValueError(f"{self.archive} has no results of a {self.name}: {MOVE_IT}")
        state = json.loads(path.read_text())
        if state["source"] != sources.line():
            raise ValueError(
                f"{self.archive} is of {state['source']}, and this is {sources.line()}: {MOVE_IT}"
            )
        self.ended, self.seconds = state["ended"], state["seconds"]
        self.hardware = list(dict.fromkeys([*state["hardware"], *self.hardware]))


STOPPED = "stopped"


def run(
    commands: dict[str, list[str]],
    limit: float,
    folder: Path,
    hardware: str,
    rehearsed: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """How each process ended; what they printed lies in the folder.

    Args:
        commands: the processes by name; all run at the same time.
        limit: seconds.
        hardware: the first line of what each prints.
        meanwhile: called again and again.
    """
    known = {
        # What a step does at its end takes some time too.
        "{seconds}": f"{max(limit - 5, limit / 2):.0f}",
        "{output}": str(folder),
    }
    until = time.monotonic() + limit
    processes = {}
    for name, arguments in commands.items():
        compiled = folder / f"{name}-compiled.txt"
        compiled.unlink(missing_ok=True)
        variables = {
            "OPSD_MISSES": str(compiled),
            "OPSD_ENDED": str(folder / f"{name}-ended.txt"),
            "OPSD_FIGURES": str(folder),
        }
        if rehearsed:
            variables |= rehearsal_variables(arguments)
        with (folder / f"{name}.txt").open("w") as file:
            print(hardware, file=file, flush=True)
            processes[name] = subprocess.Popen(
                _command(arguments, known),
                cwd=ROOT,
                env=environment() | variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    try:
        while time.monotonic() < until:
            if all(process.poll() is not None for process in processes.values()):
                break
            meanwhile()
            time.sleep(0.1)
        statuses = {name: process.poll() for name, process in processes.items()}
    finally:
        end(*processes.values())
    return {name: how(status, limit) for name, status in statuses.items()}


def how(status: int | None, limit: float) -> str:
    if status is None:
        return f"{STOPPED} after {limit:.0f} s"
    return "ok" if status == 0 else f"exit status {status}"


def end(*processes: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """End processes, each with its group: asked first, so that pytest tells what has failed."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        _signal(process, signal.SIGINT)
    until = time.monotonic() + grace
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
    for process in processes:
        _signal(process, signal.SIGKILL)  # also what they have left running
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def environment() -> dict[str, str]:
    """Of every process: kernels are compiled, unless the process knows better, and modules are
    found."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    mine = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return mine | {"PYTHONPATH": path, "OPSD_COMMIT": sources.commit()}


def recorded_commands(rehearsed: bool = False) -> dict[str, tuple[int, list[str]]]:
    """What is run to learn what will be launched, by name: the number of its step, in whose order
    it is needed, and the command."""
    small = SMALL_RECORD if rehearsed else {}
    return {
        name: (number, _command([*arguments, *small.get(name, [])], {}))
        for number, step in enumerate(STEPS)
        for name, arguments in step.recorded.items()
    }


def _command(arguments: list[str], known: dict[str, str]) -> list[str]:
    """With what is known in its place; a script is run by `benchmarks.gpu.launches`."""
    filled = list(arguments)
    for name, value in known.items():
        filled = [part.replace(name, value) for part in filled]
    script = [] if filled[0].startswith("-") else ["-m", "benchmarks.gpu.launches"]
    return [sys.executable, "-u", *script, *filled]


def notes(folder: Path, process: str) -> tuple[str, str]:
    """How the tests of a process ended, if it had any; and what it had to compile itself."""
    path = folder / f"{process}-ended.txt"
    words = [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []
    counts = [f"{words.count(word)} {word}" for word in ("failed", "passed", "skipped")]
    told = ", ".join(count for count in counts if not count.startswith("0 "))
    return told, misses(folder / f"{process}-compiled.txt")


def misses(path: Path) -> str:
    """What a process had to compile itself."""
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        return ""
    seconds = sum(float(line.split()[-1]) for line in lines)
    return f"compiled {len(lines)} kernels itself, in {seconds:.0f} s"


# --- The rehearsal


def rehearse(output: Path, steps: list[Step]) -> int:
    """Two calls without a GPU, the first with one item of each step that can go on; 1 if anything
    went wrong."""
    problems = [f"wheels.txt lacks {name}" for name in sorted(unlisted())]
    (output / ARCHIVE).unlink(missing_ok=True)
    first, second = (
        Call(output, "rehearsal", "no GPU", rehearsed=True, items=items) for items in (1, None)
    )
    first.run(steps, limit=3600)
    before = contents(first.archive)
    second.run(steps, limit=3600)
    files = contents(second.archive)
    again = {step.name for step in steps if not step.goes_on} & set(second.taken) - {"compile"}
    problems += [f"{name} was run again by the second call" for name in sorted(again)]
    for step in steps:
        if not second.is_done(step) or second.failed(step.name):
            told = second.ended.get(step.name, {})
            problems.append(f"{step.name}: {told}")
            failed = [name for name, how_it_ended in told.items() if how_it_ended != "ok"]
            problems += [files.get(f"{name}.txt", "")[-2000:] for name in failed]
        for name in step.results:
            rows, left = _rows(files.get(name, "")), _rows(before.get(name, ""))
            if not rows:
                problems.append(f"{step.name} left no {name}")
            if not step.goes_on or not name.endswith(".csv"):
                continue
            if rows[: len(left)] != left:
                problems.append(f"{name} does not go on with what the first call left")
            if len({_measured(row) for row in rows}) < len(rows):
                problems.append(f"{name} says something twice")
    if second.archive.stat().st_size > LARGEST:
        problems.append(f"{ARCHIVE} is larger than {LARGEST:,} bytes")
    for problem in problems:
        print(f"WRONG: {problem}", flush=True)
    return int(bool(problems))


def contents(archive: Path) -> dict[str, str]:
    """The text of an archive's files by name, pictures aside."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
        paths = (path for path in Path(folder).rglob("*.*") if path.suffix != ".png")
        return {path.name: path.read_text() for path in paths if path.is_file()}


def _rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def _measured(row: str) -> str:
    """What a row of a csv is about: all but its figures."""
    return ",".join(word for word in row.split(",") if "." not in word and word != "nan")


def rehearsal_variables(arguments: list[str]) -> dict[str, str]:
    """Kernels are interpreted, but for those that are compiled; of packages there are those that
    are listed. The tuner's candidates are recorded alone, for a GPU that is not there."""
    compiles = "--arch" in arguments or "--dry" in arguments
    variables = {"TRITON_INTERPRET": str(int(not compiles)), "OMP_NUM_THREADS": "1"}
    variables |= {"OPSD_ABSENT": ",".join(sorted(absent()))}
    if "--dry" in arguments:
        variables |= {"OPSD_ARCH": "sm_90", "OPSD_RECORD": os.devnull}
    return variables


def listed(file: str) -> dict[str, str]:
    """Packages of environment.txt or wheels.txt, by their canonical names: what follows a name."""
    lines = (line.partition("#")[0].split() for line in (HERE / file).read_text().splitlines())
    named = {line[0].partition("==")[0]: " ".join(line) for line in lines if line}
    return {_canonical(name): rest for name, rest in named.items()}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(names: list[str]) -> set[str]:
    """Packages and all that they require, as far as they are installed here."""
    found: set[str] = set()
    waiting = [_canonical(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        with suppress(metadata.PackageNotFoundError):
            for requirement in metadata.requires(name) or []:
                if "extra ==" not in requirement:
                    waiting.append(_canonical(re.split(r"[^\w.-]", requirement.strip())[0]))
    return found


def unlisted() -> set[str]:
    """Peers, and what a wheel requires, that neither file lists."""
    wheels = listed("wheels.txt")
    wanted = needed([*wheels, *report.PEERS])
    return wanted - needed(list(listed("environment.txt"))) - set(wheels)


def absent() -> set[str]:
    """Modules that are installed here, and would not be there."""
    there = needed(list(listed("environment.txt"))) | set(listed("wheels.txt"))
    return {
        module
        for module, packages in metadata.packages_distributions().items()
        if not any(_canonical(package) in there for package in packages)
    }


if __name__ == "__main__":
    sys.exit(main())
