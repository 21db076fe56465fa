"""The family of divergences, entry by entry: value f and score a, in PyTorch.

Notation (used everywhere in this package):

    h_S, h_T  [N, D]    last hidden states of student and teacher, one row for each token
    W         [V, D]    LM head
    z_S, z_T  [N, V]    logits h Wᵀ / T, temperature T; always fp32 or wider
    L_S, L_T  [N]       log-sum-exp of a row of logits
    p, q      [N, V]    softmax of z_S (student) and of z_T (teacher)
    x                   log q − log p, the log-ratio; small where the two agree
    m                   β q + (1 − β) p, the mixture: β weighs the TEACHER (OPSD paper, Eq. 6)
    f, a                value of an entry, and its score a = p ∂f/∂p
    G         [N]       Σ_v a_v

A token's divergence is ℓ = Σ_v f_v. Its gradient, for every member of the family, is

    ∂ℓ/∂z_S = a − G p.

Every divergence here is a sum of two halves, each with a weight and a mixture of its own:

    ℓ = w_q KL(q‖m_q) + w_p KL(p‖m_p),    m_q = β_q q + (1 − β_q) p,  m_p = β_p q + (1 − β_p) p

    member                  β_q   β_p   w_q   w_p     family
    JSD_β, 0 < β < 1        β     β     β     1 − β   JSD
    skewed KLs              β     β     any   any     MIXTURE
    forward KL(q‖p), β = 0  0           1     0       KLS
    reverse KL(p‖q), β = 1        1     0     1       KLS
    both KLs                0     1     any   any     KLS

β = 0 and β = 1 *name* the two KLs, as everywhere in the field. Eq. 6 itself vanishes at both ends,
so the family jumps there: β = 0.01 gives about a hundredth of the forward KL. A β for each token is
a MIXTURE too: a KL is the half whose mixture is the other side, so β_q = 0 or β_p = 1.

With an entry clip τ the value of an entry is min(f, τ), and the score of a clipped entry is 0. A
clipped KL can be negative: negative values are not clipped.

Values. Self-distillation lives where p ≈ q. There the textbook values f = w_q q log(q/m_q) + w_p p
log(p/m_p) are sums of first-order terms that cancel to noise. The values computed here add a null
term κ (q − p), which sums to zero over the vocabulary and makes each half a sum of terms ≥ 0 of
second order. With lm = log(m/p), d = log(q/m) = x − lm and t = expm1(x):

    KL(q‖m)    q d − (1 − β) (q − p)  =  q (e^−d − 1 + d)
    KL(p‖m)    β (q − p) − p lm       =  p (β t − lm)

    κ = w_p β_p − w_q (1 − β_q)

For JSD_β κ is 0, and both halves together are p (β (1 + t) d − (1 − β) lm). A clipped value carries
the null term too, so that the clipped sum keeps its accuracy, unless the clip takes most of the
mass of the row: then the sum without the null terms is the more accurate one.

Sides are exchanged where β > ½: p, q, x and β become q, p, −x and 1 − β. The forms above would lose
digits there, by another factor 1/(1 − β). In the code, P and Q are the sides after the exchange.

Scores. Replacing a by a − c p and G by G − c does not change a − G p, for any c. The scores
computed here are shifted by the null term, which makes them of first order in x, as the gradient
is:

    JSD and MIXTURE    κ p (q − m)/m − w_p p lm
    KLS                w_q (p − q) − w_p p x

and −κ p is the score of a clipped entry.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

# Log-ratios are held within ±HUGE, so that 0 · x stays 0 where one side is −∞ and the other is not.
HUGE = 1e30
# Above this log-ratio the value of a mixture no longer depends on it, and eˣ still fits fp32.
SATURATED = 80.0

# The fields of the statistics [STATISTICS, N] fp32 that `token_divergence` returns beside the loss.
# The last three belong to a sampled token ŷ: log p(ŷ), log q(ŷ), and log q(ŷ) − log p(ŷ).
(FORWARD_KL, REVERSE_KL, ENTROPY_S, ENTROPY_T, CLIPPED_SHARE, LOG_P, LOG_Q, LOG_RATIO) = range(8)
STATISTICS = 8


class Family(IntEnum):
    """Which formulas ℓ has: a compile-time constant of the kernels."""

    JSD = 0
    MIXTURE = 1  # both halves of a JSD by weights; or a β for each token
    KLS = 2  # the forward KL, the reverse KL, or both by weights
    LOG_PROB = 3  # no divergence: log p(ŷ) of a sampled token ŷ
    ENTROPY = 4  # no divergence: the student's entropy
    LOG_SUM = 5  # no divergence: log Σ exp z_S over the entries that are not excluded


Weight = float | Tensor


@dataclass(frozen=True)
class Member:
    """What ℓ of a token is, apart from a policy term: a member of the family and its clip."""

    family: Family
    beta: Weight = 0.0  # of the mixture, a number or [R]; KLS have none
    # Weights of the halves, numbers or [R]; None if a β for each token determines them.
    w_q: Weight | None = None
    w_p: Weight | None = None
    entry_clip: float | None = None

    @staticmethod
    def of(
        beta: float | Tensor | None,
        entry_clip: float | None = None,
        w_q: Tensor | None = None,
        w_p: Tensor | None = None,
    ) -> "Member":
        """The divergence that β names; or with weights the halves of JSD_β, or both KLs if β is
        None."""
        if w_q is not None and w_p is not None:
            family = Family.KLS if beta is None else Family.MIXTURE
            return Member(family, 0.0 if beta is None else beta, w_q, w_p, entry_clip)
        assert beta is not None
        if isinstance(beta, Tensor):
            return Member(Family.MIXTURE, beta, None, None, entry_clip)
        if beta in (0, 1):
            return Member(Family.KLS, 0.0, 1.0 - beta, float(beta), entry_clip)
        return Member(Family.JSD, beta, beta, 1 - beta, entry_clip)

    @property
    def is_divergence(self) -> bool:
        """Whether ℓ compares two sides; the other values are the student's alone."""
        return self.family not in (Family.LOG_PROB, Family.ENTROPY, Family.LOG_SUM)

    @property
    def beta_per_token(self) -> bool:
        return isinstance(self.beta, Tensor)

    def is_wide(self, needs_statistics: bool) -> bool:
        """Whether kernels compute more of an entry than one divergence whose parameters all tokens
        share."""
        per_token = any(isinstance(t, Tensor) for t in (self.beta, self.w_q, self.w_p))
        return per_token or (needs_statistics and self.is_divergence)

    @property
    def has_forward_kl(self) -> bool:
        """Whether ℓ of some token may hold KL(q‖p) itself."""
        return self.beta_per_token or (self.family == Family.KLS and not _is_zero(self.w_q))

    @property
    def has_reverse_kl(self) -> bool:
        """Whether ℓ of some token may hold KL(p‖q) itself."""
        return self.beta_per_token or (self.family == Family.KLS and not _is_zero(self.w_p))

    @property
    def may_be_infinite(self) -> bool:
        """Whether ℓ is infinite where one side has mass and the other has none."""
        return self.entry_clip is None and (self.has_forward_kl or self.has_reverse_kl)

    @property
    def knows_G(self) -> bool:
        """Whether one pass over the vocabulary gives G, as for the unclipped KLs and for all that
        is no divergence."""
        return not self.is_divergence or (self.family == Family.KLS and self.entry_clip is None)

    @property
    def has_bounded_scores(self) -> bool:
        """Whether no score exceeds 1, and G neither. Scores of the reverse KL grow with the
        log-ratio; those of the entropy, and weights, have no bound."""
        if self.family == Family.KLS:
            return not self.has_reverse_kl and not isinstance(self.w_q, Tensor) and self.w_q == 1
        return self.family in (Family.JSD, Family.LOG_PROB, Family.LOG_SUM)

    def mean_limit(self, needs_score: bool, needs_statistics: bool) -> float:
        """The bound to which |d − d_top|, d = z_T − z_S, is clamped in its mean over the student's
        distribution; 0 where that mean is not needed.

        G of the reverse KL and of the entropy is the mean without a bound. For mixtures the mean
        gives only a guess of G (see `shift` in kernels/pointwise.py), which differences of logits
        beyond 32 would not improve. The entropy, as ℓ or beside a log-sum-exp, is made of it.
        """
        if self.family == Family.ENTROPY or (self.family == Family.LOG_SUM and needs_statistics):
            return HUGE
        if not needs_score:
            return 0.0
        if self.family in (Family.JSD, Family.MIXTURE):
            return 32.0
        return HUGE if self.has_reverse_kl else 0.0

    def columns(self) -> tuple[Weight, Weight, Weight]:
        """β, w_q and w_p: numbers, or [R, 1]."""
        beta, w_q, w_p = (
            t[:, None] if isinstance(t, Tensor) else t for t in (self.beta, self.w_q, self.w_p)
        )
        assert beta is not None
        if w_q is not None and w_p is not None:
            return beta, w_q, w_p
        assert isinstance(beta, Tensor)
        is_kl = (beta == 0) | (beta == 1)
        return beta, torch.where(is_kl, 1 - beta, beta), torch.where(is_kl, beta, 1 - beta)

    def kl_weights(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of KL(q‖p) and KL(p‖q) in ℓ, [1, 1] or [R, 1], in the dtype and on the device
        of `like`."""
        if isinstance(self.beta, Tensor):
            beta = self.beta[:, None]
            return (beta == 0).to(beta.dtype), (beta == 1).to(beta.dtype)
        _, w_q, w_p = self.columns() if self.family == Family.KLS else (0.0, 0.0, 0.0)
        # Numbers are filled in: to copy them to a GPU the host would wait.
        forward, reverse = (
            w if isinstance(w, Tensor) else like.new_full((1, 1), w) for w in (w_q, w_p)
        )
        return forward, reverse


def _is_zero(weight: Weight | None) -> bool:
    return not isinstance(weight, Tensor) and weight == 0


def _itself(sums: Tensor) -> Tensor:
    return sums


def value_and_score(
    p: Tensor,
    q: Tensor,
    x: Tensor,
    member: Member,
    needs_score: bool = True,
    of_vocabulary: Callable[[Tensor], Tensor] = _itself,
    ignored: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Value f and score a of every entry, both with the null term of the module docstring.

    Args:
        p, q: [R, V] probabilities of student and teacher.
        x: [R, V] finite log-ratio log q − log p. Overwritten.
        member: a divergence.
        needs_score: without it a is None and costs nothing.
        of_vocabulary: turns sums [R, 1] over these columns into sums over the vocabulary.
        ignored: entries at the end of a row whose value is 0, as if they were clipped there.

    Returns:
        f and a, each [R, V].
    """
    tau = member.entry_clip
    limited = tau is not None or ignored > 0
    f, a, textbook, kappa = _unclipped(p, q, x, member, needs_score, limited)
    if not limited:
        return f, a
    given = f if textbook is None else textbook
    clipped = torch.zeros_like(f, dtype=torch.bool) if tau is None else given > tau
    if tau is not None:
        given.clamp_(max=tau)
    if ignored:
        clipped[:, -ignored:].fill_(True)
        given[:, -ignored:].fill_(0)
    if textbook is None:
        if a is not None:
            a.masked_fill_(clipped, 0)
        return f, a
    torch.where(clipped, (q - p).mul_(kappa).add_(textbook), f, out=f)
    # The null term trades the rounding of the unclipped mass for that of the clipped mass.
    mass = of_vocabulary(torch.maximum(p, q).mul_(clipped).sum(-1, keepdim=True))
    torch.where(mass > 0.5, textbook, f, out=f)
    if a is not None:
        torch.where(clipped, p * -kappa, a, out=a)
    return f, a


def clipped_off(p: Tensor, q: Tensor, x: Tensor, member: Member) -> Tensor:
    """The part of every entry's value that the clip removes, [R, V]; see `value_and_score`."""
    assert member.entry_clip is not None
    f, _, textbook, _ = _unclipped(p, q, x, member, needs_score=False, needs_textbook=True)
    return (f if textbook is None else textbook).sub_(member.entry_clip).clamp_(min=0)


def _unclipped(
    p: Tensor, q: Tensor, x: Tensor, member: Member, needs_score: bool, needs_textbook: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Weight]:
    """f and a without a clip; the textbook value, which the clip is defined on, if it is needed
    and is not f; and κ. Overwrites x."""
    if member.family == Family.JSD:
        return *_jensen_shannon(p, q, x, member, needs_score), None, 0.0
    formulas = _kullback_leiblers if member.family == Family.KLS else _mixture
    return formulas(p, q, x, member, needs_score, needs_textbook)


def _jensen_shannon(
    p: Tensor, q: Tensor, x: Tensor, member: Member, needs_score: bool
) -> tuple[Tensor, Tensor | None]:
    assert not isinstance(member.beta, Tensor)
    exchanged = member.beta > 0.5
    P, Q, b, y = (q, p, 1 - member.beta, x.neg_()) if exchanged else (p, q, member.beta, x)
    y.clamp_(max=SATURATED)
    t = torch.expm1(y)
    lm = torch.mul(t, b).log1p_()  # log(m/P)
    d = y.sub_(lm)  # log(Q/m)
    a = None
    if needs_score:
        a = torch.mul(d, Q).mul_(b) if exchanged else torch.mul(lm, P).mul_(b - 1)
    f = t.add_(1).mul_(b).mul_(d).sub_(lm.mul_(1 - b))
    # Past saturation P has no digits left, and Q e^−y stands for it.
    scale = torch.maximum(P, Q * math.exp(-SATURATED))
    return f.mul_(scale).clamp_(min=0), a


def _mixture(
    p: Tensor, q: Tensor, x: Tensor, member: Member, needs_score: bool, needs_textbook: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Weight]:
    beta, w_q, w_p = member.columns()
    kappa = w_p * beta - w_q * (1 - beta)
    exchanged = beta > 0.5
    b = _either(exchanged, 1 - beta, beta)
    P, Q = _either(exchanged, q, p), _either(exchanged, p, q)
    w_P, w_Q = _either(exchanged, w_q, w_p), _either(exchanged, w_p, w_q)
    y = x.mul_(_either(exchanged, -1.0, 1.0))
    if isinstance(b, Tensor):
        y = torch.minimum(y, _either(b == 0, HUGE, SATURATED), out=y)  # a KL does not saturate
        t = torch.expm1(y.clamp(max=SATURATED))
    else:
        t = torch.expm1(y.clamp_(max=SATURATED))
    near = (y > -0.5) & (y < 0.5)
    lm = torch.mul(t, b).log1p_()  # log(m/P)
    d = y.sub_(lm)  # log(Q/m)
    Q_minus_P = torch.where(near, P * t, Q - P)
    f = torch.expm1(-d).add_(d).mul_(Q)
    far = torch.mul(Q_minus_P, b - 1).addcmul_(Q, d)
    torch.where(near, f, far, out=f).clamp_(min=0).mul_(w_Q)
    of_P = torch.mul(t, b, out=far).sub_(lm).mul_(P)
    far = torch.mul(Q_minus_P, b).addcmul_(P, lm, value=-1)
    f.add_(torch.where(near, of_P, far, out=of_P).clamp_(min=0).mul_(w_P))
    del of_P, far
    a = textbook = None
    if needs_score:
        # κ p (q − m)/m is κ (1 − b) (Q − P)/(1 + b t), or with sides exchanged −κ b Q t/(1 + b t).
        a = _either(exchanged, Q * t, Q_minus_P).mul_(_either(exchanged, -b, 1 - b) * kappa)
        a.div_(t.mul_(b).add_(1))
    del t, Q_minus_P
    of_Q, of_P = d.mul_(Q).mul_(w_Q), lm.mul_(P).mul_(w_P).neg_()
    if a is not None:
        a.add_(_either(exchanged, of_Q, of_P))
    if needs_textbook:
        textbook = of_Q.add_(of_P)
    return f, a, textbook, kappa


def _kullback_leiblers(
    p: Tensor, q: Tensor, x: Tensor, member: Member, needs_score: bool, needs_textbook: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Weight]:
    _, w_q, w_p = member.columns()
    forward, reverse = member.has_forward_kl, member.has_reverse_kl
    # With u = −|x|, t = expm1(u) and the factor max(p, q), the forward KL has the form `near` where
    # x ≤ 0 and `far` where x > 0. The reverse KL is the forward KL with sides exchanged.
    base = torch.maximum(p, q)
    # Selecting by lerp with a float mask is many times faster on a CPU than torch.where.
    positive = torch.gt(x, 0, out=torch.empty_like(x))
    u = x.abs().neg_()
    t = torch.expm1(u)
    a = None
    if needs_score:
        if forward:
            # p − q = ∓base t, without a subtraction that would cancel.
            a = _weighed_(torch.mul(base, t).copysign_(x).neg_(), w_q)
        if reverse:
            of_reverse = _weighed_(torch.mul(x, p).neg_(), w_p)
            a = of_reverse if a is None else a.add_(of_reverse)
            del of_reverse
    near = (t + 1).mul_(u).sub_(t)
    far = t.sub_(u)
    del u, t
    halves = []
    if forward:
        halves.append(_weighed_(near.lerp(far, positive).clamp_(min=0), w_q))
    if reverse:
        halves.append(_weighed_(far.lerp_(near, positive).clamp_(min=0), w_p))
    f = halves[0] if len(halves) == 1 else halves[0].add_(halves[1])
    f.mul_(base)
    del base, positive, near, far, halves
    textbook = None
    if needs_textbook:
        side = q * w_q if forward else p * -w_p
        if forward and reverse:
            side.sub_(p * w_p)
        textbook = x.mul_(side)
    return f, a, textbook, w_p - w_q


def _either(condition: bool | Tensor, a, b):  # type: ignore[no-untyped-def]
    """a where the condition holds, else b."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def _weighed_(t: Tensor, weight: Weight) -> Tensor:
    """t · weight, in place."""
    return t if not isinstance(weight, Tensor) and weight == 1 else t.mul_(weight)
