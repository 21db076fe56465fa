"""The world's models: a few sizes of Qwen3, warm-started on worked solutions, each built once and
kept.

Alone they err as `multiplication` says; behind a reference they work the problem out without a
mistake, and after one that stands there already go on consistently.
"""

import hashlib
import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.token_efficiency.multiplication import (
    LETTERS,
    LEVELS,
    MISCONCEPTION,
    SLIP,
    STUDENT_TEMPLATE,
    TEACHER_TEMPLATE,
    make_problem,
    sample_numbers,
    work_out,
)
from opsd_train.data import fill

SPECIAL_TOKENS = ["<pad>", "<problem>", "<reference>", "<rework>", "<solution>", "<end>"]
HEAD = 32
RECIPE = ("multiplication", "warm_start")  # the files that decide a model

WIDTHS = {"small": 96, "middle": 160, "large": 192, "expert": 192}
"""By size. "expert" is the larger teacher of on-policy distillation: it knows no references, and
has never seen a mistake."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, and the special tokens."""
    characters = "0123456789*+=" + LETTERS
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<end>",
        additional_special_tokens=SPECIAL_TOKENS[1:-1],
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, size: str) -> Qwen3ForCausalLM:
    width = WIDTHS[size]
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // HEAD,
            num_key_value_heads=width // HEAD,
            head_dim=HEAD,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            initializer_range=0.05,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    steps: int,
    expert: bool,
    learning_rate: float = 4e-3,
    tokens: int = 3000,
) -> None:
    """Next-token training on solutions with mistakes without a reference, and without mistakes
    behind one; an expert's has no mistakes and no references."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, (0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        rate = min(1, (step + 1) / 30) * min(1, (steps - step) / (0.6 * steps))
        optimizer.param_groups[0]["lr"] = learning_rate * rate
        level = rng.choice(LEVELS)
        size = tokens // (11 * level)  # about as many tokens at every level
        if expert:
            loss = next_token_loss(model, *alone(tokenizer, level, size, rng, 0.0))
        else:
            loss = next_token_loss(model, *alone(tokenizer, level, size // 2, rng, 1.0))
            loss = loss + 4 * next_token_loss(model, *behind(tokenizer, level, size // 2, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def alone(
    tokenizer: PreTrainedTokenizerBase, level: int, size: int, rng: random.Random, mistakes: float
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, [size, L] each: solutions without a reference."""
    texts = []
    for a, b in sample_numbers(rng, size, level, "warm start"):
        working = work_out(a, b, rng, mistakes * MISCONCEPTION, mistakes * SLIP)
        texts.append((fill(STUDENT_TEMPLATE, make_problem(a, b)), working.text))
    ids, solution = encode(tokenizer, texts)
    labels = ids.clone()
    labels[:, :-solution] = -100
    return ids, labels


def behind(
    tokenizer: PreTrainedTokenizerBase, level: int, size: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Likewise behind a reference. A mistake now and then teaches to go on from one; it is itself
    no target."""
    texts, mistakes = [], []
    for a, b in sample_numbers(rng, size, level, "warm start"):
        some = rng.random() < 0.3
        working = work_out(a, b, rng, 0.3 * some, 0.15 * some)
        texts.append((fill(TEACHER_TEMPLATE, make_problem(a, b)), working.text))
        mistakes.append([*working.mistakes, False])
    ids, solution = encode(tokenizer, texts)
    labels = ids.clone()
    labels[:, :-solution] = -100
    labels[:, -solution:][torch.tensor(mistakes)] = -100
    return ids, labels


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]]) -> tuple[Tensor, int]:
    """[B, L] ids of prompts with solutions, all of one length, and the tokens of a solution."""
    whole = [prompt + solution + "<end>" for prompt, solution in texts]
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    return torch.tensor(ids), len(texts[0][1]) + 1


def next_token_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def model_path(size: str, steps: int, folder: Path) -> Path:
    """Of the warm-started model; what it was made by is part of the name."""
    code = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in RECIPE]
    made_by = (code, torch.__version__, transformers.__version__)
    key = hashlib.sha256(repr(made_by).encode()).hexdigest()[:10]
    return folder / "models" / f"{size}-{steps}-{key}"


def build(size: str, steps: int, folder: Path) -> dict[str, Any]:
    """Warm-start a model, unless it is there; returns its parameters and the seconds it took."""
    path = model_path(size, steps, folder)
    facts = path / "warm_start.json"
    if facts.exists():
        return json.loads(facts.read_text())
    wall, processor = time.perf_counter(), time.process_time()
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, size)
    is_expert = size == "expert"
    steps = 2 * steps // 3 if is_expert else steps  # it has one thing to learn, not two
    warm_start(model, tokenizer, random.Random(0), steps, is_expert)
    made = {
        "size": size,
        "parameters": sum(w.numel() for w in model.parameters()),
        "wall_s": round(time.perf_counter() - wall, 2),
        "processor_s": round(time.process_time() - processor, 2),
    }
    # Written beside and moved into place: an interrupted run leaves no half of a model.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / facts.name).write_text(json.dumps(made))
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)
    return made


def load(size: str, steps: int, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = model_path(size, steps, folder)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)
