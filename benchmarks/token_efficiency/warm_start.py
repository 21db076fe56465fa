"""The world's models: a few sizes of Qwen3, warm-started on worked solutions, each built once and
kept.

Alone they err as `multiplication` says; behind a reference they work the problem out without a
mistake, and after one that stands there already go on consistently.
"""

import hashlib
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.token_efficiency import multiplication
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
from opsd_train import demo
from opsd_train.data import fill
from opsd_train.demo import build_model, build_tokenizer, next_token_loss, train
from opsd_train.models import save_model

SPECIAL_TOKENS = ["<pad>", "<problem>", "<reference>", "<rework>", "<solution>", "<end>"]
CHARACTERS = "0123456789*+=" + LETTERS
RECIPE = (Path(multiplication.__file__), Path(__file__), Path(demo.__file__))
"""The files that decide a model."""

WIDTHS = {"small": 96, "middle": 160, "large": 192, "expert": 192}
"""By size. "expert" is the larger teacher of on-policy distillation: it knows no references, and
has never seen a mistake."""


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    steps: int,
    expert: bool,
    tokens: int = 3000,
) -> None:
    """Next-token training on solutions with mistakes without a reference, and without mistakes
    behind one; an expert's has no mistakes and no references."""

    def loss(step: int) -> Tensor:
        level = rng.choice(LEVELS)
        size = tokens // (11 * level)  # about as many tokens at every level
        if expert:
            return next_token_loss(model, *alone(tokenizer, level, size, rng, 0.0))
        loss = next_token_loss(model, *alone(tokenizer, level, size // 2, rng, 1.0))
        return loss + 4 * next_token_loss(model, *behind(tokenizer, level, size // 2, rng))

    train(model, loss, steps)


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


def model_path(size: str, steps: int, folder: Path) -> Path:
    """Of the warm-started model; what it was made by is part of the name."""
    code = [path.read_bytes() for path in RECIPE]
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
    tokenizer = build_tokenizer(SPECIAL_TOKENS, CHARACTERS)
    model = build_model(tokenizer, WIDTHS[size])
    is_expert = size == "expert"
    steps = 2 * steps // 3 if is_expert else steps  # it has one thing to learn, not two
    warm_start(model, tokenizer, random.Random(0), steps, is_expert)
    made = {
        "size": size,
        "parameters": sum(w.numel() for w in model.parameters()),
        "wall_s": round(time.perf_counter() - wall, 2),
        "processor_s": round(time.process_time() - processor, 2),
    }
    save_model(path, model, tokenizer, {facts.name: json.dumps(made)})
    return made


def load(size: str, steps: int, folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = model_path(size, steps, folder)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)
