"""A world small enough for a laptop's CPU: long multiplication, digit by digit, in a tiny Qwen3.

    <problem>3847*6=?<solution>7*6+0=42 4*6+4=28 8*6+2=50 3*6+5=23 <answer>23082<end>

Each step is digit · multiplier + carry, units first; a solution is right if the number after
<answer> is the product. Warm-started on worked solutions with slips in them, the model alone
samples a right solution to one problem in five; with a clean reference before it, it hardly errs.
That gap is what on-policy self-distillation has to close. (Decoded greedily the model is nearly
always right: it knows how to multiply, and has learnt to slip. What the teacher passes on is its
certainty.)
"""

import hashlib
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
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

from opsd_train.prompts import fill
from opsd_train.records import Problem

SPECIAL_TOKENS = [
    "<pad>",
    "<problem>",
    "<reference>",
    "<rework>",
    "<solution>",
    "<answer>",
    "<end>",
]
CHARACTERS = "0123456789*+=? "
HELD_OUT, TRAIN = 512, 8000  # problems; the warm start has the other 63,488

SMALL_WORLD = "small-world"
STUDENT_TEMPLATE = "<problem>{problem}<solution>"
TEACHER_TEMPLATE = "<problem>{problem}<reference>{solution}<rework><solution>"
DEMO: dict[str, Any] = {  # what a run here is asked for, unless it is told otherwise
    "model": SMALL_WORLD,
    "data": SMALL_WORLD,
    "dtype": "float32",
    "activation_checkpointing": False,
    "max_prompt_tokens": 128,
    "lora_rank": 16,
    "lora_alpha": 32,
    "student_template": STUDENT_TEMPLATE,
    "teacher_template": TEACHER_TEMPLATE,
    "temperature": 1.1,
    "max_new_tokens": 56,
    "steps": 60,
    "batch_size": 24,
    "micro_batch_size": 24,
    "learning_rate": 5e-4,
    "warmup": 0.08,
}


@dataclass(frozen=True)
class World:
    """A model that solves badly alone, its tokenizer, and problems. `train` and `held_out` share no
    problem with each other or with the warm start."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: list[Problem]
    held_out: list[Problem]


def is_correct(problem: Problem, completion: str) -> bool:
    """Whether the completion ends, and with the right answer."""
    _, marker, answer = completion.removesuffix("<end>").rpartition("<answer>")
    return completion.endswith("<end>") and bool(marker) and answer == problem.answer


def load_world(
    seed: int, on_progress: Callable[[float], None] = lambda fraction: None, warm: bool = True
) -> World:
    """The world of a seed, from the cache or built anew (a minute or two).

    Args:
        seed: decides the model's initial weights, its warm start and the split of the problems.
        on_progress: called with the part of the warm start that is done.
        warm: without it an uncached world is not trained, and not cached.

    Raises:
        OSError: the cache cannot be written, or what it holds cannot be loaded.
    """
    numbers = [(a, b) for a in range(1000, 10000) for b in range(2, 10)]
    random.Random(seed).shuffle(numbers)
    held_out, train, rest = (
        numbers[:HELD_OUT],
        numbers[HELD_OUT : HELD_OUT + TRAIN],
        numbers[HELD_OUT + TRAIN :],
    )
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path = cache_path(seed)
    if not path.exists():
        if warm:  # before the minute of training, not after it
            path.parent.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tokenizer = build_tokenizer()
            model = build_model(tokenizer)
        if warm:
            warm_start(model, tokenizer, rest, random.Random(seed), on_progress)
            _save(model, tokenizer, path)
    if path.exists():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    model.eval()
    return World(
        model,
        tokenizer,
        [make_problem(*ab) for ab in train],
        [make_problem(*ab) for ab in held_out],
    )


def cache_path(seed: int) -> Path:
    """Where the world of a seed is kept. What it is made by is part of the name, so that a changed
    recipe or library is never served an old world."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    made_by = (Path(__file__).read_bytes(), torch.__version__, transformers.__version__)
    key = hashlib.sha256(repr(made_by).encode()).hexdigest()[:12]
    return cache / "opsd_train" / f"tiny_world-{key}-seed{seed}"


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    # Written beside and moved into place, so that an interrupted run leaves no half of a world.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if not path.exists():  # else another run was faster, with the same world
            unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# Problems and worked solutions


def make_problem(a: int, b: int) -> Problem:
    solution, _ = work_out(a, b, random.Random(), slip_rate=0.0)
    return Problem(f"{a}*{b}=?", solution, str(a * b).zfill(len(str(a)) + 1))


def work_out(a: int, b: int, rng: random.Random, slip_rate: float) -> tuple[str, list[bool]]:
    """The worked solution of a · b without its <end>, and for each token whether a slip happened AT
    it: a carry forgotten or misread, a neighbour in the times table, a sum off by one or ten. What
    follows a slip is consistent with it, so the answer tells whether there was one."""
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
    tokens.append("<answer>")
    slips.append(False)
    write(str(carry) + digits)
    return "".join(tokens), slips


# Tokenizer, model, warm start


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, and the special tokens."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
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


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """Half a million parameters, freshly initialised."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=160,
            intermediate_size=320,
            num_hidden_layers=2,
            num_attention_heads=5,
            num_key_value_heads=5,
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
    numbers: list[tuple[int, int]],
    rng: random.Random,
    on_progress: Callable[[float], None],
    steps: int = 600,
    learning_rate: float = 4e-3,
    slip_rate: float = 0.41,
) -> None:
    """Teach the model to slip alone and to follow a reference: next-token training on solutions
    with slips without a reference, and without slips behind one."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, (0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(steps):
        rate = min(1, (step + 1) / 30) * min(1, (steps - step) / (0.6 * steps))
        optimizer.param_groups[0]["lr"] = learning_rate * rate
        alone = _warm_batch(tokenizer, rng.sample(numbers, 12), rng, False, slip_rate)
        # A slip now and then teaches it to go on from one; the slip itself is not a target.
        behind = _warm_batch(tokenizer, rng.sample(numbers, 14), rng, True, slip_rate)
        loss = _next_token_loss(model, *alone) + 4 * _next_token_loss(model, *behind)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        on_progress((step + 1) / steps)


def _warm_batch(
    tokenizer: PreTrainedTokenizerBase,
    numbers: list[tuple[int, int]],
    rng: random.Random,
    with_reference: bool,
    slip_rate: float,
) -> tuple[torch.Tensor, torch.Tensor]:
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


def _next_token_loss(
    model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
