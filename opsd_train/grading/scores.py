"""Scores of sampled solutions, with intervals, and whether two differ.

Problems are what is drawn from a larger set, and samples what is drawn for each: an interval, and a
test, is over problems. s_i is a score of problem i in [0, 1], of n samples c of which are right:

    avg@n   c / n
    pass@k  1 − C(n−c, k) / C(n, k): whether one of k is right, on average over all choices of k of
            the n (Chen et al., 2021); without bias, which 1 − (1 − c/n)^k has
    maj@k   whether the answer that most of k samples give is right; of answers that tie for most,
            the part that is. On average over the n // k runs of k samples
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from statistics import NormalDist, fmean
from typing import Any

import numpy as np

from opsd_train.grading.graders import Attempt

Z = NormalDist().inv_cdf(0.975)


def accuracy(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Of one sample a problem, with Wilson's 95% interval; for metrics and summaries."""
    correct, total = sum(a.correct for a in attempts), len(attempts)
    low, high = wilson(correct / total, total)
    return {
        "accuracy": round(correct / total, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "correct": correct,
        "problems": total,
    }


def said_accuracy(of: dict[str, Any]) -> str:
    low, high = of["interval_95"]
    return f"{of['accuracy']:.1%} (95% interval {low:.1%} to {high:.1%}, {of['problems']} problems)"


@dataclass(frozen=True)
class Score:
    """A mean over problems, and its 95% interval."""

    mean: float
    low: float
    high: float


def score_of(scores: Sequence[float], samples: int) -> Score:
    """Mean of a score of each problem, with a 95% interval that is Wilson's where each is 0 or 1.
    Scores between say more of the mean, at most as much as `samples` problems with one sample each
    would: Wilson's interval for as many problems as have a mean of that variance is taken."""
    N, mean = len(scores), fmean(scores)
    spread = fmean((s - mean) ** 2 for s in scores)
    worth = min(N * mean * (1 - mean) / spread, N * samples) if spread > 0 else N
    return Score(mean, *wilson(mean, worth))


def wilson(mean: float, n: float) -> tuple[float, float]:
    """Wilson's 95% score interval of n independent draws."""
    centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + (Z / (2 * n)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def check_k(k: int, n: int) -> None:
    """Raises:
    ValueError: k is not among 1, ..., n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, {n}], the number of samples; got {k}")


def pass_at(k: int, n: int, c: int) -> float:
    """pass@k of a problem with c right of n samples.

    Raises:
        ValueError: k is not among 1, ..., n.
    """
    check_k(k, n)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def maj_at(k: int, attempts: Sequence[Attempt]) -> float:
    """maj@k of a problem. A completion without an answer has no vote.

    Raises:
        ValueError: k is not among 1, ..., n.
    """
    n = len(attempts)
    check_k(k, n)
    return fmean(_vote(attempts[i : i + k]) for i in range(0, n - k + 1, k))


def _vote(attempts: Sequence[Attempt]) -> float:
    # What equals the reference is one answer, however it is written.
    answers = [("right", "") if a.correct else ("wrong", a.answer) for a in attempts]
    votes = Counter(answer for answer in answers if answer[1] is not None)
    most = [answer for answer, count in votes.items() if count == max(votes.values())]
    return most.count(("right", "")) / len(most) if most else 0.0


@dataclass(frozen=True)
class Difference:
    """Of two means over the same problems, its 95% interval, and the p-value of `paired_test`."""

    mean: float
    low: float
    high: float
    p: float


def difference_of(before: Sequence[Fraction], after: Sequence[Fraction]) -> Difference:
    """After less before, problem by problem.

    Raises:
        ValueError: they are not of the same problems.
    """
    changes = _changes(before, after)
    N, mean = len(changes), float(sum(changes) / len(changes))
    spread = sum((float(x) - mean) ** 2 for x in changes) / max(N - 1, 1)
    half = Z * math.sqrt(spread / N)
    return Difference(mean, mean - half, mean + half, paired_test(before, after))


def paired_test(before: Sequence[Fraction], after: Sequence[Fraction]) -> float:
    """Two-sided p-value of the sign-flip test: how often changes as large, problem by problem,
    would add up to as much or more if each were as likely to be for the better as for the worse.
    Exact; with one sample a problem it is McNemar's exact test.

    Raises:
        ValueError: they are not of the same problems.
    """
    changes = _changes(before, after)
    unit = math.lcm(*(x.denominator for x in changes))
    sizes = [abs(int(x * unit)) for x in changes if x]
    chances = np.ones(1)  # of every sum of the signed sizes so far, from the least
    for size in sizes:
        wider = np.zeros(len(chances) + 2 * size)
        wider[: len(chances)] += chances / 2
        wider[2 * size :] += chances / 2
        chances = wider
    total = sum(sizes)
    observed = abs(int(sum(changes) * unit))
    tails = chances[: total - observed + 1].sum() + chances[total + observed :].sum()
    return min(1.0, float(tails))


def _changes(before: Sequence[Fraction], after: Sequence[Fraction]) -> list[Fraction]:
    if len(before) != len(after) or not before:
        raise ValueError(
            f"before and after must be of the same problems, got {len(before)} and {len(after)}"
        )
    return [b - a for a, b in zip(before, after, strict=True)]


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
    return f"{score['mean']:.1%} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def _change(d: dict[str, float]) -> str:
    p = "p < 0.0001" if d["p"] < 1e-4 else f"p = {d['p']:.2g}"
    points = [f"{100 * d[name]:+.1f}".replace("-", "−") for name in ("mean", "low", "high")]
    return "{} ({} to {}), ".format(*points) + p
