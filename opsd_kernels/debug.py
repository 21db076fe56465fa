"""What the library computes, in a log or in files, for a report of a fault.

    OPSD_KERNELS_LOG=calls      a line for each pass over the tokens: what is computed, by which
                                schedule and budget, and shape, dtype, strides and device of every
                                tensor
    OPSD_KERNELS_LOG=values     and for every tensor, before and after, how many of its entries are
                                NaN or infinite, and the largest size of the others
    OPSD_KERNELS_DUMP=FOLDER    the inputs of each pass go to a file before the pass begins; of each
                                process the last eight are kept
    python -m opsd_kernels.replay FILE ...     computes the passes of such files again

The variables are read when the library is imported. The log is that of Python's `logging`, under
the name opsd_kernels; it goes to stderr. `values` makes the host wait for a GPU.
"""

import logging
import os
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .description import Divergence, divergence_name
from .problem import Problem

LEVELS = ("calls", "values")
KEPT = 8  # files of a process

logger = logging.getLogger("opsd_kernels")


def level_in(environment: Any) -> str | None:
    """The level of the log that an environment asks for; None for no log.

    Raises:
        ValueError: OPSD_KERNELS_LOG is none of the levels.
    """
    level = environment.get("OPSD_KERNELS_LOG") or None
    if level is not None and level not in LEVELS:
        raise ValueError(f"OPSD_KERNELS_LOG must be one of {', '.join(LEVELS)}, got {level!r}")
    return level


LEVEL = level_in(os.environ)
FOLDER = os.environ.get("OPSD_KERNELS_DUMP") or None
_passes = count()

if LEVEL is not None:
    logger.setLevel(logging.INFO)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)


def before(problem: Problem, made: Any, workspace_bytes: float) -> None:
    """Log and write what a pass is about to compute.

    Args:
        problem: what the pass reads.
        made: the record of the tensors that the pass fills.
        workspace_bytes: the budget of the pass; 0 for the logit-free schedule.
    """
    if LEVEL is not None:
        logger.info("%s", described(problem, made, workspace_bytes))
    if LEVEL == "values":
        _log_values(problem)
    if FOLDER is not None:
        _write(Path(FOLDER), problem, made, workspace_bytes)


def after(made: Any) -> None:
    """Log what a pass has computed."""
    if LEVEL == "values":
        _log_values(made)


def described(problem: Problem, made: Any, workspace_bytes: float) -> str:
    """A pass in one line."""
    schedule = f"row workspace of {workspace_bytes / 2**20:g} MiB"
    tensors = [f"{name} {shaped(tensor)}" for name, tensor in tensors_of(problem).items()]
    parts = [
        _value_of(problem),
        f"temperature {problem.temperature:g}",
        "makes " + ", ".join(tensors_of(made)),
        schedule if workspace_bytes else "logit-free",
        f"operands {_name(problem.operand_dtype)}",
        *(f"{name} {value:g}" for name, value in _numbers(problem)),
        *([] if problem.group is None else [f"group {problem.group}"]),
        *tensors,
    ]
    return "; ".join(parts)


def shaped(t: Tensor) -> str:
    """Shape, dtype, device, and strides unless those are the usual ones."""
    strides = "" if t.is_contiguous() else f" strides {list(t.stride())}"
    return f"{list(t.shape)} {_name(t.dtype)} on {t.device}{strides}"


def tensors_of(record: Any) -> dict[str, Tensor]:
    """The tensors of a record, by name."""
    return {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}


def _value_of(problem: Problem) -> str:
    """ℓ in words."""
    member = problem.member
    if not member.is_divergence:
        name = member.family.name
    elif problem.w_q is None or problem.w_p is None:
        assert problem.beta is not None
        name = divergence_name(problem.beta, problem.entry_clip)
    else:
        name = divergence_name(
            Divergence(problem.beta, problem.w_q, problem.w_p, problem.entry_clip)
        )
    return name if problem.advantages is None else f"{name}, with a policy term"


def _numbers(problem: Problem) -> list[tuple[str, float]]:
    """The numbers of the heads that are not the usual ones."""
    usual = {"softcap": None, "softcap_T": None, "scale_T": 1.0}
    given = ((name, getattr(problem, name)) for name in usual)
    return [(name, value) for name, value in given if value != usual[name]]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _log_values(record: Any) -> None:
    for name, tensor in tensors_of(record).items():
        logger.info("    %s: %s", name, summarized(tensor))


def summarized(t: Tensor) -> str:
    """How many entries are NaN and infinite, and the largest size of the others."""
    if not t.is_floating_point():
        return "no entries" if t.numel() == 0 else f"from {int(t.min())} to {int(t.max())}"
    nan, infinite = int(t.isnan().sum()), int(t.isinf().sum())
    finite = t.detach().float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    largest = float(finite.abs().max()) if t.numel() else 0.0
    return f"{nan} NaN, {infinite} infinite, largest {largest:.6g}, of {t.numel()} entries"


def _write(folder: Path, problem: Problem, made: Any, workspace_bytes: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "problem": {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in vars(problem).items()
        },
        "record": type(made).__name__,
        "made": {name: (list(t.shape), t.dtype) for name, t in tensors_of(made).items()},
        "workspace_bytes": workspace_bytes,
    }
    torch.save(content, folder / f"{os.getpid()}-{next(_passes) % KEPT}.pt")
