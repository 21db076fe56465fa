"""What is replaced in TRL, and what is said when it is not used."""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

logger = logging.getLogger("opsd_kernels.trl")

COMPUTE_LOSS = "self, model, inputs, return_outputs, num_items_in_batch"


@dataclass(frozen=True)
class Hook:
    """A function of TRL's that is replaced, and the signatures that ours was written for."""

    trainer: str
    """The trainer's name, as `apply_opsd_kernels_to_trl` takes it."""
    module: str
    """Where it is imported from."""
    replaced: str
    """`function`, or `Class.method`, in that module."""
    make: Callable[[Callable[..., Any], Any], Callable[..., Any]]
    """Makes ours of theirs, which is kept for what ours does not compute, and of what holds it."""
    signatures: Mapping[str, str]
    """Names of the parameters of what is replaced, and of what ours calls or does the work of;
    after `module:` where that is another."""


def compute_loss_or_theirs(
    theirs: Callable[..., Any],
    why_theirs: Callable[[Any, Any], str | None],
    ours: Callable[[Any, Any, dict[str, Any], Tensor | int | None], Tensor],
    why_other_logits: Callable[[Any, Any, dict[str, Any]], str | None],
) -> Callable[..., Any]:
    """A trainer's `compute_loss`.

    Args:
        why_theirs: of trainer and model, a reason for which ours cannot compute the loss, if any.
        why_other_logits: of trainer, model and inputs, a reason that only a forward shows.
        ours: of trainer, model, inputs and `num_items_in_batch`, the loss.
    """

    @functools.wraps(theirs)
    def compute_loss(
        self: Any,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        reason = why_theirs(self, model)
        if return_outputs:
            reason = "the model's outputs are asked for, logits among them"
        if reason is None:
            reason = why_other_logits(self, model, inputs)
        if reason is None:
            return ours(self, model, inputs, num_items_in_batch)
        notice(self, reason)
        return theirs(self, model, inputs, return_outputs, num_items_in_batch)

    return compute_loss


def notice(trainer: Any, reason: str) -> None:
    """Say that TRL's own loss is used, once for each trainer and reason."""
    said = vars(trainer).setdefault("_opsd_kernels_notices", set())
    if reason not in said:
        said.add(reason)
        if trainer.accelerator.is_main_process:
            logger.warning("%s computes TRL's own loss: %s", type(trainer).__name__, reason)


def why_overridden(trainer: Any, base: type, *names: str) -> str | None:
    """Why a subclass that does part of the work in its own way keeps TRL's loss, if it does."""
    for name in names:
        if inspect.getattr_static(trainer, name) is not inspect.getattr_static(base, name):
            return f"it has a {name} of its own, which ours would not call"
    return None
