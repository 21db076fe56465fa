"""Sampled solutions to held-out problems, by all processes of a run."""

from accelerate import PartialState
from accelerate.utils import gather_object

from opsd_train.data import Context
from opsd_train.evaluation.graders import Attempt, Grader, grade_all
from opsd_train.records import Problem
from opsd_train.sampling import Sampler, draw_seed, roll_out


def evaluate(
    sampler: Sampler,
    context: Context,
    problems: list[Problem],
    grader: Grader,
    seed: int,
    batch_size: int = 256,
) -> list[Attempt]:
    """Sample one solution a problem and grade it."""
    seeds = [draw_seed(seed, i) for i in range(len(problems))]
    attempts = []
    for i in range(0, len(problems), batch_size):
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
    own = grade_all(context.tokenizer, rollout, grader)
    return gather_object(own)[: len(problems)]
