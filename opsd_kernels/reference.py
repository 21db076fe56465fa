"""The oracle: the same losses in float64 from materialized logits, with a closed-form backward.

Slow and large on purpose. What it shares with the fused ops is the pointwise family
(`divergence.py`); that the family, and the closed-form backward, are right is proven in the tests
against autograd through the formulas as they are written in the paper.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import divergence
from opsd_kernels.autograd import refuse_second_derivative
from opsd_kernels.checks import (
    FLOAT_DTYPES,
    Arguments,
    check_arguments,
    check_number_beta,
    check_reduction,
)
from opsd_kernels.description import Divergence
from opsd_kernels.head import LMHead, LogitMap
from opsd_kernels.loss import (
    Reduction,
    SampledTokenLoss,
    TokenDivergence,
    Tokens,
    check_divergence_arguments,
    either_divergence,
    reduce_tokens,
    tokens_of,
)
from opsd_kernels.problem import Problem
from opsd_kernels.rows import member_rows_
from opsd_kernels.scalars import check_clip

DTYPES = (*FLOAT_DTYPES, torch.float64)


def reference_jsd_loss(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor | LMHead,
    *,
    beta: float | Tensor = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    W_teacher: Tensor | LMHead | None = None,
    workspace_mib: float | None = None,
) -> Tensor:
    """`fused_jsd_loss` in float64: same arguments, same meaning, and float64 inputs besides.

    `workspace_mib` is accepted and ignored: [N, V] float64 logits of both sides are materialized.

    Returns:
        float64 scalar, or [...] with reduction "none". The gradient has the dtype of `h_student`;
        pass `h_student.double()` to have it unrounded.
    """
    check_reduction(reduction)
    checked = check_arguments(
        {"h_student": h_student, "h_teacher": h_teacher},
        W,
        W_teacher,
        beta=check_number_beta(beta),
        temperature=temperature,
        entry_clip=entry_clip,
        token_weights=token_weights,
        reduction=reduction,
        dtypes=DTYPES,
    )
    tokens = _compute(checked)
    return reduce_tokens(tokens.value, tokens.weights, reduction)


def reference_token_divergence(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor | LMHead,
    *,
    beta: float | Tensor = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    divergence: Divergence | None = None,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    token_weights: Tensor | None = None,
    W_teacher: Tensor | LMHead | None = None,
    workspace_mib: float | None = None,
) -> TokenDivergence:
    """`token_divergence` in float64; see `reference_jsd_loss`."""
    checked = check_divergence_arguments(
        {"h_student": h_student, "h_teacher": h_teacher},
        W,
        either_divergence(beta, entry_clip, divergence),
        temperature=temperature,
        token_weights=token_weights,
        targets=targets,
        advantages=advantages,
        W_teacher=W_teacher,
        dtypes=DTYPES,
    )
    tokens = _compute(checked)
    return tokens.divergence()


def reference_divergence_loss(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor | LMHead,
    divergence: Divergence,
    *,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    W_teacher: Tensor | LMHead | None = None,
    workspace_mib: float | None = None,
) -> Tensor:
    """`fused_divergence_loss` in float64; see `reference_jsd_loss`."""
    check_reduction(reduction)
    checked = check_divergence_arguments(
        {"h_student": h_student, "h_teacher": h_teacher},
        W,
        divergence,
        targets=targets,
        advantages=advantages,
        temperature=temperature,
        token_weights=token_weights,
        reduction=reduction,
        W_teacher=W_teacher,
        dtypes=DTYPES,
    )
    tokens = _compute(checked)
    return reduce_tokens(tokens.value, tokens.weights, reduction)


def reference_sampled_token_loss(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor | LMHead,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    advantage_clip: float | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    W_teacher: Tensor | LMHead | None = None,
    workspace_mib: float | None = None,
    return_log_probs: bool = False,
) -> Tensor | SampledTokenLoss:
    """`fused_sampled_token_loss` in float64; see `reference_jsd_loss`."""
    check_reduction(reduction)
    advantage_clip = check_clip("advantage_clip", advantage_clip)
    checked = check_arguments(
        {"h_student": h_student, "h_teacher": h_teacher},
        W,
        W_teacher,
        beta=None,
        temperature=temperature,
        token_weights=token_weights,
        reduction=reduction,
        targets=targets,
        dtypes=DTYPES,
    )
    tokens = _compute(checked)
    return tokens.sampled_token_loss(advantage_clip, reduction, return_log_probs)


def reference_log_probs(
    h: Tensor,
    W: Tensor | LMHead,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    workspace_mib: float | None = None,
) -> Tensor:
    """`fused_log_probs` in float64; see `reference_jsd_loss`."""
    checked = check_arguments(
        {"h": h},
        W,
        None,
        beta=None,
        temperature=temperature,
        token_weights=token_weights,
        targets=targets,
        dtypes=DTYPES,
    )
    return _compute(checked).log_probs()


def reference_entropy(
    h: Tensor,
    W: Tensor | LMHead,
    *,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    workspace_mib: float | None = None,
) -> Tensor:
    """`fused_entropy` in float64; see `reference_jsd_loss`."""
    checked = check_arguments(
        {"h": h},
        W,
        None,
        beta=None,
        temperature=temperature,
        token_weights=token_weights,
        entropy=True,
        dtypes=DTYPES,
    )
    return _compute(checked).entropies()


def _compute(checked: Arguments) -> Tokens:
    problem = checked.problem
    if problem.group is not None:
        raise ValueError("the oracle takes the whole head: W.group must be None")
    # What belongs to a token as the fused ops round it, so that it is the same loss.
    rounded: dict[str, Any] = {
        name: getattr(problem, name) for name in ("beta", "w_q", "w_p", "advantages")
    }
    of_tokens: dict[str, Any] = {
        k: t.double() if isinstance(t, Tensor) else t for k, t in rounded.items()
    }
    targets = None if problem.targets is None else problem.targets.long()
    weights = None if checked.weights is None else checked.weights.double()
    problem = replace(problem, targets=targets, **of_tokens)
    results = _ReferenceDivergence.apply(checked.h_S, checked.weight, checked.bias, problem)
    return tokens_of(checked._replace(weights=weights), *results)


class _ReferenceDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_S: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem
    ) -> tuple[Tensor, Tensor | None]:
        W, temperature = problem.W, problem.temperature
        map_S, map_T = problem.logit_maps
        z_S, slope = _logits(h_S, W, map_S, temperature)
        z_T = statistics = None
        if problem.h_T is not None:
            W_T = W if problem.W_T is None else problem.W_T
            z_T, _ = _logits(problem.h_T, W_T, map_T, temperature)
            statistics = z_S.new_zeros(divergence.STATISTICS, z_S.shape[0])
        loss = member_rows_(
            z_S,
            z_T,
            problem.member,
            True,
            statistics,
            problem.targets,
            problem.advantages,
        )
        if slope is not None:
            z_S.mul_(slope)
        ctx.save_for_backward(z_S, h_S, weight, bias)  # z_S now holds the gradient
        ctx.temperature = temperature
        if statistics is not None:
            ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        dz_S, h_S, weight, bias = ctx.saved_tensors
        # Selected, not multiplied: what does not count may hold NaN.
        counts = (grad_loss != 0)[:, None]
        dz_S = torch.where(counts, grad_loss[:, None] * dz_S / ctx.temperature, 0)
        V = dz_S.shape[1]
        dh_S = (dz_S @ weight[:V].double()).to(h_S.dtype)
        dW, db = torch.zeros_like(weight), None
        dW[:V] = dz_S.t() @ torch.where(counts, h_S.double(), 0)
        if bias is not None:
            db = torch.zeros_like(bias)
            db[:V] = dz_S.sum(0)
        return dh_S, dW, db, None


def _logits(
    h: Tensor, W: Tensor, logit_map: LogitMap, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """Logits [N, V], and the slope of a softcap where they are."""
    z = h.double() @ W.double().t()
    slope = logit_map.apply_(z, needs_slope=True)
    return z.div_(temperature), slope
