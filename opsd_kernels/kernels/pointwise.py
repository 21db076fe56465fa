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
"""

import math

import triton
import triton.language as tl
from torch import Tensor
from triton.language.core import builtin
from triton.language.extra.cuda import libdevice

from opsd_kernels import divergence
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

HUGE = tl.constexpr(divergence.HUGE)
LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))
SATURATED = tl.constexpr(divergence.SATURATED)


def family(beta: float | Tensor | None) -> int:
    """The member of the family that β selects, as the kernels know it."""
    if beta is None:
        return LOG_PROB.value
    if isinstance(beta, Tensor):
        return MIXED.value
    if beta in (0, 1):
        return (FORWARD_KL if beta == 0 else REVERSE_KL).value
    return (JENSEN_SHANNON if beta <= 0.5 else JENSEN_SHANNON_EXCHANGED).value


def divergence_record(
    beta: float | Tensor | None, entry_clip: float | None, temperature: float
) -> Divergence:
    """The divergence as every kernel is given it; a β of each token goes with the tokens."""
    weight = 0.0 if beta is None or isinstance(beta, Tensor) else beta
    if weight > 0.5:
        weight = 1 - weight  # in fp64: near 1 this is more than fp32 knows of β
    return Divergence(
        weight,
        entry_clip or 0.0,
        1 / temperature,
        FAMILY=tl.constexpr(family(beta)),
        CLIPPED=tl.constexpr(entry_clip is not None),
        KNOWS_G=tl.constexpr(knows_G(beta, entry_clip)),
    )


def knows_G(beta: float | Tensor | None, entry_clip: float | None) -> bool:
    """Whether G follows from sums that need no second look at the vocabulary: that of the unclipped
    KLs, and that of log p(ŷ)."""
    if beta is None:
        return True
    return not isinstance(beta, Tensor) and beta in (0, 1) and entry_clip is None


def is_wide(beta: float | Tensor | None, needs_statistics: bool) -> bool:
    """Whether more is made of an entry than one divergence: statistics, or a β of each row."""
    return isinstance(beta, Tensor) or (needs_statistics and beta is not None)


def mean_limit(beta: float | Tensor | None) -> float:
    """Bound on |d − d_top| in its mean over the student's distribution; 0 if it is not needed.

    The reverse KL's G is that mean, and needs all of it. The JSDs only guess from it, for which
    differences beyond 32 are no help. They are of logits before temperature.
    """
    if beta is None:
        return 0.0
    if not isinstance(beta, Tensor) and beta in (0, 1):
        return 0.0 if beta == 0 else divergence.HUGE
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
        beta: as in `value_and_score`; [BM] if MIXED.

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
    c, s_top = a + a_others, p_others * a - p * a_others
    if CLIPPED or (FAMILY != FORWARD_KL and FAMILY != REVERSE_KL):
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
        beta: that of each row if MIXED, else `divergence.beta`.
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
