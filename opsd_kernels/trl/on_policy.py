"""TRL's GKDTrainer, GOLDTrainer and IWOPDTrainer: a teacher of the same vocabulary reads what the
student does."""

from collections.abc import Callable
from typing import Any

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
from opsd_kernels.trl.tokens import divergence_of_tokens


def gkd_loss(
    own: Callable[..., Any],
    self: Any,
    model: Any,
    inputs: Any,
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    """`GKDTrainer.compute_loss`, whose temperature is that of sampling alone."""
    reason = _reason_for_own(self, model, return_outputs)
    if reason is not None:
        say_once("GKDTrainer", reason)
        return own(self, model, inputs, return_outputs, num_items_in_batch)
    return _loss(self, model, inputs, {}, 1.0, num_items_in_batch)


def gold_loss(
    own: Callable[..., Any],
    self: Any,
    model: Any,
    inputs: Any,
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    """`GOLDTrainer.compute_loss`."""
    reason = _reason_for_own(self, model, return_outputs)
    if self.use_uld_loss and self.teacher_tokenizer is not None:
        reason = "use_uld_loss compares two vocabularies"
    if reason is not None:
        say_once("GOLDTrainer", reason)
        return own(self, model, inputs, return_outputs, num_items_in_batch)
    others = self._get_model_forward_kwargs(inputs)
    return _loss(self, model, inputs, others, self.temperature, num_items_in_batch)


def iw_opd_loss(
    own: Callable[..., Any],
    self: Any,
    model: Any,
    inputs: Any,
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    """`IWOPDTrainer.compute_loss`."""
    if self.distillation_objective != "jsd":
        reason: str | None = f"distillation_objective={self.distillation_objective!r} is no JSD"
    elif self.use_teacher_server or self.teacher_model is None:
        reason = "a teacher server tells no hidden states"
    elif self.loss_top_k > 0:
        reason = f"loss_top_k={self.loss_top_k} is of some entries, not of all"
    else:
        reason = _reason_for_own(self, model, return_outputs)
    if reason is not None:
        say_once("IWOPDTrainer", reason)
        return own(self, model, inputs, return_outputs, num_items_in_batch)
    self._raise_if_local_teacher_tokenizer_mismatch()
    first = self._compute_prompt_length(inputs)
    return _loss(self, model, inputs, {}, self.temperature, num_items_in_batch, first)


def _reason_for_own(self: Any, model: Any, return_outputs: bool) -> str | None:
    """Why a trainer's own code is to run; None if ours is."""
    if return_outputs:
        return "outputs are asked for (in evaluation), and logits among them"
    try:
        for each in (model, self.teacher_model):
            check_model(self.accelerator.unwrap_model(each))
    except ValueError as error:
        return str(error)
    return None


def _loss(
    self: Any,
    model: Any,
    inputs: Any,
    others: dict[str, Any],
    temperature: float,
    num_items_in_batch: Any,
    first: int = 1,
) -> Tensor:
    """Σ ℓ over the tokens from `first` on that have a label, over their number in the whole batch,
    or, where that is not told, here."""
    from trl.experimental.utils import empty_cache

    given = {name: inputs[name] for name in ("input_ids", "attention_mask")} | others
    positions = slice(first - 1, -1)
    mask = inputs["labels"][:, first:] != -100
    self.teacher_model.eval()
    h_T = teacher_hidden_states(self, self.teacher_model, given, positions)
    teacher = self.accelerator.unwrap_model(self.teacher_model)

    def total(student: Any) -> Tensor:
        h_S = hidden_states(student, given, positions)
        with gathered(student, teacher):
            heads = head_of(student), head_of(teacher)
            told = divergence_of_tokens(
                h_S, h_T, *heads, mask, beta=self.beta, temperature=temperature
            )
        return told.loss.sum()

    loss = inside(self, model, total)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, Tensor):
        count = count.to(loss.device)
    empty_cache()
    return loss / count
