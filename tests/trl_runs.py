"""Runs of TRL's trainers on a tiny Qwen3: what they logged, their gradients, how often a head was
called on a sequence. With and without ours they start from the same seed."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

# As its message says; the trainers of the tests are experimental.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tiny_qwen3 import CHAT_TEMPLATE, SPECIAL_TOKENS, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.async_distillation import AsyncDistillationConfig, AsyncDistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer
from trl_teachers import NoTransfer, Worker

from opsd_kernels.head_check import check_head

LENGTH = 6  # of completions, at most
OF_TIME = ("time", "per_second", "perf/")  # in the names of figures that depend on the clock

TRAINERS: dict[str, tuple[type, type]] = {
    "DistillationTrainer": (trl.DistillationTrainer, trl.DistillationConfig),
    "SDFTTrainer": (SDFTTrainer, SDFTConfig),
    "SDPOTrainer": (SDPOTrainer, SDPOConfig),
    "GKDTrainer": (GKDTrainer, GKDConfig),
    "GOLDTrainer": (GOLDTrainer, GOLDConfig),
    "IWOPDTrainer": (IWOPDTrainer, IWOPDConfig),
    "ServerDistillationTrainer": (ServerDistillationTrainer, ServerDistillationConfig),
    "AsyncDistillationTrainer": (AsyncDistillationTrainer, AsyncDistillationConfig),
}
# A teacher that is no model of the process: of Server a server, of Async what was got from one.
OUTSIDE = ("ServerDistillationTrainer", "AsyncDistillationTrainer")
# What each needs to be small, and to compute the loss that ours replaces.
OPTIONS: dict[str, dict[str, Any]] = {
    "DistillationTrainer": {"max_completion_length": LENGTH},
    "SDFTTrainer": {
        "max_completion_length": LENGTH,
        "num_generations": 2,
        "distillation_mode": "full_logits",
    },
    "SDPOTrainer": {"max_completion_length": LENGTH, "num_generations": 2},
    "GKDTrainer": {"max_new_tokens": LENGTH},
    "GOLDTrainer": {"max_completion_length": LENGTH},
    "IWOPDTrainer": {
        "max_completion_length": LENGTH,
        "distillation_objective": "jsd",
        "loss_top_k": 0,
    },
    "ServerDistillationTrainer": {"max_completion_length": LENGTH},
    "AsyncDistillationTrainer": {
        "teacher_top_k": 4,
        "token_budget": 0,
        "model_init_kwargs": {"attn_implementation": "sdpa", "dtype": "float32"},
        "teacher_server_urls": {"a": "http://a", "b": "http://b"},
    },
}


def save_models(folder: Path, **of_both: Any) -> None:
    """Student and teacher of one byte-level tokenizer, as GOLD wants it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for side, seed, size in (("student", 0, 32), ("teacher", 1, 48)):
        options = {"vocab_size": 264, "hidden_size": size, "num_hidden_layers": 1}
        save_model(folder / side, seed=seed, **options | of_both)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
            additional_special_tokens=["<|im_start|>"],
            chat_template=CHAT_TEMPLATE,
        ).save_pretrained(folder / side)


def problems(trainer: str) -> Dataset:
    sums = [(f"{a} + {a * 7 % 10}?", f"It is {a + a * 7 % 10}.") for a in range(8)]
    prompts: dict[str, Any] = {"prompt": [problem for problem, _ in sums]}
    if trainer in ("DistillationTrainer", "SDPOTrainer", *OUTSIDE):
        return Dataset.from_dict(prompts)
    if trainer == "SDFTTrainer":
        return Dataset.from_dict(prompts | {"privileged_context": [answer for _, answer in sums]})
    chats = [
        [{"role": "user", "content": problem}, {"role": "assistant", "content": answer}]
        for problem, answer in sums
    ]
    return Dataset.from_dict({"messages": chats})


def reward(completions: list[Any], **_: Any) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def make_trainer(
    trainer: str, folder: Path, *, lora: bool = False, base: type | None = None, **options: Any
) -> Any:
    """Of models in folder/student and folder/teacher."""
    kind, config = TRAINERS[trainer]
    shared = {
        "output_dir": str(folder / "output"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    made = config(**shared | OPTIONS[trainer] | options)
    given: dict[str, Any] = {"model": load(folder / "student")}
    if trainer == "AsyncDistillationTrainer":
        # Each process gets two samples a batch, and one batch is fetched ahead.
        batches = made.max_steps * made.gradient_accumulation_steps + 1
        teachers = list(made.teacher_server_urls)
        given = {
            "model": str(folder / "student"),
            "rollout_worker": Worker(
                folder / "teacher", 2 * batches * made.world_size, made.teacher_top_k, teachers
            ),
            "weight_transfer": NoTransfer(),
        }
    else:
        given["eval_dataset"] = problems(trainer).select(range(4))
    if trainer not in ("SDFTTrainer", "SDPOTrainer", *OUTSIDE) and not getattr(
        made, "use_teacher_server", False
    ):
        given["teacher_model"] = load(folder / "teacher")
    if trainer == "SDPOTrainer":
        given["reward_funcs"] = reward
    if lora:
        given["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    # It looks for a GPU by name, also where there is none.
    with patch(f"{AsyncDistillationTrainer.__module__}.get_peak_flops_per_device", lambda *_: None):
        return (base or kind)(
            args=made,
            train_dataset=problems(trainer),
            processing_class=AutoTokenizer.from_pretrained(folder / "student", padding_side="left"),
            **given,
        )


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@dataclass
class Run:
    logs: list[dict[str, Any]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # of every step
    longest: int = 0  # sequence that a head was called on, while training
    longest_evaluated: int = 0
    compared: int = 0  # models whose logits were compared with ours, which is not counted above


def run(trainer: str, folder: Path, **options: Any) -> Run:
    """Train for some steps, and evaluate."""
    return run_of(make_trainer(trainer, folder, **options))


def run_of(made: Any) -> Run:
    told = Run()

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            told.gradients.append(
                {
                    name: p.grad.clone()
                    for name, p in made.model.named_parameters()
                    if p.grad is not None
                }
            )

    # Not by a hook, with which a head is not taken for what it is.
    heads = [
        made.accelerator.unwrap_model(model).get_output_embeddings()
        for model in (made.model, getattr(made, "teacher_model", None))
        if model is not None
    ]

    def watched(h: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not comparing and any(weight is head.weight for head in heads):
            name = "longest" if made.model.training else "longest_evaluated"
            setattr(told, name, max(getattr(told, name), h.shape[1]))
        return linear(h, weight, bias)

    comparing: list[Any] = []

    def compared(model: Any, *given: Any) -> None:
        told.compared += 1
        comparing.append(model)
        try:
            check_head(model, *given)
        finally:
            comparing.pop()

    made.add_callback(Gradients())
    with (
        patch("torch.nn.functional.linear", watched),
        patch("opsd_kernels.trl.hidden_states.check_head", compared),
    ):
        made.train()
        if made.eval_dataset is not None:
            made.evaluate()
    told.logs = [
        {name: x for name, x in log.items() if not any(part in name for part in OF_TIME)}
        for log in made.state.log_history
    ]
    return told


def said(caplog: Any) -> list[str]:
    """The warnings of losses that stayed TRL's."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "opsd_kernels.trl" and "computes TRL's own loss" in record.getMessage()
    ]


def difference(ours: Run, theirs: Run) -> tuple[float, float]:
    """The largest relative difference of a figure that was logged, and of a step's gradient."""
    assert [log.keys() for log in ours.logs] == [log.keys() for log in theirs.logs]
    figures = max(
        abs(x - y) / max(abs(y), 1e-6)
        for mine, yours in zip(ours.logs, theirs.logs, strict=True)
        for x, y in zip(mine.values(), yours.values(), strict=True)
    )
    gradients = 0.0
    for mine, yours in zip(ours.gradients, theirs.gradients, strict=True):
        assert mine.keys() == yours.keys()
        apart = sum(float((mine[name] - yours[name]).double().square().sum()) for name in yours)
        size = sum(float(yours[name].double().square().sum()) for name in yours)
        gradients = max(gradients, (apart / size) ** 0.5)
    return figures, gradients
