"""tokens.jsonl: a few rollouts of some steps, token by token, from which the report is made."""

import math
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import LMHead
from opsd_kernels.head_check import head_logits
from opsd_train.models import vocab_size
from opsd_train.opsd import Observe, Setup, compare
from opsd_train.records import Rollout, Scores, TeacherTopK
from opsd_train.run.folder import RunFolder

EVERY = 10  # steps between two that are recorded
MAX_TOKENS = 1024  # of a rollout
CHOICES = 5  # of either side at a token
ENTRIES_AT_ONCE = 2**22  # of the vocabulary times tokens, 16 MiB in fp32

Choices = list[list[tuple[int, float]]]
"""At each token of a rollout its likeliest ids, the likeliest first, with log-probabilities."""


def record_tokens(setup: Setup, run: RunFolder, step: int) -> Observe | None:
    """What writes down the first rollouts of a step, if the step is one of those recorded."""
    is_recorded = step in (1, setup.config.steps) or step % EVERY == 0
    left = setup.config.record_rollouts
    if not (run.is_main and is_recorded and left):
        return None

    def observe(part: Rollout, scores: Scores) -> None:
        nonlocal left
        rows = range(min(left, len(part)))
        left -= len(rows)
        if rows:
            run.write_tokens(
                {"step": step, **describe_tokens(setup, part, scores, row)} for row in rows
            )

    return observe


def describe_tokens(setup: Setup, part: Rollout, scores: Scores, row: int) -> dict[str, Any]:
    """A line of tokens.jsonl: lists with a value for each token, and what they belong to."""

    def text(token: int) -> str:
        return str(setup.tokenizer.decode([token]))

    completion = part.completions[row]
    statistics, choices = observe_tokens(setup, scores, row)
    return {
        "prompt": setup.tokenizer.decode(part.prompts[row]),
        "reference": part.problems[row].solution,
        "length": len(completion),
        "finished": part.finished[row],
        "tokens": [text(token) for token in completion[:MAX_TOKENS]],
        **{name: [short(x) for x in values] for name, values in statistics.items()},
        # [text, log-probability, text, ...] of each token.
        **{
            side: [[x for i, p in at for x in (text(i), short(p))] for at in of_side]
            for side, of_side in choices.items()
        },
    }


def short(x: float) -> float | None:
    """Four digits, which is what a page shows; JSON knows neither infinity nor NaN."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


@torch.no_grad()
def observe_tokens(
    setup: Setup, scores: Scores, row: int
) -> tuple[dict[str, list[float]], dict[str, Choices]]:
    """One rollout of a micro-batch, up to `MAX_TOKENS` of it: the divergence and statistics of
    every token, by the names of `compare`; and the choices of both sides."""
    config, head, teacher_head = setup.config, setup.head, setup.teacher.head
    first = int(scores.lengths[:row].sum())
    seen = scores.some(slice(first, first + min(int(scores.lengths[row]), MAX_TOKENS)))
    statistics = compare(seen, head, config, teacher_head=teacher_head)
    student = likeliest(seen.h_student, head, config.temperature)
    if seen.top_k is not None:
        teacher = likeliest_sent(seen.top_k)
    else:
        assert seen.h_teacher is not None
        teacher = likeliest(seen.h_teacher, teacher_head or head, config.temperature)
    return (
        {name: t.tolist() for name, t in statistics.items()},
        {"student": student, "teacher": teacher},
    )


def likeliest(h: Tensor, head: LMHead, temperature: float) -> Choices:
    found: Choices = []
    for some in h.split(max(1, ENTRIES_AT_ONCE // vocab_size(head))):
        log_p = torch.log_softmax(head_logits(head, some).float() / temperature, dim=-1)
        top = log_p.topk(min(CHOICES, log_p.shape[-1]))
        ids, log_probs = top.indices.tolist(), top.values.tolist()
        found += [list(zip(*row, strict=True)) for row in zip(ids, log_probs, strict=True)]
    return found


def likeliest_sent(top_k: TeacherTopK) -> Choices:
    """At temperature 1, which is that of the servers."""
    rows = zip(top_k.ids.tolist(), top_k.log_q.tolist(), strict=True)
    sent = [[(i, p) for i, p in zip(*row, strict=True) if i >= 0] for row in rows]
    return [sorted(at, key=lambda choice: -choice[1])[:CHOICES] for at in sent]
