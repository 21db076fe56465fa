"""Counts which losses of TRL's trainers this package computed, and warns where TRL computed one."""

from typing import Any

from ..adapting.routes import Route, Routes, Table

ROUTES = Routes("TRL")
logger = ROUTES.logger
_said: set[Any] = set()  # trainer and reason, where no trainer is at hand


def routes(*, clear: bool = False) -> Table[Route]:
    """Count the losses that trainers computed in this process, by trainer, loss and route.

    A trainer whose loss `apply_opsd_kernels_to_trl` does not replace is not counted. `explain`
    lists such trainers.

    Args:
        clear: start to count from 0 again.

    Raises:
        TypeError: clear is not a bool.
    """
    return ROUTES.table(clear)


def took(trainer: Any, loss: str, reason: str | None) -> None:
    """Count a loss. If it stays TRL's, warn once for each trainer and reason.

    Args:
        trainer: the trainer, or the name of its class where the trainer is not at hand.
        reason: why the loss stays TRL's; None if it is ours.
    """
    if isinstance(trainer, str):
        ROUTES.took(trainer, loss, reason, _said)
        return
    said = vars(trainer).setdefault("_opsd_kernels_said", set())
    speaks = reason is not None and trainer.accelerator.is_main_process
    ROUTES.took(type(trainer).__name__, loss, reason, said, speaks)
