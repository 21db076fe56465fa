"""top_row: the last step of dh_S in the row workspace, after the product of g and W.

    dh_S = (g W + g_top W_top) / T

The gradient at the student's top entry, or for log p(ŷ) at ŷ, is not in g, or only rounded: the
rest, g_top, multiplies W_top in fp32, as in `finish`. A product that was made in parts of the
vocabulary is added up here, in their order. All in one pass over dh_S.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from . import cdiv, current
from .logits_tile import round_to
from .records import DTYPE_NAMES, Accumulated, Side

# Features of a program.
BLOCK = tl.constexpr(1024)


def launch(
    dh_S: Tensor, product: Tensor, top: Tensor, g_top: Tensor, scale: float, problem: Problem
) -> None:
    """dh_S ← (Σ product / scale + g_top W_top) / T, from a product [parts, R, D]."""
    (R, D), W = dh_S.shape, problem.W
    with current(dh_S.device):
        top_row_kernel[(R, cdiv(D, BLOCK.value))](
            dh_S=dh_S,
            accumulated=Accumulated(product, None, SCALE=tl.constexpr(scale)),
            W=W,
            student=Side(W.shape[0], D, D, W.stride(0), W.stride(1)),
            top=top,
            g_top=g_top,
            stride=product.stride(0),
            inverse_temperature=1 / problem.temperature,
            PARTS=product.shape[0],
            OPERAND=tl.dtype(DTYPE_NAMES[problem.operand_dtype]),
        )


# Numbers that depend on the batch do not cause a recompilation.
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
        accumulated: A [PARTS, R, D], `stride` apart, times SCALE; may be in the memory of dh_S.
        W, student: W [V, D] and its `Side`.
        top, g_top: [R], see `RowGradient`.
        OPERAND: the dtype that W is rounded to.
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
