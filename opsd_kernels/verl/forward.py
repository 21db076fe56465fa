"""The forward of a text model under verl's fused kernels: log-probabilities and entropies of packed
tokens, in place of logits."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from verl.models.transformers.dense_common import CausalLMOutputForPPO, forward_base_model

from ..adapting.patches import Hook
from ..heads import known_models
from ..heads.head import LMHead
from ..heads.head_of_model import read_head, stand_in
from ..loss import fused_entropy, fused_log_probs
from ..top_k import fused_top_k

T = TypeVar("T")
# Of these the logits are others in the transformers before 5.11 that verl needs.
KNOWN = known_models.KNOWN - {"CpmAntForCausalLM", "PaliGemmaForConditionalGeneration"}
MODULE = "verl.models.transformers.dense_common"
FORWARD = (
    "self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, "
    "use_cache, output_attentions, output_hidden_states, return_dict, cache_position, "
    "logits_to_keep, temperature, shift_labels, loss_kwargs"
)
BACKBONE = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "cache_position",
)


class Wanted:
    """What a micro-batch needs of the forward of its model.

    FSDP casts the tensors that it finds in the arguments of a forward, also in tuples, dicts and
    dataclasses. It does not look into an object of this class.
    """

    def __init__(
        self, log_probs: bool, entropy: bool, ids: Tensor | None, log_q: Tensor | None
    ) -> None:
        self.log_probs = log_probs
        self.entropy = entropy
        self.ids = ids  # [1, N, K] of the teacher's tokens
        self.log_q = log_q  # [1, N, K], their log-probabilities
        self.reason: str | None = None  # why the forward was verl's own; set by the forward

    @property
    def losses(self) -> list[str]:
        wanted = {
            "log_probs": self.log_probs,
            "entropy": self.entropy,
            "forward_kl_topk": self.ids is not None,
        }
        return [name for name, is_wanted in wanted.items() if is_wanted]


@dataclass
class Output(CausalLMOutputForPPO):
    """What the forward returns; each field is None unless it was wanted. `log_probs` and `entropy`
    [1, N] are those of verl's own fused kernels."""

    top_k_log_probs: Tensor | None = None
    """[1, N, K] fp32 log p of the teacher's tokens."""
    top_k_ids: Tensor | None = None
    """[1, N, K] the student's K likeliest tokens."""


def _make(theirs: Callable[..., Any], dense_common: Any) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def forward(self: Any, *args: Any, opsd_kernels: Wanted | None = None, **inputs: Any) -> Any:
        if opsd_kernels is None:
            return theirs(self, *args, **inputs)
        try:
            head = head_without_weight(self)
        except ValueError as error:
            opsd_kernels.reason = str(error)
        if opsd_kernels.reason:
            return theirs(self, *args, **inputs)
        made = forward_base_model(self, **{name: inputs.get(name) for name in BACKBONE})
        labels, temperature = inputs["shift_labels"], inputs["temperature"]
        lm_head = self.get_output_embeddings()

        def compute(h: Tensor) -> tuple[Tensor | None, ...]:
            W = in_dtype_of(h, head._replace(weight=lm_head.weight, bias=lm_head.bias))
            return from_hidden_states(h, W, labels, temperature, opsd_kernels)

        results = within(lm_head, compute, made[0])
        fields = ("log_probs", "entropy", "top_k_log_probs", "top_k_ids")
        return Output(
            hidden_states=made.hidden_states,
            attentions=made.attentions,
            past_key_values=made.past_key_values,
            **dict(zip(fields, results, strict=True)),
        )

    return forward


def from_hidden_states(
    h: Tensor, W: LMHead, labels: Tensor, temperature: float, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The fields of `Output` from hidden states h [1, N, D] and labels [1, N].

    The log-probabilities of a token's label and of the teacher's K tokens are computed in one pass.
    """
    log_probs = entropy = top_k_log_probs = top_k_ids = None
    if wanted.entropy:
        entropy = fused_entropy(h, W, temperature=temperature)
    if wanted.ids is None:
        if wanted.log_probs:
            log_probs = fused_log_probs(h, W, labels, temperature=temperature)
        return log_probs, entropy, None, None
    targets = wanted.ids
    if wanted.log_probs:
        targets = torch.cat([targets, labels[..., None].to(targets.dtype)], dim=-1)
    of_targets = fused_log_probs(h, W, targets, temperature=temperature)
    K = wanted.ids.shape[-1]
    # Copies: FSDP2 hooks into what a forward returns, and warns of views.
    top_k_log_probs = of_targets[..., :K].clone()
    if wanted.log_probs:
        log_probs = of_targets[..., K].clone()
    top_k_ids = fused_top_k(h, W, K, temperature=temperature).ids
    return log_probs, entropy, top_k_log_probs, top_k_ids


def within(module: Any, function: Callable[[Tensor], T], h: Tensor) -> T:
    """`function(h)`, computed as the forward of a module.

    A head that FSDP2 has wrapped is whole within its forward alone. FSDP2 also gathers it for the
    backward of what its forward returns, and reduces its gradient as that of other parameters.
    """
    own = vars(module).get("forward")
    module.forward = function
    try:
        return module(h)
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def head_without_weight(model: Any) -> LMHead:
    """The head of a model, with tensors of the shape of its weight and bias in their place. Padded
    rows count, as in the logits of the model.

    Raises:
        ValueError: how the model makes its logits is not known, or its head has an adapter or is
            quantized.
    """
    # The class whose forward verl has replaced.
    kind = next(kind for kind in type(model).__mro__ if "forward" in vars(kind))
    if not kind.__module__.startswith("transformers.models.") or kind.__name__ not in KNOWN:
        raise ValueError(f"opsd_kernels does not know how a {kind.__name__} makes its logits")
    return LMHead(*read_head(model, kind.__name__, stand_in))._replace(vocab_size=None)


def in_dtype_of(h: Tensor, W: LMHead) -> LMHead:
    """A head in the dtype of its hidden states; under autocast as it is, since the loss casts."""
    if torch.is_autocast_enabled(h.device.type):
        return W
    bias = None if W.bias is None else W.bias.to(h.dtype)
    return W._replace(weight=W.weight.to(h.dtype), bias=bias)


_BASE = {"forward_base_model": ", ".join(("self", *BACKBONE))}
HOOKS = tuple(
    Hook("FSDPEngineWithLMHead", MODULE, name, _make, {name: FORWARD} | _BASE)
    for name in ("forward_with_torch_backend", "forward_with_triton_backend")
)
