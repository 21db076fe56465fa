"""top_row: the end of a product of the gradient of logits with W, in the row workspace.

    dh_S = (g W + g_top W_top) / T

The gradient at the student's top entry, or for log p(ŷ) that at ŷ, is not in g, or what its
rounding took is not: it multiplies W_top in fp32, as in `finish`. A product that was made in parts
of the vocabulary is added up here, in their order. One pass over dh_S, whatever there is to do.
"""

import triton
import triton.language as tl

from opsd_kernels.kernels.logits_tile import round_to

# Features of a program.
BLOCK = tl.constexpr(1024)


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["stride"])
def top_row_kernel(
    dh_S,
    accumulated,
    W,
    student,
    top,
    g_top,
    stride,
    inverse_temperature,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Grid (rows, blocks of features).

    Writes:
        dh_S: [R, D] fp32.

    Reads:
        accumulated: A [PARTS, R, D], `stride` apart, times SCALE; may lie where dh_S is to be.
        W: [V, D], and of it `student`, a `Side`.
        top, g_top: [R], see `RowGradient`.
        OPERAND: the dtype whose rounding W has.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < student.D
    at = row * student.D + k
    dh = tl.load(accumulated.A + at, mask=inside, other=0.0)
    for i in tl.static_range(1, PARTS):
        dh += tl.load(accumulated.A + i * stride.to(tl.int64) + at, mask=inside, other=0.0)
    at_W = tl.load(top + row).to(tl.int64) * student.stride_v
    W_top = tl.load(W + at_W + k.to(tl.int64) * student.stride_d, mask=inside, other=0.0)
    W_top = round_to(W_top.to(tl.float32), OPERAND).to(tl.float32)
    dh = dh * (1 / accumulated.SCALE) + tl.load(g_top + row) * W_top
    tl.store(dh_S + at, dh * inverse_temperature, mask=inside)
