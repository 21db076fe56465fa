"""The losses of `ServerDistillationTrainer`, `AsyncDistillationTrainer` and of `IWOPDTrainer` with
`use_teacher_server`. The teacher is a server. At each position it gives the log-probabilities of
its K likeliest tokens, and of the token that was sampled.

The forward KL compares the teacher's K tokens. The reverse KL compares the sampled token. With
0 < β < 1 the divergence compares the teacher's likeliest token and the sampled one.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapting.patches import Hook
from ..checks import FLOAT_DTYPES
from ..heads.head import LMHead
from ..sparse import TopKLoss, fused_top_k_loss
from .heads import heads_of_models, in_dtype_of
from .hidden_states import SIGNATURES, prompts_and_completions, run_backbone
from .hooks import COMPUTE_LOSS, compute_loss_or_theirs, why_overridden
from .route import took
from .top_k import outside, why_too_many

SERVER, ASYNC = "ServerDistillationTrainer", "AsyncDistillationTrainer"
LOSSES: dict[str, dict[str, str | None]] = {
    trainer: {"beta=0": None, "0<beta<1": None, "beta=1": None} for trainer in (SERVER, ASYNC)
}
_TOP_1 = (
    "self, student_log_probs, teacher_top1_token_ids, teacher_top1_logprobs, reverse_token_ids, "
    "reverse_teacher_logprobs, labels, num_items_in_batch"
)
# Methods whose work ours does. A subclass that overrides one keeps TRL's own loss.
PARTS = {
    "_compute_server_forward_kl_loss": "self, teacher_result, student_log_probs, labels",
    "_compute_server_sparse_top_1_divergence_loss": (
        "self, teacher_result, student_log_probs, completion_tokens, labels"
    ),
    "_compute_sparse_top_1_divergence_loss": _TOP_1,
    "_get_reverse_kl_top_1_tokens": "self, student_scores, completion_tokens",
}
REDUCE = "_reduce_divergence_loss"


def _loss_of(beta: float) -> str:
    return f"beta={beta:.0f}" if beta in (0, 1) else "0<beta<1"


def _compute_loss(theirs: Callable[..., Any], base: type) -> Callable[..., Any]:
    def why_theirs(self: Any) -> str | None:
        return why_too_many(self.loss_top_k) or why_overridden(self, base, *PARTS, REDUCE)

    def ours(self: Any, model: Any, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
        text = prompts_and_completions(inputs)
        ids = inputs["completion_ids"]
        labels = torch.cat(
            [
                torch.full_like(inputs["prompt_ids"], -100),
                ids.masked_fill(inputs["completion_mask"] == 0, -100),
            ],
            dim=1,
        )
        given = {**inputs, **text, "labels": labels, "prompt_attention_mask": inputs["prompt_mask"]}
        loss = loss_of_server(self, model, given)
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1)

    return compute_loss_or_theirs(
        theirs,
        LOSSES[SERVER],
        lambda self: _loss_of(self.beta),
        why_theirs,
        ours,
        prompts_and_completions,
        teacher_of=lambda _: (),
    )


def loss_of_server(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """The mean loss over the tokens of this micro-batch.

    Args:
        inputs: `input_ids`, `attention_mask` and `labels` [B, L], and what
            `_get_teacher_token_logprobs_from_server` takes.
    """
    ids, labels = inputs["input_ids"], inputs["labels"]
    begin = trainer._compute_prompt_length(inputs)
    told = trainer._get_teacher_token_logprobs_from_server(inputs, begin)
    end = begin + told["actual_logprobs"].shape[1]  # of what the server has answered
    counts = labels[:, begin:end] != -100  # [B, K]
    at = torch.zeros_like(labels, dtype=torch.bool)
    at[:, begin - 1 : end - 1] = counts
    tokens, log_q = _support(
        trainer.beta,
        told["topk_token_ids"][counts],
        told["topk_logprobs"][counts],
        ids[:, begin:end][counts],
        told["actual_logprobs"][counts],
    )
    if trainer.beta > 0 and not log_q.isfinite().all():
        raise ValueError("the teacher's server gave no log-probability of a token that counts")

    def total(h: Tensor, student: Any) -> Tensor:
        with heads_of_models(student, student) as (W, _):
            loss = fused_top_k_loss(
                h,
                in_dtype_of(h, W),
                tokens.to(h.device),
                log_q.to(h.device),
                outside=outside(trainer.loss_add_tail),
                beta=trainer.beta,
                temperature=trainer.temperature,
                reduction="sum",
            )
            assert isinstance(loss, Tensor)
            return loss

    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    loss = run_backbone(trainer, model, at, total, **text)
    return loss / counts.sum().clamp(min=1).to(loss.device)


def _support(
    beta: float, top: Tensor, log_q_top: Tensor, sampled: Tensor, log_q_sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens [n, ·] that are compared, and the teacher's log-probabilities of them.

    Args:
        top, log_q_top: [n, K] the teacher's likeliest tokens, in order.
        sampled, log_q_sampled: [n] the token that was sampled.
    """
    if beta == 0:
        return top, log_q_top
    if beta == 1:
        return sampled[:, None], log_q_sampled[:, None]
    return (
        torch.stack([top[:, 0], sampled], dim=1),
        torch.stack([log_q_top[:, 0], log_q_sampled], dim=1),
    )


def _chunked_jsd_loss(theirs: Callable[..., Any], module: Any) -> Callable[..., Any]:
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def ours(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        given = signature.bind(*args, **kwargs).arguments
        dtype, tokens = given["hidden_valid"].dtype, given["target_ids"].shape[1]
        reason = why_too_many(tokens)
        if dtype not in FLOAT_DTYPES:
            reason = f"hidden states are {dtype}"
        took(ASYNC, _loss_of(given["beta"]), reason)
        if reason:
            return theirs(*args, **kwargs)
        return _sums(given)

    return ours


def _sums(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss for the arguments of the function that is replaced.

    Returns:
        Sums over tokens: the loss; the loss without gradient; the student's entropy; the teacher's
        entropy over the entries that are compared; and one vector with the number of tokens, the
        loss and the entropy of each teacher.
    """
    h, absent = given["hidden_valid"], ~given["valid_candidate_mask"]
    W = LMHead(
        given["lm_head_weight"],
        given["lm_head_bias"],
        given["final_logit_softcapping"],
        given["logit_scale"],
    )
    log_q = given["teacher_target_logps"].masked_fill(absent, -torch.inf)
    told = fused_top_k_loss(
        h,
        in_dtype_of(h, W),
        given["target_ids"],
        log_q,
        outside=outside(given["add_tail_bucket"]),
        beta=given["beta"],
        temperature=given["temperature"],
        reduction="none",
        return_statistics=True,
    )
    assert isinstance(told, TopKLoss)
    loss = told.loss.detach()
    entropy = _entropy(log_q, given["add_tail_bucket"])
    of_teachers = loss.new_zeros(given["num_teachers"], 3)
    if given["teacher_id_idx"] is not None:
        of_tokens = torch.stack([torch.ones_like(loss), loss, entropy], dim=1)
        of_teachers.index_add_(0, given["teacher_id_idx"], of_tokens)
    sums = told.loss.sum(), loss.sum(), told.entropy_student.sum(), entropy.sum()
    return *sums, of_teachers.flatten()


def _entropy(log_q: Tensor, add_tail: bool) -> Tensor:
    """The teacher's entropy [n] over the tokens [n, K] that are compared, and the rest.

    An absent token has log q = −∞. The rest has at least 1e-7, as in TRL.
    """
    log_mass = log_q.logsumexp(-1, keepdim=True)
    if add_tail:
        rest = (-log_mass.clamp(max=-1e-7).expm1()).log()
        log_q = torch.cat([log_q, rest], dim=1)
    else:
        log_q = torch.where(log_q == -torch.inf, log_q, log_q - log_mass)
    return -torch.where(log_q == -torch.inf, 0, log_q.exp() * log_q).sum(-1)


HOOKS = (
    Hook(
        SERVER,
        "trl.experimental.server_distillation.server_distillation_trainer",
        f"{SERVER}.compute_loss",
        _compute_loss,
        {f"{SERVER}.{name}": parameters for name, parameters in PARTS.items()}
        | {
            f"{SERVER}.compute_loss": COMPUTE_LOSS,
            f"{SERVER}._compute_prompt_length": "self, inputs",
            f"{SERVER}._get_teacher_token_logprobs_from_server": (
                "self, inputs, aligned_prompt_length"
            ),
            f"{SERVER}.{REDUCE}": "jsd, completion_mask, reduction, num_items_in_batch",
            **SIGNATURES,
        },
    ),
    Hook(
        ASYNC,
        "trl.experimental.async_distillation.async_distillation_trainer",
        "_chunked_jsd_loss",
        _chunked_jsd_loss,
        {
            "_chunked_jsd_loss": (
                "hidden_valid, lm_head_weight, lm_head_bias, logit_scale, "
                "final_logit_softcapping, target_ids, teacher_target_logps, valid_candidate_mask, "
                "beta, temperature, add_tail_bucket, teacher_id_idx, num_teachers, chunk_size"
            ),
        },
    ),
)
