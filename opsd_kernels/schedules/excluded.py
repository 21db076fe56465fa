"""Entries that are excluded from rows of logits, and the log-sum-exp of all others, in PyTorch.

    L_r = log Σ_{v∉S} exp(z_v)          ∂L_r/∂z_v = p̃_v = exp(z_v − L_r),  0 where v ∈ S

The entries of S are excluded as banned ones are: their products are −∞. So L_r is summed over the
others alone, and keeps its digits however little mass they have. p̃ sums to 1. If no entry is left,
L_r is −∞ and p̃ is 0.
"""

import torch
from torch import Tensor

from ..divergence import HUGE
from ..heads.vocabulary_parallel import summed_
from .rows import softmaxes


def sums_of_equal(values: Tensor, ids: Tensor) -> Tensor:
    """Sum the values [N, K] of equal ids [N, K] in each row, in the order of their places. One of
    the equal ids gets the sum, the others get 0."""
    sorted_ids, place = ids.sort(dim=1, stable=True)
    values = values.gather(1, place)
    distance, K = 1, ids.shape[1]
    # At every step a value is the sum over up to `distance` equal ids, from its own place on.
    while distance < K:
        equal = sorted_ids[:, distance:] == sorted_ids[:, :-distance]
        further = torch.where(equal, values[:, distance:], 0)
        values = values + torch.nn.functional.pad(further, (0, distance))
        distance *= 2
    repeated = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    values = values.masked_fill(torch.nn.functional.pad(repeated, (1, 0)), 0)
    return torch.empty_like(values).scatter_(1, place, values)


def exclude_(u: Tensor, excluded: Tensor, first: int = 0) -> None:
    """u ← −∞ at the excluded entries. u [R, columns] are products, and its first column is the
    entry `first` of the vocabulary."""
    if excluded.shape[1] == 0:
        return
    inside, column = _columns(u, excluded, first)
    # Every id has to write somewhere. An id that is no column of u writes −∞ to an excluded column
    # of its row. If the row has none, all its ids write the first column's own value there.
    some = column.amax(1, keepdim=True)
    value = u[:, :1].masked_fill(some >= 0, -torch.inf)
    u.scatter_(1, torch.where(inside, column, some.clamp(min=0)), value.expand_as(column))


def add_excluded_(g: Tensor, excluded: Tensor, values: Tensor, first: int) -> None:
    """g ← g + the values at the excluded entries, see `exclude_`."""
    inside, column = _columns(g, excluded, first)
    g.scatter_add_(1, column.clamp(min=0), torch.where(inside, values, 0))


def _columns(t: Tensor, excluded: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Whether each id is a column of t, and which, int64; −1 if not."""
    column = excluded.long() - first
    inside = (column >= 0) & (column < t.shape[1])
    return inside, column.masked_fill(~inside, -1)


def log_sum_rows_(
    z: Tensor,
    needs_score: bool,
    entropy: Tensor | None = None,
    seen: tuple[Tensor, Tensor] | None = None,
    group: str | None = None,
) -> Tensor:
    """L_r [R] from rows of logits z [R, V], in which excluded entries are −∞. If `needs_score`, z
    becomes p̃.

    Args:
        entropy: [R], filled with −Σ p̃ log p̃; 0 where no entry is left.
        seen, group: see `divergence_rows_`.
    """
    (side,) = softmaxes([z], group)
    nothing = side.top == -torch.inf  # everything else is NaN then
    p = side.p.masked_fill_(nothing, 0)
    if entropy is not None:
        below_top = (side.top - z).clamp_(max=HUGE).masked_fill_(nothing, 0)
        mean = below_top.mul_(p).sum(-1, keepdim=True)
        mean = mean if group is None else summed_(mean, group)
        entropy.copy_((side.rest + mean).masked_fill(nothing, 0).squeeze(-1))
    if seen is not None:
        stats, _top = seen
        stats[0] = side.top.masked_fill(nothing, 0).squeeze(-1)
        stats[1] = side.rest.masked_fill(nothing, torch.inf).squeeze(-1)
    if needs_score:
        z.copy_(p)
    return (side.top + side.rest).masked_fill(nothing, -torch.inf).squeeze(-1)
