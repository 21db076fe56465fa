"""One step of on-policy self-distillation (Zhao et al., 2026, Algorithm 1).

Which problems a step takes, what it draws and how fast it learns are functions of the seed and the
step's number alone.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_kernels import LMHead
from opsd_train.config import Config
from opsd_train.data import Contexts
from opsd_train.models import Student, adapter_weights, full_tensor
from opsd_train.opsd.objective import opsd_loss, score, token_weights
from opsd_train.opsd.teachers import Teacher
from opsd_train.records import Problem, Rollout, Scores
from opsd_train.sampling import Ahead, Sampler, as_rollout, draw_seed, roll_out


@dataclass(frozen=True)
class Setup:
    """What a step is taken with: student, teacher, problems and prompts, and the processes that
    share the work."""

    config: Config  # with lengths that fit the model
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    contexts: Contexts
    problems: list[Problem]
    model: Student  # to sample from
    backbone: torch.nn.Module  # the student, to score with: a `Backbone`, wrapped if distributed
    head: LMHead  # the student's, frozen
    teacher: Teacher
    sampler: Sampler
    ahead: Ahead | None = None  # samples for the next step; None where each step samples its own


Phase = Callable[[str], AbstractContextManager[None]]
"""Called with the name of a phase of the step; the phase takes place within the context."""

Observe = Callable[[Rollout, Scores], None]
"""Called with the rollouts and the scores of each micro-batch of a step."""


def take_step(
    config: Config,
    setup: Setup,
    optimizer: torch.optim.Optimizer,
    step: int,
    phase: Phase,
    observe: Observe | None = None,
) -> tuple[Rollout, dict[str, Any]]:
    """The student samples, the teacher scores the same tokens with the solution in view, the
    student moves towards the teacher's whole next-token distribution.

    A step whose loss or gradient is not finite is not taken, in any process.

    Returns:
        This process's rollouts, and metrics of those of all processes.
    """
    accelerator, teacher = setup.accelerator, setup.teacher

    with phase("rollout"):  # (x, y*) ~ S, ŷ ~ p_S(· | x)
        rollout, policy_step = sample_batch(config, setup, step)
        metrics = {"step": step, "policy_step": policy_step, **describe(rollout, setup)}
    with phase("score"):
        rollout = teacher.look_at(rollout, setup.contexts.teacher)

    totals: dict[str, Tensor] = {}
    packed = can_pack(config, setup)
    parts = micro_batches(config, accelerator, setup.contexts, rollout, packed)
    for part in parts:
        # Gradients are added up, and over the processes with the last micro-batch.
        with nullcontext() if part is parts[-1] else accelerator.no_sync(setup.backbone):
            with phase("score"):  # both contexts over the same ŷ
                setup.backbone.train()
                scores = score(setup.backbone, teacher, setup.contexts.teacher, part, packed)
            with phase("loss"):  # mean over each rollout's tokens, then over the batch
                weights = token_weights(
                    scores.lengths, config.mean, config.batch_size, metrics["tokens"]
                )
                loss, statistics = opsd_loss(scores, setup.head, config, weights, teacher.head)
            with phase("backward"):
                # The processes' gradients are averaged, but are parts of a sum.
                (loss * accelerator.num_processes).backward()
        if observe is not None:
            with phase("record"):
                observe(part, scores)
        for name, value in {"loss": loss.detach(), **statistics}.items():
            totals[name] = totals.get(name, 0) + value.double()
    metrics |= {name: accelerator.reduce(t, "sum").item() for name, t in totals.items()}

    with phase("step"):
        metrics["learning_rate"] = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = metrics["learning_rate"]
        adapter = adapter_weights(setup.model).values()
        norm = torch.nn.utils.clip_grad_norm_(adapter, config.max_grad_norm)
        metrics["grad_norm"] = full_tensor(norm).item()
        metrics["skipped"] = not math.isfinite(metrics["loss"] + metrics["grad_norm"])
        if not metrics["skipped"]:
            optimizer.step()
            teacher.follow()
        optimizer.zero_grad()
    return rollout, metrics


def sample_batch(config: Config, setup: Setup, step: int) -> tuple[Rollout, int]:
    """This process's rollouts of a step, and how many steps the student had taken that sampled
    them.

    With `ahead` those of the next step are begun as well: they are sampled, from the student as it
    is now, while it is trained on these.
    """
    problems, seeds = own_batch(config, setup, step)
    ahead = setup.ahead
    if ahead is None:
        return roll_out(setup.sampler, setup.contexts.student, problems, seeds), step - 1

    def begin(step_to_sample: int) -> None:
        problems, seeds = own_batch(config, setup, step_to_sample)
        prompts = setup.contexts.student.token_ids(problems)
        ahead.begin(step_to_sample, prompts, seeds, policy_step=step - 1)

    if ahead.step != step:  # the first
        begin(step)
    samples, policy_step = ahead.take()
    if step < config.steps:
        begin(step + 1)
    prompts = setup.contexts.student.token_ids(problems)
    return as_rollout(setup.sampler, problems, prompts, samples), policy_step


def can_pack(config: Config, setup: Setup) -> bool:
    """Whether sequences lie one after the other: FlashAttention's kernel for variable lengths keeps
    them apart without a mask, which others would need."""
    by_tokens = config.micro_batch_tokens is not None
    return by_tokens and setup.model.config._attn_implementation == "flash_attention_2"


def own_batch(config: Config, setup: Setup, step: int) -> tuple[list[Problem], list[int]]:
    """The part of the step's batch that this process takes, and a seed for each rollout."""
    share = config.batch_size // setup.accelerator.num_processes
    first = share * setup.accelerator.process_index
    indices = problem_indices(len(setup.problems), config, step)[first : first + share]
    seeds = [draw_seed(config.seed, step, row) for row in range(first, first + share)]
    return [setup.problems[i] for i in indices], seeds


def problem_indices(total: int, config: Config, step: int) -> list[int]:
    """The problems of a step's batch: every problem once before any comes again."""
    first = (step - 1) * config.batch_size
    places = [divmod(place, total) for place in range(first, first + config.batch_size)]
    return [shuffled(total, config.seed, epoch)[place] for epoch, place in places]


@lru_cache(maxsize=2)
def shuffled(total: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(draw_seed(seed, "epoch", epoch))
    return torch.randperm(total, generator=generator).tolist()


def learning_rate(config: Config, step: int) -> float:
    """Of the step, from 1: up over the first `warmup` of the steps, then constant, or down half a
    cosine to 0 after the last."""
    rising = round(config.warmup * config.steps)
    if step <= rising:
        return config.learning_rate * step / rising
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - rising) / (config.steps - rising + 1)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def describe(rollout: Rollout, setup: Setup) -> dict[str, Any]:
    """Lengths and stop reasons of all processes' rollouts."""
    own = [[len(c), end] for c, end in zip(rollout.completions, rollout.finished, strict=True)]
    device = setup.accelerator.device
    lengths, finished = setup.accelerator.gather(torch.tensor(own, device=device)).T.tolist()
    return {
        "tokens": sum(lengths),
        "length_mean": fmean(lengths),
        "length_max": max(lengths),
        "finished": fmean(finished),  # reached the end of text
        "truncated": 1 - fmean(finished),  # reached max_new_tokens
    }


# Micro-batches


def micro_batches(
    config: Config, accelerator: Accelerator, contexts: Contexts, rollout: Rollout, packed: bool
) -> list[Rollout]:
    """The parts of a process's rollouts that are scored one after the other. Their order, and which
    are together, changes nothing but rounding: a token's weight does not depend on it.

    All processes have as many, since sharded weights are gathered by all of them together.
    """
    if config.micro_batch_tokens is None:
        return rollout.micro_batches(config.micro_batch_size)
    prompts = contexts.lengths(rollout.problems)
    groups = by_tokens(
        prompts, list(map(len, rollout.completions)), config.micro_batch_tokens, packed
    )
    own = torch.tensor([len(groups)], device=accelerator.device)
    most = int(accelerator.gather(own).max())
    while len(groups) < most:  # every process has as many rollouts, so that one can be divided
        largest = max(groups, key=len)
        groups.remove(largest)
        groups += [largest[::2], largest[1::2]]
    return [rollout.some(group) for group in groups]


def by_tokens(
    prompts: list[int], completions: list[int], most: int, packed: bool
) -> list[list[int]]:
    """Indices of sequences in groups of similar length, each of at most `most` tokens, or of one
    sequence that has more.

    Args:
        prompts, completions: tokens of each sequence.
        packed: whether a group's tokens lie one after the other; or else side by side, prompts as
            long as the longest of them, and completions too.
    """
    longest_first = sorted(range(len(prompts)), key=lambda i: -(prompts[i] + completions[i]))
    groups: list[list[int]] = []
    for i in longest_first:
        if groups and _tokens(prompts, completions, [*groups[-1], i], packed) <= most:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _tokens(prompts: list[int], completions: list[int], group: list[int], packed: bool) -> int:
    if packed:
        return sum(prompts[i] + completions[i] for i in group)
    return len(group) * (max(prompts[i] for i in group) + max(completions[i] for i in group))
