"""Less memory for layers and weights: what is left once there are no logits.

Each layer's input is kept, and the layer computed again in backward (activation checkpointing).
At length even these inputs are too much, and within a layer what the MLP makes: its width is three
times that of the rest. The inputs can wait in host memory, and the MLP, which looks at one token at
a time, can take a few of them at a time. Weights can be spread over several processes (FSDP2).
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from opsd_train.config import Config


def save_memory(model: PreTrainedModel, config: Config) -> None:
    """As the config says; exact but for rounding.

    Raises:
        ValueError: mlp_tokens of a model whose layers have no MLP of the usual name.
    """
    if config.activation_checkpointing:
        # On a CPU they are in host memory as they are.
        offload = config.offload_checkpoints and has_memory_of_its_own(model.device)
        model.activation_checkpointing_enable(offload=offload)
    if config.mlp_tokens is not None:
        tile_mlps(model, config.mlp_tokens)


def tile_mlps(model: PreTrainedModel, tokens: int) -> None:
    """Let the MLPs of all layers take `tokens` tokens at a time.

    Raises:
        ValueError: they have another name than mlp.
    """
    mlps = [m for name, m in model.get_decoder().named_modules() if name.endswith(".mlp")]
    if not mlps:
        raise ValueError(
            f"mlp_tokens: the layers of this {type(model).__name__} have no module named mlp; "
            "leave it at none"
        )
    for mlp in mlps:
        mlp.whole_forward, mlp.tile_tokens = mlp.forward, tokens
        mlp.forward = MethodType(forward_in_tiles, mlp)


def has_memory_of_its_own(device: torch.device) -> bool:
    return device.type != "cpu"


def forward_in_tiles(module: Any, h: Tensor) -> Tensor:
    """The forward [..., D] → [..., D] of a module that looks at one token at a time, in tiles of
    `tile_tokens` tokens; in backward each tile is computed again. Bound to its module, so that a
    copy of the module has its own."""
    rows = h.flatten(0, -2)
    if rows.shape[0] <= module.tile_tokens:
        return module.whole_forward(h)

    def of(tile: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return module.whole_forward(tile)
        return checkpoint(module.whole_forward, tile, use_reentrant=False)

    return torch.cat([of(tile) for tile in rows.split(module.tile_tokens)]).view_as(h)


# FSDP2: every process keeps a part of each weight, and all of it only while it is needed


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
    """Call with all weights of a backbone in place, if it is sharded: what is called may then use
    the model as often as it likes, without waiting for other processes."""
    layers = [module for module in backbone.modules() if isinstance(module, FSDPModule)]
    if not layers:
        return call()

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
    """target ← source; a sharded target keeps its part of it."""
    source = source.to(target.device)
    if isinstance(target, DTensor):
        source = distribute_tensor(source, target.device_mesh, target.placements)
    with torch.no_grad():
        target.copy_(source)
