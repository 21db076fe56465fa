"""The oracle: the same losses in float64 from materialized logits, with a closed-form backward.

Slow and large on purpose. What it shares with the fused op is the pointwise family
(`divergence.py`); that the family, and the closed-form backward, are right is proven in the tests
against autograd through Eq. 6 as it is written in the paper.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_kernels.divergence import divergence_rows_
from opsd_kernels.loss import (
    FLOAT_DTYPES,
    Reduction,
    check_divergence,
    check_reduction,
    check_tensors,
    check_weights,
    reduce_tokens,
)


def reference_jsd_loss(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    W_teacher: Tensor | None = None,
    workspace_mib: float | None = None,
) -> Tensor:
    """`fused_jsd_loss` in float64: same arguments, same meaning, and float64 inputs besides.

    `workspace_mib` is accepted and ignored: [N, V] float64 logits of both sides are materialized.

    Returns:
        float64 scalar, or [...] with reduction "none". The gradient has the dtype of `h_student`;
        pass `h_student.double()` to have it unrounded.
    """
    beta, temperature, entry_clip = check_divergence(beta, temperature, entry_clip)
    check_tensors(h_student, h_teacher, W, W_teacher, (*FLOAT_DTYPES, torch.float64))
    check_reduction(reduction)
    leading = h_student.shape[:-1]
    weights = check_weights(token_weights, leading, h_student.device)

    z_T = _logits(h_teacher.detach(), W if W_teacher is None else W_teacher, temperature)
    loss = _ReferenceDivergence.apply(
        h_student.reshape(-1, h_student.shape[-1]), z_T, W.detach(), beta, temperature, entry_clip
    )
    if weights is not None:
        weights = weights.double()
    return reduce_tokens(loss.reshape(leading), weights, reduction)


class _ReferenceDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_S: Tensor,
        z_T: Tensor,
        W: Tensor,
        beta: float,
        temperature: float,
        entry_clip: float | None,
    ) -> Tensor:
        z_S = _logits(h_S, W, temperature)
        loss = divergence_rows_(z_S, z_T, beta, entry_clip, needs_score=True)
        ctx.save_for_backward(z_S, W)  # z_S now holds a − G p
        ctx.temperature, ctx.dtype = temperature, h_S.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        dz_S, W = ctx.saved_tensors
        dh_S = dz_S @ W.double() / ctx.temperature
        # Selected, not multiplied: the row of a dropped token may hold NaN.
        dh_S = torch.where(grad_loss[:, None] != 0, grad_loss[:, None] * dh_S, 0)
        return dh_S.to(ctx.dtype), None, None, None, None, None


def _logits(h: Tensor, W: Tensor, temperature: float) -> Tensor:
    return h.reshape(-1, h.shape[-1]).double() @ W.detach().double().t() / temperature
