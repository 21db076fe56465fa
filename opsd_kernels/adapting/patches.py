"""Replace functions of another library by ours, and put them back."""

import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Hook:
    """A function of the library that is replaced, and the signatures that ours was written for."""

    trainer: str
    """The class that trains, by the name that its users know."""
    module: str
    """The module that holds the function."""
    replaced: str
    """`function`, or `Class.method`, in that module."""
    make: Callable[[Callable[..., Any], Any], Callable[..., Any]]
    """Makes our function. It takes the library's function, to fall back to, and the class or module
    that holds it."""
    signatures: Mapping[str, str]
    """The names of the parameters of every function of the library that is replaced, that ours
    calls, or whose work ours does; by path, after `module:` if it is in another module."""


class Applied:
    """Puts back what was replaced, when called or at the end of a `with`."""

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


def is_ours(function: Any) -> bool:
    """Whether a function has replaced one of the library's."""
    return getattr(function, "_is_opsd_kernels", False)


def warn_of_version(module: str, library: str, installed: str, tested: tuple[str, ...]) -> None:
    """Warn if a module of ours was not tested with the installed version of a library. The warning
    is that of the caller's caller."""
    if installed not in tested:
        warnings.warn(
            f"{module} was tested with {library} {', '.join(tested)}, not with the {installed} "
            "that is installed. What it replaces there has the parameters that it knows, but may "
            "mean something else: compare the losses of some steps with and without",
            stacklevel=3,
        )


def in_effect(hooks: Iterable[Hook]) -> bool:
    """Whether every function of the hooks is replaced now. Nothing is imported."""
    for hook in hooks:
        found: Any = sys.modules.get(hook.module)
        for name in hook.replaced.split("."):
            found = getattr(found, name, None)
        if not is_ours(found):
            return False
    return True


def replace(
    hooks: Iterable[Hook],
    library: str,
    remedy: Callable[[Hook], str],
    load: Callable[[str], Any] = importlib.import_module,
) -> Applied:
    """Replace the functions of all hooks that are not ours yet, or none.

    Args:
        library: its name and version, for messages.
        remedy: what the user can do if the function of a hook cannot be replaced.
        load: imports a module by its name.

    Raises:
        RuntimeError: the library lacks a function that would be replaced, or that function has
            other parameters.
    """
    found = [(hook, *_find(hook, library, remedy, load)) for hook in hooks]
    replaced = []
    for hook, owner, theirs in found:
        if is_ours(theirs):
            continue
        ours: Any = hook.make(theirs, owner)
        ours._is_opsd_kernels = True
        name = hook.replaced.rpartition(".")[2]
        replaced.append((owner, name, vars(owner)[name], ours))
        setattr(owner, name, ours)
    return Applied(replaced)


def _find(
    hook: Hook, library: str, remedy: Callable[[Hook], str], load: Callable[[str], Any]
) -> tuple[Any, Callable[..., Any]]:
    """The class or module that holds the function to replace, and the function, after comparing all
    signatures."""

    def look_up(path: str) -> tuple[Any, Callable[..., Any]]:
        module, _, path = path.rpartition(":")
        module = module or hook.module
        try:
            owner: Any = load(module)
            *owners, name = path.split(".")
            for part in owners:
                owner = vars(owner)[part]
            # Only the class's own function: an inherited one serves other classes too.
            vars(owner)[name]
            return owner, getattr(owner, name)
        except (ModuleNotFoundError, KeyError) as error:
            raise RuntimeError(
                f"{library} has no {module}.{path}, which opsd_kernels needs for "
                f"{hook.trainer}; nothing was replaced. {remedy(hook)}"
            ) from error

    for path, parameters in hook.signatures.items():
        _, function = look_up(path)
        here = ", ".join(inspect.signature(function).parameters)
        if here != parameters:
            raise RuntimeError(
                f"{path} of {library} ({hook.module}) takes ({here}); opsd_kernels was "
                f"written for ({parameters}), and replaces nothing. {remedy(hook)}"
            )
    return look_up(hook.replaced)
