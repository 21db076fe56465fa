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

An entry's terms are made in PARTS parts of the columns, one after the other: the registers that
hold two tiles of logits leave no room for the rest at once. Parts are added column by column, where
nothing passes between threads; a row's columns meet once, at the end.
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
    exp,
    kullback_leiblers,
    log_ratio,
    value_and_score,
)

# Fields of `sums` [2 or 7, slots, R] fp32: Σ f, and Σ s without the top entry's; with statistics
# also those of forward and reverse KL, of both entropies, and of what the clip took, if one is set.
VALUE, SCORE = tl.constexpr(0), tl.constexpr(1)
SUMS, SUMS_OF_STATISTICS = tl.constexpr(2), tl.constexpr(5)


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["R", "slots", "stride_sums"])
def pair_kernel(
    sums_ptr,
    s_ptr,
    p_ptr,
    h_S,
    h_T,
    W,
    W_T,
    stats_ptr,
    top_ptr,
    keep_ptr,
    v_begin,
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
    SCALE: tl.constexpr,
    SHARED: tl.constexpr,
    MASKED: tl.constexpr,
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
    """Grid (row tiles, programs): a program takes slot after slot, as many apart as there are
    programs; of a slot the columns from v_begin + slot · BV on, up to the vocabulary's end.

    Writes:
        sums_ptr: [SUMS, slots, stride_sums] fp32, SUMS_OF_STATISTICS more if STATISTICS; added to
            unless v_begin is 0.
        s_ptr, p_ptr: [R, stride_tile], columns of the vocabulary from v_begin on, times SCALE; 0
            beyond its end, up to a multiple of BV. None without gradient, p_ptr also where G is
            known.

    Reads:
        h_S, h_T, W, W_T, D, D_T, strides: see `logits_tiles`.
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
    if FAMILY == MIXED:
        beta = tl.load(beta + row, mask=exists, other=0.5)[:, None]
    at_tile = row[:, None].to(tl.int64) * stride_tile - v_begin
    s_ptrs, p_ptrs = s_ptr, p_ptr
    if s_ptr is not None:
        s_ptrs += at_tile
    if p_ptr is not None:
        p_ptrs += at_tile
    stop = tl.minimum(slots, tl.cdiv(V - v_begin, BV))
    for slot in tl.range(tl.program_id(1), stop, tl.num_programs(1), flatten=FLAT):
        begin = v_begin + slot * BV
        z_S, z_T = logits_tiles(
            h_S,
            h_T,
            W,
            W_T,
            tl.program_id(0) * BM,
            begin,
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
        stats = load_stats(stats_ptr, stride_sums, row, exists)
        top = tl.load(top_ptr + row, mask=exists, other=0)[:, None]
        sums = zeros(SUMS + STATISTICS * (SUMS_OF_STATISTICS - 1 + CLIPPED), BM, BV // PARTS)
        given = (top, stats, inverse_temperature, beta, entry_clip)
        sums = _columns(
            z_S, z_T, begin, V, given, exists[:, None], s_ptrs, p_ptrs, sums,
            FAMILY, CLIPPED, STATISTICS, SCALE, EVEN_V, PARTS,
        )  # fmt: skip
        earlier = exists & (v_begin > 0)
        for i in tl.static_range(len(sums)):
            if i != SCORE or s_ptr is not None:
                at = (i * slots + slot) * stride_sums + row
                total = tl.sum(sums[i], 1) + tl.load(sums_ptr + at, mask=earlier, other=0.0)
                tl.store(sums_ptr + at, total, mask=exists)


@triton.jit
def _columns(
    z_S,
    z_T,
    begin,
    V,
    given,
    exists,
    s_ptrs,
    p_ptrs,
    sums,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
    STATISTICS: tl.constexpr,
    SCALE: tl.constexpr,
    EVEN_V: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The columns `begin` … into `sums` [BM, BV / PARTS], and their s and p stored, in PARTS parts
    one after the other; `given` is what `entries` takes beside logits."""
    if PARTS > 1:
        z_S0, z_S1 = halves(z_S)
        z_T0, z_T1 = halves(z_T)
        sums = _columns(
            z_S0, z_T0, begin, V, given, exists, s_ptrs, p_ptrs, sums,
            FAMILY, CLIPPED, STATISTICS, SCALE, EVEN_V, PARTS // 2,
        )  # fmt: skip
        return _columns(
            z_S1, z_T1, begin + z_S0.shape[1], V, given, exists, s_ptrs, p_ptrs, sums,
            FAMILY, CLIPPED, STATISTICS, SCALE, EVEN_V, PARTS // 2,
        )  # fmt: skip
    else:
        col = (tl.arange(0, z_S.shape[1]) + begin)[None, :]
        if not EVEN_V:
            z_S = tl.where(col < V, z_S, float("-inf"))
            z_T = tl.where(col < V, z_T, float("-inf"))
        top, stats, inverse_temperature, beta, entry_clip = given
        terms, p = entries(
            z_S, z_T, col == top, stats, inverse_temperature, beta, entry_clip,
            FAMILY, CLIPPED, STATISTICS,
        )  # fmt: skip
        # No mask but that of the rows: it would hide that columns are contiguous.
        if s_ptrs is not None:
            s = round_to(terms[1] * SCALE, s_ptrs.dtype.element_ty)
            tl.store(s_ptrs + col, s, mask=exists)
        if p_ptrs is not None:
            tl.store(p_ptrs + col, round_to(p * SCALE, p_ptrs.dtype.element_ty), mask=exists)
        return add_each(sums, terms)


@triton.jit
def zeros(FIELDS: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr):
    """FIELDS sums [BM, WIDTH] of nothing."""
    sums = ()
    for _i in tl.static_range(FIELDS):
        sums = sums + (tl.zeros((BM, WIDTH), tl.float32),)
    return sums


@triton.jit
def entries(
    z_S,
    z_T,
    is_top,
    stats,
    inverse_temperature,
    beta,
    entry_clip,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """What entries contribute, from logits [BM, BV] and `stats` [BM, 1] (see `load_stats`).

    Returns:
        A tuple of the terms of all `sums`, of which the first two are f and s = a − c p, and p. s
        and p are 0 at the top entry. The terms of the entropies are those before temperature.
    """
    top_S, p_max, top_T, q_max, log_sums, c, plain = stats
    p = exp(z_S - top_S, inverse_temperature) * p_max
    if FAMILY == LOG_PROB:
        p = tl.where(is_top, 0.0, p)
        return (tl.zeros(p.shape, tl.float32), -p), p
    d = difference(z_S, z_T)
    q = exp(z_T - top_T, inverse_temperature) * q_max
    x = log_ratio(d, top_S, top_T, log_sums, inverse_temperature)
    f, a, excess = value_and_score(p, q, x, plain, beta, entry_clip, FAMILY, CLIPPED)
    # No mass on one side where the other has some.
    if not CLIPPED:
        if FAMILY == FORWARD_KL:
            f = tl.where(d >= HUGE, float("inf"), f)
        elif FAMILY == REVERSE_KL:
            f = tl.where((d <= -HUGE) & (z_S > -HUGE), float("inf"), f)
        elif FAMILY == MIXED:
            f = tl.where((beta == 0) & (d >= HUGE), float("inf"), f)
            f = tl.where((beta == 1) & (d <= -HUGE) & (z_S > -HUGE), float("inf"), f)
    s = tl.where(is_top, 0.0, a - c * p)
    terms = (f, s)
    if STATISTICS:
        forward, reverse = kullback_leiblers(p, q, x)
        forward = tl.where(d >= HUGE, float("inf"), forward)
        reverse = tl.where((d <= -HUGE) & (z_S > -HUGE), float("inf"), reverse)
        terms = terms + (forward, reverse, _mean_term(p, top_S - z_S), _mean_term(q, top_T - z_T))
        if CLIPPED:
            terms = terms + (excess,)
    return terms, tl.where(is_top, 0.0, p)


@triton.jit
def _mean_term(p, below_top):
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
