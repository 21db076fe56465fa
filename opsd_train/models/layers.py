"""What layers keep for backward, made less: the memory that is left once there are no logits.

Each layer's input is kept, and the layer computed again in backward (activation checkpointing).
At length even these inputs are too much, and within a layer what the MLP makes: its width is three
times that of the rest. The inputs can wait in host memory, and the MLP, which looks at one token at
a time, can take a few of them at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
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
    """Let the MLPs of all layers take so many tokens at a time.

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
        mlp.forward = tiled(mlp.forward, tokens)


def has_memory_of_its_own(device: torch.device) -> bool:
    return device.type != "cpu"


def tiled(forward: Callable[[Tensor], Tensor], tokens: int) -> Callable[[Tensor], Tensor]:
    """The forward [..., D] → [..., D] of a module that looks at one token at a time, for so many
    tokens at a time; in backward each tile is computed again."""

    def in_tiles(h: Tensor) -> Tensor:
        rows = h.flatten(0, -2)
        if rows.shape[0] <= tokens:
            return forward(h)

        def of(tile: Tensor) -> Any:
            if not torch.is_grad_enabled():
                return forward(tile)
            return checkpoint(forward, tile, use_reentrant=False)

        return torch.cat([of(tile) for tile in rows.split(tokens)]).view_as(h)

    return in_tiles
