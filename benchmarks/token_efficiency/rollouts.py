"""Where along a wrong rollout the teacher disagrees: before any training, at which tokens the
divergence is large, and where the first mistake is."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from benchmarks.token_efficiency.cells import Cell, config_of, kept, make_setup, recipe
from benchmarks.token_efficiency.multiplication import first_mistake, judge, sample_problems
from opsd_kernels import token_divergence
from opsd_train.grading import grade
from opsd_train.opsd import score
from opsd_train.sampling import draw_seed, roll_out

AROUND = 12  # tokens on either side of the first mistake


@dataclass(frozen=True)
class WrongRollout:
    text: str  # a character a token, without its end
    divergence: list[float]  # of each token, its end included
    first_mistake: int

    @property
    def before(self) -> list[float]:
        """Of the tokens before the first mistake."""
        return self.divergence[: self.first_mistake]

    @property
    def before_that_could_err(self) -> list[float]:
        """Of those among them where others have made a mistake: carries and values."""
        return [d for i, d in enumerate(self.before) if could_err(self.text, i)]

    @property
    def peak_is_first_mistake(self) -> bool:
        return max(self.divergence) == self.divergence[self.first_mistake]

    @property
    def first_mistake_is_largest_so_far(self) -> bool:
        return self.divergence[self.first_mistake] > max(self.before)


def could_err(text: str, i: int) -> bool:
    """Whether the token is a carry or belongs to a value."""
    return text[i].isdigit() and any(text[max(0, j) : j + 1] in ("+", "=") for j in (i - 1, i - 2))


def find(cell: Cell, problems: int, folder: Path) -> list[dict[str, Any]]:
    """Wrong rollouts of the student that training begins with, as plain values, kept."""
    path = folder / f"mistakes-{problems}-{recipe('rollouts')}-{cell.name}.json"
    return kept(path, lambda: _find(cell, problems, folder))


def _find(cell: Cell, problems: int, folder: Path) -> list[dict[str, Any]]:
    config = config_of(cell, folder)
    setup = make_setup(config, cell, folder)
    some = sample_problems(cell.part, problems)
    seeds = [draw_seed(cell.seed, "wrong", i) for i in range(problems)]
    rollout = roll_out(setup.sampler, setup.contexts.student, some, seeds)
    correct = [c.correct for c in grade(setup.tokenizer, rollout, judge)]
    setup.backbone.eval()
    found = []
    for part in rollout.some([i for i, right in enumerate(correct) if not right]).micro_batches(16):
        with torch.no_grad():
            scores = score(setup.backbone, setup.teacher, setup.contexts.teacher, part)
            assert scores.h_teacher is not None  # the teacher is no server
            each = token_divergence(scores.h_student, scores.h_teacher, setup.head, beta=0.5).loss
        for row, of in enumerate(each.split(scores.lengths.tolist())):
            (text,) = setup.tokenizer.batch_decode([part.completions[row]])
            text = text.removesuffix("<end>")
            at = first_mistake(part.problems[row], text)
            # One that only never ended has no mistake.
            if at is not None and at < len(of):
                found.append(asdict(WrongRollout(text, [round(d, 6) for d in of.tolist()], at)))
    return found


def auc(score: float, others: list[float]) -> float:
    """How often the score is above one of the others; half where they are equal."""
    return fmean((score > o) + 0.5 * (score == o) for o in others)


def around_first_mistake(rollouts: Sequence[WrongRollout]) -> list[tuple[int, float, float, float]]:
    """Mean divergence by distance from the first mistake, with its 95% interval over rollouts."""
    found = []
    for offset in range(-AROUND, AROUND + 1):
        places = [(r.divergence, r.first_mistake + offset) for r in rollouts]
        values = [d[i] for d, i in places if 0 <= i < len(d)]
        if len(values) > 1:
            half = 1.96 * stdev(values) / len(values) ** 0.5
            mean = fmean(values)
            found.append((offset, mean, mean - half, mean + half))
    return found


def bootstrap(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """The mean of values, one a rollout, and its 95% bootstrap interval over rollouts."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(draws))
    return fmean(values), means[int(0.025 * draws)], means[int(0.975 * draws)]
