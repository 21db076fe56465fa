"""Gradients of a head that is trained, in backward: 4 U of matrix products.

With U = 2 N D V, upstream weights w of the tokens, and what forward found out about each row of
logits, for a tile of the vocabulary at a time, and within it R tokens at a time:

    1. g = w (a − G p)                     logits again; on a GPU the kernel `gradient`      2 U
    2. dh_S += g W,  dW += gᵀ h_S,  db += Σ g       products, accumulated in fp32            2 U

The vocabulary is outside, so that what a tile's rows of dW sum up to is complete before the next
tile begins: it is rounded to the head's dtype once, and needs no [V, D] beside what is returned.
The entry with the most mass is rounded in the tile, as all others, and what the rounding took from
dh_S is added in fp32.

Of a head that processes share each makes the gradient of its own rows, and its part of dh_S, which
is summed up over them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsd_kernels import kernels, row_workspace
from opsd_kernels.divergence import Alone, logit_gradient_
from opsd_kernels.problem import Problem
from opsd_kernels.products import (
    add_rows,
    copied_bytes,
    project,
    project_back,
    project_onto_head,
    score_dtype,
    score_scale,
)
from opsd_kernels.row_workspace import BLOCK_TEMPORARIES
from opsd_kernels.vocabulary_parallel import summed_

# In PyTorch: entries of a tile of logits, on a CPU few enough for the cache, and rows of it.
CPU_ENTRIES, GPU_ENTRIES = 2**18, 2**22
CPU_ROWS, GPU_ROWS = 256, 1024
LEAST_COLUMNS = 16
# Rows of the head gathered at once.
ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class HeadGradients:
    """What is filled: Σ w ∂ℓ, times `scale`; None of what is not wanted."""

    dh_S: Tensor | None  # [N, D] fp32, zeros at first
    dW: Tensor | None  # [V, D] in the head's dtype
    db: Tensor | None  # [V] fp32


def by_kernels(problem: Problem, workspace_bytes: float) -> bool:
    """Whether forward, and therefore backward, is a matter of kernels."""
    return workspace_bytes == 0 or row_workspace.step_2_is_kernel(problem)


def allocate(problem: Problem, gradients: HeadGradients, workspace_bytes: float) -> list[Tensor]:
    """The scratch of `fill`: tiles of logits or of their gradient, [R, columns], and of dW, where
    its rows are narrower than what they sum up to."""
    (N, D), V, W = problem.h_S.shape, problem.W.shape[0], problem.W
    N = max(N, 1)
    of_dW = gradients.dW is not None and gradients.dW.dtype != torch.float32
    if by_kernels(problem, workspace_bytes):
        from opsd_kernels.kernels import tiles

        row = tiles.lookup(problem.h_S.device, problem.operand_dtype)
        scores = score_dtype(problem.operand_dtype, problem.has_bounded_scores)
        tile = row.pair if row.pair.BV > row.pair_wide.BV else row.pair_wide
        # Fewer columns and more rows than of `pair`: dW is accumulated too.
        R, columns = 4 * row.chunk, row.columns * 2 // scores.itemsize // 4
        columns = tile.BV * tiles.slots(V, tile, row, R, columns)
        tensors = [problem.h_S.new_empty(min(R, N), columns, dtype=scores)]
    else:
        on_cpu = problem.h_S.device.type == "cpu"
        R = min(N, CPU_ROWS if on_cpu else GPU_ROWS)
        columns = (CPU_ENTRIES if on_cpu else GPU_ENTRIES) // R
        temporaries = 4 * R * (2 + BLOCK_TEMPORARIES)
        bytes_per_column = copied_bytes(W, problem.operand_dtype) + 4 * D * of_dW + temporaries
        columns = min(columns, int(workspace_bytes / bytes_per_column))
        columns = min(max(columns, LEAST_COLUMNS), V)
        tensors = [problem.h_S.new_empty(2, R, columns, dtype=torch.float32)]
    if of_dW:
        tensors.append(problem.h_S.new_empty(columns, D, dtype=torch.float32))
    return tensors


def fill(
    gradients: HeadGradients,
    scratch: list[Tensor],
    problem: Problem,
    stats: Tensor,
    top: Tensor,
    scale: Tensor,
    workspace_bytes: float,
) -> None:
    """Fill the gradients.

    Args:
        gradients, scratch: see `HeadGradients`, `allocate`.
        problem: the tokens, with weights; hidden states of those of weight 0 are finite.
        stats, top: what the schedule found out in forward (see `Outputs`).
        scale: [] fp32, what all gradients are multiplied by.
        workspace_bytes: what the schedule was given.
    """
    (N, V), (R, columns) = (problem.h_S.shape[0], problem.W.shape[0]), scratch[0].shape[-2:]
    operand_dtype, dh_S, dW, db = problem.operand_dtype, gradients.dh_S, gradients.dW, gradients.db
    launched = by_kernels(problem, workspace_bytes)
    tile_of = _launched if launched else _computed
    scale = scale / problem.temperature
    bounded = launched and score_scale(scratch[0].dtype) != 1
    if bounded:
        scale = scale / score_scale(scratch[0].dtype)
    else:  # there is room for it in the tiles, and what comes of them is only rounded
        assert problem.weights is not None
        problem = replace(problem, weights=problem.weights * scale)
    with kernels.current(problem.h_S.device):
        chunks: list[tuple[Tensor | None, Tensor, Callable[[slice], Tensor]]] = []
        for n in range(0, N, R):
            rows = slice(n, n + R)
            chunk = problem.tokens(rows)
            dh = None if dh_S is None else dh_S[rows]
            chunks.append((dh, chunk.h_S, tile_of(scratch[0], chunk, stats[:, rows], top[rows])))
        for v in range(0, V, columns):
            tile = slice(v, min(v + columns, V))
            W, dW_tile, db_tile = problem.W[tile], None, None if db is None else db[tile]
            if dW is not None:
                dW_tile = dW[tile] if len(scratch) == 1 else scratch[1][: W.shape[0]]
                if not chunks:
                    dW_tile.zero_()
            for i, (dh, h, gradient) in enumerate(chunks):
                g = gradient(tile)
                if dh is not None:
                    project_back([(dh, g)], W, operand_dtype, columns)
                project_onto_head(dW_tile, db_tile, g, h, operand_dtype, first=i == 0)
            if dW is not None and dW_tile is not None:
                if bounded:
                    dW_tile.mul_(scale)
                if len(scratch) > 1:
                    dW[tile].copy_(dW_tile)
    if dh_S is not None and launched:
        _add_what_rounding_took(dh_S, problem, stats, top, scratch[0].dtype)
    for total in (dh_S, db):
        if total is not None and bounded:
            total.mul_(scale)
    if dh_S is not None and problem.group is not None:
        summed_(dh_S, problem.group)


def _launched(
    scratch: Tensor, chunk: Problem, stats: Tensor, top: Tensor
) -> Callable[[slice], Tensor]:
    """A function of a tile of the vocabulary: w (a − G p) of a chunk's tokens, times `score_scale`,
    by the kernel."""
    from opsd_kernels.logit_free import gradient_launcher

    chunk = chunk.with_contiguous_rows()
    g = scratch[: chunk.h_S.shape[0]]
    launch = gradient_launcher(g, chunk, stats, top)

    def gradient(tile: slice) -> Tensor:
        launch(tile.start)
        return g[:, : tile.stop - tile.start]

    return gradient


def _computed(
    scratch: Tensor, chunk: Problem, stats: Tensor, top: Tensor
) -> Callable[[slice], Tensor]:
    """The same in PyTorch."""
    R, dtype = chunk.h_S.shape[0], chunk.operand_dtype
    weights = chunk.weights
    assert weights is not None

    def gradient(tile: slice) -> Tensor:
        columns = tile.stop - tile.start
        z_S, z_T = scratch[:, :R, :columns]
        map_S, map_T = chunk.logit_maps
        project(z_S, chunk.h_S, chunk.W[tile], dtype, columns)
        slope = map_S.of_columns(tile).apply_(z_S, needs_slope=True)
        z_S.div_(chunk.temperature)
        if chunk.h_T is not None and not isinstance(chunk.member, Alone):
            W_T = chunk.W if chunk.W_T is None else chunk.W_T
            project(z_T, chunk.h_T, W_T[tile], dtype, columns)
            map_T.of_columns(tile).apply_(z_T)
            z_T.div_(chunk.temperature)
        known = stats, top
        policy = chunk.targets, chunk.advantages
        logit_gradient_(z_S, z_T, tile.start, known, chunk.member, chunk.entry_clip, *policy)
        if slope is not None:
            z_S.mul_(slope)
        # Selected, not multiplied: what does not count may be NaN.
        return z_S.mul_(weights[:, None]).masked_fill_((weights == 0)[:, None], 0)

    return gradient


def _add_what_rounding_took(
    dh_S: Tensor, problem: Problem, stats: Tensor, top: Tensor, dtype: torch.dtype
) -> None:
    """dh_S ← dh_S + (w g_top − what of it the tiles hold) W_top, all times `score_scale`."""
    from opsd_kernels.kernels.lse import S_TOP

    assert problem.weights is not None
    if dtype == torch.float32:
        return
    exact = stats[S_TOP.value] * problem.weights * score_scale(dtype)
    exact.masked_fill_(problem.weights == 0, 0)
    taken = exact - exact.to(dtype).float()
    for n in range(0, dh_S.shape[0], ROWS_AT_A_TIME):
        rows = slice(n, n + ROWS_AT_A_TIME)
        add_rows(dh_S[rows], taken[rows], problem.W, top[rows], problem.operand_dtype)
