"""What the results say of an ordering, by one rule.

Two that are compared have the same seeds: the same order of problems, the same held-out problems.
Of the differences, one a seed, the 95% interval is Student's. The ordering holds here if the
interval is above 0, does not hold here if it is below, and otherwise cannot be told from the noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from opsd_train.grading.scores import pass_at

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "cannot be told from the noise"

# Student's 97.5% quantiles by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return HOLDS if self.low > 0 else FAILS if self.high < 0 else OPEN


def interval(values: Sequence[float]) -> Interval:
    """Of the mean, at 95%; without bounds of one value."""
    mean, n = fmean(values), len(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf)
    half = STUDENT[n - 1] * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def difference(of: Sequence[float], less: Sequence[float]) -> Interval:
    """Of the paired differences."""
    return interval([a - b for a, b in zip(of, less, strict=True)])


def tokens_to(curve: Sequence[dict[str, Any]], accuracy: float) -> float:
    """Generated tokens at which the accuracy is first reached, in proportion between two
    evaluations; infinite where it never is."""
    for i, point in enumerate(curve):
        if point["accuracy"] >= accuracy:
            if i == 0:
                return point["tokens"]
            last = curve[i - 1]
            part = (accuracy - last["accuracy"]) / (point["accuracy"] - last["accuracy"])
            return last["tokens"] + part * (point["tokens"] - last["tokens"])
    return math.inf


def accuracy_after(curve: Sequence[dict[str, Any]], tokens: float) -> float:
    """After a number of generated tokens, in proportion between two evaluations; at most as many as
    there are."""
    for a, b in pairwise(curve):
        if b["tokens"] >= tokens:
            part = (tokens - a["tokens"]) / (b["tokens"] - a["tokens"])
            return a["accuracy"] + part * (b["accuracy"] - a["accuracy"])
    return curve[-1]["accuracy"]


def mean_accuracy(curve: Sequence[dict[str, Any]]) -> float:
    """Over the run: the area under the curve, over the steps."""
    area = sum(
        (b["step"] - a["step"]) * (a["accuracy"] + b["accuracy"]) / 2 for a, b in pairwise(curve)
    )
    return area / (curve[-1]["step"] - curve[0]["step"])


def pass_at_ks(solved: Sequence[int], n: int) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, ..., n, the mean over problems. `solved` counts right ones of n."""
    ks = [2**i for i in range(n.bit_length()) if 2**i <= n]
    return {k: fmean(pass_at(k, n, c) for c in solved) for k in ks}
