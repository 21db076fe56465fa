"""The two ways to compute one thing: which it is, its scratch, and how it is run.

Scratch is allocated here, for whoever counts allocations to see, and a schedule fills what it is
given. Called as usual, a schedule is plain Python: profilers and dispatch modes see every operation
in it. PyTorch's compiler, and fake tensors, see one opaque operator that writes into its arguments.
"""

from dataclasses import replace
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from opsd_kernels import row_workspace
from opsd_kernels.problem import Outputs, Problem


def allocate(
    problem: Problem, needs_gradient: bool, needs_statistics: bool, workspace_bytes: float
) -> list[Tensor]:
    """The scratch of `fill`: with a budget of 0 bytes that of the logit-free schedule."""
    if workspace_bytes == 0:
        from opsd_kernels import logit_free  # needs Triton

        return logit_free.allocate(problem, needs_gradient, needs_statistics)
    return row_workspace.allocate(problem, needs_statistics, workspace_bytes)


def fill(outputs: Outputs, scratch: list[Tensor], problem: Problem, workspace_bytes: float) -> None:
    """Fill the outputs by the schedule that the scratch is of."""
    if torch.compiler.is_compiling() or isinstance(outputs.loss, FakeTensor):
        beta, betas = problem.beta, None
        if isinstance(beta, Tensor):
            beta, betas = None, beta
        torch.ops.opsd_kernels.fill(
            outputs.loss,
            outputs.statistics,
            outputs.dh_S,
            scratch,
            *replace(problem, beta=beta).values(),
            betas,
            workspace_bytes,
        )
    elif workspace_bytes == 0:
        from opsd_kernels import logit_free

        logit_free.fill(outputs, scratch, problem)
    else:
        row_workspace.fill(outputs, scratch, problem, workspace_bytes)


def _schema() -> str:
    """Of the operator: what it writes into, a problem's fields, and the budget. An operator's
    argument has one type, so a β of each token is an argument of its own."""
    types = {
        Tensor: "Tensor",
        Tensor | None: "Tensor?",
        torch.dtype: "ScalarType",
        float: "float",
        float | None: "float?",
        float | Tensor | None: "float?",
    }
    hints = get_type_hints(Problem)
    fields = ", ".join(f"{types[hint]} {name}" for name, hint in hints.items())
    return (
        "(Tensor(a!) loss, Tensor(b!)? statistics, Tensor(c!)? dh_S, Tensor(d!)[] scratch, "
        f"{fields}, Tensor? betas, float workspace_bytes) -> ()"
    )


@torch.library.custom_op(
    "opsd_kernels::fill",
    mutates_args=("loss", "statistics", "dh_S", "scratch"),
    schema=_schema(),
)
def _fill(
    loss: Tensor,
    statistics: Tensor | None,
    dh_S: Tensor | None,
    scratch: list[Tensor],
    *rest: Any,
) -> None:
    """`fill` as an operator."""
    *values, betas, workspace_bytes = rest
    problem = Problem(*values)
    if betas is not None:
        problem = replace(problem, beta=betas)
    fill(Outputs(loss, statistics, dh_S), scratch, problem, workspace_bytes)


@_fill.register_fake
def _(*args: object) -> None:
    """Nothing is returned; what is filled has its shape already."""
