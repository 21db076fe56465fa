"""FSDP2: every process keeps a part of each weight, and all of it only while it is needed.

What is sharded is a `Backbone`, see backbone.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(backbone: Any, accelerator: Accelerator) -> None:
    """Shard a backbone's weights over all processes, layer by layer. The LM head is no part of it,
    and stays whole."""
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # What transformers never splits between devices, a layer each; the innermost first.
    kinds = backbone.model._no_split_modules or ()
    for module in reversed(list(backbone.model.modules())):
        if type(module).__name__ in kinds:
            fully_shard(module, mesh=mesh)
    fully_shard(backbone, mesh=mesh)
    register_fsdp_forward_method(backbone, "with_full_parameters")
    # FSDP remembers which weights have gradients when it first gathers them: the adapter is on now.
    call_with_full_parameters(backbone, lambda: None)


def call_with_full_parameters(backbone: Any, call: Callable[[], Any]) -> Any:
    """Call with all weights of a sharded backbone in place: what is called may then use the model
    as often as it likes, without waiting for other processes."""
    layers = [module for module in backbone.modules() if isinstance(module, FSDPModule)]

    def gather_and_call() -> Any:
        for layer in layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.unshard()
        try:
            return call()
        finally:
            for layer in layers[1:]:  # all but the backbone itself, which ends after this
                layer.set_reshard_after_forward(True, recurse=False)
                layer.reshard()

    return backbone.with_full_parameters(gather_and_call)


def full_tensor(t: Tensor) -> Tensor:
    """All of a tensor that may be sharded; called by all processes."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def copy_full(target: Tensor, source: Tensor) -> None:
    """target ← source, of which a sharded target keeps its part."""
    source = source.to(target.device)
    if isinstance(target, DTensor):
        source = distribute_tensor(source, target.device_mesh, target.placements)
    with torch.no_grad():
        target.copy_(source)
