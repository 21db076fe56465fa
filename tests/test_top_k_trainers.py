"""What other trainers compute from a sparse teacher, each in a few lines of PyTorch, and the call
that docs/coming_from.md gives for it: the same loss and the same gradient."""

import math
from collections.abc import Callable

import pytest
import torch
from inputs import random_inputs
from torch import Tensor

from opsd_kernels import fused_top_k_loss

N, V, D, K, T = 12, 60, 8, 5, 1.5
H, H_T, W = random_inputs(N, V, D, size=2.0, distance=0.3)
SERVED = (H_T @ W.t()).log_softmax(-1)  # of temperature 1, as a server sends it
IDS = SERVED.topk(K).indices
LOG_Q = SERVED.gather(-1, IDS)
STUDENTS = (H @ W.t()).topk(K).indices
SAMPLED = SERVED.topk(9).indices[:, 8:]
BOTH = torch.cat([IDS[:, :1], SAMPLED], -1)
UNION = torch.cat([IDS, STUDENTS], -1)  # some are in both
ODD = torch.arange(N)[:, None] % 2 == 1
PADDED = torch.cat([IDS, SAMPLED.masked_fill(ODD, -1)], -1)
PADDED_LOG_Q = torch.cat([LOG_Q, SERVED.gather(-1, SAMPLED).masked_fill(ODD, -torch.inf)], -1)


def tail(log: Tensor, least: float = 1e-7) -> Tensor:
    """log of the numbers of a row, and of 1 − their sum."""
    total = log.logsumexp(-1, keepdim=True).clamp(max=-least)
    return torch.cat([log, torch.log(-torch.expm1(total))], -1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def jsd(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def at(z: Tensor, ids: Tensor) -> Tensor:
    """log p of ids, from logits."""
    return z.log_softmax(-1).gather(-1, ids)


def normalized(log: Tensor) -> Tensor:
    return log.log_softmax(-1)


def union(z: Tensor) -> Tensor:
    """Row by row, each id once."""
    losses = []
    for z_n, served, ids in zip(z, SERVED, UNION, strict=True):
        ids = torch.tensor(sorted(set(ids.tolist())))
        losses.append(jsd(tail(at(z_n, ids)), tail(served[ids])))
    return torch.stack(losses)


# Theirs, from the student's logits z [N, V], and ours, from its hidden states h [N, D].
Loss = Callable[[Tensor], Tensor]
CASES: dict[str, tuple[Loss, Loss]] = {
    "TRL, server, beta 0": (
        lambda z: kl(tail(LOG_Q), tail(at(z, IDS))).mean(),
        lambda h: fused_top_k_loss(h, W, IDS, LOG_Q, beta=0.0),
    ),
    "TRL, server, beta 0, without a tail": (
        lambda z: kl(normalized(LOG_Q), normalized(at(z, IDS))).mean(),
        lambda h: fused_top_k_loss(h, W, IDS, LOG_Q, beta=0.0, outside="renormalize"),
    ),
    "TRL, server, beta 0.5": (
        lambda z: jsd(tail(at(z, BOTH)), tail(SERVED.gather(-1, BOTH))).mean(),
        lambda h: fused_top_k_loss(h, W, BOTH, SERVED.gather(-1, BOTH)),
    ),
    "TRL, server, beta 1": (
        lambda z: kl(tail(at(z, SAMPLED)), tail(SERVED.gather(-1, SAMPLED))).mean(),
        lambda h: fused_top_k_loss(h, W, SAMPLED, SERVED.gather(-1, SAMPLED), beta=1.0),
    ),
    "TRL, asynchronous": (
        lambda z: torch.where(
            ODD[:, 0],
            kl(tail(LOG_Q), tail(at(z, IDS))),
            kl(tail(PADDED_LOG_Q), tail(at(z, PADDED.clamp(min=0)))).nan_to_num(),
        ).mean(),
        lambda h: fused_top_k_loss(h, W, PADDED, PADDED_LOG_Q, beta=0.0),
    ),
    "TRL, SDFT": (
        lambda z: jsd(normalized(at(z, STUDENTS)), normalized(SERVED.gather(-1, STUDENTS))).mean(),
        lambda h: fused_top_k_loss(
            h, W, STUDENTS, SERVED.gather(-1, STUDENTS), outside="renormalize"
        ),
    ),
    "TRL, IWOPD": (
        lambda z: union(z).mean(),
        lambda h: fused_top_k_loss(h, W, UNION, SERVED.gather(-1, UNION)),
    ),
    "verl": (
        lambda z: kl(LOG_Q, at(z, IDS)).mean(),
        lambda h: fused_top_k_loss(h, W, IDS, LOG_Q, beta=0.0, outside="ignore"),
    ),
    "verl, with a tail": (
        lambda z: kl(tail(LOG_Q, 1e-6), tail(at(z, IDS))).mean(),
        lambda h: fused_top_k_loss(h, W, IDS, LOG_Q, log_q_rest=tail(LOG_Q, 1e-6)[:, -1], beta=0.0),
    ),
    "OPSD": (
        lambda z: kl(normalized(LOG_Q), normalized(at(z, IDS))).mean(),
        lambda h: fused_top_k_loss(h, W, IDS, LOG_Q, beta=0.0, outside="renormalize"),
    ),
    "ms-swift": (
        lambda z: jsd(normalized(z.gather(-1, IDS) / T), normalized(LOG_Q / T)).mean(),
        lambda h: fused_top_k_loss(h, W, IDS, LOG_Q / T, outside="renormalize", temperature=T),
    ),
    "NeMo-RL, q renormalized alone": (
        lambda z: kl(normalized(LOG_Q), at(z, IDS)).mean(),
        lambda h: fused_top_k_loss(h, W, IDS, LOG_Q.log_softmax(-1), beta=0.0, outside="ignore"),
    ),
    "Axolotl": (
        lambda z: T**2 * kl(normalized(LOG_Q / T), normalized(z.gather(-1, IDS) / T)).mean(),
        lambda h: (
            T**2
            * fused_top_k_loss(h, W, IDS, LOG_Q / T, beta=0.0, outside="renormalize", temperature=T)
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ours_is_theirs(name):
    theirs, ours = CASES[name]
    h = H.double().requires_grad_()
    expected = theirs(h @ W.double().t())
    (grad,) = torch.autograd.grad(expected, h)
    leaf = H.clone().requires_grad_()
    found = ours(leaf)
    found.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(leaf.grad.double(), grad, rtol=1e-4, atol=1e-7)
