"""A model and its tokenizer, from a folder or the hub."""

import importlib

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from opsd_train.config import Config


def load_model(name: str, config: Config) -> PreTrainedModel:
    """A causal language model from a folder or the hub, without dropout.

    Raises:
        OSError: there is none.
        ValueError: it is another kind of model, or the kernels asked for are not installed.
    """
    model_config = AutoConfig.from_pretrained(name)
    kind = model_config.model_type
    if model_config.is_encoder_decoder or type(model_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name} is of type {kind}; the model must be a causal language model of transformers, "
            "without an encoder"
        )
    _turn_off_dropout(model_config.get_text_config())
    if config.liger:
        _patch_layers(kind)
    attention: str | None = config.attention
    if attention == "auto":
        on_gpu = torch.cuda.is_available() and config.dtype != "float32"
        flash = on_gpu and is_flash_attn_2_available()
        # By default transformers takes sdpa, or eager where sdpa lacks what the model does.
        attention = "flash_attention_2" if flash else None
    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            config=model_config,
            dtype=getattr(torch, config.dtype),
            attn_implementation=attention,
        )
    except ImportError as error:
        raise ValueError(
            f"attention {attention} cannot be used: {error} Install it with "
            "`pip install -e '.[flash]'`, or ask for --attention sdpa"
        ) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
