"""Schedule: logits in registers only. 6 U of matrix products, on a GPU, nothing vocabulary-sized.

With U = 2 N D V, one pass of N tokens through the LM head, a chunk of R rows at a time:

    1. L_S, L_T, top entry, c       `lse`: logits and their log-sum-exp in one kernel      2 U
    2. Σ f, Σ s; tiles s and p      `pair`: logits again, a tile of the vocabulary         2 U
    3. A += s W, P += p W           library product over the tile, accumulated in fp32     2 U
       dh_S ← (A − (G − c) P + g_top W_top) / T      `finish`, after the last tile

G is known when step 2 has seen the whole vocabulary; because the gradient is linear in it, no third
pass over the logits is needed. The unclipped KLs know it from step 1 and store one tile: 5 U.
Without gradient step 3 falls away: 4 U.

The tiles are scratch of a bounded size, used again and again; beside them there are dh_S in fp32
and a few numbers a row. s and p lie one under the other: where D is small, and a product of R rows
by D features too few tiles for a GPU, step 3 is one product of both.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from opsd_kernels import kernels
from opsd_kernels.divergence import Family
from opsd_kernels.head import LogitMap
from opsd_kernels.kernels import cdiv, finish, gradient, lse, pair, tiles
from opsd_kernels.kernels.pointwise import formula_of
from opsd_kernels.kernels.records import (
    DTYPE_NAMES,
    Accumulated,
    Partials,
    Results,
    Scored,
    Side,
    Tiling,
    Tokens,
    Weighed,
    for_kernels,
)
from opsd_kernels.problem import Outputs, Problem
from opsd_kernels.products import copied_bytes, project_back, score_dtype, score_scale
from opsd_kernels.vocabulary_parallel import begin_sum_, gathered, local_ids, summed_

MIB = 2**20
# All scratch together where D ≤ 4096, in proportion to D above; the tiles of the table keep to it.
# What they leave is for copies of W, where the product of step 3 cannot read it in place.
SCRATCH_MIB = 64
# Up to this size A and P of a chunk are made by one product, for which A needs room of its own;
# above they are two, each with tiles enough.
STACKED_MIB = 16


@dataclass(frozen=True)
class Scratch:
    """What a chunk of R rows needs beside its part of dh_S. Nothing here grows with N or V."""

    row: tiles.Row  # of the table
    pair: tiles.Tile  # of `pair`
    copied_rows: int  # of W at a time, where the product of step 3 cannot read it in place
    scores: bool  # whether more is wanted than values
    slopes: int  # how many of the sums, the last, are slopes of a softcap
    partials: Tensor  # [6 or 8, spans, R] fp32
    index: Tensor  # [spans, R] int32
    stats: Tensor  # [8 or 11, R] fp32
    top: Tensor  # [R] int32
    sums: Tensor  # [2 to 9, slots, R] fp32
    # s, and under it p unless G is known: [R or 2R, columns] in score_dtype; of a gradient only.
    s_p: Tensor | None = None
    # P, or A and under it P: [R or 2R, D] fp32; likewise, unless G is known.
    A_P: Tensor | None = None

    @staticmethod
    def of(
        tensors: list[Tensor], problem: Problem, needs_statistics: bool, needs_score: bool = True
    ) -> "Scratch":
        """What `allocate` returned for what is wanted, with names."""
        R, D = tensors[0].shape[-1], problem.h_S.shape[1]
        # One tile of W is made while the last is still alive; a narrow tile of scores may be
        # widened. In 64s, so that every tile of scores begins at a multiple of 16 bytes.
        room = SCRATCH_MIB * MIB * max(1, D / 4096) - sum(t.nbytes for t in tensors)
        bytes_per_row = 2 * copied_bytes(problem.W, problem.operand_dtype) + 8 * R
        copied_rows = int(room // bytes_per_row) // 64 * 64
        row = tiles.lookup(problem.h_S.device, problem.operand_dtype)
        pair_tile = _pair_tile(row, problem, needs_statistics)
        slopes = _slopes(problem, needs_score)
        return Scratch(row, pair_tile, max(64, copied_rows), needs_score, slopes, *tensors)

    @property
    def rows(self) -> int:
        """R"""
        return self.top.shape[0]

    @property
    def columns(self) -> int:
        """Of the vocabulary at a time."""
        return self.sums.shape[1] * self.pair.BV

    @property
    def scale(self) -> float:
        """What scores are multiplied by in `s_p`."""
        return 1.0 if self.s_p is None else score_scale(self.s_p.dtype)

    def s_and_p(self, R: int) -> tuple[Tensor | None, Tensor | None]:
        """s and p of a chunk of R tokens."""
        return _stacked(self.s_p, R, self.rows)

    def A_and_P(self, R: int, dh_S: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """A and P of a chunk of R tokens."""
        A, P = _stacked(self.A_P, R, self.rows)
        return (dh_S, A) if P is None else (A, P)


def allocate(
    problem: Problem, needs_gradient: bool, needs_statistics: bool, needs_stats: bool = False
) -> list[Tensor]:
    """The scratch of `fill`, in the order of `Scratch`, for dh_S, statistics and stats as they are
    wanted (see `Outputs`)."""
    h_S, targets = problem.h_S, problem.targets is not None
    (N, D), V = h_S.shape, problem.W.shape[0]
    row = tiles.lookup(h_S.device, problem.operand_dtype)
    R = min(row.chunk, max(N, 1))
    tile = _pair_tile(row, problem, needs_statistics)
    scores = score_dtype(problem.operand_dtype, problem.has_bounded_scores)
    slots = tiles.slots(V, tile, row, row.chunk, row.columns * 2 // scores.itemsize)
    spans = cdiv(V, lse.span(V, row))
    statistics = needs_statistics and problem.member.is_divergence
    sums = pair.SUMS.value + (pair.SUMS_OF_STATISTICS.value if statistics else 0)
    sums += _slopes(problem, needs_gradient or needs_stats)

    def fp32(*shape: int) -> Tensor:
        return h_S.new_empty(shape, dtype=torch.float32)

    tensors = [
        fp32(lse.PARTIALS.value - (0 if targets else 2), spans, R),
        h_S.new_empty(spans, R, dtype=torch.int32),
        fp32(lse.STATS.value + (lse.STATS_OF_TARGETS.value if targets else 0), R),
        h_S.new_empty(R, dtype=torch.int32),
        fp32(sums, slots, R),
    ]
    if needs_gradient:
        knows = problem.member.knows_G
        tensors.append(h_S.new_empty((1 if knows else 2) * R, slots * tile.BV, dtype=scores))
        if not knows:
            tensors.append(fp32((2 if is_stacked(R, D) else 1) * R, D))
    return tensors


def _slopes(problem: Problem, needs_score: bool) -> int:
    """How many slopes of a softcap `finish` wants: at the top entry, and with a policy term at
    ŷ."""
    if not needs_score or problem.softcap is None:
        return 0
    return 1 if problem.advantages is None else 2


def is_stacked(R: int, D: int) -> bool:
    """Whether A and P of a chunk come from one product of s and p."""
    return 8 * R * D <= STACKED_MIB * MIB


def fill(outputs: Outputs, scratch: list[Tensor], problem: Problem) -> None:
    """Fill loss, statistics and gradient of every token that is kept.

    Args:
        outputs: see `Outputs`.
        scratch: see `allocate`.
        problem: the tokens.
    """
    V = problem.W.shape[0]
    # What is of the student alone needs no second look at the vocabulary.
    v_stop = 0 if not problem.member.is_divergence and not outputs.needs_score else V
    needs_statistics = outputs.statistics is not None
    named = Scratch.of(scratch, problem, needs_statistics, outputs.needs_score)
    problem = problem.with_contiguous_rows()  # once, for all kernels
    unfinished = []
    with kernels.current(outputs.loss.device):
        for n in range(0, outputs.loss.shape[0], named.rows):
            rows = slice(n, n + named.rows)
            chunk, into = problem.tokens(rows), outputs.tokens(rows)
            launch_lse(named, chunk)
            launch_pair, accumulate = pair_launcher(named, chunk), accumulator(named, chunk, into)
            for v in range(0, v_stop, named.columns):
                launch_pair(v)
                accumulate(v)
            if chunk.group is None:
                launch_finish(into, named, chunk)
                continue
            of_all = replace(named, sums=_sums_of_all(named, chunk)) if v_stop > 0 else named
            launch_finish(into, of_all, chunk)
            if into.dh_S is not None:
                # What the next chunk begins with needs no one else.
                unfinished.append(begin_sum_(into.dh_S, chunk.group))
        for sum_of_all in unfinished:
            sum_of_all.wait()


def launch_lse(scratch: Scratch, chunk: Problem) -> None:
    """stats, top ← L_S, L_T, c and the top entry of a chunk's tokens."""
    R, V = chunk.h_S.shape[0], chunk.W.shape[0]
    partials, tile = _partials(scratch, chunk), scratch.row.lse
    spans, stride = scratch.index.shape
    lse.lse_kernel[(cdiv(R, tile.BM), spans)](
        partials=partials,
        tokens=Tokens(chunk.keep, chunk.targets),
        R=R,
        stride=stride,
        inverse_temperature=1 / chunk.temperature,
        **_operands(chunk, tile),
    )
    if chunk.group is not None:
        partials = _partials_of_all(scratch, chunk)
        spans = partials.index.shape[0]
    lse.merge_kernel[(cdiv(R, lse.MERGE_BM.value),)](
        tokens=_tokens(scratch, chunk)._replace(keep=None),
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
    # Scores alone need the mean, and the entropy.
    needs_mean = scratch.scores or chunk.member.family == Family.ENTROPY
    limit = chunk.member.mean_limit if needs_mean else 0.0
    span = lse.span(chunk.W.shape[0], scratch.row)
    return Partials(
        scratch.partials,
        scratch.index,
        span,
        LIMIT=tl.constexpr(limit),
        TEACHER=tl.constexpr(chunk.h_T is not None),
    )


def _partials_of_all(scratch: Scratch, chunk: Problem) -> Partials:
    """What all processes of a group found in their shards, each of which is one span."""
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
    """What `lse` found in the spans of a shard put together, [7 or 9, R] int32: the fields of
    `Partials`, which are fp32, and under them the index."""
    R, (spans, stride) = chunk.h_S.shape[0], scratch.index.shape
    partials = _partials(scratch, chunk)
    own = scratch.index.new_empty(scratch.partials.shape[0] + 1, stride)
    lse.shard_kernel[(cdiv(R, lse.MERGE_BM.value),)](
        own=_of_spans(partials, own),
        tokens=Tokens(targets=chunk.targets),
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


def _sums_of_all(scratch: Scratch, chunk: Problem) -> Tensor:
    """The sums of a chunk's tokens over all slots of all processes, [2 to 9, 1, R]."""
    assert chunk.group is not None
    R, (fields, _slots, stride) = chunk.h_S.shape[0], scratch.sums.shape
    of_all = scratch.sums.new_empty(fields, 1, stride)
    of_all[:, 0, :R] = summed_(scratch.sums[:, :, :R].sum(1), chunk.group)
    return of_all


def pair_launcher(scratch: Scratch, chunk: Problem) -> Callable[[int], None]:
    """A function of v: sums, s, p ← those of the columns from v on, as many as fit the tiles.

    All that does not depend on v is made here, once a chunk.
    """
    tile, R, V = scratch.pair, chunk.h_S.shape[0], chunk.W.shape[0]
    tokens = _tokens(scratch, chunk)
    if chunk.member.family != Family.LOG_PROB and scratch.slopes < 2:
        tokens = tokens._replace(targets=None)
    if not chunk.member.is_divergence:
        chunk = chunk.without_teacher()
    s, p = scratch.s_and_p(R)
    scored = _scored(scratch)._replace(
        s=s, p=p, stride=scratch.columns, SCALE=tl.constexpr(scratch.scale)
    )
    given = {
        "tokens": tokens,
        "R": R,
        "stride": scratch.rows,
        "formula": formula_of(chunk.member, chunk.temperature),
        **_operands(chunk, tile),
    }
    rows, slots = cdiv(R, tile.BM), scratch.sums.shape[1]

    def launch(v: int) -> None:
        pair.pair_kernel[(rows, min(slots, cdiv(V - v, tile.BV)))](
            scored=scored._replace(begin=v), **given
        )

    return launch


def accumulator(scratch: Scratch, chunk: Problem, outputs: Outputs) -> Callable[[int], None]:
    """A function of v: A ← A + s W,  P ← P + p W  over the columns from v on; both 0 now."""
    R = chunk.h_S.shape[0]
    s, p = scratch.s_and_p(R)
    A, P = scratch.A_and_P(R, outputs.dh_S)
    terms = [(out, g) for out, g in ((A, s), (P, p)) if out is not None and g is not None]
    if P is not None and scratch.A_P is not None:
        scratch.A_P.zero_()
        if scratch.A_P.shape[0] > scratch.rows and scratch.s_p is not None:
            terms = [(scratch.A_P[: 2 * R], scratch.s_p[: 2 * R])]

    def accumulate(v: int) -> None:
        W = chunk.W[v : v + scratch.columns]
        narrow = [(out, g[:, : W.shape[0]]) for out, g in terms]
        project_back(narrow, W, chunk.operand_dtype, scratch.copied_rows)

    return accumulate


def gradient_launcher(
    g: Tensor, chunk: Problem, stats: Tensor, top: Tensor
) -> Callable[[int], None]:
    """A function of v: g [R, columns] ← the gradient with respect to logits of the columns from v
    on, weighed, times `score_scale`.

    Args:
        g: in a `score_dtype`; `pair`'s columns divide its own.
        chunk: the tokens, with weights.
        stats, top: what `launch_finish` wrote of them (see `Outputs`).
    """
    tile = _pair_tile(tiles.lookup(g.device, chunk.operand_dtype), chunk, False)
    R, V = chunk.h_S.shape[0], chunk.W.shape[0]
    if not chunk.member.is_divergence:
        chunk = chunk.without_teacher()
    tokens = _given(chunk)._replace(keep=None, stats=stats, top=top)
    if chunk.member.family != Family.LOG_PROB and chunk.advantages is None:
        tokens = tokens._replace(targets=None)
    weighed = Weighed(
        g,
        chunk.weights,
        g.stride(0),
        SCALE=tl.constexpr(score_scale(g.dtype)),
        POLICY=tl.constexpr(chunk.advantages is not None),
    )
    given = {
        "tokens": tokens,
        "R": R,
        "stride": stats.stride(0),
        "formula": formula_of(chunk.member, chunk.temperature),
        **_operands(chunk, tile),
    }

    def launch(v: int) -> None:
        columns = min(g.shape[1], V - v)
        gradient.gradient_kernel[(cdiv(R, tile.BM), cdiv(columns, tile.BV))](
            weighed=weighed._replace(begin=v), **given
        )

    return launch


def launch_finish(outputs: Outputs, scratch: Scratch, chunk: Problem) -> None:
    """outputs ← ℓ, statistics and ∂ℓ/∂h_S from sums and accumulators."""
    R = chunk.h_S.shape[0]
    A, P = scratch.A_and_P(R, outputs.dh_S)
    finish.finish_kernel[(cdiv(R, finish.BM.value),)](
        results=Results(outputs.loss, outputs.statistics, outputs.dh_S, outputs.stats, outputs.top),
        accumulated=Accumulated(A, P, SCALE=tl.constexpr(scratch.scale)),
        W=chunk.W,
        student=_side(chunk.h_S, chunk.W, chunk.logit_maps[0]),
        scored=_scored(scratch),
        tokens=_tokens(scratch, chunk),
        R=R,
        stride=scratch.rows,
        stride_statistics=outputs.stride,
        formula=formula_of(chunk.member, chunk.temperature),
        SLOTS=triton.next_power_of_2(scratch.sums.shape[1]),
        OPERAND=tl.dtype(DTYPE_NAMES[chunk.operand_dtype]),
    )


def _operands(chunk: Problem, tile: tiles.Tile) -> dict[str, Any]:
    """What `logits_tiles` multiplies, and how, as the kernels that call it name it."""
    hidden: dict[str, Any] = {"h_S": chunk.h_S, "h_T": chunk.h_T}
    heads: dict[str, Any] = {"W": chunk.W, "W_T": chunk.W_T}  # one for both sides is loaded once
    operands = [t for t in (hidden | heads).values() if t is not None]
    if any(t.itemsize > chunk.operand_dtype.itemsize for t in operands):
        tile = tile.widened()
    bulk = tile.BULK and all(
        t.dtype == chunk.operand_dtype and _has_bulk_strides(t) for t in operands
    )
    tile = replace(tile, BULK=bulk)
    map_S, map_T = chunk.logit_maps
    student = _side(chunk.h_S, chunk.W, map_S)
    h_T = chunk.h_S if chunk.h_T is None else chunk.h_T
    teacher = _side(h_T, chunk.W if chunk.W_T is None else chunk.W_T, map_T)
    tiling = Tiling.of(
        tile,
        even_d=student.D % tile.BK == 0 and teacher.D % tile.BK == 0,
        even_v=student.V % tile.BV == 0,
        operand=chunk.operand_dtype,
        precision="tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
    )
    if bulk:
        hidden = _descriptors(hidden, [tile.BM, tile.BK])
        heads = _descriptors(heads, [tile.BV, tile.BK])
    return {
        **hidden,
        **heads,
        "student": student,
        "teacher": teacher,
        "tiling": tiling,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _descriptors(named: dict[str, Any], block: list[int]) -> dict[str, Any]:
    """Of the tensors that there are."""
    return {
        name: None if t is None else TensorDescriptor.from_tensor(t, block)
        for name, t in named.items()
    }


def _side(h: Tensor, W: Tensor, logit_map: LogitMap) -> Side:
    sizes = W.shape[0], h.shape[1], h.stride(0), W.stride(0), W.stride(1)
    return Side(*sizes, *for_kernels(logit_map))


def _tokens(scratch: Scratch, chunk: Problem) -> Tokens:
    return _given(chunk)._replace(stats=scratch.stats, top=scratch.top)


def _given(chunk: Problem) -> Tokens:
    """What is given of each token."""
    beta = chunk.beta if isinstance(chunk.beta, Tensor) else None
    return Tokens(
        chunk.keep,
        chunk.targets,
        beta,
        w_q=chunk.w_q,
        w_p=chunk.w_p,
        advantages=chunk.advantages,
    )


def _scored(scratch: Scratch) -> Scored:
    fields, slots, _rows = scratch.sums.shape
    statistics = fields - scratch.slopes > pair.SUMS.value
    return Scored(
        scratch.sums,
        slots,
        SCORES=tl.constexpr(scratch.scores),
        STATISTICS=tl.constexpr(statistics),
        SLOPES=tl.constexpr(scratch.slopes),
    )


def _has_bulk_strides(t: Tensor) -> bool:
    """Whether descriptors can be of t: contiguous features, rows at multiples of 16 bytes."""
    apart = t.stride(1) == 1 and t.stride(0) >= t.shape[1]
    return apart and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0


def _pair_tile(row: tiles.Row, problem: Problem, needs_statistics: bool) -> tiles.Tile:
    return row.pair_wide if problem.member.is_wide(needs_statistics) else row.pair


def _stacked(t: Tensor | None, R: int, most: int) -> tuple[Tensor | None, Tensor | None]:
    """The first and the second R rows, if it has room for the second."""
    if t is None:
        return None, None
    return t[:R], t[R : 2 * R] if t.shape[0] > most else None
