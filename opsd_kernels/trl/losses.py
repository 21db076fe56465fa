"""Which losses of the installed TRL are ours, and why the others are not."""

import functools
from collections.abc import Mapping

from ..adapting.patches import in_effect
from ..adapting.routes import Loss, Table
from .route import logger
from .trainers import HOOKS, LOSSES, trainers_of_trl

_OFF = "apply_opsd_kernels_to_trl() is not in effect"


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
    """Whether every function that we replace for a trainer is replaced now."""
    return in_effect(hook for hook in HOOKS if hook.trainer == trainer)
