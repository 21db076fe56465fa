"""TRL's DistillationTrainer, which has hidden states and heads at hand."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.head import LMHead
from opsd_kernels.trl.hidden_states import whole
from opsd_kernels.trl.patches import say_once
from opsd_kernels.trl.tokens import divergence_of_tokens


def chunked_divergence_loss(
    own: Callable[..., Any],
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_chunked_divergence_loss`: the loss, the sum of the student's entropies, and how many tokens
    count. Hidden states are [B, T, D], the mask [B, T]."""
    if hasattr(student_lm_head_weight, "ds_id") and student_lm_head_weight.requires_grad:
        say_once("DistillationTrainer", "ZeRO-3 takes the weight of a trained head before backward")
        return own(
            student_hidden_states, teacher_hidden_states,
            student_lm_head_weight, teacher_lm_head_weight,
            completion_mask, beta, num_items_in_batch,
            student_lm_head_bias, teacher_lm_head_bias,
            student_logit_scale, teacher_logit_scale,
            student_final_logit_softcapping, teacher_final_logit_softcapping, temperature,
        )  # fmt: skip
    mask = completion_mask != 0
    student = student_lm_head_weight, student_lm_head_bias
    teacher = teacher_lm_head_weight, teacher_lm_head_bias
    with _gathered(*student, *teacher):
        told = divergence_of_tokens(
            student_hidden_states,
            teacher_hidden_states,
            _head(*student, student_final_logit_softcapping, student_logit_scale),
            _head(*teacher, teacher_final_logit_softcapping, teacher_logit_scale),
            mask,
            beta=beta,
            temperature=temperature,
        )
    valid = mask.sum()
    loss = told.loss.sum()
    if num_items_in_batch is None:
        loss = loss / valid.clamp(min=1)
    else:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
    return loss, told.entropy_student.sum(), valid


def _head(weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float) -> LMHead:
    return LMHead(whole(weight), None if bias is None else whole(bias), softcap, scale)


def _gathered(*tensors: Tensor | None) -> Any:
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*(t for t in tensors if isinstance(t, torch.nn.Parameter)))
