"""Replace functions of TRL by ours, and put them back."""

import importlib
import os
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from ..adapting.patches import Applied, Hook, replace, warn_of_version
from .losses import say_what_stays_theirs
from .trainers import HOOKS, TRAINERS

TESTED_VERSIONS = ("1.16.0",)


def apply_opsd_kernels_to_trl(trainers: Iterable[str] = TRAINERS) -> Applied:
    """Let TRL's trainers compute their losses with this package, in this process, from now on.

    It affects trainers that already exist too. Logs, and the masking, scaling and accumulation of a
    loss, stay as they are. TRL still computes the losses that this package does not; a warning in
    the log says so, once for each trainer and reason. `explain` lists all losses, and `routes`
    counts which were computed. A second call changes nothing.

    Args:
        trainers: class names of trainers; by default all known ones.

    Returns:
        An `Applied`. Call it to put back TRL's own functions, or use it in a `with` that contains
        the training.

    Raises:
        ValueError: `trainers` holds a name that is not known.
        RuntimeError: the installed TRL lacks a function that would be replaced, or that function
            has other parameters. The message names it, and nothing is replaced.

    Warns:
        UserWarning: this package was not tested with the installed version of TRL.
    """
    trainers = (trainers,) if isinstance(trainers, str) else tuple(trainers)
    for name in trainers:
        if name not in TRAINERS:
            raise ValueError(f"trainers must be among {', '.join(TRAINERS)}, got {name!r}")
    installed = version("trl")
    warn_of_version("opsd_kernels.trl", "TRL", installed, TESTED_VERSIONS)
    hooks = [hook for hook in HOOKS if hook.trainer in trainers]
    applied = replace(hooks, f"TRL {installed}", _remedy, _import)
    say_what_stays_theirs()
    return applied


def _remedy(hook: Hook) -> str:
    others = [name for name in TRAINERS if name != hook.trainer]
    return (
        f"Use TRL {TESTED_VERSIONS[-1]}, or name the trainers that you use where {hook.trainer} is "
        f"not one: apply_opsd_kernels_to_trl({others})"
    )


def _import(module: str) -> Any:
    """Import without TRL's warning about experimental modules: its user imports them anyway."""
    silence = "TRL_EXPERIMENTAL_SILENCE"
    was = os.environ.get(silence)
    os.environ[silence] = "1"
    try:
        return importlib.import_module(module)
    finally:
        if was is None:
            del os.environ[silence]
        else:
            os.environ[silence] = was
