"""Everything a GPU can tell us, in nine minutes: tests first, then timings.

    make gpu PYTHON=python3 OUT=folder

runs this in an environment that has torch, triton, pytest and hypothesis already; nothing is
installed. Each step writes its output to the folder as it goes, with what it ran on, and has a
limit of its own, so that one that hangs leaves the others their time.
"""

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).parents[1]
LIMIT = 530  # seconds for all of it
PYTEST = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
OURS = ["ours, logit-free", "ours, row workspace"]
METHODS = ["--methods", *OURS, "eager", "TRL", "Liger, fused"]
MEMORY = ["--model", "qwen3-8b", "--tokens", "1024", "16384", "--methods", *OURS, "eager"]
LOSSES = [
    f"tests/test_{name}.py" for name in ("loss", "peers", "token_divergence", "sampled_token")
]
ACCURACY = ["--vocabulary", "151936", "--features", "2048"]
# Name, seconds at most, what Python is to run.
STEPS = [
    ("tests-gpu", 140, [*PYTEST, "tests/test_gpu.py"]),
    ("tests-kernels", 90, [*PYTEST, "tests/test_kernels.py", "tests/test_logit_free.py"]),
    ("tests-loss", 80, [*PYTEST, *LOSSES, "-k", "cuda"]),
    ("accuracy", 30, ["benchmarks/accuracy.py", *ACCURACY, "--output", "{output}"]),
    ("speed", 60, ["benchmarks/speed.py", "--repeats", "3", *METHODS, "--output", "{output}"]),
    ("memory", 60, ["benchmarks/memory.py", *MEMORY, "--output", "{output}"]),
    ("tune", 70, ["benchmarks/tune.py", "--seconds", "20", "--output", "{output}"]),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False")
    args.output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + LIMIT
    hardware = (
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"triton {triton.__version__}, Python {platform.python_version()}"
    )
    lines = [hardware]
    failed = False
    for name, seconds, command in STEPS:
        limit = min(seconds, end - time.monotonic())
        start = time.monotonic()
        outcome = run(name, limit, command, args.output, hardware) if limit > 10 else "no time left"
        failed |= name.startswith("tests") and outcome != "ok"
        lines.append(f"{name:<14} {outcome:<24} {time.monotonic() - start:6.1f} s")
        (args.output / "summary.txt").write_text("\n".join(lines) + "\n")
        print(lines[-1], flush=True)
    return int(failed)


def run(name: str, limit: float, command: list[str], output: Path, hardware: str) -> str:
    """How a step ended; what it printed lies in the folder."""
    command = [part.format(output=output) for part in command]
    with (output / f"{name}.txt").open("w") as file:
        print(hardware, file=file, flush=True)
        try:
            result = subprocess.run(
                [sys.executable, "-u", *command],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
    return "ok" if result.returncode == 0 else f"exit status {result.returncode}"


if __name__ == "__main__":
    sys.exit(main())
