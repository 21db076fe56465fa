"""The oracle: the same losses in float64 from materialized logits, with a closed-form backward.

Slow and large on purpose. What it shares with the fused ops is the pointwise family
(`divergence.py`); that the family, and the closed-form backward, are right is proven in the tests
against autograd through the formulas as they are written in the paper.
"""

from typing import Any

import torch
from torch import Tensor

from opsd_kernels import divergence
from opsd_kernels.autograd import refuse_second_derivative
from opsd_kernels.checks import (
    FLOAT_DTYPES,
    check_arguments,
    check_beta,
    check_clip,
    check_reduction,
)
from opsd_kernels.divergence import divergence_rows_, log_prob_rows_
from opsd_kernels.loss import (
    Reduction,
    SampledTokenLoss,
    TokenDivergence,
    Tokens,
    reduce_tokens,
    tokens_of,
)


def reference_jsd_loss(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor,
    *,
    beta: float | Tensor = 0.5,
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
    check_reduction(reduction)
    tokens = _per_token(
        h_student,
        h_teacher,
        W,
        W_teacher,
        beta=beta if isinstance(beta, Tensor) else check_beta(beta),
        temperature=temperature,
        entry_clip=entry_clip,
        token_weights=token_weights,
    )
    return reduce_tokens(tokens.value, tokens.weights, reduction)


def reference_token_divergence(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor,
    *,
    beta: float | Tensor = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    W_teacher: Tensor | None = None,
    workspace_mib: float | None = None,
) -> TokenDivergence:
    """`token_divergence` in float64; see `reference_jsd_loss`."""
    tokens = _per_token(
        h_student,
        h_teacher,
        W,
        W_teacher,
        beta=beta if isinstance(beta, Tensor) else check_beta(beta),
        temperature=temperature,
        entry_clip=entry_clip,
        token_weights=token_weights,
        targets=targets,
    )
    return tokens.divergence()


def reference_sampled_token_loss(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    advantage_clip: float | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    W_teacher: Tensor | None = None,
    workspace_mib: float | None = None,
    return_log_probs: bool = False,
) -> Tensor | SampledTokenLoss:
    """`fused_sampled_token_loss` in float64; see `reference_jsd_loss`."""
    check_reduction(reduction)
    advantage_clip = check_clip("advantage_clip", advantage_clip)
    tokens = _per_token(
        h_student,
        h_teacher,
        W,
        W_teacher,
        beta=None,
        temperature=temperature,
        token_weights=token_weights,
        targets=targets,
    )
    return tokens.sampled_token_loss(advantage_clip, reduction, return_log_probs)


def _per_token(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor,
    W_teacher: Tensor | None,
    *,
    beta: float | Tensor | None,
    temperature: float,
    entry_clip: float | None = None,
    token_weights: Tensor | None,
    targets: Tensor | None = None,
) -> Tokens:
    """Check the arguments and run. β is None for log p of the targets."""
    checked = check_arguments(
        h_student,
        h_teacher,
        W,
        W_teacher,
        beta=beta,
        temperature=temperature,
        entry_clip=entry_clip,
        token_weights=token_weights,
        targets=targets,
        dtypes=(*FLOAT_DTYPES, torch.float64),
    )
    # A β of each token as the fused ops round it, so that it is the same divergence.
    beta = checked.beta.double() if isinstance(checked.beta, Tensor) else checked.beta
    teacher_head = W if W_teacher is None else W_teacher
    value, statistics = _ReferenceDivergence.apply(
        h_student.reshape(-1, h_student.shape[-1]),
        _logits(h_teacher.detach(), teacher_head, checked.temperature),
        W.detach(),
        beta,
        checked.temperature,
        checked.entry_clip,
        None if checked.targets is None else checked.targets.long(),
    )
    weights = None if checked.weights is None else checked.weights.double()
    return tokens_of(value, statistics, weights, checked.valid, h_student.shape[:-1])


class _ReferenceDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_S: Tensor,
        z_T: Tensor,
        W: Tensor,
        beta: float | Tensor | None,
        temperature: float,
        entry_clip: float | None,
        targets: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        z_S = _logits(h_S, W, temperature)
        statistics = z_S.new_zeros(divergence.STATISTICS, z_S.shape[0])
        if beta is None:
            assert targets is not None
            loss = log_prob_rows_(z_S, z_T, targets, True, statistics)
        else:
            loss = divergence_rows_(z_S, z_T, beta, entry_clip, True, statistics, targets)
        ctx.save_for_backward(z_S, W)  # z_S now holds the gradient
        ctx.temperature, ctx.dtype = temperature, h_S.dtype
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        dz_S, W = ctx.saved_tensors
        dh_S = dz_S @ W.double() / ctx.temperature
        # Selected, not multiplied: the row of a dropped token may hold NaN.
        dh_S = torch.where(grad_loss[:, None] != 0, grad_loss[:, None] * dh_S, 0)
        return dh_S.to(ctx.dtype), *(None,) * 6


def _logits(h: Tensor, W: Tensor, temperature: float) -> Tensor:
    return h.reshape(-1, h.shape[-1]).double() @ W.detach().double().t() / temperature
