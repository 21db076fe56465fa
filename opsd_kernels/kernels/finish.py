"""finish: ℓ, statistics and dh_S of a chunk, from sums and accumulators.

    ℓ = Σ f,   G − c = Σ s,   dh_S = (A − (G − c) P + g_top W_top) / T

A and P are without the student's top entry (see `pair`), whose gradient is

    g_top = s_top − (G − c) p_top = s_top (1 − p_top) − p_top Σ_{v≠top} s

It multiplies W_top in fp32: the entry with the most mass is never rounded. Where c = G, and P is
not needed, g_top is s_top; or −Σ_{v≠top} s, because the gradient sums to zero over the vocabulary.
The latter is more accurate for a confident token (p_top > 0.9), whose s_top is a difference of
numbers near 1. For other tokens it would collect the common rounding error of all other entries.
Where ℓ is infinite (an unclipped KL) the gradient is 0.

Where the student's logits are capped, g_top is multiplied by the slope of the cap at that entry.

A log-sum-exp is L = top_S/T − log p_max; its gradient p does not sum to zero, and g_top is s_top.

For log p(ŷ) of a sampled token ŷ takes the place of the top entry, and g_ŷ = 1 − p(ŷ) = −Σ_{v≠ŷ} s.

A policy term −A log p(ŷ) adds −A to the gradient at ŷ, in fp32 too. It made c lower by A, so Σ s is
larger than G − c by A. Then g_top = (1 − p_top) (G − c) − Σ_{v≠top} s, where the sum contains −A
unless ŷ is the top entry: the terms near A cancel before they are computed.

For a gradient that is made in backward (see `gradient`), the numbers it needs are written: the
`Stats` of a row, with G and g_top.
"""

import triton
import triton.language as tl

from .. import divergence
from ..problem import Outputs, Problem
from . import cdiv
from .logits_tile import round_to
from .lse import P_MAX, Q_MAX, S_TOP, C
from .pair import scored_of, top_of
from .pointwise import ENTROPY, LOG_PROB, LOG_SUM, formula_of, kl_weights, parameters_of
from .records import (
    DTYPE_NAMES,
    SCORE,
    STATS,
    STATS_OF_TARGETS,
    SUMS,
    SUMS_OF_STATISTICS,
    VALUE,
    Accumulated,
    PerToken,
    Results,
    Side,
)
from .scratch import Scratch

# The first field of `statistics` that is of a sampled token. The fields before are in the order of
# `Scored.sums`, the fields from here on in that of `PerToken.stats`.
LOG_P = tl.constexpr(divergence.LOG_P)
ENTROPY_S = tl.constexpr(divergence.ENTROPY_S)
# Rows of a program, and features at a time.
BM, BD = tl.constexpr(16), tl.constexpr(256)


def launch(outputs: Outputs, scratch: Scratch, chunk: Problem) -> None:
    """outputs ← ℓ, statistics and ∂ℓ/∂h_S from sums and accumulators."""
    R = chunk.h_S.shape[0]
    A, P = scratch.A_and_P(R, outputs.dh_S)
    finish_kernel[(cdiv(R, BM.value),)](
        results=Results(outputs.loss, outputs.statistics, outputs.dh_S, outputs.stats, outputs.top),
        accumulated=Accumulated(A, P, SCALE=tl.constexpr(scratch.scale)),
        W=chunk.W,
        student=Side.of(chunk.h_S, chunk.W, chunk.logit_maps[0]),
        scored=scored_of(scratch),
        tokens=PerToken.of(chunk, scratch.stats, scratch.top),
        R=R,
        stride=scratch.rows,
        stride_statistics=outputs.stride,
        formula=formula_of(chunk.member, chunk.temperature),
        SLOTS=triton.next_power_of_2(scratch.sums.shape[1]),
        OPERAND=tl.dtype(DTYPE_NAMES[chunk.operand_dtype]),
    )


# Numbers that depend on the batch do not cause a recompilation.
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
        results: statistics only as far as `scored.STATISTICS` and targets go.

    Reads:
        accumulated: A may be in the memory of dh_S.
        W, student: W [V, D] and its `Side`.
        scored, tokens: see `pair` and `lse`.
        stride_statistics: of `results.statistics` and `results.stats`.
        SLOTS: a power of two, at least `scored.slots`.
        OPERAND: the dtype that W is rounded to.
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
    elif formula.FAMILY == LOG_SUM:
        top_S = tl.load(tokens.stats + row, mask=keep, other=0.0)  # the first of `Stats`
        mean = tl.load(tokens.stats + C * stride + row, mask=keep, other=0.0)
        loss, entropy = log_sum(top_S, p_max, mean, inverse_temperature)
    else:
        loss = summed(VALUE, scored.sums, field, at, present)
    before_policy = loss
    if tokens.advantages is not None:
        advantage = tl.load(tokens.advantages + row, mask=keep, other=0.0)
        log_p = tl.load(tokens.stats + STATS * stride + row, mask=keep, other=0.0)
        loss = with_policy(loss, advantage, log_p)
    tl.store(results.loss + row, loss, mask=exists)

    if results.statistics is not None:
        to = results.statistics + row
        if formula.FAMILY == LOG_SUM:
            tl.store(to + ENTROPY_S * stride_statistics, entropy, mask=exists)
        elif formula.FAMILY != LOG_PROB:
            q_max = tl.load(tokens.stats + Q_MAX * stride + row, mask=keep, other=1.0)
            terms = ()
            for i in tl.static_range(SUMS, SUMS + SUMS_OF_STATISTICS - 1 + formula.CLIPPED):
                terms = terms + (summed(i, scored.sums, field, at, present),)
            parameters = parameters_of(tokens, row, exists, formula)
            found = statistics(terms, before_policy, p_max, q_max, parameters, formula)
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
            g_top, G_minus_c = policy_gradient(
                s_top, others, p_max, advantage, target == top, formula
            )
        else:
            g_top = top_gradient(s_top, others, p_max, formula)
            G_minus_c = s_top + others
        if scored.SLOPES > 0:
            OF_STATISTICS: tl.constexpr = SUMS_OF_STATISTICS - 1 + formula.CLIPPED
            FIELD: tl.constexpr = SUMS + scored.STATISTICS * OF_STATISTICS
            g_top *= summed(FIELD, scored.sums, field, at, present)

    if results.stats is not None:
        for i in tl.static_range(STATS):
            value = tl.load(tokens.stats + i * stride + row, mask=keep, other=0.0)
            if i == C and not formula.KNOWS_G:
                value += G_minus_c
            elif i == S_TOP:
                value = g_top
            tl.store(results.stats + i * stride_statistics + row, value, mask=exists)
        tl.store(results.top + row, top, mask=exists)

    if results.dh_S is not None:
        top = top.to(tl.int64)
        kept = keep & (tl.abs(loss) != float("inf"))
        if tokens.advantages is not None:
            # The gradient at ŷ; if ŷ is the top entry g_top contains it.
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
                dh -= G_minus_c[:, None] * tl.load(accumulated.P + at_D, mask=used, other=0.0)
            # −1 stands for an entry of another process.
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
    """ℓ − A log p(ŷ); but ℓ where A is 0, and where ℓ is infinite."""
    given = (advantage != 0) & (tl.abs(loss) != float("inf"))
    return tl.where(given, loss - advantage * log_p, loss)


@triton.jit
def policy_gradient(s_top, others, p_top, advantage, is_top, formula):
    """g_top and G − c with a policy term; s_top and `others` are those of `top_gradient`, with c
    lower by A, but without the −A of ŷ; `is_top` says whether ŷ is the top entry."""
    G_minus_c = s_top + others - advantage
    others -= tl.where(is_top, 0.0, advantage)
    if formula.KNOWS_G:
        s_top -= tl.where(is_top, advantage, 0.0)
        g_top = tl.where(p_top > 0.9, -others, s_top)
    else:
        g_top = (1.0 - p_top) * G_minus_c - others
    return g_top, G_minus_c


@triton.jit
def summed(FIELD: tl.constexpr, sums, field, at, present):
    """A field of the sums of rows [BM], over all slots; `field` is the stride of fields."""
    return tl.sum(tl.load(sums + FIELD * field + at, mask=present, other=0.0), 0)


@triton.jit
def log_sum(top_S, p_max, mean, inverse_temperature):
    """L_r of rows and the entropy of p̃, from the numbers of `normalizers`; where all entries are
    excluded −∞ and 0."""
    something = p_max != 0
    log_p_max = tl.log(tl.where(something, p_max, 1.0))
    L_r = tl.where(something, top_S * inverse_temperature - log_p_max, float("-inf"))
    return L_r, mean - log_p_max


@triton.jit
def top_gradient(s_top, others, p_top, formula):
    """g_top of rows from s_top, `others` = Σ_{v≠top} s and p_top."""
    if formula.FAMILY == LOG_PROB:
        g_top = -others
    elif formula.FAMILY == LOG_SUM:
        g_top = s_top
    elif formula.KNOWS_G:
        g_top = tl.where(p_top > 0.9, -others, s_top)
    else:
        g_top = s_top * (1.0 - p_top) - p_top * others
    return g_top


@triton.jit
def statistics(sums, loss, p_max, q_max, parameters, formula):
    """The first fields of `statistics` of rows, from the sums of their terms (see `entries`) and ℓ
    without a policy term."""
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
