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
class TeacherTopK:
    """A teacher's log-probabilities at N tokens of completions: of the token itself, in the first
    column, and of the K likeliest. A slot is absent, id −1 and −inf, where the token is one of
    these K."""

    ids: Tensor  # [N, K + 1] int64
    log_q: Tensor  # [N, K + 1] fp32


@dataclass(frozen=True)
class Rollout:
    """ŷ: what the student sampled for a batch of problems."""

    problems: list[Problem]
    prompts: list[list[int]]  # the token ids the student saw
    completions: list[list[int]]  # the token ids it sampled; up to and including the end of text
    finished: list[bool]  # whether the end of text was reached, and not the length limit
    log_probs: list[list[float]] | None = None  # of each token as it was drawn, if that is known
    top_k: list[TeacherTopK] | None = None  # of each completion, from a teacher on servers

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
            self.top_k and [self.top_k[i] for i in rows],
        )


@dataclass(frozen=True)
class Scores:
    """What both contexts make of the positions that predict ŷ, all rollouts' tokens packed: hidden
    states of the student, and of the teacher either those or its likeliest tokens.

    Row n of both predicts the same token: it is taken at the position BEFORE ŷ_n in each sequence.
    """

    h_student: Tensor  # [N, D], with graph
    h_teacher: Tensor | None  # [N, D_T], without; None of a teacher on servers
    tokens: Tensor  # [N] the ids ŷ_n
    lengths: Tensor  # [rollouts] tokens of each; they sum to N
    logp_sampler: Tensor | None = None  # [N] of the tokens as they were drawn, if that is known
    top_k: TeacherTopK | None = None  # of a teacher on servers

    def some(self, rows: slice) -> "Scores":
        """Of some of the tokens, as if they were all, and one rollout's."""

        def of(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        top_k = self.top_k and TeacherTopK(self.top_k.ids[rows], self.top_k.log_q[rows])
        h_student, tokens = self.h_student[rows], self.tokens[rows]
        lengths = self.lengths.new_tensor([len(tokens)])
        return Scores(h_student, of(self.h_teacher), tokens, lengths, of(self.logp_sampler), top_k)
