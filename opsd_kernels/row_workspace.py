"""Schedule: a bounded workspace of logit rows. 3 U of matrix products, any device, plain PyTorch.

With U = 2 N D V, one pass of N tokens through the LM head, a chunk of R rows at a time:

    1. [z_S; z_T] = [h_S; h_T] Wᵀ / T    one GEMM into a [2R, V] fp32 workspace          2 U
    2. z_S ← a − G p,  ℓ = Σ_v f         row blocks small enough for the cache
    3. dh_S = z_S W / T                  one GEMM, accumulated in fp32                   1 U

The head is frozen, so the gradient is made during forward, from logits that exist only once.
Products of bf16 and fp16 operands are accumulated, and kept, in fp32: on CUDA by the tensor cores,
elsewhere by widening a tile of W at a time. They are written with `out=`, which autocast leaves
alone: operands are rounded here, tile by tile, and nothing else is.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels.divergence import divergence_rows_

MIB = 2**20

# [block, V] fp32 temporaries alive at once inside `divergence_rows_`, at most.
BLOCK_TEMPORARIES = 8
# Rows of a chunk at most: hidden states are copied a chunk at a time, and V may be small.
MAX_ROWS = 4096
# Rows of W widened at once at least: below, Python's overhead for each shows.
LEAST_TILE = 64
# Entries of a row block on a CPU: 1 MiB of fp32 for each temporary, to stay in the cache.
CPU_BLOCK_ENTRIES = 2**18


@dataclass(frozen=True)
class Plan:
    """How many rows and columns are in flight, so that all temporaries together fit a budget."""

    rows: int  # of a chunk; the workspace is [2 rows, V] fp32
    block: int  # rows handled at once in step 2
    tile: int  # columns (rows of W) of one matrix product; V where W is used as it stands
    bytes: int  # of all temporaries with a vocabulary-sized dimension together


def default_workspace_mib(device: torch.device) -> int:
    """128 MiB on a CPU, 320 elsewhere: chunks of about 100 rows with a Qwen3 vocabulary."""
    return 128 if device.type == "cpu" else 320


def plan(N: int, heads: tuple[Tensor, ...], operand_dtype: torch.dtype, budget: float) -> Plan:
    """Fit chunk, block and tile to `budget` bytes.

    Args:
        N: number of tokens.
        heads: the LM heads in use, [V, D] each.
        operand_dtype: the dtype whose rounding the operands of the matrix products have.
        budget: bytes for all temporaries with a vocabulary-sized dimension together.

    Raises:
        ValueError: the budget cannot hold one row; the message names the least that works.
    """
    V = heads[0].shape[0]
    device = heads[0].device
    product_dtype = _product_dtype(device, operand_dtype)
    # A narrow copy of the gradient feeds the tensor cores of step 3.
    row_bytes = 8 * V + (0 if product_dtype == torch.float32 else product_dtype.itemsize * V)
    block_row_bytes = 4 * BLOCK_TEMPORARIES * V
    # A tile of W is at most copied twice: rounded to the operand dtype, then widened.
    copied = [8 * W.shape[1] for W in heads if not _usable_as_is(W, operand_dtype)]
    tile_row_bytes = max(copied) if copied else 0
    least_tile = min(V, LEAST_TILE)
    least = row_bytes + block_row_bytes + least_tile * tile_row_bytes
    if budget < least:
        raise ValueError(
            f"workspace_mib={budget / MIB:g} cannot hold one row of V={V} logits; "
            f"the least that works here is workspace_mib={math.ceil(least / MIB * 1e3) / 1e3:g}"
        )
    tile = V
    if tile_row_bytes:
        tile = int(min(budget / 8, budget - row_bytes - block_row_bytes) // tile_row_bytes)
        tile = min(V, max(least_tile, tile))
    rest = budget - tile * tile_row_bytes
    block = max(1, int(rest / 2 // block_row_bytes))
    if device.type == "cpu":
        block = min(block, max(1, CPU_BLOCK_ENTRIES // V))
    rows = int((rest - block * block_row_bytes) // row_bytes)
    chunks = max(1, math.ceil(N / min(rows, MAX_ROWS)))
    rows = max(1, math.ceil(N / chunks))  # chunks of equal size
    block = min(block, rows)
    used = rows * row_bytes + block * block_row_bytes + tile * tile_row_bytes
    return Plan(rows, block, tile, used)


def fill_row_workspace(
    loss: Tensor,
    dh_S: Tensor | None,
    workspace: Tensor,
    h_S: Tensor,
    h_T: Tensor,
    W: Tensor,
    W_T: Tensor | None,
    *,
    rows: Tensor | None,
    plan: Plan,
    operand_dtype: torch.dtype,
    beta: float,
    temperature: float,
    entry_clip: float | None,
) -> None:
    """Fill the divergence of every token and its gradient with respect to h_S.

    Args:
        loss: [N] fp32, filled with ℓ.
        dh_S: [N, D] fp32, filled with ∂ℓ/∂h_S; None where no gradient is wanted.
        workspace: [2 plan.rows, V] fp32 scratch.
        h_S, h_T: [N, D], [N, D_T] hidden states of student and teacher.
        W, W_T: [V, D], [V, D_T] their LM heads; W_T is None if W serves both.
        rows: indices of the tokens to compute, the others are left alone; None for all.
        operand_dtype: the dtype whose rounding the operands of the matrix products have.
        beta, temperature, entry_clip: the divergence.
    """
    for n in _chunks(rows, h_S.shape[0], plan.rows):
        h_Sn, h_Tn = h_S[n], h_T[n]
        R = h_Sn.shape[0]
        z = workspace[: 2 * R]
        z_S, z_T = z[:R], z[R:]
        if W_T is None:
            _project(z, torch.cat([h_Sn, h_Tn]), W, temperature, operand_dtype, plan.tile)
        else:
            _project(z_S, h_Sn, W, temperature, operand_dtype, plan.tile)
            _project(z_T, h_Tn, W_T, temperature, operand_dtype, plan.tile)

        loss_n = loss.new_empty(R)
        for i in range(0, R, plan.block):
            block = slice(i, min(i + plan.block, R))
            loss_n[block] = divergence_rows_(
                z_S[block], z_T[block], beta, entry_clip, needs_score=dh_S is not None
            )
        loss[n] = loss_n
        if dh_S is not None:
            dh_S[n] = _project_back(z_S, W, operand_dtype, plan.tile).div_(temperature)


def _chunks(rows: Tensor | None, N: int, size: int) -> Iterator[slice | Tensor]:
    if rows is not None:
        yield from (rows[i : i + size] for i in range(0, rows.shape[0], size))
    else:
        yield from (slice(i, min(i + size, N)) for i in range(0, N, size))


def _project(
    z: Tensor, h: Tensor, W: Tensor, temperature: float, operand_dtype: torch.dtype, tile: int
) -> None:
    """z ← h Wᵀ / T in fp32: [R, V] from [R, D] and [V, D]."""
    h = _as_operand(h, operand_dtype)
    for v, W_v in _tiles(W, operand_dtype, tile):
        if h.dtype == torch.float32:
            torch.mm(h, W_v.t(), out=z[:, v])
        else:
            torch.mm(h, W_v.t(), out_dtype=torch.float32, out=z[:, v])
    if temperature != 1:
        z.div_(temperature)


def _project_back(g: Tensor, W: Tensor, operand_dtype: torch.dtype, tile: int) -> Tensor:
    """g W in fp32: [R, D] from [R, V] and [V, D]."""
    product_dtype = _product_dtype(W.device, operand_dtype)
    out = g.new_zeros(g.shape[0], W.shape[1])
    for v, W_v in _tiles(W, operand_dtype, tile):
        if product_dtype == torch.float32:
            torch.addmm(out, g[:, v], W_v, out=out)
        else:
            torch.addmm(out, g[:, v].to(product_dtype), W_v, out_dtype=torch.float32, out=out)
    return out


def _tiles(W: Tensor, operand_dtype: torch.dtype, tile: int) -> Iterator[tuple[slice, Tensor]]:
    if _usable_as_is(W, operand_dtype):
        yield slice(None), W
        return
    for i in range(0, W.shape[0], tile):
        v = slice(i, min(i + tile, W.shape[0]))
        yield v, _as_operand(W[v], operand_dtype).contiguous()


def _as_operand(t: Tensor, operand_dtype: torch.dtype) -> Tensor:
    return t.to(operand_dtype).to(_product_dtype(t.device, operand_dtype))


def _usable_as_is(W: Tensor, operand_dtype: torch.dtype) -> bool:
    """Whether the matrix product reads W without a copy of it."""
    blas_strides = (W.stride(1) == 1 and W.stride(0) >= W.shape[1]) or (
        W.stride(0) == 1 and W.stride(1) >= W.shape[0]
    )
    return blas_strides and W.dtype == operand_dtype == _product_dtype(W.device, operand_dtype)


def _product_dtype(device: torch.device, operand_dtype: torch.dtype) -> torch.dtype:
    # CUDA multiplies bf16 with fp32 accumulation and result. fp16 could, but the gradient of an
    # unlikely token, 1e-8 and below, underflows in an fp16 operand; elsewhere only fp32 does.
    if device.type == "cuda" and operand_dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float32
