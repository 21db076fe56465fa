"""What kernels a run launches: recorded without running them, so that they can be compiled first.

    OPSD_RECORD=FILE python -m benchmarks.gpu.launches benchmarks/speed.py [its arguments]
    OPSD_RECORD=FILE python -O -m pytest -p benchmarks.gpu.launches --assert=plain [its arguments]

Nothing is compiled or launched: outputs keep whatever they hold, and `python -O` with
--assert=plain lets a test go on to its next launch though the numbers are wrong. Each
specialization is a line of the file, written when it is first asked for. With OPSD_MISSES=FILE
instead kernels run as usual, and each that was not in Triton's cache is a line of the file.
OPSD_ENDED=FILE has pytest write how each test ended, and leave out what a file says already;
OPSD_ABSENT=a,b takes modules for not installed.

With OPSD_ARCH=sm_90 (any architecture of the tile table) no GPU is needed: kernels are recorded as
for that one, on CPU tensors.
"""

import base64
import hashlib
import importlib
import io
import json
import os
import pickle
import runpy
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.lib.hashes import settle_hashes


@dataclass(frozen=True)
class Launch:
    """One specialization of a kernel, as its launcher asked for it."""

    kernel: str  # module:name
    digest: str  # of what Triton specializes for
    target: tuple[str, int | str, int]  # backend, architecture, threads of a warp
    call: str  # the kernel and its arguments: see `loads`

    def loads(self) -> tuple[JITFunction, list[Any], dict[str, Any]]:
        """The kernel, its arguments and keyword arguments, with an `Argument` for each tensor."""
        return pickle.loads(base64.b64decode(self.call))


@dataclass(frozen=True)
class Argument:
    """What a compiler needs to know of a tensor."""

    dtype: torch.dtype
    misaligned: int  # bytes by which it lies behind a multiple of 16
    storage_bytes: int

    def data_ptr(self) -> int:
        return self.misaligned

    def ptr_range(self) -> int:
        return self.storage_bytes


class _Pickler(pickle.Pickler):
    """Tensors by what a compiler needs of them, wherever they are in the arguments; kernels by
    name."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = value.dtype, value.data_ptr() % 16, value.untyped_storage().nbytes()
            return Argument, known
        if isinstance(value, JITFunction):
            return _named, (value.fn.__module__, value.fn.__qualname__)
        return NotImplemented


def read(line: str) -> Launch:
    """Of a line that `record` wrote."""
    fields = json.loads(line)
    return Launch(**fields | {"target": tuple(fields["target"])})


def _named(module: str, name: str) -> JITFunction:
    return getattr(importlib.import_module(module), name)


class NoDriver:
    """Triton's driver of a GPU that is not there: kernels can be compiled, and not launched."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        return self.target  # Triton keeps what it compiled by device: each target is one

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


def target_of(arch: str) -> GPUTarget:
    """Of an architecture of the tile table."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


@contextmanager
def without_driver(arch: str) -> Iterator[None]:
    """Within it kernels are compiled for an architecture of the tile table, and not launched."""
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(NoDriver(target_of(arch)))
    try:
        yield
    finally:
        driver._active = before


def fake_gpu(arch: str) -> None:
    """From here on CPU tensors are taken for those of a GPU by whoever launches kernels."""
    from opsd_kernels import kernels

    triton.runtime.driver.set_active(NoDriver(target_of(arch)))
    kernels.available = lambda device: True
    use_tiles(arch)


def use_tiles(arch: str) -> None:
    """From here on every launcher takes the tiles of an architecture, whatever it runs on."""
    from opsd_kernels.kernels import tiles

    if arch not in {known for known, _ in tiles.TABLE}:
        raise ValueError(f"tiles of {arch!r}: the table has none")

    def lookup(device: torch.device, dtype: torch.dtype) -> tiles.Row:
        return tiles.TABLE[arch, str(dtype).removeprefix("torch.")]

    tiles.lookup = lookup


def name_of(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__}:{kernel.fn.__qualname__}"


def digest(kernel: JITFunction, key: str) -> str:
    """Of a kernel and the key that Triton's hooks are given."""
    return hashlib.sha256(f"{name_of(kernel)} {key}".encode()).hexdigest()[:16]


def record(path: Path) -> None:
    """From here on launches are lines of a file, and nothing more."""
    seen: set[str] = set()
    current = threading.local()
    run = JITFunction.run

    def remember(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        current.call = self, args, kwargs
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    def write(*, key: str, **_: Any) -> bool:
        kernel, args, kwargs = current.call
        known = digest(kernel, key)
        if known not in seen:
            seen.add(known)
            # What Triton itself has put there.
            kwargs = {k: v for k, v in kwargs.items() if k not in TRITONS}
            buffer = io.BytesIO()
            _Pickler(buffer).dump((kernel, args, kwargs))
            target = triton.runtime.driver.active.get_current_target()
            launch = Launch(
                name_of(kernel),
                known,
                (target.backend, target.arch, target.warp_size),
                base64.b64encode(buffer.getvalue()).decode(),
            )
            with path.open("a") as file:
                file.write(json.dumps(asdict(launch)) + "\n")
        return True  # neither compiled nor launched

    # An index that no kernel fills is 0: whatever memory held would end a run on a GPU.
    changes: list[tuple[Any, str, Any]] = [
        *((module, name, _zeroed(getattr(module, name))) for module, name in EMPTY),
        (torch.testing, "assert_close", lambda *args, **kwargs: None),
        (JITFunction, "run", remember),
        (triton.knobs.runtime, "jit_cache_hook", write),
    ]
    for module, name, change in changes:
        setattr(module, name, change)


TRITONS = ("debug", "instrumentation_mode")
EMPTY = ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))


def _zeroed(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def zeros(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        return made if made.is_floating_point() else made.zero_()

    return zeros


def write_misses(path: Path) -> None:
    """From here on what Triton compiles, because its cache does not hold it, is a line of a file:
    the kernel, and seconds."""

    def listener(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            with path.open("a") as file:
                file.write(f"{src.name} {times.total / 1e6:.1f}\n")

    triton.knobs.compilation.listener = listener


def start() -> None:
    """What the environment asks for, in a process whose kernels are to be found compiled."""
    settle_hashes()
    if arch := os.environ.get("OPSD_ARCH"):
        fake_gpu(arch)
    if path := os.environ.get("OPSD_RECORD"):
        record(Path(path))
    if path := os.environ.get("OPSD_MISSES"):
        write_misses(Path(path))
    if names := os.environ.get("OPSD_ABSENT"):
        hide(set(names.split(",")))


def hide(names: set[str]) -> None:
    """From here on these modules cannot be found, unless they are imported already."""

    class Finder(PathFinder):
        @classmethod
        def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
            return None if name in names else PathFinder.find_spec(name, path, target)

    sys.meta_path[:] = [Finder if finder is PathFinder else finder for finder in sys.meta_path]


def pytest_configure() -> None:
    start()


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Tests that have ended in an earlier call are not run again."""
    ended = outcomes()
    left_out = [item for item in items if item.nodeid in ended]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in ended]


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    if exitstatus == NO_TESTS and outcomes():
        session.exitstatus = 0  # there were some, and all have ended


NO_TESTS = 5


def pytest_runtest_logreport(report: Any) -> None:
    """A failure is told at once: should the run be ended, pytest does not come to its summary."""
    if "OPSD_RECORD" in os.environ:
        return
    if report.failed:
        print(f"\n{report.longreprtext}", flush=True)
    path = os.environ.get("OPSD_ENDED")
    if path and (report.when == "call" or report.outcome != "passed"):
        with open(path, "a") as file:
            file.write(f"{report.outcome} {report.nodeid}\n")


def outcomes() -> dict[str, str]:
    """How tests have ended, by their ids."""
    path = Path(os.environ.get("OPSD_ENDED", ""))
    lines = path.read_text().splitlines() if path.is_file() else []
    pairs = (line.partition(" ") for line in lines)
    return {name: outcome for outcome, _, name in pairs}


if __name__ == "__main__":
    from benchmarks.gpu import launches  # what is pickled is named by its module

    launches.start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
