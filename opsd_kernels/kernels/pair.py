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
and only one tile, s = −p, which is 0 at ŷ: that takes the top entry's place. So it is for the
entropy, s = p ((top_S − z_S)/T − c) with c the student's mean of the former term.

Of a policy term −A log p(ŷ) nothing is seen here: c is lower by A, and `finish` adds what is of ŷ.

Where the student's logits are capped (see `head`), s and p are multiplied by the slope of the cap
as they are stored, and what is summed is not: G is the sum of scores. `finish` is told the slope at
the top entry, and where there is a policy term at ŷ.

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

from opsd_kernels.kernels.head import logits_and_slope
from opsd_kernels.kernels.logits_tile import halves, logits_tiles, round_to
from opsd_kernels.kernels.lse import STATS
from opsd_kernels.kernels.pointwise import (
    ENTROPY,
    HUGE,
    LOG_PROB,
    columns_of,
    difference,
    exp,
    infinite_where,
    kullback_leiblers,
    log_ratio,
    parameters_of,
    value_and_score,
)
from opsd_kernels.kernels.records import Stats

# Fields of `Scored.sums` [2 to 9, slots, stride] fp32: Σ f, and Σ s without the top entry's; with
# statistics also those of forward and reverse KL, of both entropies, and of what the clip took, if
# one is set; last slopes, if the student has a softcap.
VALUE, SCORE = tl.constexpr(0), tl.constexpr(1)
SUMS, SUMS_OF_STATISTICS = tl.constexpr(2), tl.constexpr(5)


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["R", "stride"])
def pair_kernel(
    scored,
    h_S,
    h_T,
    W,
    W_T,
    student,
    teacher,
    tokens,
    R,
    stride,
    formula,
    tiling,
):
    """Grid (row tiles, slots): of a slot the columns from `scored.begin` + slot · BV on, up to the
    vocabulary's end.

    Writes:
        scored: sums, added to unless `begin` is 0; s and p, as far as they are there, 0 beyond the
            vocabulary's end, up to a multiple of BV.

    Reads:
        h_S, h_T, W, W_T: see `logits_tiles`.
        student, teacher, formula, tiling: the records.
        tokens: stats and top; of LOG_PROB targets instead; what is given of each; and keep, or
            None: a tile of rows none of which is kept is left out.
    """
    BM: tl.constexpr = tiling.BM
    BV: tl.constexpr = tiling.BV
    OF_STATISTICS: tl.constexpr = SUMS_OF_STATISTICS - 1 + formula.CLIPPED
    FIELDS: tl.constexpr = SUMS + scored.STATISTICS * OF_STATISTICS + scored.SLOPES
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = row < R
    if tokens.keep is not None:
        keep = tl.load(tokens.keep + row, mask=exists, other=0)
        if tl.max(keep.to(tl.int32), 0) == 0:
            return
    parameters = columns_of(parameters_of(tokens, row, exists, formula))
    at_tile = row[:, None].to(tl.int64) * scored.stride - scored.begin
    s_ptrs, p_ptrs = scored.s, scored.p
    if scored.s is not None:
        s_ptrs += at_tile
    if scored.p is not None:
        p_ptrs += at_tile
    V = student.V
    stop = tl.minimum(scored.slots, tl.cdiv(V - scored.begin, BV))
    # One turn. Without a loop a compiler loads what belongs to the rows before it multiplies, and
    # spills ten times as much.
    for slot in range(tl.program_id(1), stop, tl.num_programs(1)):
        begin = scored.begin + slot * BV
        z_S, z_T = logits_tiles(
            h_S, h_T, W, W_T, student, teacher, tl.program_id(0) * BM, begin, R, tiling
        )
        stats = load_stats(tokens, stride, row, exists)
        top = top_of(tokens, row, exists, formula)[:, None]
        target = top  # any: a tuple holds no None
        if scored.SLOPES == 2:
            target = tl.load(tokens.targets + row, mask=exists, other=-1)[:, None]
        of_rows = (top, target, stats, parameters, exists[:, None])
        added = _columns(
            z_S, z_T, begin, None if tiling.EVEN_V else V, student, teacher, of_rows,
            (s_ptrs, p_ptrs), zeros(FIELDS, BM, BV // tiling.PARTS), formula, scored,
            tiling.PARTS,
        )  # fmt: skip
        # A mask of a tensor and a number is one that Triton 3.9's interpreter refuses.
        earlier = row < tl.where(scored.begin > 0, R, 0)
        for i in tl.static_range(FIELDS):
            if i != SCORE or scored.SCORES:
                at = (i * scored.slots + slot) * stride + row
                total = tl.sum(added[i], 1) + tl.load(scored.sums + at, mask=earlier, other=0.0)
                tl.store(scored.sums + at, total, mask=exists)


@triton.jit
def _columns(
    z_S,
    z_T,
    begin,
    V,
    student,
    teacher,
    of_rows,
    pointers,
    sums,
    formula,
    scored,
    PARTS: tl.constexpr,
):
    """The columns `begin` … into `sums` [BM, BV / PARTS], and their s and p stored, in PARTS parts
    one after the other.

    Args:
        V: the vocabulary's end, or None if all columns are before it.
        of_rows: top entry, sampled token if `scored.SLOPES` are 2, `Stats`, parameters and whether
            it exists, of each row [BM, 1].
        pointers: to rows of s and p, to which a column of the vocabulary is added; None of what is
            not stored.
    """
    if PARTS > 1:
        z_S0, z_S1 = halves(z_S)
        z_T0, z_T1 = halves(z_T)
        sums = _columns(
            z_S0, z_T0, begin, V, student, teacher, of_rows, pointers, sums,
            formula, scored, PARTS // 2,
        )  # fmt: skip
        return _columns(
            z_S1, z_T1, begin + z_S0.shape[1], V, student, teacher, of_rows, pointers, sums,
            formula, scored, PARTS // 2,
        )  # fmt: skip
    else:
        col = (tl.arange(0, z_S.shape[1]) + begin)[None, :]
        z_S, slope = logits_and_slope(z_S, col, V, student.bias, student.softcap, student.scale)
        z_T, _ = logits_and_slope(z_T, col, V, teacher.bias, teacher.softcap, teacher.scale)
        if V is not None:
            z_S = tl.where(col < V, z_S, float("-inf"))
            z_T = tl.where(col < V, z_T, float("-inf"))
        top, target, stats, parameters, exists = of_rows
        terms, p = entries(z_S, z_T, col == top, stats, parameters, formula, scored.STATISTICS)
        # No mask but that of the rows: it would hide that columns are contiguous.
        s_ptrs, p_ptrs = pointers
        if s_ptrs is not None:
            s = terms[1] * scored.SCALE * slope
            tl.store(s_ptrs + col, round_to(s, s_ptrs.dtype.element_ty), mask=exists)
        if p_ptrs is not None:
            p = p * scored.SCALE * slope
            tl.store(p_ptrs + col, round_to(p, p_ptrs.dtype.element_ty), mask=exists)
        if scored.SLOPES > 0:
            terms = terms + (tl.where(col == top, slope, 0.0),)
        if scored.SLOPES == 2:
            terms = terms + (tl.where(col == target, slope, 0.0),)
        return add_each(sums, terms)


@triton.jit
def zeros(FIELDS: tl.constexpr, BM: tl.constexpr, WIDTH: tl.constexpr):
    """FIELDS sums [BM, WIDTH] of nothing."""
    sums = ()
    for _i in tl.static_range(FIELDS):
        sums = sums + (tl.zeros((BM, WIDTH), tl.float32),)
    return sums


@triton.jit
def entries(z_S, z_T, is_top, stats, parameters, formula, STATISTICS: tl.constexpr):
    """What entries contribute, from logits [BM, BV], and the `Stats` and parameters
    [BM, 1] of their rows.

    Returns:
        A tuple of the terms of all `sums`, of which the first two are f and s = a − c p, and p. s
        and p are 0 at the top entry. The terms of the entropies are those before temperature.
    """
    FAMILY: tl.constexpr = formula.FAMILY
    inverse_temperature = formula.inverse_temperature
    top_S, top_T = stats.top_S, stats.top_T
    p = exp(z_S - top_S, inverse_temperature) * stats.p_max
    if FAMILY == LOG_PROB:
        p = tl.where(is_top, 0.0, p)
        return (tl.zeros(p.shape, tl.float32), -p), p
    elif FAMILY == ENTROPY:
        p = tl.where(is_top, 0.0, p)
        a = _mean_term(p, top_S - z_S) * inverse_temperature
        return (tl.zeros(p.shape, tl.float32), a - stats.c * p), p
    d = difference(z_S, z_T)
    q = exp(z_T - top_T, inverse_temperature) * stats.q_max
    x = log_ratio(d, top_S, top_T, stats.log_sums, inverse_temperature)
    f, a, excess = value_and_score(p, q, x, stats.plain, parameters, formula)
    if (formula.FORWARD or formula.REVERSE) and not formula.CLIPPED:
        f = infinite_where(f, d, z_S, parameters, formula)
    s = tl.where(is_top, 0.0, a - stats.c * p)
    terms = (f, s)
    if STATISTICS:
        forward, reverse, _q_minus_p = kullback_leiblers(p, q, x)
        forward = tl.where(d >= HUGE, float("inf"), forward)
        reverse = tl.where((d <= -HUGE) & (z_S > -HUGE), float("inf"), reverse)
        terms = terms + (forward, reverse, _mean_term(p, top_S - z_S), _mean_term(q, top_T - z_T))
        if formula.CLIPPED:
            terms = terms + (excess,)
    return terms, tl.where(is_top, 0.0, p)


@triton.jit
def with_policy_term(g, col, policy):
    """g with −A at the sampled token, which G has already; `policy` is
    A and ŷ, [BM, 1] each."""
    advantage, target = policy
    return tl.where(col == target, g - advantage, g)


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
def load_stats(tokens, stride, row, exists):
    """The `Stats` of rows, [BM, 1] each."""
    ptrs = tokens.stats + row
    stats = ()
    for i in tl.static_range(STATS):
        field = tl.load(ptrs + i * stride, mask=exists, other=0.0)
        stats = stats + (field[:, None],)
    return Stats(*stats)


@triton.jit
def top_of(tokens, row, mask, formula):
    """The entry of rows [BM] whose gradient is given apart: the student's most likely, or ŷ."""
    if formula.FAMILY == LOG_PROB:
        top = tl.load(tokens.targets + row, mask=mask, other=0)
    else:
        top = tl.load(tokens.top + row, mask=mask, other=0)
    return top
