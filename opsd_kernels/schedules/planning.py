"""How many rows of logits a budget of bytes holds: the plan of the row workspace."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import kernels
from ..kernels import tiles
from ..problem import Problem
from ..products import PART_MULTIPLE, copied_bytes, multiplied_dtype, score_dtype

MIB = 2**20

# The most [block, V] fp32 temporaries that are alive at once in rows.py. Statistics take one more,
# the slope of a softcap one, weights for each token one, and a β for each token three: its sides
# are exchanged row by row.
BLOCK_TEMPORARIES = 8
# The most rows of a chunk: hidden states are copied a chunk at a time, and V may be small.
MAX_ROWS = 4096
# The fewest rows of W to widen at once: with fewer, Python's overhead shows.
LEAST_TILE = 64
# Entries of a block of rows on a CPU: 1 MiB of fp32 for each temporary, which stays in the cache.
CPU_BLOCK_ENTRIES = 2**18
GPU_TILE_ROWS = 128
# Parts of the vocabulary that step 3 multiplies at once (see `is_split`).
PARTS = 4


@dataclass(frozen=True)
class Plan:
    """How many rows and columns are in flight, so that all temporaries together fit a budget."""

    rows: int  # of a chunk; the workspace is [2 rows, V] fp32
    block: int  # rows handled at once in step 2
    tile: int  # rows of W copied at once; V if W is read in place
    bytes: int  # of all temporaries with a vocabulary-sized dimension together


def default_workspace_mib(device: torch.device) -> int:
    """128 on a CPU: about 100 rows of logits with the vocabulary of Qwen3. On a GPU 0, which is
    logit-free, or 320, 256 rows, if the GPU is too old for the kernels."""
    if device.type == "cpu":
        return 128
    return 0 if kernels.available(device) else 320


def uses_rows_kernel(problem: Problem) -> bool:
    """Whether step 2 is the `rows` kernel. It is PyTorch where processes share the vocabulary: they
    reduce over their shards between its sweeps."""
    device = problem.h_S.device
    return problem.group is None and device.type == "cuda" and kernels.available(device)


def make_plan(problem: Problem, N: int, budget: float, needs_statistics: bool = False) -> Plan:
    """Fit chunk, block and tile to a budget.

    Args:
        problem: the loss and its heads; how many tokens it has does not matter.
        N: number of tokens.
        budget: bytes for all temporaries with a vocabulary-sized dimension together.
        needs_statistics: whether statistics are wanted.

    Raises:
        ValueError: the budget cannot hold one row; the message names the least that works.
    """
    V, device = problem.W.shape[0], problem.W.device
    row, block_row, copied_row = _bytes(problem, needs_statistics)
    least_tile = min(V, LEAST_TILE)
    least = row + block_row + least_tile * copied_row
    if budget < least:
        raise ValueError(
            f"workspace_mib={budget / MIB:g} cannot hold one row of V={V} logits; "
            f"the least that works here is workspace_mib={math.ceil(least / MIB * 1e3) / 1e3:g}"
        )
    tile, copies = V, 0
    if copied_row:
        tile = int(min(budget / 8, budget - row - block_row) // copied_row)
        tile = min(V, max(least_tile, tile))
        if device.type == "cuda" and tile < V:
            tile = tile // LEAST_TILE * LEAST_TILE  # so that a GPU can read 16 bytes at once
        copies = tile * copied_row
    rest = budget - copies
    # Processes that share a vocabulary handle all rows of a chunk at once, for few collectives.
    one_block = problem.group is not None
    block = rows = int(rest // (row + block_row * one_block))
    if block_row and not one_block:
        block = max(1, int(rest / 2 // block_row))
        if device.type == "cpu":
            block = min(block, max(1, CPU_BLOCK_ENTRIES // V))
        rows = int((rest - block * block_row) // row)
    # GEMMs on a GPU work in tiles of this many rows.
    multiple = GPU_TILE_ROWS if device.type == "cuda" and rows >= GPU_TILE_ROWS else 1
    rows = min(rows // multiple * multiple, MAX_ROWS)
    chunks = max(1, -(-N // rows))
    rows = max(1, min(rows, -(-N // (chunks * multiple)) * multiple))
    block = rows if one_block else min(block, rows)
    return Plan(rows, block, tile, rows * row + block * block_row + copies)


def _bytes(problem: Problem, needs_statistics: bool = False) -> tuple[int, int, int]:
    """Bytes of a row of the workspace, of a row of a block, and of a copied row of a head."""
    dtype, stride = problem.operand_dtype, row_stride(problem.W.shape[0])
    row, block_row = 4 * problem.sides * stride, 0
    if not uses_rows_kernel(problem):
        # PyTorch's rows need temporaries, and a narrow copy of the gradient for step 3.
        g_dtype = multiplied_dtype(problem.W.device, score_dtype(dtype, bounded=False))
        row += 0 if g_dtype == torch.float32 else g_dtype.itemsize * stride
        more = (problem.softcap is not None) + (problem.w_q is not None) + needs_statistics
        more += 3 * isinstance(problem.beta, Tensor)
        block_row = 4 * (BLOCK_TEMPORARIES + more) * stride
    return row, block_row, max(copied_bytes(W, dtype) for W in problem.heads)


def budget_beside_head(problem: Problem, budget: float) -> float:
    """The part of a budget that dW and db in fp32 leave."""
    return budget - 4 * problem.W.numel() - 4 * problem.W.shape[0]


def can_weigh(problem: Problem, budget: float) -> bool:
    """Whether the budget holds dW and db in fp32, and as much for rows of logits as they take.
    Never for processes that share a vocabulary: they do not know each other's budget."""
    if problem.group is not None:
        return False
    row, block_row, copied_row = _bytes(problem)
    least = row + block_row + min(problem.W.shape[0], LEAST_TILE) * copied_row
    return budget_beside_head(problem, budget) >= max(least, budget / 2)


def is_split(problem: Problem, rows: int) -> bool:
    """Whether step 3 multiplies parts of the vocabulary at once: a product of few rows has few
    tiles, and leaves multiprocessors idle."""
    if not uses_rows_kernel(problem) or copied_bytes(problem.W, problem.operand_dtype) > 0:
        return False
    row = tiles.lookup(problem.h_S.device, problem.operand_dtype)
    return rows <= row.split_rows and problem.W.shape[0] >= PARTS * PART_MULTIPLE


def row_stride(V: int) -> int:
    """Entries from one row of the workspace to the next. Every row begins at a multiple of 64
    bytes: otherwise a GPU reads and multiplies four entries at a time."""
    return (V + 15) // 16 * 16
