"""What takes memory, and how much: a figure at a time, each in a process of its own."""

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.lib.hashes import settle_hashes
from benchmarks.lib.peers import why

MIB = 2**20


def in_a_process(script: str, task: dict[str, Any], seconds: float) -> tuple[str, dict[str, Any]]:
    """Run `script --here TASK`, which is to `tell` what it measures; return why it failed, or "",
    and its figures by name."""
    command = [sys.executable, script, "--here", json.dumps(task)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"more than {seconds:.0f} s", {}
    if result.returncode < 0:
        ended = signal.Signals(-result.returncode)
        return "out of memory" if ended == signal.SIGKILL else f"ended by {ended.name}", {}
    if result.returncode > 0:
        return result.stderr.strip().rpartition("\n")[2][:60] or "failed", {}
    figures = json.loads(result.stdout.splitlines()[-1])
    return figures.pop("failure"), figures


def tell(measure: Callable[..., dict[str, float]], task: str) -> None:
    """The other end of it: print what `measure` returns for the task, or why it failed."""
    options = json.loads(task)
    try:
        if torch.device(options["device"]).type == "cpu":
            limit_memory()
        else:
            settle_hashes()  # kernels are found, if another process has compiled them
        figures = {"failure": "", **measure(**options)}
    except Exception as error:
        figures = {"failure": why(error)}
    print(json.dumps(figures))


def clock(device: torch.device) -> float:
    """Seconds: of this process's processors on a CPU, which other programs do not disturb; on a GPU
    of the wall, once the GPU has done what it was given."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def start_counting(device: torch.device) -> int:
    """Reset the high-water mark and return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)  # what is free already is not to be used unseen
    Path("/proc/self/clear_refs").write_text("5")
    return _bytes_of("/proc/self/status", "VmRSS")


def high_water(device: torch.device) -> int:
    """The allocator's on a GPU; of the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _bytes_of("/proc/self/status", "VmHWM")


@contextmanager
def counted_dots() -> Iterator[list[int]]:
    """The multiply-adds of every tile that `tl.dot` multiplies meanwhile, in the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot, dots = InterpreterBuilder.create_dot, list[int]()

    def counted(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        dots.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return create_dot(self, a, b, *rest)

    with mock.patch.object(InterpreterBuilder, "create_dot", counted):
        yield dots


def available_mib(device: torch.device) -> float:
    """Of the memory of a GPU, or of this machine, what is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / MIB
    return _bytes_of("/proc/meminfo", "MemAvailable") / MIB


def limit_memory() -> None:
    """Let an allocation that does not fit raise, before the system kills a process."""
    import resource  # Unix only

    available = _bytes_of("/proc/meminfo", "MemAvailable")
    mapped = _bytes_of("/proc/self/status", "VmData")
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = mapped + int(0.95 * available)
    if most != resource.RLIM_INFINITY:
        limit = min(limit, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))


def _bytes_of(file: str, field: str) -> int:
    """A size from Linux's /proc."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{file} has no {field}")
