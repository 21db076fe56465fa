"""What every schedule is given, and what it fills.

`Problem` is the one list of what a call of a loss is made of: `checks` makes it of the arguments,
and all that follows passes it on as it is.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.divergence import Family, Member
from opsd_kernels.head import LogitMap


@dataclass(frozen=True)
class Problem:
    """N tokens whose divergence is wanted, or log p(ŷ), or the entropy; the notation is that of
    `divergence.py`."""

    h_S: Tensor  # [N, D]
    h_T: Tensor | None  # [N, D_T]; None where there is no teacher, who is of no use to either
    W: Tensor  # [V, D]
    W_T: Tensor | None  # [V, D_T]; None if W serves both, whose logits may differ by what follows
    operand_dtype: torch.dtype  # whose rounding the operands of the matrix products have
    # A number or [N] fp32. None: of both KLs, where there are w_q and w_p; else log p(ŷ), or the
    # entropy where there are no targets, takes the loss's place.
    beta: float | Tensor | None
    temperature: float = 1.0
    entry_clip: float | None = None
    keep: Tensor | None = None  # [N] bool, the tokens that will count; None for all
    targets: Tensor | None = None  # [N] int32 ids ŷ of sampled tokens, all within the vocabulary
    # What makes logits of products; the student's scale is part of the temperature.
    bias: Tensor | None = None  # [V] in operand_dtype, contiguous, as is …
    bias_T: Tensor | None = None  # … that of the teacher
    softcap: float | None = None
    softcap_T: float | None = None
    scale_T: float = 1.0  # the teacher's, over the student's
    # [N] fp32 within ±1: gradients are those of Σ w ℓ. None: dh_S is that of each token's own ℓ.
    weights: Tensor | None = None
    # Of a vocabulary of which W holds some rows, and other processes the others, in the order of
    # ranks: the name of their group, and the first of these rows, [] int64. Targets are counted
    # from it, and −1 where they are not among these rows.
    group: str | None = None
    offset: Tensor | None = None
    # [N] fp32, the weights of a divergence's two halves; None for those that β stands for.
    w_q: Tensor | None = None
    w_p: Tensor | None = None
    advantages: Tensor | None = None  # [N] fp32, A of a policy term −A log p(ŷ)

    @property
    def heads(self) -> tuple[Tensor, ...]:
        return (self.W,) if self.W_T is None else (self.W, self.W_T)

    @property
    def sides(self) -> int:
        """Of whom logits are made: 2, or 1 where there is no teacher."""
        return 1 if self.h_T is None else 2

    @property
    def logit_maps(self) -> tuple[LogitMap, LogitMap]:
        """What makes logits of products, the student's and the teacher's."""
        student = LogitMap(self.bias, self.softcap, 1.0)
        return student, LogitMap(self.bias_T, self.softcap_T, self.scale_T)

    @property
    def member(self) -> Member:
        """What ℓ is, apart from the policy term."""
        if self.beta is None and self.w_q is None:
            return Member(Family.ENTROPY if self.targets is None else Family.LOG_PROB)
        return Member.of(self.beta, self.entry_clip, self.w_q, self.w_p)

    @property
    def has_bounded_scores(self) -> bool:
        return self.advantages is None and self.member.has_bounded_scores

    def tokens(self, rows: slice | Tensor) -> "Problem":
        """The same problem for some of the tokens; a slice makes no copy."""
        some: dict[str, Any] = {
            name: value[rows]
            for name, value in vars(self).items()
            if name in OF_TOKENS and isinstance(value, Tensor)
        }
        return replace(self, **some)

    def without_teacher(self) -> "Problem":
        """The same problem for what is of the student alone: of a teacher, nothing."""
        return replace(self, h_T=None, W_T=None, bias_T=None, softcap_T=None, scale_T=1.0)

    def with_contiguous_rows(self) -> "Problem":
        """The same problem with hidden states that can be read a row at a time."""
        h_T = None if self.h_T is None else _with_contiguous_rows(self.h_T)
        return replace(self, h_S=_with_contiguous_rows(self.h_S), h_T=h_T)


def _with_contiguous_rows(h: Tensor) -> Tensor:
    return h if h.stride(1) == 1 else h.contiguous()


STATS = 8  # numbers of a row of logits that is made once more

# Those that have a number, or a row, for each token, where they are tensors.
OF_TOKENS = ("h_S", "h_T", "beta", "keep", "targets", "weights", "w_q", "w_p", "advantages")


@dataclass(frozen=True)
class Outputs:
    """What a schedule fills, zeros at first. Results of tokens that are not kept are undefined."""

    loss: Tensor  # [N] fp32, ℓ; or log p(ŷ) or the entropy, where no divergence is wanted
    statistics: Tensor | None = None  # [STATISTICS, N] fp32, see `divergence.py`
    dh_S: Tensor | None = None  # [N, D] fp32, the gradient with respect to h_S
    # For gradients that are made in backward: what is known of each row of logits, [STATS, N] fp32,
    # as `Stats` of the kernels or of `divergence.py`; and the entry treated apart, [N] int32.
    stats: Tensor | None = None
    # Where that is not one of W's rows, it is −1.
    top: Tensor | None = None
    # The gradients of Σ w ℓ with respect to the student's head, where there are weights.
    dW: Tensor | None = None  # [V, D] fp32
    db: Tensor | None = None  # [V] fp32

    @property
    def needs_score(self) -> bool:
        """Whether more is wanted than values."""
        return self.dh_S is not None or self.stats is not None or self.dW is not None

    @property
    def stride(self) -> int:
        """Of `statistics` and `stats`, from one field to the next."""
        given = self.stats if self.statistics is None else self.statistics
        return 0 if given is None else given.stride(0)

    def tokens(self, rows: slice | Tensor) -> "Outputs":
        """Some of the tokens: views of a slice, copies of indices."""
        return replace(
            self,
            loss=self.loss[rows],
            statistics=None if self.statistics is None else self.statistics[:, rows],
            dh_S=None if self.dh_S is None else self.dh_S[rows],
            stats=None if self.stats is None else self.stats[:, rows],
            top=None if self.top is None else self.top[rows],
        )

    def put(self, rows: Tensor, some: "Outputs") -> None:
        """Write back copies that `tokens` made."""
        self.loss[rows] = some.loss
        if self.statistics is not None and some.statistics is not None:
            self.statistics[:, rows] = some.statistics
        if self.dh_S is not None and some.dh_S is not None:
            self.dh_S[rows] = some.dh_S
        if self.stats is not None and some.stats is not None:
            self.stats[:, rows] = some.stats
        if self.top is not None and some.top is not None:
            self.top[rows] = some.top
