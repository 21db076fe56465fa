"""The one autograd.Function: allocates every tensor, lets a schedule fill them, scales in backward.

Tokens are independent: token n's loss depends on row n of h_S alone. So the gradient of
Σ_n g_n ℓ_n is g_n times the gradient that forward made, for whatever upstream weights g_n arrive.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_kernels.problem import Problem
from opsd_kernels.row_workspace import fill_row_workspace, make_plan


class TokenDivergence(torch.autograd.Function):
    """Divergence of every token, [N] fp32, differentiable with respect to h_S alone.

    Args of `apply`:
        h_S, h_T: [N, D], [N, D_T] hidden states.
        W, W_T: [V, D], [V, D_T] LM heads; W_T is None if W serves both.
        keep: [N] bool, the tokens that will count, or None for all. The others may be skipped, and
            it is for the caller to select.
        needs_gradient: False under no_grad; then no gradient work is done.
        operand_dtype: the dtype whose rounding the operands of the matrix products have.
        workspace_bytes: bound on all temporaries with a vocabulary-sized dimension together; 0
            for none.
        beta, temperature, entry_clip: the divergence.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_S: Tensor,
        h_T: Tensor,
        W: Tensor,
        W_T: Tensor | None,
        keep: Tensor | None,
        needs_gradient: bool,
        operand_dtype: torch.dtype,
        workspace_bytes: float,
        beta: float,
        temperature: float,
        entry_clip: float | None,
    ) -> Tensor:
        N, D = h_S.shape
        problem = Problem(h_S, h_T, W, W_T, keep, operand_dtype, beta, temperature, entry_clip)
        loss = h_S.new_zeros(N, dtype=torch.float32)
        dh_S = h_S.new_zeros(N, D, dtype=torch.float32) if needs_gradient else None
        if workspace_bytes == 0:
            from opsd_kernels import logit_free  # needs Triton

            logit_free.fill_logit_free(
                loss, dh_S, logit_free.allocate(problem, needs_gradient), problem
            )
        else:
            rows = None
            if keep is not None and h_S.device.type == "cpu":
                # On a CPU reading the mask costs nothing; elsewhere it would stall the queue.
                rows = keep.nonzero().squeeze(-1)
            kept = N if rows is None else rows.shape[0]
            plan = make_plan(kept, problem.heads, operand_dtype, workspace_bytes)
            workspace = h_S.new_empty(2 * plan.rows, W.shape[0], dtype=torch.float32)
            fill_row_workspace(loss, dh_S, workspace, problem, rows, plan)
        if dh_S is not None:
            ctx.save_for_backward(dh_S)
            ctx.dtype = h_S.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (dh_S,) = ctx.saved_tensors
        # A new tensor: scaling dh_S in place would make a second backward wrong. Rounded once.
        grad = torch.empty_like(dh_S, dtype=ctx.dtype)
        torch.mul(dh_S, grad_loss[:, None], out=grad)
        # Selected, not multiplied: a token that does not count may have a gradient of NaN.
        grad.masked_fill_((grad_loss == 0)[:, None], 0)
        return grad, *(None,) * 10
