"""The methods that are compared, each a step of as many rollouts or solutions: OPSD's is the
harness's own, SFT and GRPO are here, the same optimizer around them.

SFT       cross-entropy on solutions; as given, or as the model itself would write them out
GRPO      Shao et al. (2024): 8 rollouts a problem, the advantage of each its reward less the mean
          of the 8, over their standard deviation; one on-policy update a batch, for which clipping
          does nothing, and no KL term
"""

import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor

from benchmarks.token_efficiency.multiplication import STUDENT_TEMPLATE, judge, work_out
from opsd_kernels import fused_log_probs
from opsd_train.config import Config
from opsd_train.data import join
from opsd_train.grading import grade
from opsd_train.models import adapter_weights
from opsd_train.opsd import Setup, take_step, token_weights
from opsd_train.opsd.step import by_tokens, learning_rate, problem_indices
from opsd_train.records import Problem
from opsd_train.sampling import draw_seed, roll_out

GROUP = 8  # rollouts a problem

Step = Callable[[Config, Setup, torch.optim.Optimizer, int], tuple[int, dict[str, float]]]
"""Takes the step of that number; returns the tokens generated for it, and metrics."""


def opsd_step(
    config: Config, setup: Setup, optimizer: torch.optim.Optimizer, step: int
) -> tuple[int, dict[str, float]]:
    rollout, metrics = take_step(config, setup, optimizer, step, lambda phase: nullcontext())
    return rollout.tokens, {name: metrics[name] for name in ("loss", "grad_norm")}


def sft_step(
    config: Config,
    setup: Setup,
    optimizer: torch.optim.Optimizer,
    step: int,
    solution: Callable[[Problem], str] = lambda problem: problem.solution,
) -> tuple[int, dict[str, float]]:
    indices = problem_indices(len(setup.problems), config, step)
    problems = [setup.problems[i] for i in indices]
    texts = [solution(problem) + setup.tokenizer.eos_token for problem in problems]
    solutions = setup.tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = setup.contexts.student.token_ids(problems)
    loss = backward(config, setup, prompts, solutions, [1.0] * len(problems))
    return 0, {"loss": loss, "grad_norm": update(config, setup, optimizer, step)}


def in_own_words(problem: Problem) -> str:
    """The solution as the model writes it, every step of it, without a mistake."""
    number, _, multiplier = problem.question.partition("*")
    return work_out(int(number[1::2]), int(multiplier), random.Random()).text


def grpo_step(
    config: Config, setup: Setup, optimizer: torch.optim.Optimizer, step: int
) -> tuple[int, dict[str, float]]:
    groups = replace(config, batch_size=config.batch_size // GROUP)
    indices = problem_indices(len(setup.problems), groups, step)
    problems = [setup.problems[i] for i in indices for _ in range(GROUP)]
    seeds = [draw_seed(config.seed, step, row) for row in range(len(problems))]
    rollout = roll_out(setup.sampler, setup.contexts.student, problems, seeds)
    rewards = [float(bool(c.correct)) for c in grade(setup.tokenizer, rollout, judge)]
    advantages: list[float] = []
    for i in range(0, len(rewards), GROUP):
        group = rewards[i : i + GROUP]
        mean, spread = fmean(group), pstdev(group)
        advantages += [(r - mean) / spread if spread else 0.0 for r in group]
    loss = backward(config, setup, rollout.prompts, rollout.completions, advantages)
    norm = update(config, setup, optimizer, step)
    return rollout.tokens, {"loss": loss, "grad_norm": norm, "reward": fmean(rewards)}


def backward(
    config: Config,
    setup: Setup,
    prompts: list[list[int]],
    completions: list[list[int]],
    advantages: list[float],
) -> float:
    """Gradients of −Σ A log p, mean over each completion's tokens, then over the completions, as
    OPSD's; returns it."""
    total = 0.0
    setup.backbone.train()
    used = [i for i, A in enumerate(advantages) if A]
    parts = by_tokens(
        [len(prompts[i]) for i in used],
        [len(completions[i]) for i in used],
        config.micro_batch_tokens or 1,
        packed=False,
    )
    for part in parts:
        rows = [used[i] for i in part]
        some = [completions[i] for i in rows]
        h = setup.backbone(*join([prompts[i] for i in rows], some, setup.tokenizer.pad_token_id))
        lengths = torch.tensor([len(c) for c in some])
        weights = token_weights(lengths, config.mean, len(completions), 0)
        weights *= torch.tensor([advantages[i] for i in rows]).repeat_interleave(lengths)
        log_p = log_probs(setup, h, torch.tensor([t for c in some for t in c]), config.temperature)
        loss = -(weights * log_p).sum()
        loss.backward()
        total += loss.item()
    return total


def log_probs(setup: Setup, h: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    log_p = fused_log_probs(h, setup.head, tokens, temperature=temperature)
    assert isinstance(log_p, Tensor)
    return log_p


def update(config: Config, setup: Setup, optimizer: torch.optim.Optimizer, step: int) -> float:
    """What the harness does with the gradients; returns their norm."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    adapter = adapter_weights(setup.model).values()
    norm = torch.nn.utils.clip_grad_norm_(adapter, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


# Options of the harness by method; "expert" stands for the larger teacher's folder.
OPTIONS: dict[str, dict[str, Any]] = {
    "SFT": {},
    "SFT, own words": {},
    "GRPO": {},
    "sampled token": {"objective": "sampled_token"},
    "JSD 0.5": {"beta": 0.5},
    "forward KL": {"beta": 0.0},
    "forward KL, clipped": {"beta": 0.0, "entry_clip": 0.05},
    "reverse KL": {"beta": 1.0},
    "larger teacher": {"teacher_model": "expert", "teacher_template": STUDENT_TEMPLATE},
}
STEPS: dict[str, Step] = {
    "SFT": sft_step,
    "SFT, own words": partial(sft_step, solution=in_own_words),
    "GRPO": grpo_step,
}


def step_of(method: str) -> Step:
    return STEPS.get(method, opsd_step)
