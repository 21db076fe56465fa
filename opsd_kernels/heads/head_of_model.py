"""Read the LM head of a causal language model of transformers, without importing transformers.

No forward is run: the class of a model tells what its forward does with hidden states. `KNOWN` are
the classes whose logits were compared with the head that is read here (`python
benchmarks/heads.py`). Any other class is refused by name. So is a model of a known class if a hook
or a replaced forward may change its logits.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .known_models import KNOWN
from .vocabulary_parallel import is_dtensor

# The number that a forward multiplies its logits by (power 1) or divides them by (power −1): the
# attribute of the model that holds it, by class. The logits of any other class are h Wᵀ + b,
# whatever its config says: some vision-language models have a text config with a cap or a scale
# that their forward never reads.
SCALES: dict[str, tuple[str, int]] = {
    "Cohere2ForCausalLM": ("logit_scale", 1),
    "Cohere2MoeForCausalLM": ("logit_scale", 1),
    "CohereCompassForCausalLM": ("logit_scale", 1),
    "CohereCompassForConditionalGeneration": ("logit_scale", 1),
    "CohereForCausalLM": ("logit_scale", 1),
    "FalconH1ForCausalLM": ("model.lm_head_multiplier", 1),
    "Granite4VisionForConditionalGeneration": ("config.text_config.logits_scaling", -1),
    "GraniteDoclingForConditionalGeneration": ("config.text_config.logits_scaling", -1),
    "GraniteForCausalLM": ("config.logits_scaling", -1),
    "GraniteMoeForCausalLM": ("config.logits_scaling", -1),
    "GraniteMoeHybridForCausalLM": ("config.logits_scaling", -1),
    "GraniteMoeSharedForCausalLM": ("config.logits_scaling", -1),
    "GraniteMoeSWAForCausalLM": ("config.logits_scaling", -1),
    "GraniteSWAForCausalLM": ("config.logits_scaling", -1),
    "HyperCLOVAXForCausalLM": ("config.logits_scaling", 1),
    "HyperCLOVAXVisionV2ForConditionalGeneration": ("config.text_config.logits_scaling", 1),
    "InklingForCausalLM": ("config.logits_mup_width_multiplier", -1),
    "MiniCPM3ForCausalLM": ("config.logits_scaling", -1),
    "MuseGlimmerForConditionalGeneration": ("config.text_config.output_multiplier", 1),
    "MuseSparkForConditionalGeneration": ("config.text_config.output_multiplier", 1),
}
# The attribute that holds the cap of the logits.
SOFTCAPS: dict[str, str] = {
    "BeamForCausalLM": "config.final_logit_softcapping",
    "Gemma2ForCausalLM": "config.final_logit_softcapping",
    "Gemma3ForCausalLM": "config.final_logit_softcapping",
    "Gemma3nForCausalLM": "config.final_logit_softcapping",
    "Gemma4ForCausalLM": "config.final_logit_softcapping",
    "Gemma4ForConditionalGeneration": "config.text_config.final_logit_softcapping",
    "Gemma4UnifiedForCausalLM": "config.final_logit_softcapping",
    "Gemma4UnifiedForConditionalGeneration": "config.text_config.final_logit_softcapping",
    "Inkling2ForCausalLM": "logit_softcap.softcap",
    "Inkling2ForConditionalGeneration": "logit_softcap.softcap",
    "MistralLarge4ForConditionalGeneration": "final_logit_softcapping",
    "MuseGlimmerForConditionalGeneration": "config.text_config.final_logit_softcapping",
    "MuseSparkForConditionalGeneration": "config.text_config.final_logit_softcapping",
    "NanoChatForCausalLM": "config.final_logit_softcapping",
    "PaliGemmaForConditionalGeneration": "config.text_config.final_logit_softcapping",
    "RecurrentGemmaForCausalLM": "config.logits_soft_cap",
    "VaultGemmaForCausalLM": "config.final_logit_softcapping",
    "xLSTMForCausalLM": "config.output_logit_soft_cap",
}
# The attribute that holds the size of the vocabulary, for a forward that drops the padded rows of a
# head. Elsewhere the rows beyond the config's vocabulary are padding.
VOCABULARIES: dict[str, str] = {
    "Inkling2ForCausalLM": "config.unpadded_vocab_size",
    "Inkling2ForConditionalGeneration": "config.text_config.unpadded_vocab_size",
    "InklingForCausalLM": "config.unpadded_vocab_size",
}
# Packages whose code may wrap a forward or hook into it: it moves, gathers or casts, and computes
# nothing else. torch.nn.utils is not among them: its hooks normalize and prune weights.
TRUSTED = (
    "transformers",
    "accelerate",
    "deepspeed",
    "torch._dynamo",
    "torch.amp",
    "torch.distributed",
    "torch.nn.modules",
    "torch.utils",
    "trl",
)


# The first fields of an `LMHead`: weight, bias, softcap, scale, vocab_size.
Fields = tuple[Tensor, Tensor | None, float | None, float, int | None]


def head_of_model(model: Any, gather: Callable[[Tensor], Tensor] | None = None) -> Fields:
    """The fields of `LMHead.of`. `gather` makes a sharded weight or bias whole."""
    causal_lm, class_name = check_model(model)
    if class_name not in KNOWN:
        kinds = [kind for kind in type(causal_lm).__mro__ if _is_of_transformers(kind.__module__)]
        if KNOWN.intersection(kind.__name__ for kind in kinds):
            _refuse_forward(type(causal_lm).forward, f"this {type(causal_lm).__name__}")
        raise ValueError(
            f"LMHead.of does not know how a {type(causal_lm).__name__} makes its logits "
            f"(docs/heads.md lists the models that it knows). {_BY_HAND}"
        )
    return read_head(causal_lm, class_name, gather)


def check_model(model: Any) -> tuple[Any, str]:
    """The model without its wrappers, and the name of the class of transformers whose forward it
    has; "" if that forward is not of transformers.

    Raises:
        TypeError: model is no causal language model of transformers.
        ValueError: the model, a wrapper or its head has a hook or a replaced forward that may
            change logits.
    """
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(model, "config"):
        raise TypeError(
            "model must be a causal language model of transformers, with get_output_embeddings "
            f"and a config, got {type(model).__name__}"
        )
    causal_lm = model
    for causal_lm in _wrappers(model):
        name = f"this {type(causal_lm).__name__}"
        _check_hooks(causal_lm, name)
        if _compiled(causal_lm) is None:
            _check_forward(causal_lm, name)
    forward = _layers(type(causal_lm).forward)[-1]
    class_name = forward.__qualname__.partition(".")[0]
    if causal_lm.get_output_embeddings() is None:
        raise ValueError(f"model has no LM head: {type(causal_lm).__name__} returns no logits")
    for module in _around_backbone(causal_lm):
        of = f"a {type(module).__name__} of {type(causal_lm).__name__}"
        _check_hooks(module, of)
        _check_forward(module, of)
        if not _is_trusted(function := _layers(type(module).forward)[-1]):
            _refuse_forward(function, of)
    return causal_lm, class_name if _is_of_transformers(_module_of(forward)) else ""


def backbone_of(model: Any) -> Any:
    """The submodule that makes the last hidden states of a model, or None."""
    for backbone in (getattr(model, name, None) for name in ("base_model", "model")):
        if isinstance(backbone, torch.nn.Module) and backbone is not model:
            return backbone
    return None


def read_head(
    model: Any, class_name: str, gather: Callable[[Tensor], Tensor] | None = None
) -> Fields:
    """The head of a model whose forward is that of the class `class_name` of transformers."""
    module = model.get_output_embeddings()
    _check_module(module)
    weight, bias = module.weight, module.bias
    if gather is not None:
        weight, bias = gather(weight), None if bias is None else gather(bias)
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

    def number(path: str | None) -> Any:
        return None if path is None else operator.attrgetter(path)(model)

    unpadded = number(VOCABULARIES.get(class_name))
    vocab_size = vocab_size if unpadded is None else min(unpadded, rows)
    path, power = SCALES.get(class_name, (None, 1))
    scale = number(path)
    scale = 1.0 if scale is None else float(scale) ** power
    softcap = number(SOFTCAPS.get(class_name))
    return weight, bias, softcap, scale, None if vocab_size == rows else vocab_size


def stand_in(t: Tensor) -> Tensor:
    """A tensor with the shape of the whole parameter that takes no memory."""
    shape = getattr(t, "ds_shape", t.shape)
    return t if t.is_meta else torch.empty((), dtype=t.dtype).expand(shape)


_BY_HAND = (
    "Or pass an LMHead made by hand, LMHead(weight, bias, softcap, scale), of what the model "
    "does; opsd_kernels.head_check.check_head compares its logits with the model's own"
)


def _wrappers(model: Any) -> Iterator[Any]:
    """A model's wrappers (PEFT, torch.compile) from the outside in, and the model itself."""
    yield model
    if callable(inner := getattr(model, "get_base_model", None)):
        yield from _wrappers(inner())
    elif (inner := _compiled(model)) is not None:
        yield from _wrappers(inner)


def _compiled(model: Any) -> Any:
    """The model that torch.compile wrapped, or None."""
    return vars(model).get("_modules", {}).get("_orig_mod")


def _around_backbone(model: Any) -> list[Any]:
    """The modules outside the backbone, apart from the LM head: they may change logits."""
    backbone = backbone_of(model)
    if backbone is None:
        return []
    head = model.get_output_embeddings()
    head_modules = head.modules() if isinstance(head, torch.nn.Module) else ()
    others = {id(module) for module in (model, *backbone.modules(), *head_modules)}
    return [module for module in model.modules() if id(module) not in others]


def _check_forward(module: Any, name: str) -> None:
    """Refuse a forward that is not that of the module's class, unless trusted code wraps it."""
    kind = type(module)
    if kind.__call__ is not torch.nn.Module.__call__:
        raise ValueError(f"{name} has a __call__ of its own, which may change logits")
    own = _layers(kind.forward)
    replaced = vars(module).get("forward")
    layers = own if replaced is None else _layers(replaced)
    if layers[-1] is not own[-1]:
        _refuse_forward(layers[-1], name)
    for layer in (*own[:-1], *layers[:-1]):
        if not _is_trusted(layer):
            _refuse_forward(layer, name)


def _refuse_forward(function: Any, name: str) -> None:
    raise ValueError(
        f"the forward of {name} was replaced by {_name_of(function)}, which may change logits. "
        f"Put the forward back. {_BY_HAND}"
    )


def _check_hooks(module: Any, name: str) -> None:
    """Refuse a hook that may change the input, the output or the gradients of a module."""
    hooks = (
        *vars(module).get("_forward_pre_hooks", {}).values(),
        *vars(module).get("_forward_hooks", {}).values(),
        *vars(module).get("_backward_pre_hooks", {}).values(),
        *vars(module).get("_backward_hooks", {}).values(),
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_forward_hooks.values(),
        *_of_accelerate(vars(module).get("_hf_hook")),
    )
    for hook in hooks:
        if not _is_trusted(hook):
            raise ValueError(
                f"{name} has a hook, {_name_of(hook)}, which may change logits: a loss calls "
                f"neither the LM head nor its hooks. Remove the hook. {_BY_HAND}"
            )


def _of_accelerate(hook: Any) -> Iterable[Any]:
    """The parts of a hook of accelerate."""
    if hook is None:
        return ()
    return getattr(hook, "hooks", (hook,))


def _layers(function: Any) -> list[Any]:
    """A function and the functions that it wraps, by `__wrapped__`, from the outside in."""
    layers = []
    while function is not None:
        wrapped = getattr(function, "__wrapped__", None)
        while isinstance(function, functools.partial):
            function = function.func
        layers.append(getattr(function, "__func__", function))
        function = wrapped
    return layers


def _is_trusted(function: Any) -> bool:
    module = _module_of(function)
    return any(module == name or module.startswith(f"{name}.") for name in TRUSTED)


def _is_of_transformers(module: str) -> bool:
    return module.startswith("transformers.models.")


def _module_of(function: Any) -> str:
    """The module that a function, or the class of a callable object, was defined in. Its
    `__module__` may be another's: `functools.wraps` copies it."""
    function = _layers(function)[0]
    if (names := getattr(function, "__globals__", None)) is not None:
        return str(names.get("__name__", ""))
    return type(function).__module__


def _name_of(function: Any) -> str:
    function = _layers(function)[0]
    code = getattr(function, "__code__", None)
    return f"{_module_of(function)}.{type(function).__name__ if code is None else code.co_name}"


def _check_module(module: Any) -> None:
    """Refuse a head that does more than multiply by its weight, or whose weight is not here."""
    name, weight = type(module).__name__, getattr(module, "weight", None)
    if hasattr(module, "base_layer") or hasattr(module, "original_module"):
        raise ValueError(
            f"the LM head is wrapped by PEFT ({name}), whose adapter the loss would ignore: leave "
            "it out of target_modules and modules_to_save, or merge the adapter first"
        )
    if weight is None:
        raise ValueError(f"the LM head, a {name}, has no weight")
    if not isinstance(weight, Tensor) or _is_packed(weight):
        of = "" if not isinstance(weight, Tensor) else f", {_kind_of(weight)}"
        raise ValueError(
            f"the LM head is quantized ({name}{of}): load the model with a head that is not, in "
            'bitsandbytes by llm_int8_skip_modules=["lm_head"]'
        )
    if hasattr(module, "parametrizations"):
        raise ValueError(
            f"the LM head is parametrized ({', '.join(module.parametrizations)}): make an LMHead "
            "of its weight as it is now, LMHead(model.get_output_embeddings().weight)"
        )
    linear = _layers(torch.nn.Linear.forward)[-1]
    if _layers(type(module).forward)[-1] is not linear:
        raise ValueError(
            f"the LM head is a {name}, which may do more than torch.nn.Linear: "
            "make an LMHead of what it does"
        )
    if _module_of(linear) != "torch.nn.modules.linear":
        _refuse_forward(linear, "torch.nn.Linear")
    _check_hooks(module, f"the LM head, a {name},")
    _check_forward(module, f"the LM head, a {name},")


def _is_packed(weight: Tensor) -> bool:
    """Whether a weight is packed: it holds other numbers than those of the product."""
    if not weight.is_floating_point():
        return True
    return not is_dtensor(weight) and is_traceable_wrapper_subclass(weight.data)


def _kind_of(weight: Tensor) -> str:
    return type(weight.data).__name__ if weight.is_floating_point() else str(weight.dtype)


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
