"""The family of divergences, entry by entry, in Triton: what `divergence.py` is for PyTorch.

Notation and formulas are those of `opsd_kernels/divergence.py`. This file computes them in fp32, on
tiles of any shape, compiled and interpreted alike. Triton has neither expm1 nor log1p (libdevice
has both, but the interpreter has no libdevice), so near 0 they are series here. That pays twice: a
series gives e = eʸ − 1 − y and o = log(1 + w) − w without a subtraction, and near agreement every
value is a sum of such second-order terms. Sides are exchanged so that b ≤ ½; P, Q and y are p, q
and x after that, and t = eʸ − 1, w = b t, lm = log(1 + w) = log(m/P), d = y − lm = log(Q/m):

    KL(Q‖m)       Q d − (1 − b) (Q − P)    =   P (t d − e − o)
    KL(P‖m)       b (Q − P) − P lm         =   −P o
    JSD           b Q d − (1 − b) P lm     =   P (w d − b e − o)
    forward KL    q x − (q − p)            =   p (t x − e)             with y = x
    reverse KL    (q − p) − p x            =   p e

The right sides are used near 0: |y| < ½, or |w| < 0.35 for what depends on w alone. Elsewhere the
left sides are used; nothing cancels in them there.

`exp`, `log_far` and `quotient` are the only places that choose instructions. A GPU has instructions
for 2ʸ, log₂ and 1/w that are right to 2⁻²² of the result; but a logarithm near 0 is right to an
absolute 2⁻²² only. So that instruction is used where the result is not near 0: it takes two
instructions, an exact logarithm takes two dozen.
"""

import math

import triton
import triton.language as tl
from triton.language.core import builtin
from triton.language.extra.cuda import libdevice

from .. import divergence
from ..divergence import Family, Member
from .records import Formula

# A constant for the kernels: the interpreter has no machine instructions to choose from.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# The families are compile-time constants, so that a kernel holds one formula.
JSD, MIXTURE, KLS, LOG_PROB, ENTROPY, LOG_SUM = (tl.constexpr(family.value) for family in Family)
HUGE, SATURATED = tl.constexpr(divergence.HUGE), tl.constexpr(divergence.SATURATED)
LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))


def formula_of(member: Member, temperature: float) -> Formula:
    """The member of the family as every kernel gets it; what differs from token to token is in
    `PerToken`."""
    beta, w_q, w_p = (
        value if isinstance(value, float) else 0.0
        for value in (member.beta, member.w_q, member.w_p)
    )
    exchanged = beta > 0.5
    return Formula(
        1 - beta if exchanged else beta,  # in fp64: near 1 that is more than fp32 knows of β
        w_q,
        w_p,
        member.entry_clip or 0.0,
        1 / temperature,
        FAMILY=tl.constexpr(member.family.value),
        EXCHANGED=tl.constexpr(exchanged),
        BETA_PER_TOKEN=tl.constexpr(member.beta_per_token),
        FORWARD=tl.constexpr(member.has_forward_kl),
        REVERSE=tl.constexpr(member.has_reverse_kl),
        CLIPPED=tl.constexpr(member.entry_clip is not None),
        KNOWS_G=tl.constexpr(member.knows_G),
    )


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
    """exp(factor · y), the factor a scalar, which is multiplied by log₂ e once."""
    return tl.exp2(y * (factor * LOG2_E))


@triton.jit
def log_far(w):
    """log w of fp32 w > 0 that is not near 1; the error is about 2⁻²²."""
    if INTERPRETED:
        log2 = tl.log2(w)
    else:
        log2 = _log2_instruction(w)
    return log2 * LN_2


@triton.jit
def quotient(a, b):
    """a / b of fp32, for b whose reciprocal is no denormal number; the error is two of the last
    bit."""
    if INTERPRETED:
        return a / b
    else:
        return _quotient_instruction(a, b)


@triton.jit
def within(d, limit):
    """d clamped to ±limit; −limit where d is NaN."""
    if INTERPRETED:
        d = tl.where(d == d, d, -limit)  # a GPU's maximum does so itself
    return tl.minimum(tl.maximum(d, -limit), limit)


@triton.jit
def difference(z_S, z_T):
    """d = z_T − z_S clamped to ±HUGE; −HUGE where both are −∞: no side has mass there."""
    return within(z_T - z_S, HUGE)


@triton.jit
def log_ratio(d, top_S, top_T, log_sums, inverse_temperature):
    """x = log q − log p from d = z_T − z_S.

    L_T − L_S is subtracted in two parts, from the largest logits and from log Σ e^(z − top) of both
    sides. Added to a large top the latter, the only difference between two confident tokens, would
    be rounded away.
    """
    return (d - (top_T - top_S)) * inverse_temperature - log_sums


@triton.jit
def log_quotient(sum_S, sum_T):
    """log(sum_T / sum_S), accurate where the two are nearly equal."""
    w = (sum_T - sum_S) / sum_S
    o, small = _log1p_beyond(w)
    return tl.where(small, w + o, tl.log(sum_T / sum_S))


@triton.jit
def shift(top_S, p_max, top_T, q_max, log_sums, d_top, mean_d, parameters, formula):
    """The shift c of a row's scores, the top entry's score after it, and whether the values of the
    row are summed without the null term.

    c is what is known of G = Σ a before the second pass over the vocabulary: the score of the top
    entry, and for all others together a guess from their mean log-ratio, which is right to first
    order where student and teacher agree. For the unclipped KLs it is no guess: c = G.

    The null term of a clipped value trades the rounding of the unclipped mass for that of the
    clipped mass. A row whose top entry is clipped and has most of the mass is more accurate
    without.

    Args:
        top_S, p_max, top_T, q_max, log_sums: [BM] the normalizers, see `lse`.
        d_top: [BM] z_T − z_S at the student's top entry.
        mean_d: [BM] Σ p (d − d_top) / T, with d − d_top within ±`Member.mean_limit` entry by entry.
        parameters: [BM] from `parameters_of`.

    Returns:
        c, a_top − c p_top, whether there is no null term (1 or 0), [BM] each.
    """
    CLIPPED: tl.constexpr = formula.CLIPPED
    FAMILY: tl.constexpr = formula.FAMILY
    inverse_temperature, entry_clip = formula.inverse_temperature, formula.entry_clip
    x = log_ratio(d_top, top_S, top_T, log_sums, inverse_temperature)
    p, q = p_max, exp(d_top + (top_S - top_T), inverse_temperature) * q_max
    p_others = 1.0 - p
    zero = tl.zeros(p.shape, tl.float32)
    without_null = zero
    # Where the top entry has nearly all the mass, 1 − p_top has few digits left, and
    # c = a_top / p_top, which needs none of them, is as near to G.
    guessed = p <= 0.9
    _f, a, excess = value_and_score(p, q, x, zero, parameters, formula)
    _beta, w_q, w_p = parameters
    # a_others is Σ a over all but the top entry; `from_mean` is what the mean log-ratio says of it.
    if FAMILY == KLS:
        from_mean = -w_p * (p_others * x + mean_d)
        # Σ (p − q) over all entries is 0.
        a_others = from_mean + w_q * unclipped(p, q, x, parameters, formula)[4]
    else:
        x_others = x + mean_d / tl.maximum(p_others, 1e-30)
        q_others = exp(_at_most(x_others, SATURATED))
        from_mean = p_others * unclipped(zero + 1.0, q_others, x_others, parameters, formula)[1]
        a_others = from_mean
    if CLIPPED:
        clipped = excess > 0
        if FAMILY == JSD:
            guessed = guessed & ~clipped
        else:
            kl_q, kl_p = kl_weights(parameters, formula)
            without_null = tl.where(clipped & (tl.maximum(p, q) > 0.5), 1.0, 0.0)
            # A clipped entry of the forward KL has score p in place of p − q. The mass q of all of
            # them is 1 − q/p if the others have the ratio q/p of the top entry.
            a_others += kl_q * tl.where(clipped, 0.0, tl.maximum(1.0 - q / p, 0.0))
            # The mean log-ratio does not know what the clip took off. Where that must be much it is
            # no basis for a guess, except for the forward KL, which needs no mean.
            guessed = guessed & (~clipped | ((kl_q != 0) & (w_p == 0)))
            guessed = guessed & ((kl_p == 0) | (from_mean <= entry_clip))
    c, s_top = a + a_others, p_others * a - p * a_others
    if not formula.KNOWS_G:
        c = tl.where(guessed, c, a / p)
        s_top = tl.where(guessed, s_top, 0.0)
    return c, s_top, without_null


@triton.jit
def value_and_score(p, q, x, without_null, parameters, formula):
    """Value f and score a of entries, both with the null term, and how much the clip took off f.

    Args:
        p, q, x: fp32 tiles: student, teacher and log-ratio.
        without_null: 1 for rows whose clipped values are summed without the null term, else 0.
        parameters: from `parameters_of`, as wide as the rows of the tiles.
    """
    entry_clip = formula.entry_clip
    f, a, textbook, kappa, q_minus_p = unclipped(p, q, x, parameters, formula)
    excess = 0.0
    if formula.CLIPPED:
        clipped = textbook > entry_clip
        excess = tl.where(clipped, textbook - entry_clip, 0.0)
        if formula.FAMILY == JSD:
            # On an NVIDIA GPU three instructions an entry fewer than a selection by `clipped`.
            f = _at_most(f, entry_clip)
            a = tl.where(clipped, 0.0, a)
        else:
            f = tl.where(without_null > 0, textbook, f)
            f = tl.where(clipped, entry_clip + (1.0 - without_null) * (kappa * q_minus_p), f)
            a = tl.where(clipped, -kappa * p, a)
    return f, a, excess


@triton.jit
def unclipped(p, q, x, parameters, formula):
    """f and a without a clip; and what a clip needs: the textbook value, which it is defined on, κ
    of the null term κ (q − p), and q − p. JSDs have no null term."""
    beta, w_q, w_p = parameters
    if formula.FAMILY == KLS:
        forward, reverse, q_minus_p = kullback_leiblers(p, q, x)
        if formula.FORWARD and formula.REVERSE:
            f, a = w_q * forward + w_p * reverse, -(w_q * q_minus_p + w_p * (p * x))
            textbook, kappa = w_q * (q * x) - w_p * (p * x), w_p - w_q
        elif formula.FORWARD:
            f, a, textbook, kappa = w_q * forward, -w_q * q_minus_p, w_q * (q * x), -w_q
        else:
            f, a, textbook, kappa = w_p * reverse, -w_p * (p * x), -w_p * (p * x), w_p
    elif formula.FAMILY == MIXTURE:
        f, a, textbook, kappa, q_minus_p = _mixture(p, q, x, beta, w_q, w_p, formula)
    else:
        f, a = _jensen_shannon(p, q, x, formula.beta, formula.EXCHANGED)
        textbook, kappa, q_minus_p = f, 0.0, 0.0
    return f, a, textbook, kappa, q_minus_p


@triton.jit
def kullback_leiblers(p, q, x):
    """The values of the forward and of the reverse KL, and q − p."""
    e, near = _expm1_beyond(x)
    q_minus_p = tl.where(near, p * (x + e), q - p)
    forward = tl.where(near, p * (x * (x + e) - e), q * x - q_minus_p)
    reverse = tl.where(near, p * e, q_minus_p - p * x)
    return _at_least_zero(forward), _at_least_zero(reverse), q_minus_p


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
def _mixture(p, q, x, beta, w_q, w_p, formula):
    """`unclipped` of both halves of a JSD by weights. A KL is the half with b = 0."""
    b, exchanged = beta, formula.EXCHANGED
    highest = SATURATED
    if formula.BETA_PER_TOKEN:
        exchanged = beta > 0.5
        b = tl.where(exchanged, 1.0 - beta, beta)
        highest = tl.where(b == 0, HUGE, SATURATED)  # a KL does not saturate
    P, Q = tl.where(exchanged, q, p), tl.where(exchanged, p, q)
    w_P, w_Q = tl.where(exchanged, w_q, w_p), tl.where(exchanged, w_p, w_q)
    y = _at_most(tl.where(exchanged, -x, x), highest)
    e, near = _expm1_beyond(y)
    t = tl.where(near, y + e, exp(_at_most(y, SATURATED)) - 1.0)
    w = b * t
    o, small = _log1p_beyond(w)
    lm = tl.where(small, w + o, log_far(1.0 + w))  # log(m/P)
    d = y - lm  # log(Q/m)
    Q_minus_P = tl.where(near, P * t, Q - P)
    of_Q = tl.where(near, P * (t * d - e - o), Q * d - (1.0 - b) * Q_minus_P)
    of_P = tl.where(small, -P * o, b * Q_minus_P - P * lm)
    f = w_Q * _at_least_zero(of_Q) + w_P * _at_least_zero(of_P)
    of_Q, of_P = w_Q * (Q * d), -w_P * (P * lm)
    # κ p (q − m)/m is κ (1 − b) (Q − P)/(1 + w), or with sides exchanged −κ b Q t/(1 + w).
    kappa = tl.where(exchanged, w_q * -b + w_p * (1.0 - b), w_p * b - w_q * (1.0 - b))
    off = quotient(tl.where(exchanged, Q * t, Q_minus_P), 1.0 + w)
    a = tl.where(exchanged, -b, 1.0 - b) * kappa * off + tl.where(exchanged, of_Q, of_P)
    return f, a, of_Q + of_P, kappa, tl.where(exchanged, -Q_minus_P, Q_minus_P)


@triton.jit
def parameters_of(tokens, row, mask, formula):
    """β, w_q and w_p of rows, [BM] each. The mask is None where all rows exist."""
    zero = tl.zeros(row.shape, tl.float32)
    beta, w_q, w_p = zero + formula.beta, zero + formula.w_q, zero + formula.w_p
    if tokens.beta is not None:
        beta = _load(tokens.beta + row, mask, 0.5)
        is_kl = (beta == 0) | (beta == 1)
        w_q, w_p = tl.where(is_kl, 1.0 - beta, beta), tl.where(is_kl, beta, 1.0 - beta)
    if tokens.w_q is not None:
        w_q, w_p = _load(tokens.w_q + row, mask, 0.0), _load(tokens.w_p + row, mask, 0.0)
    return beta, w_q, w_p


@triton.jit
def kl_weights(parameters, formula):
    """The weights of KL(q‖p) and KL(p‖q) in ℓ, of the shape of the parameters."""
    beta, w_q, w_p = parameters
    if formula.BETA_PER_TOKEN:
        w_q, w_p = tl.where(beta == 0, 1.0, 0.0), tl.where(beta == 1, 1.0, 0.0)
    elif formula.FAMILY != KLS:
        w_q, w_p = tl.zeros(beta.shape, tl.float32), tl.zeros(beta.shape, tl.float32)
    return w_q, w_p


@triton.jit
def infinite_where(f, d, z_S, parameters, formula):
    """f of entries, but infinite where one side has no mass, the other has some, and the KL to the
    former counts; −∞ if no weight is positive."""
    w_q, w_p = kl_weights(parameters, formula)
    limit = tl.where((w_q <= 0) & (w_p <= 0), float("-inf"), float("inf"))
    if formula.FORWARD:
        f = tl.where((w_q != 0) & (d >= HUGE), limit, f)
    if formula.REVERSE:
        f = tl.where((w_p != 0) & (d <= -HUGE) & (z_S > -HUGE), limit, f)
    return f


@triton.jit
def columns_of(parameters):
    """Parameters of rows [BM] as columns [BM, 1]."""
    beta, w_q, w_p = parameters
    return beta[:, None], w_q[:, None], w_p[:, None]


@triton.jit
def _load(ptrs, mask, other):
    if mask is None:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=other)


@triton.jit
def _at_least_zero(f):
    return tl.maximum(f, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_most(y, high):
    return tl.minimum(y, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _expm1_beyond(y):
    """eʸ − 1 − y, and where y is near enough to 0 for it."""
    # y² (1/2! + y/3! + … + y⁶/8!): where |y| < ½ the rest is below 2⁻²⁴ of the sum.
    series = 1 / 5040 + y * (1 / 40320)
    series = 1 / 720 + y * series
    series = 1 / 120 + y * series
    series = 1 / 24 + y * series
    series = 1 / 6 + y * series
    series = 1 / 2 + y * series
    return y * y * series, tl.abs(y) < 0.5


@triton.jit
def _log1p_beyond(w):
    """log(1 + w) − w, and where w is near enough to 0 for it."""
    # log(1 + w) = 2 atanh(r) = 2 (r + r³/3 + … + r⁹/9) with r = w / (2 + w), and 2 r − w = −w r.
    # Where |w| < 0.35, |r| is below 0.22 and the rest below 2⁻²³ of the sum.
    r = quotient(w, 2.0 + w)
    r2 = r * r
    series = 2 / 7 + r2 * (2 / 9)
    series = 2 / 5 + r2 * series
    series = 2 / 3 + r2 * series
    return r * (r2 * series - w), tl.abs(w) < 0.35
