"""tokens.jsonl: a few rollouts of some steps, token by token, from which the report is made."""

import math
from typing import Any

from opsd_train.config import Config
from opsd_train.opsd import Observe, Setup, observe_tokens
from opsd_train.records import Choices, Observation, Rollout, Scores
from opsd_train.run.folder import RunFolder

MAX_TOKENS = 1024  # of a rollout
CHOICES = 5  # of either side at a token


def record_tokens(config: Config, setup: Setup, run: RunFolder, step: int) -> Observe | None:
    """What writes down the first rollouts of a step, if the step is one of those recorded."""
    is_recorded = step in (1, config.steps) or step % config.record_every == 0
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
