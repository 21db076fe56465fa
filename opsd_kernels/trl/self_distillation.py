"""TRL's SDFTTrainer and SDPOTrainer: the same model is the teacher, with more to read.

Theirs makes logits of both sides, and of these a loss. Ours makes the losses of tokens where logits
were made, inside the student's forward, and leaves the rest as it is: an importance ratio, the mean
of each sequence, then of the batch, and what is logged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.trl.hidden_states import (
    check_model,
    gathered,
    head_of,
    hidden_states,
    inside,
    teacher_hidden_states,
)
from opsd_kernels.trl.patches import say_once
from opsd_kernels.trl.tokens import divergence_of_tokens, sampled_tokens, spread

POSITIONS = slice(None, -1)  # that predict a token


@dataclass
class TokenLosses:
    """In place of `DistillationLogits`: [B, T] each, 0 where the mask is."""

    completion_ids: Tensor
    loss_mask: Tensor
    per_token_loss: Tensor
    logp_student: Tensor


def token_losses(own: Callable[..., Any], self: Any, model: Any, teacher: Any, inputs: Any) -> Any:
    """`_compute_teacher_student_logits`."""
    reason = _reason_for_own(self, self.accelerator.unwrap_model(teacher))
    if reason is not None:
        say_once(type(self).__name__, reason)
        return own(self, model, teacher, inputs)
    completion_ids = inputs["completion_ids"]
    T, loss_mask = completion_ids.shape[1], _loss_mask(self, inputs)
    mask = loss_mask != 0
    given = _joined(inputs, inputs["prompt_ids"], inputs["prompt_mask"])
    with self._get_teacher_context_for_self_distillation():
        h_T = _last(
            teacher_hidden_states(
                self,
                teacher,
                {
                    "input_ids": inputs["teacher_input_ids"],
                    "attention_mask": inputs["teacher_attention_mask"],
                },
                POSITIONS,
            ),
            T,
        )
    own_teacher = self.accelerator.unwrap_model(teacher)

    def losses(student: Any) -> tuple[Tensor, Tensor]:
        h_S = _last(hidden_states(student, given, POSITIONS), T)
        with gathered(student, own_teacher):
            heads = head_of(student), head_of(own_teacher)
            if self.args.distillation_mode == "sampled_token":
                found = sampled_tokens(h_S, h_T, *heads, mask, completion_ids, self.temperature)
                return found.loss, found.logp_student
            told = divergence_of_tokens(
                h_S,
                h_T,
                *heads,
                mask,
                targets=completion_ids,
                beta=self.args.distillation_alpha,
                temperature=self.temperature,
            )
            assert told.logp_student is not None
            return told.loss, told.logp_student

    loss, logp = inside(self, model, losses)
    return TokenLosses(completion_ids, loss_mask, spread(loss, mask), spread(logp, mask))


def self_distillation_loss(
    own: Callable[..., Any], self: Any, model: Any, inputs: Any, distillation_logits: Any
) -> Tensor:
    """`_compute_self_distillation_loss`."""
    if not isinstance(distillation_logits, TokenLosses):
        return own(self, model, inputs, distillation_logits)
    found = distillation_logits
    loss, mask = found.per_token_loss, found.loss_mask
    mode = "train" if model.training else "eval"
    if mask.sum() == 0:
        self._log_self_distillation_metric(mode, 0.0)
        return loss.sum() * 0.0
    old_logps = inputs.get("old_per_token_logps")
    if self.args.distillation_is_clip is not None and old_logps is not None:
        log_ratio = (found.logp_student - old_logps).clamp(-20.0, 20.0)
        loss = loss * log_ratio.exp().clamp(max=self.args.distillation_is_clip)
    of_sequences = (loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
    mean = ((loss * mask).sum() / mask.sum().clamp(min=1.0)).detach()
    self._log_self_distillation_metric(mode, self.accelerator.gather(mean).mean().item())
    return of_sequences.mean()


def rollout_logps(
    own: Callable[..., Any],
    self: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
) -> Tensor | None:
    """`_compute_rollout_logps`: log p of a rollout's tokens [B, T], where they will be wanted."""
    generate_every = self.args.steps_per_generation * self.num_iterations
    reason = _reason_for_own(self, self.accelerator.unwrap_model(self.model))
    if reason is not None or self.args.gradient_accumulation_steps % generate_every == 0:
        return own(self, prompt_ids, prompt_mask, completion_ids, completion_mask)
    inputs = {"completion_ids": completion_ids, "completion_mask": completion_mask}
    given, mask = _joined(inputs, prompt_ids, prompt_mask), completion_mask != 0

    def logps(model: Any) -> Tensor:
        h = _last(hidden_states(model, given, POSITIONS), completion_ids.shape[1])
        with gathered(model):
            head = head_of(model).detach()
            found = sampled_tokens(h, h, head, head, mask, completion_ids, self.temperature)
        return found.logp_student

    with torch.no_grad():
        return spread(inside(self, self.model, logps), mask)


def _reason_for_own(self: Any, teacher: Any) -> str | None:
    """Why this trainer's own code is to run; None if ours is."""
    args = self.args
    if args.distillation_mode not in ("full_logits", "sampled_token"):
        return f"distillation_mode={args.distillation_mode!r} is of some entries, not of all"
    if args.distillation_mode == "sampled_token" and args.distillation_alpha != 1.0:
        return "distillation_mode='sampled_token' wants distillation_alpha=1"  # theirs will say so
    if getattr(args, "distillation_weight", 1.0) != 1.0:
        return "distillation_weight is not 1: the policy's loss wants log p with its gradient"
    try:
        for model in (self.accelerator.unwrap_model(self.model), teacher):
            check_model(model)
    except ValueError as error:
        return str(error)
    return None


def _loss_mask(self: Any, inputs: Any) -> Tensor:
    """[B, T] the tokens that count: without the first few (SDFT), or of problems solved (SDPO)."""
    mask = inputs["completion_mask"]
    skipped = getattr(self, "num_loss_tokens_to_skip", 0)
    if skipped > 0:
        mask = mask * (torch.arange(mask.shape[1], device=mask.device) >= skipped)
    of_sequences = inputs.get("self_distillation_mask")
    return mask if of_sequences is None else mask * of_sequences.unsqueeze(1)


def _joined(inputs: Any, prompt_ids: Tensor, prompt_mask: Tensor) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat([prompt_ids, inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([prompt_mask, inputs["completion_mask"]], dim=1),
    }


def _last(h: Tensor, T: int) -> Tensor:
    return h[:, -T:]
