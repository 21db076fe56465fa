"""Reading what was sampled, and grading it."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from opsd_train.records import Problem, Rollout


@dataclass(frozen=True)
class Verdict:
    """What a grader says of a completion."""

    correct: bool
    answer: str | None = None  # as it votes in maj@k; None where there is none


Grader = Callable[[Problem, str], Verdict]
"""Whether a completion, as text, solves the problem, and what it answers."""


@dataclass(frozen=True)
class Completion:
    """One line of completions.jsonl."""

    prompt: str
    completion: str
    correct: bool | None  # None where nobody can tell


@dataclass(frozen=True)
class Attempt:
    """A graded completion, with what its score hides."""

    prompt: str
    completion: str
    correct: bool
    answer: str | None
    tokens: int
    finished: bool  # whether the end of text was reached, and not the length limit

    def as_completion(self) -> Completion:
        return Completion(self.prompt, self.completion, self.correct)


def grade(
    tokenizer: PreTrainedTokenizerBase, rollout: Rollout, grader: Grader | None
) -> list[Completion]:
    """Read what was sampled, and grade it where there is a grader."""
    if grader is not None:
        return [attempt.as_completion() for attempt in grade_all(tokenizer, rollout, grader)]
    return [Completion(x, y, None) for x, y in _texts(tokenizer, rollout)]


def grade_all(
    tokenizer: PreTrainedTokenizerBase, rollout: Rollout, grader: Grader
) -> list[Attempt]:
    """Read what was sampled, and grade all of it."""
    attempts = []
    for i, (x, y) in enumerate(_texts(tokenizer, rollout)):
        verdict = grader(rollout.problems[i], y)
        tokens, finished = len(rollout.completions[i]), rollout.finished[i]
        attempts.append(Attempt(x, y, verdict.correct, verdict.answer, tokens, finished))
    return attempts


def _texts(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[tuple[str, str]]:
    """Prompts and completions: the only place where token ids become text."""
    prompts = tokenizer.batch_decode(rollout.prompts)
    completions = tokenizer.batch_decode(rollout.completions)
    return list(zip(prompts, completions, strict=True))
