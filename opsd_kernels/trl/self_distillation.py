"""The losses of `SDFTTrainer` and `SDPOTrainer`: the teacher reads another prompt, and is the same
model, without its adapter or as it was some steps ago.

α, their weight of the teacher in the mixture, is our β: the forward KL at 0, the reverse KL at 1.
The temperature that they sample at divides both sides' logits in the loss as well.

The teacher is forwarded first: what wraps both is left as the student's backward expects it.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.head import LMHead
from opsd_kernels.loss import (
    fused_jsd_loss,
    fused_log_probs,
    fused_sampled_token_loss,
    token_divergence,
)
from opsd_kernels.trl.heads import heads_of_models, in_one_dtype
from opsd_kernels.trl.hidden_states import (
    SIGNATURES,
    loss_of_student,
    predicting,
    run_backbone,
    teacher_hidden_states,
    why_no_hidden_states,
    why_other_logits,
)
from opsd_kernels.trl.hooks import COMPUTE_LOSS, Hook, compute_loss_or_theirs, why_overridden

# What ours does the work of, and a subclass may do in its own way.
PARTS = {
    "_compute_teacher_student_logits": "self, model, teacher_model, inputs",
    "_compute_self_distillation_loss": "self, model, inputs, distillation_logits",
    "_forward_logits": "self, model, input_ids, attention_mask, logits_to_keep",
}


def _compute_loss(theirs: Callable[..., Any], base: type) -> Callable[..., Any]:
    def why_theirs(self: Any, model: Any) -> str | None:
        return _why_theirs(self, base) or why_no_hidden_states(self, model, self.teacher_model)

    def ours(self: Any, model: Any, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
        loss = _loss(self, model, inputs)
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1)

    def other_logits(self: Any, model: Any, inputs: dict[str, Any]) -> str | None:
        return why_other_logits(self, (model, self.teacher_model), **_text(inputs))

    return compute_loss_or_theirs(theirs, why_theirs, ours, other_logits)


def _compute_rollout_logps(theirs: Callable[..., Any], base: type) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def log_p(
        self: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
    ) -> Tensor | None:
        text = _text(
            {
                "prompt_ids": prompt_ids,
                "prompt_mask": prompt_mask,
                "completion_ids": completion_ids,
                "completion_mask": completion_mask,
            }
        )
        if (
            _why_theirs(self, base)
            or why_no_hidden_states(self, self.model)
            or why_other_logits(self, (self.model,), **text)
        ):
            return theirs(self, prompt_ids, prompt_mask, completion_ids, completion_mask)
        generate_every = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % generate_every == 0:
            return None  # The student has not moved since.
        return _log_p_of_student(self, completion_ids, completion_mask, text)

    return log_p


def _why_theirs(trainer: Any, base: type) -> str | None:
    args = trainer.args
    if args.use_teacher_server:
        return "a server tells some log-probabilities of the teacher's, not its hidden states"
    if args.distillation_mode not in ("full_logits", "sampled_token"):
        return f"distillation_mode={args.distillation_mode!r} is not the whole vocabulary"
    if args.distillation_mode == "sampled_token" and args.distillation_alpha != 1:
        return f"distillation_alpha={args.distillation_alpha} of sampled tokens is refused by TRL"
    weight = getattr(args, "distillation_weight", 1.0)
    if weight != 1:
        return f"distillation_weight={weight} has a policy loss too, of the student's logits"
    return why_overridden(trainer, base, *PARTS)


def _loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """The mean over sequences of their means over tokens; logs the mean over tokens."""
    mask = _mask(trainer, inputs)  # [B, K]
    teacher, text = trainer.teacher_model, _text(inputs)

    with trainer._get_teacher_context_for_self_distillation():
        h_T = teacher_hidden_states(
            trainer,
            teacher,
            predicting(mask, inputs["teacher_input_ids"].shape[1]),
            input_ids=inputs["teacher_input_ids"],
            attention_mask=inputs["teacher_attention_mask"],
        )
    loss_of_tokens = functools.partial(
        _loss_of_tokens, trainer.args, trainer.temperature, *_of_tokens(inputs, mask)
    )
    of_tokens = loss_of_student(
        trainer,
        model,
        loss_of_tokens,
        h_T,
        teacher,
        predicting(mask, text["input_ids"].shape[1]),
        **text,
    )
    mask = mask.to(of_tokens.device)
    # Without tokens the sum is 0, and still has the student's graph.
    of_tokens = of_tokens * mask[mask != 0]
    share = 1 / (mask.sum(-1, keepdim=True).clamp(min=1) * mask.shape[0])  # [B, 1]
    mean = of_tokens.detach().sum() / mask.sum().clamp(min=1)
    trainer._log_self_distillation_metric(
        "train" if model.training else "eval", trainer.accelerator.gather(mean).mean().item()
    )
    return (of_tokens * share.expand_as(mask)[mask != 0]).sum()


def _text(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What the student reads, [B, L]."""
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    }


def _mask(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """[B, K] of the completion's tokens that count: SDFT skips the first of each, SDPO the
    sequences that have nothing to learn from."""
    mask = inputs["completion_mask"]
    skipped = getattr(trainer, "num_loss_tokens_to_skip", 0)
    of_sequences = inputs.get("self_distillation_mask")
    if of_sequences is not None:
        mask = mask * of_sequences.unsqueeze(1)
    return mask * (torch.arange(mask.shape[1], device=mask.device) >= skipped)


def _of_tokens(inputs: dict[str, Any], mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """[n] ids of the tokens that count, and the student's log p of them when they were sampled."""
    log_p = inputs.get("old_per_token_logps")
    return inputs["completion_ids"][mask != 0], None if log_p is None else log_p[mask != 0]


def _loss_of_tokens(
    args: Any,
    temperature: float,
    ids: Tensor,
    old_log_p: Tensor | None,
    h_S: Tensor,
    W: LMHead,
    h_T: Tensor,
    W_T: LMHead | None,
) -> Tensor:
    """[n], weighed by how much likelier than when it was sampled each token is, up to a clip."""
    from trl.experimental.sdft.loss_utils import apply_importance_sampling_clipping

    ids = ids.to(h_S.device)
    is_clipped = old_log_p is not None and args.distillation_is_clip is not None
    if args.distillation_mode == "sampled_token":
        loss, log_p, _ = fused_sampled_token_loss(
            h_S,
            h_T,
            W,
            ids,
            temperature=temperature,
            reduction="none",
            W_teacher=W_T,
            return_log_probs=True,
        )
    elif not is_clipped:
        return fused_jsd_loss(
            h_S,
            h_T,
            W,
            beta=args.distillation_alpha,
            temperature=temperature,
            reduction="none",
            W_teacher=W_T,
        )
    else:
        stats = token_divergence(
            h_S,
            h_T,
            W,
            beta=args.distillation_alpha,
            temperature=temperature,
            targets=ids,
            W_teacher=W_T,
        )
        loss, log_p = stats.loss, stats.logp_student
    if old_log_p is None or not is_clipped:
        return loss
    return apply_importance_sampling_clipping(
        loss, log_p, old_log_p.to(loss.device), args.distillation_is_clip
    )


def _log_p_of_student(trainer: Any, ids: Tensor, mask: Tensor, text: dict[str, Tensor]) -> Tensor:
    """[B, K] log p of the sampled tokens; 0 where they do not count."""

    def log_p(h: Tensor, student: Any) -> Tensor:
        with heads_of_models(student, student) as (W, _):
            h, W, _h, _W = in_one_dtype(h, W, h, None)
            targets = ids[mask != 0].to(h.device)
            return fused_log_probs(h, W, targets, temperature=trainer.temperature)

    with torch.no_grad():
        of_tokens = run_backbone(
            trainer, trainer.model, predicting(mask, text["input_ids"].shape[1]), log_p, **text
        )
    of_tokens = of_tokens.to(mask.device)
    return of_tokens.new_zeros(mask.shape).masked_scatter(mask != 0, of_tokens)


def _hooks(trainer: str, module: str) -> tuple[Hook, Hook]:
    signatures = {f"{trainer}.{name}": parameters for name, parameters in PARTS.items()}
    signatures |= {
        f"{trainer}.compute_loss": COMPUTE_LOSS,
        f"{trainer}._get_teacher_context_for_self_distillation": "self",
        f"{trainer}._log_self_distillation_metric": "self, mode, value",
        f"{trainer}._compute_rollout_logps": (
            "self, prompt_ids, prompt_mask, completion_ids, completion_mask"
        ),
        "trl.experimental.sdft.loss_utils:apply_importance_sampling_clipping": (
            "per_token_loss, student_log_probs, old_log_probs, clip_coeff"
        ),
        **SIGNATURES,
    }
    return (
        Hook(trainer, module, f"{trainer}.compute_loss", _compute_loss, signatures),
        Hook(
            trainer, module, f"{trainer}._compute_rollout_logps", _compute_rollout_logps, signatures
        ),
    )


HOOKS = (
    *_hooks("SDFTTrainer", "trl.experimental.sdft.sdft_trainer"),
    *_hooks("SDPOTrainer", "trl.experimental.sdpo.sdpo_trainer"),
)
