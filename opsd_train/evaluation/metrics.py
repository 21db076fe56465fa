"""Accuracy, with an interval."""

import math
from dataclasses import dataclass
from statistics import NormalDist

from opsd_train.evaluation.graders import Completion


@dataclass(frozen=True)
class Accuracy:
    correct: int
    total: int

    @property
    def mean(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% score interval."""
        z = NormalDist().inv_cdf(0.975)
        n, mean = self.total, self.mean
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2)
        return max(0.0, centre - half), min(1.0, centre + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.mean:.1%} (95% interval {low:.1%} to {high:.1%}, {self.total} problems)"


def accuracy(completions: list[Completion]) -> Accuracy:
    return Accuracy(sum(bool(c.correct) for c in completions), len(completions))
