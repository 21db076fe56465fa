"""The losses of `GKDTrainer`, `GOLDTrainer` and `IWOPDTrainer`: divergences at the tokens that have
labels. Student and teacher read the same text.

In all three β weighs the teacher, and names the forward KL at 0 and the reverse KL at 1, as in
`fused_jsd_loss`. GOLD and IWOPD divide logits by their temperature. GKD samples at its temperature
and trains at 1.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..heads.head import LMHead
from ..loss import fused_jsd_loss
from .hidden_states import (
    SIGNATURES,
    loss_of_student,
    predicting,
    teacher_hidden_states,
)
from .hooks import COMPUTE_LOSS, Hook, compute_loss_or_theirs, why_overridden

SERVER = "a teacher server gives some log-probabilities, not hidden states"
LOSSES: dict[str, dict[str, str | None]] = {
    "GKDTrainer": {"JSD": None},
    "GOLDTrainer": {
        "JSD": None,
        "use_uld_loss": "use_uld_loss compares the texts of two tokenizers",
    },
    "IWOPDTrainer": {
        "jsd, loss_top_k=0": None,
        "jsd, loss_top_k>0": "loss_top_k > 0 is not the whole vocabulary",
        "iw_opd": "distillation_objective='iw_opd' is no divergence",
        "use_teacher_server": SERVER,
    },
}


def _gkd(theirs: Callable[..., Any], GKDTrainer: type) -> Callable[..., Any]:
    def why_theirs(self: Any) -> str | None:
        return why_overridden(self, GKDTrainer, "generalized_jsd_loss")

    def ours(self: Any, model: Any, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
        return _loss(self, model, inputs["labels"][:, 1:], _text(inputs), 1.0, items)

    losses = LOSSES["GKDTrainer"]
    return compute_loss_or_theirs(theirs, losses, lambda _: "JSD", why_theirs, ours, _text)


def _gold(theirs: Callable[..., Any], GOLDTrainer: type) -> Callable[..., Any]:
    def loss_of(self: Any) -> str:
        return "use_uld_loss" if self.use_uld_loss and self.teacher_tokenizer is not None else "JSD"

    def why_theirs(self: Any) -> str | None:
        return why_overridden(self, GOLDTrainer, "generalized_jsd_loss")

    def ours(self: Any, model: Any, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
        both = _text(inputs) | self._get_model_forward_kwargs(inputs)
        return _loss(self, model, inputs["labels"][:, 1:], both, self.temperature, items)

    losses = LOSSES["GOLDTrainer"]
    return compute_loss_or_theirs(theirs, losses, loss_of, why_theirs, ours, _text)


def _iw_opd(theirs: Callable[..., Any], IWOPDTrainer: type) -> Callable[..., Any]:
    def loss_of(self: Any) -> str:
        if self.use_teacher_server:
            return "use_teacher_server"
        if self.distillation_objective != "jsd":
            return str(self.distillation_objective)
        return "jsd, loss_top_k>0" if self.loss_top_k > 0 else "jsd, loss_top_k=0"

    def why_theirs(self: Any) -> str | None:
        return why_overridden(self, IWOPDTrainer, "generalized_jsd_loss", "_get_teacher_logits")

    def ours(self: Any, model: Any, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor:
        self._raise_if_local_teacher_tokenizer_mismatch()
        labels = inputs["labels"][:, self._compute_prompt_length(inputs) :]
        return _loss(self, model, labels, _text(inputs), self.temperature, items)

    losses = LOSSES["IWOPDTrainer"]
    return compute_loss_or_theirs(theirs, losses, loss_of, why_theirs, ours, _text)


def _loss(
    trainer: Any,
    model: Any,
    labels: Tensor,
    inputs: dict[str, Any],
    temperature: float,
    num_items_in_batch: Tensor | int | None,
) -> Tensor:
    """Σ ℓ divided by `num_items_in_batch`, or by the number of tokens that have labels.

    Args:
        labels: [B, K] of the last K tokens; −100 for a token that does not count.
        inputs: of either model's forward.
    """

    def total(h_S: Tensor, W: LMHead, h_T: Tensor, W_T: LMHead | None) -> Tensor:
        options: dict[str, Any] = {"temperature": temperature, "W_teacher": W_T}
        return fused_jsd_loss(h_S, h_T, W, beta=trainer.beta, reduction="sum", **options)

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


def _text(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


JSD = "student_logits, teacher_logits, labels, beta, temperature, reduction"

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
    Hook(
        "IWOPDTrainer",
        "trl.experimental.iw_opd.iw_opd_trainer",
        "IWOPDTrainer.compute_loss",
        _iw_opd,
        {
            "IWOPDTrainer.compute_loss": COMPUTE_LOSS,
            "IWOPDTrainer.generalized_jsd_loss": f"{JSD}, top_k, add_tail, num_items_in_batch",
            "IWOPDTrainer._get_teacher_logits": "self, inputs",
            "IWOPDTrainer._compute_prompt_length": "self, inputs",
            "IWOPDTrainer._raise_if_local_teacher_tokenizer_mismatch": "self",
            **SIGNATURES,
        },
    ),
)
