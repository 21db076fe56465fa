"""Sampling with transformers' `generate`, each rollout with random numbers of its own."""

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd_train.data import left_pad
from opsd_train.models import base_model
from opsd_train.sampling.batch_sampler import BatchSampler, nothing_inherited


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
        """[B, V] log-probabilities, but for a constant, with noise."""
        waiting = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(waiting, self.generators, strict=True):
            row.exponential_(generator=generator)
        waiting.clamp_(min=torch.finfo(torch.float32).tiny)  # log 0 beside a log p of −∞ is NaN
        return scores - waiting.log()
