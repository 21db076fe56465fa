"""Gradients of a head that is trained, in backward: 4 U of matrix products.

With U = 2 N D V, from upstream weights w of the tokens and the numbers that forward kept of each
row of logits, for a tile of the vocabulary at a time, and within it for R tokens at a time:

    1. g = w (a − G p)                     logits again; on a GPU the kernel `gradient`      2 U
    2. dh_S += g W,  dW += gᵀ h_S,  db += Σ g       products, accumulated in fp32            2 U

The loop over the vocabulary is outside. So the rows of dW in a tile are complete before the next
tile begins: they are rounded to the head's dtype once, and no second [V, D] is needed. In a tile
the entry with the most mass is rounded like all others; what the rounding took from dh_S is added
in fp32 at the end.

If processes share the head, each makes the gradient of its own rows and its part of dh_S, and the
parts are summed.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import kernels
from ..gathered import add_rows_
from ..heads.vocabulary_parallel import summed_
from ..problem import Problem
from ..products import (
    copied_bytes,
    project,
    project_back,
    project_onto_head,
    score_dtype,
    score_scale,
)
from . import planning
from .excluded import add_excluded_, exclude_
from .planning import BLOCK_TEMPORARIES
from .rows import logit_gradient_, logits_, weigh_

# Entries and rows of a tile of logits, where PyTorch makes it. On a CPU it fits the cache.
CPU_ENTRIES, GPU_ENTRIES = 2**18, 2**22
CPU_ROWS, GPU_ROWS = 256, 1024
LEAST_COLUMNS = 16


@dataclass(frozen=True)
class HeadGradients:
    """The gradients of Σ w ℓ, to be filled; None for those that are not wanted."""

    dh_S: Tensor | None = None  # [N, D] fp32, zeros at first
    dW: Tensor | None = None  # [V, D] in the head's dtype
    db: Tensor | None = None  # [V] fp32, zeros at first


def by_kernels(problem: Problem, workspace_bytes: float) -> bool:
    """Whether forward ran the kernels. Backward then does too."""
    return workspace_bytes == 0 or planning.uses_rows_kernel(problem)


def allocate(
    problem: Problem, gradients: HeadGradients, workspace_bytes: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The scratch of `fill`: tiles of logits or of their gradient, [R, columns]; where the head has
    16 bits, a tile of dW in fp32, [columns, D]; and for kernels, if entries are excluded, their
    bits."""
    tile_of_dW = bits = None
    (N, D), V, W = problem.h_S.shape, problem.W.shape[0], problem.W
    N = max(N, 1)
    is_rounded = gradients.dW is not None and gradients.dW.dtype != torch.float32
    if by_kernels(problem, workspace_bytes):
        from ..kernels import tiles

        row = tiles.lookup(problem.h_S.device, problem.operand_dtype)
        scores = score_dtype(problem.operand_dtype, problem.has_bounded_scores)
        tile = row.pair if row.pair.BV > row.pair_wide.BV else row.pair_wide
        # Fewer columns and more rows than `pair` has: dW is accumulated too.
        R, columns = 4 * row.chunk, row.columns * 2 // scores.itemsize // 4
        columns = tile.BV * tiles.slots(V, tile, row, R, columns)
        R = min(R, N)
        tiles_of_g = problem.h_S.new_empty(R, columns, dtype=scores)
        if problem.excluded is not None:
            from ..kernels import excluded

            bits = problem.h_S.new_empty(R, excluded.words(columns), dtype=torch.int32)
    else:
        on_cpu = problem.h_S.device.type == "cpu"
        R = min(N, CPU_ROWS if on_cpu else GPU_ROWS)
        columns = (CPU_ENTRIES if on_cpu else GPU_ENTRIES) // R
        temporaries = 4 * R * (2 + BLOCK_TEMPORARIES)
        bytes_per_column = copied_bytes(W, problem.operand_dtype) + 4 * D * is_rounded + temporaries
        columns = min(columns, int(workspace_bytes / bytes_per_column))
        columns = min(max(columns, LEAST_COLUMNS), V)
        tiles_of_g = problem.h_S.new_empty(2, R, columns, dtype=torch.float32)
    if is_rounded:
        tile_of_dW = problem.h_S.new_empty(columns, D, dtype=torch.float32)
    return tiles_of_g, tile_of_dW, bits


def fill(gradients: HeadGradients, problem: Problem, workspace_bytes: float) -> None:
    """Fill the gradients.

    Args:
        problem: the tokens, with what forward kept of them and the weights w that arrived in
            backward. Hidden states of tokens whose weight is 0 are finite.
        workspace_bytes: what the schedule was given.
    """
    tiles_of_g, tile_of_dW, bits = allocate(problem, gradients, workspace_bytes)
    (N, V), (R, columns) = (problem.h_S.shape[0], problem.W.shape[0]), tiles_of_g.shape[-2:]
    dtype, dh_S, dW, db = problem.operand_dtype, gradients.dh_S, gradients.dW, gradients.db
    launched = by_kernels(problem, workspace_bytes)
    if launched:
        from ..kernels import gradient  # needs Triton
    problem, scale = _scaled(problem.with_contiguous_rows(), tiles_of_g.dtype, launched)
    if dW is not None and N == 0:
        dW.zero_()
    with kernels.current(problem.h_S.device):
        for v in range(0, V, columns):
            tile = slice(v, min(v + columns, V))
            W, dW_tile, db_tile = problem.W[tile], None, None if db is None else db[tile]
            if dW is not None:
                dW_tile = dW[tile] if tile_of_dW is None else tile_of_dW[: W.shape[0]]
            for n in range(0, N, R):
                rows = slice(n, n + R)
                chunk = problem.tokens(rows)
                if launched:
                    g = tiles_of_g[: chunk.h_S.shape[0]]
                    gradient.launch(g, chunk, v, bits)
                    g = g[:, : W.shape[0]]
                else:
                    g = _compute(tiles_of_g, chunk, tile)
                if dh_S is not None:
                    project_back([(dh_S[rows], g)], W, dtype, columns)
                project_onto_head(dW_tile, db_tile, g, chunk.h_S, dtype, first=n == 0)
            if dW is not None and dW_tile is not None and N > 0:
                if scale is not None:
                    dW_tile.mul_(scale)
                if tile_of_dW is not None:
                    dW[tile].copy_(dW_tile)
    if dh_S is not None and launched:
        _add_what_rounding_took(dh_S, problem, tiles_of_g.dtype)
    for total in (dh_S, db):
        if total is not None and scale is not None:
            total.mul_(scale)
    if dh_S is not None and problem.group is not None:
        summed_(dh_S, problem.group)


def largest_size(weights: Tensor) -> Tensor:
    """The largest finite |w|, [] fp32, or 1 if there is none above 0. A weight that is not finite
    spoils its own token only."""
    if weights.shape[0] == 0:
        return weights.new_ones(())
    largest = weights.abs().nan_to_num(nan=0.0, posinf=0.0).amax()
    return torch.where(largest == 0, 1, largest)


def _scaled(
    problem: Problem, g_dtype: torch.dtype, launched: bool
) -> tuple[Problem, Tensor | None]:
    """The problem with weights that suit tiles of `g_dtype`, and the factor that the sums of the
    tiles then need; None for 1.

    fp16 needs weights within ±1, times `score_scale`; other dtypes hold the true ones.
    """
    weights = problem.weights
    assert weights is not None
    g_excluded = problem.g_excluded
    given = weights if g_excluded is None else torch.cat([weights, g_excluded.flatten()])
    largest = largest_size(given)
    weights, scale, left = weights / largest, largest / problem.temperature, None
    g_excluded = None if g_excluded is None else g_excluded / largest
    if launched and score_scale(g_dtype) != 1:
        left = scale / score_scale(g_dtype)
    else:
        weights = weights * scale
        g_excluded = None if g_excluded is None else g_excluded * scale
    return replace(problem, weights=weights, g_excluded=g_excluded), left


def _compute(scratch: Tensor, chunk: Problem, tile: slice) -> Tensor:
    """w (a − G p) of a chunk's tokens and a tile of the vocabulary, in PyTorch: [R, columns]. What
    the kernel `gradient` does."""
    R, columns = chunk.h_S.shape[0], tile.stop - tile.start
    z_S, z_T = scratch[0, :R, :columns], None
    project(z_S, chunk.h_S, chunk.W[tile], chunk.operand_dtype, columns)
    if chunk.h_T is not None and chunk.member.is_divergence:
        z_T, W_T = scratch[1, :R, :columns], chunk.W if chunk.W_T is None else chunk.W_T
        project(z_T, chunk.h_T, W_T[tile], chunk.operand_dtype, columns)
    if chunk.excluded is not None:
        exclude_(z_S, chunk.excluded, tile.start)
    slope = logits_(z_S, z_T, chunk, True, tile)
    logit_gradient_(z_S, z_T, chunk, tile.start)
    weigh_(z_S, slope, chunk.weights)
    if chunk.excluded is not None and chunk.g_excluded is not None:
        add_excluded_(z_S, chunk.excluded, chunk.g_excluded, tile.start)
    return z_S


def _add_what_rounding_took(dh_S: Tensor, problem: Problem, dtype: torch.dtype) -> None:
    """dh_S ← dh_S + Σ (g − its rounding in the tiles) W, all times `score_scale`, over the top
    entry and the excluded ones, whose g are given."""
    from ..kernels.lse import S_TOP

    stats, top, weights = problem.stats, problem.top, problem.weights
    assert stats is not None
    assert top is not None
    assert weights is not None
    if dtype == torch.float32:
        return
    of_top = stats[S_TOP.value] * weights
    exact, ids = of_top.masked_fill_(weights == 0, 0)[:, None], top[:, None]
    if problem.excluded is not None and problem.g_excluded is not None:
        exact = torch.cat([exact, problem.g_excluded], 1)
        ids = torch.cat([ids, problem.excluded], 1)
    exact = exact * score_scale(dtype)
    taken = exact - exact.to(dtype).float()
    add_rows_(dh_S, taken, problem.W, ids, problem.operand_dtype)
