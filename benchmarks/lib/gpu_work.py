"""What a GPU is given to do: its launches, counted without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

# Operations that launch nothing, though they are no views.
FREE = ("empty", "new_empty", "empty_like", "detach", "_unsafe_view")


@contextmanager
def recorded_launches() -> Iterator[list[str]]:
    """Collect the names of PyTorch's operations and of Triton's kernels that a GPU would be given
    to do, in their order. Stands inside `allocations.fake_device("cuda")`."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    names: list[str] = []

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        names.append(getattr(kernel, "fn", kernel).__name__)

    with (
        mock.patch.object(GridExecutor, "__call__", launch),
        mock.patch.object(JITFunction, "run", launch),
        _Operations(names),
    ):
        yield names


class _Operations(TorchDispatchMode):
    """Appends the names of operations that launch something."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        if func.namespace == "aten" and not func.is_view and name not in FREE:
            self.names.append(name)
        return out
