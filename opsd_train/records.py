"""What is handed from one room to the next. Token ids all the way: nothing that was sampled is ever
decoded and encoded again."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """x, and what only the teacher sees of it, y*."""

    question: str
    solution: str  # the reference solution, worked out
    answer: str = ""  # what a right solution ends with, where it is known
    place: str = field(default="", compare=False)  # file and line, for messages


@dataclass(frozen=True)
class Rollout:
    """ŷ: what the student sampled for a batch of problems."""

    problems: list[Problem]
    prompts: list[list[int]]  # the token ids the student saw
    completions: list[list[int]]  # the token ids it sampled; up to and including the end of text
    finished: list[bool]  # whether the end of text was reached, and not the length limit
    log_probs: list[list[float]] | None = None  # of each token as it was drawn, if that is known

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.completions))

    def micro_batches(self, size: int) -> "list[Rollout]":
        """The same rollouts in order, at most `size` at a time."""
        rows = range(len(self))
        return [self.some(rows[i : i + size]) for i in range(0, len(self), size)]

    def some(self, rows: Sequence[int]) -> "Rollout":
        """Some of the rollouts."""
        return Rollout(
            [self.problems[i] for i in rows],
            [self.prompts[i] for i in rows],
            [self.completions[i] for i in rows],
            [self.finished[i] for i in rows],
            self.log_probs and [self.log_probs[i] for i in rows],
        )


@dataclass(frozen=True)
class Scores:
    """Both contexts' hidden states at the positions that predict ŷ, all rollouts' tokens packed.

    Row n of both predicts the same token: it is taken at the position BEFORE ŷ_n in each sequence.
    """

    h_student: Tensor  # [N, D], with graph
    h_teacher: Tensor  # [N, D_T], without
    tokens: Tensor  # [N] the ids ŷ_n
    lengths: Tensor  # [rollouts] tokens of each; they sum to N
    logp_sampler: Tensor | None = None  # [N] of the tokens as they were drawn, if that is known
