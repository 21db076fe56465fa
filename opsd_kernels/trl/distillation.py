"""The loss of `DistillationTrainer`, in place of TRL's function of the same hidden states and
heads."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapting.patches import Hook
from ..checks import FLOAT_DTYPES
from ..heads.head import LMHead
from ..loss import token_divergence
from .heads import gathered, in_one_dtype, whole
from .route import took

TRAINER, LOSS = "DistillationTrainer", "divergence"
LOSSES: dict[str, dict[str, str | None]] = {TRAINER: {LOSS: None}}


def _chunked_divergence_loss(theirs: Callable[..., Any], module: Any) -> Callable[..., Any]:
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def ours(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        for side in ("student", "teacher"):
            dtype = given[f"{side}_hidden_states"].dtype
            if dtype not in FLOAT_DTYPES:
                took(TRAINER, LOSS, f"hidden states are {dtype}")
                return theirs(*args, **kwargs)
        took(TRAINER, LOSS, None)
        return _loss(given)

    return ours


def _loss(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The loss for the arguments of the function that is replaced.

    Returns:
        The loss; and for the tokens of this process, the sum of the student's entropies and the
        number of tokens that count.
    """
    at = given["completion_mask"] != 0
    h_S, h_T = given["student_hidden_states"][at], given["teacher_hidden_states"][at]
    heads = [
        given[f"{side}_lm_head_{name}"]
        for side in ("student", "teacher")
        for name in ("weight", "bias")
    ]
    with gathered(*heads):
        W, W_T = _head(given, "student"), _head(given, "teacher").detach()
        if W_T.weight.shape[0] > W.weight.shape[0]:
            # The teacher's head has more padded rows: use as many as the student's head has.
            W_T = W_T._replace(vocab_size=W.weight.shape[0])
        h_S, W, h_T, W_teacher = in_one_dtype(h_S, W, h_T, W_T)
        stats = token_divergence(
            h_S,
            h_T,
            W,
            beta=given["beta"],
            temperature=given["temperature"],
            W_teacher=W_teacher,
        )
    total, count, items = stats.loss.sum(), at.sum(), given["num_items_in_batch"]
    scale = count.clamp(min=1) if items is None else torch.as_tensor(items, device=total.device)
    return total / scale, stats.entropy_student.sum(), count


def _head(given: dict[str, Any], side: str) -> LMHead:
    bias = given[f"{side}_lm_head_bias"]
    return LMHead(
        whole(given[f"{side}_lm_head_weight"]),
        None if bias is None else whole(bias),
        given[f"{side}_final_logit_softcapping"],
        given[f"{side}_logit_scale"],
    )


HOOKS = (
    Hook(
        TRAINER,
        "trl.trainer.distillation_trainer",
        "_chunked_divergence_loss",
        _chunked_divergence_loss,
        {
            "_chunked_divergence_loss": (
                "student_hidden_states, teacher_hidden_states, student_lm_head_weight, "
                "teacher_lm_head_weight, completion_mask, beta, num_items_in_batch, "
                "student_lm_head_bias, teacher_lm_head_bias, student_logit_scale, "
                "teacher_logit_scale, student_final_logit_softcapping, "
                "teacher_final_logit_softcapping, temperature"
            ),
            "DistillationTrainer._compute_loss": (
                "self, unwrapped_student, inputs, num_items_in_batch"
            ),
            "trl.trainer.utils:maybe_gather_lm_head_ctx": "params",
        },
    ),
)
