"""The engines by name, and the one that a config asks for.

Another engine is a file of this room with a class that has the `sample` of `Sampler`, and its name
in `ENGINES` and in the config's `engine`; one that runs elsewhere has the `begin` of
`BackgroundSampler` too.
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from peft import PeftModelForCausalLM
from transformers import PreTrainedTokenizerBase

from opsd_train.config import Config
from opsd_train.models import call_with_full_parameters
from opsd_train.sampling.continuous import ContinuousSampler
from opsd_train.sampling.generate import GenerateSampler
from opsd_train.sampling.sampler import Sampler, Sampling
from opsd_train.sampling.vllm import VllmSampler

# Those that run the student in this process.
ENGINES: dict[str, Callable[..., Sampler]] = {
    "generate": GenerateSampler,
    "continuous": ContinuousSampler,
}


def make_sampler(
    config: Config,
    accelerator: Accelerator,
    student: PeftModelForCausalLM,
    backbone: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> Sampler:
    """Raises:
    ValueError: the engine cannot sample from this model, or is not there.
    """
    if config.engine == "vllm":
        return VllmSampler(config, accelerator, student, backbone, tokenizer, sampling)
    engine = ENGINES[config.engine]
    sampler = engine(student, tokenizer, sampling, config.rollout_batch_size)
    return ShardedSampler(sampler, backbone) if config.shard else sampler


class ShardedSampler:
    """A sampler whose model is sharded."""

    def __init__(self, sampler: Sampler, backbone: torch.nn.Module):
        self.sampler, self.backbone, self.ends = sampler, backbone, sampler.ends

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        return call_with_full_parameters(self.backbone, lambda: self.sampler.sample(prompts, seeds))
