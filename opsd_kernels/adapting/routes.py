"""Counts which losses of another library this package computed, and warns where the library
computed one."""

import logging
from collections import Counter
from typing import Any, NamedTuple, TypeVar

from ..scalars import check_bool

Row = TypeVar("Row", bound=tuple[Any, ...])


class Route(NamedTuple):
    """Losses of one kind that a trainer computed, and who computed them."""

    trainer: str
    """The name of the trainer's class; in verl, of the engine's."""
    loss: str
    """As its config names it."""
    whose: str
    """`ours` or `theirs`."""
    reason: str
    """Why it stayed the library's; empty if it is ours."""
    batches: int
    """How often: once for each micro-batch, in training and in evaluation."""


class Loss(NamedTuple):
    """A loss that a trainer can be configured for."""

    trainer: str
    """The name of the trainer's class; in verl, of the engine's."""
    loss: str
    """As its config names it."""
    whose: str
    """`ours` or `theirs`, at present."""
    reason: str
    """Why it is the library's; empty if it is ours."""


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


class Routes:
    """The losses that were computed in this process, by trainer, loss and reason."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.logger = logging.getLogger(f"opsd_kernels.{library.lower()}")
        self._counts: Counter[tuple[str, str, str]] = Counter()

    def took(
        self, trainer: str, loss: str, reason: str | None, said: set[Any], speaks: bool = True
    ) -> None:
        """Count a loss. If it stays the library's, warn once for each trainer and reason.

        Args:
            reason: why the loss stays the library's; None if it is ours.
            said: pairs of trainer and reason that were warned of already.
            speaks: whether this process is the one that warns.
        """
        self._counts[trainer, loss, reason or ""] += 1
        if reason is None or (trainer, reason) in said:
            return
        said.add((trainer, reason))
        if speaks:
            self.logger.warning("%s computes %s's own loss: %s", trainer, self.library, reason)

    def table(self, clear: bool) -> Table[Route]:
        """One row for each trainer, loss and reason; `clear` starts to count from 0 again."""
        check_bool("clear", clear)
        found = Table(
            Route(trainer, loss, "theirs" if reason else "ours", reason, batches)
            for (trainer, loss, reason), batches in self._counts.items()
        )
        if clear:
            self._counts.clear()
        return found
