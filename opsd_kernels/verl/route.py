"""Counts what verl's engines computed with this package, and warns where verl computed it."""

from typing import Any

import torch.distributed as dist

from ..adapting.routes import Route, Routes, Table

ROUTES = Routes("verl")
_said: set[Any] = set()  # what was said of an engine


def routes(*, clear: bool = False) -> Table[Route]:
    """Count what engines computed in this process, by engine, loss and route.

    Ray's workers are processes of their own, and each counts what it computed.

    Args:
        clear: start to count from 0 again.

    Raises:
        TypeError: clear is not a bool.
    """
    return ROUTES.table(clear)


def took(engine: Any, losses: list[str], reason: str | None) -> None:
    """Count what an engine computed of a micro-batch. If it stays verl's, warn once for each engine
    and reason. If it is ours, say so once for each engine and loss.

    Args:
        losses: "log_probs", "entropy", "forward_kl_topk".
        reason: why they stay verl's; None if they are ours.
    """
    name = type(engine).__name__
    speaks = not dist.is_initialized() or dist.get_rank() == 0
    for loss in losses:
        ROUTES.took(name, loss, reason, _said, speaks)
    new = [loss for loss in losses if reason is None and (name, loss, "ours") not in _said]
    _said.update((name, loss, "ours") for loss in new)
    if new and speaks:
        # As verl says which kernels it uses; Ray sends it to the terminal of the driver.
        print(f"opsd_kernels computes {', '.join(new)} of {name} from hidden states")
