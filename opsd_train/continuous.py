"""Sampling with transformers' continuous batching: a rollout that ends makes room for the next."""

from typing import Any

from peft import PeftModelForCausalLM
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerBase

from opsd_train.model import base_model
from opsd_train.rollout import Sampling, draw_seed, end_ids, up_to_the_end

PAGE = 256  # tokens whose keys and values are stored together


class ContinuousSampler:
    """transformers' `generate_batch`, with the adapter's layers where they are.

    It draws from one stream of random numbers for all rows: seeded, but what a row draws depends on
    the rows beside it, and so on how many processes share a batch.
    """

    def __init__(
        self,
        model: PeftModelForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        batch_size: int | None = None,
    ):
        self.model: Any = base_model(model)
        self.batch_size = batch_size
        self.ends = end_ids(model, tokenizer)
        self.generation = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=tokenizer.pad_token_id,
        )

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        size = self.batch_size or len(prompts)
        completions = []
        for i in range(0, len(prompts), size):
            completions += self._batch(prompts[i : i + size], seeds[i : i + size])
        return completions

    def _batch(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        self.model.eval()
        # Room for these rollouts and no more: by default it takes most of the memory there is.
        pages = sum(-(-(len(p) + self.generation.max_new_tokens) // PAGE) + 1 for p in prompts)
        results = self.model.generate_batch(
            prompts,
            generation_config=self.generation,
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE, num_blocks=pages, seed=abs(draw_seed(*seeds)) % 2**31
            ),
        )
        if len(results) != len(prompts):
            raise RuntimeError(
                f"continuous batching returned {len(results)} of {len(prompts)} completions; "
                "sample with --engine generate"
            )
        return [up_to_the_end(r.generated_tokens, self.ends) for r in results.values()]
