"""Sample solutions from the model as it stands.

An engine is whatever has the `sample` of `Sampler`; another one is added by another file with a
class of that shape, and its name in setup.py.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import PeftModelForCausalLM
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd_train.model import base_model
from opsd_train.prompts import Context, left_pad
from opsd_train.records import Problem, Rollout
from opsd_train.sharding import with_whole_weights


@dataclass(frozen=True)
class Sampling:
    temperature: float
    max_new_tokens: int
    top_p: float = 1.0  # 1 for all tokens
    top_k: int = 0  # 0 for all tokens


class Sampler(Protocol):
    ends: set[int]  # the tokens that finish a completion

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """A completion a prompt, as token ids: up to and including the end of text, or as many as
        may be. The same prompts and seeds give the same completions."""
        ...


def draw_seed(*of: object) -> int:
    """A seed for what is drawn at one place of a run, say (seed, step, row of the batch): what is
    drawn there depends neither on what was drawn before, nor on which process draws it."""
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:8], "big", signed=True)


def roll_out(
    sampler: Sampler, context: Context, problems: list[Problem], seeds: list[int]
) -> Rollout:
    """One completion a problem."""
    prompts = context.token_ids(problems)
    completions = sampler.sample(prompts, seeds)
    return Rollout(problems, prompts, completions, [c[-1] in sampler.ends for c in completions])


def end_ids(model: PeftModelForCausalLM, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens at which a model stops: those of its generation config, and the tokenizer's."""
    named = base_model(model).generation_config.eos_token_id
    ids = named if isinstance(named, list) else [named]
    return {i for i in [*ids, tokenizer.eos_token_id] if i is not None}


class BatchSampler:
    """A sampler that takes so many prompts at once, all of them by default, with `sample_batch`."""

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


class GenerateSampler(BatchSampler):
    """transformers' `generate`, in left-padded batches of prompts."""

    def sample_batch(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        ids, mask = left_pad(prompts, self.tokenizer.pad_token_id)
        processors = LogitsProcessorList([TemperatureLogitsWarper(self.sampling.temperature)])
        if self.sampling.top_k:
            processors.append(TopKLogitsWarper(self.sampling.top_k))
        if self.sampling.top_p < 1:
            processors.append(TopPLogitsWarper(self.sampling.top_p))
        processors.append(SeededDraws(seeds, self.model.device))
        with torch.no_grad():
            out = self.model.generate(
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
        """[B, V] log-probabilities, but for a constant, with noise."""
        waiting = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(waiting, self.generators, strict=True):
            row.exponential_(generator=generator)
        waiting.clamp_(min=torch.finfo(torch.float32).tiny)  # log 0 beside a log p of −∞ is NaN
        return scores - waiting.log()


class ShardedSampler:
    """A sampler whose model is sharded."""

    def __init__(self, sampler: Sampler, backbone: torch.nn.Module):
        self.sampler, self.backbone, self.ends = sampler, backbone, sampler.ends

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        return with_whole_weights(self.backbone, lambda: self.sampler.sample(prompts, seeds))


def up_to_the_end(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
