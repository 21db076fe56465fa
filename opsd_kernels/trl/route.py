"""Counts which losses of TRL's trainers this package computed, and warns where TRL computed one."""

import logging
from collections import Counter
from typing import Any, NamedTuple, TypeVar

from ..scalars import check_bool

logger = logging.getLogger("opsd_kernels.trl")

Row = TypeVar("Row", bound=tuple[Any, ...])


class Route(NamedTuple):
    """Losses of one kind that a trainer computed, and who computed them."""

    trainer: str
    """The name of the trainer's class."""
    loss: str
    """As its config names it."""
    whose: str
    """`ours` or `theirs`."""
    reason: str
    """Why it stayed TRL's; empty if it is ours."""
    batches: int
    """How often: once for each micro-batch, in training and in evaluation."""


class Table(list[Row]):
    """Rows, printed in columns."""

    def __str__(self) -> str:
        if not self:
            return "(none)"
        cells = [self[0]._fields, *self]  # type: ignore[attr-defined]
        widths = [max(len(str(cell)) for cell in column) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in cells
        ]
        return "\n".join(line.rstrip() for line in lines)


_counts: Counter[tuple[str, str, str]] = Counter()  # of trainer, loss and reason
_said: set[tuple[str, str]] = set()  # trainer and reason, where no trainer is at hand


def routes(*, clear: bool = False) -> Table[Route]:
    """Count the losses that trainers computed in this process, by trainer, loss and route.

    A trainer whose loss `apply_opsd_kernels_to_trl` does not replace is not counted. `explain`
    lists such trainers.

    Args:
        clear: start to count from 0 again.

    Raises:
        TypeError: clear is not a bool.
    """
    check_bool("clear", clear)
    found = Table(
        Route(trainer, loss, "theirs" if reason else "ours", reason, batches)
        for (trainer, loss, reason), batches in _counts.items()
    )
    if clear:
        _counts.clear()
    return found


def took(trainer: Any, loss: str, reason: str | None) -> None:
    """Count a loss. If it stays TRL's, warn once for each trainer and reason.

    Args:
        trainer: the trainer, or the name of its class where the trainer is not at hand.
        reason: why the loss stays TRL's; None if it is ours.
    """
    name = trainer if isinstance(trainer, str) else type(trainer).__name__
    _counts[name, loss, reason or ""] += 1
    if reason is None:
        return
    said: set[Any] = _said
    if not isinstance(trainer, str):
        said = vars(trainer).setdefault("_opsd_kernels_said", set())
    if (name, reason) not in said:
        said.add((name, reason))
        if isinstance(trainer, str) or trainer.accelerator.is_main_process:
            logger.warning("%s computes TRL's own loss: %s", name, reason)
