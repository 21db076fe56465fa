"""Sampled solutions to problems, read and graded."""

from collections.abc import Callable
from dataclasses import dataclass

from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from opsd_train.data import Context
from opsd_train.records import Problem, Rollout
from opsd_train.sampling import Sampler, draw_seed, roll_out


@dataclass(frozen=True)
class Verdict:
    """What a grader says of a completion."""

    correct: bool
    answer: str | None = None  # as it votes in maj@k; None where there is none


Grader = Callable[[Problem, str], Verdict]
"""Whether a completion, as text, solves the problem, and what it answers."""


@dataclass(frozen=True)
class Attempt:
    """A graded completion, with what its score hides."""

    prompt: str
    completion: str
    correct: bool
    answer: str | None
    tokens: int
    finished: bool  # whether the end of text was reached, and not the length limit


def grade(tokenizer: PreTrainedTokenizerBase, rollout: Rollout, grader: Grader) -> list[Attempt]:
    """Read what was sampled, and grade all of it."""
    attempts = []
    for i, (x, y) in enumerate(texts(tokenizer, rollout)):
        verdict = grader(rollout.problems[i], y)
        tokens, finished = len(rollout.completions[i]), rollout.finished[i]
        attempts.append(Attempt(x, y, verdict.correct, verdict.answer, tokens, finished))
    return attempts


def texts(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[tuple[str, str]]:
    """Prompts and completions: the only place where token ids become text."""
    prompts = tokenizer.batch_decode(rollout.prompts)
    completions = tokenizer.batch_decode(rollout.completions)
    return list(zip(prompts, completions, strict=True))


def evaluate(
    sampler: Sampler,
    context: Context,
    problems: list[Problem],
    grader: Grader,
    seed: int,
    batch_size: int = 256,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Attempt]:
    """Sample one solution a problem and grade it.

    Args:
        on_progress: called with the number of problems that are done.
    """
    seeds = [draw_seed(seed, i) for i in range(len(problems))]
    attempts: list[Attempt] = []
    for i in range(0, len(problems), batch_size):
        on_progress(i)
        batch = slice(i, i + batch_size)
        attempts += attempt(sampler, context, problems[batch], grader, seeds[batch])
    return attempts


def attempt(
    sampler: Sampler,
    context: Context,
    problems: list[Problem],
    grader: Grader,
    seeds: list[int],
) -> list[Attempt]:
    """Sample a solution to each problem, a share in each process, and grade it; all processes
    return all. Where the last has less to do, it does the first problem once more: none may be left
    without work, for which sharded weights would have to be gathered as well."""
    state = PartialState()
    share = -(-len(problems) // state.num_processes)
    first = share * state.process_index
    rows = [i if i < len(problems) else 0 for i in range(first, first + share)]
    rollout = roll_out(sampler, context, [problems[i] for i in rows], [seeds[i] for i in rows])
    own = grade(context.tokenizer, rollout, grader)
    return gather_object(own)[: len(problems)]
