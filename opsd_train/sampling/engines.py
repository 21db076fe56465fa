"""The engine that a config asks for, and rollouts that are sampled one step ahead.

A new engine is a class with the `sample` of `Sampler`, in a file beside this one; its name goes
into `make_sampler` and the config's `engine`. One that runs outside this process has the `begin` of
`BackgroundSampler` too.
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModelForCausalLM
from transformers import PreTrainedTokenizerBase

from opsd_train.config import Config
from opsd_train.errors import RunFailed
from opsd_train.models import Student, call_with_full_parameters
from opsd_train.sampling.generate import GenerateSampler
from opsd_train.sampling.sampler import BackgroundSampler, Sampler, Samples, Sampling
from opsd_train.sampling.vllm import VllmSampler


def make_sampler(
    config: Config,
    accelerator: Accelerator,
    student: Student,
    backbone: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> Sampler:
    """Raises:
    ValueError: the engine cannot sample from this model, or is not there.
    """
    if config.engine == "vllm":
        assert isinstance(student, PeftModelForCausalLM)  # as the config makes sure
        return VllmSampler(config, accelerator, student, backbone, tokenizer, sampling)
    sampler = GenerateSampler(student, tokenizer, sampling, config.rollout_batch_size)
    return ShardedSampler(sampler, backbone) if config.shard else sampler


class ShardedSampler:
    """A sampler whose model is sharded."""

    def __init__(self, sampler: Sampler, backbone: torch.nn.Module):
        self.sampler, self.backbone, self.ends = sampler, backbone, sampler.ends

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        return call_with_full_parameters(self.backbone, lambda: self.sampler.sample(prompts, seeds))


class Ahead:
    """What has been begun for a step, until the step takes it. All processes call its methods
    together."""

    def __init__(self, accelerator: Accelerator, sampler: Sampler):
        """Raises:
        TypeError: the engine cannot sample while something else is done.
        """
        if not isinstance(sampler, BackgroundSampler):
            raise TypeError(f"ahead needs a BackgroundSampler, got {type(sampler).__name__}")
        self.accelerator, self.sampler = accelerator, sampler
        self.step: int | None = None  # the step that samples were begun for
        self._policy_step = 0
        self._samples: Callable[[], Samples] | None = None

    def begin(
        self, step: int, prompts: list[list[int]], seeds: list[int], *, policy_step: int
    ) -> None:
        """Sample for a step, from the student as it is, after `policy_step` steps."""
        self._samples = self.sampler.begin(prompts, seeds)
        self.step, self._policy_step = step, policy_step

    def take(self) -> tuple[Samples, int]:
        """What was begun, and the policy's step.

        Raises:
            RunFailed: nothing came of it.
        """
        assert self._samples is not None
        samples = self._samples()
        self.step = self._samples = None
        return samples, self._policy_step

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint has to keep: all processes' rows in order, for which it waits. None
        where nothing is begun, or nothing came of it: then the step samples anew."""
        if self._samples is None:
            return None
        try:
            own = self._samples()
        except RunFailed:
            return None
        return {
            "step": self.step,
            "policy_step": self._policy_step,
            "completions": gather_object(own.completions),
            "log_probs": gather_object(own.log_probs),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, with as many processes as there are."""
        share = len(state["completions"]) // self.accelerator.num_processes
        first = share * self.accelerator.process_index
        own = Samples(*(state[n][first : first + share] for n in ("completions", "log_probs")))
        self.step, self._policy_step = state["step"], state["policy_step"]
        self._samples = lambda: own
