"""Sampled accuracy on held-out problems, with an interval."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from transformers import PreTrainedTokenizerBase

from opsd_train.prompts import Context
from opsd_train.records import Problem, Rollout
from opsd_train.rollout import Sampler, draw_seed, roll_out

Grader = Callable[[Problem, str], bool]
"""Whether a completion, as text, solves the problem."""


@dataclass(frozen=True)
class Completion:
    """One line of completions.jsonl."""

    prompt: str
    completion: str
    correct: bool | None  # None where nobody can tell


def grade(
    tokenizer: PreTrainedTokenizerBase, rollout: Rollout, is_correct: Grader | None
) -> list[Completion]:
    """Read what was sampled: the only place where token ids become text."""
    prompts = tokenizer.batch_decode(rollout.prompts)
    completions = tokenizer.batch_decode(rollout.completions)
    return [
        Completion(x, y, is_correct(problem, y) if is_correct else None)
        for problem, x, y in zip(rollout.problems, prompts, completions, strict=True)
    ]


@dataclass(frozen=True)
class Accuracy:
    correct: int
    total: int

    @property
    def mean(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% score interval."""
        z = NormalDist().inv_cdf(0.975)
        n, mean = self.total, self.mean
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.1%} (95% interval {low:.1%} to {high:.1%}, {self.total} problems)"


def accuracy(completions: list[Completion]) -> Accuracy:
    return Accuracy(sum(bool(c.correct) for c in completions), len(completions))


def evaluate(
    sampler: Sampler,
    context: Context,
    problems: list[Problem],
    is_correct: Grader,
    seed: int,
    batch_size: int = 256,
) -> list[Completion]:
    """Sample one solution a problem and grade it."""
    completions = []
    for i in range(0, len(problems), batch_size):
        batch = problems[i : i + batch_size]
        seeds = [draw_seed(seed, i + row) for row in range(len(batch))]
        rollout = roll_out(sampler, context, batch, seeds)
        completions += grade(context.tokenizer, rollout, is_correct)
    return completions
