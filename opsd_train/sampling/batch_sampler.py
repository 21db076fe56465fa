"""What the engines that run the model in this process have in common."""

from peft import PeftModelForCausalLM
from transformers import PreTrainedTokenizerBase

from opsd_train.models import base_model
from opsd_train.sampling.sampler import Sampling


def end_ids(model: PeftModelForCausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which a model stops: those of its generation config, and the tokenizer's."""
    named = base_model(model).generation_config.eos_token_id
    ids = named if isinstance(named, list) else [named]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


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
        self.ends = end_ids(model, tokenizer)

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
