"""A tile of products of both sides, in registers: h[rows] · W[cols]ᵀ, fp32. They are the logits
before temperature, unless a head is more than a matrix: see `head`.

Every kernel that needs logits makes them here. Operands are loaded by pointers, or in bulk, by
descriptors: then the copy engine of a GPU (9.0 or above) does what otherwise takes registers and
instructions of every thread.

By pointers, rows and columns beyond the last are loaded from the last, which needs no mask in the
inner loop; only a D that BK does not divide is masked. In bulk they are 0. Either way what they
give is for the caller to leave out. Any strides of the head are right; contiguous features, and a D
divisible by 16 as language models have it, are fast.
"""

import triton
import triton.language as tl

from opsd_kernels.kernels.pointwise import INTERPRETED


@triton.jit
def round_to(t, DTYPE: tl.constexpr):
    """t in DTYPE, rounded to nearest even. The interpreter alone would truncate fp32 to bf16."""
    if INTERPRETED and DTYPE == tl.bfloat16 and t.dtype == tl.float32:
        bits = t.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        t = tl.where(t == t, bits.to(tl.float32, bitcast=True), t)
    return t.to(DTYPE)


@triton.jit
def logits_tiles(h_S, h_T, W, W_T, student, teacher, row, col, R, tiling):
    """z_S, z_T [BM, BV] fp32, what h Wᵀ has of them, of the rows from `row` and the columns from
    `col` on.

    Args:
        h_S, h_T: [R, D], [R, D_T], features contiguous: pointers; if BULK descriptors of blocks
            [BM, BK]. Where h_T is None nothing is multiplied for the teacher, and z_T is 0.
        W, W_T: [V, D], [V, D_T], any strides: pointers; if BULK, for which features are contiguous,
            descriptors of blocks [BV, BK]. W_T is None where both sides have the head W: each tile
            of it is loaded once.
        student, teacher: each a `Side`.
        tiling: a `Tiling`.
    """
    BM: tl.constexpr = tiling.BM
    BV: tl.constexpr = tiling.BV
    BK: tl.constexpr = tiling.BK
    OPERAND: tl.constexpr = tl.dtype(tiling.OPERAND)
    PRECISION: tl.constexpr = tiling.PRECISION
    D, D_T = student.D, teacher.D
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
    """Pointers [BK, BV] to the first features of columns of logits, which are rows of W."""
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
    """t as it is multiplied, with the rounding of OPERAND."""
    if t.dtype != OPERAND:
        t = round_to(t.to(tl.float32), OPERAND)
    if INTERPRETED and OPERAND == tl.bfloat16:
        t = t.to(tl.float32)  # the interpreter multiplies the bit patterns of bf16
    return t


@triton.jit
def halves(z):
    """The first and the second half of the columns of z; nothing moves between threads."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))
