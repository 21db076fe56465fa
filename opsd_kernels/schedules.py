"""The two ways to compute one thing: which it is, its scratch, and how it is run.

Scratch is allocated here, for whoever counts allocations to see, and a schedule fills what it is
given. Called as usual, a schedule is plain Python: profilers and dispatch modes see every operation
in it. PyTorch's compiler, and fake tensors, see one opaque operator that writes into its arguments.
"""

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
        per_token = isinstance(problem.beta, Tensor)
        torch.ops.opsd_kernels.fill(
            outputs.loss,
            outputs.statistics,
            outputs.dh_S,
            scratch,
            problem.h_S,
            problem.h_T,
            problem.W,
            problem.W_T,
            problem.operand_dtype,
            None if per_token else problem.beta,
            problem.beta if per_token else None,
            problem.temperature,
            problem.entry_clip,
            problem.keep,
            problem.targets,
            workspace_bytes,
        )
    elif workspace_bytes == 0:
        from opsd_kernels import logit_free

        logit_free.fill(outputs, scratch, problem)
    else:
        row_workspace.fill(outputs, scratch, problem, workspace_bytes)


@torch.library.custom_op(
    "opsd_kernels::fill", mutates_args=("loss", "statistics", "dh_S", "scratch")
)
def _fill(
    loss: Tensor,
    statistics: Tensor | None,
    dh_S: Tensor | None,
    scratch: list[Tensor],
    h_S: Tensor,
    h_T: Tensor,
    W: Tensor,
    W_T: Tensor | None,
    operand_dtype: torch.dtype,
    beta: float | None,
    betas: Tensor | None,
    temperature: float,
    entry_clip: float | None,
    keep: Tensor | None,
    targets: Tensor | None,
    workspace_bytes: float,
) -> None:
    """`fill` with its arguments spelled out; β is `beta` or `betas`, if not None."""
    problem = Problem(
        h_S,
        h_T,
        W,
        W_T,
        operand_dtype,
        beta if betas is None else betas,
        temperature,
        entry_clip,
        keep,
        targets,
    )
    fill(Outputs(loss, statistics, dh_S), scratch, problem, workspace_bytes)


@_fill.register_fake
def _(*args: object) -> None:
    """Nothing is returned; what is filled has its shape already."""
