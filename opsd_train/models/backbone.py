"""What both teacher and student score with."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Backbone(torch.nn.Module):
    """The model without its LM head, as a module whose forward returns what the loss reads: so data
    parallelism can wrap it, and nobody has to reach around the wrapper."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model: Any = model.get_decoder()

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        predicts: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """[N, D] last hidden states of the positions that predict the completions' N tokens, of
        sequences as `join` makes them, or `pack`.

        The LM head is never applied, neither to prompts nor to completions.
        """
        device = self.model.device
        if positions is None:
            assert mask is not None
            positions = (mask.cumsum(1) - 1).clamp(min=0)  # counted over real tokens
        h = self.model(
            input_ids=ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            position_ids=positions.to(device),
            use_cache=False,
        ).last_hidden_state
        return h[predicts.to(device)]

    def with_full_parameters(self, call: Callable[[], Any]) -> Any:
        """Call something; where the weights are sharded, with this module's own in place."""
        return call()
