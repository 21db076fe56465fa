"""pair: values and scores of one tile of the vocabulary, from hidden states.

With L_S, L_T and c of every row known (see `lse`), the logits are computed once more, and from them

    Σ f          this tile's part of the divergence
    s = a − c p  the score, shifted by c ≈ G
    Σ s          this tile's part of G − c

The tiles s and p go to scratch, in the dtype of the operands of the products that follow,

    A += s W,   P += p W   over tiles of the vocabulary, in fp32
    dh_S = (A − (G − c) P + g_top W_top) / T

because Σ_v (s − (G − c) p) W is linear in G: G may be known last. Where it is known first
(`KNOWS_G`), c = G and P is not needed. Tiles of a and p would cancel only after they were rounded;
with c near G the second term is a small correction. The student's top entry, often nearly all of
the mass, is stored as 0 in both tiles: `finish` adds its part of the gradient in fp32.

For log p(ŷ) of a sampled token, whose gradient is 1[v = ŷ] − p, there are the student's logits
alone, and one tile, s = −p. It is 0 at ŷ, which takes the place of the top entry. The entropy has
one tile too, s = p ((top_S − z_S)/T − c), with c the student's mean of (top_S − z_S)/T.

A log-sum-exp has the score p of those entries that are not excluded, and G = 0.

A policy term −A log p(ŷ) changes nothing here: c is lower by A, and `finish` adds the part of ŷ.

Where the student's logits are capped (see `head`), s and p are multiplied by the slope of the cap
as they are stored. The sums are without it: G is the sum of scores. `finish` gets the slope at the
top entry, and for a policy term the slope at ŷ.

The statistics of `token_divergence` are sums over the same entries: of the values of both KLs, of
p (top_S − z_S) and q (top_T − z_T) for the entropies, and of what the clip took off.

Sums go to slots, one for each block of columns, and the next tile of the vocabulary adds to them:
no atomics, and one order of summation whichever program runs first.

A tile is processed in PARTS parts of its columns, one after the other: the registers that hold two
tiles of logits leave no room for everything else at once. Parts are added column by column, which
passes nothing between threads; the columns of a row are added up once, at the end.
"""

from typing import Any

import triton
import triton.language as tl

from ..divergence import Family
from ..problem import Problem
from . import cdiv
from .excluded import excluded_tile
from .head import logits_and_slope
from .logits_tile import halves, logits_tiles, operands, round_to
from .pointwise import (
    ENTROPY,
    HUGE,
    LOG_PROB,
    LOG_SUM,
    columns_of,
    difference,
    exp,
    formula_of,
    infinite_where,
    kullback_leiblers,
    log_ratio,
    parameters_of,
    value_and_score,
)
from .records import SCORE, STATS, SUMS, SUMS_OF_STATISTICS, PerToken, Scored, Stats
from .scratch import Scratch


def arguments(scratch: Scratch, chunk: Problem) -> dict[str, Any]:
    """The arguments of `launch` for a chunk of tokens, whatever the columns."""
    R, tile = chunk.h_S.shape[0], scratch.pair
    needs_targets = chunk.member.family == Family.LOG_PROB or scratch.slopes == 2
    tokens = PerToken.of(
        chunk, scratch.stats, scratch.top, needs_targets=needs_targets, bits=scratch.bits
    )
    if not chunk.member.is_divergence:
        chunk = chunk.without_teacher()
    s, p = scratch.s_and_p(R)
    return {
        "scored": scored_of(scratch)._replace(
            s=s, p=p, stride=scratch.columns, SCALE=tl.constexpr(scratch.scale)
        ),
        "tokens": tokens,
        "R": R,
        "stride": scratch.rows,
        "formula": formula_of(chunk.member, chunk.temperature),
        **operands(chunk, tile),
    }


def launch(arguments: dict[str, Any], v: int) -> None:
    """sums, s, p ← those of the columns from v on, as many as there are slots."""
    scored, tiling = arguments["scored"], arguments["tiling"]
    row_tiles = cdiv(arguments["R"], tiling.BM.value)
    slots = min(scored.slots, cdiv(arguments["student"].V - v, tiling.BV.value))
    pair_kernel[(row_tiles, slots)](**arguments | {"scored": scored._replace(begin=v)})


def scored_of(scratch: Scratch) -> Scored:
    """The sums alone."""
    fields, slots, _rows = scratch.sums.shape
    statistics = fields - scratch.slopes > SUMS.value
    return Scored(
        scratch.sums,
        slots,
        SCORES=tl.constexpr(scratch.scores),
        STATISTICS=tl.constexpr(statistics),
        SLOPES=tl.constexpr(scratch.slopes),
    )


# Numbers that depend on the batch do not cause a recompilation.
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
    """Grid (row tiles, slots). A slot is the BV columns from `scored.begin` + slot · BV on, as far
    as the vocabulary goes.

    Writes:
        scored: sums, added to unless `begin` is 0; s and p unless None, with 0 beyond the
            vocabulary's end, up to a multiple of BV.

    Reads:
        h_S, h_T, W, W_T: see `logits_tiles`.
        student, teacher, formula, tiling: the records.
        tokens: all fields; for LOG_PROB targets take the place of top. A tile of rows is skipped
            if none of them counts.
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
    # The loop has one iteration. Without a loop the compiler loads the numbers of the rows before
    # the products, and spills ten times as much.
    for slot in range(tl.program_id(1), stop, tl.num_programs(1)):
        begin = scored.begin + slot * BV
        start = None
        if tokens.bits is not None:
            start = excluded_tile(begin, row, exists, tokens, BV)
        z_S, z_T = logits_tiles(
            h_S, h_T, W, W_T, student, teacher, tl.program_id(0) * BM, begin, R, tiling, start
        )
        stats = load_stats(tokens, stride, row, exists)
        top = top_of(tokens, row, exists, formula)[:, None]
        target = top  # a tuple cannot hold None
        if scored.SLOPES == 2:
            target = tl.load(tokens.targets + row, mask=exists, other=-1)[:, None]
        of_rows = (top, target, stats, parameters, exists[:, None])
        added = _columns(
            z_S, z_T, begin, None if tiling.EVEN_V else V, student, teacher, of_rows,
            (s_ptrs, p_ptrs), zeros(FIELDS, BM, BV // tiling.PARTS), formula, scored,
            tiling.PARTS,
        )  # fmt: skip
        # Triton 3.9's interpreter refuses a mask that is made of a tensor and a number.
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
    """Add the columns from `begin` on to `sums` [BM, BV / PARTS] and store their s and p, in PARTS
    parts one after the other.

    Args:
        V: the vocabulary's end, or None if all columns are before it.
        of_rows: of each row [BM, 1] the top entry, the sampled token if `scored.SLOPES` is 2, the
            `Stats`, the parameters, and whether it exists.
        pointers: to s and p of each row; the index of a column is added. None if not stored.
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
        # A mask of the columns would hide that they are contiguous.
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
    """FIELDS sums [BM, WIDTH], all 0."""
    sums = ()
    for _i in tl.static_range(FIELDS):
        sums = sums + (tl.zeros((BM, WIDTH), tl.float32),)
    return sums


@triton.jit
def entries(z_S, z_T, is_top, stats, parameters, formula, STATISTICS: tl.constexpr):
    """The terms of entries, from logits [BM, BV] and the `Stats` and parameters [BM, 1] of their
    rows.

    Returns:
        A tuple of the terms of all `sums`, which begins with f and s = a − c p; and p. s and p are
        0 at the top entry. The terms of the entropies are those before temperature.
    """
    FAMILY: tl.constexpr = formula.FAMILY
    inverse_temperature = formula.inverse_temperature
    top_S, top_T = stats.top_S, stats.top_T
    p = exp(z_S - top_S, inverse_temperature) * stats.p_max
    if FAMILY == LOG_PROB:
        p = tl.where(is_top, 0.0, p)
        return (tl.zeros(p.shape, tl.float32), -p), p
    elif FAMILY == LOG_SUM:
        p = tl.where(is_top, 0.0, p)
        return (tl.zeros(p.shape, tl.float32), p), p
    elif FAMILY == ENTROPY:
        p = tl.where(is_top, 0.0, p)
        a = _mean_term(p, top_S - z_S) * inverse_temperature
        return (tl.zeros(p.shape, tl.float32), a - stats.c * p), p
    d = difference(z_S, z_T)
    q = exp(z_T - top_T, inverse_temperature) * stats.q_max
    x = log_ratio(d, top_S, top_T, stats.log_sums, inverse_temperature)
    f, a, excess = value_and_score(p, q, x, stats.without_null, parameters, formula)
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
    """g with the −A of the sampled token; G contains it already. `policy` is A and ŷ, [BM, 1]
    each."""
    advantage, target = policy
    return tl.where(col == target, g - advantage, g)


@triton.jit
def _mean_term(p, below_top):
    """p (top − z), 0 where z is −∞."""
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
    """The entry of each row [BM] whose gradient is computed apart: the student's most likely entry,
    or for LOG_PROB ŷ."""
    if formula.FAMILY == LOG_PROB:
        top = tl.load(tokens.targets + row, mask=mask, other=0)
    else:
        top = tl.load(tokens.top + row, mask=mask, other=0)
    return top
