"""The scratch of the logit-free schedule: what a chunk of tokens needs beside its part of dh_S."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Problem
from ..products import copied_bytes, score_dtype, score_scale
from . import cdiv, tiles
from .excluded import words
from .records import PARTIALS, STATS, STATS_OF_TARGETS, SUMS, SUMS_OF_STATISTICS

MIB = 2**20
# All scratch together where D ≤ 4096, and in proportion to D above that. The tiles of the table
# leave room in it for copies of W, where the last product cannot read W in place.
SCRATCH_MIB = 64
# Up to this size one product makes A and P of a chunk, for which A needs room of its own. Above it
# two products have tiles enough for a GPU.
STACKED_MIB = 16


@dataclass(frozen=True)
class Scratch:
    """What a chunk of R rows needs. Nothing here grows with N or V."""

    row: tiles.Row  # of the table
    rows: int  # R
    columns: int  # of the vocabulary at a time
    pair: tiles.Tile  # of `pair`
    copied_rows: int  # of W at a time, where the last product cannot read it in place
    scores: bool  # whether a gradient is needed
    scale: float  # the factor of the scores in `s_p`
    mean_limit: float  # see `Member.mean_limit`
    slopes: int  # how many of the sums, the last ones, are slopes of a softcap
    partials: Tensor  # [6 or 8, spans, R] fp32
    index: Tensor  # [spans, R] int32
    stats: Tensor  # [8 or 11, R] fp32
    top: Tensor  # [R] int32
    sums: Tensor  # [2 to 9, slots, R] fp32
    # s, and p below it unless G is known: [R or 2R, columns] in score_dtype; for dh_S only.
    s_p: Tensor | None = None
    # P, or A and P below it: [R or 2R, D] fp32; for dh_S only, unless G is known.
    A_P: Tensor | None = None
    bits: Tensor | None = None  # [R, V/32] int32, if entries are excluded: see `excluded`

    def s_and_p(self, R: int) -> tuple[Tensor | None, Tensor | None]:
        """s and p of a chunk of R tokens."""
        return _stacked(self.s_p, R, self.rows)

    def A_and_P(self, R: int, dh_S: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """A and P of a chunk of R tokens. A is in dh_S unless one product makes both."""
        A, P = _stacked(self.A_P, R, self.rows)
        return (dh_S, A) if P is None else (A, P)


def allocate(
    problem: Problem, needs_gradient: bool, needs_statistics: bool, needs_stats: bool = False
) -> Scratch:
    """The scratch for dh_S, statistics and stats (see `Outputs`), as they are needed."""
    h_S, member, targets = problem.h_S, problem.member, problem.targets is not None
    (N, D), V = h_S.shape, problem.W.shape[0]
    row = tiles.lookup(h_S.device, problem.operand_dtype)
    R = min(row.chunk, max(N, 1))
    tile = row.pair_for(member, needs_statistics)
    scores = score_dtype(problem.operand_dtype, problem.has_bounded_scores)
    slots = tiles.slots(V, tile, row, row.chunk, row.columns * 2 // scores.itemsize)
    spans = cdiv(V, tiles.span(V, row))
    needs_score = needs_gradient or needs_stats
    slopes = 0
    if needs_score and problem.softcap is not None:
        slopes = 1 if problem.advantages is None else 2
    sums = SUMS.value + slopes
    if needs_statistics and member.is_divergence:
        sums += SUMS_OF_STATISTICS.value

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return h_S.new_empty(shape, dtype=dtype)

    tensors = {
        "partials": new(PARTIALS.value - (0 if targets else 2), spans, R),
        "index": new(spans, R, dtype=torch.int32),
        "stats": new(STATS.value + (STATS_OF_TARGETS.value if targets else 0), R),
        "top": new(R, dtype=torch.int32),
        "sums": new(sums, slots, R),
    }
    if needs_gradient:
        tensors["s_p"] = new((1 if member.knows_G else 2) * R, slots * tile.BV, dtype=scores)
        if not member.knows_G:
            tensors["A_P"] = new((2 if is_stacked(R, D) else 1) * R, D)
    if problem.excluded is not None:
        tensors["bits"] = new(R, words(V), dtype=torch.int32)
    # One tile of W is made while the last is still alive; a narrow tile of scores may be widened.
    # A multiple of 64 lets every tile of scores begin at a multiple of 16 bytes.
    room = SCRATCH_MIB * MIB * max(1, D / 4096) - sum(t.nbytes for t in tensors.values())
    bytes_per_row = 2 * copied_bytes(problem.W, problem.operand_dtype) + 8 * R
    return Scratch(
        row=row,
        rows=R,
        columns=slots * tile.BV,
        pair=tile,
        copied_rows=max(64, int(room // bytes_per_row) // 64 * 64),
        scores=needs_score,
        scale=score_scale(scores) if needs_gradient else 1.0,
        mean_limit=member.mean_limit(needs_score, needs_statistics),
        slopes=slopes,
        **tensors,
    )


def is_stacked(R: int, D: int) -> bool:
    """Whether one product of s and p makes A and P of a chunk."""
    return 8 * R * D <= STACKED_MIB * MIB


def _stacked(t: Tensor | None, R: int, most: int) -> tuple[Tensor | None, Tensor | None]:
    """The first R rows and the next R rows, if t has room for the latter."""
    if t is None:
        return None, None
    return t[:R], t[R : 2 * R] if t.shape[0] > most else None
