"""Sampling with transformers' `generate`, each rollout with random numbers of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd_train.data import left_pad
from opsd_train.models import Student, base_model, call_with_full_parameters, end_ids
from opsd_train.sampling.sampler import Sampler, Sampling

# The methods by which transformers samples; a model that overrides one is refused.
OF_TRANSFORMERS = (
    *("generate", "_sample", "_prepare_generation_config"),
    *("_get_logits_processor", "_get_stopping_criteria"),
)


class GenerateSampler(Sampler):
    """transformers' `generate`, in left-padded batches of `batch_size` prompts, by default all."""

    def __init__(
        self,
        model: Student,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        batch_size: int | None = None,
        backbone: torch.nn.Module | None = None,
    ):
        """`backbone`: the model's, whose weights may be sharded."""
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.batch_size, self.backbone = batch_size, model if backbone is None else backbone
        check_generates(base_model(model))
        self.ends = end_ids(base_model(model), tokenizer)

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        self.model.eval()  # without activation checkpointing, which knows no cache
        size = self.batch_size or len(prompts)

        def sample() -> list[list[int]]:
            batches = [slice(i, i + size) for i in range(0, len(prompts), size)]
            return [c for b in batches for c in self._sample_batch(prompts[b], seeds[b])]

        completions = call_with_full_parameters(self.backbone, sample)
        return [up_to_the_end(completion, self.ends) for completion in completions]

    def _sample_batch(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """Completions, with padding after their ends."""
        ids, mask = left_pad(prompts, self.tokenizer.pad_token_id)
        processors = LogitsProcessorList([TemperatureLogitsWarper(self.sampling.temperature)])
        if self.sampling.top_k:
            processors.append(TopKLogitsWarper(self.sampling.top_k))
        if self.sampling.top_p < 1:
            processors.append(TopPLogitsWarper(self.sampling.top_p))
        processors.append(SeededDraws(seeds, self.model.device))
        with torch.no_grad(), nothing_inherited(base_model(self.model)) as model:
            out = model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                logits_processor=processors,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=self.sampling.max_new_tokens,
                    eos_token_id=sorted(self.ends),
                    pad_token_id=self.tokenizer.pad_token_id,
                ),
            )
        return out[:, ids.shape[1] :].tolist()


class SeededDraws(LogitsProcessor):
    """Turns greedy decoding into sampling, each row with random numbers of its own: the largest of
    log p_v + g_v, with independent Gumbel noise g, is a sample of p (Gumbel, 1954)."""

    def __init__(self, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] log-probabilities, up to a constant, with noise."""
        waiting = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(waiting, self.generators, strict=True):
            row.exponential_(generator=generator)
        waiting.clamp_(min=torch.finfo(torch.float32).tiny)  # log 0 beside a log p of −∞ is NaN
        return scores - waiting.log()


def up_to_the_end(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]


@contextmanager
def nothing_inherited(model: PreTrainedModel) -> Iterator[Any]:
    """The model, without its own generation config. transformers would fill in whatever a call
    leaves unset from there, such as penalties and stop strings, and rollouts would come from
    another policy than the loss's softmax(z / T)."""
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
