"""Replace functions of TRL by ours, and put them back."""

import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from types import TracebackType
from typing import Any

from .hooks import Hook, is_ours
from .losses import say_what_stays_theirs
from .trainers import HOOKS, TRAINERS

TESTED_VERSIONS = ("1.16.0",)


class Applied:
    """Puts back what `apply_opsd_kernels_to_trl` replaced, when called or at the end of a
    `with`."""

    def __init__(self, replaced: list[tuple[Any, str, Any, Any]]) -> None:
        self._replaced = replaced  # owner, name, theirs as it was stored, ours

    def __call__(self) -> None:
        while self._replaced:
            owner, name, theirs, ours = self._replaced.pop()
            if vars(owner)[name] is ours:
                setattr(owner, name, theirs)
            else:
                warnings.warn(
                    f"{owner.__name__}.{name} was replaced by someone else after opsd_kernels did, "
                    "and is left as it is",
                    stacklevel=2,
                )

    def __enter__(self) -> "Applied":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self()


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
    if installed not in TESTED_VERSIONS:
        warnings.warn(
            f"opsd_kernels.trl was tested with TRL {', '.join(TESTED_VERSIONS)}, not with the "
            f"{installed} that is installed. What it replaces there has the parameters that it "
            "knows, but may mean something else: compare the losses of some steps with and without",
            stacklevel=2,
        )
    found = [(hook, *_find(hook, installed)) for hook in HOOKS if hook.trainer in trainers]
    replaced = []
    for hook, owner, theirs in found:
        if is_ours(theirs):
            continue
        ours: Any = hook.make(theirs, owner)
        ours._is_opsd_kernels = True
        name = hook.replaced.rpartition(".")[2]
        replaced.append((owner, name, vars(owner)[name], ours))
        setattr(owner, name, ours)
    say_what_stays_theirs()
    return Applied(replaced)


def _find(hook: Hook, installed: str) -> tuple[Any, Callable[..., Any]]:
    """The class or module that holds the function to replace, and the function, after comparing all
    signatures."""
    for path, parameters in hook.signatures.items():
        _, found = _look_up(hook, path, installed)
        here = ", ".join(inspect.signature(found).parameters)
        if here != parameters:
            raise RuntimeError(
                f"{path} of TRL {installed} ({hook.module}) takes ({here}); opsd_kernels was "
                f"written for ({parameters}), and replaces nothing. {_remedy(hook)}"
            )
    return _look_up(hook, hook.replaced, installed)


def _look_up(hook: Hook, path: str, installed: str) -> tuple[Any, Callable[..., Any]]:
    module, _, path = path.rpartition(":")
    module = module or hook.module
    try:
        owner: Any = _import(module)
        *owners, name = path.split(".")
        for part in owners:
            owner = vars(owner)[part]
        # Only the class's own function: an inherited one serves other trainers too.
        vars(owner)[name]
        return owner, getattr(owner, name)
    except (ModuleNotFoundError, KeyError) as error:
        raise RuntimeError(
            f"TRL {installed} has no {module}.{path}, which opsd_kernels needs for "
            f"{hook.trainer}; nothing was replaced. {_remedy(hook)}"
        ) from error


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
