"""The one autograd.Function: allocates every tensor, lets a schedule fill them, scales in backward.

Tokens are independent: token n's loss depends on row n of h_S alone. So the gradient of
Σ_n g_n ℓ_n is g_n times the gradient that forward made, for whatever upstream weights g_n arrive.
"""

from typing import Any

import torch
from torch import Tensor

from opsd_kernels import schedules
from opsd_kernels.divergence import STATISTICS
from opsd_kernels.problem import FIELDS, Outputs, Problem


def divergence_of_tokens(
    problem: Problem, needs_statistics: bool, workspace_bytes: float
) -> tuple[Tensor, Tensor | None]:
    """Loss and statistics of every token of a problem.

    Args:
        problem: the tokens. Those that it does not keep may be skipped: their results are
            undefined, and the caller selects.
        needs_statistics: whether statistics are wanted.
        workspace_bytes: bound on all temporaries with a vocabulary-sized dimension together; 0
            for none.

    Returns:
        The divergence, or log p of the targets where β is None, [N] fp32, differentiable with
        respect to h_S alone; and the statistics, [STATISTICS, N] fp32 without gradient.
    """
    # Under no_grad no gradient work is done.
    needs_gradient = torch.is_grad_enabled() and problem.h_S.requires_grad
    return _Divergence.apply(needs_statistics, needs_gradient, workspace_bytes, *problem.values())


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        needs_statistics: bool,
        needs_gradient: bool,
        workspace_bytes: float,
        *values: Any,
    ) -> tuple[Tensor, Tensor | None]:
        problem = Problem(*values)
        h_S = problem.h_S
        N, D = h_S.shape

        def zeros(*shape: int) -> Tensor:
            return h_S.new_zeros(shape, dtype=torch.float32)

        outputs = Outputs(
            zeros(N),
            zeros(STATISTICS, N) if needs_statistics else None,
            zeros(N, D) if needs_gradient else None,
        )
        scratch = schedules.allocate(problem, needs_gradient, needs_statistics, workspace_bytes)
        schedules.fill(outputs, scratch, problem, workspace_bytes)
        if outputs.dh_S is not None:
            ctx.save_for_backward(outputs.dh_S)
            ctx.dtype = h_S.dtype
        if outputs.statistics is not None:
            ctx.mark_non_differentiable(outputs.statistics)
        return outputs.loss, outputs.statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (dh_S,) = ctx.saved_tensors
        # A new tensor: scaling dh_S in place would make a second backward wrong. Rounded once.
        grad = torch.empty_like(dh_S, dtype=ctx.dtype)
        torch.mul(dh_S, grad_loss[:, None], out=grad)
        # Selected, not multiplied: a token that does not count may have a gradient of NaN.
        grad.masked_fill_((grad_loss == 0)[:, None], 0)
        gradients = dict.fromkeys(FIELDS) | {"h_S": grad}
        return None, None, None, *gradients.values()


def refuse_second_derivative() -> None:
    """To be called in backward: the second-order term would be left out in silence.
    (`once_differentiable` notices only an upstream gradient that itself requires one.)"""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("this loss has no second derivative: create_graph must be False")
