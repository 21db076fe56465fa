"""finish: a chunk's sums and accumulators into ℓ and dh_S.

    ℓ = Σ f,   G − c = Σ s,   dh_S = (A − (G − c) P + g_top W_top) / T

A and P were summed without the student's top entry (see `pair`), whose gradient is

    g_top = s_top − (G − c) p_top = s_top (1 − p_top) − p_top Σ_{v≠top} s

It multiplies W_top in fp32: the entry with the most mass is never rounded. Where c = G, which makes
P superfluous, that is s_top; or −Σ_{v≠top} s, for the gradient sums to zero over the vocabulary.
The latter is right for a confident token, whose s_top is a difference of numbers near 1. Otherwise
it would put the common rounding error of all other entries on this one. Where ℓ is +∞ (an unclipped
KL) the gradient is 0.

Where the student's logits are capped, g_top is multiplied by the slope of the cap at that entry.

For log p(ŷ) of a sampled token ŷ takes the top entry's place, and g_ŷ = 1 − p(ŷ) = −Σ_{v≠ŷ} s.

A policy term −A log p(ŷ) adds −A to the gradient at ŷ, in fp32 too. It has made c lower by A, so
that Σ s is larger by A than G − c, and of its part of g_top the terms that are near 1 cancel:
g_top = (1 − p_top) (G − c) − Σ_{v≠top} s, the latter with the −A of ŷ.

Where the gradient is made in backward instead (see `gradient`), what it is made of is written: the
`Stats` of a row, with G and g_top.
"""

import triton
import triton.language as tl

from opsd_kernels import divergence
from opsd_kernels.kernels.logits_tile import round_to
from opsd_kernels.kernels.lse import P_MAX, Q_MAX, S_TOP, STATS, STATS_OF_TARGETS, C
from opsd_kernels.kernels.pair import SCORE, SUMS, SUMS_OF_STATISTICS, VALUE, top_of
from opsd_kernels.kernels.pointwise import (
    ENTROPY,
    LOG_PROB,
    kl_weights,
    parameters_of,
)

# Fields of `statistics`: the first five in the order of `sums`, from here on in that of `stats`.
LOG_P = tl.constexpr(divergence.LOG_P)
# Rows of a program, and features at a time.
BM, BD = tl.constexpr(16), tl.constexpr(256)


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["R", "stride", "stride_statistics"])
def finish_kernel(
    results,
    accumulated,
    W,
    student,
    scored,
    tokens,
    R,
    stride,
    stride_statistics,
    formula,
    SLOTS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Grid (row tiles).

    Writes:
        results: of statistics what `scored.STATISTICS` are, and what there is of sampled tokens.

    Reads:
        accumulated: A may lie where dh_S is to be.
        W: [V, D], and of it `student`, a `Side`.
        scored, tokens: what `pair` and `lse` wrote, and what was given.
        stride_statistics: of `results.statistics` and `results.stats`.
        SLOTS: a power of two, at least `scored.slots`.
        OPERAND: the dtype whose rounding W has.
    """
    inverse_temperature = formula.inverse_temperature
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = row < R
    keep = exists
    if tokens.keep is not None:
        keep = exists & (tl.load(tokens.keep + row, mask=exists, other=0) != 0)
    slot = tl.arange(0, SLOTS)
    at = slot[:, None] * stride + row[None, :]
    present = (slot[:, None] < scored.slots) & keep[None, :]
    field = scored.slots * stride
    p_max = tl.load(tokens.stats + P_MAX * stride + row, mask=keep, other=1.0)
    if formula.FAMILY == LOG_PROB:
        loss = tl.load(tokens.stats + STATS * stride + row, mask=keep, other=0.0)
    elif formula.FAMILY == ENTROPY:
        loss = tl.load(tokens.stats + C * stride + row, mask=keep, other=0.0) - tl.log(p_max)
    else:
        loss = summed(VALUE, scored.sums, field, at, present)
    whole = loss  # what a clip takes of
    if tokens.advantages is not None:
        advantage = tl.load(tokens.advantages + row, mask=keep, other=0.0)
        log_p = tl.load(tokens.stats + STATS * stride + row, mask=keep, other=0.0)
        loss = with_policy(loss, advantage, log_p)
    tl.store(results.loss + row, loss, mask=exists)

    if results.statistics is not None:
        to = results.statistics + row
        if formula.FAMILY != LOG_PROB:
            q_max = tl.load(tokens.stats + Q_MAX * stride + row, mask=keep, other=1.0)
            terms = ()
            for i in tl.static_range(SUMS, SUMS + SUMS_OF_STATISTICS - 1 + formula.CLIPPED):
                terms = terms + (summed(i, scored.sums, field, at, present),)
            parameters = parameters_of(tokens, row, exists, formula)
            found = statistics(terms, whole, p_max, q_max, parameters, formula)
            for i in tl.static_range(len(found)):
                tl.store(to + i * stride_statistics, found[i], mask=exists)
        if tokens.targets is not None:
            for i in tl.static_range(STATS_OF_TARGETS):
                value = tl.load(tokens.stats + (STATS + i) * stride + row, mask=keep, other=0.0)
                tl.store(to + (LOG_P + i) * stride_statistics, value, mask=exists)

    if scored.SCORES:
        others = summed(SCORE, scored.sums, field, at, present)
        s_top = tl.load(tokens.stats + S_TOP * stride + row, mask=keep, other=0.0)
        top = top_of(tokens, row, keep, formula)
        if tokens.advantages is not None:
            target = tl.load(tokens.targets + row, mask=keep, other=-1)
            g_top, missed = policy_gradient(s_top, others, p_max, advantage, target == top, formula)
        else:
            g_top = top_gradient(s_top, others, p_max, formula)
            missed = s_top + others  # G − c
        if scored.SLOPES > 0:
            OF_STATISTICS: tl.constexpr = SUMS_OF_STATISTICS - 1 + formula.CLIPPED
            FIELD: tl.constexpr = SUMS + scored.STATISTICS * OF_STATISTICS
            g_top *= summed(FIELD, scored.sums, field, at, present)

    if results.stats is not None:
        for i in tl.static_range(STATS):
            known = tl.load(tokens.stats + i * stride + row, mask=keep, other=0.0)
            if i == C and not formula.KNOWS_G:
                known += missed
            elif i == S_TOP:
                known = g_top
            tl.store(results.stats + i * stride_statistics + row, known, mask=exists)
        tl.store(results.top + row, top, mask=exists)

    if results.dh_S is not None:
        top = top.to(tl.int64)
        kept = keep & (tl.abs(loss) != float("inf"))
        if tokens.advantages is not None:
            # What is of ŷ, in fp32 as the top entry, unless it is that.
            g_y = tl.where(target == top, 0.0, -advantage)
            if scored.SLOPES == 2:
                g_y *= summed(FIELD + 1, scored.sums, field, at, present)
            target = target.to(tl.int64)
        for d in range(0, student.D, BD):
            k = d + tl.arange(0, BD)
            inside = exists[:, None] & (k < student.D)[None, :]
            used = kept[:, None] & (k < student.D)[None, :]
            at_D = row[:, None].to(tl.int64) * student.D + k[None, :]
            at_W = top[:, None] * student.stride_v + k[None, :].to(tl.int64) * student.stride_d
            dh = tl.load(accumulated.A + at_D, mask=used, other=0.0)
            if accumulated.P is not None:
                dh -= missed[:, None] * tl.load(accumulated.P + at_D, mask=used, other=0.0)
            # −1 is an entry of another process.
            W_top = tl.load(W + at_W, mask=used & (top >= 0)[:, None], other=0.0).to(tl.float32)
            W_top = round_to(W_top, OPERAND).to(tl.float32)
            dh = dh * (1 / accumulated.SCALE) + g_top[:, None] * W_top
            if tokens.advantages is not None:
                at_W = (
                    target[:, None] * student.stride_v + k[None, :].to(tl.int64) * student.stride_d
                )
                used_y = used & (target >= 0)[:, None]
                W_y = tl.load(W + at_W, mask=used_y, other=0.0).to(tl.float32)
                dh += g_y[:, None] * round_to(W_y, OPERAND).to(tl.float32)
            at_dh = results.dh_S + at_D
            tl.store(at_dh, tl.where(used, dh * inverse_temperature, 0.0), mask=inside)


@triton.jit
def with_policy(loss, advantage, log_p):
    """ℓ − A log p(ŷ); where A is 0, ℓ, and where that is infinite, ℓ as well."""
    given = (advantage != 0) & (tl.abs(loss) != float("inf"))
    return tl.where(given, loss - advantage * log_p, loss)


@triton.jit
def policy_gradient(s_top, others, p_top, advantage, is_top, formula):
    """g_top, and what is missed of G, where there is a policy term: of s_top and `others` as for
    `top_gradient`, made with c that is lower by A, but without the −A of ŷ; `is_top` tells whether
    that is the top entry."""
    missed = s_top + others - advantage
    others -= tl.where(is_top, 0.0, advantage)
    if formula.KNOWS_G:
        s_top -= tl.where(is_top, advantage, 0.0)
        g_top = tl.where(p_top > 0.9, -others, s_top)
    else:
        g_top = (1.0 - p_top) * missed - others
    return g_top, missed


@triton.jit
def summed(FIELD: tl.constexpr, sums, field, at, present):
    """A field of sums of rows [BM], over all slots; `field` is the stride of fields."""
    return tl.sum(tl.load(sums + FIELD * field + at, mask=present, other=0.0), 0)


@triton.jit
def top_gradient(s_top, others, p_top, formula):
    """g_top of rows from s_top, Σ_{v≠top} s and p_top."""
    if formula.FAMILY == LOG_PROB:
        g_top = -others
    elif formula.KNOWS_G:
        g_top = tl.where(p_top > 0.9, -others, s_top)
    else:
        g_top = s_top * (1.0 - p_top) - p_top * others
    return g_top


@triton.jit
def statistics(sums, loss, p_max, q_max, parameters, formula):
    """The first fields of `statistics` of rows from the sums of their terms (see `entries`)."""
    inverse_temperature = formula.inverse_temperature
    forward, reverse = sums[0], sums[1]
    entropy_S = sums[2] * inverse_temperature - tl.log(p_max)
    entropy_T = sums[3] * inverse_temperature - tl.log(q_max)
    found = (forward, reverse, entropy_S, entropy_T)
    if len(sums) > 4:
        removed = sums[4]
        whole = loss + removed
        if formula.FORWARD or formula.REVERSE:
            # A KL has terms of both signs; its stable form is right where it is small.
            w_q, w_p = kl_weights(parameters, formula)
            kls = tl.where(w_q == 0, 0.0, w_q * forward) + tl.where(w_p == 0, 0.0, w_p * reverse)
            whole = tl.where((w_q != 0) | (w_p != 0), kls, whole)
        share = tl.where(whole == float("inf"), 1.0, removed / whole)
        nothing = (removed == 0) & (loss == loss)  # not of NaN
        found = found + (tl.where(nothing, 0.0, share),)
    return found
