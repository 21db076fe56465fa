"""Sampled accuracy on held-out problems, with an interval."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from peft import PeftModelForCausalLM
from transformers import PreTrainedTokenizerBase

from opsd_train.prompts import student_prompt
from opsd_train.records import Problem, Rollout
from opsd_train.rollout import sample


@dataclass(frozen=True)
class Completion:
    """One line of completions.jsonl."""

    prompt: str
    completion: str
    correct: bool


def grade(
    tokenizer: PreTrainedTokenizerBase,
    rollout: Rollout,
    is_correct: Callable[[Problem, str], bool],
) -> list[Completion]:
    """Read what was sampled: the only place where token ids become text."""
    prompts = tokenizer.batch_decode(rollout.prompts)
    completions = tokenizer.batch_decode(rollout.completions)
    return [
        Completion(x, y, is_correct(problem, y))
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


def evaluate(
    model: PeftModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    is_correct: Callable[[Problem, str], bool],
    *,
    max_new_tokens: int,
    prompt: Callable[[Problem], str] = student_prompt,
    batch_size: int = 256,
) -> tuple[Accuracy, list[Completion]]:
    """Sample one solution a problem at temperature 1 and grade it."""
    completions = []
    for i in range(0, len(problems), batch_size):
        batch = problems[i : i + batch_size]
        rollout = sample(
            model,
            tokenizer,
            batch,
            prompt=prompt,
            temperature=1.0,
            max_new_tokens=max_new_tokens,
        )
        completions += grade(tokenizer, rollout, is_correct)
    return Accuracy(sum(c.correct for c in completions), len(completions)), completions
