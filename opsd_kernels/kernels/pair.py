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

Sums go to slots, one a block of columns, which the next tile of the vocabulary adds to: no atomics,
and one order of summation whatever runs first.
"""

import triton
import triton.language as tl

from opsd_kernels.kernels.logits_tile import halves, logits_tiles, round_to
from opsd_kernels.kernels.pointwise import (
    FORWARD_KL,
    HUGE,
    REVERSE_KL,
    difference,
    log_ratio,
    value_and_score,
)

# Fields of `sums` [SUMS, slots, R] fp32: Σ f, and Σ s without the top entry's.
VALUE, SCORE = tl.constexpr(0), tl.constexpr(1)
SUMS = 2


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
    NEEDS_SCORE: tl.constexpr,
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
        sums_ptr: [SUMS, slots, stride_sums] fp32, added to unless v_begin is 0.
        s_ptr, p_ptr: [R, stride_tile], columns of the vocabulary from v_begin on, if NEEDS_SCORE;
            p_ptr unless G is known.

    Reads:
        h_S_ptr, h_T_ptr, W_ptr, W_T_ptr, D, D_T, strides: see `logits_tiles`.
        stats_ptr, top_ptr: [STATS, stride_sums] fp32, [stride_sums] int32, from `lse`.
        keep_ptr: [R] bool if MASKED: a tile of rows none of which is kept is left out.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = row < R
    if MASKED:
        keep = tl.load(keep_ptr + row, mask=exists, other=0)
        if tl.max(keep.to(tl.int32), 0) == 0:
            return
    KNOWS_G: tl.constexpr = not CLIPPED and (FAMILY == FORWARD_KL or FAMILY == REVERSE_KL)
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
        s_ptr + at_tile if NEEDS_SCORE else None,
        p_ptr + at_tile if NEEDS_SCORE and not KNOWS_G else None,
        exists,
        FAMILY,
        CLIPPED,
        PARTS,
    )
    at = slot * stride_sums + row
    field = slots * stride_sums
    earlier = exists & (v_begin > 0)
    _add(sums_ptr + VALUE * field + at, sums[0], exists, earlier)
    if NEEDS_SCORE:
        _add(sums_ptr + SCORE * field + at, sums[1], exists, earlier)


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
    PARTS: tl.constexpr,
):
    """The sums over the columns `begin` …, and their s and p stored, in PARTS parts one after the
    other: the registers that hold two tiles of logits leave no room for the rest at once."""
    if PARTS > 1:
        z_S0, z_S1 = halves(z_S)
        z_T0, z_T1 = halves(z_T)
        f0, s0 = _columns(
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
            PARTS // 2,
        )
        f1, s1 = _columns(
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
            PARTS // 2,
        )
        return f0 + f1, s0 + s1
    else:
        col = tl.arange(0, z_S.shape[1]) + begin
        within = (col < v_end)[None, :]
        z_S = tl.where(within, z_S, float("-inf"))
        z_T = tl.where(within, z_T, float("-inf"))
        is_top = col[None, :] == top[:, None]
        f, s, p = entries(z_S, z_T, is_top, stats, beta, entry_clip, FAMILY, CLIPPED)
        stored = exists[:, None] & within
        if s_ptrs is not None:
            tl.store(s_ptrs + col[None, :], round_to(s, s_ptrs.dtype.element_ty), mask=stored)
        if p_ptrs is not None:
            tl.store(p_ptrs + col[None, :], round_to(p, p_ptrs.dtype.element_ty), mask=stored)
        return tl.sum(f, 1), tl.sum(s, 1)


@triton.jit
def entries(z_S, z_T, is_top, stats, beta, entry_clip, FAMILY: tl.constexpr, CLIPPED: tl.constexpr):
    """What entries contribute: from logits [BM, BV] and `stats` [BM, 1] (see `load_stats`) f,
    s = a − c p, and p; the last two 0 at the top entry."""
    top_S, p_max, top_T, q_max, log_sums, c, plain = stats
    d = difference(z_S, z_T)
    p = tl.exp(z_S - top_S) * p_max
    q = tl.exp(z_T - top_T) * q_max
    x = log_ratio(d, top_S, top_T, log_sums)
    f, a = value_and_score(p, q, x, plain, beta, entry_clip, FAMILY, CLIPPED)
    if not CLIPPED:
        # No mass on one side where the other has some.
        if FAMILY == FORWARD_KL:
            f = tl.where(d >= HUGE, float("inf"), f)
        elif FAMILY == REVERSE_KL:
            f = tl.where(d <= -HUGE, float("inf"), f)
    s = tl.where(is_top, 0.0, a - c * p)
    return f, s, tl.where(is_top, 0.0, p)


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


@triton.jit
def _add(ptrs, value, exists, earlier):
    tl.store(ptrs, tl.load(ptrs, mask=earlier, other=0.0) + value, mask=exists)
