"""A Qwen3 of 84,000 parameters that adds, for examples that are to run on a CPU in seconds.

    274+358=12 13 06.

A solution has a sum for each column, units first, whose first digit is carried. The model
has been shown solutions with slips where it works alone, and without where it sees one before it
(274+358=12 13 06?12 13 06.): so it has something to learn from itself.
"""

import random

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

STUDENT, TEACHER = "{problem}=", "{problem}={solution}?"
LENGTH = 9  # tokens of a solution, a character each, with its end
CHARACTERS = "_.0123456789+=? "


def make_row(slip_rate: float = 0.0) -> dict[str, str]:
    """A problem and its solution. A slip is a sum that is off by one; what follows agrees with it,
    so only a solution without slips has the right sums."""
    a, b = f"{random.randrange(1000):03d}", f"{random.randrange(1000):03d}"
    sums, carry = [], 0
    for digit_a, digit_b in zip(reversed(a), reversed(b), strict=True):
        value = int(digit_a) + int(digit_b) + carry
        if random.random() < slip_rate:
            value = max(0, value + random.choice([-1, 1]))
        sums.append(f"{value:02d}")
        carry = value // 10
    return {"problem": f"{a}+{b}", "solution": " ".join(sums)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {character: i for i, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="_",
        eos_token=".",
        clean_up_tokenization_spaces=False,
    )


def make_model() -> Qwen3ForCausalLM:
    """With random weights."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(CHARACTERS),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
            tie_word_embeddings=False,
            initializer_range=0.05,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )


def warm_start(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> None:
    """Next-token training on solutions: with slips alone, without behind another."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min((step + 1) / 20, 2 * (1 - step / steps), 1)
        for template, slip_rate in [(STUDENT, 0.3), (TEACHER, 0.0)]:
            rows = [make_row(slip_rate) for _ in range(32)]
            texts = [template.format_map(row) + row["solution"] + "." for row in rows]
            ids = tokenizer(texts, return_tensors="pt")["input_ids"]
            z = model(input_ids=ids, use_cache=False).logits[:, -LENGTH - 1 : -1]
            cross_entropy(z.flatten(0, 1), ids[:, -LENGTH:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def make_world(warm_steps: int = 400):
    """The model, its tokenizer, and rows of `problem` and `solution`; the same in every call."""
    torch.set_num_threads(
        1
    )  # for matrices this small: threads that wait for one another cost more than they compute
    random.seed(0)
    torch.manual_seed(0)
    model, tokenizer = make_model(), make_tokenizer()
    warm_start(model, tokenizer, warm_steps)
    return model, tokenizer, [make_row() for _ in range(2500)]


@torch.no_grad()
def share_solved(model, tokenizer: PreTrainedTokenizerFast, template: str, rows: list) -> float:
    """The share of rows whose right solution is sampled at temperature 1."""
    prompts = tokenizer([template.format_map(row) for row in rows], return_tensors="pt")
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": LENGTH}
    ids = model.generate(prompts["input_ids"], attention_mask=prompts["attention_mask"], **options)
    texts = tokenizer.batch_decode(ids[:, -LENGTH:])
    return sum(t == row["solution"] + "." for t, row in zip(texts, rows, strict=True)) / len(rows)


def demonstrate(train, args) -> None:
    """Call `train` with a new adapter, and print what is solved before and after."""
    model, tokenizer, rows = make_world()
    held_out, rows = rows[:500], rows[500:]
    for template, how in [(STUDENT, "alone"), (TEACHER, "with the solution in view")]:
        print(f"before: {share_solved(model, tokenizer, template, held_out):.0%} solved {how}")
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    train(model, tokenizer, rows, STUDENT, TEACHER, args)
    print(f"after: {share_solved(model, tokenizer, STUDENT, held_out):.0%} solved alone")
