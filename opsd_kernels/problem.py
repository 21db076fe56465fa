"""The two records that every schedule takes: a `Problem`, which it reads, and `Outputs`, which it
fills.

`checks` makes the problem from the arguments of a loss. All later code passes it on unchanged.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .divergence import Family, Member
from .heads.head import LogitMap


@dataclass(frozen=True)
class Problem:
    """N tokens, both heads, and which value ℓ every token has; the notation is that of
    `divergence.py`. Gradients do not flow through it: every tensor is a constant."""

    h_S: Tensor  # [N, D]
    h_T: Tensor | None  # [N, D_T]; None if ℓ and the statistics need no teacher
    W: Tensor  # [V, D]
    W_T: Tensor | None  # [V, D_T]; None if both sides have W
    operand_dtype: torch.dtype  # operands of the matrix products are rounded to it
    # A number or [N] fp32. Without β: both KLs if there are w_q and w_p, else log p(ŷ) if there are
    # targets, the log-sum-exp of all others if there are excluded entries, else the entropy.
    beta: float | Tensor | None
    temperature: float = 1.0
    entry_clip: float | None = None
    keep: Tensor | None = None  # [N] bool, the tokens that will count; None for all
    targets: Tensor | None = None  # [N] int32 ids ŷ of sampled tokens, all within the vocabulary
    # Logits are made from products h Wᵀ by these; the student's scale is part of the temperature.
    bias: Tensor | None = None  # [V] in operand_dtype, contiguous
    bias_T: Tensor | None = None  # likewise, the teacher's
    softcap: float | None = None
    softcap_T: float | None = None
    scale_T: float = 1.0  # the teacher's scale over the student's
    # [N] fp32: the gradients are those of Σ w ℓ; within ±1 in forward. None: row n of dh_S is the
    # gradient of ℓ_n.
    weights: Tensor | None = None
    # If processes share the vocabulary and W is one process's shard: the name of their group, and
    # the place of the shard's first row in the vocabulary, [] int64. Targets are then counted from
    # that row, and −1 where they belong to another process.
    group: str | None = None
    offset: Tensor | None = None
    # [N] fp32, the weights of a divergence's two halves; None if β implies them.
    w_q: Tensor | None = None
    w_p: Tensor | None = None
    advantages: Tensor | None = None  # [N] fp32, A of a policy term −A log p(ŷ)
    # [N, K] int32 ids of entries that count as banned, which may repeat; −1 means none, also where
    # they belong to another process.
    excluded: Tensor | None = None
    # In backward, [N, K] fp32: the gradients with respect to the logits of excluded entries, which
    # are given, times the slope of a softcap. Where an id repeats the first has them all.
    g_excluded: Tensor | None = None
    # In backward: what forward kept of each row of logits, see `Outputs`.
    stats: Tensor | None = None
    top: Tensor | None = None

    @property
    def heads(self) -> tuple[Tensor, ...]:
        return (self.W,) if self.W_T is None else (self.W, self.W_T)

    @property
    def sides(self) -> int:
        """Number of sides that have logits: 2, or 1 without a teacher."""
        return 1 if self.h_T is None else 2

    @property
    def logit_maps(self) -> tuple[LogitMap, LogitMap]:
        """The student's and the teacher's map from products to logits."""
        student = LogitMap(self.bias, self.softcap, 1.0)
        return student, LogitMap(self.bias_T, self.softcap_T, self.scale_T)

    @property
    def member(self) -> Member:
        """What ℓ is, apart from the policy term."""
        if self.beta is None and self.w_q is None:
            if self.targets is not None:
                return Member(Family.LOG_PROB)
            return Member(Family.ENTROPY if self.excluded is None else Family.LOG_SUM)
        return Member.of(self.beta, self.entry_clip, self.w_q, self.w_p)

    @property
    def has_bounded_scores(self) -> bool:
        return self.advantages is None and self.member.has_bounded_scores

    def tokens(self, rows: slice | Tensor) -> "Problem":
        """The same problem for some of the tokens; a slice makes no copy."""
        return replace(self, **_of_tokens(self, rows))

    def without_teacher(self) -> "Problem":
        """The same problem without h_T and the teacher's head."""
        return replace(self, h_T=None, W_T=None, bias_T=None, softcap_T=None, scale_T=1.0)

    def with_contiguous_rows(self) -> "Problem":
        """The same problem with hidden states whose rows are contiguous."""
        h_T = None if self.h_T is None else _with_contiguous_rows(self.h_T)
        return replace(self, h_S=_with_contiguous_rows(self.h_S), h_T=h_T)


def _with_contiguous_rows(h: Tensor) -> Tensor:
    return h if h.stride(1) == 1 else h.contiguous()


STATS = 8  # numbers that forward keeps of a row of logits, from which backward makes it again

# Fields that have a number or a row for each token, where they are tensors; and those that have a
# column for each.
ROWS_OF_TOKENS = (
    "h_S", "h_T", "beta", "keep", "targets", "weights", "w_q", "w_p", "advantages", "excluded",
    "g_excluded", "top", "loss", "dh_S",
)  # fmt: skip
COLUMNS_OF_TOKENS = ("statistics", "stats")


@dataclass(frozen=True)
class Outputs:
    """The tensors that a schedule fills, zeros at first; None where a result is not wanted. Results
    of tokens that are not kept are undefined."""

    loss: Tensor  # [N] fp32, ℓ
    statistics: Tensor | None = None  # [STATISTICS, N] fp32, see `divergence.py`
    dh_S: Tensor | None = None  # [N, D] fp32, the gradient with respect to h_S
    # For gradients that are made in backward: numbers of each row of logits, [STATS, N] fp32, in
    # the order of the kernels' `Stats`, or that of `logit_gradient_` if PyTorch made them; and the
    # entry whose gradient is one of these numbers, [N] int32, −1 if it is not one of W's rows.
    stats: Tensor | None = None
    top: Tensor | None = None
    # The gradients of Σ w ℓ with respect to the student's head, where there are weights.
    dW: Tensor | None = None  # [V, D] fp32
    db: Tensor | None = None  # [V] fp32

    @property
    def needs_score(self) -> bool:
        """Whether a gradient is wanted, now or in backward."""
        return self.dh_S is not None or self.stats is not None or self.dW is not None

    @property
    def stride(self) -> int:
        """Entries from one field of `statistics` and `stats` to the next."""
        given = self.stats if self.statistics is None else self.statistics
        return 0 if given is None else given.stride(0)

    def tokens(self, rows: slice | Tensor) -> "Outputs":
        """Outputs of some of the tokens: views if `rows` is a slice, copies if it is indices."""
        return replace(self, **_of_tokens(self, rows))

    def put(self, rows: Tensor, some: "Outputs") -> None:
        """Write back copies that `tokens` made."""
        for name, t in _of_tokens(some, slice(None)).items():
            if name in COLUMNS_OF_TOKENS:
                getattr(self, name)[:, rows] = t
            else:
                getattr(self, name)[rows] = t


def _of_tokens(record: Problem | Outputs, rows: slice | Tensor) -> dict[str, Any]:
    """Some of the tokens of every tensor of a record that tokens have a part of, by name."""
    found: dict[str, Any] = {}
    for name, value in vars(record).items():
        if isinstance(value, Tensor) and name in ROWS_OF_TOKENS:
            found[name] = value[rows]
        elif isinstance(value, Tensor) and name in COLUMNS_OF_TOKENS:
            found[name] = value[:, rows]
    return found
