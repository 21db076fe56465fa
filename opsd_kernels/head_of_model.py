"""The head of a causal language model of transformers, which is not imported for it.

What a model makes of its head's products is written in its `forward`, and told by its config under
names that mean different things in different models. Those that are known are read here; what is
set and not known is refused by name, since a loss that ignored it would be wrong in silence.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.checks import is_dtensor
from opsd_kernels.head import LMHead

# What logits are multiplied by: a config's attribute to this power, by the beginning of
# `model_type`. (Granite divides by what HyperCLOVA X multiplies with.)
SCALES = {
    "logit_scale": {"cohere": 1},
    "logits_scaling": {"granite": -1, "hyperclovax": 1},
}
SOFTCAP = "final_logit_softcapping"
# Other logits: of attention and of routers; and what a forward returns.
OF_OTHERS = re.compile("attn|attention|router|num_logits|output_auxiliary")
# Scales of models that are not known here, whose names do not say so.
OTHER_SCALES = ("lm_head_multiplier", "output_multiplier", "dim_model_base")


def _as_it_is(t: Tensor) -> Tensor:
    return t


def head_of_model(model: Any, gather: Callable[[Tensor], Tensor] = _as_it_is) -> LMHead:
    """See `LMHead.of`. `gather` makes a weight or bias that is sharded whole."""
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
        raise TypeError(
            "model must be a causal language model of transformers, with get_output_embeddings "
            f"and a config, got {type(model).__name__}"
        )
    module = model.get_output_embeddings()
    if module is None:
        raise ValueError(f"model has no LM head: {type(model).__name__} returns no logits")
    _check_module(module)
    weight = gather(module.weight)
    bias = None if module.bias is None else gather(module.bias)
    _check_weight(weight)
    config = model.config
    if callable(getattr(config, "get_text_config", None)):
        config = config.get_text_config()
    rows, vocab_size = weight.shape[0], getattr(config, "vocab_size", None)
    if vocab_size is not None and vocab_size > rows:
        raise ValueError(
            f"the LM head has {rows} rows, fewer than the vocabulary's {vocab_size}: "
            "a head that is sharded over processes must be gathered first"
        )
    return LMHead(
        weight,
        bias,
        getattr(config, SOFTCAP, None),
        _scale(config),
        None if vocab_size == rows else vocab_size,
    )


def _check_module(module: Any) -> None:
    """Refuse a head whose weight is not all that it multiplies by, or not here."""
    name, weight = type(module).__name__, getattr(module, "weight", None)
    if hasattr(module, "base_layer") or hasattr(module, "original_module"):
        raise ValueError(
            f"the LM head is wrapped by PEFT ({name}), whose adapter the loss would ignore: leave "
            "it out of target_modules and modules_to_save, or merge the adapter first"
        )
    if weight is None:
        raise ValueError(f"the LM head, a {name}, has no weight")
    if not weight.is_floating_point():
        raise ValueError(
            f"the LM head is quantized ({name}, {weight.dtype}): load the model without, in "
            'bitsandbytes with llm_int8_skip_modules=["lm_head"]'
        )
    if type(module).forward is not torch.nn.Linear.forward:
        raise ValueError(
            f"the LM head is a {name}, which may do more than torch.nn.Linear: "
            "make an LMHead of what it does"
        )


def _check_weight(weight: Tensor) -> None:
    if is_dtensor(weight):
        raise ValueError(
            "the LM head's weight is a DTensor, sharded by FSDP2: call unshard() on the module "
            "that holds it first, or make an LMHead of weight.full_tensor(), to train it with "
            "grad_placements=[Partial()]"
        )
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"the LM head's weight must be [V, D], got shape {list(weight.shape)}: FSDP1 flattens "
            "it and ZeRO-3 leaves it empty; gather it first, by FSDP.summon_full_params or "
            "deepspeed.zero.GatheredParameters"
        )
    if weight.is_meta:
        raise ValueError("the LM head's weight is on the meta device, offloaded: load it first")


def _scale(config: Any) -> float:
    """σ; refuses whatever else a config says of logits."""
    scale, model_type = 1.0, config.model_type
    for name, value in config.to_dict().items():
        is_scale = ("logit" in name and not OF_OTHERS.search(name)) or name in OTHER_SCALES
        if name == SOFTCAP or not is_scale or value is None or value is False or value == 1:
            continue
        powers = [
            power for prefix, power in SCALES.get(name, {}).items() if model_type.startswith(prefix)
        ]
        if not powers:
            raise ValueError(
                f"the config of this {model_type} model sets {name}={value!r}, which LMHead.of "
                "does not know and will not ignore: make the LMHead yourself, of what "
                f"{model_type} does with it"
            )
        scale *= float(value) ** powers[0]
    return scale
