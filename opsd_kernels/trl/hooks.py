"""The choice between TRL's loss and ours."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .hidden_states import why_no_hidden_states, why_other_logits
from .route import took

COMPUTE_LOSS = "self, model, inputs, return_outputs, num_items_in_batch"


def compute_loss_or_theirs(
    theirs: Callable[..., Any],
    losses: Mapping[str, str | None],
    loss_of: Callable[[Any], str],
    why_theirs: Callable[[Any], str | None],
    ours: Callable[[Any, Any, dict[str, Any], Tensor | int | None], Tensor],
    text: Callable[[dict[str, Any]], dict[str, Tensor]],
    teacher_of: Callable[[Any], tuple[Any, ...]] = lambda trainer: (trainer.teacher_model,),
) -> Callable[..., Any]:
    """Make the `compute_loss` of a trainer.

    Args:
        losses: the losses that a config can ask for, and why each stays TRL's; None if it does not.
        loss_of: gives the loss among these that a trainer's config asks for.
        why_theirs: tells why this trainer, with such a loss, needs TRL's own; None if it does not.
        ours: the loss, from trainer, model, inputs and `num_items_in_batch`.
        text: gives the `input_ids` and `attention_mask` of the student from the inputs.
        teacher_of: gives the model that is the teacher; an empty tuple if it is a server.
    """

    @functools.wraps(theirs)
    def compute_loss(
        self: Any,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        models, loss = (model, *teacher_of(self)), loss_of(self)
        if return_outputs:
            reason: str | None = "the model's outputs are asked for, logits among them"
        else:
            reason = (
                losses.get(loss, "opsd_kernels does not know this loss")
                or why_theirs(self)
                or why_no_hidden_states(self, *models)
                or why_other_logits(self, models, **text(inputs))
            )
        took(self, loss, reason)
        if reason is None:
            return ours(self, model, inputs, num_items_in_batch)
        return theirs(self, model, inputs, return_outputs, num_items_in_batch)

    return compute_loss


def why_overridden(trainer: Any, base: type, *names: str) -> str | None:
    """Why a trainer needs TRL's own loss: it overrides a method of `base` that ours does not call.
    None if it overrides none of them."""
    for name in names:
        if inspect.getattr_static(trainer, name) is not inspect.getattr_static(base, name):
            return f"it has a {name} of its own, which ours would not call"
    return None
