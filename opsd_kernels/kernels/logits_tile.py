"""A tile of products of both sides, in registers: h[rows] · W[cols]ᵀ, fp32. These are the logits
before temperature, unless a head is more than a matrix: see `head`.

Every kernel that needs logits makes them here. Operands are loaded by pointers, or in bulk, by
descriptors: then the copy engine of a GPU (9.0 or above) does work that otherwise takes registers
and instructions of every thread.

By pointers, rows and columns beyond the end are loaded from the last one, which needs no mask in
the inner loop; only a D that BK does not divide is masked. In bulk they are 0. Either way the
caller ignores them. Heads may have any strides; contiguous features, and a D divisible by 16 as
language models have it, are fast.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..problem import Problem
from .pointwise import INTERPRETED
from .records import DTYPE_NAMES, Side, Tiling
from .tiles import Tile


def operands(chunk: Problem, tile: Tile) -> dict[str, Any]:
    """The arguments of kernels that call `logits_tiles`, by name."""
    hidden: dict[str, Any] = {"h_S": chunk.h_S, "h_T": chunk.h_T}
    heads: dict[str, Any] = {"W": chunk.W, "W_T": chunk.W_T}  # one for both sides is loaded once
    tensors = [t for t in (hidden | heads).values() if t is not None]
    if any(t.itemsize > chunk.operand_dtype.itemsize for t in tensors):
        tile = tile.widened()
    bulk = tile.BULK and all(
        t.dtype == chunk.operand_dtype and _has_bulk_strides(t) for t in tensors
    )
    map_S, map_T = chunk.logit_maps
    student = Side.of(chunk.h_S, chunk.W, map_S)
    h_T = chunk.h_S if chunk.h_T is None else chunk.h_T
    teacher = Side.of(h_T, chunk.W if chunk.W_T is None else chunk.W_T, map_T)
    even_D = student.D % tile.BK == 0 and teacher.D % tile.BK == 0
    even_V = student.V % tile.BV == 0
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    tiling = Tiling(*map(tl.constexpr, (
        tile.BM, tile.BV, tile.BK, tile.PARTS, bulk,
        even_D, even_V, DTYPE_NAMES[chunk.operand_dtype], precision,
    )))  # fmt: skip
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
    return {
        name: None if t is None else TensorDescriptor.from_tensor(t, block)
        for name, t in named.items()
    }


def _has_bulk_strides(t: Tensor) -> bool:
    """Whether descriptors can describe t: contiguous features, rows at multiples of 16 bytes."""
    apart = t.stride(1) == 1 and t.stride(0) >= t.shape[1]
    return apart and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0


@triton.jit
def round_to(t, DTYPE: tl.constexpr):
    """t in DTYPE, rounded to nearest even. Triton's interpreter itself truncates fp32 to bf16."""
    if INTERPRETED and DTYPE == tl.bfloat16 and t.dtype == tl.float32:
        bits = t.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        t = tl.where(t == t, bits.to(tl.float32, bitcast=True), t)
    return t.to(DTYPE)


@triton.jit
def logits_tiles(h_S, h_T, W, W_T, student, teacher, row, col, R, tiling, z_S=None):
    """The products h Wᵀ of both sides [BM, BV], fp32, of the rows from `row` and the columns from
    `col` on.

    Args:
        h_S, h_T: [R, D], [R, D_T], features contiguous: pointers; with BULK descriptors of blocks
            [BM, BK]. Where h_T is None there is no product for the teacher, and z_T is 0.
        W, W_T: [V, D], [V, D_T], any strides: pointers; with BULK, which needs contiguous features,
            descriptors of blocks [BV, BK]. W_T is None where both sides have the head W: then each
            tile of W is loaded once.
        student, teacher: each a `Side`.
        tiling: a `Tiling`.
        z_S: [BM, BV] to which the student's products are added; None for 0.
    """
    BM: tl.constexpr = tiling.BM
    BV: tl.constexpr = tiling.BV
    BK: tl.constexpr = tiling.BK
    OPERAND: tl.constexpr = tl.dtype(tiling.OPERAND)
    PRECISION: tl.constexpr = tiling.PRECISION
    D, D_T = student.D, teacher.D
    if z_S is None:
        z_S = tl.zeros((BM, BV), tl.float32)
    z_T = tl.zeros((BM, BV), tl.float32)
    if tiling.BULK:
        for d in range(0, D, BK):
            W_tile = operand(W.load([col, d]), OPERAND).T
            h_S_tile = operand(h_S.load([row, d]), OPERAND)
            z_S = tl.dot(h_S_tile, W_tile, z_S, input_precision=PRECISION)
            if W_T is None and h_T is not None:
                h_T_tile = operand(h_T.load([row, d]), OPERAND)
                z_T = tl.dot(h_T_tile, W_tile, z_T, input_precision=PRECISION)
        if W_T is not None and h_T is not None:
            for d in range(0, D_T, BK):
                W_tile = operand(W_T.load([col, d]), OPERAND).T
                h_T_tile = operand(h_T.load([row, d]), OPERAND)
                z_T = tl.dot(h_T_tile, W_tile, z_T, input_precision=PRECISION)
    else:
        rows = tl.minimum(row + tl.arange(0, BM), R - 1).to(tl.int64)
        cols = col + tl.arange(0, BV)
        if not tiling.EVEN_V:
            cols = tl.minimum(cols, student.V - 1)
        cols = cols.to(tl.int64)
        k = tl.arange(0, BK)
        h_S_ptrs = h_S + rows[:, None] * student.stride_h + k[None, :]
        if h_T is not None:
            h_T_ptrs = h_T + rows[:, None] * teacher.stride_h + k[None, :]
        W_ptrs = _columns_of(W, cols, k, student)
        for d in range(0, D, BK):
            h_S_tile = _load(h_S_ptrs, k[None, :] < D - d, tiling)
            W_tile = _load(W_ptrs, k[:, None] < D - d, tiling)
            z_S = tl.dot(h_S_tile, W_tile, z_S, input_precision=PRECISION)
            if W_T is None and h_T is not None:
                h_T_tile = _load(h_T_ptrs, k[None, :] < D - d, tiling)
                z_T = tl.dot(h_T_tile, W_tile, z_T, input_precision=PRECISION)
                h_T_ptrs += BK
            h_S_ptrs += BK
            W_ptrs += BK * student.stride_d
        if W_T is not None and h_T is not None:
            W_T_ptrs = _columns_of(W_T, cols, k, teacher)
            for d in range(0, D_T, BK):
                h_T_tile = _load(h_T_ptrs, k[None, :] < D_T - d, tiling)
                W_tile = _load(W_T_ptrs, k[:, None] < D_T - d, tiling)
                z_T = tl.dot(h_T_tile, W_tile, z_T, input_precision=PRECISION)
                h_T_ptrs += BK
                W_T_ptrs += BK * teacher.stride_d
    return z_S, z_T


@triton.jit
def _columns_of(W, cols, k, side):
    """Pointers [BK, BV] to the first features of some columns of logits, that is rows of W."""
    return W + cols[None, :] * side.stride_v + k[:, None].to(tl.int64) * side.stride_d


@triton.jit
def _load(ptrs, mask, tiling):
    if tiling.EVEN_D:
        t = tl.load(ptrs)
    else:
        t = tl.load(ptrs, mask=mask, other=0.0)
    return operand(t, tl.dtype(tiling.OPERAND))


@triton.jit
def operand(t, OPERAND: tl.constexpr):
    """t as it is multiplied: rounded to OPERAND."""
    if t.dtype != OPERAND:
        t = round_to(t.to(tl.float32), OPERAND)
    if INTERPRETED and OPERAND == tl.bfloat16:
        t = t.to(tl.float32)  # the interpreter would multiply the bit patterns of bf16
    return t


@triton.jit
def halves(z):
    """The first and the second half of the columns of z; nothing moves between threads."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))
