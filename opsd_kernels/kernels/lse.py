"""lse: the normalizers of both sides of every token, and the student's most likely entry.

    top_S = max_v z_S,   sum_S = Σ_v exp((z_S − top_S)/T),   L_S = top_S/T + log sum_S

and likewise of z_T. They are kept as p = exp((z_S − top_S)/T) p_max and L_T − L_S =
(top_T − top_S)/T + log_sums need them: p_max = 1 / sum_S, the largest probability, and
log_sums = log(sum_T / sum_S), each rounded once. Logits are those before temperature: they are
subtracted first, without a rounding where they are near, and the difference is multiplied by 1/T.

A matrix product with an online log-sum-exp for an epilogue: logits exist in registers only. The
vocabulary is split into spans, so that a few tokens fill a GPU too; a program takes one tile of
rows and one span, tile by tile of the vocabulary, and writes what it found:

    top_S, sum_S = Σ exp((z_S − top_S)/T), top_T, sum_T over the span,
    the column where z_S is largest, and z_T there,
    E = Σ exp((z_S − top_S)/T) (d − d_top),  d = z_T − z_S, d_top that of the former column,
    z_S and z_T of the sampled token ŷ, if it lies in the span

Until its span is done a program keeps all that in BV / PARTS states a row, each of the columns that
lie so far apart: these the same thread holds, so that nothing passes between threads but once, at
the end (`combined`). `merge` then puts the spans together by the same
function, in their order, and finds the shift c of the row's scores. How the vocabulary is split
depends on its size alone, never on the number of tokens: a token's numbers are the same in any
batch.

E / sum_S is the student's mean of d − d_top. From it follows the reverse KL's G, to the last digit
because only differences to the top entry enter it, and for the others a guess of G (see `shift`).
"""

import triton
import triton.language as tl

from opsd_kernels.kernels import cdiv
from opsd_kernels.kernels.logits_tile import halves, logits_tiles
from opsd_kernels.kernels.pointwise import (
    HUGE,
    LOG_PROB,
    MIXED,
    difference,
    exp,
    log_quotient,
    log_ratio,
    shift,
    within,
)
from opsd_kernels.kernels.tiles import Row

# Fields of `partials` [6 or 8, spans, R] fp32, the last two those of the sampled tokens …
TOP_S, SUM_S, TOP_T, SUM_T, AT_TOP, E_SUM, Z_S, Z_T = (tl.constexpr(i) for i in range(8))
PARTIALS = 8
# … and of `stats` [8 or 11, R] fp32, what is known of a row: top_S, p_max, top_T, q_max, log_sums,
# the shift c of its scores, whether it is plain, the score of its top entry after the shift; and of
# the sampled token log p, log q, and log q − log p.
P_MAX, Q_MAX, S_TOP = tl.constexpr(1), tl.constexpr(3), tl.constexpr(7)
STATS, STATS_OF_TARGETS = tl.constexpr(8), tl.constexpr(3)
LAST = tl.constexpr(2**31 - 1)  # beyond every column
# Rows of a program of `merge`.
MERGE_BM = 8
# Parts of the vocabulary at most, which bounds the size of `partials`.
MAX_SPANS = 160


def span(V: int, row: Row) -> int:
    """Columns of one program of `lse`: as many tiles of the vocabulary as leave the fewest
    multiprocessors idle at the end of a full chunk, and no more of them, so that a few tokens fill
    many multiprocessors too. (Nothing here depends on the number of tokens.)"""
    all_tiles, row_tiles = cdiv(V, row.lse.BV), row.chunk // row.lse.BM

    def duration(tiles: int) -> int:  # in tiles, one after the other
        return cdiv(row_tiles * cdiv(all_tiles, tiles), row.multiprocessors) * tiles

    best = least = cdiv(all_tiles, min(MAX_SPANS, row.multiprocessors))
    for tiles in range(least, 2 * least + 1):
        if duration(tiles) < duration(best):
            best = tiles
    return best * row.lse.BV


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["R", "stride_partials"])
def lse_kernel(
    partials_ptr,
    index_ptr,
    h_S,
    h_T,
    W,
    W_T,
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
    EVEN_V: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    FLAT: tl.constexpr,
    BULK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (row tiles, spans).

    Writes:
        partials_ptr: [6, spans, stride_partials] fp32, two fields more if there are targets.
        index_ptr: [spans, stride_partials] int32, the column of the span's top_S.

    Reads:
        h_S, h_T, W, W_T, D, D_T, strides: see `logits_tiles`.
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
    s = tl.program_id(1)
    target = None
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row, mask=exists, other=0)
    state = nothing(BM, BV // PARTS)
    for v in tl.range(s * span, tl.minimum(s * span + span, V), BV, flatten=FLAT):
        z_S, z_T = logits_tiles(
            h_S,
            h_T,
            W,
            W_T,
            tl.program_id(0) * BM,
            v,
            R,
            V,
            D,
            D_T,
            stride_h_S,
            stride_h_T,
            stride_Wv,
            stride_Wd,
            stride_W_Tv,
            stride_W_Td,
            SHARED,
            BULK,
            EVEN_D,
            EVEN_V,
            BM,
            BV,
            BK,
            OPERAND,
            PRECISION,
        )
        state = absorb(z_S, z_T, v, V, target, state, inverse_temperature, LIMIT, EVEN_V, PARTS)
    state = combined(state, 1, inverse_temperature, LIMIT)
    top_S, sum_S, top_T, sum_T, at_top, E, index, z_Sy, z_Ty = state
    at = s * stride_partials + row
    field = tl.num_programs(1) * stride_partials
    tl.store(partials_ptr + TOP_S * field + at, top_S, mask=exists)
    tl.store(partials_ptr + SUM_S * field + at, sum_S, mask=exists)
    tl.store(partials_ptr + TOP_T * field + at, top_T, mask=exists)
    tl.store(partials_ptr + SUM_T * field + at, sum_T, mask=exists)
    tl.store(partials_ptr + AT_TOP * field + at, at_top, mask=exists)
    if LIMIT > 0:
        tl.store(partials_ptr + E_SUM * field + at, E, mask=exists)
    if targets_ptr is not None:
        tl.store(partials_ptr + Z_S * field + at, z_Sy, mask=exists)
        tl.store(partials_ptr + Z_T * field + at, z_Ty, mask=exists)
    tl.store(index_ptr + at, index, mask=exists)


@triton.jit
def nothing(BM: tl.constexpr, WIDTH: tl.constexpr):
    """The state [BM, WIDTH] of BM rows of which no logit was seen yet: top_S, sum_S, top_T, sum_T,
    z_T at the student's top, E, the column of top_S, and z_S, z_T of the sampled token."""
    zeros = tl.zeros((BM, WIDTH), tl.float32)
    low = tl.full((BM, WIDTH), float("-inf"), tl.float32)
    index = tl.zeros((BM, WIDTH), tl.int32)
    return low, zeros, low, zeros, zeros, zeros, index, zeros, zeros


@triton.jit
def absorb(
    z_S,
    z_T,
    begin,
    V,
    target,
    state,
    inverse_temperature,
    LIMIT: tl.constexpr,
    EVEN_V: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A tile of logits [BM, BV] of the columns `begin` … into the state [BM, BV / PARTS] of its
    rows; columns ≥ V count for nothing unless EVEN_V. `target` [BM] is the column of the sampled
    token, or None."""
    top_S, sum_S, top_T, sum_T, at_top, E, index, z_Sy, z_Ty = state
    tops = (top_S, top_T, at_top, index, z_Sy, z_Ty)
    tops = _tops(z_S, z_T, begin, V, target, tops, EVEN_V, PARTS)
    new_top_S, new_top_T, new_at_top, index, z_Sy, z_Ty = tops
    safe_S, safe_T = finite_or_zero(new_top_S), finite_or_zero(new_top_T)
    scale = exp(top_S - safe_S, inverse_temperature)
    d_top = difference(new_top_S, new_at_top)
    if LIMIT > 0:
        # The reference is the top entry, and has moved with it.
        moved = within(difference(top_S, at_top) - d_top, LIMIT)
        E = (E + sum_S * moved) * scale
    sum_S *= scale
    sum_T *= exp(top_T - safe_T, inverse_temperature)
    sums = (sum_S, sum_T, E)
    references = (safe_S, safe_T, d_top)
    sum_S, sum_T, E = _sums(
        z_S, z_T, begin, V, references, sums, inverse_temperature, LIMIT, EVEN_V, PARTS
    )
    return new_top_S, sum_S, new_top_T, sum_T, new_at_top, E, index, z_Sy, z_Ty


@triton.jit
def _tops(z_S, z_T, begin, V, target, state, EVEN_V: tl.constexpr, PARTS: tl.constexpr):
    """What is largest, and what is asked for by name, in PARTS parts one after the other."""
    if PARTS > 1:
        z_S0, z_S1 = halves(z_S)
        z_T0, z_T1 = halves(z_T)
        state = _tops(z_S0, z_T0, begin, V, target, state, EVEN_V, PARTS // 2)
        begin += z_S0.shape[1]
        return _tops(z_S1, z_T1, begin, V, target, state, EVEN_V, PARTS // 2)
    else:
        top_S, top_T, at_top, index, z_Sy, z_Ty = state
        col = (tl.arange(0, z_S.shape[1]) + begin)[None, :]
        if target is not None:
            is_target = col == target[:, None]
            z_Sy = tl.where(is_target, z_S, z_Sy)
            z_Ty = tl.where(is_target, z_T, z_Ty)
        if not EVEN_V:
            z_S = tl.where(col < V, z_S, float("-inf"))
            z_T = tl.where(col < V, z_T, float("-inf"))
        higher = z_S > top_S  # the first of equal ones stays
        top_S = tl.where(higher, z_S, top_S)
        at_top = tl.where(higher, z_T, at_top)
        index = tl.where(higher, col, index)
        return top_S, tl.maximum(top_T, z_T), at_top, index, z_Sy, z_Ty


@triton.jit
def _sums(
    z_S,
    z_T,
    begin,
    V,
    references,
    sums,
    inverse_temperature,
    LIMIT: tl.constexpr,
    EVEN_V: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What is summed, beside the largest logits, in PARTS parts one after the other."""
    if PARTS > 1:
        z_S0, z_S1 = halves(z_S)
        z_T0, z_T1 = halves(z_T)
        sums = _sums(
            z_S0, z_T0, begin, V, references, sums, inverse_temperature, LIMIT, EVEN_V, PARTS // 2
        )
        begin += z_S0.shape[1]
        return _sums(
            z_S1, z_T1, begin, V, references, sums, inverse_temperature, LIMIT, EVEN_V, PARTS // 2
        )
    else:
        safe_S, safe_T, d_top = references
        sum_S, sum_T, E = sums
        if not EVEN_V:
            exists = (tl.arange(0, z_S.shape[1]) + begin)[None, :] < V
            z_S = tl.where(exists, z_S, float("-inf"))
            z_T = tl.where(exists, z_T, float("-inf"))
        e = exp(z_S - safe_S, inverse_temperature)
        if LIMIT > 0:
            # Where both are −∞ their difference is NaN, which the bounds turn into a number.
            E += e * within((z_T - z_S) - d_top, LIMIT)
        return sum_S + e, sum_T + exp(z_T - safe_T, inverse_temperature), E


@triton.jit
def finite_or_zero(top):
    """What to subtract from logits before exp: −∞ − (−∞) would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def combined(state, AXIS: tl.constexpr, inverse_temperature, LIMIT: tl.constexpr):
    """One state of each row from several, which lie along an axis."""
    top_Ss, sum_Ss, top_Ts, sum_Ts, at_tops, Es, indices, z_Sys, z_Tys = state
    top_S, top_T = tl.max(top_Ss, AXIS), tl.max(top_Ts, AXIS)
    safe_S = tl.expand_dims(finite_or_zero(top_S), AXIS)
    safe_T = tl.expand_dims(finite_or_zero(top_T), AXIS)
    # The first column with the largest logit.
    highest = top_Ss == tl.expand_dims(top_S, AXIS)
    index = tl.min(tl.where(highest, indices, LAST), AXIS)
    winner = highest & (indices == tl.expand_dims(index, AXIS))
    at_top = tl.max(tl.where(winner, at_tops, float("-inf")), AXIS)
    scale = exp(top_Ss - safe_S, inverse_temperature)
    sum_S = tl.sum(scale * sum_Ss, AXIS)
    sum_T = tl.sum(exp(top_Ts - safe_T, inverse_temperature) * sum_Ts, AXIS)
    E = tl.zeros(sum_S.shape, tl.float32)
    if LIMIT > 0:
        d_top = tl.expand_dims(difference(top_S, at_top), AXIS)
        moved = within(difference(top_Ss, at_tops) - d_top, LIMIT)
        E = tl.sum(scale * (Es + sum_Ss * moved), AXIS)
    return top_S, sum_S, top_T, sum_T, at_top, E, index, tl.sum(z_Sys, AXIS), tl.sum(z_Tys, AXIS)


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
    inverse_temperature,
    beta,
    entry_clip,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
    SCALE: tl.constexpr,
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
    low, zeros = float("-inf"), tl.zeros((SPANS, BM), tl.float32)
    E, z_Sy, z_Ty = zeros, zeros, zeros
    if LIMIT > 0:
        E = tl.load(partials_ptr + E_SUM * field + at, mask=exists, other=0.0)
    if TARGETS:
        z_Sy = tl.load(partials_ptr + Z_S * field + at, mask=exists, other=0.0)
        z_Ty = tl.load(partials_ptr + Z_T * field + at, mask=exists, other=0.0)
    state = (
        tl.load(partials_ptr + TOP_S * field + at, mask=exists, other=low),
        tl.load(partials_ptr + SUM_S * field + at, mask=exists, other=0.0),
        tl.load(partials_ptr + TOP_T * field + at, mask=exists, other=low),
        tl.load(partials_ptr + SUM_T * field + at, mask=exists, other=0.0),
        tl.load(partials_ptr + AT_TOP * field + at, mask=exists, other=0.0),
        E,
        tl.load(index_ptr + at, mask=exists, other=0),
        z_Sy,
        z_Ty,
    )
    state = combined(state, 0, inverse_temperature, LIMIT)

    exists_row = row < R
    if FAMILY == MIXED:
        beta = tl.load(beta + row, mask=exists_row, other=0.5)
    stats = normalizers(state, inverse_temperature, beta, entry_clip, FAMILY, CLIPPED, SCALE)
    if TARGETS:
        stats = stats + log_probs(state, inverse_temperature)
    for i in tl.static_range(len(stats)):
        tl.store(stats_ptr + i * stride_partials + row, stats[i], mask=exists_row)
    tl.store(top_ptr + row, state[6], mask=exists_row)


@triton.jit
def normalizers(
    state,
    inverse_temperature,
    beta,
    entry_clip,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
    SCALE: tl.constexpr,
):
    """The fields of `stats` [BM] from the state of rows of which every logit was seen."""
    top_S, sum_S, top_T, sum_T, at_top, E = (
        state[0], state[1], state[2], state[3], state[4], state[5],
    )  # fmt: skip
    p_max, q_max, log_sums = 1.0 / sum_S, 1.0 / sum_T, log_quotient(sum_S, sum_T)
    c, s_top, plain = sum_S, sum_S, sum_S  # never read for log p(ŷ)
    if FAMILY != LOG_PROB:
        c, s_top, plain = shift(
            top_S, p_max, top_T, q_max, log_sums, difference(top_S, at_top),
            E / sum_S * inverse_temperature, inverse_temperature, beta, entry_clip, FAMILY, CLIPPED,
        )  # fmt: skip
        if SCALE != 1:
            # What is scaled has few exponents. |G| ≤ 1 where scores are bounded, so c may be too.
            bounded = tl.minimum(tl.maximum(c, -1.0), 1.0, propagate_nan=tl.PropagateNan.ALL)
            s_top = tl.where(bounded == c, s_top, s_top + (c - bounded) * p_max)
            c = bounded
    return top_S, p_max, top_T, q_max, log_sums, c, plain, s_top


@triton.jit
def log_probs(state, inverse_temperature):
    """log p, log q and log q − log p of the sampled token."""
    top_S, sum_S, top_T, sum_T, z_Sy, z_Ty = (
        state[0], state[1], state[2], state[3], state[7], state[8],
    )  # fmt: skip
    d = z_Ty - z_Sy
    d = within(tl.where(d == d, d, 0.0), HUGE)  # 0 where neither side gives it any mass
    x = log_ratio(d, top_S, top_T, log_quotient(sum_S, sum_T), inverse_temperature)
    log_p = (z_Sy - top_S) * inverse_temperature - tl.log(sum_S)
    return log_p, (z_Ty - top_T) * inverse_temperature - tl.log(sum_T), x
