"""The family of divergences, entry by entry: value f and score a, in PyTorch.

Notation (used everywhere in this package):

    h_S, h_T  [N, D]    last hidden states of student and teacher, one row a token
    W         [V, D]    LM head
    z_S, z_T  [N, V]    logits h Wᵀ / T, temperature T; always fp32 or wider
    L_S, L_T  [N]       log-sum-exp of a row of logits
    p, q      [N, V]    softmax of z_S (student) and of z_T (teacher)
    x                   log q − log p, the log-ratio; small where the two agree
    m                   β q + (1 − β) p, the mixture: β weighs the TEACHER (OPSD paper, Eq. 6)
    f, a                value of an entry, and its score a = p ∂f/∂p
    G         [N]       Σ_v a_v

A token's divergence is ℓ = Σ_v f_v and, for every member of the family,

    ∂ℓ/∂z_S = (a − G p) / T.

    divergence           β          value f                                score a
    JSD_β                0 < β < 1  β q log(q/m) + (1−β) p log(p/m)        −(1−β) p log(m/p)
    forward KL(q‖p)      β = 0      q x                                    −q
    reverse KL(p‖q)      β = 1      −p x                                   p (1 − x)

β = 0 and β = 1 *name* the two KLs, as everywhere in the field. Eq. 6 itself vanishes at both ends,
so the family jumps there: β = 0.01 gives about a hundredth of the forward KL.

With an entry clip τ each value is min(f, τ) before the sum, and the score of a clipped entry is 0.
A clipped KL can be negative: its negative entries are not clipped.

Values. Self-distillation lives where p ≈ q, and there the textbook values cancel to noise. Those
computed here have the same sum and are second order in x, entry by entry, with nothing subtracted
that was exponentiated first. JSD_β, for β ≤ ½ (else with p, q, x, β exchanged for q, p, −x, 1 − β,
which leaves it as it is):

    f = p (β (1 + t) (x − lm) − (1 − β) lm),   t = expm1(x),   lm = log(m/p) = log1p(β t)

The KLs, with u = −|x|, t = expm1(u) and base = max(p, q):

    forward KL   base ((1 + t) u − t)  where x ≤ 0, else  base (t − u)           = q x + p − q
    reverse KL   base (t − u)          where x ≤ 0, else  base ((1 + t) u − t)   = −p x + q − p

Their null term ±(p − q) sums to zero over the vocabulary. A clipped entry carries it too, so that
the clipped sum keeps the accuracy of the others, unless most of the row's mass is clipped.

Scores. a ← a − c p, G ← G − c leaves a − G p as it is for any c. The null term shifts the scores of
the KLs so, to p − q and −p x, and that of a clipped entry to ±p: none is then a small difference of
large numbers. With c = a/p at the student's top entry besides, the score of that entry is exactly
0; otherwise, for a confident token, a − G p would be such a difference.
"""

import math

import torch
from torch import Tensor

# Log-ratios are held within ±HUGE, so that 0 · x stays 0 where one side is −∞ and the other not.
HUGE = 1e30
# Above this log-ratio the JSD of an entry no longer depends on it, and eˣ still fits fp32.
SATURATED = 80.0


def divergence_name(beta: float, entry_clip: float | None = None) -> str:
    """Name the divergence that `beta` and `entry_clip` select, for logs and plots.

    Libraries disagree on what β weighs and on which KL is "forward"; a name that says it does not.
    """
    if beta == 0:
        name = "forward KL(teacher‖student)"
    elif beta == 1:
        name = "reverse KL(student‖teacher)"
    else:
        name = f"JSD(β={beta:g} on the teacher)"
    return name if entry_clip is None else f"{name}, entries clipped at {entry_clip:g}"


def divergence_rows_(
    z_S: Tensor, z_T: Tensor, beta: float, entry_clip: float | None, needs_score: bool
) -> Tensor:
    """Turn rows of logits into each row's divergence ℓ and, in place, its gradient.

    Args:
        z_S, z_T: [R, V] float32 or float64 logits after temperature. Both are overwritten: z_S by
            the gradient ∂ℓ/∂z_S = a − G p if `needs_score`, z_T by scratch.
        beta, entry_clip: the divergence, see the module docstring.
        needs_score: whether the gradient is wanted; without it only the values are computed.

    Returns:
        [R] the divergences. An entry at −∞ on both sides counts for nothing. Where an unclipped KL
        is infinite (no mass where the other side has some) ℓ is +∞ and the row's gradient 0. A NaN
        logit makes its row NaN, and no other.
    """
    p, top_S, rest_S = _softmax(z_S)
    q, top_T, rest_T = _softmax(z_T)
    # x = (z_T − z_S) − (L_T − L_S), not log q − log p: nearly equal logits subtract without
    # rounding. The two parts of L are subtracted one by one: beside a large top logit the other,
    # which is all that tells two confident tokens apart, would be rounded away.
    x = z_T.sub_(z_S).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    infinite = None
    if entry_clip is None and beta in (0, 1):
        infinite = (x.amax(-1, True) if beta == 0 else -x.amin(-1, True)) == math.inf
    x.clamp_(-HUGE, HUGE).sub_(top_T - top_S).sub_(rest_T - rest_S)

    f, a = value_and_score(p, q, x, beta, entry_clip, needs_score)
    loss = f.sum(-1, keepdim=True)
    if infinite is not None:
        loss.masked_fill_(infinite, torch.inf)
    if a is not None:
        top = p.argmax(-1, keepdim=True)
        c = a.gather(-1, top).div_(p.gather(-1, top))
        a.addcmul_(p, c, value=-1).scatter_(-1, top, 0)
        G = a.sum(-1, keepdim=True)
        torch.addcmul(a, p, G, value=-1, out=z_S)
        if infinite is not None:
            z_S.masked_fill_(infinite, 0)
    return loss.squeeze(-1)


def value_and_score(
    p: Tensor, q: Tensor, x: Tensor, beta: float, entry_clip: float | None, needs_score: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Value f (stable form) and score a of every vocabulary entry.

    Args:
        p, q: [R, V] probabilities of student and teacher.
        x: [R, V] finite log-ratio log q − log p. Overwritten.
        beta, entry_clip: the divergence, see the module docstring.
        needs_score: without it a is None and costs nothing.

    Returns:
        f and a, each [R, V]; for the KLs both carry the null term.
    """
    if 0 < beta < 1:
        f, a = _jensen_shannon(p, q, x, beta, needs_score)
        if entry_clip is not None:
            if a is not None:
                a.masked_fill_(f > entry_clip, 0)
            f.clamp_(max=entry_clip)
        return f, a

    f, a = _kullback_leibler(p, q, x, beta, needs_score)
    if entry_clip is not None:
        f, clipped = _clip_kullback_leibler(f, p, q, x, beta, entry_clip)
        if a is not None:
            a = torch.where(clipped, p if beta == 0 else -p, a)
    return f, a


def _jensen_shannon(
    p: Tensor, q: Tensor, x: Tensor, beta: float, needs_score: bool
) -> tuple[Tensor, Tensor | None]:
    # Exchanging keeps β ≤ ½; beyond, the form below would cancel by another 1/(1 − β).
    exchanged = beta > 0.5
    P, Q, b, y = (q, p, 1 - beta, x.neg_()) if exchanged else (p, q, beta, x)
    y.clamp_(max=SATURATED)
    t = torch.expm1(y)
    lm = torch.mul(t, b).log1p_()  # log(m/P)
    d = y.sub_(lm)  # log(Q/m)
    a = None
    if needs_score:
        a = (d if exchanged else lm).mul(p).mul_(1 - beta if exchanged else beta - 1)
    f = t.add_(1).mul_(b).mul_(d).sub_(lm.mul_(1 - b))
    # Past saturation P has no digits left, and Q e^−y stands for it.
    scale = torch.maximum(P, Q * math.exp(-SATURATED))
    return f.mul_(scale).clamp_(min=0), a


def _kullback_leibler(
    p: Tensor, q: Tensor, x: Tensor, beta: float, needs_score: bool
) -> tuple[Tensor, Tensor | None]:
    base = torch.maximum(p, q)
    # Selecting by lerp with a float mask is many times faster on a CPU than torch.where.
    positive = torch.gt(x, 0, out=torch.empty_like(x))
    u = x.abs().neg_()
    t = torch.expm1(u)
    a = None
    if needs_score:
        # p − q = −base t where x ≤ 0, else base t
        a = (base * t).mul_(positive.mul(2).sub_(1)) if beta == 0 else (p * x).neg_()
    near = (t + 1).mul_(u).sub_(t)
    far = t.sub_(u)
    f = near.lerp_(far, positive) if beta == 0 else far.lerp_(near, positive)
    return f.mul_(base).clamp_(min=0), a


def _clip_kullback_leibler(
    f: Tensor, p: Tensor, q: Tensor, x: Tensor, beta: float, entry_clip: float
) -> tuple[Tensor, Tensor]:
    """Values clipped, and which entries are. Overwrites x."""
    if beta == 0:
        weight, textbook, null = q, x.mul_(q), p - q
    else:
        weight, textbook, null = p, x.mul_(p).neg_(), q - p
    clipped = textbook > entry_clip
    f = torch.where(clipped, null.add_(entry_clip), f)
    # The null term trades the rounding of the unclipped mass for that of the clipped: where the
    # clip takes most of a row, the row is better off without.
    mostly_clipped = (weight * clipped).sum(-1, keepdim=True) > 0.5
    return torch.where(mostly_clipped, textbook.clamp_(max=entry_clip), f), clipped


def _softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax [R, V] of rows of logits, and the two parts of L = top + rest, [R, 1] each."""
    top = z.amax(-1, keepdim=True)
    p = (z - top).exp_()
    total = p.sum(-1, keepdim=True)
    return p.div_(total), top, total.log_()
