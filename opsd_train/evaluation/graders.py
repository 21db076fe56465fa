"""Reading what was sampled, and grading it."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from opsd_train.records import Problem, Rollout

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
