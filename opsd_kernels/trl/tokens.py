"""Losses of the tokens that count, of a batch [B, T] of which others do not."""

from typing import Any

from torch import Tensor

from opsd_kernels.head import LMHead
from opsd_kernels.loss import (
    SampledTokenLoss,
    TokenDivergence,
    fused_sampled_token_loss,
    token_divergence,
)
from opsd_kernels.trl.hidden_states import in_one_dtype


def divergence_of_tokens(
    h_student: Tensor,
    h_teacher: Tensor,
    head: LMHead,
    head_T: LMHead,
    mask: Tensor,
    *,
    targets: Tensor | None = None,
    **options: Any,
) -> TokenDivergence:
    """`token_divergence` of the n tokens where a mask [B, T] is true, [n] each. Others are not
    computed: on a GPU a weight of 0 would not spare them."""
    h_student, h_teacher, head, head_T = in_one_dtype(
        h_student[mask], h_teacher[mask], head, head_T
    )
    if targets is not None:
        options["targets"] = targets[mask]
    return token_divergence(h_student, h_teacher, head, W_teacher=head_T, **options)


def sampled_tokens(
    h_student: Tensor,
    h_teacher: Tensor,
    head: LMHead,
    head_T: LMHead,
    mask: Tensor,
    targets: Tensor,
    temperature: float,
) -> SampledTokenLoss:
    """`fused_sampled_token_loss` likewise, with both log-probabilities."""
    h_student, h_teacher, head, head_T = in_one_dtype(
        h_student[mask], h_teacher[mask], head, head_T
    )
    found = fused_sampled_token_loss(
        h_student,
        h_teacher,
        head,
        targets[mask],
        temperature=temperature,
        reduction="none",
        W_teacher=head_T,
        return_log_probs=True,
    )
    assert isinstance(found, SampledTokenLoss)
    return found


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """[B, T] of the values [n] of the tokens that count, 0 for the others."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
