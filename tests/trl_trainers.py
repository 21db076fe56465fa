"""TRL's own trainers on a tiny Qwen3, for a few steps: what they log, and whether a head was called
while they computed a loss."""

import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import tiny_qwen3
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

STEPS, ACCUMULATED = 3, 2
# Of no interest to a comparison.
TIMES = ("runtime", "per_second", "step_time", "time", "total_flos", "num_tokens")


def save_models(folder: Path, **options: Any) -> Path:
    """A student and a teacher, and a tokenizer of bytes, which GOLDTrainer wants."""
    special = tiny_qwen3.SPECIAL_TOKENS
    symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for_transformers = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token=special[2],
        additional_special_tokens=[special[1], *special[3:]],
        chat_template=tiny_qwen3.CHAT_TEMPLATE,
    )
    for seed, name in enumerate(("model", "teacher")):
        for_transformers.save_pretrained(folder / name)
        sizes = {"vocab_size": len(vocabulary), "initializer_range": 0.1}
        tiny_qwen3.save_model(folder / name, seed=seed, **sizes | options)
    return folder


def data() -> dict[str, list[Any]]:
    draw = random.Random(0)
    pairs = [(draw.randrange(90), draw.randrange(90)) for _ in range(24)]
    prompts = [f"{a} + {b}?" for a, b in pairs]
    solutions = [f"It is {a + b}." for a, b in pairs]
    return {"prompt": prompts, "solution": solutions}


def conversational() -> Dataset:
    columns = data()
    rows = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": s}]
        for p, s in zip(columns["prompt"], columns["solution"], strict=True)
    ]
    return Dataset.from_dict({"messages": rows})


def prompts(**others: str) -> Dataset:
    columns = data()
    messages = [[{"role": "user", "content": p}] for p in columns["prompt"]]
    return Dataset.from_dict(
        {"prompt": messages} | {new: columns[old] for new, old in others.items()}
    )


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Every other is right."""
    return [float(i % 2) for i in range(len(completions))]


def distillation(common: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from trl import DistillationConfig, DistillationTrainer

    args = DistillationConfig(max_completion_length=8, **common)
    return DistillationTrainer, args, {"train_dataset": prompts(), "teacher_model": ...}


def sdft(common: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    args = SDFTConfig(
        **{
            "max_completion_length": 8,
            "num_generations": 2,
            "distillation_mode": "full_logits",
        }
        | common
    )
    return SDFTTrainer, args, {"train_dataset": prompts(privileged_context="solution")}


def sdpo(common: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    args = SDPOConfig(
        **{
            "max_completion_length": 8,
            "num_generations": 2,
            "distillation_mode": "full_logits",
            "distillation_weight": 1.0,
        }
        | common
    )
    return SDPOTrainer, args, {"train_dataset": prompts(), "reward_funcs": reward}


def gkd(common: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    args = GKDConfig(**{"max_new_tokens": 8, "max_length": 96} | common)
    return GKDTrainer, args, {"train_dataset": conversational(), "teacher_model": ...}


def gold(common: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    args = GOLDConfig(
        **{"max_completion_length": 8, "max_length": 96, "use_uld_loss": False} | common
    )
    return GOLDTrainer, args, {"train_dataset": conversational(), "teacher_model": ...}


def iw_opd(common: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    args = IWOPDConfig(
        **{
            "max_completion_length": 8,
            "max_length": 96,
            "distillation_objective": "jsd",
            "loss_top_k": 0,
        }
        | common
    )
    return IWOPDTrainer, args, {"train_dataset": conversational(), "teacher_model": ...}


TRAINERS: dict[str, Callable[..., tuple[Any, Any, dict[str, Any]]]] = {
    "DistillationTrainer": distillation,
    "SDFTTrainer": sdft,
    "SDPOTrainer": sdpo,
    "GKDTrainer": gkd,
    "GOLDTrainer": gold,
    "IWOPDTrainer": iw_opd,
}


def trained(
    trainer: str, folder: Path, lora: bool = False, evaluated: bool = False, **options: Any
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor], int]:
    """What a trainer logs, its trainable weights after the last step, and how often a head was
    called in a loss. `folder` has a model and another, the teacher."""
    common = {
        "output_dir": str(folder / "output"),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATED,
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    } | options
    cls, args, given = TRAINERS[trainer](common)
    load = AutoModelForCausalLM.from_pretrained
    model = load(folder / "model", dtype=torch.float32)
    if "teacher_model" in given:
        given["teacher_model"] = load(folder / "teacher", dtype=torch.float32)
    if lora:
        given["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    if evaluated:
        given["eval_dataset"] = given["train_dataset"].select(range(4))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = cls(model=model, args=args, processing_class=tokenizer, **given)
    calls = watched(made, model)
    made.train()
    if evaluated:
        made.evaluate()
    logged = [
        {k: v for k, v in row.items() if not any(time in k for time in TIMES)}
        for row in made.state.log_history
    ]
    weights = {n: p.detach().clone() for n, p in made.model.named_parameters() if p.requires_grad}
    return logged, weights, len(calls)


def watched(trainer: Any, model: Any) -> list[int]:
    """Filled with what a head is called on while the trainer computes a loss."""
    calls: list[int] = []
    computing = []
    compute_loss = trainer.compute_loss

    def watched_loss(*args: Any, **kwargs: Any) -> Any:
        computing.append(True)
        try:
            return compute_loss(*args, **kwargs)
        finally:
            computing.pop()

    trainer.compute_loss = watched_loss
    models = [model] + ([trainer.teacher_model] if getattr(trainer, "teacher_model", None) else [])
    for each in models:
        each.get_output_embeddings().register_forward_hook(
            lambda _module, args, _out: calls.append(args[0].shape[-2]) if computing else None
        )
    return calls
