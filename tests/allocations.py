"""See every tensor that is allocated, and how much is alive at once."""

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Within it, `peak` is the largest number of bytes alive at once in storages that were
    allocated meanwhile and hold at least `smallest` bytes; `shapes` those of all tensors that were
    allocated; `ops` the operations that ran."""

    def __init__(self, smallest: int = 0):
        super().__init__()
        self.smallest = smallest
        self.peak = 0
        self.ops: list[str] = []
        self.shapes: list[torch.Size] = []
        self._known: set[int] = set()
        self._alive: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Storages that come in are not new, whatever the operation returns.
        before = {id_of(t) for t in tensors((args, kwargs))}
        self._alive = [(ref, size) for ref, size in self._alive if not ref.expired()]
        out = func(*args, **kwargs)
        self.ops.append(func.name())
        if "set_" in func.name():  # Triton's interpreter looks at storages that exist
            return out
        alive = {ref.cdata for ref, _ in self._alive}
        for t in tensors(out):
            storage = t.untyped_storage()
            if id_of(t) in before | alive:
                continue
            self.shapes.append(t.shape)
            if storage.nbytes() < max(1, self.smallest):
                continue
            alive.add(id_of(t))
            self._alive.append((StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self._alive))
        return out


def tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def id_of(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata
