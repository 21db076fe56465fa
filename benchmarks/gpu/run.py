"""Everything a GPU can tell us, in nine minutes: compile, then test, then time.

    make gpu PYTHON=python3 [OUT=folder]

runs this in an environment that has torch, triton, pytest and hypothesis already; nothing is
installed. All that the other steps launch is compiled first, in parallel; the tests run in several
processes. Each step writes its output to benchmarks/results/<GPU>/ (or OUT) as it goes, and has a
limit of its own: when its time is up, what it has is kept, all its processes are ended, and the
next one starts. summary.txt says how each ended.

    python benchmarks/gpu/run.py --rehearse --output folder

goes through the same steps without a GPU, as far as that goes: a sample of the kernels is compiled,
tests are collected, benchmarks run small on the CPU.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.lib import report

ROOT = Path(__file__).parents[2]
LIMIT = 530  # seconds for all of it
OURS = ["ours, logit-free", "ours, row workspace"]
METHODS = ["--methods", *OURS, "eager", "TRL", "Liger, fused"]
MEMORY = ["--model", "qwen3-8b", "--tokens", "1024", "16384", *METHODS]
ACCURACY = ["--vocabulary", "151936", "--features", "2048"]
# In a record, numbers mean nothing and a test may fail anywhere; it is to reach its next launch.
PYTEST = [
    "-m",
    "pytest",
    "-v",
    "--tb=short",
    "-p",
    "no:cacheprovider",
    "-p",
    "benchmarks.gpu.launches",
]
RECORDED_PYTEST = ["-O", *PYTEST, "--assert=plain", "-q", "--tb=line"]


@dataclass(frozen=True)
class Step:
    """Processes that run at the same time: of each the name, and what Python is to run. {output}
    stands for the folder, {seconds} for the time there is, {cuda} for the tests of the GPU."""

    name: str
    seconds: float  # at most; for the last step all that is left
    processes: dict[str, list[str]]
    recorded: dict[str, list[str]] = field(default_factory=dict)  # to learn what is launched
    rehearsal: list[str] = field(default_factory=list)  # added without a GPU


def _tests(*names: str, only: str = "") -> list[str]:
    return [*(f"tests/test_{name}.py" for name in names), *(["-k", only] if only else [])]


# Real sizes need up to 15 GiB of the GPU's memory, and go one after the other.
TESTS = {
    "real-sizes": _tests("gpu", only="real_size"),
    "gpu": _tests("gpu", only="not real_size"),
    "kernels": _tests("kernels"),
    "logit-free": _tests("logit_free"),
    "heads": _tests("head"),
    "loss": _tests("loss", "peers", only="{cuda} and logit-free"),
    "loss-rows": _tests("loss", "peers", only="{cuda} and workspace"),
    "tokens": _tests("token_divergence", only="{cuda} and logit-free"),
    "tokens-rows": _tests("token_divergence", only="{cuda} and workspace"),
    "sampled": _tests("sampled_token", only="{cuda}"),
}
SPEED = ["benchmarks/speed.py", "--repeats", "3"]
CROSS_ENTROPY = ["benchmarks/more/cross_entropy.py", "--repeats", "5"]
TUNE = ["benchmarks/gpu/tune.py", "--output", "{output}"]
STEPS = [
    Step(
        "compile",
        130,
        {"compile": ["benchmarks/gpu/compile.py", "{output}", "--seconds", "{seconds}"]},
        rehearsal=["--arch", "sm_90", "--only", "kernels", "--sample", "2"],
    ),
    Step(
        "tests",
        140,
        {name: [*PYTEST, *tests] for name, tests in TESTS.items()},
        {name: [*RECORDED_PYTEST, *tests] for name, tests in TESTS.items()},
        rehearsal=["--collect-only", "-q"],
    ),
    Step(
        "accuracy",
        25,
        {"accuracy": ["benchmarks/accuracy.py", *ACCURACY, "--output", "{output}"]},
        {"accuracy": ["benchmarks/accuracy.py", *ACCURACY]},
        rehearsal=["--tokens", "4", "--vocabulary", "1000", "--features", "16"],
    ),
    Step(
        "speed",
        70,
        {"speed": [*SPEED, *METHODS, "--output", "{output}"]},
        # Kernels are the same for any number of whole chunks, and of the memory that is measured.
        {"speed": [*SPEED, "--repeats", "1", "--quick", "--methods", *OURS]},
        rehearsal=["--quick", "--repeats", "1"],
    ),
    Step(
        "memory",
        50,
        {"memory": ["benchmarks/memory.py", *MEMORY, "--output", "{output}"]},
        rehearsal=["--model", "qwen3-0.6b", "--tokens", "64"],
    ),
    Step(
        "cross-entropy",
        45,
        {
            "cross-entropy": [
                *CROSS_ENTROPY,
                *["--methods", *OURS, "eager", "Liger", "CCE"],
                *["--output", "{output}"],
            ]
        },
        {"cross-entropy": [*CROSS_ENTROPY, "--quick", "--methods", *OURS]},
        rehearsal=["--quick", "--tokens", "8", "--dtype", "float32"],
    ),
    Step(
        "tune",
        70,
        {"tune": [*TUNE, "--seconds", "{seconds}"]},
        {"tune": ["benchmarks/gpu/tune.py", "--dry"]},
    ),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="folder; benchmarks/results/<GPU> by default")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, into --output")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="steps")
    args = parser.parse_args()
    if args.rehearse and not args.output:
        parser.error("--rehearse needs --output: what it finds is no result")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False; --rehearse needs none")
    device = torch.device("cpu" if args.rehearse else "cuda")
    name = "rehearsal" if args.rehearse else torch.cuda.get_device_name()
    output: Path = args.output or ROOT / "benchmarks" / "results" / slug(name)
    output.mkdir(parents=True, exist_ok=True)
    hardware = report.machine(device)
    if not args.rehearse:
        hardware = f"{torch.cuda.device_count()} x {hardware}"
    (output / "hardware.txt").write_text(hardware + "\n")
    steps = [step for step in STEPS if not args.only or step.name in args.only]
    end, lines, failed = time.monotonic() + LIMIT, [hardware], False
    for step in steps:
        left = end - time.monotonic()
        limit = left if step is STEPS[-1] or args.rehearse else min(step.seconds, left)
        start = time.monotonic()
        if args.rehearse and not step.rehearsal:
            outcomes = dict.fromkeys(step.processes, "needs a GPU")
        elif limit < 10:
            outcomes = dict.fromkeys(step.processes, "no time left")
        else:
            outcomes = run(step, limit, output, hardware, args.rehearse)
        failed |= step.name == "tests" and any(told != "ok" for told in outcomes.values())
        lines += [f"{step.name:<13} {time.monotonic() - start:6.1f} s"]
        for process, told in outcomes.items():
            lines += [f"  {process:<13} {'; '.join(filter(None, (told, *notes(output, process))))}"]
        print("\n".join(lines[-1 - len(outcomes) :]), flush=True)
        (output / "summary.txt").write_text("\n".join(lines) + "\n")
    return int(failed)


def slug(name: str) -> str:
    """Of a GPU, for the name of its folder."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run(
    step: Step, limit: float, output: Path, hardware: str, rehearsed: bool = False
) -> dict[str, str]:
    """How each of a step's processes ended; what they printed lies in the folder."""
    known = {
        # What a step does at its end takes some time too.
        "{seconds}": f"{max(limit - 5, limit / 2):.0f}",
        "{output}": str(output),
        "{cuda}": "cpu" if rehearsed else "cuda",
    }
    until = time.monotonic() + limit
    processes = {}
    for name, arguments in step.processes.items():
        command = _command(arguments + (step.rehearsal if rehearsed else []), known)
        compiled = output / f"{name}-compiled.txt"
        compiled.unlink(missing_ok=True)
        with (output / f"{name}.txt").open("w") as file:
            print(hardware, file=file, flush=True)
            processes[name] = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment() | {"OPSD_MISSES": str(compiled)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    outcomes = {}
    try:
        for name, process in processes.items():
            try:
                status = process.wait(max(0.0, until - time.monotonic()))
                outcomes[name] = "ok" if status == 0 else f"exit status {status}"
            except subprocess.TimeoutExpired:
                outcomes[name] = f"stopped after {limit:.0f} s"
    finally:
        end(*processes.values())
    return outcomes


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
    return mine | {"PYTHONPATH": path}


def recorded_commands(rehearsed: bool = False) -> dict[str, tuple[int, list[str]]]:
    """What is run to learn what will be launched, by name: the number of its step, in whose order
    it is needed, and the command."""
    known = {"{cuda}": "cpu" if rehearsed else "cuda"}
    return {
        name: (number, _command(arguments, known))
        for number, step in enumerate(STEPS)
        for name, arguments in step.recorded.items()
    }


def _command(arguments: list[str], known: dict[str, str]) -> list[str]:
    """With what is known in its place; a script is run by `benchmarks.launches`."""
    filled = list(arguments)
    for name, value in known.items():
        filled = [part.replace(name, value) for part in filled]
    script = [] if filled[0].startswith("-") else ["-m", "benchmarks.gpu.launches"]
    return [sys.executable, "-u", *script, *filled]


def notes(output: Path, process: str) -> tuple[str, str]:
    """What pytest, if it was that, said at its end, and what the process had to compile itself."""
    path = output / f"{process}.txt"
    printed = path.read_text() if path.exists() else ""
    counts = r"^=+ (\d+ (?:passed|failed).*?)(?:, \d+ (?:deselected|warning).*)? in .* =+$"
    said = re.findall(counts, printed, re.MULTILINE)
    return said[-1] if said else "", misses(output / f"{process}-compiled.txt")


def misses(path: Path) -> str:
    """What a process had to compile itself."""
    lines = path.read_text().splitlines() if path.exists() else []
    if not lines:
        return ""
    seconds = sum(float(line.split()[-1]) for line in lines)
    return f"compiled {len(lines)} kernels itself, in {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
