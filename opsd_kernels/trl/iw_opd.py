"""The losses of `IWOPDTrainer`: a divergence on the whole vocabulary or on the likeliest tokens, or
"iw_opd", a loss on the sampled tokens. The teacher is a model or a server.

β weighs the teacher, and names the forward KL at 0 and the reverse KL at 1, as in `fused_jsd_loss`.
Logits are divided by the temperature.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapting.patches import Hook
from ..heads.head import LMHead
from ..loss import fused_log_probs
from ..top_k import fused_top_k
from .heads import heads_of_models, in_dtype_of
from .hidden_states import (
    SIGNATURES,
    loss_of_student,
    predicting,
    run_backbone,
    teacher_hidden_states,
)
from .hooks import COMPUTE_LOSS, compute_loss_or_theirs, why_overridden
from .on_policy import JSD, divergence, loss_of_labels, text
from .server import PARTS as SERVER_PARTS
from .server import loss_of_server
from .top_k import top_k_loss, why_too_many

LOSSES: dict[str, dict[str, str | None]] = {
    "IWOPDTrainer": {
        "jsd, loss_top_k=0": None,
        "jsd, loss_top_k>0": None,
        "jsd, use_teacher_server": None,
        "iw_opd": None,
        "iw_opd, use_teacher_server": None,
    }
}
# Methods whose work ours does. A subclass that overrides one keeps TRL's own loss.
PARTS = {
    "generalized_jsd_loss": f"{JSD}, top_k, add_tail, num_items_in_batch",
    "_compute_local_sparse_top_1_divergence_loss": (
        "self, student_logits, teacher_logits, completion_tokens, labels, num_items_in_batch"
    ),
    "_get_teacher_logits": "self, inputs",
    "_reduce_divergence_loss": "jsd, labels, reduction, num_items_in_batch",
    **SERVER_PARTS,
}


def _loss_of(trainer: Any) -> str:
    objective = str(trainer.distillation_objective)
    if trainer.use_teacher_server:
        return f"{objective}, use_teacher_server"
    if objective == "jsd":
        return "jsd, loss_top_k>0" if trainer.loss_top_k > 0 else "jsd, loss_top_k=0"
    return objective


def _compute_loss(theirs: Callable[..., Any], base: type) -> Callable[..., Any]:
    def why_theirs(self: Any) -> str | None:
        if self.distillation_objective == "iw_opd":
            return why_overridden(self, base, "_get_teacher_logits")
        tokens = 2 * self.loss_top_k if 0 < self.beta < 1 else self.loss_top_k
        return why_too_many(tokens) or why_overridden(self, base, *PARTS)

    def ours(self: Any, model: Any, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
        self._raise_if_local_teacher_tokenizer_mismatch()
        if self.distillation_objective == "iw_opd":
            return _iw_opd_loss(self, model, inputs, items)
        if self.use_teacher_server:
            return loss_of_server(self, model, inputs)
        begin = self._compute_prompt_length(inputs)
        labels, ids = inputs["labels"][:, begin:], inputs["input_ids"][:, begin:]
        loss = divergence(self.beta, self.temperature)
        if self.loss_top_k > 0:
            loss = functools.partial(_top_k_loss, self, ids[labels != -100])
        return loss_of_labels(self, model, labels, text(inputs), loss, items)

    def teacher_of(self: Any) -> tuple[Any, ...]:
        return () if self.use_teacher_server else (self.teacher_model,)

    losses = LOSSES["IWOPDTrainer"]
    return compute_loss_or_theirs(theirs, losses, _loss_of, why_theirs, ours, text, teacher_of)


def _top_k_loss(
    trainer: Any, ids: Tensor, h_S: Tensor, W: LMHead, h_T: Tensor, W_T: LMHead | None
) -> Tensor:
    """Σ ℓ on the likeliest tokens: the teacher's for the forward KL, the student's for the reverse
    KL, both for 0 < β < 1. With `loss_top_k` = 1 the sampled token stands for the student's
    likeliest, unless the config asks for the likeliest.

    Args:
        ids: [n] the tokens that were sampled.
    """
    k, beta, T = trainer.loss_top_k, trainer.beta, trainer.temperature
    if k >= W.weight.shape[0]:
        return divergence(beta, T)(h_S, W, h_T, W_T)
    tokens = []
    if beta < 1:
        tokens.append(fused_top_k(h_T, W if W_T is None else W_T, k, temperature=T).ids)
    if beta > 0 and k == 1 and trainer.reverse_kl_top_1_mode == "sampled":
        tokens.append(ids[:, None].to(h_S.device))
    elif beta > 0:
        tokens.append(fused_top_k(h_S, W, k, temperature=T).ids)
    return top_k_loss(
        h_S,
        W,
        h_T,
        W_T,
        torch.cat(tokens, dim=1),
        add_tail=trainer.loss_add_tail,
        beta=beta,
        temperature=T,
    ).sum()


def _iw_opd_loss(
    trainer: Any, model: Any, inputs: dict[str, Any], items: Tensor | int | None
) -> Tensor:
    """TRL's own loss, from logits of two entries: the sampled token, and all others together."""
    begin, T = trainer._compute_prompt_length(inputs), trainer.temperature
    labels = inputs["labels"][:, begin:]
    counts = labels != -100  # [B, K]
    ids = inputs["input_ids"][:, begin:][counts]
    at = predicting(counts, inputs["input_ids"].shape[1])

    def of_two(h: Tensor, W: LMHead) -> Tensor:
        log_p, log_rest = fused_log_probs(h, W, ids[:, None].to(h.device), rest=True, temperature=T)
        return torch.cat([log_p, log_rest[:, None]], dim=1)  # [n, 2]

    def beside_teacher(
        h_S: Tensor, W: LMHead, h_T: Tensor, W_T: LMHead | None
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            targets, W_T = ids.to(h_T.device), W if W_T is None else W_T
            log_q = fused_log_probs(h_T, W_T, targets, temperature=T)
        return of_two(h_S, W), log_q

    def alone(h: Tensor, student: Any) -> Tensor:
        with heads_of_models(student, student) as (W, _):
            return of_two(h, in_dtype_of(h, W))

    if trainer.use_teacher_server:
        told = trainer._get_teacher_token_logprobs_from_server(inputs, begin)["actual_logprobs"]
        log_q = torch.full(labels.shape, torch.nan, device=told.device)
        log_q[:, : told.shape[1]] = told
        log_p = run_backbone(trainer, model, at, alone, **text(inputs))
    else:
        teacher = trainer.teacher_model
        teacher.eval()
        h_T = teacher_hidden_states(trainer, teacher, at, **text(inputs))
        log_p, of_tokens = loss_of_student(
            trainer, model, beside_teacher, h_T, teacher, at, **text(inputs)
        )
        log_q = of_tokens.new_zeros(labels.shape).masked_scatter(
            counts.to(of_tokens.device), of_tokens
        )
    counts = counts.to(log_p.device)[..., None]
    logits = T * log_p.new_zeros(*labels.shape, 2).masked_scatter(counts, log_p)
    rollout = inputs.get("rollout_logprobs")
    loss: Tensor = trainer._compute_iw_opd_loss(
        student_logits=logits,
        completion_tokens=torch.zeros_like(labels),
        labels=labels,
        teacher_actual_logprobs=log_q,
        rollout_logprobs=None if rollout is None else rollout[:, begin:],
        num_items_in_batch=items,
    )
    return loss


HOOKS = (
    Hook(
        "IWOPDTrainer",
        "trl.experimental.iw_opd.iw_opd_trainer",
        "IWOPDTrainer.compute_loss",
        _compute_loss,
        {
            "IWOPDTrainer.compute_loss": COMPUTE_LOSS,
            "IWOPDTrainer._compute_iw_opd_loss": (
                "self, student_logits, completion_tokens, labels, teacher_actual_logprobs, "
                "rollout_logprobs, num_items_in_batch"
            ),
            "IWOPDTrainer._compute_prompt_length": "self, inputs",
            "IWOPDTrainer._raise_if_local_teacher_tokenizer_mismatch": "self",
            "IWOPDTrainer._get_teacher_token_logprobs_from_server": (
                "self, inputs, aligned_prompt_length"
            ),
            **{f"IWOPDTrainer.{name}": parameters for name, parameters in PARTS.items()},
            **SIGNATURES,
        },
    ),
)
