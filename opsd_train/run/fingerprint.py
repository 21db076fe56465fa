"""What a run is made of, by content: a folder, a file or a hub's model can change under its name.

fingerprint.json holds the hashes, from the beginning of a run on. A run that is resumed has to have
the same: else its held-out problems could be trained on, or its base weights be others than at the
start. What was loaded is hashed and not the files, so that a copy elsewhere is the same.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import PeftModelForCausalLM
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from opsd_train.config import Config
from opsd_train.files import read_json
from opsd_train.models import adapter_sha256, base_model, base_weights_sha256, end_ids, sha256
from opsd_train.opsd import ServerTeacher, Setup
from opsd_train.records import Problem
from opsd_train.run.setup import Materials

# Of a model's config: where it was loaded from, by what and how.
OF_LOADING = ("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")


def fingerprint(
    config: Config, setup: Setup, materials: Materials, base_sha256: str
) -> dict[str, str]:
    """Hashes, each under the name of what it is a hash of: the main process's, in all processes.
    To be called while the adapter is the one that training began with, not yet a checkpoint's.

    Args:
        base_sha256: hash of the base weights.
    """
    base, tokenizer = base_model(setup.model), setup.tokenizer
    hashes = {
        "problems": of_json(texts(materials.problems)),
        "held-out problems": of_json(texts(materials.held_out)),
        "tokenizer and chat template": of_tokenizer(tokenizer),
        "end tokens": of_json(sorted(end_ids(base, tokenizer))),
        "model's config": of_config(base.config),
        "base weights": base_sha256,
    }
    if config.adapter is not None:
        hashes["adapter to start from"] = adapter_sha256(setup.model)
    if setup.teacher.head is not None and setup.accelerator.is_main_process:
        teacher: Any = setup.teacher.backbone
        head = setup.teacher.head
        weights = [*sorted(teacher.state_dict().items()), ("head", head.weight)]
        if head.bias is not None:
            weights.append(("bias", head.bias))
        hashes["teacher_model's config"] = of_config(teacher.model.config)
        hashes["teacher_model's weights"] = sha256(weights)
    if isinstance(setup.teacher, ServerTeacher):  # by name: its weights are elsewhere
        hashes["teacher's model on the servers"] = of_json(setup.teacher.name)
    (hashes,) = broadcast_object_list([hashes])
    return hashes


def check_base(folder: Path, model: PeftModelForCausalLM) -> None:
    """Raises:
    ValueError: the adapter was trained on other weights than these.
    """
    expected = read_json(folder / "summary.json").get("base_weights_sha256")
    if expected is None:  # of a run that has not ended
        return
    if base_weights_sha256(model) != expected:
        raise ValueError(
            f"the base weights are not those that {folder} was trained on (summary.json): the "
            "model has changed since, or the dtype is another one"
        )


def texts(problems: list[Problem]) -> list[list[str]]:
    return [[p.question, p.solution, p.answer] for p in problems]


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())
        of_a_call = ("padding", "truncation")
        model = {name: value for name, value in model.items() if name not in of_a_call}
    else:
        model = [tokenizer.get_vocab(), tokenizer.init_kwargs]
    return of_json([model, tokenizer.special_tokens_map, tokenizer.chat_template])


def of_config(config: PreTrainedConfig) -> str:
    """Of what differs from the defaults: versions of transformers add to those."""
    values = config.to_diff_dict()
    return of_json(
        {k: v for k, v in values.items() if k not in OF_LOADING and not k.startswith("_")}
    )


def of_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
