"""The head of a causal language model of transformers, which is not imported for it.

No forward is run. What a model's forward makes of hidden states is known by its class: `KNOWN` are
those whose logits were compared with what is read here (`python benchmarks/heads.py`). Any other
class is refused by name, and so is a known one on which a hook or a replaced forward may change
what it does.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opsd_kernels.known_models import KNOWN
from opsd_kernels.vocabulary_parallel import is_dtensor

# What a forward multiplies its logits by: where in a model the number stands, its power, and the
# classes. Logits of a class that is in no list here are h Wᵀ + b, whatever its config says: some
# vision-language models have a text config with a cap or a scale, and never read it.
SCALES: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    (
        "logit_scale",
        1,
        (
            "Cohere2ForCausalLM",
            "Cohere2MoeForCausalLM",
            "CohereCompassForCausalLM",
            "CohereCompassForConditionalGeneration",
            "CohereForCausalLM",
        ),
    ),
    (
        "config.logits_scaling",
        -1,
        (
            "GraniteForCausalLM",
            "GraniteMoeForCausalLM",
            "GraniteMoeHybridForCausalLM",
            "GraniteMoeSWAForCausalLM",
            "GraniteMoeSharedForCausalLM",
            "GraniteSWAForCausalLM",
            "MiniCPM3ForCausalLM",
        ),
    ),
    (
        "config.text_config.logits_scaling",
        -1,
        ("Granite4VisionForConditionalGeneration", "GraniteDoclingForConditionalGeneration"),
    ),
    ("config.logits_scaling", 1, ("HyperCLOVAXForCausalLM",)),
    ("config.text_config.logits_scaling", 1, ("HyperCLOVAXVisionV2ForConditionalGeneration",)),
    ("config.logits_mup_width_multiplier", -1, ("InklingForCausalLM",)),
    ("model.lm_head_multiplier", 1, ("FalconH1ForCausalLM",)),
    (
        "config.text_config.output_multiplier",
        1,
        ("MuseGlimmerForConditionalGeneration", "MuseSparkForConditionalGeneration"),
    ),
)
# What a forward caps its logits at, as above.
SOFTCAPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "config.final_logit_softcapping",
        (
            "BeamForCausalLM",
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "Gemma3nForCausalLM",
            "Gemma4ForCausalLM",
            "Gemma4UnifiedForCausalLM",
            "NanoChatForCausalLM",
            "VaultGemmaForCausalLM",
        ),
    ),
    (
        "config.text_config.final_logit_softcapping",
        (
            "Gemma4ForConditionalGeneration",
            "Gemma4UnifiedForConditionalGeneration",
            "MuseGlimmerForConditionalGeneration",
            "MuseSparkForConditionalGeneration",
            "PaliGemmaForConditionalGeneration",
        ),
    ),
    (
        "logit_softcap.softcap",
        ("Inkling2ForCausalLM", "Inkling2ForConditionalGeneration"),
    ),
    ("final_logit_softcapping", ("MistralLarge4ForConditionalGeneration",)),
    ("config.logits_soft_cap", ("RecurrentGemmaForCausalLM",)),
    ("config.output_logit_soft_cap", ("xLSTMForCausalLM",)),
)
# Where a forward drops the rows that a head is padded with; elsewhere those beyond the vocabulary
# of the config are padding.
VOCABULARIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("config.unpadded_vocab_size", ("Inkling2ForCausalLM", "InklingForCausalLM")),
    ("config.text_config.unpadded_vocab_size", ("Inkling2ForConditionalGeneration",)),
)
# Code that may stand around a forward, or hook into it: it moves, gathers or casts, and computes
# nothing else. Not torch.nn.utils, which normalizes and prunes weights in hooks.
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


def _as_it_is(t: Tensor) -> Tensor:
    return t


# The first fields of an `LMHead`: weight, bias, softcap, scale, vocab_size.
Fields = tuple[Tensor, Tensor | None, float | None, float, int | None]


def head_of_model(model: Any, gather: Callable[[Tensor], Tensor] = _as_it_is) -> Fields:
    """See `LMHead.of`. `gather` makes a weight or bias that is sharded whole."""
    causal_lm, known = check_model(model)
    if known not in KNOWN:
        kinds = {kind.__name__ for kind in type(causal_lm).__mro__ if _is_trusted_class(kind)}
        if kinds & KNOWN:
            _refuse_forward(type(causal_lm).forward, f"this {type(causal_lm).__name__}")
        raise ValueError(
            f"LMHead.of does not know how a {type(causal_lm).__name__} makes its logits "
            f"(docs/heads.md lists the models that it knows). {_BY_HAND}"
        )
    return read_head(causal_lm, known, gather)


def check_model(model: Any) -> tuple[Any, str]:
    """The model itself, out of what wraps it, and the class of transformers whose forward it has.

    Raises:
        TypeError: no causal language model of transformers.
        ValueError: a hook or a replaced forward, of the model, a wrapper or its head, that may
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
    known = forward.__qualname__.partition(".")[0]
    if causal_lm.get_output_embeddings() is None:
        raise ValueError(f"model has no LM head: {type(causal_lm).__name__} returns no logits")
    for module in _around_backbone(causal_lm):
        of = f"a {type(module).__name__} of {type(causal_lm).__name__}"
        _check_hooks(module, of)
        _check_forward(module, of)
        if not _is_trusted(function := _layers(type(module).forward)[-1]):
            _refuse_forward(function, of)
    return causal_lm, known if _module_of(forward).startswith("transformers.models.") else ""


def backbone_of(model: Any) -> Any:
    """The part of a model that makes its last hidden states, or None."""
    for backbone in (getattr(model, name, None) for name in ("base_model", "model")):
        if isinstance(backbone, torch.nn.Module) and backbone is not model:
            return backbone
    return None


def read_head(model: Any, known: str, gather: Callable[[Tensor], Tensor] = _as_it_is) -> Fields:
    """The head of a model whose forward is that of the class `known` of transformers."""
    module = model.get_output_embeddings()
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
    unpadded = _number(model, known, VOCABULARIES)
    vocab_size = vocab_size if unpadded is None else min(unpadded, rows)
    scale, softcap = 1.0, _number(model, known, SOFTCAPS)
    for path, power, classes in SCALES:
        number = _number(model, known, ((path, classes),))
        if number is not None:
            scale *= float(number) ** power
    return weight, bias, softcap, scale, None if vocab_size == rows else vocab_size


def _number(model: Any, known: str, places: Iterable[tuple[str, tuple[str, ...]]]) -> Any:
    """What stands at the place that a class reads, or None."""
    for path, classes in places:
        if known in classes:
            return operator.attrgetter(path)(model)
    return None


_BY_HAND = (
    "Or pass an LMHead made by hand, LMHead(weight, bias, softcap, scale), of what the model does; "
    "opsd_kernels.head_check.check_head compares its logits with the model's own"
)


def _wrappers(model: Any) -> Iterator[Any]:
    """The model in what wraps it (PEFT, torch.compile), from the outside to the model itself."""
    yield model
    if callable(inner := getattr(model, "get_base_model", None)):
        yield from _wrappers(inner())
    elif (inner := _compiled(model)) is not None:
        yield from _wrappers(inner)


def _compiled(model: Any) -> Any:
    """The model that torch.compile wrapped, or None."""
    return vars(model).get("_modules", {}).get("_orig_mod")


def _around_backbone(model: Any) -> list[Any]:
    """The modules that may stand between hidden states and logits, but for the LM head."""
    backbone = backbone_of(model)
    if backbone is None:
        return []
    head = model.get_output_embeddings()
    head_modules = head.modules() if isinstance(head, torch.nn.Module) else ()
    others = {id(module) for module in (model, *backbone.modules(), *head_modules)}
    return [module for module in model.modules() if id(module) not in others]


def _check_forward(module: Any, name: str) -> None:
    """Refuse a forward that is not that of the module's class, but for what may stand around it."""
    kind = type(module)
    if kind.__call__ is not torch.nn.Module.__call__:
        raise ValueError(f"{name} has a __call__ of its own, whose logits LMHead.of would not have")
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
        f"the forward of {name} was replaced by {_name_of(function)}, and what that makes of "
        f"logits is not known. Put the forward back. {_BY_HAND}"
    )


def _check_hooks(module: Any, name: str) -> None:
    """Refuse a hook that may change what a module is given, what it returns or its gradients."""
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
                f"{name} has a hook, {_name_of(hook)}, and what that makes of logits is not known: "
                f"a loss calls neither the LM head nor its hooks. Remove the hook. {_BY_HAND}"
            )


def _of_accelerate(hook: Any) -> Iterable[Any]:
    """The hooks that a hook of accelerate is made of."""
    if hook is None:
        return ()
    return getattr(hook, "hooks", (hook,))


def _layers(function: Any) -> list[Any]:
    """A function, and what it says that it wraps, from the outside to the inside."""
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


def _is_trusted_class(kind: type) -> bool:
    return kind.__module__.startswith("transformers.models.")


def _module_of(function: Any) -> str:
    """The module whose code a function, or a callable object, runs; `functools.wraps` copies its
    `__module__` from another."""
    function = _layers(function)[0]
    if (names := getattr(function, "__globals__", None)) is not None:
        return str(names.get("__name__", ""))
    return type(function).__module__


def _name_of(function: Any) -> str:
    function = _layers(function)[0]
    code = getattr(function, "__code__", None)
    return f"{_module_of(function)}.{type(function).__name__ if code is None else code.co_name}"


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
    if not isinstance(weight, Tensor) or _is_packed(weight):
        of = "" if not isinstance(weight, Tensor) else f", {_kind_of(weight)}"
        raise ValueError(
            f"the LM head is quantized ({name}{of}): load the model without, in "
            'bitsandbytes with llm_int8_skip_modules=["lm_head"]'
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
    """Whether a weight is not the numbers that are multiplied by."""
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
