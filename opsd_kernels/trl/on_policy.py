"""The losses of `GKDTrainer` and `GOLDTrainer`: divergences at the tokens that have labels. Student
and teacher read the same text.

In both β weighs the teacher, and names the forward KL at 0 and the reverse KL at 1, as in
`fused_jsd_loss`. GOLD divides logits by its temperature. GKD samples at its temperature and trains
at 1.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..adapting.patches import Hook
from ..heads.head import LMHead
from ..loss import fused_jsd_loss
from .hidden_states import (
    SIGNATURES,
    Loss,
    loss_of_student,
    predicting,
    teacher_hidden_states,
)
from .hooks import COMPUTE_LOSS, compute_loss_or_theirs, why_overridden

JSD = "student_logits, teacher_logits, labels, beta, temperature, reduction"
LOSSES: dict[str, dict[str, str | None]] = {
    "GKDTrainer": {"JSD": None},
    "GOLDTrainer": {
        "JSD": None,
        "use_uld_loss": "use_uld_loss compares the texts of two tokenizers",
    },
}


def _gkd(theirs: Callable[..., Any], GKDTrainer: type) -> Callable[..., Any]:
    def why_theirs(self: Any) -> str | None:
        return why_overridden(self, GKDTrainer, "generalized_jsd_loss")

    def ours(self: Any, model: Any, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
        loss = divergence(self.beta, temperature=1.0)
        return loss_of_labels(self, model, inputs["labels"][:, 1:], text(inputs), loss, items)

    losses = LOSSES["GKDTrainer"]
    return compute_loss_or_theirs(theirs, losses, lambda _: "JSD", why_theirs, ours, text)


def _gold(theirs: Callable[..., Any], GOLDTrainer: type) -> Callable[..., Any]:
    def loss_of(self: Any) -> str:
        return "use_uld_loss" if self.use_uld_loss and self.teacher_tokenizer is not None else "JSD"

    def why_theirs(self: Any) -> str | None:
        return why_overridden(self, GOLDTrainer, "generalized_jsd_loss")

    def ours(self: Any, model: Any, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
        both = text(inputs) | self._get_model_forward_kwargs(inputs)
        loss = divergence(self.beta, self.temperature)
        return loss_of_labels(self, model, inputs["labels"][:, 1:], both, loss, items)

    losses = LOSSES["GOLDTrainer"]
    return compute_loss_or_theirs(theirs, losses, loss_of, why_theirs, ours, text)


def divergence(beta: float, temperature: float) -> Loss[Tensor]:
    """Σ ℓ on the whole vocabulary."""

    def total(h_S: Tensor, W: LMHead, h_T: Tensor, W_T: LMHead | None) -> Tensor:
        options: dict[str, Any] = {"temperature": temperature, "W_teacher": W_T}
        return fused_jsd_loss(h_S, h_T, W, beta=beta, reduction="sum", **options)

    return total


def loss_of_labels(
    trainer: Any,
    model: Any,
    labels: Tensor,
    inputs: dict[str, Any],
    total: Loss[Tensor],
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """Σ ℓ divided by `num_items_in_batch`, or by the number of tokens that have labels.

    Args:
        labels: [B, K] of the last K tokens; −100 for a token that does not count.
        inputs: of either model's forward.
        total: Σ ℓ of the tokens that have labels.
    """
    teacher = trainer.teacher_model
    teacher.eval()
    at = predicting(labels != -100, inputs["input_ids"].shape[1])
    h_T = teacher_hidden_states(trainer, teacher, at, **inputs)
    loss = loss_of_student(trainer, model, total, h_T, teacher, at, **inputs)
    if num_items_in_batch is None:
        num_items_in_batch = at.sum().clamp(min=1)
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def text(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


HOOKS = (
    Hook(
        "GKDTrainer",
        "trl.experimental.gkd.gkd_trainer",
        "GKDTrainer.compute_loss",
        _gkd,
        {
            "GKDTrainer.compute_loss": COMPUTE_LOSS,
            "GKDTrainer.generalized_jsd_loss": f"{JSD}, num_items_in_batch",
            **SIGNATURES,
        },
    ),
    Hook(
        "GOLDTrainer",
        "trl.experimental.gold.gold_trainer",
        "GOLDTrainer.compute_loss",
        _gold,
        {
            "GOLDTrainer.compute_loss": COMPUTE_LOSS,
            "GOLDTrainer.generalized_jsd_loss": f"{JSD}, logits_are_probs, num_items_in_batch",
            "GOLDTrainer._get_model_forward_kwargs": "self, inputs, exclude",
            **SIGNATURES,
        },
    ),
)
