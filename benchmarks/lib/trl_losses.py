"""Losses of TRL's trainers: for each a trainer that is made of little, and a batch.

The student is a Qwen3 under LoRA, as OPSD's authors train. A teacher on a server is made up: its
answers are there at once.
"""

import sys
import tempfile
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.lib.shapes import QWEN3

# Of each trainer the losses, and the options that ask for them: over the whole vocabulary,
WHOLE: dict[str, dict[str, dict[str, Any]]] = {
    "DistillationTrainer": {"β = 1": {}},
    "SDFTTrainer": {"full_logits": {"distillation_mode": "full_logits"}},
    "SDPOTrainer": {"full_logits": {"distillation_mode": "full_logits"}},
    "GKDTrainer": {"β = 0.5": {}},
    "GOLDTrainer": {"β = 0.5": {}},
    "IWOPDTrainer": {"jsd, β = 1": {"distillation_objective": "jsd", "loss_top_k": 0}},
}
# and on K tokens.
TOP_K: dict[str, dict[str, dict[str, Any]]] = {
    "SDFTTrainer": {
        "topk_logits, K = 100 (default)": {
            "distillation_mode": "topk_logits",
            "distillation_topk": 100,
        },
    },
    "SDPOTrainer": {
        "topk_logits, K = 100, and a policy loss": {
            "distillation_mode": "topk_logits",
            "distillation_topk": 100,
            "distillation_weight": 0.5,
        },
    },
    "IWOPDTrainer": {
        "iw_opd (default)": {"distillation_objective": "iw_opd"},
        "jsd, β = 0.5, K = 100": {
            "distillation_objective": "jsd",
            "beta": 0.5,
            "loss_top_k": 100,
        },
    },
    "ServerDistillationTrainer": {
        "β = 0, K = 20": {"beta": 0.0, "loss_top_k": 20},
        "β = 0, K = 20, no tail": {"beta": 0.0, "loss_top_k": 20, "loss_add_tail": False},
        "β = 0.5": {"beta": 0.5},
        "β = 1": {"beta": 1.0},
    },
    "AsyncDistillationTrainer": {
        "β = 0, K = 8 (default)": {"beta": 0.0},
        "β = 0, K = 8, no tail": {"beta": 0.0, "add_tail_bucket": False},
        "β = 0.5": {"beta": 0.5},
        "β = 1": {"beta": 1.0},
    },
}
PLACES = {
    "DistillationTrainer": "trl",
    "SDFTTrainer": "trl.experimental.sdft",
    "SDPOTrainer": "trl.experimental.sdpo",
    "GKDTrainer": "trl.experimental.gkd",
    "GOLDTrainer": "trl.experimental.gold",
    "IWOPDTrainer": "trl.experimental.iw_opd",
    "ServerDistillationTrainer": "trl.experimental.server_distillation",
    "AsyncDistillationTrainer": "trl.experimental.async_distillation",
}
SELF = ("SDFTTrainer", "SDPOTrainer")  # those whose teacher is the student, by another prompt
SERVED = ("ServerDistillationTrainer", "AsyncDistillationTrainer")
LABELLED = ("GKDTrainer", "GOLDTrainer", "IWOPDTrainer")  # those whose batches have labels
# What a trainer needs to be made, whatever its loss.
OPTIONS: dict[str, dict[str, Any]] = {
    "SDPOTrainer": {"teacher_model_kind": "live"},
    "ServerDistillationTrainer": {"teacher_model_server_url": "http://teacher"},
    "AsyncDistillationTrainer": {"token_budget": 0, "max_steps": 1},
}
STUDENT_PROMPT, TEACHER_PROMPT = 256, 1280
SAMPLED = 1000  # ids below are sampled, and those above are the teacher's likeliest


def options_of(trainer: str, loss: str) -> dict[str, Any]:
    """The options that ask for a loss."""
    return (WHOLE.get(trainer, {}) | TOP_K.get(trainer, {}))[loss]


def make_trainer(at: torch.device, model: str, dtype: torch.dtype, trainer: str, loss: str) -> Any:
    """A trainer with a student under LoRA, and a tokenizer that is not used."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    folder = tempfile.mkdtemp()
    letters = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    of_bytes = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=of_bytes, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    where = PLACES[trainer]
    module = sys.modules.get(where) or __import__(where, fromlist=["*"])
    kind, config = getattr(module, trainer), getattr(module, trainer.replace("Trainer", "Config"))
    student = make_model(at, model, dtype, folder, seed=0)
    given: dict[str, Any] = {"model": student}
    if trainer not in (*SELF, *SERVED):
        given["teacher_model"] = make_model(at, model, dtype, folder, seed=1).eval()
    if trainer == "SDPOTrainer":
        given["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    columns: dict[str, Any] = {"prompt": ["1"] * 8, "privileged_context": ["1"] * 8}
    if trainer in LABELLED:
        columns = {"messages": [chat] * 8}
    args = config(
        output_dir=folder,
        report_to="none",
        bf16=False,
        use_cpu=at.type == "cpu",
        gradient_checkpointing=at.type == "cuda",
        disable_tqdm=True,
        **OPTIONS.get(trainer, {}) | options_of(trainer, loss),
    )
    with ExitStack() as stack:
        if trainer == "ServerDistillationTrainer":
            stack.enter_context(mock.patch("trl.generation.vllm_client.VLLMClient", _Server))
        if trainer == "AsyncDistillationTrainer":
            given |= {"model": folder, "rollout_worker": _nothing(), "weight_transfer": _nothing()}
            # It loads its student itself.
            load = mock.patch.object(AutoModelForCausalLM, "from_pretrained", return_value=student)
            stack.enter_context(load)
            if at.type == "cpu":  # it looks for a GPU by name, also where there is none
                peak = f"{kind.__module__}.get_peak_flops_per_device"
                stack.enter_context(mock.patch(peak, return_value=None))
        made = kind(
            args=args,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear"),
            **given,
        )
    made.current_gradient_accumulation_steps = 1
    for name, weight in made.model.named_parameters():
        if "lora_B" in name:  # else the student is its base
            torch.manual_seed(2)
            torch.nn.init.normal_(weight, std=0.01)
    made.model.train()
    return made


def make_model(at: torch.device, name: str, dtype: torch.dtype, folder: str, seed: int) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(seed)
    with at:
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**QWEN3[name]), dtype=dtype, attn_implementation="sdpa"
        )
    model.config._name_or_path = folder  # where a trainer looks for its tokenizer
    return model


def batch(at: torch.device, made: Any, N: int) -> dict[str, Any]:
    """One sequence: a prompt, and N tokens that count."""
    trainer, g = type(made).__name__, torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, SAMPLED, (1, length), generator=g).to(at)

    prompt, told, completion = ids(STUDENT_PROMPT), ids(TEACHER_PROMPT), ids(N)
    text = torch.cat([prompt, completion], dim=1)
    mask = torch.ones_like(text)
    if trainer in LABELLED:
        labels = text.clone()
        labels[:, :STUDENT_PROMPT] = -100
        return {"input_ids": text, "attention_mask": mask, "labels": labels, "prompts": prompt}
    if trainer == "AsyncDistillationTrainer":
        tokens, log_q, log_q_sampled = teacher(text.shape[1], made.args.teacher_top_k)
        counts = mask.clone()
        counts[:, :STUDENT_PROMPT] = 0
        number = torch.tensor([float(N)], device=at)
        return {
            "input_ids": text,
            "attention_mask": mask,
            "completion_mask": counts,
            "position_ids": torch.arange(text.shape[1], device=at)[None],
            "teacher_topk_ids": torch.cat([tokens.to(at)[None], text[..., None]], dim=2),
            "teacher_topk_logprobs": torch.cat([log_q, log_q_sampled[:, None]], dim=1).to(at)[None],
            "global_n_tokens": number,
            "global_n_forward_tokens": number,
            "mean_seq_len": number,
        }
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "num_items_in_batch": torch.tensor(float(N), device=at),
    }
    if trainer in SELF:
        teacher_ids = torch.cat([told, completion], dim=1)
        inputs |= {
            "teacher_input_ids": teacher_ids,
            "teacher_attention_mask": torch.ones_like(teacher_ids),
            "advantages": torch.ones(1, device=at),
        }
    return inputs


def teacher(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a server tells of N tokens: K ids [N, K] and their log q, and log q [N] of the token
    that was sampled, which is less likely."""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(N, K + 2, generator=g).mul(2).sort(descending=True).values
    log_q = z.log_softmax(-1)  # the last is of all other tokens
    ids = torch.rand(N, 10 * K, generator=g).topk(K).indices + SAMPLED
    return ids, log_q[:, :K], log_q[:, K]


class _Server:
    """Stands in for TRL's client of a server."""

    def __init__(self, **_: Any) -> None: ...

    def get_sequence_logprobs(
        self, sequences: list[list[int]], prompt_lengths: list[int], top_logprobs: int, **_: Any
    ) -> dict[str, Any]:
        (sequence,), (begin,) = sequences, prompt_lengths
        ids, log_q, log_q_sampled = teacher(len(sequence) - begin, top_logprobs)
        return {
            "logprobs": [log_q.tolist()],
            "logprob_token_ids": [ids.tolist()],
            "actual_logprobs": [log_q_sampled[:, None].tolist()],
        }


def _nothing() -> Any:
    """Stands in for what draws rollouts and for what sends weights: neither is called."""
    return SimpleNamespace(rollout_buffer=None, metrics_queue=None)


def step(made: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """The loss, and the norm of its gradient."""
    items = inputs.get("num_items_in_batch")
    loss = made.compute_loss(made.model, dict(inputs), num_items_in_batch=items)
    loss.backward()
    gradients = [p.grad for p in made.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    made.model.zero_grad()
    return float(loss.detach()), float(norm)
