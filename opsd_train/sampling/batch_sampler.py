"""What the engines that run the model in this process have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModelForCausalLM
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from opsd_train.models import base_model, end_ids
from opsd_train.sampling.sampler import Sampling

# What transformers samples by, and must be its own.
OF_TRANSFORMERS = (
    *("generate", "generate_batch", "_sample", "_prepare_generation_config"),
    *("_get_logits_processor", "_get_stopping_criteria"),
)


@contextmanager
def nothing_inherited(model: PreTrainedModel) -> Iterator[Any]:
    """The model, without a generation config of its own within: transformers fills in what a call
    leaves unset from there, penalties and stop strings say, and rollouts would come from another
    policy than the loss's softmax(z / T)."""
    its_own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield model
    finally:
        model.generation_config = its_own


def check_generates(model: PreTrainedModel) -> None:
    """Raises:
    ValueError: the model has code of its own for sampling, which might draw from another policy.
    """
    for name in OF_TRANSFORMERS:
        is_own = getattr(type(model), name, None) is not getattr(GenerationMixin, name)
        if is_own or name in vars(model):
            raise ValueError(
                f"this {type(model).__name__} has a {name} of its own, which may sample otherwise "
                "than from softmax(z / T), the policy of the loss; sample from it with vLLM "
                "(--engine vllm)"
            )


class BatchSampler:
    """A sampler that takes `batch_size` prompts at once, by default all of them, with the
    `sample_batch` of a subclass."""

    def __init__(
        self,
        model: PeftModelForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        batch_size: int | None = None,
    ):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.batch_size = batch_size
        check_generates(base_model(model))
        self.ends = end_ids(base_model(model), tokenizer)

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        self.model.eval()  # without activation checkpointing, which knows no cache
        size = self.batch_size or len(prompts)
        completions = []
        for i in range(0, len(prompts), size):
            completions += self.sample_batch(prompts[i : i + size], seeds[i : i + size])
        return [up_to_the_end(completion, self.ends) for completion in completions]

    def sample_batch(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """Completions, and whatever comes after their ends."""
        raise NotImplementedError


def up_to_the_end(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
