"""A tile of logits of both sides, in registers: z = h[rows] · W[cols]ᵀ, fp32.

Every kernel that needs logits makes them here. Rows and columns beyond the last are loaded from
the last, which needs no mask in the inner loop; what they give is for the caller to leave out. Only
a D that BK does not divide is masked. Any strides of the head are right; contiguous features, and
a D divisible by 16 as language models have it, are fast.
"""

import triton
import triton.language as tl

# A constant for the kernels: the interpreter needs help where bf16 is concerned.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def round_to(t, DTYPE: tl.constexpr):
    """t in DTYPE, rounded to nearest even. The interpreter alone would truncate fp32 to bf16."""
    if INTERPRETED and DTYPE == tl.bfloat16 and t.dtype == tl.float32:
        bits = t.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        t = tl.where(t == t, bits.to(tl.float32, bitcast=True), t)
    return t.to(DTYPE)


@triton.jit
def logits_tiles(
    h_S_ptr,
    h_T_ptr,
    W_ptr,
    W_T_ptr,
    rows,
    cols,
    D,
    D_T,
    stride_h_S,
    stride_h_T,
    stride_Wv,
    stride_Wd,
    stride_W_Tv,
    stride_W_Td,
    SHARED: tl.constexpr,
    EVEN_D: tl.constexpr,
    BK: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z_S, z_T [BM, BV] fp32 before temperature. Where h_T_ptr is None nothing is multiplied for
    the teacher, and z_T is 0.

    Args:
        h_S_ptr, h_T_ptr: [R, D], [R, D_T], features contiguous.
        W_ptr, W_T_ptr: [V, D], [V, D_T], any strides; W_T_ptr is read unless SHARED.
        rows, cols: [BM], [BV] int64 indices, within bounds.
        SHARED: both sides have the head W: each tile of it is loaded once.
        EVEN_D: BK divides D and D_T.
        OPERAND: the dtype whose rounding the operands have.
        PRECISION: of fp32 products, as in tl.dot.
    """
    z_S = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    z_T = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    k = tl.arange(0, BK)
    h_S_ptrs = h_S_ptr + rows[:, None] * stride_h_S + k[None, :]
    if h_T_ptr is not None:
        h_T_ptrs = h_T_ptr + rows[:, None] * stride_h_T + k[None, :]
    W_ptrs = W_ptr + cols[None, :] * stride_Wv + k[:, None].to(tl.int64) * stride_Wd
    for d in range(0, D, BK):
        h_S = _load(h_S_ptrs, k[None, :] < D - d, EVEN_D, OPERAND)
        W = _load(W_ptrs, k[:, None] < D - d, EVEN_D, OPERAND)
        z_S = tl.dot(h_S, W, z_S, input_precision=PRECISION)
        if SHARED and h_T_ptr is not None:
            h_T = _load(h_T_ptrs, k[None, :] < D - d, EVEN_D, OPERAND)
            z_T = tl.dot(h_T, W, z_T, input_precision=PRECISION)
            h_T_ptrs += BK
        h_S_ptrs += BK
        W_ptrs += BK * stride_Wd
    if not SHARED and h_T_ptr is not None:
        W_T_ptrs = W_T_ptr + cols[None, :] * stride_W_Tv + k[:, None].to(tl.int64) * stride_W_Td
        for d in range(0, D_T, BK):
            h_T = _load(h_T_ptrs, k[None, :] < D_T - d, EVEN_D, OPERAND)
            W = _load(W_T_ptrs, k[:, None] < D_T - d, EVEN_D, OPERAND)
            z_T = tl.dot(h_T, W, z_T, input_precision=PRECISION)
            h_T_ptrs += BK
            W_T_ptrs += BK * stride_W_Td
    return z_S, z_T


@triton.jit
def _load(ptrs, mask, EVEN_D: tl.constexpr, OPERAND: tl.constexpr):
    if EVEN_D:
        t = tl.load(ptrs)
    else:
        t = tl.load(ptrs, mask=mask, other=0.0)
    if t.dtype != OPERAND:
        t = round_to(t.to(tl.float32), OPERAND)
    if INTERPRETED and OPERAND == tl.bfloat16:
        t = t.to(tl.float32)  # the interpreter multiplies the bit patterns of bf16
    return t


@triton.jit
def halves(z):
    """The first and the second half of the columns of z; nothing moves between threads."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))
