"""Runs of `python -m opsd_train` in processes of their own, forked from one that has imported
everything already; and ways to end them early."""

import itertools
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[1]
COST = ("seconds", "tokens_per_second", "peak_memory_mib")  # not the same when repeated
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def processes() -> multiprocessing.context.ForkServerContext:
    """Forked from a server: without the imports of a run, which take longer than the run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["opsd_train.__main__"])
    # The package of this checkout, whichever one is installed.
    with environment(PYTHONPATH=f"{REPOSITORY}:{REPOSITORY / 'tests'}", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def start(
    log: Path,
    *arguments: object,
    before: Callable[[], None] | None = None,
    program: str = "__main__",
    **env: str,
) -> ForkServerProcess:
    """Start a run, or another program of opsd_train, that writes what it says to `log`, and calls
    `before` in its process first."""
    options = [str(a) for a in arguments]
    process = processes().Process(target=_run, args=(program, log, options, before, env))
    process.start()
    return process


def run(
    log: Path,
    *arguments: object,
    status: int = 0,
    before: Callable[[], None] | None = None,
    **env: str,
) -> str:
    """Run to the end, which has to be with this status, and return what it said."""
    process = start(log, *arguments, before=before, **env)
    process.join()
    assert process.exitcode == status, log.read_text()
    return log.read_text()


def run_distributed(
    log: Path, *arguments: object, world_size: int = 2, status: int = 0, program: str = "__main__"
) -> None:
    """As a launcher would start it, one process a rank, each with a log of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    ranks = [
        start(
            log.with_suffix(f".{r}"),
            *arguments,
            program=program,
            RANK=str(r),
            LOCAL_RANK=str(r),
            **common,
        )
        for r in range(world_size)
    ]
    for r, process in enumerate(ranks):
        process.join()
        assert process.exitcode == status, log.with_suffix(f".{r}").read_text()


def shrunk(folder: Path, output: Path, *options: object, preset: str = "4b-paper") -> list[object]:
    """The command line of a preset made small, by options alone."""
    shape = () if "--adapter" in options else ("--lora-rank", 4, "--lora-alpha", 8)
    return [
        f"qwen3-{preset}",
        *("--model", folder / "model", "--data", folder / "problems.jsonl"),
        *("--dtype", "float32", *shape),
        *("--max-prompt-tokens", 512, "--max-new-tokens", 6),
        *("--steps", 6, "--batch-size", 4, "--micro-batch-size", 2, "--learning-rate", 0.01),
        *("--save-every", 2, "--keep-last", 2, "--output-dir", output),
        *options,
    ]


def demo_config(**options: object):
    """Of the small world's preset."""
    from opsd_train.config import make_config
    from opsd_train.files import read_yaml
    from opsd_train.presets import find_preset

    return make_config(read_yaml(find_preset("small-world")) | options)


def metrics(output: Path) -> list[dict]:
    """All that should not depend on when a run is made."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in row.items() if name not in COST} for row in rows]


def contents(output: Path) -> tuple:
    """All that an interruption must not change."""
    adapter = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    texts = [(output / f"{name}.jsonl").read_text() for name in ("completions", "tokens")]
    return metrics(output), *texts, adapter


def steps_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def die_at_change(number: int, folder: Path) -> None:
    """Have this process kill itself just before it changes something in a folder for the n-th
    time: opens a file to write, makes, renames or removes something."""
    left = number

    def watch(event: str, arguments: tuple) -> None:
        nonlocal left
        changes = event in CHANGES
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def let_no_file_grow(limit: int) -> None:
    """As on a full disk, writing fails: for a file beyond a number of bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def lose_the_loss(calls: range) -> None:
    """Make the loss NaN in these calls, that is micro-batches."""
    from opsd_train.opsd import step

    opsd_loss, count = step.opsd_loss, itertools.count()

    def broken(*arguments):
        loss, statistics = opsd_loss(*arguments)
        return (loss * float("nan") if next(count) in calls else loss), statistics

    step.opsd_loss = broken


def run_out_of_memory(call: int) -> None:
    """Have no memory for the forward passes of a micro-batch."""
    from opsd_train.opsd import step

    score, count = step.score, itertools.count()

    def broken(*arguments):
        if next(count) == call:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return score(*arguments)

    step.score = broken


def do_not_warm_start() -> None:
    """Leave the demo's model untrained, which saves a minute."""
    from opsd_train import demo

    demo.warm_start = lambda *_: None


def have_no_room_for_the_model() -> None:
    from opsd_train.run import setup

    def broken(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    setup.load_model = broken


def _run(
    program: str,
    log: Path,
    arguments: list[str],
    before: Callable[[], None] | None,
    env: dict[str, str],
) -> None:
    main = import_module(f"opsd_train.{program}").main

    os.environ.update(env)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        if before is not None:
            before()
        main(arguments)
    except Exception:
        traceback.print_exc()
        os._exit(70)
