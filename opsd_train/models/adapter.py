"""The adapter around a model, and the proof that what it wraps does not move."""

import hashlib
import json
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from opsd_train.config import Config
from opsd_train.models.sharding import full_tensor


def add_adapter(model: PreTrainedModel, config: Config) -> PeftModelForCausalLM:
    """LoRA on the layers that `lora_targets` names, by default every projection of attention and
    MLP; in fp32, whatever the model's dtype.

    Raises:
        ValueError: a target is the LM head (or shares its weight), or none of the model's layers.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    is_all = config.lora_targets == ("all-linear",)  # which PEFT knows, the LM head left out
    unknown = [] if is_all else list(config.lora_targets)
    for name, module in model.named_modules():
        targets = [t for t in config.lora_targets if f".{name}".endswith(f".{t}")]
        unknown = [t for t in unknown if t not in targets]
        if targets and (module is head or (tied and module is embeddings)):
            raise ValueError(
                f"lora_targets must not name {name}: the loss reads the LM head's weight directly, "
                "and would ignore an adapter on it"
            )
    if unknown:
        linear = {
            name.split(".")[-1]
            for name, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
        }
        raise ValueError(
            f"lora_targets names {', '.join(unknown)}, which this {type(model).__name__} does not "
            f"have; its linear layers are {', '.join(sorted(linear))}"
        )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear" if is_all else list(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModelForCausalLM)  # what task_type asks for
    return adapted


def load_adapter(model: PreTrainedModel, path: Path) -> PeftModelForCausalLM:
    """The model with an adapter that a run has saved, frozen.

    Raises:
        OSError: there is none.
        ValueError: it is not one of this model.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is no adapter: it has no {name}")
    try:
        adapted = PeftModel.from_pretrained(model, str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is no adapter of this model: {error}") from None
    assert isinstance(adapted, PeftModelForCausalLM)  # what adapter_config.json says
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
    serializable = {name: sorted(v) if isinstance(v, set) else v for name, v in values.items()}
    return json.dumps(serializable, indent=2, sort_keys=True)


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


def base_weights_sha256(model: PeftModelForCausalLM) -> str:
    """Hash of every weight that is not the adapter's: the teacher, bit by bit."""
    digest = hashlib.sha256()
    for name, weight in sorted(base_model(model).state_dict().items()):
        if "lora_" not in name:
            weight = full_tensor(weight.detach()).cpu().contiguous()
            digest.update(name.encode())
            digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
