r"""The demo: long multiplication, and a model of half a million parameters that is bad at it.

Both are made once and cached, as a model folder and a file of problems; the preset small-world
trains on them as on any others. A problem and its solution:

    3847*6=?
    7*6+0=42 4*6+4=28 8*6+2=50 3*6+5=23 \boxed{23082}

Each step is digit · multiplier + carry, units first. The model is warm-started on solutions that
have slips when no reference stands before them, and none behind a reference. Alone it then samples
a right solution to one problem in six; behind a reference it hardly errs. (Decoded greedily it is
nearly always right: it knows how to multiply, and has learnt to slip. What the teacher passes on is
its certainty.)
"""

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opsd_train.config import Config
from opsd_train.data import fill
from opsd_train.errors import RunFailed
from opsd_train.models import save_model
from opsd_train.records import Problem
from opsd_train.run import progress_bar, say

NAME = "small-world"
"""Stands for the demo's model, as `model`, and for its problems, as `data`."""

STUDENT_TEMPLATE = "<problem>{problem}<solution>"
TEACHER_TEMPLATE = "<problem>{problem}<reference>{solution}<rework><solution>"
PROBLEMS = 8512  # to train on and to hold out; the warm start has the other 63,488

Numbers = list[tuple[int, int]]


def find_demo(config: Config, accelerator: Accelerator) -> Config:
    """The config with paths in place of the demo's name. What they lead to is made first, unless it
    is cached: that takes a minute.

    Raises:
        RunFailed: the cache cannot be written.
    """
    if NAME not in (config.model, config.data):
        return config
    path = cache_path()
    with accelerator.main_process_first():
        if not path.exists():
            say(f"Building the demo's model in {path}")
            try:
                build(path)
            except OSError as error:
                raise RunFailed(f"{error}; set XDG_CACHE_HOME to a writable folder") from error
    return replace(
        config,
        model=str(path) if config.model == NAME else config.model,
        data=str(path / "problems.jsonl") if config.data == NAME else config.data,
    )


def cache_path() -> Path:
    """Its name is a hash of this file and of the libraries: a changed recipe never finds a model
    that another one made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made_by = (Path(__file__).read_bytes(), torch.__version__, transformers.__version__)
    key = hashlib.sha256(repr(made_by).encode()).hexdigest()[:12]
    return cache / "opsd_train" / f"{NAME}-{key}"


def build(path: Path) -> None:
    """Warm-start the model, and write it and the problems into a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)  # before the minute of training, not after it
    numbers = [(a, b) for a in range(1000, 10000) for b in range(2, 10)]
    random.Random(0).shuffle(numbers)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
    with progress_bar("warm start", 600) as bar:
        warm_start(model, tokenizer, numbers[PROBLEMS:], random.Random(0), bar.advance_to, 600)
    problems = [make_problem(*ab) for ab in numbers[:PROBLEMS]]
    rows = [json.dumps({"problem": p.question, "solution": p.solution}) + "\n" for p in problems]
    save_model(path, model, tokenizer, {"problems.jsonl": "".join(rows)})


# Multiplication


def make_problem(a: int, b: int) -> Problem:
    solution, _ = work_out(a, b, random.Random(), slip_rate=0.0)
    return Problem(f"{a}*{b}=?", solution)


def work_out(a: int, b: int, rng: random.Random, slip_rate: float) -> tuple[str, list[bool]]:
    """The worked solution of a · b, and for each token whether a slip happened AT it: a carry
    forgotten or misread, a neighbour in the times table, a sum off by one or ten. What follows a
    slip is consistent with it, so the answer tells whether there was one."""
    tokens: list[str] = []
    slips: list[bool] = []

    def write(text: str, slip: bool = False) -> None:
        tokens.extend(text)
        slips.extend([slip] * len(text))

    carry, digits = 0, ""
    for digit in map(int, reversed(str(a))):
        kind = rng.choice(["carry", "table", "sum"]) if rng.random() < slip_rate else None
        added = carry
        if kind == "carry":
            added = rng.choice([0, max(0, carry - 1), min(9, carry + 1)])
        right = value = digit * b + added
        if kind == "table":
            value += rng.choice([-b, b])
        elif kind == "sum":
            value += rng.choice([-1, 1, -10, 10])
        if not 0 <= value <= 99:
            value = right
        write(f"{digit}*{b}+")
        write(str(added), slip=added != carry)
        write("=")
        write(f"{value:02d}", slip=value != right)
        write(" ")
        digits = str(value % 10) + digits
        carry = value // 10
    tokens.append(BOX)
    slips.append(False)
    write(f"{carry}{digits}}}")
    return "".join(tokens), slips


# The model

BOX = "\\boxed{"  # one token
SPECIAL_TOKENS = ["<pad>", "<problem>", "<reference>", "<rework>", "<solution>", BOX, "<end>"]
CHARACTERS = "0123456789*+=? }"


def build_tokenizer(
    special_tokens: list[str] = SPECIAL_TOKENS, characters: str = CHARACTERS
) -> PreTrainedTokenizerFast:
    """A token a character, and the special tokens: the first pads, the last ends a text."""
    vocabulary = {token: i for i, token in enumerate([*special_tokens, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special_tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special_tokens[0],
        eos_token=special_tokens[-1],
        additional_special_tokens=special_tokens[1:-1],
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase, width: int = 160) -> Qwen3ForCausalLM:
    """Two layers, freshly initialised; half a million parameters with a width of 160."""
    heads = width // 32
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=32,
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
    numbers: Numbers,
    rng: random.Random,
    on_step: Callable[[int], None],
    steps: int,
) -> None:
    """Teach the model to slip alone and to follow a reference."""

    def loss(step: int) -> Tensor:
        on_step(step)
        alone = _warm_batch(tokenizer, rng.sample(numbers, 12), rng, with_reference=False)
        # A slip now and then teaches it to go on from one; the slip itself is not a target.
        behind = _warm_batch(tokenizer, rng.sample(numbers, 14), rng, with_reference=True)
        return next_token_loss(model, *alone) + 4 * next_token_loss(model, *behind)

    train(model, loss, steps)
    on_step(steps)


def train(model: PreTrainedModel, loss: Callable[[int], Tensor], steps: int) -> None:
    """AdamW, the learning rate up over 30 steps and down over the last three fifths of them."""
    peak = 4e-3
    optimizer = torch.optim.AdamW(model.parameters(), peak, (0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        rate = min(1, (step + 1) / 30) * min(1, (steps - step) / (0.6 * steps))
        optimizer.param_groups[0]["lr"] = peak * rate
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def _warm_batch(
    tokenizer: PreTrainedTokenizerBase,
    numbers: Numbers,
    rng: random.Random,
    with_reference: bool,
    slip_rate: float = 0.41,
) -> tuple[Tensor, Tensor]:
    """Token ids and labels, [B, L] each; all sequences of a kind are equally long."""
    reference_id = tokenizer.convert_tokens_to_ids("<reference>")
    texts, all_slips = [], []
    for a, b in numbers:
        problem = make_problem(a, b)
        prompt = fill(TEACHER_TEMPLATE if with_reference else STUDENT_TEMPLATE, problem)
        clean = with_reference and rng.random() >= 0.15
        solution, slips = work_out(a, b, rng, 0.0 if clean else slip_rate)
        texts.append(prompt + solution + "<end>")
        all_slips.append([*slips, False])
    ids = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
    slipped = torch.tensor(all_slips)
    labels = ids.clone()
    start = ids.shape[1] - slipped.shape[1]  # of the solution
    if with_reference:
        # The reference is learnt too: copying it begins with knowing it.
        labels[:, : ids[0].tolist().index(reference_id) + 1] = -100
        labels[:, start - 2 : start] = -100
        labels[:, start:][slipped] = -100
    else:
        labels[:, :start] = -100
    return ids, labels


def next_token_loss(model: PreTrainedModel, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
