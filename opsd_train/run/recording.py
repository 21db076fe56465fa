"""tokens.jsonl: a few rollouts of some steps, token by token, from which the report is made."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import LMHead
from opsd_train.config import Config
from opsd_train.models import logits, vocab_size
from opsd_train.opsd import Observe, Setup, compare
from opsd_train.records import Rollout, Scores, TeacherTopK
from opsd_train.run.folder import RunFolder

EVERY = 10  # steps between two that are recorded
MAX_TOKENS = 1024  # of a rollout
CHOICES = 5  # of either side at a token
ENTRIES_AT_ONCE = 2**22  # of the vocabulary times tokens, 16 MiB in fp32


@dataclass(frozen=True)
class Choices:
    """The likeliest tokens at each position of a rollout, the likeliest first."""

    ids: list[list[int]]
    log_probs: list[list[float]]


@dataclass(frozen=True)
class Observation:
    """What is seen at each token of one rollout."""

    statistics: dict[str, list[float]]  # as `compare` names them
    student: Choices
    teacher: Choices


def record_tokens(config: Config, setup: Setup, run: RunFolder, step: int) -> Observe | None:
    """What writes down the first rollouts of a step, if the step is one of those recorded."""
    is_recorded = step in (1, config.steps) or step % EVERY == 0
    if not (run.is_main and is_recorded and config.record_rollouts):
        return None
    left = config.record_rollouts

    def observe(part: Rollout, scores: Scores) -> None:
        nonlocal left
        rows = []
        for row in range(min(left, len(part))):
            seen = observe_tokens(
                scores, setup.head, config, setup.teacher.head, row, MAX_TOKENS, CHOICES
            )
            rows.append({"step": step, **describe_tokens(setup, part, row, seen)})
        left -= len(rows)
        if rows:
            run.write_tokens(rows)

    return observe


def describe_tokens(setup: Setup, part: Rollout, row: int, seen: Observation) -> dict[str, Any]:
    """A line of tokens.jsonl: lists with a value for each token, and what they belong to."""

    def text(token: int) -> str:
        return str(setup.tokenizer.decode([token]))

    def choices(of: Choices) -> list[list[Any]]:
        """[text, log-probability, text, ...] of each token."""
        return [
            [x for i, p in zip(ids, log_p, strict=True) for x in (text(i), short(p))]
            for ids, log_p in zip(of.ids, of.log_probs, strict=True)
        ]

    completion = part.completions[row]
    return {
        "prompt": setup.tokenizer.decode(part.prompts[row]),
        "reference": part.problems[row].solution,
        "length": len(completion),
        "finished": part.finished[row],
        "tokens": [text(token) for token in completion[: len(seen.student.ids)]],
        **{name: [short(x) for x in values] for name, values in seen.statistics.items()},
        "student": choices(seen.student),
        "teacher": choices(seen.teacher),
    }


def short(x: float) -> float | None:
    """Four digits, which is what a page shows; JSON knows neither infinity nor NaN."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


@torch.no_grad()
def observe_tokens(
    scores: Scores,
    head: LMHead,
    config: Config,
    teacher_head: LMHead | None,
    row: int,
    max_tokens: int,
    choices: int,
) -> Observation:
    """One rollout of a micro-batch, up to `max_tokens` of it: the divergence and statistics of
    every token, and the likeliest `choices` of both sides there."""
    first = int(scores.lengths[:row].sum())
    some = slice(first, first + min(int(scores.lengths[row]), max_tokens))
    seen = scores.some(some)
    statistics = compare(seen, head, config, teacher_head=teacher_head)
    if seen.top_k is not None:
        teacher = _likeliest_of(seen.top_k, choices)
    else:
        assert seen.h_teacher is not None
        teacher = _likeliest(seen.h_teacher, teacher_head or head, config.temperature, choices)
    return Observation(
        {name: t.tolist() for name, t in statistics.items()},
        _likeliest(seen.h_student, head, config.temperature, choices),
        teacher,
    )


def _likeliest_of(top_k: TeacherTopK, choices: int) -> Choices:
    """At temperature 1, which is that of the servers."""
    rows = [
        sorted(((p, i) for p, i in zip(*row, strict=True) if i >= 0), reverse=True)[:choices]
        for row in zip(top_k.log_q.tolist(), top_k.ids.tolist(), strict=True)
    ]
    return Choices([[i for _, i in row] for row in rows], [[p for p, _ in row] for row in rows])


def _likeliest(h: Tensor, head: LMHead, temperature: float, choices: int) -> Choices:
    V = vocab_size(head)
    ids: list[list[int]] = []
    log_probs: list[list[float]] = []
    for some in h.split(max(1, ENTRIES_AT_ONCE // V)):
        log_p = torch.log_softmax(logits(head, some) / temperature, dim=-1)
        top = log_p.topk(min(choices, V), dim=-1)
        ids += top.indices.tolist()
        log_probs += top.values.tolist()
    return Choices(ids, log_probs)
