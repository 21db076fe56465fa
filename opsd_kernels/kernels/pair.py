"""pair: values and scores of one tile of the vocabulary, from hidden states.

With L_S, L_T and c of every row known (see `lse`), the logits are made once more, and with them

    Σ f          the divergence's part
    s = a − c p  the score, shifted by c ≈ G
    Σ s          what c missed of G, its part

The tiles s and p go to scratch, in the dtype of the operands of the product that follows,

    A += s W,   P += p W   over tiles of the vocabulary, in fp32
    dh_S = (A − (G − c) P + g_top W_top) / T

because Σ_v (s − (G − c) p) W is linear: G may be known last. Where it is known first (`knows_G`),
so that c = G, P is not needed. Stored apart, a and p would cancel only after they were rounded;
with c near G the second term is a small correction. The student's top entry, often nearly all of
the mass, is stored as 0 in either tile: `finish` adds its part of the gradient in fp32.

For log p(ŷ) of a sampled token, whose gradient is 1[v = ŷ] − p, only the student's logits are made
and only one tile, s = −p, which is 0 at ŷ: that takes the top entry's place.

What `token_divergence` tells besides are sums over the same entries: of both KLs' terms, of the
entropies' p (top_S − z_S) and q (top_T − z_T), and of what the clip took.

Sums go to slots, one a block of columns, which the next tile of the vocabulary adds to: no atomics,
and one order of summation whatever runs first.
"""

import triton
import triton.language as tl

from opsd_kernels.kernels.logits_tile import halves, logits_tiles, round_to
from opsd_kernels.kernels.pointwise import (
    FORWARD_KL,
    HUGE,
    LOG_PROB,
    MIXED,
    REVERSE_KL,
    difference,
    kullback_leiblers,
    log_ratio,
    value_and_score,
)

# Fields of `sums` [2 or 7, slots, R] fp32: Σ f, and Σ s without the top entry's; with statistics
# also those of forward and reverse KL, of both entropies, and of what the clip took, if one is set.
VALUE, SCORE = tl.constexpr(0), tl.constexpr(1)
SUMS, SUMS_OF_STATISTICS = tl.constexpr(2), tl.constexpr(5)


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["R", "v_end", "slots", "stride_sums"])
def pair_kernel(
    sums_ptr,
    s_ptr,
    p_ptr,
    h_S_ptr,
    h_T_ptr,
    W_ptr,
    W_T_ptr,
    stats_ptr,
    top_ptr,
    keep_ptr,
    v_begin,
    v_end,
    slots,
    R,
    V,
    D,
    D_T,
    stride_sums,
    stride_tile,
    stride_h_S,
    stride_h_T,
    stride_Wv,
    stride_Wd,
    stride_W_Tv,
    stride_W_Td,
    inverse_temperature,
    beta,
    entry_clip,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
    STATISTICS: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN_D: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (row tiles, slots): columns v_begin + slot · BV … of v_begin … v_end.

    Writes:
        sums_ptr: [SUMS, slots, stride_sums] fp32, SUMS_OF_STATISTICS more if STATISTICS; added to
            unless v_begin is 0.
        s_ptr, p_ptr: [R, stride_tile], columns of the vocabulary from v_begin on. None without
            gradient, p_ptr also where G is known.

    Reads:
        h_S_ptr, h_T_ptr, W_ptr, W_T_ptr, D, D_T, strides: see `logits_tiles`.
        stats_ptr, top_ptr: [STATS, stride_sums] fp32, [stride_sums] int32, from `lse`; of LOG_PROB
            top_ptr is the sampled tokens.
        beta: β, or a pointer to [R] if MIXED.
        keep_ptr: [R] bool if MASKED: a tile of rows none of which is kept is left out.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = row < R
    if MASKED:
        keep = tl.load(keep_ptr + row, mask=exists, other=0)
        if tl.max(keep.to(tl.int32), 0) == 0:
            return
    rows = tl.minimum(row, R - 1).to(tl.int64)
    slot = tl.program_id(1)
    col = v_begin + slot * BV + tl.arange(0, BV)
    z_S, z_T = logits_tiles(
        h_S_ptr,
        h_T_ptr,
        W_ptr,
        W_T_ptr,
        rows,
        tl.minimum(col, V - 1).to(tl.int64),
        D,
        D_T,
        stride_h_S,
        stride_h_T,
        stride_Wv,
        stride_Wd,
        stride_W_Tv,
        stride_W_Td,
        SHARED,
        EVEN_D,
        BK,
        OPERAND,
        PRECISION,
    )
    stats = load_stats(stats_ptr, stride_sums, row, exists)
    top = tl.load(top_ptr + row, mask=exists, other=0)
    if FAMILY == MIXED:
        beta = tl.load(beta + row, mask=exists, other=0.5)[:, None]
    at_tile = row[:, None].to(tl.int64) * stride_tile - v_begin
    sums = _columns(
        z_S * inverse_temperature,
        z_T * inverse_temperature,
        v_begin + slot * BV,
        v_end,
        top,
        stats,
        beta,
        entry_clip,
        s_ptr + at_tile if s_ptr is not None else None,
        p_ptr + at_tile if p_ptr is not None else None,
        exists,
        FAMILY,
        CLIPPED,
        STATISTICS,
        PARTS,
    )
    earlier = exists & (v_begin > 0)
    for i in tl.static_range(len(sums)):
        if i != SCORE or s_ptr is not None:
            at = (i * slots + slot) * stride_sums + row
            total = sums[i] + tl.load(sums_ptr + at, mask=earlier, other=0.0)
            tl.store(sums_ptr + at, total, mask=exists)


@triton.jit
def _columns(
    z_S,
    z_T,
    begin,
    v_end,
    top,
    stats,
    beta,
    entry_clip,
    s_ptrs,
    p_ptrs,
    exists,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
    STATISTICS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The sums over the columns `begin` …, and their s and p stored, in PARTS parts one after the
    other: the registers that hold two tiles of logits leave no room for the rest at once."""
    if PARTS > 1:
        z_S0, z_S1 = halves(z_S)
        z_T0, z_T1 = halves(z_T)
        sums_0 = _columns(
            z_S0,
            z_T0,
            begin,
            v_end,
            top,
            stats,
            beta,
            entry_clip,
            s_ptrs,
            p_ptrs,
            exists,
            FAMILY,
            CLIPPED,
            STATISTICS,
            PARTS // 2,
        )
        sums_1 = _columns(
            z_S1,
            z_T1,
            begin + z_S0.shape[1],
            v_end,
            top,
            stats,
            beta,
            entry_clip,
            s_ptrs,
            p_ptrs,
            exists,
            FAMILY,
            CLIPPED,
            STATISTICS,
            PARTS // 2,
        )
        return add_each(sums_0, sums_1)
    else:
        col = tl.arange(0, z_S.shape[1]) + begin
        within = (col < v_end)[None, :]
        z_S = tl.where(within, z_S, float("-inf"))
        z_T = tl.where(within, z_T, float("-inf"))
        is_top = col[None, :] == top[:, None]
        terms, p = entries(z_S, z_T, is_top, stats, beta, entry_clip, FAMILY, CLIPPED, STATISTICS)
        stored = exists[:, None] & within
        if s_ptrs is not None:
            tl.store(
                s_ptrs + col[None, :], round_to(terms[1], s_ptrs.dtype.element_ty), mask=stored
            )
        if p_ptrs is not None:
            tl.store(p_ptrs + col[None, :], round_to(p, p_ptrs.dtype.element_ty), mask=stored)
        sums = ()
        for i in tl.static_range(len(terms)):
            sums = sums + (tl.sum(terms[i], 1),)
        return sums


@triton.jit
def entries(
    z_S,
    z_T,
    is_top,
    stats,
    beta,
    entry_clip,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """What entries contribute, from logits [BM, BV] and `stats` [BM, 1] (see `load_stats`).

    Returns:
        A tuple of the terms of all `sums`, of which the first two are f and s = a − c p, and p. s
        and p are 0 at the top entry.
    """
    top_S, p_max, top_T, q_max, log_sums, c, plain = stats
    p = tl.exp(z_S - top_S) * p_max
    if FAMILY == LOG_PROB:
        p = tl.where(is_top, 0.0, p)
        return (tl.zeros(p.shape, tl.float32), -p), p
    d = difference(z_S, z_T)
    q = tl.exp(z_T - top_T) * q_max
    x = log_ratio(d, top_S, top_T, log_sums)
    f, a, excess = value_and_score(p, q, x, plain, beta, entry_clip, FAMILY, CLIPPED)
    if not CLIPPED:
        # No mass on one side where the other has some.
        if FAMILY == FORWARD_KL:
            f = tl.where(d >= HUGE, float("inf"), f)
        elif FAMILY == REVERSE_KL:
            f = tl.where(d <= -HUGE, float("inf"), f)
        elif FAMILY == MIXED:
            f = tl.where((beta == 0) & (d >= HUGE), float("inf"), f)
            f = tl.where((beta == 1) & (d <= -HUGE), float("inf"), f)
    s = tl.where(is_top, 0.0, a - c * p)
    terms = (f, s)
    if STATISTICS:
        forward, reverse = kullback_leiblers(p, q, x)
        forward = tl.where(d >= HUGE, float("inf"), forward)
        reverse = tl.where(d <= -HUGE, float("inf"), reverse)
        terms = terms + (forward, reverse, _times(p, top_S - z_S), _times(q, top_T - z_T))
        if CLIPPED:
            terms = terms + (excess,)
    return terms, tl.where(is_top, 0.0, p)


@triton.jit
def _times(p, below_top):
    """p · (top − z), 0 where z is −∞."""
    return p * tl.where(below_top > HUGE, 0.0, below_top)


@triton.jit
def add_each(a, b):
    """The sums of two tuples, field by field."""
    total = ()
    for i in tl.static_range(len(a)):
        total = total + (a[i] + b[i],)
    return total


@triton.jit
def load_stats(stats_ptr, stride, row, exists):
    """top_S, p_max, top_T, q_max, log_sums, c, plain of rows, [BM, 1] each."""
    ptrs = stats_ptr + row
    return (
        tl.load(ptrs, mask=exists, other=0.0)[:, None],
        tl.load(ptrs + stride, mask=exists, other=0.0)[:, None],
        tl.load(ptrs + 2 * stride, mask=exists, other=0.0)[:, None],
        tl.load(ptrs + 3 * stride, mask=exists, other=0.0)[:, None],
        tl.load(ptrs + 4 * stride, mask=exists, other=0.0)[:, None],
        tl.load(ptrs + 5 * stride, mask=exists, other=0.0)[:, None],
        tl.load(ptrs + 6 * stride, mask=exists, other=0.0)[:, None],
    )
