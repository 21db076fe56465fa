"""The adapter around a model, and the proof that what it wraps does not move."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from opsd_train.config import Config
from opsd_train.models.loading import check_finite, check_keys, in_a_line
from opsd_train.models.memory import copy_full, full_tensor

Student = PeftModelForCausalLM | PreTrainedModel
"""A model with an adapter, which alone is trained; or one that is trained itself."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of a LoraConfig: those that plain LoRA is made by, and those without effect once there are
# weights.
MADE_BY = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision"),
)
OF_NO_MATTER = (
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config"),
    *("init_lora_weights", "lora_dropout", "eva_config", "megatron_core", "qalora_group_size"),
)
HARMLESS_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base


def add_adapter(model: PreTrainedModel, config: Config) -> PeftModelForCausalLM:
    """The adapter of the folder that `adapter` names; or else LoRA on the layers that
    `lora_targets` names, by default every projection of attention and MLP. In fp32, whatever the
    model's dtype.

    Raises:
        OSError, ValueError: the folder holds no adapter of this model.
        ValueError: a target is the LM head (or shares its weight), or none of the model's layers.
    """
    if config.adapter is not None:
        return load_adapter(model, config.adapter, is_trainable=True)
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


def train_all(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, all of it trained but embeddings and LM head: the loss reads the head as it
    is, and both may be one weight."""
    model.requires_grad_(True)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(False)
    return model


def load_adapter(
    model: PreTrainedModel, path: Path, *, is_trainable: bool = False
) -> PeftModelForCausalLM:
    """The model with an adapter from a folder: plain LoRA, with the weights of the file, in fp32.

    PEFT itself only warns of weights that are missing, which are then random, and says nothing of
    those that it ignores.

    Raises:
        OSError: there is none.
        ValueError: it is not one of this model, or does more than LoRA.
    """
    lora = read_lora_config(path)
    lora.task_type, lora.inference_mode = "CAUSAL_LM", not is_trainable
    lora.base_model_name_or_path = None  # of this model, wherever it has been
    head = model.get_output_embeddings()
    try:
        adapted = get_peft_model(model, lora)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no adapter of this model: {in_a_line(error)}") from error
    assert isinstance(adapted, PeftModelForCausalLM)  # what task_type asks for
    for name, module in adapted.named_modules():
        if isinstance(module, BaseTunerLayer) and module.get_base_layer().weight is head.weight:
            raise ValueError(
                f"{path} has weights for {name}: the loss reads the LM head's weight directly, and "
                "would ignore an adapter on it"
            )
    try:
        saved = safetensors.torch.load_file(path / ADAPTER_WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{path / ADAPTER_WEIGHTS} cannot be read: {error}") from error
    wanted = {peft_name(name): w for name, w in adapter_weights(adapted).items()}
    check_keys(
        str(path),
        f"an adapter of this {type(model).__name__}",
        missing=wanted.keys() - saved.keys(),
        unexpected=saved.keys() - wanted.keys(),
        mismatched=[
            (name, saved[name].shape, w.shape)
            for name, w in wanted.items()
            if name in saved and saved[name].shape != w.shape
        ],
    )
    check_finite(str(path), saved.items())
    for name, w in wanted.items():
        copy_full(w, saved[name])
    return adapted if is_trainable else adapted.eval()


def read_lora_config(path: Path) -> LoraConfig:
    """What a folder's adapter_config.json says, of plain LoRA.

    Raises:
        OSError: there is no adapter.
        ValueError: it is of another kind, or has what would not be trained, saved or sampled from
            as it is.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).is_file():
            is_pickled = (path / "adapter_model.bin").is_file() and name == ADAPTER_WEIGHTS
            hint = " (adapter_model.bin is not read: save it again with a newer PEFT)"
            raise FileNotFoundError(
                f"{path} is no adapter: it has no {name}{hint if is_pickled else ''}"
            )
    file = path / ADAPTER_CONFIG
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        kind = said.pop("peft_type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not PEFT's: {in_a_line(error)}") from error
    default = LoraConfig().to_dict()
    more = [
        f"{name}={value}"
        for name, value in said.items()
        if name not in (*MADE_BY, *OF_NO_MATTER) and value and value != default.get(name)
    ]
    if said.get("init_lora_weights") not in (None, *HARMLESS_BEGINNINGS):
        more.append(f"init_lora_weights={said['init_lora_weights']}, which changes the base")
    if kind != "LORA" or more:
        what = f"{kind}, {', '.join(more)}" if more else kind
        raise ValueError(
            f"{path} is more than plain LoRA, which is all that is trained and sampled from here: "
            f"its adapter_config.json has {what}"
        )
    return LoraConfig(**{name: said[name] for name in MADE_BY if name in said})


def base_model(model: Student) -> PreTrainedModel:
    """The model inside, with the adapter's layers in it; or the model itself."""
    if isinstance(model, PeftModel):
        return cast(PreTrainedModel, model.get_base_model())
    return model


def adapter_weights(model: Student) -> dict[str, torch.nn.Parameter]:
    """The weights that are trained, by name: the adapter's, or nearly all of the model's own."""
    if isinstance(model, PeftModel):
        return {name: w for name, w in model.named_parameters() if "lora_" in name}
    return {name: w for name, w in model.named_parameters() if w.requires_grad}


def saved_weights(model: Student) -> dict[str, Tensor]:
    """Weights by their names in a file: the adapter's, or all of the model's own."""
    if isinstance(model, PeftModel):
        return {peft_name(name): w for name, w in adapter_weights(model).items()}
    tied = model.all_tied_weights_keys if model.config.get_text_config().tie_word_embeddings else ()
    return {name: w for name, w in model.state_dict().items() if name not in tied}


def peft_name(name: str) -> str:
    """What PEFT calls an adapter's weight in a file: without the adapter's own name."""
    return name.replace(".default.", ".")


def adapter_config(model: Student) -> str:
    """adapter_config.json, as PEFT reads it; or config.json of a model without adapter."""
    if not isinstance(model, PeftModel):
        return model.config.to_json_string()
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


def base_weights_sha256(
    model: Student,
    on_progress: Callable[[int], None] = lambda tensors: None,
    with_trained: bool = False,
) -> str:
    """Hash of every weight that is neither the adapter's nor trained, bit by bit; called by all
    processes where each holds a share. `with_trained`: of the model's own that are trained too."""
    trained = set() if with_trained else set(adapter_weights(model))

    def whole() -> Iterator[tuple[str, Tensor]]:
        for i, (name, w) in enumerate(sorted(base_model(model).state_dict().items()), start=1):
            if "lora_" not in name and name not in trained:
                yield name, full_tensor(w)
            on_progress(i)

    return sha256(whole())


def adapter_sha256(model: Student) -> str:
    """Hash of the adapter's weights and scales; called likewise."""
    weights = ((name, full_tensor(w)) for name, w in adapter_weights(model).items())
    scales = (
        (f"{name}.scaling", torch.tensor(list(module.scaling.values())))
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    )
    return sha256(chain(weights, scales))


def sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of tensors and their names, one after the other."""
    digest = hashlib.sha256()
    for name, t in tensors:
        digest.update(name.encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
