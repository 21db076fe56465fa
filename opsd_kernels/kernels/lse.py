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
batch. Where processes share the vocabulary, `shard` puts the spans of each together, and `merge`
those states, for which each process is a span.

E / sum_S is the student's mean of d − d_top. From it follows the reverse KL's G, to the last digit
because only differences to the top entry enter it, and for the others a guess of G (see `shift`).
Without a teacher, z_T = 0, it is the mean of top_S − z_S, of which the entropy is made.
"""

import triton
import triton.language as tl

from opsd_kernels.kernels import cdiv
from opsd_kernels.kernels.head import capped, logits_and_slope
from opsd_kernels.kernels.logits_tile import halves, logits_tiles
from opsd_kernels.kernels.pointwise import (
    ENTROPY,
    HUGE,
    LOG_PROB,
    difference,
    exp,
    log_quotient,
    log_ratio,
    parameters_of,
    shift,
    within,
)
from opsd_kernels.kernels.records import State, Stats
from opsd_kernels.kernels.tiles import Row

# Fields of `Partials`, the last two those of the sampled tokens: by their number in `State`.
TOP_S, SUM_S, TOP_T, SUM_T, E_SUM, Z_S = (
    tl.constexpr(State._fields.index(name))
    for name in ("top_S", "sum_S", "top_T", "sum_T", "E", "z_Sy")
)
PARTIALS = tl.constexpr(State._fields.index("index"))
# Fields of `Tokens.stats`: those of `Stats`, and of the sampled token log p, log q, log q − log p.
P_MAX, Q_MAX, C, S_TOP = (
    tl.constexpr(Stats._fields.index(name)) for name in ("p_max", "q_max", "c", "s_top")
)
STATS, STATS_OF_TARGETS = tl.constexpr(len(Stats._fields)), tl.constexpr(3)
LAST = tl.constexpr(2**31 - 1)  # beyond every column
# Rows of a program of `merge`.
MERGE_BM = tl.constexpr(8)
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
@triton.jit(do_not_specialize=["R", "stride"])
def lse_kernel(
    partials,
    h_S,
    h_T,
    W,
    W_T,
    student,
    teacher,
    tokens,
    R,
    stride,
    inverse_temperature,
    tiling,
):
    """Grid (row tiles, spans).

    Writes:
        partials: `Partials`, of sampled tokens too if there are targets.

    Reads:
        h_S, h_T, W, W_T: see `logits_tiles`. Without a teacher nothing is written that comes of
            it, and so nothing made: compilers leave it out.
        student, teacher, tiling: the records.
        tokens: keep and targets, or None of either. A tile of rows none of which is kept is left
            out.
    """
    BM: tl.constexpr = tiling.BM
    LIMIT: tl.constexpr = partials.LIMIT
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = row < R
    if tokens.keep is not None:
        keep = tl.load(tokens.keep + row, mask=exists, other=0)
        if tl.max(keep.to(tl.int32), 0) == 0:
            return
    s = tl.program_id(1)
    target = None
    if tokens.targets is not None:
        target = tl.load(tokens.targets + row, mask=exists, other=0)
    state = nothing(BM, tiling.BV // tiling.PARTS)
    V, span = student.V, partials.span
    for v in range(s * span, tl.minimum(s * span + span, V), tiling.BV):
        z_S, z_T = logits_tiles(
            h_S, h_T, W, W_T, student, teacher, tl.program_id(0) * BM, v, R, tiling
        )
        maps = (
            student.bias, student.softcap, student.scale,
            teacher.bias, teacher.softcap, teacher.scale,
        )  # fmt: skip
        state = absorb(
            z_S,
            z_T,
            v,
            V,
            maps,
            target,
            state,
            inverse_temperature,
            LIMIT,
            tiling.EVEN_V,
            tiling.PARTS,
        )
    state = combined(state, 1, inverse_temperature, LIMIT)
    at = s * stride + row
    field = tl.num_programs(1) * stride
    for i in tl.static_range(PARTIALS):
        if (
            (i != E_SUM or LIMIT > 0)
            and (i < Z_S or tokens.targets is not None)
            and (partials.TEACHER or i == TOP_S or i == SUM_S or i == E_SUM or i == Z_S)
        ):
            tl.store(partials.fields + i * field + at, state[i], mask=exists)
    tl.store(partials.index + at, state.index, mask=exists)


@triton.jit
def nothing(BM: tl.constexpr, WIDTH: tl.constexpr):
    """The state [BM, WIDTH] of BM rows of which no logit was seen yet."""
    zeros = tl.zeros((BM, WIDTH), tl.float32)
    low = tl.full((BM, WIDTH), float("-inf"), tl.float32)
    index = tl.zeros((BM, WIDTH), tl.int32)
    return State(low, zeros, low, zeros, zeros, zeros, zeros, zeros, index)


@triton.jit
def absorb(
    u_S,
    u_T,
    begin,
    V,
    maps,
    target,
    state,
    inverse_temperature,
    LIMIT: tl.constexpr,
    EVEN_V: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A tile of products [BM, BV] of the columns `begin` … into the state [BM, BV / PARTS] of its
    rows; columns ≥ V count for nothing unless EVEN_V. `maps` makes logits of them: bias, softcap
    and scale of the student, and of the teacher (see `head`). `target` [BM] is the column of the
    sampled token, or None."""
    top_S, sum_S, top_T, sum_T, at_top, E, z_Sy, z_Ty, index = state
    tops = (top_S, top_T, at_top, index, z_Sy, z_Ty)
    if maps[1] is None and maps[4] is None:
        tops = _tops(u_S, u_T, begin, V, maps, target, tops, EVEN_V, PARTS)
    else:
        tops = _capped_tops(u_S, u_T, begin, V, maps, target, tops, EVEN_V, PARTS)
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
        u_S, u_T, begin, V, maps, references, sums, inverse_temperature, LIMIT, EVEN_V, PARTS
    )
    return State(new_top_S, sum_S, new_top_T, sum_T, new_at_top, E, z_Sy, z_Ty, index)


@triton.jit
def _capped_tops(
    u_S, u_T, begin, V, maps, target, state, EVEN_V: tl.constexpr, PARTS: tl.constexpr
):
    """`_tops` where a side has a softcap, which is costly: it grows with what is capped, so that it
    is enough to cap what is largest."""
    _bias_S, softcap_S, scale_S, _bias_T, softcap_T, scale_T = maps
    top_S, top_T, at_top, index, z_Sy, z_Ty = state
    zeros, low = tl.zeros(top_S.shape, tl.float32), tl.full(top_S.shape, float("-inf"), tl.float32)
    of_tile = (low, low, zeros, index, zeros, zeros)
    uncapped = (maps[0], None, None, maps[3], None, None)
    of_tile = _tops(u_S, u_T, begin, V, uncapped, target, of_tile, EVEN_V, PARTS)
    z_S, _ = capped(of_tile[0], softcap_S, scale_S)
    z_T, _ = capped(of_tile[1], softcap_T, scale_T)
    at_z_S, _ = capped(of_tile[2], softcap_T, scale_T)
    higher = z_S > top_S  # the first of equal ones stays
    top_S = tl.where(higher, z_S, top_S)
    at_top = tl.where(higher, at_z_S, at_top)
    index = tl.where(higher, of_tile[3], index)
    if target is not None:
        # 0 wherever the sampled token is not.
        z_Sy += capped(of_tile[4], softcap_S, scale_S)[0]
        z_Ty += capped(of_tile[5], softcap_T, scale_T)[0]
    return top_S, tl.maximum(top_T, z_T), at_top, index, z_Sy, z_Ty


@triton.jit
def _tops(u_S, u_T, begin, V, maps, target, state, EVEN_V: tl.constexpr, PARTS: tl.constexpr):
    """What is largest, and what is asked for by name, in PARTS parts one after the other."""
    if PARTS > 1:
        u_S0, u_S1 = halves(u_S)
        u_T0, u_T1 = halves(u_T)
        state = _tops(u_S0, u_T0, begin, V, maps, target, state, EVEN_V, PARTS // 2)
        begin += u_S0.shape[1]
        return _tops(u_S1, u_T1, begin, V, maps, target, state, EVEN_V, PARTS // 2)
    else:
        top_S, top_T, at_top, index, z_Sy, z_Ty = state
        col = (tl.arange(0, u_S.shape[1]) + begin)[None, :]
        z_S, z_T = _logits(u_S, u_T, col, None if EVEN_V else V, maps)
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
    u_S,
    u_T,
    begin,
    V,
    maps,
    references,
    sums,
    inverse_temperature,
    LIMIT: tl.constexpr,
    EVEN_V: tl.constexpr,
    PARTS: tl.constexpr,
):
    """What is summed, beside the largest logits, in PARTS parts one after the other."""
    if PARTS > 1:
        u_S0, u_S1 = halves(u_S)
        u_T0, u_T1 = halves(u_T)
        sums = _sums(
            u_S0, u_T0, begin, V, maps, references, sums,
            inverse_temperature, LIMIT, EVEN_V, PARTS // 2,
        )  # fmt: skip
        begin += u_S0.shape[1]
        return _sums(
            u_S1, u_T1, begin, V, maps, references, sums,
            inverse_temperature, LIMIT, EVEN_V, PARTS // 2,
        )  # fmt: skip
    else:
        col = (tl.arange(0, u_S.shape[1]) + begin)[None, :]
        z_S, z_T = _logits(u_S, u_T, col, None if EVEN_V else V, maps)
        safe_S, safe_T, d_top = references
        sum_S, sum_T, E = sums
        if not EVEN_V:
            z_S = tl.where(col < V, z_S, float("-inf"))
            z_T = tl.where(col < V, z_T, float("-inf"))
        e = exp(z_S - safe_S, inverse_temperature)
        if LIMIT > 0:
            # Where both are −∞ their difference is NaN, which the bounds turn into a number.
            E += e * within((z_T - z_S) - d_top, LIMIT)
        return sum_S + e, sum_T + exp(z_T - safe_T, inverse_temperature), E


@triton.jit
def _logits(u_S, u_T, col, V, maps):
    """Logits of both sides, see `absorb`; V is None if all columns are before it."""
    bias_S, softcap_S, scale_S, bias_T, softcap_T, scale_T = maps
    z_S, _ = logits_and_slope(u_S, col, V, bias_S, softcap_S, scale_S)
    z_T, _ = logits_and_slope(u_T, col, V, bias_T, softcap_T, scale_T)
    return z_S, z_T


@triton.jit
def finite_or_zero(top):
    """What to subtract from logits before exp: −∞ − (−∞) would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def combined(state, AXIS: tl.constexpr, inverse_temperature, LIMIT: tl.constexpr):
    """One state of each row from several, which lie along an axis."""
    top_Ss, sum_Ss, top_Ts, sum_Ts, at_tops, Es, z_Sys, z_Tys, indices = state
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
    z_Sy, z_Ty = tl.sum(z_Sys, AXIS), tl.sum(z_Tys, AXIS)
    return State(top_S, sum_S, top_T, sum_T, at_top, E, z_Sy, z_Ty, index)


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["R", "spans", "stride"])
def merge_kernel(
    tokens,
    partials,
    R,
    spans,
    stride,
    formula,
    SCALE: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Grid (row tiles). Put the spans together.

    Writes:
        tokens: stats and top; of sampled tokens too if there are targets.

    Reads:
        tokens: what is given of each.
        partials: what `lse_kernel` wrote.
        SCALE: what scores will be multiplied by.
        SPANS: a power of two, at least `spans`.
    """
    row = tl.program_id(0) * MERGE_BM + tl.arange(0, MERGE_BM)
    state = merged(partials, row, R, spans, stride, tokens, formula.inverse_temperature, SPANS)
    exists_row = row < R
    parameters = parameters_of(tokens, row, exists_row, formula)
    advantage = None
    if tokens.advantages is not None:
        advantage = tl.load(tokens.advantages + row, mask=exists_row, other=0.0)
    stats = normalizers(state, parameters, advantage, formula, SCALE)
    for i in tl.static_range(STATS):
        tl.store(tokens.stats + i * stride + row, stats[i], mask=exists_row)
    if tokens.targets is not None:
        sampled = log_probs(state, formula.inverse_temperature)
        for i in tl.static_range(STATS_OF_TARGETS):
            tl.store(tokens.stats + (STATS + i) * stride + row, sampled[i], mask=exists_row)
    tl.store(tokens.top + row, state.index, mask=exists_row)


@triton.jit
def merged(partials, row, R, spans, stride, tokens, inverse_temperature, SPANS: tl.constexpr):
    """The state of rows from those of all spans."""
    LIMIT: tl.constexpr = partials.LIMIT
    s = tl.arange(0, SPANS)
    exists = (s[:, None] < spans) & (row[None, :] < R)
    at = s[:, None] * stride + row[None, :]
    field = spans * stride
    fields = ()
    for i in tl.static_range(PARTIALS):
        if (i == E_SUM and LIMIT == 0) or (i >= Z_S and tokens.targets is None):
            found = tl.zeros(at.shape, tl.float32)
        elif not (partials.TEACHER or i == TOP_S or i == SUM_S or i == E_SUM or i == Z_S):
            # The logits that E is made of are 0; of a sum that there is not, nothing is made.
            found = tl.full(at.shape, 1.0 if i == SUM_T else 0.0, tl.float32)
        elif i == TOP_S or i == TOP_T:
            found = tl.load(partials.fields + i * field + at, mask=exists, other=float("-inf"))
        else:
            found = tl.load(partials.fields + i * field + at, mask=exists, other=0.0)
        fields = fields + (found,)
    state = State(*fields, tl.load(partials.index + at, mask=exists, other=0))  # type: ignore[call-arg]
    return combined(state, 0, inverse_temperature, LIMIT)


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["R", "spans", "stride"])
def shard_kernel(own, tokens, partials, R, spans, stride, inverse_temperature, SPANS: tl.constexpr):
    """Grid (row tiles). Put the spans of a shard together, where other processes have others.

    Writes:
        own: `Partials` of one span, which is all of the shard.

    For the others see `merge_kernel`.
    """
    row = tl.program_id(0) * MERGE_BM + tl.arange(0, MERGE_BM)
    state = merged(partials, row, R, spans, stride, tokens, inverse_temperature, SPANS)
    for i in tl.static_range(PARTIALS):
        if i < Z_S or tokens.targets is not None:
            tl.store(own.fields + i * stride + row, state[i], mask=row < R)
    tl.store(own.index + row, state.index, mask=row < R)


@triton.jit
def normalizers(state, parameters, advantage, formula, SCALE: tl.constexpr):
    """The `Stats` [BM] from the state of rows of which every logit was seen; `advantage` is None
    without a policy term."""
    top_S, sum_S, top_T, sum_T = state.top_S, state.sum_S, state.top_T, state.sum_T
    p_max, q_max, log_sums = 1.0 / sum_S, 1.0 / sum_T, log_quotient(sum_S, sum_T)
    c, s_top, plain = sum_S, sum_S, sum_S  # never read for log p(ŷ)
    mean_d = state.E / sum_S * formula.inverse_temperature
    if formula.FAMILY == ENTROPY:
        c, s_top = mean_d, -mean_d * p_max
    elif formula.FAMILY != LOG_PROB:
        d_top = difference(top_S, state.at_top)
        c, s_top, plain = shift(
            top_S, p_max, top_T, q_max, log_sums, d_top, mean_d, parameters, formula
        )
        if SCALE != 1:
            # What is scaled has few exponents. |G| ≤ 1 where scores are bounded, so c may be too.
            bounded = tl.minimum(tl.maximum(c, -1.0), 1.0, propagate_nan=tl.PropagateNan.ALL)
            s_top = tl.where(bounded == c, s_top, s_top + (c - bounded) * p_max)
            c = bounded
    if advantage is not None:
        # It is known beforehand what −A adds to G.
        c, s_top = c - advantage, s_top + advantage * p_max
    return Stats(top_S, p_max, top_T, q_max, log_sums, c, plain, s_top)


@triton.jit
def log_probs(state, inverse_temperature):
    """log p, log q and log q − log p of the sampled token."""
    top_S, sum_S, top_T, sum_T = state.top_S, state.sum_S, state.top_T, state.sum_T
    d = state.z_Ty - state.z_Sy
    d = within(tl.where(d == d, d, 0.0), HUGE)  # 0 where neither side gives it any mass
    x = log_ratio(d, top_S, top_T, log_quotient(sum_S, sum_T), inverse_temperature)
    log_p = (state.z_Sy - top_S) * inverse_temperature - tl.log(sum_S)
    return log_p, (state.z_Ty - top_T) * inverse_temperature - tl.log(sum_T), x
