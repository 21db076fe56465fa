"""What every schedule is given."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """N tokens whose divergence is wanted; the notation is that of `divergence.py`."""

    h_S: Tensor  # [N, D]
    h_T: Tensor  # [N, D_T]
    W: Tensor  # [V, D]
    W_T: Tensor | None  # [V, D_T]; None if W serves both
    keep: Tensor | None  # [N] bool, the tokens that will count; None for all
    operand_dtype: torch.dtype  # whose rounding the operands of the matrix products have
    beta: float
    temperature: float
    entry_clip: float | None

    @property
    def heads(self) -> tuple[Tensor, ...]:
        return (self.W,) if self.W_T is None else (self.W, self.W_T)

    def tokens(self, rows: slice) -> "Problem":
        """The same problem for some of the tokens; no copy is made."""
        keep = None if self.keep is None else self.keep[rows]
        return replace(self, h_S=self.h_S[rows], h_T=self.h_T[rows], keep=keep)
