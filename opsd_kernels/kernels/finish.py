"""finish: a chunk's sums and accumulators into ℓ and dh_S.

    ℓ = Σ f,   G − c = Σ s,   dh_S = (A − (G − c) P + g_top W_top) / T

A and P were summed without the student's top entry (see `pair`), whose gradient is

    g_top = s_top − (G − c) p_top = s_top (1 − p_top) − p_top Σ_{v≠top} s

It multiplies W_top in fp32: the entry with the most mass is never rounded. Where c = G, which makes
P superfluous, that is s_top; or −Σ_{v≠top} s, for the gradient sums to zero over the vocabulary.
The latter is right for a confident token, whose s_top is a difference of numbers near 1. Otherwise
it would put the common rounding error of all other entries on this one. Where ℓ is +∞ (an unclipped
KL) the gradient is 0.

For log p(ŷ) of a sampled token ŷ takes the top entry's place, and g_ŷ = 1 − p(ŷ) = −Σ_{v≠ŷ} s.
"""

import triton
import triton.language as tl

from opsd_kernels import divergence
from opsd_kernels.kernels.logits_tile import round_to
from opsd_kernels.kernels.lse import P_MAX, Q_MAX, S_TOP, STATS, STATS_OF_TARGETS
from opsd_kernels.kernels.pair import SCORE, SUMS, SUMS_OF_STATISTICS, VALUE
from opsd_kernels.kernels.pointwise import FORWARD_KL, LOG_PROB, MIXED, REVERSE_KL

# Fields of `statistics`: the first five in the order of `sums`, from here on in that of `stats`.
LOG_P = tl.constexpr(divergence.LOG_P)
# Rows of a program, and features at a time.
BM = 16
BD = 256


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["R", "slots", "stride_sums", "stride_statistics"])
def finish_kernel(
    loss_ptr,
    statistics_ptr,
    dh_ptr,
    A_ptr,
    P_ptr,
    W_ptr,
    sums_ptr,
    stats_ptr,
    top_ptr,
    keep_ptr,
    R,
    D,
    slots,
    stride_sums,
    stride_statistics,
    stride_Wv,
    stride_Wd,
    inverse_temperature,
    beta,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
    TARGETS: tl.constexpr,
    MASKED: tl.constexpr,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    SLOTS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Grid (row tiles).

    Writes:
        loss_ptr: [R] fp32; 0 for rows that are not kept.
        statistics_ptr: [STATISTICS, R] fp32 at stride stride_statistics, or None; what there is of
            sampled tokens if TARGETS. 0 for rows that are not kept.
        dh_ptr: [R, D] fp32, or None; 0 for rows that are not kept.

    Reads:
        A_ptr, P_ptr: [R, D] fp32, times SCALE. A may lie where dh_S is to be; None without dh_ptr,
            P_ptr also where c = G.
        W_ptr: [V, D], any strides.
        sums_ptr, stats_ptr, top_ptr: what `pair` and `lse` wrote.
        keep_ptr: [R] bool if MASKED.
        beta: a pointer to β [R], read if MIXED.
        SLOTS: a power of two, at least `slots`.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = row < R
    keep = exists
    if MASKED:
        keep = exists & (tl.load(keep_ptr + row, mask=exists, other=0) != 0)
    slot = tl.arange(0, SLOTS)
    at = slot[:, None] * stride_sums + row[None, :]
    present = (slot[:, None] < slots) & keep[None, :]
    field = slots * stride_sums
    if FAMILY == LOG_PROB:
        loss = tl.load(stats_ptr + STATS * stride_sums + row, mask=keep, other=0.0)
    else:
        loss = tl.sum(tl.load(sums_ptr + VALUE * field + at, mask=present, other=0.0), 0)
    tl.store(loss_ptr + row, loss, mask=exists)
    p_max = tl.load(stats_ptr + P_MAX * stride_sums + row, mask=keep, other=1.0)

    if statistics_ptr is not None:
        to = statistics_ptr + row
        if FAMILY != LOG_PROB:
            q_max = tl.load(stats_ptr + Q_MAX * stride_sums + row, mask=keep, other=1.0)
            sums = ()
            for i in tl.static_range(SUMS, SUMS + SUMS_OF_STATISTICS - 1 + CLIPPED):
                terms = tl.load(sums_ptr + i * field + at, mask=present, other=0.0)
                sums = sums + (tl.sum(terms, 0),)
            if FAMILY == MIXED:
                beta = tl.load(beta + row, mask=exists, other=0.5)
            told = statistics(sums, loss, p_max, q_max, inverse_temperature, beta, FAMILY)
            for i in tl.static_range(len(told)):
                tl.store(to + i * stride_statistics, told[i], mask=exists)
        if TARGETS:
            for i in tl.static_range(STATS_OF_TARGETS):
                value = tl.load(stats_ptr + (STATS + i) * stride_sums + row, mask=keep, other=0.0)
                tl.store(to + (LOG_P + i) * stride_statistics, value, mask=exists)

    if dh_ptr is not None:
        others = tl.sum(tl.load(sums_ptr + SCORE * field + at, mask=present, other=0.0), 0)
        s_top = tl.load(stats_ptr + S_TOP * stride_sums + row, mask=keep, other=0.0)
        g_top = top_gradient(s_top, others, p_max, FAMILY, P_ptr is None)
        missed = s_top + others  # G − c
        top = tl.load(top_ptr + row, mask=keep, other=0).to(tl.int64)
        kept = keep & (loss != float("inf"))
        for d in range(0, D, BD):
            k = d + tl.arange(0, BD)
            inside = exists[:, None] & (k < D)[None, :]
            used = kept[:, None] & (k < D)[None, :]
            at_D = row[:, None].to(tl.int64) * D + k[None, :]
            at_W = top[:, None] * stride_Wv + k[None, :].to(tl.int64) * stride_Wd
            W_top = tl.load(W_ptr + at_W, mask=used, other=0.0).to(tl.float32)
            W_top = round_to(W_top, OPERAND).to(tl.float32)
            dh = tl.load(A_ptr + at_D, mask=used, other=0.0)
            if P_ptr is not None:
                dh -= missed[:, None] * tl.load(P_ptr + at_D, mask=used, other=0.0)
            dh = dh * (1 / SCALE) + g_top[:, None] * W_top
            tl.store(dh_ptr + at_D, tl.where(used, dh * inverse_temperature, 0.0), mask=inside)


@triton.jit
def top_gradient(s_top, others, p_top, FAMILY: tl.constexpr, KNOWS_G: tl.constexpr):
    """g_top of rows from s_top, Σ_{v≠top} s and p_top."""
    if FAMILY == LOG_PROB:
        g_top = -others
    elif KNOWS_G:
        g_top = tl.where(p_top > 0.9, -others, s_top)
    else:
        g_top = s_top * (1.0 - p_top) - p_top * others
    return g_top


@triton.jit
def statistics(sums, loss, p_max, q_max, inverse_temperature, beta, FAMILY: tl.constexpr):
    """The first fields of `statistics` of rows from the sums of their terms (see `entries`)."""
    forward, reverse = sums[0], sums[1]
    entropy_S = sums[2] * inverse_temperature - tl.log(p_max)
    entropy_T = sums[3] * inverse_temperature - tl.log(q_max)
    told = (forward, reverse, entropy_S, entropy_T)
    if len(sums) > 4:
        removed = sums[4]
        # Of a KL by the form that is right where it is small, and its terms have both signs.
        whole = loss + removed
        if FAMILY == FORWARD_KL:
            whole = forward
        elif FAMILY == REVERSE_KL:
            whole = reverse
        elif FAMILY == MIXED:
            whole = tl.where(beta == 0, forward, tl.where(beta == 1, reverse, whole))
        share = tl.where(whole == float("inf"), 1.0, removed / whole)
        nothing = (removed == 0) & (loss == loss)  # not of NaN
        told = told + (tl.where(nothing, 0.0, share),)
    return told
