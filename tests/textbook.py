"""Eq. 6 of the paper, and the two KLs it names, as they are written."""

import torch
from torch import Tensor


def divergence(z_S: Tensor, z_T: Tensor, beta: float, entry_clip: float | None = None) -> Tensor:
    """[N] from logits [N, V]."""
    f = entries(z_S.log_softmax(-1), z_T.log_softmax(-1), beta)
    return (f if entry_clip is None else f.clamp(max=entry_clip)).sum(-1)


def entries(
    log_p: Tensor,
    log_q: Tensor,
    beta: float | Tensor | None,
    weights: tuple[float | Tensor, float | Tensor] | None = None,
) -> Tensor:
    """[N, V] values of the entries, w_q q log(q/m) + w_p p log(p/m).

    Args:
        beta: of m = β q + (1 − β) p, a number or [N]; None for the KLs to the other side.
        weights: w_q and w_p, numbers or [N]; those that β stands for, unless given.
    """

    def column(value: float | Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=log_p.dtype)[..., None]

    log_m_q, log_m_p = log_p, log_q
    if beta is not None:
        b = column(beta)
        log_m_q = log_m_p = torch.logaddexp(log_q + b.log(), log_p + (1 - b).log())
    if weights is None:
        w_q, w_p = torch.where(b == 0, 1, b), torch.where(b == 1, 1, 1 - b)
    else:
        w_q, w_p = map(column, weights)
    return w_q * log_q.exp() * (log_q - log_m_q) + w_p * log_p.exp() * (log_p - log_m_p)
