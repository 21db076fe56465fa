"""Before the first step: what its largest micro-batch takes of a GPU, and what to lower if that is
more than there is.

Measured, not guessed: two micro-batches of made-up tokens, the second twice as long as the first,
go through scores, loss and backward. All that grows does so with the tokens (attention keeps
nothing of the size of its matrix), so that the largest one lies on the line through the two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from opsd_train.config import Config
from opsd_train.models import adapter_weights
from opsd_train.opsd import Setup, can_pack, opsd_loss, score_sequences, token_weights

GIB = 2**30
SHORT = 1024  # tokens of the student's sequences, prompts included
ADAMW_BYTES = 8  # of a weight of the adapter: two averages, in fp32; its gradient is measured


@dataclass(frozen=True)
class Shape:
    """A micro-batch: so many rollouts, and tokens of each one's prompts and completion."""

    rollouts: int
    prompt: int
    teacher_prompt: int
    completion: int

    @property
    def tokens(self) -> int:
        return self.rollouts * (self.prompt + self.completion)

    def of_tokens(self, tokens: int) -> "Shape":
        """One rollout of so many tokens in the same proportion."""
        share = tokens / (self.prompt + self.completion)
        parts = (self.prompt, self.teacher_prompt, self.completion)
        return Shape(1, *(max(1, round(share * part)) for part in parts))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes."""

    shape: Shape  # of the largest micro-batch
    there: int  # the weights
    adapter: int  # what AdamW keeps of it
    fixed: float  # of a micro-batch, whatever its tokens
    per_token: float
    available: int

    @property
    def micro_batch(self) -> float:
        return self.fixed + self.per_token * self.shape.tokens

    @property
    def total(self) -> float:
        return self.there + self.adapter + self.micro_batch

    @property
    def most_tokens(self) -> int:
        """Of a micro-batch that fits."""
        room = self.available - self.there - self.adapter - self.fixed
        return max(0, int(room / self.per_token))

    def describe(self, config: Config) -> str:
        shape = self.shape
        said = (
            f"Memory: weights {self.there / GIB:.1f} GiB, AdamW {self.adapter / GIB:.1f}, the "
            f"largest micro-batch {self.micro_batch / GIB:.1f} "
            f"({shape.rollouts} × up to {shape.prompt:,} + {shape.completion:,} tokens, on the "
            f"line through two shorter ones): {self.total / GIB:.1f} of "
            f"{self.available / GIB:.1f} GiB."
        )
        if self.total <= self.available:
            return said
        return (
            f"{said}\nThat is more than there is. A micro-batch of {self.most_tokens:,} tokens, "
            f"prompts included, would fit: {', or '.join(remedies(config))}."
        )


def remedies(config: Config) -> list[str]:
    """Options that take less, of those that are not at their least."""
    found = []
    if config.micro_batch_tokens is not None:
        found.append("lower --micro-batch-tokens")
    elif config.micro_batch_size > 1:
        found.append("lower --micro-batch-size")
    if not config.activation_checkpointing:
        found.append("turn on --activation-checkpointing")
    elif not config.offload_checkpoints:
        found.append("ask for --offload-checkpoints")
    if config.mlp_tokens is None:
        found.append("for --mlp-tokens 4096")
    return [*found, "lower --max-new-tokens"]


def plan_memory(
    config: Config,
    setup: Setup,
    peak: Callable[[Callable[[], None]], int],
    there: int,
    available: int,
) -> MemoryPlan:
    """Measure, and draw the line.

    Args:
        peak: bytes that a function takes beyond what is there before it.
        there, available: bytes of the GPU in use now, and all.
    """
    largest = largest_micro_batch(config, setup)
    adapter = sum(w.numel() for w in adapter_weights(setup.model).values())
    taken = []
    shapes = [largest.of_tokens(tokens) for tokens in (SHORT, 2 * SHORT)]
    for shape in shapes:
        taken.append(peak(lambda shape=shape: probe(config, setup, shape)))  # type: ignore[misc]
    per_token = (taken[1] - taken[0]) / (shapes[1].tokens - shapes[0].tokens)
    fixed = taken[0] - per_token * shapes[0].tokens
    return MemoryPlan(largest, there, ADAMW_BYTES * adapter, fixed, per_token, available)


def largest_micro_batch(config: Config, setup: Setup) -> Shape:
    """The longest prompts and completions together; of many short rollouts, as many tokens."""
    contexts = setup.contexts.student, setup.contexts.teacher
    prompt, teacher_prompt = (max(map(len, c.token_ids(setup.problems))) for c in contexts)
    rollouts = config.micro_batch_size
    if config.micro_batch_tokens is not None:
        longest = max(prompt, teacher_prompt) + config.max_new_tokens
        rollouts = max(1, config.micro_batch_tokens // longest)
    return Shape(rollouts, prompt, teacher_prompt, config.max_new_tokens)


def probe(config: Config, setup: Setup, shape: Shape) -> None:
    """Take made-up tokens through a micro-batch's scores, loss and backward; nothing is kept."""
    token = setup.tokenizer.pad_token_id or 0
    prompts, teacher_prompts, completions = (
        [[token] * length] * shape.rollouts
        for length in (shape.prompt, shape.teacher_prompt, shape.completion)
    )
    setup.backbone.train()
    scores = score_sequences(
        setup.backbone,
        setup.teacher,
        prompts,
        teacher_prompts,
        completions,
        token,
        can_pack(config, setup),
    )
    weights = token_weights(scores.lengths, config.mean, shape.rollouts, int(scores.lengths.sum()))
    loss, _ = opsd_loss(scores, setup.head, config, weights, setup.teacher.head)
    loss.backward()
    for w in setup.model.parameters():
        w.grad = None


def peak_on_gpu(run: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
