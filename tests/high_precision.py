"""The family at 60 digits, entry by entry, with mpmath: where float64 is not enough."""

from collections.abc import Sequence
from typing import Any

from mpmath import mp, mpf
from torch import Tensor

from opsd_kernels import Divergence


def row(
    z_S: Sequence[Any],
    z_T: Sequence[Any],
    divergence: Divergence,
    n: int = 0,
    target: int | None = None,
    advantage: float = 0.0,
) -> tuple[mpf, list[mpf]]:
    """ℓ of one row of logits, those of a student and of a teacher, as `fused_divergence_loss`
    states it, and its gradient with respect to the student's.

    Args:
        n: which of the tokens it is, where β or weights are tensors.
        target, advantage: of a policy term.
    """
    with mp.workdps(60):
        p, q = softmax(z_S), softmax(z_T)
        w_q, w_p, b_q, b_p = halves(divergence, n)
        loss, scores = mpf(0), []  # p ∂f/∂p of each entry
        for p_v, q_v in zip(p, q, strict=True):
            m_q, m_p = (b * q_v + (1 - b) * p_v for b in (b_q, b_p))
            f = w_q * kl(q_v, m_q) + w_p * kl(p_v, m_p)
            score = w_p * (kl(p_v, m_p) + p_v)
            if p_v:
                score -= (w_q * q_v / m_q * (1 - b_q) + w_p * p_v / m_p * (1 - b_p)) * p_v
            if divergence.entry_clip is not None and f > divergence.entry_clip:
                f, score = mpf(divergence.entry_clip), mpf(0)
            loss += f
            scores.append(score)
        if target is not None:
            loss -= advantage * mp.log(p[target])
            scores[target] -= advantage
        total = mp.fsum(scores)
        return loss, [score - p_v * total for score, p_v in zip(scores, p, strict=True)]


def softmax(z: Sequence[Any]) -> list[mpf]:
    e = [mp.exp(z_v) for z_v in z]
    total = mp.fsum(e)
    return [e_v / total for e_v in e]


def kl(a: mpf, b: mpf) -> mpf:
    """a log(a / b), 0 where a is."""
    return a * mp.log(a / b) if a else mpf(0)


def halves(divergence: Divergence, n: int) -> list[mpf]:
    """w_q, w_p, b_q, b_p of w_q KL(q‖m_{b_q}) + w_p KL(p‖m_{b_p})."""
    beta, weights = divergence.beta, divergence.weights
    if isinstance(beta, Tensor):
        beta = float(beta[n])
    if weights is None:
        assert beta is not None
        w_q = 1 - mpf(beta) if beta in (0, 1) else mpf(beta)
        return [w_q, 1 - w_q, mpf(beta), mpf(beta)]
    numbers = [float(w[n]) if isinstance(w, Tensor) else w for w in weights]
    return [mpf(number) for number in (*numbers, *((0, 1) if beta is None else (beta, beta)))]
