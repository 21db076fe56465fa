"""Schedule: a bounded workspace of logit rows. 3 U of matrix products, on any device.

With U = 2 N D V, one pass of N tokens through the LM head, a chunk of R rows at a time:

    1. [z_S; z_T] = [h_S; h_T] Wᵀ    one GEMM into a [2R, V] fp32 workspace              2 U
    2. z_S ← a − G p,  ℓ = Σ_v f     on a GPU one kernel (`rows`), elsewhere PyTorch, in
                                     row blocks small enough for the cache
    3. dh_S = z_S W / T              one GEMM, accumulated in fp32                       1 U

The head is frozen, so the gradient is made during forward, from logits that exist only once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels import kernels
from opsd_kernels.divergence import divergence_rows_
from opsd_kernels.problem import Problem
from opsd_kernels.products import (
    copied_bytes,
    multiplied_dtype,
    project,
    project_back,
    score_dtype,
)

MIB = 2**20

# [block, V] fp32 temporaries alive at once inside `divergence_rows_`, at most.
BLOCK_TEMPORARIES = 8
# Rows of a chunk at most: hidden states are copied a chunk at a time, and V may be small.
MAX_ROWS = 4096
# Rows of W widened at once at least: below, Python's overhead for each shows.
LEAST_TILE = 64
# Entries of a row block on a CPU: 1 MiB of fp32 for each temporary, to stay in the cache.
CPU_BLOCK_ENTRIES = 2**18
GPU_TILE_ROWS = 128


@dataclass(frozen=True)
class Plan:
    """How many rows and columns are in flight, so that all temporaries together fit a budget."""

    rows: int  # of a chunk; the workspace is [2 rows, V] fp32
    block: int  # rows handled at once in step 2
    tile: int  # rows of W copied at once; V where W is used as it stands
    bytes: int  # of all temporaries with a vocabulary-sized dimension together


def default_workspace_mib(device: torch.device) -> int:
    """128 on a CPU, about 100 rows at a time with a Qwen3 vocabulary; 0 on a GPU, where logits need
    no memory; 320, 256 rows, where that is not to be had."""
    if device.type == "cpu":
        return 128
    return 0 if kernels.available(device) else 320


def uses_kernel(device: torch.device) -> bool:
    """Whether step 2 is the `rows` kernel."""
    return device.type == "cuda" and kernels.available(device)


def make_plan(N: int, heads: tuple[Tensor, ...], operand_dtype: torch.dtype, budget: float) -> Plan:
    """Fit chunk, block and tile to `budget` bytes.

    Args:
        N: number of tokens.
        heads: the LM heads in use, [V, D] each.
        operand_dtype: the dtype whose rounding the operands of the matrix products have.
        budget: bytes for all temporaries with a vocabulary-sized dimension together.

    Raises:
        ValueError: the budget cannot hold one row; the message names the least that works.
    """
    V, device = heads[0].shape[0], heads[0].device
    g_dtype = multiplied_dtype(device, score_dtype(operand_dtype))
    row_bytes, block_row_bytes = 8 * V, 0
    if not uses_kernel(device):
        # PyTorch's rows need temporaries, and a narrow copy of the gradient for step 3.
        row_bytes += 0 if g_dtype == torch.float32 else g_dtype.itemsize * V
        block_row_bytes = 4 * BLOCK_TEMPORARIES * V
    tile_row_bytes = max(copied_bytes(W, operand_dtype) for W in heads)
    least_tile = min(V, LEAST_TILE)
    least = row_bytes + block_row_bytes + least_tile * tile_row_bytes
    if budget < least:
        raise ValueError(
            f"workspace_mib={budget / MIB:g} cannot hold one row of V={V} logits; "
            f"the least that works here is workspace_mib={math.ceil(least / MIB * 1e3) / 1e3:g}"
        )
    tile, copies = V, 0
    if tile_row_bytes:
        tile = int(min(budget / 8, budget - row_bytes - block_row_bytes) // tile_row_bytes)
        tile = min(V, max(least_tile, tile))
        copies = tile * tile_row_bytes
    rest = budget - copies
    block = rows = int(rest // row_bytes)
    if block_row_bytes:
        block = max(1, int(rest / 2 // block_row_bytes))
        if device.type == "cpu":
            block = min(block, max(1, CPU_BLOCK_ENTRIES // V))
        rows = int((rest - block * block_row_bytes) // row_bytes)
    # GEMMs on a GPU work in tiles of this many rows.
    multiple = GPU_TILE_ROWS if device.type == "cuda" and rows >= GPU_TILE_ROWS else 1
    chunks = max(1, math.ceil(N / min(rows, MAX_ROWS)))
    equal = math.ceil(N / chunks / multiple) * multiple
    rows = max(1, min(equal, rows // multiple * multiple))
    block = min(block, rows)
    return Plan(rows, block, tile, rows * row_bytes + block * block_row_bytes + copies)


def fill_row_workspace(
    loss: Tensor,
    dh_S: Tensor | None,
    workspace: Tensor,
    problem: Problem,
    rows: Tensor | None,
    plan: Plan,
) -> None:
    """Fill the divergence of every token and its gradient with respect to h_S.

    Args:
        loss: [N] fp32, filled with ℓ.
        dh_S: [N, D] fp32 zeros, filled with ∂ℓ/∂h_S; None where no gradient is wanted.
        workspace: [2 plan.rows, V] fp32 scratch.
        problem: the tokens.
        rows: indices of the tokens to compute, the others are left alone; None for all.
        plan: see `make_plan`.
    """
    W, W_T, dtype, T = problem.W, problem.W_T, problem.operand_dtype, problem.temperature
    for n in _chunks(rows, problem.h_S.shape[0], plan.rows):
        h_Sn, h_Tn = problem.h_S[n], problem.h_T[n]
        R = h_Sn.shape[0]
        z = workspace[: 2 * R]
        z_S, z_T = z[:R], z[R:]
        if W_T is None:
            project(z, torch.cat([h_Sn, h_Tn]), W, dtype, plan.tile)
        else:
            project(z_S, h_Sn, W, dtype, plan.tile)
            project(z_T, h_Tn, W_T, dtype, plan.tile)
        loss[n], g = _step_2(z_S, z_T, problem, plan, dh_S is not None)
        if dh_S is not None:
            dh_Sn = dh_S.new_zeros(R, dh_S.shape[1])
            project_back([(dh_Sn, g)], W, dtype, plan.tile)
            dh_S[n] = dh_Sn.div_(T)


def _step_2(
    z_S: Tensor, z_T: Tensor, problem: Problem, plan: Plan, needs_score: bool
) -> tuple[Tensor, Tensor]:
    """ℓ [R] of rows of logits [R, V] before temperature, and their gradient [R, V], which lies
    where z_S was."""
    loss = z_S.new_empty(z_S.shape[0])
    beta, T, entry_clip = problem.beta, problem.temperature, problem.entry_clip
    if uses_kernel(z_S.device):
        # What is narrower than fp32 lies in the first part of each row.
        g = z_S.view(score_dtype(problem.operand_dtype))[:, : z_S.shape[1]]
        _launch_rows(loss, g, z_S, z_T, problem, needs_score)
        return loss, g
    for i in range(0, z_S.shape[0], plan.block):
        block = slice(i, i + plan.block)
        if T != 1:
            z_S[block].div_(T)
            z_T[block].div_(T)
        loss[block] = divergence_rows_(z_S[block], z_T[block], beta, entry_clip, needs_score)
    return loss, z_S


def _launch_rows(
    loss: Tensor, g: Tensor, z_S: Tensor, z_T: Tensor, problem: Problem, needs_score: bool
) -> None:
    from opsd_kernels.kernels import rows, tiles
    from opsd_kernels.kernels.pointwise import family, mean_limit

    block, num_warps = tiles.lookup(z_S.device, problem.operand_dtype).rows
    with kernels.current(z_S.device):
        rows.rows_kernel[(z_S.shape[0],)](
            loss_ptr=loss,
            g_ptr=g,
            z_S_ptr=z_S,
            z_T_ptr=z_T,
            V=z_S.shape[1],
            stride_g=g.stride(0),
            stride_z=z_S.stride(0),
            inverse_temperature=1 / problem.temperature,
            beta=problem.beta,
            entry_clip=problem.entry_clip or 0.0,
            FAMILY=family(problem.beta),
            CLIPPED=problem.entry_clip is not None,
            NEEDS_SCORE=needs_score,
            LIMIT=mean_limit(problem.beta) if needs_score else 0.0,
            BLOCK=block,
            num_warps=num_warps,
        )


def _chunks(rows: Tensor | None, N: int, size: int) -> Iterator[slice | Tensor]:
    if rows is not None:
        yield from (rows[i : i + size] for i in range(0, rows.shape[0], size))
    else:
        yield from (slice(i, min(i + size, N)) for i in range(0, N, size))
