"""A model and its tokenizer, from a folder or the hub: with the weights of the file, or refused.
And into a new folder."""

import contextlib
import importlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file, is_flash_attn_2_available

from opsd_train.config import Config


def load_model(name: str, config: Config) -> PreTrainedModel:
    """A causal language model from a folder or the hub, without dropout.

    Raises:
        OSError: there is none.
        ValueError: it is another kind of model, its files hold other weights than it has, weights
            that are not finite, or an adapter; or a package that it needs is not installed.
    """
    model_config = load_config(name)
    kind = model_config.model_type
    if model_config.is_encoder_decoder or type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name} is of type {kind}; the model must be a causal language model of transformers, "
            "without an encoder"
        )
    _turn_off_dropout(model_config.get_text_config())
    _forget_padding_outside(model_config.get_text_config())
    if config.liger:
        _patch_layers(kind)
    attention: str | None = config.attention
    if attention == "auto":
        on_gpu = torch.cuda.is_available() and config.dtype != "float32"
        flash = on_gpu and is_flash_attn_2_available()
        # By default transformers takes sdpa, or eager where sdpa lacks what the model does.
        attention = "flash_attention_2" if flash else None
    quantized: dict[str, Any] = {}
    if config.quantize != "none":
        quantized["quantization_config"] = _nf4(config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and refused below with the other keys
            **quantized,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files may raise anything
        raise _explained(error, name, model_config, attention) from error
    model, found = loaded
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would pack 4-bit weights anew on some CPUs whenever sampling begins.
            module.support_avx512bf16_for_cpu = False
    check_keys(
        name,
        f"a {type(model).__name__}",
        missing=found["missing_keys"],
        unexpected=[key for key in found["unexpected_keys"] if not OLD_BUFFER.search(key)],
        mismatched=found["mismatched_keys"],
    )
    check_finite(name, model.named_parameters(), config.dtype)
    return model


def _nf4(config: Config) -> BitsAndBytesConfig:
    """As QLoRA quantizes (Dettmers et al., 2023); embeddings and LM head stay as they are."""
    if find_spec("bitsandbytes") is None:
        raise ValueError("quantize needs bitsandbytes; install it with `pip install bitsandbytes`")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
    )


def load_config(name: str) -> PreTrainedConfig:
    """A model's config, from a folder or the hub.

    Raises:
        OSError: there is none.
        ValueError: it is not transformers', or an adapter is beside it.
    """
    _check_is_there(name)
    _check_no_adapter(name)
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except OSError as error:  # of the hub
        said = in_a_line(error).partition(". ")[0]
        raise OSError(
            f"{name} cannot be loaded: {said}. Check the name and the network, or name a folder"
        ) from error
    except Exception as error:  # of its config.json, in which anything may stand
        raise ValueError(
            f"{name} cannot be loaded, for its config.json: {in_a_line(error)}"
        ) from error
    return found


def check_keys(
    source: str,
    kind: str,
    *,
    missing: Collection[str],
    unexpected: Collection[str],
    mismatched: Iterable[tuple[str, Iterable[int], Iterable[int]]] = (),
) -> None:
    """Weights that a file lacks are random, and weights that it has too much are ignored, in
    silence.

    Args:
        source: the model's or adapter's name.
        kind: what it should be, "a Qwen3ForCausalLM" say.
        mismatched: names, with the file's shape and the one that is wanted.

    Raises:
        ValueError: there are such weights; the message counts them and names some.
    """
    shapes = [f"{name} {list(was)} for {list(wanted)}" for name, was, wanted in mismatched]
    faults = [
        f"{len(names)} {fault} ({some(names)})"
        for fault, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if names
    ]
    if not faults:
        return
    prefix = next((p for p in PREFIXES if any(n.replace(p, "") in missing for n in unexpected)), "")
    hint = f"; save it again without {prefix} in its keys" if prefix else ""
    raise ValueError(f"the weights of {source} are not those of {kind}: {'; '.join(faults)}{hint}")


# What wrappers put before a model's keys: torch.compile, data parallelism, PEFT.
PREFIXES = ("_orig_mod.", "module.", "base_model.model.")

# What older versions of transformers saved, and no model has weights of: masks, angles, positions.
OLD_BUFFER = re.compile(
    r"\.(?:masked_bias|inv_freq|(?:cos|sin)_cached|position_ids|(?:attn|attention)\.bias)$"
)


def _check_is_there(name: str) -> None:
    """Raises:
    OSError: the name is that of a folder, and there is none; or of a file; or of GGUF's.
    """
    path = Path(name)
    packed = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if packed and packed[0].is_file() and not (path / "config.json").exists():
        raise OSError(
            f"{name} is GGUF, and a model is a folder that transformers loads: make one with "
            f"`python -m opsd_train.from_gguf {packed[0]} FOLDER`, and name that"
        )
    is_hubs = re.fullmatch(r"\w[\w.-]*(?:/[\w.-]+)?", name)
    if path.is_file() or not (path.is_dir() or is_hubs):
        what = "is a file" if path.is_file() else "does not exist"
        raise OSError(f"{name} {what}; a model is a folder, or owner/name on the hub")


def check_finite(source: str, weights: Iterable[tuple[str, Tensor]], dtype: str = "") -> None:
    """Raises:
    ValueError: a weight is NaN or infinite, as some are that are converted to float16.
    """
    spoiled = [name for name, w in weights if not is_finite(w)]
    if spoiled:
        too_large = ", or float16 cannot hold them (--dtype bfloat16 can)"
        raise ValueError(
            f"{source} has weights that are not finite, in {len(spoiled)} tensors "
            f"({some(spoiled)}): its file is damaged, or its training failed"
            f"{too_large if dtype == 'float16' else ''}"
        )


def is_finite(w: Tensor) -> bool:
    """Whether all numbers are; of 8 bits and of integers nothing is asked."""
    if not w.is_floating_point() or w.element_size() == 1 or w.numel() == 0:
        return True
    # The extremes of numbers among which one is NaN are NaN. On a CPU this is 20 to 40 times as
    # fast as torch.isfinite of each.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(w.detach()))


def some(names: Collection[str]) -> str:
    """A few of the names, for a message."""
    shown = ", ".join(sorted(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown


def _check_no_adapter(name: str) -> None:
    """transformers would load an adapter beside a model, or an adapter's base, in silence."""
    path = find_adapter_config_file(name)
    if path is None:
        return
    base = None
    with contextlib.suppress(ValueError, AttributeError):  # it may hold anything
        base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    raise ValueError(
        f"{name} holds an adapter (adapter_config.json), which a model's folder must not: name "
        f"the model without it{f', perhaps {base},' if base else ''} and start from the adapter "
        f"with --adapter {name}; as a teacher_model, merge the two first"
    )


def _explained(
    error: Exception, name: str, model_config: PreTrainedConfig, attention: str | None
) -> ValueError:
    """What transformers says of a model that it cannot load, in a line."""
    said = in_a_line(error)
    quantization: Any = getattr(model_config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method", "an unknown method")
        return ValueError(
            f"{name} is quantized ({method}), and cannot be loaded: {said}; install what "
            f"{method} needs, or take the model without quantization"
        )
    if isinstance(error, ImportError) and attention == "flash_attention_2":
        return ValueError(
            f"attention {attention} cannot be used: {said} Install it with "
            "`pip install -e '.[flash]'`, or ask for --attention sdpa"
        )
    return ValueError(f"{name} cannot be loaded: {said}")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, which pads with its end token if it has no other.

    Raises:
        OSError: there is none.
        ValueError: it cannot be loaded, or has no vocabulary, as where its files are missing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except OSError as error:  # of the hub
        raise OSError(f"{name} has no tokenizer: {in_a_line(error)}") from error
    except Exception as error:  # damaged files may raise anything
        raise ValueError(f"{name}'s tokenizer cannot be loaded: {in_a_line(error)}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{name} has no tokenizer: it knows special tokens alone. Copy the tokenizer's files, "
            "such as tokenizer.json, from the model that this one was made of"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_model(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: Mapping[str, str] | None = None,
) -> None:
    """Write a model, its tokenizer and other files into a folder that is there whole, or not."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        for name, text in (files or {}).items():
            (unfinished / name).write_text(text)
        if not path.exists():  # else another process was faster
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def in_a_line(error: Exception) -> str:
    said = " ".join(str(error).split())[:400]
    return f"no {said}" if isinstance(error, KeyError) else said


def _forget_padding_outside(model_config: PreTrainedConfig) -> None:
    """Drop a pad id outside the embedding, which torch would refuse to make. Padding is masked, so
    its embedding is never read."""
    pad, rows = model_config.pad_token_id, getattr(model_config, "vocab_size", None)
    if pad is not None and rows is not None and not -rows <= pad < rows:
        model_config.pad_token_id = None


def _turn_off_dropout(model_config: PreTrainedConfig) -> None:
    """A teacher with dropout would not be the same from one token to the next, and layers are put
    in training mode, which activation checkpointing wants."""
    for name, value in model_config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(model_config, name, 0.0)


def _patch_layers(kind: str) -> None:
    if not torch.cuda.is_available():
        raise ValueError("liger needs a CUDA device; leave it off on a CPU")
    try:
        liger = importlib.import_module("liger_kernel.transformers")
    except ImportError as error:
        raise ValueError(
            f"liger cannot be used: {error}; install it with `pip install -e '.[gpu]'`, or leave "
            "it off with --no-liger"
        ) from error

    patch = getattr(liger, f"apply_liger_kernel_to_{kind}", None)
    if patch is None:
        raise ValueError(f"liger has no kernels for models of type {kind}; leave it off")
    # The layers alone: the loss is this package's, and the model's own head is never called.
    patch(cross_entropy=False, fused_linear_cross_entropy=False)


# Ids of tokens: where text ends, what pads it, and whether the model knows them all


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which a model stops: those of its generation config, and the tokenizer's.

    Raises:
        ValueError: there is none that the model could draw, or one is no id.
    """
    named = getattr(model.generation_config, "eos_token_id", None)
    ids = [*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id]
    if not all(i is None or isinstance(i, int) for i in ids):
        raise ValueError(
            "eos_token_id in generation_config.json must be a token's id, or a list of them; got "
            f"{named!r}"
        )
    rows = embedding_rows(model)
    ends = {i for i in ids if i is not None and 0 <= i < rows}
    if not ends:
        raise ValueError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no eos_token that the model could "
            "draw, and generation_config.json no eos_token_id: no rollout would ever be finished. "
            "Set one of them"
        )
    return ends


def settle_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer pad with a token that the model has an embedding of: an end of text, where
    its own pad token is missing or lies outside. Padding is masked, so any token will do."""
    pad = tokenizer.pad_token_id
    if pad is None or not 0 <= pad < embedding_rows(model):
        tokenizer.pad_token_id = min(end_ids(model, tokenizer))


def check_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[list[int]]
) -> None:
    """A tokenizer may know tokens that the model does not, as Gemma 3's knows one of images; but no
    prompt may have them.

    Raises:
        ValueError: one does.
    """
    rows = embedding_rows(model)
    if len(tokenizer) <= rows:
        return
    for ids in prompts:
        if (outside := max(ids, default=0)) >= rows:
            raise ValueError(
                f"{tokenizer.name_or_path or 'the tokenizer'} writes "
                f"{tokenizer.convert_ids_to_tokens(outside)!r} as {outside}, and the model has "
                f"embeddings of {rows} tokens: take the tokenizer that the model was trained with, "
                "or a model whose embeddings were resized to it"
            )


def embedding_rows(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]
