"""Eq. 6 of the paper, and the two KLs it names, as they are written."""

import math

import torch
from torch import Tensor


def divergence(z_S: Tensor, z_T: Tensor, beta: float, entry_clip: float | None = None) -> Tensor:
    """[N] from logits [N, V]."""
    f = entries(z_S.log_softmax(-1), z_T.log_softmax(-1), beta)
    return (f if entry_clip is None else f.clamp(max=entry_clip)).sum(-1)


def entries(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """[N, V] values of the entries."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        return q * (log_q - log_p)
    if beta == 1:
        return p * (log_p - log_q)
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)
