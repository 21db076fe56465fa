import os
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter, which must be known before the first
# of them is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from schedules import SCHEDULES, Schedule

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.improve()

# The same examples on every machine: what CI sees is what a contributor sees.
settings.register_profile("opsd", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("opsd")

# The tensors are small, and on a busy machine threads that wait for each other are far slower than
# one; pytest-xdist uses the cores. The processes that tests start inherit the variable.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# With a GPU's tiles the interpreter takes its time.
settings.register_profile("tiles", settings.get_profile("opsd"), max_examples=15)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiles",
        metavar="ARCH",
        help="interpret kernels with the tiles of an architecture of the table, as sm_90, and with "
        "scratch that is poisoned before use",
    )


def pytest_configure(config: pytest.Config) -> None:
    if arch := config.getoption("--tiles"):
        from benchmarks.gpu.launches import use_tiles
        from opsd_kernels.schedules import logit_free, row_workspace

        use_tiles(arch)
        logit_free.allocate = poisoned(logit_free.allocate)
        row_workspace.allocate = poisoned(row_workspace.allocate)
        settings.load_profile("tiles")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line: how many tests this machine cannot run, and what each of them needs."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    needs = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    if needs:
        told = ", ".join(f"{count} ({need})" for need, count in needs.most_common())
        terminalreporter.write_line(f"Skipped on this machine: {told}")


def poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """With scratch that shows in every result if it is read before it is written."""

    @wraps(allocate)
    def allocate_and_fill(*args: Any, **kwargs: Any) -> Any:
        scratch = allocate(*args, **kwargs)
        for t in scratch if isinstance(scratch, tuple) else vars(scratch).values():
            if isinstance(t, torch.Tensor):
                t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max)
        return scratch

    return allocate_and_fill


@pytest.fixture(scope="session", params=SCHEDULES, ids=str)
def op(request: pytest.FixtureRequest) -> Schedule:
    """`fused_jsd_loss` in each schedule, and on each device, that this machine can run."""
    if request.config.getoption("--tiles") and not request.param.logit_free:
        pytest.skip("needs no tiles")
    return request.param


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 on the disk, in model/, and problems for it, in problems.jsonl."""
    import tiny_qwen3

    path = tmp_path_factory.mktemp("qwen3")
    tiny_qwen3.save_model_and_tokenizer(path / "model")
    tiny_qwen3.save_problems(path / "problems.jsonl")
    return path


@pytest.fixture(scope="session")
def undisturbed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    import training_runs

    output = tmp_path_factory.mktemp("undisturbed") / "run"
    training_runs.run(output.with_suffix(".log"), *training_runs.shrunk(folder, output))
    return output
