"""gradient: the gradient with respect to logits, of one tile of the vocabulary, from hidden states.

Where all that a row's logits sum to is known, G too (`Stats` of the row, see `lse`, with G in place
of c and the gradient of the top entry in place of its score), the logits are made once more, and

    g = w (a − G p)      and at the top entry   g = w g_top

for upstream weights w of the rows. The tile goes to scratch, in the dtype of the operands of the
two products that follow, one for the hidden states and one for a head that is trained:

    dh_S += g W,   dW += gᵀ h_S

Where the student's logits are capped (see `head`), g is multiplied by the slope of the cap; g_top
has its own already. For log p(ŷ) of a sampled token, whose gradient is 1[v = ŷ] − p, ŷ takes the
top entry's place. Rows of weight 0 are 0, whatever their hidden states hold.

As in `pair`, entries are made in PARTS parts of the columns, one after the other.
"""

import triton
import triton.language as tl

from opsd_kernels.kernels.head import logits_and_slope
from opsd_kernels.kernels.logits_tile import halves, logits_tiles, round_to
from opsd_kernels.kernels.pair import entries, load_stats, top_of, with_policy_term
from opsd_kernels.kernels.pointwise import columns_of, parameters_of


# What depends on the batch is no reason to compile again.
@triton.jit(do_not_specialize=["R", "stride"])
def gradient_kernel(
    weighed,
    h_S,
    h_T,
    W,
    W_T,
    student,
    teacher,
    tokens,
    R,
    stride,
    formula,
    tiling,
):
    """Grid (row tiles, column tiles): of the columns from `weighed.begin` on, up to the
    vocabulary's end.

    Writes:
        weighed: g, 0 beyond the vocabulary's end, up to a multiple of BV.

    Reads:
        weighed: the weights.
        h_S, h_T, W, W_T: see `logits_tiles`; of LOG_PROB the student's alone.
        student, teacher, formula, tiling: the records.
        tokens: stats and top; of LOG_PROB targets instead; what is given of each. A tile of rows
            that all have weight 0 is not computed.
        stride: of `stats`.
    """
    BM: tl.constexpr = tiling.BM
    BV: tl.constexpr = tiling.BV
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    exists = row < R
    weight = tl.load(weighed.weights + row, mask=exists, other=0.0)
    g_ptrs = weighed.g + (row[:, None].to(tl.int64) * weighed.stride - weighed.begin)
    first = weighed.begin + tl.program_id(1) * BV
    if tl.max((weight != 0).to(tl.int32), 0) == 0:
        col = (first + tl.arange(0, BV))[None, :]
        zero = tl.zeros((BM, BV), weighed.g.dtype.element_ty)
        tl.store(g_ptrs + col, zero, mask=exists[:, None])
        return
    parameters = columns_of(parameters_of(tokens, row, exists, formula))
    advantage, target = weight, row  # any: a tuple holds no None
    if weighed.POLICY:
        advantage = tl.load(tokens.advantages + row, mask=exists, other=0.0)
        target = tl.load(tokens.targets + row, mask=exists, other=-1)
    policy = (advantage[:, None], target[:, None])
    V = student.V
    # One turn: see `pair`.
    for begin in range(first, tl.minimum(first + BV, V), BV):
        z_S, z_T = logits_tiles(
            h_S, h_T, W, W_T, student, teacher, tl.program_id(0) * BM, begin, R, tiling
        )
        stats = load_stats(tokens, stride, row, exists)
        top = top_of(tokens, row, exists, formula)[:, None]
        of_rows = (top, stats, parameters, policy, weight[:, None], exists[:, None])
        _columns(
            z_S, z_T, begin, None if tiling.EVEN_V else V, student, teacher, of_rows, g_ptrs,
            formula, weighed, tiling.PARTS,
        )  # fmt: skip


@triton.jit
def _columns(
    z_S,
    z_T,
    begin,
    V,
    student,
    teacher,
    of_rows,
    g_ptrs,
    formula,
    weighed,
    PARTS: tl.constexpr,
):
    """The columns `begin` … of g, stored, in PARTS parts one after the other.

    Args:
        V: the vocabulary's end, or None if all columns are before it.
        of_rows: top entry, `Stats`, parameters, advantage and sampled token if `weighed.POLICY`,
            weight and whether it exists, of each row [BM, 1].
        g_ptrs: to rows of g, to which a column of the vocabulary is added.
    """
    if PARTS > 1:
        z_S0, z_S1 = halves(z_S)
        z_T0, z_T1 = halves(z_T)
        _columns(
            z_S0, z_T0, begin, V, student, teacher, of_rows, g_ptrs, formula, weighed,
            PARTS // 2,
        )  # fmt: skip
        _columns(
            z_S1, z_T1, begin + z_S0.shape[1], V, student, teacher, of_rows, g_ptrs, formula,
            weighed, PARTS // 2,
        )  # fmt: skip
    else:
        col = (tl.arange(0, z_S.shape[1]) + begin)[None, :]
        z_S, slope = logits_and_slope(z_S, col, V, student.bias, student.softcap, student.scale)
        z_T, _ = logits_and_slope(z_T, col, V, teacher.bias, teacher.softcap, teacher.scale)
        if V is not None:
            z_S = tl.where(col < V, z_S, float("-inf"))
            z_T = tl.where(col < V, z_T, float("-inf"))
        top, stats, parameters, policy, weight, exists = of_rows
        terms, _p = entries(z_S, z_T, col == top, stats, parameters, formula, False)
        g = terms[1]
        if weighed.POLICY:
            g = with_policy_term(g, col, policy)
        g = tl.where(col == top, stats.s_top, g * slope) * weight
        g = tl.where(weight == 0, 0.0, g) * weighed.SCALE
        # No mask but that of the rows: it would hide that columns are contiguous.
        tl.store(g_ptrs + col, round_to(g, g_ptrs.dtype.element_ty), mask=exists)
