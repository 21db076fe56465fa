"""What a sampling engine is, and a rollout by one."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from opsd_train.config import Config
from opsd_train.data import Context
from opsd_train.records import Problem, Rollout


@dataclass(frozen=True)
class Sampling:
    temperature: float
    max_new_tokens: int
    top_p: float = 1.0  # 1 for all tokens
    top_k: int = 0  # 0 for all tokens


def sampling_of(config: Config) -> Sampling:
    """Of a run's rollouts."""
    return Sampling(config.temperature, config.max_new_tokens, config.top_p, config.top_k)


class Sampler(Protocol):
    ends: set[int]  # the tokens that finish a completion

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """A completion a prompt, as token ids: up to and including the end of text, or as many
        as are allowed. The same prompts and seeds give the same completions."""
        ...


@dataclass(frozen=True)
class Samples:
    completions: list[list[int]]
    log_probs: list[list[float]] | None = None  # of each token as it was drawn, if that is known


@runtime_checkable
class BackgroundSampler(Sampler, Protocol):
    """An engine outside this process: it samples while this one does something else."""

    def begin(self, prompts: list[list[int]], seeds: list[int]) -> Callable[[], Samples]:
        """Begin what `sample` does, from the student as it is now. What is returned waits for it
        when it is called."""
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
    if isinstance(sampler, BackgroundSampler):
        samples = sampler.begin(prompts, seeds)()
    else:
        samples = Samples(sampler.sample(prompts, seeds))
    return as_rollout(sampler, problems, prompts, samples)


def as_rollout(
    sampler: Sampler, problems: list[Problem], prompts: list[list[int]], samples: Samples
) -> Rollout:
    finished = [c[-1] in sampler.ends for c in samples.completions]
    return Rollout(problems, prompts, samples.completions, finished, samples.log_probs)
