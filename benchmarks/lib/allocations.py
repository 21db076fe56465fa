"""See every tensor that is allocated, and how much is alive at once; of any size, without memory.

Tensors of PyTorch's fake mode have shapes and no contents, so that the allocations of a run too
large for any machine can be counted on a laptop. `fake_device` makes them say that they are on a
GPU: what depends on the device then takes the GPU's way.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


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
        self._alive: list[tuple[StorageWeakRef, int]] = []

    @property
    def alive(self) -> int:
        """Bytes that are alive now."""
        return sum(size for ref, size in self._alive if not ref.expired())

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


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def id_of(t: Tensor) -> int:
    return t.untyped_storage()._cdata


@contextmanager
def fake_device(
    device: str, fake_mode: FakeTensorMode | None = None
) -> Iterator[list[tuple[torch.Size, torch.dtype]]]:
    """Within it tensors are made without contents, and say that they are on `device`: "cuda" is an
    H200, whether there is one or not.

    Triton's kernels are not run: they allocate nothing. What is yielded collects the tensors that
    they were given, shape and dtype of each. A number read from a tensor is 1, a truth value False,
    and two tensors are equal. A `fake_mode` is that of fake tensors that exist already.
    """
    given: list[tuple[torch.Size, torch.dtype]] = []
    # What they keep of the device is to be that of this machine.
    for module in ("trl.kernels.chunked_divergence", "liger_kernel.transformers", "orda_kernel"):
        with suppress(ImportError):
            import_module(module)

    def launch(*args: Any, **kwargs: Any) -> None:
        given.extend((t.shape, t.dtype) for t in tensors((args, kwargs)))

    with ExitStack() as stack:
        stack.enter_context(fake_mode or FakeTensorMode())
        redirect = stack.enter_context(_Redirect())
        # Our operator is opaque to the compiler only: its allocations are to be seen here.
        stack.enter_context(mock.patch("opsd_kernels.schedules.choice.FakeTensor", ()))
        if device == "cuda":
            says = property(
                lambda t: _real_device(t) if redirect.inside else torch.device("cuda", 0)
            )
            patches: list[tuple[Any, str, Any]] = [
                (FakeTensor, "device", says),
                (FakeTensor, "data_ptr", lambda t: 0),  # aligned, as what is allocated is
                (torch.cuda, "is_available", lambda: True),
                (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
                (torch.cuda, "get_device_properties", lambda *_: H200),
                (torch.cuda, "is_bf16_supported", lambda **_: True),
                (torch.cuda, "current_device", lambda: 0),
                (torch.cuda, "device", nullcontext),
                *_launchers(launch),
            ]
            for where, name, stand_in in patches:
                stack.enter_context(mock.patch.object(where, name, stand_in))
        yield given


_real_device = FakeTensor.device.__get__


def _launchers(launch: Any) -> list[tuple[Any, str, Any]]:
    """What to patch so that kernels are launched by `launch`."""
    try:
        from triton.runtime.interpreter import GridExecutor
        from triton.runtime.jit import JITFunction
    except ImportError:
        return []
    return [(JITFunction, "run", launch), (GridExecutor, "__call__", launch)]


ADDMM_INTO_FP32 = (torch.ops.aten.addmm.dtype, torch.ops.aten.addmm.dtype_out)


# Of its properties those that a peer asks for.
H200 = SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 10**9
)


class _Redirect(TorchDispatchMode):
    """Operations on a GPU's tensors, done without one."""

    inside = 0  # operations that are being done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: False}.get(args[0].dtype, 1)
        args, kwargs = tree_map_only(torch.device, _to_cpu, (args, kwargs or {}))
        if func in ADDMM_INTO_FP32:  # which torch 2.11 cannot do without contents
            return kwargs["out"] if "out" in kwargs else torch.empty_like(args[0], dtype=args[3])
        self.inside += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.inside -= 1


def _to_cpu(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "cuda" else device
