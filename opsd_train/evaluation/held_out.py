"""Sampled solutions to held-out problems."""

from opsd_train.data import Context
from opsd_train.evaluation.graders import Completion, Grader, grade
from opsd_train.records import Problem
from opsd_train.sampling import Sampler, draw_seed, roll_out


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
