"""Sampling with transformers' continuous batching: a rollout that ends makes room for the next."""

from typing import Any

import torch
from peft import PeftModelForCausalLM
from transformers import ContinuousBatchingConfig, GenerationConfig

from opsd_train.errors import RunFailed
from opsd_train.models import base_model
from opsd_train.sampling.batch_sampler import BatchSampler, nothing_inherited
from opsd_train.sampling.sampler import draw_seed

PAGE = 256  # tokens whose keys and values are stored together


class ContinuousSampler(BatchSampler):
    """transformers' `generate_batch`, with the adapter's layers where they are.

    It draws from one stream of random numbers for all rows: seeded, but what a row draws depends on
    the rows beside it, and so on how many processes share a batch.

    Raises:
        ValueError: the model's attention has a softcap, which `generate_batch` leaves out.
    """

    def __init__(self, model: PeftModelForCausalLM, *arguments: Any):
        super().__init__(model, *arguments)
        softcap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
        if softcap is not None:
            raise ValueError(
                f"continuous batching ignores this model's attn_logit_softcapping={softcap:g}, and "
                "would sample from another policy; ask for --engine generate"
            )

    def sample_batch(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        sampling = self.sampling
        # Room for these rollouts and no more: by default it takes most of the memory there is.
        pages = sum(-(-(len(p) + sampling.max_new_tokens) // PAGE) + 1 for p in prompts)
        with nothing_inherited(base_model(self.model)) as model:
            results = model.generate_batch(
                prompts,
                generation_config=GenerationConfig(
                    do_sample=True,
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=sorted(self.ends),
                    pad_token_id=self.tokenizer.pad_token_id,
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=PAGE, num_blocks=pages, seed=abs(draw_seed(*seeds)) % 2**31
                ),
            )
        return completed(list(results.values()), len(prompts))


def completed(results: list[Any], expected: int) -> list[list[int]]:
    """The completions of requests, of which `generate_batch` also returns those that failed, with
    what they had until then and an error's text.

    Raises:
        torch.OutOfMemoryError: a request failed for want of memory.
        RunFailed: a request failed, has no tokens, or is missing.
    """
    for result in results:
        if result.error is not None and "out of memory" in result.error.lower():
            raise torch.OutOfMemoryError(result.error)
    completions = [r.generated_tokens for r in results if r.error is None and r.generated_tokens]
    if len(completions) < expected:
        why = next((f" ({r.error})" for r in results if r.error is not None), "")
        raise RunFailed(
            f"continuous batching completed {len(completions)} of {expected} rollouts{why}; go on "
            "with --resume, or begin anew with --engine generate"
        )
    return completions
