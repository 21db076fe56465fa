"""lse: the normalizers of both sides of every token, and the student's most likely entry.

    top_S = max_v z_S,   sum_S = Σ_v exp(z_S − top_S),   L_S = top_S + log sum_S   (z_T likewise)

They are kept as p = exp(z_S − top_S) p_max and L_T − L_S = (top_T − top_S) + log_sums need them:
p_max = 1 / sum_S, the largest probability, and log_sums = log(sum_T / sum_S), each rounded once.

A matrix product with an online log-sum-exp for an epilogue: logits exist in registers only. The
vocabulary is split into spans, so that a few tokens fill a GPU too; a program takes one tile of
rows and one span, tile by tile of the vocabulary, and writes what it found:

    top_S, sum_S = Σ exp(z_S − top_S), top_T, sum_T over the span,
    the column where z_S is largest, and d_top = z_T − z_S there,
    E = Σ exp(z_S − top_S) (d − d_top),  d = z_T − z_S,
    z_S and z_T of the sampled token ŷ, if it lies in the span

`merge` then puts the spans together, in their order, and finds the shift c of the row's scores. How
the vocabulary is split depends on its size alone, never on the number of tokens: a token's numbers
are the same in any batch.

E / sum_S is the student's mean of d − d_top. From it follows the reverse KL's G, to the last digit
because only differences to the top entry enter it, and for the others a guess of G (see `shift`).
"""

import triton
import triton.language as tl

from opsd_kernels.kernels.logits_tile import halves, logits_tiles
from opsd_kernels.kernels.pointwise import (
    LOG_PROB,
    MIXED,
    difference,
    log_quotient,
    log_ratio,
    shift,
)

# Fields of `partials` [6 or 8, spans, R] fp32, the last two those of the sampled tokens …
TOP_S, SUM_S, TOP_T, SUM_T, D_TOP, E_SUM, Z_S, Z_T = (tl.constexpr(i) for i in range(8))
PARTIALS = 8
# … and of `stats` [8 or 11, R] fp32, what is known of a row: top_S, p_max, top_T, q_max, log_sums,
# the shift c of its scores, whether it is plain, the score of its top entry after the shift; and of
# the sampled token log p, log q, and log q − log p.
P_MAX, Q_MAX, S_TOP = tl.constexpr(1), tl.constexpr(3), tl.constexpr(7)
STATS, STATS_OF_TARGETS = tl.constexpr(8), tl.constexpr(3)
# Rows of a program of `merge`.
MERGE_BM = 8


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["R", "stride_partials"])
def lse_kernel(
    partials_ptr,
    index_ptr,
    h_S_ptr,
    h_T_ptr,
    W_ptr,
    W_T_ptr,
    keep_ptr,
    targets_ptr,
    R,
    V,
    D,
    D_T,
    span,
    stride_partials,
    stride_h_S,
    stride_h_T,
    stride_Wv,
    stride_Wd,
    stride_W_Tv,
    stride_W_Td,
    inverse_temperature,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
    LIMIT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (row tiles, spans).

    Writes:
        partials_ptr: [PARTIALS, spans, stride_partials] fp32.
        index_ptr: [spans, stride_partials] int32, the column of the span's top_S.

    Reads:
        h_S_ptr, h_T_ptr, W_ptr, W_T_ptr, D, D_T, strides: see `logits_tiles`.
        keep_ptr: [R] bool if MASKED: a tile of rows none of which is kept is left out.
        targets_ptr: [R] int32, the sampled tokens, or None.
        span: columns of a program, a multiple of BV.
        LIMIT: `mean_limit` of β, or 0: E is not wanted.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = row < R
    if MASKED:
        keep = tl.load(keep_ptr + row, mask=exists, other=0)
        if tl.max(keep.to(tl.int32), 0) == 0:
            return
    rows = tl.minimum(row, R - 1).to(tl.int64)
    s = tl.program_id(1)
    target = None
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row, mask=exists, other=0)
    state = nothing(BM)
    for v in range(s * span, tl.minimum(s * span + span, V), BV):
        col = v + tl.arange(0, BV)
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
        state = _columns(
            z_S * inverse_temperature, z_T * inverse_temperature, v, V, target, state, LIMIT, PARTS
        )
    top_S, sum_S, top_T, sum_T, d_top, E, index, z_Sy, z_Ty = state
    at = s * stride_partials + row
    field = tl.num_programs(1) * stride_partials
    tl.store(partials_ptr + TOP_S * field + at, top_S, mask=exists)
    tl.store(partials_ptr + SUM_S * field + at, sum_S, mask=exists)
    tl.store(partials_ptr + TOP_T * field + at, top_T, mask=exists)
    tl.store(partials_ptr + SUM_T * field + at, sum_T, mask=exists)
    tl.store(partials_ptr + D_TOP * field + at, d_top, mask=exists)
    if LIMIT > 0:
        tl.store(partials_ptr + E_SUM * field + at, E, mask=exists)
    if targets_ptr is not None:
        tl.store(partials_ptr + Z_S * field + at, z_Sy, mask=exists)
        tl.store(partials_ptr + Z_T * field + at, z_Ty, mask=exists)
    tl.store(index_ptr + at, index, mask=exists)


@triton.jit
def _columns(z_S, z_T, begin, V, target, state, LIMIT: tl.constexpr, PARTS: tl.constexpr):
    """The columns `begin` … into the state of their rows, in PARTS parts one after the other."""
    if PARTS > 1:
        z_S0, z_S1 = halves(z_S)
        z_T0, z_T1 = halves(z_T)
        state = _columns(z_S0, z_T0, begin, V, target, state, LIMIT, PARTS // 2)
        return _columns(z_S1, z_T1, begin + z_S0.shape[1], V, target, state, LIMIT, PARTS // 2)
    else:
        return absorb(z_S, z_T, tl.arange(0, z_S.shape[1]) + begin, V, target, state, LIMIT)


@triton.jit
def nothing(BM: tl.constexpr):
    """The state of BM rows of which no logit was seen yet: top_S, sum_S, top_T, sum_T, d_top, E,
    the column of top_S, and z_S, z_T of the sampled token."""
    zeros = tl.zeros((BM,), tl.float32)
    low = tl.full((BM,), float("-inf"), tl.float32)
    return low, zeros, low, zeros, zeros, zeros, tl.zeros((BM,), tl.int32), zeros, zeros


@triton.jit
def absorb(z_S, z_T, col, V, target, state, LIMIT: tl.constexpr):
    """A tile of logits [BM, BV] into the state [BM] of its rows; columns ≥ V count for nothing.
    `target` [BM] is the column of the sampled token, or None."""
    top_S, sum_S, top_T, sum_T, d_top, E, index, z_Sy, z_Ty = state
    if target is not None:
        is_target = col[None, :] == target[:, None]
        z_Sy += tl.sum(tl.where(is_target, z_S, 0.0), 1)
        z_Ty += tl.sum(tl.where(is_target, z_T, 0.0), 1)
    z_S = tl.where(col[None, :] < V, z_S, float("-inf"))
    z_T = tl.where(col[None, :] < V, z_T, float("-inf"))
    tile_top = tl.max(z_S, 1)
    # The first column with the tile's maximum; where there is none (all NaN), any.
    at_top = tl.min(tl.where(z_S == tile_top[:, None], col[None, :], V), 1)
    d = difference(z_S, z_T)
    tile_d = tl.sum(tl.where(col[None, :] == at_top[:, None], d, 0.0), 1)

    higher = tile_top > top_S
    new_d = tl.where(higher, tile_d, d_top)
    new_top = tl.where(higher, tile_top, top_S)
    safe = finite_or_zero(new_top)
    scale = tl.exp(top_S - safe)
    e = tl.exp(z_S - safe[:, None])
    if LIMIT > 0:
        # The reference moves with the top: what was summed is told.
        moved = tl.minimum(tl.maximum(d_top - new_d, -LIMIT), LIMIT)
        if d.shape[0] == 1:
            d -= tl.sum(new_d, 0)  # Triton would take a broadcast of [1, 1] through shared memory
        else:
            d -= new_d[:, None]
        d = tl.minimum(tl.maximum(d, -LIMIT), LIMIT)
        E = (E + sum_S * moved) * scale + tl.sum(e * d, 1)
    sum_S = sum_S * scale + tl.sum(e, 1)
    index = tl.where(higher, at_top, index)

    new_top_T = tl.maximum(top_T, tl.max(z_T, 1))
    safe = finite_or_zero(new_top_T)
    sum_T = sum_T * tl.exp(top_T - safe) + tl.sum(tl.exp(z_T - safe[:, None]), 1)
    return new_top, sum_S, new_top_T, sum_T, new_d, E, index, z_Sy, z_Ty


@triton.jit
def finite_or_zero(top):
    """What to subtract from logits before exp: −∞ − (−∞) would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["R", "spans", "stride_partials"])
def merge_kernel(
    stats_ptr,
    top_ptr,
    partials_ptr,
    index_ptr,
    R,
    spans,
    stride_partials,
    beta,
    entry_clip,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
    TARGETS: tl.constexpr,
    LIMIT: tl.constexpr,
    BM: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Grid (row tiles). Put the spans together.

    Writes:
        stats_ptr: [STATS, stride_partials] fp32, with STATS_OF_TARGETS more if TARGETS.
        top_ptr: [stride_partials] int32, the student's most likely entry.

    Reads:
        partials_ptr, index_ptr: what `lse_kernel` wrote; of sampled tokens too if TARGETS.
        beta: β, or a pointer to [R] if MIXED.
        SPANS: a power of two, at least `spans`.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    s = tl.arange(0, SPANS)
    exists = (s[:, None] < spans) & (row[None, :] < R)
    at = s[:, None] * stride_partials + row[None, :]
    field = spans * stride_partials
    low = float("-inf")
    top_Ss = tl.load(partials_ptr + TOP_S * field + at, mask=exists, other=low)
    sum_Ss = tl.load(partials_ptr + SUM_S * field + at, mask=exists, other=0.0)
    top_Ts = tl.load(partials_ptr + TOP_T * field + at, mask=exists, other=low)
    sum_Ts = tl.load(partials_ptr + SUM_T * field + at, mask=exists, other=0.0)
    d_tops = tl.load(partials_ptr + D_TOP * field + at, mask=exists, other=0.0)
    indices = tl.load(index_ptr + at, mask=exists, other=0)

    top_S = tl.max(top_Ss, 0)
    first = tl.min(tl.where(top_Ss == top_S[None, :], s[:, None], SPANS), 0)
    first = tl.where(first == SPANS, 0, first)
    winner = s[:, None] == first[None, :]
    d_top = tl.sum(tl.where(winner, d_tops, 0.0), 0)
    index = tl.sum(tl.where(winner, indices, 0), 0)
    scale = tl.exp(top_Ss - finite_or_zero(top_S)[None, :])
    sum_S = tl.sum(scale * sum_Ss, 0)
    top_T = tl.max(top_Ts, 0)
    sum_T = tl.sum(tl.exp(top_Ts - finite_or_zero(top_T)[None, :]) * sum_Ts, 0)
    E = tl.zeros((BM,), tl.float32)
    if LIMIT > 0:
        Es = tl.load(partials_ptr + E_SUM * field + at, mask=exists, other=0.0)
        moved = tl.minimum(tl.maximum(d_tops - d_top[None, :], -LIMIT), LIMIT)
        E = tl.sum(scale * (Es + sum_Ss * moved), 0)

    exists_row = row < R
    if FAMILY == MIXED:
        beta = tl.load(beta + row, mask=exists_row, other=0.5)
    stats = normalizers(top_S, sum_S, top_T, sum_T, d_top, E, beta, entry_clip, FAMILY, CLIPPED)
    if TARGETS:
        z_Sy = tl.sum(tl.load(partials_ptr + Z_S * field + at, mask=exists, other=0.0), 0)
        z_Ty = tl.sum(tl.load(partials_ptr + Z_T * field + at, mask=exists, other=0.0), 0)
        stats = stats + log_probs(z_Sy, z_Ty, top_S, sum_S, top_T, sum_T)
    for i in tl.static_range(len(stats)):
        tl.store(stats_ptr + i * stride_partials + row, stats[i], mask=exists_row)
    tl.store(top_ptr + row, index, mask=exists_row)


@triton.jit
def normalizers(
    top_S,
    sum_S,
    top_T,
    sum_T,
    d_top,
    E,
    beta,
    entry_clip,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
):
    """The fields of `stats` [BM] from the state of rows of which every logit was seen."""
    p_max, q_max, log_sums = 1.0 / sum_S, 1.0 / sum_T, log_quotient(sum_S, sum_T)
    c, s_top, plain = sum_S, sum_S, sum_S  # never read for log p(ŷ)
    if FAMILY != LOG_PROB:
        c, s_top, plain = shift(
            top_S, p_max, top_T, q_max, log_sums, d_top, E / sum_S, beta, entry_clip,
            FAMILY, CLIPPED,
        )  # fmt: skip
    return top_S, p_max, top_T, q_max, log_sums, c, plain, s_top


@triton.jit
def log_probs(z_Sy, z_Ty, top_S, sum_S, top_T, sum_T):
    """log p, log q and log q − log p of the sampled token."""
    x = log_ratio(difference(z_Sy, z_Ty), top_S, top_T, log_quotient(sum_S, sum_T))
    return z_Sy - top_S - tl.log(sum_S), z_Ty - top_T - tl.log(sum_T), x
