"""The family of divergences, entry by entry, in Triton: what `divergence.py` is for PyTorch.

Notation and formulas are those of `opsd_kernels/divergence.py`; this file says how they are
computed, in fp32, on tiles of any shape, compiled and interpreted alike. Triton itself has neither
expm1 nor log1p (libdevice has, but not in the interpreter), so near 0 they are series here, which
pays twice: a series gives eʸ − 1 − y and log(1 + w) − w without subtracting anything, and in these
the values of entries on which the two sides agree are sums of second-order terms:

    with e = eʸ − 1 − y, t = y + e, w = b t, o = log(1 + w) − w, lm = w + o, d = y − lm
    JSD         b q d − (1 − b) p lm   =   p (w d − b e − o)     for b ≤ ½, y = x, or all exchanged
    forward KL  q y − (q − p)          =   p (y t − e)
    reverse KL  (q − p) − p y          =   p e

The right sides are used where |y| < ½; elsewhere the left sides, which do not cancel there.

How exp, log and quotients are made is said once, in `exp`, `log_far` and `quotient`: a GPU has
instructions for 2ʸ, log₂ and 1/w that are right to 2⁻²² of the result, a logarithm near 0 only to
2⁻²² itself. So that one is taken where the result is not near 0: two instructions, where an exact
logarithm takes two dozen.

Where every token has a β of its own, one formula is all of the family: that of the JSD with lm / b
in place of lm. It then has a factor b, which the KLs are without, and is theirs at b = 0, where
lm / b = t; the reverse KL is the forward KL exchanged.

Of halves with weights of their own, in place of b and 1 − b, each is a sum of terms ≥ 0:

    KL(Q‖m)     Q d − (1 − b) (Q − P)   =   Q (e^−d − 1 + d)
    KL(P‖m)     b (Q − P) − P lm        =   −P o
"""

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import builtin
from triton.language.extra.cuda import libdevice

from opsd_kernels import divergence
from opsd_kernels.divergence import Alone, Halves, Member
from opsd_kernels.kernels.records import Divergence

# A constant for the kernels: the interpreter has no machine instructions to choose from.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Which member of the family: a compile-time constant, so that a kernel holds one formula.
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JENSEN_SHANNON = tl.constexpr(2)
# JSD_β for β > ½, computed as JSD_{1−β} with student and teacher exchanged.
JENSEN_SHANNON_EXCHANGED = tl.constexpr(3)
# Any of these, by a β for each row.
MIXED = tl.constexpr(4)
# None of these: log p(ŷ) of a sampled token, whose score is 1[v = ŷ], and G = 1.
LOG_PROB = tl.constexpr(5)
# Nor this, the student's entropy.
ENTROPY = tl.constexpr(6)
# Both KLs, and both halves of a JSD, exchanged as above, by two weights for each row.
BOTH_KLS = tl.constexpr(7)
HALVES = tl.constexpr(8)
HALVES_EXCHANGED = tl.constexpr(9)

HUGE = tl.constexpr(divergence.HUGE)
LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
SATURATED = tl.constexpr(divergence.SATURATED)


def family(member: Member) -> int:
    """What ℓ is, as the kernels know it."""
    if isinstance(member, Alone):
        return (LOG_PROB if member is Alone.LOG_PROB else ENTROPY).value
    if isinstance(member, Tensor):
        return MIXED.value
    if isinstance(member, Halves):
        if member.beta is None:
            return BOTH_KLS.value
        return (HALVES if member.beta <= 0.5 else HALVES_EXCHANGED).value
    if member in (0, 1):
        return (FORWARD_KL if member == 0 else REVERSE_KL).value
    return (JENSEN_SHANNON if member <= 0.5 else JENSEN_SHANNON_EXCHANGED).value


def divergence_record(member: Member, entry_clip: float | None, temperature: float) -> Divergence:
    """The divergence as every kernel is given it; a β of each token, and weights, go with the
    tokens."""
    beta = member.beta if isinstance(member, Halves) else member
    weight = beta if isinstance(beta, int | float) else 0.0
    if weight > 0.5:
        weight = 1 - weight  # in fp64: near 1 this is more than fp32 knows of β
    return Divergence(
        weight,
        entry_clip or 0.0,
        1 / temperature,
        FAMILY=tl.constexpr(family(member)),
        CLIPPED=tl.constexpr(entry_clip is not None),
        KNOWS_G=tl.constexpr(knows_G(member, entry_clip)),
    )


def knows_G(member: Member, entry_clip: float | None) -> bool:
    """Whether G follows from sums that need no second look at the vocabulary: that of the unclipped
    KLs, and of what is of the student alone."""
    if isinstance(member, Alone):
        return True
    if isinstance(member, Halves):
        return member.beta is None and entry_clip is None
    return not isinstance(member, Tensor) and member in (0, 1) and entry_clip is None


def is_wide(member: Member, needs_statistics: bool) -> bool:
    """Whether more is made of an entry than one divergence: statistics, or what is of each row."""
    if isinstance(member, Alone):
        return False
    return needs_statistics or isinstance(member, Tensor | Halves)


def mean_limit(member: Member) -> float:
    """Bound on |d − d_top| in its mean over the student's distribution; 0 if it is not needed.

    The reverse KL's G is that mean, and needs all of it, as does the entropy. The JSDs only guess
    from it, for which differences beyond 32 are no help. They are of logits before temperature.
    """
    if isinstance(member, Alone):
        return 0.0 if member is Alone.LOG_PROB else divergence.HUGE
    if isinstance(member, Halves):
        return divergence.HUGE if member.beta is None else 32.0
    if not isinstance(member, Tensor) and member in (0, 1):
        return 0.0 if member == 0 else divergence.HUGE
    return 32.0


@builtin
def _log2_instruction(w, _semantic=None):
    """log₂ w by the one instruction that the target has for it."""
    if _semantic.builder.options.backend_name == "cuda":
        return libdevice.fast_log2f(w, _semantic=_semantic)
    return tl.log2(w, _semantic=_semantic)


@builtin
def _quotient_instruction(a, b, _semantic=None):
    if _semantic.builder.options.backend_name == "cuda":
        return libdevice.fast_dividef(a, b, _semantic=_semantic)
    return tl.fdiv(a, b, _semantic=_semantic)


@triton.jit
def exp(y, factor=1.0):
    """exp(factor · y). The factor is a scalar, and multiplied by log₂ e but once."""
    return tl.exp2(y * (factor * LOG2_E))


@triton.jit
def log_far(w):
    """log w of fp32 w > 0, off by 2⁻²² or so: for w that are not near 1."""
    if INTERPRETED:
        log2 = tl.log2(w)
    else:
        log2 = _log2_instruction(w)
    return log2 * LN_2


@triton.jit
def quotient(a, b):
    """a / b of fp32, for b whose reciprocal is no denormal number: off by two of the last bit."""
    if INTERPRETED:
        return a / b
    else:
        return _quotient_instruction(a, b)


@triton.jit
def within(d, limit):
    """d within ±limit, and −limit where it is NaN."""
    if INTERPRETED:
        d = tl.where(d == d, d, -limit)  # a GPU's maximum does so by itself
    return tl.minimum(tl.maximum(d, -limit), limit)


@triton.jit
def difference(z_S, z_T):
    """d = z_T − z_S within ±HUGE; −HUGE where both are −∞, an entry without mass on either side."""
    return within(z_T - z_S, HUGE)


@triton.jit
def log_ratio(d, top_S, top_T, log_sums, inverse_temperature):
    """x = log q − log p from d = z_T − z_S.

    L_T − L_S is subtracted in its two parts, the largest logits and log Σ e^(z − top) of either
    side: beside a large top the other, which is all that tells two confident tokens apart, would be
    rounded away.
    """
    return (d - (top_T - top_S)) * inverse_temperature - log_sums


@triton.jit
def log_quotient(sum_S, sum_T):
    """log(sum_T / sum_S), of which nothing is lost where the two are nearly equal."""
    w = (sum_T - sum_S) / sum_S
    o, small = _log1p_beyond(w)
    return tl.where(small, w + o, tl.log(sum_T / sum_S))


@triton.jit
def shift(top_S, p_max, top_T, q_max, log_sums, d_top, mean_d, beta, divergence):
    """The shift c of a row's scores, the top entry's score after it, and whether the row is plain.

    c is what is known of G = Σ a before the vocabulary is seen a second time: the top entry's
    score, and for all others together a guess from their mean log-ratio, which is right to first
    order where student and teacher agree. For the unclipped KLs it is no guess: c = G.

    The null term of a clipped KL trades the rounding of the unclipped mass for that of the clipped.
    Where the top entry is clipped and has most of the mass, the row is better off without.

    Args:
        top_S, p_max, top_T, q_max, log_sums: [BM] the normalizers, see `lse`.
        d_top: [BM] z_T − z_S at the student's top entry.
        mean_d: [BM] Σ p (d − d_top) / T, with d − d_top within ±`mean_limit` entry by entry.
        beta: as in `value_and_score`; [BM] what is of each row.

    Returns:
        c, a_top − c p_top, plain (1 or 0), [BM] each.
    """
    FAMILY: tl.constexpr = divergence.FAMILY
    CLIPPED: tl.constexpr = divergence.CLIPPED
    inverse_temperature, entry_clip = divergence.inverse_temperature, divergence.entry_clip
    x = log_ratio(d_top, top_S, top_T, log_sums, inverse_temperature)
    p, q = p_max, exp(d_top + (top_S - top_T), inverse_temperature) * q_max
    p_others = 1.0 - p
    no = tl.zeros(p.shape, tl.float32)
    plain = no
    # Where the top entry has nearly all the mass, 1 − p_top has few digits left, and
    # c = a_top / p_top, which needs none of them, is as near to G.
    guessed = p <= 0.9
    _f, a, excess = value_and_score(p, q, x, no, beta, divergence)
    if FAMILY == FORWARD_KL:
        # Σ (p − q) over the others; with a clip, besides, how much of q the clip may have taken,
        # which is what G then is: all that the student's top entry does not account for.
        a_others = -unclipped(p, q, x, beta, FAMILY)[1]
        if CLIPPED:
            plain = tl.where((excess > 0) & (q > 0.5), 1.0, 0.0)
            a_others += tl.where(excess > 0, 0.0, tl.maximum(1.0 - q / p, 0.0))
    elif FAMILY == REVERSE_KL:
        a_others = -(p_others * x + mean_d)
        if CLIPPED:
            plain = tl.where((excess > 0) & (p > 0.5), 1.0, 0.0)
            # The mean knows nothing of the clip: of no use where that must have taken something.
            guessed = guessed & ~(excess > 0) & (a_others <= entry_clip)
    elif FAMILY == BOTH_KLS:
        _b, w_q, w_p = beta
        of_reverse = -w_p * (p_others * x + mean_d)
        a_others = of_reverse - w_q * _kullback_leibler(p, q, x, FORWARD_KL)[1]
        if CLIPPED:
            plain = tl.where((excess > 0) & (tl.maximum(p, q) > 0.5), 1.0, 0.0)
            a_others += w_q * tl.where(excess > 0, 0.0, tl.maximum(1.0 - q / p, 0.0))
            guessed = guessed & ~(excess > 0) & (of_reverse <= entry_clip)
    else:
        x_others = x + mean_d / tl.maximum(p_others, 1e-30)
        one = no + 1.0
        a_others = p_others * unclipped(one, one, x_others, beta, FAMILY)[1]
        if CLIPPED:
            # Where the top entry is clipped all may be, and scores of 0 are to stay 0.
            clipped = excess > 0
            if FAMILY == MIXED:
                forward, reverse = beta == 0, beta == 1
                Q = tl.where(forward, q, p)
                plain = tl.where((forward | reverse) & clipped & (Q > 0.5), 1.0, 0.0)
                a_others += tl.where(forward & ~clipped, tl.maximum(1.0 - q / p, 0.0), 0.0)
                guessed = guessed & ~(reverse & (a_others > entry_clip)) & (forward | ~clipped)
            else:
                guessed = guessed & ~clipped
                if FAMILY != JENSEN_SHANNON and FAMILY != JENSEN_SHANNON_EXCHANGED:
                    plain = tl.where(clipped & (tl.maximum(p, q) > 0.5), 1.0, 0.0)
    c, s_top = a + a_others, p_others * a - p * a_others
    if CLIPPED or (FAMILY != FORWARD_KL and FAMILY != REVERSE_KL and FAMILY != BOTH_KLS):
        c = tl.where(guessed, c, a / p)
        s_top = tl.where(guessed, s_top, 0.0)
    return c, s_top, plain


@triton.jit
def value_and_score(p, q, x, plain, beta, divergence):
    """Value f and score a of entries, and what the clip took of f; for the KLs f and a carry the
    null term, ±(p − q).

    Args:
        p, q, x: fp32 tiles: student, teacher and log-ratio.
        plain: 1 for rows whose clipped KL is better summed without the null term, else 0.
        beta: from `beta_of`, as wide as the rows of the tiles.
    """
    FAMILY: tl.constexpr = divergence.FAMILY
    entry_clip = divergence.entry_clip
    f, a, textbook, null, clipped_score = unclipped(p, q, x, beta, FAMILY)
    excess = 0.0
    if divergence.CLIPPED:
        clipped = textbook > entry_clip
        excess = tl.where(clipped, textbook - entry_clip, 0.0)
        if FAMILY == JENSEN_SHANNON or FAMILY == JENSEN_SHANNON_EXCHANGED:
            f = tl.where(clipped, entry_clip, f)
            a = tl.where(clipped, 0.0, a)
        else:
            f = tl.where(plain > 0, textbook, f)
            f = tl.where(clipped, entry_clip + (1.0 - plain) * null, f)
            a = tl.where(clipped, clipped_score, a)
    return f, a, excess


@triton.jit
def unclipped(p, q, x, beta, FAMILY: tl.constexpr):
    """f and a without a clip; and what a clip needs of them: the value without the null term, that
    term, and the score of a clipped entry, which for JSDs are f, 0 and 0."""
    if FAMILY == FORWARD_KL:
        f, a = _kullback_leibler(p, q, x, FAMILY)
        textbook, null, clipped_score = q * x, a, p
    elif FAMILY == REVERSE_KL:
        f, a = _kullback_leibler(p, q, x, FAMILY)
        textbook, null, clipped_score = a, q - p, -p
    elif FAMILY == MIXED:
        f, a, textbook, null, clipped_score = _any_divergence(p, q, x, beta)
    elif FAMILY == BOTH_KLS:
        _b, w_q, w_p = beta
        forward, a_forward = _kullback_leibler(p, q, x, FORWARD_KL)
        reverse, a_reverse = _kullback_leibler(p, q, x, REVERSE_KL)
        f, a = w_q * forward + w_p * reverse, w_q * a_forward + w_p * a_reverse
        textbook, null = w_q * (q * x) + w_p * a_reverse, (w_q - w_p) * a_forward
        clipped_score = (w_q - w_p) * p
    elif FAMILY == HALVES or FAMILY == HALVES_EXCHANGED:
        f, a, textbook, null, clipped_score = _halves(p, q, x, beta, FAMILY == HALVES_EXCHANGED)
    else:
        EXCHANGED: tl.constexpr = FAMILY == JENSEN_SHANNON_EXCHANGED
        f, a = _jensen_shannon(p, q, x, beta, EXCHANGED)
        textbook, null, clipped_score = f, 0.0, 0.0
    return f, a, textbook, null, clipped_score


@triton.jit
def kullback_leiblers(p, q, x):
    """The terms of the forward and of the reverse KL."""
    return _kullback_leibler(p, q, x, FORWARD_KL)[0], _kullback_leibler(p, q, x, REVERSE_KL)[0]


@triton.jit
def _jensen_shannon(p, q, x, b, EXCHANGED: tl.constexpr):
    if EXCHANGED:
        P, Q, y = q, p, -x
    else:
        P, Q, y = p, q, x
    y = _at_most(y, SATURATED)
    e, near = _expm1_beyond(y)
    t = tl.where(near, y + e, exp(y) - 1.0)
    w = b * t
    o, small = _log1p_beyond(w)
    lm = tl.where(small, w + o, log_far(1.0 + w))  # log(m/P)
    d = y - lm  # log(Q/m)
    of_Q, of_P = b * d * Q, (b - 1.0) * lm * P
    f = tl.where(near, P * ((w * d - o) - b * e), of_Q + of_P)
    if EXCHANGED:
        a = of_Q
    else:
        a = of_P
    return _at_least_zero(f), a


@triton.jit
def _kullback_leibler(p, q, x, FAMILY: tl.constexpr):
    e, near = _expm1_beyond(x)
    q_minus_p = tl.where(near, p * (x + e), q - p)
    if FAMILY == FORWARD_KL:
        f = tl.where(near, p * (x * (x + e) - e), q * x - q_minus_p)
        a = -q_minus_p
    else:
        f = tl.where(near, p * e, q_minus_p - p * x)
        a = -p * x
    return _at_least_zero(f), a


@triton.jit
def _any_divergence(p, q, x, beta):
    """`unclipped` for a β of each row."""
    exchanged = beta > 0.5
    b = tl.where(exchanged, 1.0 - beta, beta)
    is_kl = b == 0
    per_b = tl.where(is_kl, 0.0, 1.0 / tl.maximum(b, 1e-30))
    P, Q, y = tl.where(exchanged, q, p), tl.where(exchanged, p, q), tl.where(exchanged, -x, x)
    y_held = _at_most(y, SATURATED)
    y = tl.where(is_kl, y, y_held)
    e, near = _expm1_beyond(y)
    t = tl.where(near, y + e, exp(y_held) - 1.0)
    w = b * t
    o, small = _log1p_beyond(w)
    o_b = o * per_b
    lm_b = tl.where(small, t + o_b, log_far(1.0 + w) * per_b)  # log(m/P) / b
    P_lm_b = tl.where(is_kl & ~near, Q - P, P * lm_b)
    d = y - b * lm_b  # log(Q/m)
    factor = tl.where(is_kl, 1.0, b)
    f = factor * tl.where(near, P * (t * d - e - o_b), Q * d - (1.0 - b) * P_lm_b)
    a = factor * tl.where(exchanged, Q * d, (b - 1.0) * P_lm_b)
    f = _at_least_zero(f)
    textbook = tl.where(is_kl, Q * y, f)
    null = tl.where(is_kl, -P_lm_b, 0.0)
    clipped_score = tl.where(is_kl, tl.where(exchanged, -Q, P), 0.0)
    return f, a, textbook, null, clipped_score


@triton.jit
def _halves(p, q, x, beta, EXCHANGED: tl.constexpr):
    """`unclipped` for weights of both halves."""
    b, w_q, w_p = beta
    if EXCHANGED:
        P, Q, y, w_P, w_Q = q, p, -x, w_q, w_p
    else:
        P, Q, y, w_P, w_Q = p, q, x, w_p, w_q
    y = _at_most(y, SATURATED)
    e, near = _expm1_beyond(y)
    t = tl.where(near, y + e, exp(y) - 1.0)
    w = b * t
    o, small = _log1p_beyond(w)
    lm = tl.where(small, w + o, log_far(1.0 + w))  # log(m/P)
    d = y - lm  # log(Q/m)
    Q_minus_P = tl.where(near, P * t, Q - P)
    of_Q = tl.where(near, Q * _expm1_beyond(-d)[0], Q * d - (1.0 - b) * Q_minus_P)
    of_P = tl.where(near & small, -P * o, b * Q_minus_P - P * lm)
    f = w_Q * _at_least_zero(of_Q) + w_P * _at_least_zero(of_P)
    textbook = w_Q * (Q * d) - w_P * (P * lm)
    # κ, and what null term and shift are made of: (q − m)/m, in the exchanged frame (P − m)/m.
    off = quotient(t, 1.0 + w)
    if EXCHANGED:
        kappa = w_q * -b + w_p * (1.0 - b)
        a = Q * (w_Q * d - kappa * (b * off))
        null = -kappa * Q_minus_P
        clipped_score = -kappa * Q
    else:
        kappa = w_p * b - w_q * (1.0 - b)
        a = P * (kappa * ((1.0 - b) * off) - w_P * lm)
        null = kappa * Q_minus_P
        clipped_score = -kappa * P
    return f, a, textbook, null, clipped_score


@triton.jit
def beta_of(tokens, row, mask, divergence):
    """β of rows [BM], one for all; or where each row has its own, this; or β, w_q and w_p. The mask
    is None where all rows exist."""
    FAMILY: tl.constexpr = divergence.FAMILY
    if FAMILY == MIXED:
        return _load(tokens.beta + row, mask, 0.5)
    elif FAMILY == BOTH_KLS or FAMILY == HALVES or FAMILY == HALVES_EXCHANGED:
        return (
            divergence.beta,
            _load(tokens.w_q + row, mask, 0.0),
            _load(tokens.w_p + row, mask, 0.0),
        )
    else:
        return divergence.beta


@triton.jit
def _load(ptrs, mask, other):
    if mask is None:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=other)


@triton.jit
def as_column(beta, divergence):
    """What `beta_of` found, [BM, 1]."""
    FAMILY: tl.constexpr = divergence.FAMILY
    if FAMILY == MIXED:
        return beta[:, None]
    elif FAMILY == BOTH_KLS or FAMILY == HALVES or FAMILY == HALVES_EXCHANGED:
        b, w_q, w_p = beta
        return b, w_q[:, None], w_p[:, None]
    else:
        return beta


@triton.jit
def _at_least_zero(f):
    return tl.maximum(f, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_most(y, high):
    return tl.minimum(y, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _expm1_beyond(y):
    """eʸ − 1 − y where y is near 0, and where that is."""
    # y² (1/2! + y/3! + … + y⁶/8!): what is left out is below 2⁻²⁵ of the sum.
    series = 1 / 5040 + y * (1 / 40320)
    series = 1 / 720 + y * series
    series = 1 / 120 + y * series
    series = 1 / 24 + y * series
    series = 1 / 6 + y * series
    series = 1 / 2 + y * series
    return y * y * series, tl.abs(y) < 0.5


@triton.jit
def _log1p_beyond(w):
    """log(1 + w) − w where w is near 0, and where that is."""
    # log(1 + w) = 2 atanh(r) = 2 (r + r³/3 + … + r⁹/9) with r = w / (2 + w), and 2 r − w = −w r.
    r = quotient(w, 2.0 + w)
    r2 = r * r
    series = 2 / 7 + r2 * (2 / 9)
    series = 2 / 5 + r2 * series
    series = 2 / 3 + r2 * series
    return r * (r2 * series - w), tl.abs(w) < 0.35
