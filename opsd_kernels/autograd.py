"""The one autograd.Function: allocates every tensor, lets a schedule fill them, scales in backward.

Tokens are independent: token n's loss depends on row n of h_S alone. So the gradient of
Σ_n g_n ℓ_n is g_n times the gradient that forward made, for whatever upstream weights g_n arrive.
"""

from typing import Any

import torch
from torch import Tensor

from opsd_kernels import schedules
from opsd_kernels.divergence import STATISTICS
from opsd_kernels.problem import Outputs, Problem


class DivergenceFunction(torch.autograd.Function):
    """Divergence of every token, [N] fp32, differentiable with respect to h_S alone, and its
    statistics, [STATISTICS, N] fp32 without gradient.

    Args of `apply`:
        h_S, h_T: [N, D], [N, D_T] hidden states.
        W, W_T: [V, D], [V, D_T] LM heads; W_T is None if W serves both.
        beta, temperature, entry_clip: the divergence. β is a number, a tensor [N], or None: then
            log p of the targets takes the divergence's place.
        keep: [N] bool, the tokens that will count, or None for all. The others may be skipped, and
            it is for the caller to select.
        targets: [N] int32 ids of sampled tokens, within the vocabulary, or None.
        needs_statistics: whether they are wanted.
        needs_gradient: False under no_grad; then no gradient work is done.
        operand_dtype: the dtype whose rounding the operands of the matrix products have.
        workspace_bytes: bound on all temporaries with a vocabulary-sized dimension together; 0
            for none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_S: Tensor,
        h_T: Tensor,
        W: Tensor,
        W_T: Tensor | None,
        beta: float | Tensor | None,
        temperature: float,
        entry_clip: float | None,
        keep: Tensor | None,
        targets: Tensor | None,
        needs_statistics: bool,
        needs_gradient: bool,
        operand_dtype: torch.dtype,
        workspace_bytes: float,
    ) -> tuple[Tensor, Tensor | None]:
        problem = Problem(
            h_S, h_T, W, W_T, operand_dtype, beta, temperature, entry_clip, keep, targets
        )
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
        return grad, *(None,) * 12


def refuse_second_derivative() -> None:
    """To be called in backward: the second-order term would be left out in silence.
    (`once_differentiable` notices only an upstream gradient that itself requires one.)"""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("this loss has no second derivative: create_graph must be False")
