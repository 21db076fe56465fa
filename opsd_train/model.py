"""The model and the adapter around it, and the proof that what the adapter wraps does not move."""

import hashlib
import json
from typing import cast

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from opsd_train.config import Config
from opsd_train.sharding import whole


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


def add_adapter(model: PreTrainedModel, config: Config) -> PeftModelForCausalLM:
    """LoRA on the layers that `lora_targets` names, by default every projection of attention and
    MLP; in fp32, whatever the model's dtype.

    Raises:
        ValueError: a target is the LM head (or shares its weight), or none of the model's layers.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    for name, module in model.named_modules():
        is_head = module is head or (tied and module is embeddings)
        if is_head and name.split(".")[-1] in config.lora_targets:
            raise ValueError(
                f"lora_targets must not name {name}: the loss reads the LM head's weight directly, "
                "and would ignore an adapter on it"
            )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModelForCausalLM)  # what task_type asks for
    return adapted


def base_model(model: PeftModelForCausalLM) -> PreTrainedModel:
    """The model inside, with the adapter's layers in it."""
    return cast(PreTrainedModel, model.get_base_model())


def adapter_weights(model: PeftModelForCausalLM) -> dict[str, torch.nn.Parameter]:
    """What is trained, by name."""
    return {name: w for name, w in model.named_parameters() if "lora_" in name}


def peft_name(name: str) -> str:
    """What PEFT calls an adapter's weight in a file: without the adapter's own name."""
    return name.replace(".default.", ".")


def adapter_config(model: PeftModelForCausalLM) -> str:
    """adapter_config.json, as PEFT reads it."""
    values = model.peft_config[model.active_adapter].to_dict()
    plain = {name: sorted(v) if isinstance(v, set) else v for name, v in values.items()}
    return json.dumps(plain, indent=2, sort_keys=True)


def lm_head(model: PreTrainedModel) -> Tensor:
    """W [V, D], frozen.

    Raises:
        ValueError: the head is more than a matrix, or not whole on this device.
    """
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise ValueError("the LM head has an adapter, which the loss would ignore; train without")
    if getattr(head, "bias", None) is not None:
        raise ValueError("the LM head has a bias; the loss takes logits to be h Wᵀ")
    W = head.weight.detach()
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(
            f"the LM head's weight must be [V, D], got shape {list(W.shape)}: FSDP1 flattens it "
            "and ZeRO-3 leaves it empty; train with data parallelism instead"
        )
    return W


def check_not_merged(model: torch.nn.Module) -> None:
    """The base weights are the teacher: an adapter merged into them would move it.

    Raises:
        ValueError: one is.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ValueError(
                f"the adapter is merged into {name}, so that the teacher would be the student; "
                "unmerging a bf16 weight does not restore it: load the base model again"
            )


def check_same_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, W: Tensor, W_teacher: Tensor
) -> None:
    """Raises:
    ValueError: a token's id, or the number of ids, is not the same on both sides.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours != theirs:
        others = sorted(ours.items() ^ theirs.items())
        raise ValueError(
            f"teacher_model must have the student's vocabulary: {len(others)} entries differ, "
            f"{others[0]} among them"
        )
    if W.shape[0] != W_teacher.shape[0]:
        raise ValueError(
            f"teacher_model must have an LM head of as many rows as the student's {W.shape[0]}, "
            f"got {W_teacher.shape[0]}"
        )


def base_weights_sha256(model: PeftModelForCausalLM) -> str:
    """Hash of every weight that is not the adapter's: the teacher, bit by bit."""
    digest = hashlib.sha256()
    for name, weight in sorted(base_model(model).state_dict().items()):
        if "lora_" not in name:
            weight = whole(weight.detach()).cpu().contiguous()
            digest.update(name.encode())
            digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
