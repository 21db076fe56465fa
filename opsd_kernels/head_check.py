"""Compare the logits that a loss computes from a head with the model's own, on a few tokens.

`LMHead.of` runs nothing: it reads a model's class, config and weights. The model may do more, by a
subclass, a hook that was registered later, or a wrapper around its layers. One short forward shows
it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .heads.head import LMHead, LogitMap

TOKENS = 16
# Allowed distance, relative to the logits' spread. TF32 and another order of sums stay below it.
TOLERANCE = 1e-3
# Allowed besides, in units in the last place: logits in 16 bits are rounded in between and at the
# end.
ROUNDINGS = 4


@torch.no_grad()
def check_head(
    model: Any,
    make_logits: Callable[..., Tensor],
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> None:
    """Compare the logits that a loss would compute with the model's own, on at most 16 tokens.

    `model` and `make_logits` are called once each, without gradient, and in eval mode so that
    dropout is off. Where processes share a model (FSDP2, ZeRO-3), all of them must call this at the
    same time; each process gets its own result.

    Args:
        model: called as `model(input_ids=…, attention_mask=…, use_cache=False)`, with all of its
            wrappers (PEFT, DDP, FSDP2, …). It returns an object with `logits` [1, L, V].
        make_logits: called as `make_logits(input_ids=…, attention_mask=…)` with the same [1, L]. It
            returns the logits [1, L, V] or [L, V] that the loss would compute: `head_logits` of the
            head and the hidden states that the loss is given.
        input_ids, attention_mask: [B, L] of a batch. A few of its tokens are used, without padding.

    Raises:
        ValueError: the logits differ by more than rounding. The message says by how much.
    """
    inputs = _few_tokens(input_ids, attention_mask)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        ours = make_logits(**inputs)
        theirs = getattr(model(**inputs, use_cache=False), "logits", None)
    finally:
        for module, mode in modes:
            module.training = mode
    if theirs is None:
        raise ValueError(f"this {type(model).__name__} returns no logits to compare with")
    ours, theirs = (z.reshape(-1, z.shape[-1]) for z in (ours, theirs))
    if ours.shape != theirs.shape:
        raise ValueError(
            f"the loss would make logits {list(ours.shape)} where {type(model).__name__} makes "
            f"{list(theirs.shape)}: the LM head that the loss is given is not the model's"
        )
    found, allowed = _distance(ours, theirs.to(ours.device))
    if not found <= allowed:
        raise ValueError(
            f"the loss would not have the logits of this {type(model).__name__}: on "
            f"{len(ours)} tokens they differ by {found:.3g} of their spread; rounding "
            f"explains {allowed:.2g}. The model's forward does more than its LM head and config "
            "say: pass an LMHead, and hidden states, from which the model's logits follow"
        )


def head_logits(head: LMHead, h: Tensor) -> Tensor:
    """Logits [..., V] of a few hidden states [..., D], in the dtype that `torch.nn.Linear`
    gives."""
    V = head.weight.shape[0] if head.vocab_size is None else head.vocab_size
    z = linear(h, head.weight[:V])
    logits = z.float()
    LogitMap(None if head.bias is None else head.bias[:V], head.softcap, head.scale).apply_(logits)
    return logits.to(z.dtype)


def _few_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """The first tokens of the longest sequence, as [1, L] inputs of a model."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    real = attention_mask != 0
    b = int(real.sum(-1).argmax())
    begin = int(real[b].int().argmax())
    length = max(1, int(real[b, begin : begin + TOKENS].int().cumprod(0).sum()))
    ids = input_ids[b : b + 1, begin : begin + length]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _distance(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The distance of logits [n, V] over their spread, and the distance that rounding explains. A
    constant added to a whole row changes no probability, and does not count."""
    narrower = max((ours.dtype, theirs.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    z, z_model = ours.float(), theirs.float()
    banned = z_model == -torch.inf
    if not torch.equal(z == -torch.inf, banned):
        return float("inf"), TOLERANCE
    n = (~banned).sum(-1, keepdim=True).clamp(min=1)
    z, z_model = (t.masked_fill(banned, 0) for t in (z, z_model))
    off, spread = (
        (t - t.sum(-1, keepdim=True) / n).masked_fill(banned, 0).norm()
        for t in (z - z_model, z_model)
    )
    rounding = ROUNDINGS * torch.finfo(narrower).eps * z_model.norm()
    spread = spread.clamp(min=torch.finfo(torch.float32).tiny)
    return float(off / spread), float(TOLERANCE + rounding / spread)
