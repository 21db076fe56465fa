"""The adapter around the model, and the proof that what it wraps does not move."""

import hashlib
from typing import cast

import torch
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel


def add_adapter(model: PreTrainedModel, rank: int) -> PeftModelForCausalLM:
    """LoRA on every projection of attention and MLP. The LM head is not adapted: the loss reads it
    directly, and an adapter on it would be ignored."""
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=[
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_proj", "up_proj", "down_proj"),
        ],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModelForCausalLM)  # what task_type asks for
    return adapted


def base_model(model: PeftModelForCausalLM) -> PreTrainedModel:
    """The model inside, with the adapter's layers in it."""
    return cast(PreTrainedModel, model.get_base_model())


def lm_head(model: PeftModelForCausalLM) -> Tensor:
    """W [V, D], frozen."""
    return base_model(model).get_output_embeddings().weight.detach()


def base_weights_sha256(model: PeftModelForCausalLM) -> str:
    """Hash of every weight that is not the adapter's: the teacher, bit by bit."""
    digest = hashlib.sha256()
    for name, weight in sorted(base_model(model).state_dict().items()):
        if "lora_" not in name:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
