"""The small world's model: half a million parameters, warm-started on worked solutions.

Alone it samples a right solution to one problem in five; with a clean reference before it, it
hardly errs. That gap is what on-policy self-distillation has to close. (Decoded greedily the model
is nearly always right: it knows how to multiply, and has learnt to slip. What the teacher passes on
is its certainty.)
"""

import random
from collections.abc import Callable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opsd_train.data import fill
from opsd_train.small_world.multiplication import (
    STUDENT_TEMPLATE,
    TEACHER_TEMPLATE,
    Numbers,
    make_problem,
    work_out,
)

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
    numbers: Numbers,
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
    numbers: Numbers,
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
