"""A model and its tokenizer, from a folder or the hub."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from opsd_train.config import Config


def load_model(name: str, config: Config) -> PreTrainedModel:
    """A Qwen3 from a folder or the hub.

    Raises:
        OSError: there is none.
        ValueError: it is another kind of model, whose logits may not be h Wᵀ; or the kernels asked
            for are not installed.
    """
    kind = AutoConfig.from_pretrained(name).model_type
    if kind != "qwen3":
        raise ValueError(f"{name} is of type {kind}; the model must be a dense Qwen3 (type qwen3)")
    if config.liger:
        _patch_layers()
    attention = config.attention
    if attention == "auto":
        on_gpu = torch.cuda.is_available() and config.dtype != "float32"
        flash = on_gpu and is_flash_attn_2_available()
        attention = "flash_attention_2" if flash else "sdpa"
    try:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, config.dtype), attn_implementation=attention
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


def _patch_layers() -> None:
    if not torch.cuda.is_available():
        raise ValueError("liger needs a CUDA device; leave it off on a CPU")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3
    except ImportError as error:
        raise ValueError(
            f"liger cannot be used: {error}; install it with `pip install -e '.[gpu]'`, or leave "
            "it off with --no-liger"
        ) from error

    # The layers alone: the loss is this package's, and the model's own head is never called.
    apply_liger_kernel_to_qwen3(cross_entropy=False, fused_linear_cross_entropy=False)
