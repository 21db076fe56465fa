"""Which losses of the installed TRL are ours, and why the others are not."""

import functools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from .hooks import is_ours
from .route import Table, logger
from .trainers import HOOKS, LOSSES, trainers_of_trl

_OFF = "apply_opsd_kernels_to_trl() is not in effect"


class Loss(NamedTuple):
    """A loss that a trainer of TRL can be configured for."""

    trainer: str
    """The name of the trainer's class."""
    loss: str
    """As its config names it."""
    whose: str
    """`ours` or `theirs`, at present."""
    reason: str
    """Why it is TRL's; empty if it is ours."""


def explain() -> Table[Loss]:
    """List every distillation loss of the installed TRL: whether it is ours at present, and if not,
    why.

    A trainer of TRL that is not known here has a row too. TRL may still compute a loss that is
    listed as ours, if something else in a run stands in the way, such as `torch.nn.DataParallel`.
    Then a warning says so, and `routes` counts the loss as TRL's.
    """
    return Table(
        Loss(trainer, loss, "theirs" if reason else "ours", reason)
        for trainer, module in trainers_of_trl()
        for loss, never in _losses(trainer, module).items()
        for reason in [never or ("" if _is_applied(trainer) else _OFF)]
    )


@functools.cache
def say_what_stays_theirs() -> None:
    """Warn once, in one line, of the trainers of TRL that have no loss of ours."""
    stay = []
    for trainer, module in trainers_of_trl():
        losses = _losses(trainer, module)
        reasons = dict.fromkeys(reason for reason in losses.values() if reason)
        if None not in losses.values():
            stay.append(f"{trainer} ({', '.join(reasons)})")
    if stay:
        logger.warning("These trainers compute TRL's own loss: %s", "; ".join(stay))


def _losses(trainer: str, module: str) -> Mapping[str, str | None]:
    """The losses of a trainer, each with the reason why it is never ours; None if it can be."""
    modules = {hook.trainer: hook.module for hook in HOOKS}
    if trainer in LOSSES and modules.get(trainer, module) == module:
        return LOSSES[trainer]
    return {"any": f"opsd_kernels does not know {module}.{trainer}"}


def _is_applied(trainer: str) -> bool:
    """Whether every function that we replace for a trainer is replaced now. Nothing of TRL is
    imported."""
    for hook in HOOKS:
        if hook.trainer == trainer:
            found: Any = sys.modules.get(hook.module)
            for name in hook.replaced.split("."):
                found = getattr(found, name, None)
            if not is_ours(found):
                return False
    return True
