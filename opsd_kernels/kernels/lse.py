"""lse: the normalizers of both sides of every token, and the student's most likely entry.

    top_S = max_v z_S,   sum_S = Σ_v exp((z_S − top_S)/T),   L_S = top_S/T + log sum_S

and likewise of z_T. They are stored as what p = exp((z_S − top_S)/T) p_max and L_T − L_S =
(top_T − top_S)/T + log_sums need: p_max = 1 / sum_S, the largest probability, and log_sums =
log(sum_T / sum_S), each rounded once. Logits are those before temperature: their difference, which
is exact where they are close, is multiplied by 1/T.

The kernel is a matrix product whose epilogue is an online log-sum-exp: logits exist in registers
only. The vocabulary is split into spans, so that a few tokens fill a GPU too. A program takes one
tile of rows and one span, tile by tile of the vocabulary, and writes for each row

    top_S, sum_S, top_T, sum_T over the span,
    the column where z_S is largest, and z_T there,
    E = Σ exp((z_S − top_S)/T) (d − d_top),  d = z_T − z_S, d_top that of the former column,
    z_S and z_T of the sampled token ŷ, if the span contains it

Within its span a program keeps BV / PARTS states a row, each of the columns that the same thread
holds. So nothing passes between threads until the states are combined at the end (`combined`).
`merge` combines the spans of a row by the same function, in their order, and finds the shift c of
its scores. The spans depend on the size of the vocabulary alone, not on the number of tokens: a
token gets the same numbers in any batch. Where processes share the vocabulary, `shard` combines the
spans of each process, and `merge` the states of the processes, each as one span.

Entries that are excluded count as banned ones (`excluded`); for their log-sum-exp see `finish`.

E / sum_S is the student's mean of d − d_top. From it follows G of the reverse KL, to the last digit
because only differences to the top entry enter it, and a guess of G for the other members (see
`shift`). Without a teacher, with z_T = 0, it is the mean of top_S − z_S, and the entropy follows
from it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..heads.vocabulary_parallel import gathered, local_ids
from ..problem import Problem
from . import cdiv
from .excluded import excluded_tile
from .head import capped, logits_and_slope
from .logits_tile import halves, logits_tiles, operands
from .pointwise import (
    ENTROPY,
    HUGE,
    LOG_PROB,
    LOG_SUM,
    difference,
    exp,
    formula_of,
    log_quotient,
    log_ratio,
    parameters_of,
    shift,
    within,
)
from .records import PARTIALS, STATS, STATS_OF_TARGETS, Partials, PerToken, State, Stats
from .scratch import Scratch
from .tiles import span

# Fields of `Partials.fields`; the last two are those of the sampled tokens.
TOP_S, SUM_S, TOP_T, SUM_T, E_SUM, Z_S = (
    tl.constexpr(State._fields.index(name))
    for name in ("top_S", "sum_S", "top_T", "sum_T", "E", "z_Sy")
)
# Fields of `PerToken.stats`.
P_MAX, Q_MAX, C, S_TOP = (
    tl.constexpr(Stats._fields.index(name)) for name in ("p_max", "q_max", "c", "s_top")
)
LAST = tl.constexpr(2**31 - 1)  # beyond every column
# Rows of a program of `merge`.
MERGE_BM = tl.constexpr(8)


def launch(scratch: Scratch, chunk: Problem) -> None:
    """stats, top ← L_S, L_T, c and the top entry of a chunk's tokens."""
    R, V = chunk.h_S.shape[0], chunk.W.shape[0]
    partials, tile = _partials(scratch, chunk), scratch.row.lse
    spans, stride = scratch.index.shape
    bits = scratch.bits
    stride_bits = None if bits is None else bits.stride(0)
    lse_kernel[(cdiv(R, tile.BM), spans)](
        partials=partials,
        tokens=PerToken(chunk.keep, chunk.targets, bits=bits, stride_bits=stride_bits),
        R=R,
        stride=stride,
        inverse_temperature=1 / chunk.temperature,
        **operands(chunk, tile),
    )
    if chunk.group is not None:
        partials = _partials_of_all(scratch, chunk)
        spans = partials.index.shape[0]
    merge_kernel[(cdiv(R, MERGE_BM.value),)](
        tokens=PerToken.of(chunk, scratch.stats, scratch.top, needs_keep=False),
        partials=partials,
        R=R,
        spans=spans,
        stride=stride,
        formula=formula_of(chunk.member, chunk.temperature),
        SCALE=scratch.scale,
        SPANS=triton.next_power_of_2(spans),
    )
    if chunk.offset is not None:
        scratch.top[:R] = local_ids(scratch.top[:R], chunk.offset, V)


def _partials(scratch: Scratch, chunk: Problem) -> Partials:
    return Partials(
        scratch.partials,
        scratch.index,
        span(chunk.W.shape[0], scratch.row),
        LIMIT=tl.constexpr(scratch.mean_limit),
        TEACHER=tl.constexpr(chunk.h_T is not None),
    )


def _partials_of_all(scratch: Scratch, chunk: Problem) -> Partials:
    """The states of all shards of a group, each as one span."""
    assert chunk.group is not None
    assert chunk.offset is not None
    R, stride = chunk.h_S.shape[0], scratch.rows
    own = launch_shard(scratch, chunk)
    own[-1] += chunk.offset  # now an entry of the whole vocabulary
    found = gathered(own[:, :R], chunk.group)
    of_all = own.new_empty(found.shape[1], found.shape[0], stride)
    of_all[:, :, :R] = found.transpose(0, 1)
    return _of_spans(_partials(scratch, chunk), of_all)


def launch_shard(scratch: Scratch, chunk: Problem) -> Tensor:
    """The state of a shard from those of its spans, [7 or 9, R] int32: the bits of the fp32 fields
    of `Partials`, and below them the index."""
    R, (spans, stride) = chunk.h_S.shape[0], scratch.index.shape
    partials = _partials(scratch, chunk)
    own = scratch.index.new_empty(scratch.partials.shape[0] + 1, stride)
    shard_kernel[(cdiv(R, MERGE_BM.value),)](
        own=_of_spans(partials, own),
        tokens=PerToken(targets=chunk.targets),
        partials=partials,
        R=R,
        spans=spans,
        stride=stride,
        inverse_temperature=1 / chunk.temperature,
        SPANS=triton.next_power_of_2(spans),
    )
    return own


def _of_spans(partials: Partials, found: Tensor) -> Partials:
    return partials._replace(fields=found[:-1].view(torch.float32), index=found[-1])


# Numbers that depend on the batch do not cause a recompilation.
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
        partials: the last two fields only if there are targets.

    Reads:
        h_S, h_T, W, W_T: see `logits_tiles`. Without a teacher its results are not written, and
            compilers drop their computation.
        student, teacher, tiling: the records.
        tokens: keep, targets and bits, each may be None. A tile of rows is skipped if none of them
            counts.
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
        start = None
        if tokens.bits is not None:
            start = excluded_tile(v, row, exists, tokens, tiling.BV)
        z_S, z_T = logits_tiles(
            h_S, h_T, W, W_T, student, teacher, tl.program_id(0) * BM, v, R, tiling, start
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
    """The state [BM, WIDTH] of BM rows before their first logit."""
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
    """The state [BM, BV / PARTS] of rows after one more tile of products [BM, BV], of the columns
    from `begin` on. Unless EVEN_V, columns ≥ V are ignored. `maps` turns products into logits:
    bias, softcap and scale of the student, and of the teacher (see `head`). `target` [BM] is the
    column of the sampled token, or None."""
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
        # E is relative to the top entry, which may be a new one.
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
    """`_tops` where a side has a softcap. A cap is costly, and increases with its argument, so only
    the largest product of a tile is capped."""
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
        # The products are 0 in tiles without the sampled token, and so are the capped ones.
        z_Sy += capped(of_tile[4], softcap_S, scale_S)[0]
        z_Ty += capped(of_tile[5], softcap_T, scale_T)[0]
    return top_S, tl.maximum(top_T, z_T), at_top, index, z_Sy, z_Ty


@triton.jit
def _tops(u_S, u_T, begin, V, maps, target, state, EVEN_V: tl.constexpr, PARTS: tl.constexpr):
    """The largest logits, and those of the sampled token, in PARTS parts one after the other."""
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
    """The sums relative to the largest logits, in PARTS parts one after the other."""
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
            # Where both are −∞ the difference is NaN, which the bounds turn into a number.
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
    """The number to subtract from logits before exp: −∞ − (−∞) would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def combined(state, AXIS: tl.constexpr, inverse_temperature, LIMIT: tl.constexpr):
    """One state of each row from several states along an axis."""
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


# Numbers that depend on the batch do not cause a recompilation.
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
    """Grid (row tiles). Combine the spans.

    Writes:
        tokens: stats and top; the last three fields of stats if there are targets.

    Reads:
        tokens: all other fields.
        partials: see `lse_kernel`.
        SCALE: the factor of scores in `Scored`.
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
    """The state of rows from the states of all spans."""
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
            # E has z_T = 0; the other fields are not used without a teacher.
            found = tl.full(at.shape, 1.0 if i == SUM_T else 0.0, tl.float32)
        elif i == TOP_S or i == TOP_T:
            found = tl.load(partials.fields + i * field + at, mask=exists, other=float("-inf"))
        else:
            found = tl.load(partials.fields + i * field + at, mask=exists, other=0.0)
        fields = fields + (found,)
    state = State(*fields, tl.load(partials.index + at, mask=exists, other=0))  # type: ignore[call-arg]
    return combined(state, 0, inverse_temperature, LIMIT)


# Numbers that depend on the batch do not cause a recompilation.
@triton.jit(do_not_specialize=["R", "spans", "stride"])
def shard_kernel(own, tokens, partials, R, spans, stride, inverse_temperature, SPANS: tl.constexpr):
    """Grid (row tiles). Combine the spans of one shard of a vocabulary that processes share.

    Writes:
        own: `Partials` of one span, the whole shard.

    The other arguments are those of `merge_kernel`.
    """
    row = tl.program_id(0) * MERGE_BM + tl.arange(0, MERGE_BM)
    state = merged(partials, row, R, spans, stride, tokens, inverse_temperature, SPANS)
    for i in tl.static_range(PARTIALS):
        if i < Z_S or tokens.targets is not None:
            tl.store(own.fields + i * stride + row, state[i], mask=row < R)
    tl.store(own.index + row, state.index, mask=row < R)


@triton.jit
def normalizers(state, parameters, advantage, formula, SCALE: tl.constexpr):
    """The `Stats` [BM] from the state of rows after all their logits; `advantage` is None without a
    policy term."""
    top_S, sum_S, top_T, sum_T = state.top_S, state.sum_S, state.top_T, state.sum_T
    p_max, q_max, log_sums = 1.0 / sum_S, 1.0 / sum_T, log_quotient(sum_S, sum_T)
    c, s_top, without_null = sum_S, sum_S, sum_S  # never read for log p(ŷ)
    mean_d = state.E / sum_S * formula.inverse_temperature
    if formula.FAMILY == LOG_SUM:
        # Of a row whose entries are all excluded, p_max is 0 and says so.
        nothing_left = sum_S == 0
        top_S, p_max = tl.where(nothing_left, 0.0, top_S), tl.where(nothing_left, 0.0, p_max)
        c, s_top = tl.where(nothing_left, 0.0, mean_d), p_max
    elif formula.FAMILY == ENTROPY:
        c, s_top = mean_d, -mean_d * p_max
    elif formula.FAMILY != LOG_PROB:
        d_top = difference(top_S, state.at_top)
        c, s_top, without_null = shift(
            top_S, p_max, top_T, q_max, log_sums, d_top, mean_d, parameters, formula
        )
        if SCALE != 1:
            # A scaled dtype has few exponents. Bounded scores have |G| ≤ 1, so |c| ≤ 1 will do.
            bounded = tl.minimum(tl.maximum(c, -1.0), 1.0, propagate_nan=tl.PropagateNan.ALL)
            s_top = tl.where(bounded == c, s_top, s_top + (c - bounded) * p_max)
            c = bounded
    if advantage is not None:
        # The policy term adds −A to G.
        c, s_top = c - advantage, s_top + advantage * p_max
    return Stats(top_S, p_max, top_T, q_max, log_sums, c, without_null, s_top)


@triton.jit
def log_probs(state, inverse_temperature):
    """log p, log q and log q − log p of the sampled token."""
    top_S, sum_S, top_T, sum_T = state.top_S, state.sum_S, state.top_T, state.sum_T
    d = state.z_Ty - state.z_Sy
    d = within(tl.where(d == d, d, 0.0), HUGE)  # 0 where neither side gives ŷ any mass
    x = log_ratio(d, top_S, top_T, log_quotient(sum_S, sum_T), inverse_temperature)
    log_p = (state.z_Sy - top_S) * inverse_temperature - tl.log(sum_S)
    return log_p, (state.z_Ty - top_T) * inverse_temperature - tl.log(sum_T), x
