"""The losses of `SDFTTrainer` and `SDPOTrainer`. The teacher reads another prompt. It is the same
model without its adapter, or as it was some steps ago.

Their α weighs the teacher in the mixture, as β does here: the forward KL at 0, the reverse KL at 1.
The loss divides the logits of both sides by the temperature of sampling.

The teacher runs first, so that the wrapper of both models is left as the student's backward expects
it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapting.patches import Hook
from ..heads.head import LMHead
from ..loss import (
    fused_jsd_loss,
    fused_log_probs,
    fused_sampled_token_loss,
    token_divergence,
)
from ..top_k import fused_top_k
from .heads import heads_of_models, in_dtype_of
from .hidden_states import (
    SIGNATURES,
    loss_of_student,
    predicting,
    prompts_and_completions,
    run_backbone,
    teacher_hidden_states,
    why_no_hidden_states,
    why_other_logits,
)
from .hooks import COMPUTE_LOSS, compute_loss_or_theirs, why_overridden
from .top_k import top_k_loss, why_too_many

# Methods whose work ours does. A subclass that overrides one keeps TRL's own loss.
PARTS = {
    "_compute_teacher_student_logits": "self, model, teacher_model, inputs",
    "_compute_self_distillation_loss": "self, model, inputs, distillation_logits",
    "_forward_logits": "self, model, input_ids, attention_mask, logits_to_keep",
}

_LOSSES: dict[str, str | None] = {
    "full_logits": None,
    "sampled_token": None,
    "topk_logits": None,
    "use_teacher_server": "a teacher server gives some log-probabilities, not hidden states",
}
LOSSES: dict[str, dict[str, str | None]] = {
    "SDFTTrainer": _LOSSES,
    "SDPOTrainer": _LOSSES
    | {
        "distillation_weight<1": None,
        "distillation_weight=0": "distillation_weight=0 is a policy loss alone",
    },
}


def _compute_loss(theirs: Callable[..., Any], base: type) -> Callable[..., Any]:
    def why_theirs(self: Any) -> str | None:
        return _why_theirs(self, base)

    def ours(self: Any, model: Any, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
        loss = _loss(self, model, inputs)
        return loss / (self.current_gradient_accumulation_steps if self.model.training else 1)

    losses = LOSSES[base.__name__]
    return compute_loss_or_theirs(
        theirs, losses, _loss_of, why_theirs, ours, prompts_and_completions
    )


def _compute_rollout_logps(theirs: Callable[..., Any], base: type) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def log_p(
        self: Any,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
    ) -> Tensor | None:
        loss = _loss_of(self)
        text = prompts_and_completions(
            {
                "prompt_ids": prompt_ids,
                "prompt_mask": prompt_mask,
                "completion_ids": completion_ids,
                "completion_mask": completion_mask,
            }
        )
        if (
            LOSSES[base.__name__].get(loss, loss)
            or _why_theirs(self, base)
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
    if args.distillation_mode == "sampled_token" and args.distillation_alpha != 1:
        return f"distillation_alpha={args.distillation_alpha} of sampled tokens is refused by TRL"
    if args.distillation_mode == "topk_logits":
        if args.distillation_topk is None:
            return "distillation_topk is not given, which TRL refuses"
        if reason := why_too_many(args.distillation_topk):
            return reason
    policy = ("_compute_policy_loss",) if _loss_of(trainer) == "distillation_weight<1" else ()
    return why_overridden(trainer, base, *PARTS, *policy)


def _loss_of(trainer: Any) -> str:
    args = trainer.args
    weight = getattr(args, "distillation_weight", 1.0)
    if weight != 1:
        return "distillation_weight<1" if weight else "distillation_weight=0"
    return "use_teacher_server" if args.use_teacher_server else str(args.distillation_mode)


def _loss(trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """The mean over sequences of each sequence's mean over tokens, and with SDPO's
    `distillation_weight` the policy loss beside it. Logs the mean over all tokens."""
    mask = _mask(trainer, inputs)  # [B, K]
    teacher, text = trainer.teacher_model, prompts_and_completions(inputs)

    with trainer._get_teacher_context_for_self_distillation():
        h_T = teacher_hidden_states(
            trainer,
            teacher,
            predicting(mask, inputs["teacher_input_ids"].shape[1]),
            input_ids=inputs["teacher_input_ids"],
            attention_mask=inputs["teacher_attention_mask"],
        )
    weight = getattr(trainer.args, "distillation_weight", 1.0)
    # A policy loss takes all tokens of the completions, the divergence some of them.
    of_student = mask if weight == 1 else inputs["completion_mask"]
    counts = mask[of_student != 0] != 0
    ids, old_log_p = inputs["completion_ids"], inputs.get("old_per_token_logps")

    def losses(
        h_S: Tensor, W: LMHead, h_T: Tensor, W_T: LMHead | None
    ) -> tuple[Tensor, Tensor | None]:
        log_p = None
        if weight != 1:
            targets = ids[of_student != 0].to(h_S.device)
            log_p = fused_log_probs(h_S, W, targets, temperature=trainer.temperature)
            h_S = h_S[counts.to(h_S.device)]
        old = None if old_log_p is None else old_log_p[mask != 0]
        return _loss_of_tokens(trainer, ids[mask != 0], old, h_S, W, h_T, W_T), log_p

    of_tokens, log_p = loss_of_student(
        trainer,
        model,
        losses,
        h_T,
        teacher,
        predicting(of_student, text["input_ids"].shape[1]),
        **text,
    )
    policy = None if log_p is None else _policy_loss(trainer, inputs, log_p)
    mask = mask.to(of_tokens.device)
    # Without tokens the sum is 0, and still has the student's graph.
    of_tokens = of_tokens * mask[mask != 0]
    share = 1 / (mask.sum(-1, keepdim=True).clamp(min=1) * mask.shape[0])  # [B, 1]
    mean = of_tokens.detach().sum() / mask.sum().clamp(min=1)
    trainer._log_self_distillation_metric(
        "train" if model.training else "eval", trainer.accelerator.gather(mean).mean().item()
    )
    loss = (of_tokens * share.expand_as(mask)[mask != 0]).sum()
    return loss if policy is None else (1 - weight) * policy + weight * loss


class _LogProbs(NamedTuple):
    """Stands in for the student's logits where TRL computes only log p of the completions from
    them."""

    log_p: Tensor
    """[B, K]"""


def _policy_loss(trainer: Any, inputs: dict[str, Any], log_p: Tensor) -> Tensor:
    """TRL's own policy loss.

    Args:
        log_p: [n] of the tokens of the completions.
    """
    mask, old_log_p = inputs["completion_mask"].to(log_p.device), inputs.get("old_per_token_logps")
    # Where there is no token, the ratio of probabilities now and then has to be 1.
    elsewhere = log_p.new_zeros(mask.shape) if old_log_p is None else old_log_p.to(log_p)
    given = _LogProbs(elsewhere.masked_scatter(mask != 0, log_p))
    loss: Tensor = trainer._compute_policy_loss(inputs, given)
    return loss


def _selective_log_softmax(theirs: Callable[..., Any], module: Any) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def log_p(logits: Any, *args: Any, **options: Any) -> Any:
        if isinstance(logits, _LogProbs):
            return logits.log_p
        return theirs(logits, *args, **options)

    return log_p


def _mask(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """[B, K] mask of the completion tokens that count. SDFT skips the first tokens of a completion,
    SDPO the sequences that have nothing to learn from."""
    mask = inputs["completion_mask"]
    skipped = getattr(trainer, "num_loss_tokens_to_skip", 0)
    of_sequences = inputs.get("self_distillation_mask")
    if of_sequences is not None:
        mask = mask * of_sequences.unsqueeze(1)
    return mask * (torch.arange(mask.shape[1], device=mask.device) >= skipped)


def _loss_of_tokens(
    trainer: Any,
    ids: Tensor,
    old_log_p: Tensor | None,
    h_S: Tensor,
    W: LMHead,
    h_T: Tensor,
    W_T: LMHead | None,
) -> Tensor:
    """[n] losses of the tokens that count. Each is weighted by the token's probability now over its
    probability when it was sampled, up to a clip.

    Args:
        ids: [n] the tokens.
        old_log_p: [n] the student's log p when it sampled them, or None.
    """
    from trl.experimental.sdft.loss_utils import apply_importance_sampling_clipping

    ids, args = ids.to(h_S.device), trainer.args
    clip = None if old_log_p is None else args.distillation_is_clip
    options: dict[str, Any] = {"temperature": trainer.temperature, "W_teacher": W_T}
    if args.distillation_mode == "topk_logits":
        T, targets = trainer.temperature, None if clip is None else ids
        likeliest = fused_top_k(h_S, W, args.distillation_topk, targets=targets, temperature=T)
        log_p = likeliest.logp_targets
        loss = top_k_loss(
            h_S,
            W,
            h_T,
            W_T,
            likeliest.ids,
            add_tail=args.distillation_add_tail,
            beta=args.distillation_alpha,
            temperature=T,
        )
    elif args.distillation_mode == "sampled_token":
        loss, log_p, _ = fused_sampled_token_loss(
            h_S, h_T, W, ids, reduction="none", return_log_probs=True, **options
        )
    elif clip is None:
        beta = args.distillation_alpha
        return fused_jsd_loss(h_S, h_T, W, beta=beta, reduction="none", **options)
    else:
        stats = token_divergence(h_S, h_T, W, beta=args.distillation_alpha, targets=ids, **options)
        loss, log_p = stats.loss, stats.logp_student
    if old_log_p is None or clip is None:
        return loss
    assert log_p is not None
    return apply_importance_sampling_clipping(loss, log_p, old_log_p.to(loss.device), clip)


def _log_p_of_student(trainer: Any, ids: Tensor, mask: Tensor, text: dict[str, Tensor]) -> Tensor:
    """[B, K] log p of the sampled tokens; 0 for a token that does not count."""

    def log_p(h: Tensor, student: Any) -> Tensor:
        with heads_of_models(student, student) as (W, _):
            targets = ids[mask != 0].to(h.device)
            return fused_log_probs(h, in_dtype_of(h, W), targets, temperature=trainer.temperature)

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


_SDPO = "trl.experimental.sdpo.sdpo_trainer"
HOOKS = (
    *_hooks("SDFTTrainer", "trl.experimental.sdft.sdft_trainer"),
    *_hooks("SDPOTrainer", _SDPO),
    Hook(
        "SDPOTrainer",
        _SDPO,
        "selective_log_softmax",
        _selective_log_softmax,
        {
            "selective_log_softmax": "logits, index, temperature, row_mask",
            "SDPOTrainer._compute_policy_loss": "self, inputs, student_logits",
        },
    ),
)
