"""Scores of one set of problems by the base and by the adapter, side by side."""

from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from statistics import fmean
from typing import Any

from opsd_train.evaluation.graders import Attempt
from opsd_train.evaluation.metrics import Score, difference_of, maj_at, pass_at, score_of

Attempts = Sequence[Sequence[Attempt]]
"""Of each problem of a set; as many of each."""


def compare(attempts: dict[str, Attempts], ks: Sequence[int]) -> dict[str, Any]:
    """Scores of each model by name; and where there are a base and an adapter, of the difference.

    Args:
        attempts: by model, of the same problems in the same order.
        ks: of pass@k and maj@k.

    Returns:
        Plain values, for JSON and `comparison_table`.
    """
    result: dict[str, Any] = {"models": {name: _scores(a, ks) for name, a in attempts.items()}}
    if {"base", "adapter"} <= attempts.keys():
        before, after = (_right(attempts[name]) for name in ("base", "adapter"))
        result["difference"] = asdict(difference_of(before, after))
    return result


def comparison_table(title: str, result: dict[str, Any]) -> str:
    """As a table of Markdown, a score a line; scores with their 95% intervals."""
    models = result["models"]
    difference = result.get("difference")
    lines = [[title, *models] + ["adapter − base"] * bool(difference)]
    for i, name in enumerate(next(iter(models.values()))["scores"]):
        line = [name, *(_interval(m["scores"][name]) for m in models.values())]
        if difference:
            line.append(_change(difference) if i == 0 else "")
        lines.append(line)
    for name, shown in (("tokens", "{:,.0f}"), ("truncated", "{:.1%}"), ("no answer", "{:.1%}")):
        line = [name, *(shown.format(m[name.replace(" ", "_")]) for m in models.values())]
        lines.append(line + [""] * bool(difference))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def _scores(attempts: Attempts, ks: Sequence[int]) -> dict[str, Any]:
    n = len(attempts[0])
    counts = [sum(a.correct for a in of_problem) for of_problem in attempts]
    scores = {f"avg@{n}": [c / n for c in counts]}
    scores |= {f"pass@{k}": [pass_at(k, n, c) for c in counts] for k in ks if k > 1}
    scores |= {f"maj@{k}": [maj_at(k, of_problem) for of_problem in attempts] for k in ks if k > 1}
    every = [a for of_problem in attempts for a in of_problem]
    return {
        "problems": len(attempts),
        "samples": n,
        "scores": {name: asdict(score_of(values, n)) for name, values in scores.items()},
        "tokens": fmean(a.tokens for a in every),
        "truncated": fmean(not a.finished for a in every),
        "no_answer": fmean(a.answer is None for a in every),
    }


def _right(attempts: Attempts) -> list[Fraction]:
    return [Fraction(sum(a.correct for a in some), len(some)) for some in attempts]


def _interval(score: dict[str, float]) -> str:
    s = Score(**score)
    return f"{s.mean:.1%} ({100 * s.low:.1f} to {100 * s.high:.1f})"


def _change(d: dict[str, float]) -> str:
    p = "p < 0.0001" if d["p"] < 1e-4 else f"p = {d['p']:.2g}"
    points = [f"{100 * d[name]:+.1f}".replace("-", "−") for name in ("mean", "low", "high")]
    return "{} ({} to {}), ".format(*points) + p
