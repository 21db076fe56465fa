"""What a sampling engine is; a rollout by one; and rollouts that are sampled one step ahead."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from opsd_train.config import Config
from opsd_train.data import Context
from opsd_train.errors import RunFailed
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


@dataclass(frozen=True)
class Samples:
    completions: list[list[int]]
    log_probs: list[list[float]] | None = None  # of each token as it was drawn, if that is known


class Sampler:
    """An engine."""

    ends: set[int]  # the tokens that finish a completion

    def sample(self, prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        """A completion a prompt, as token ids: up to and including the end of text, or as many
        as are allowed. The same prompts and seeds give the same completions."""
        raise NotImplementedError

    def begin(self, prompts: list[list[int]], seeds: list[int]) -> Callable[[], Samples]:
        """Begin what `sample` does, from the student as it is now. What is returned waits for it
        when it is called. Only an engine outside this process samples in the meantime."""
        samples = Samples(self.sample(prompts, seeds))
        return lambda: samples


def draw_seed(*of: object) -> int:
    """A seed for what is drawn at one place of a run, say (seed, step, row of the batch): what is
    drawn there depends neither on what was drawn before, nor on which process draws it."""
    return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:8], "big", signed=True)


def roll_out(
    sampler: Sampler, context: Context, problems: list[Problem], seeds: list[int]
) -> Rollout:
    """One completion a problem."""
    prompts = context.token_ids(problems)
    return as_rollout(sampler, problems, prompts, sampler.begin(prompts, seeds)())


def as_rollout(
    sampler: Sampler, problems: list[Problem], prompts: list[list[int]], samples: Samples
) -> Rollout:
    finished = [c[-1] in sampler.ends for c in samples.completions]
    return Rollout(problems, prompts, samples.completions, finished, samples.log_probs)


class Ahead:
    """What has been begun for a step, until the step takes it. All processes call its methods
    together."""

    def __init__(self, accelerator: Accelerator, sampler: Sampler):
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
