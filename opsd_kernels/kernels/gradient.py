"""gradient: the gradient with respect to logits, of one tile of the vocabulary, from hidden states.

Where all sums over a row's logits are known, G too (`Stats` of the row, see `lse`, with G in place
of c and the gradient of the top entry in place of its score), the logits are computed once more,
and

    g = w (a − G p)      and at the top entry   g = w g_top

for upstream weights w of the rows. The tile goes to scratch, in the dtype of the operands of the
two products that follow, one for the hidden states and one for a trained head:

    dh_S += g W,   dW += gᵀ h_S

Where the student's logits are capped (see `head`), g is multiplied by the slope of the cap; g_top
contains its slope already. For log p(ŷ) of a sampled token, whose gradient is 1[v = ŷ] − p, ŷ takes
the place of the top entry. Rows of weight 0 are 0, whatever their hidden states contain.

Where entries are excluded (`excluded`), g of such an entry is then the number that is given.

As in `pair`, a tile is processed in PARTS parts of its columns, one after the other.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..divergence import Family
from ..problem import Problem
from ..products import score_scale
from . import cdiv, excluded, tiles
from .excluded import excluded_tile
from .head import logits_and_slope
from .logits_tile import halves, logits_tiles, operands, round_to
from .pair import entries, load_stats, top_of, with_policy_term
from .pointwise import columns_of, formula_of, parameters_of
from .records import PerToken, Weighed


def launch(g: Tensor, chunk: Problem, v: int, bits: Tensor | None = None) -> None:
    """g [R, columns] ← the gradient with respect to logits of the columns from v on, weighed, times
    `score_scale`.

    Args:
        g: in a `score_dtype`; its columns are a multiple of the tile's.
        chunk: the tokens, with weights and what forward kept of them.
        bits: of the entries that are excluded, from column v on. Their g is 0, or given.
    """
    if bits is not None and chunk.excluded is not None:
        bits = bits[: chunk.h_S.shape[0]]
        excluded.mark(bits, chunk.excluded, v)
    stats = chunk.stats
    assert stats is not None
    tile = tiles.lookup(g.device, chunk.operand_dtype).pair_for(chunk.member, False)
    R, columns = chunk.h_S.shape[0], min(g.shape[1], chunk.W.shape[0] - v)
    policy = chunk.advantages is not None
    needs_targets = chunk.member.family == Family.LOG_PROB or policy
    if not chunk.member.is_divergence:
        chunk = chunk.without_teacher()
    gradient_kernel[(cdiv(R, tile.BM), cdiv(columns, tile.BV))](
        weighed=Weighed(
            g,
            chunk.weights,
            begin=v,
            stride=g.stride(0),
            SCALE=tl.constexpr(score_scale(g.dtype)),
            POLICY=tl.constexpr(policy),
        ),
        tokens=PerToken.of(
            chunk, stats, chunk.top, needs_keep=False, needs_targets=needs_targets, bits=bits
        ),
        R=R,
        stride=stats.stride(0),
        formula=formula_of(chunk.member, chunk.temperature),
        **operands(chunk, tile),
    )
    if chunk.excluded is not None and chunk.g_excluded is not None:
        excluded.put(g[:, :columns], chunk.g_excluded, chunk.excluded, v, score_scale(g.dtype))


# Numbers that depend on the batch do not cause a recompilation.
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
    """Grid (row tiles, column tiles), of the columns from `weighed.begin` on.

    Writes:
        weighed: g, with 0 beyond the vocabulary's end, up to a multiple of BV.

    Reads:
        weighed: the weights.
        h_S, h_T, W, W_T: see `logits_tiles`.
        student, teacher, formula, tiling: the records.
        tokens: all fields but keep; for LOG_PROB targets take the place of top. A tile of rows that
            all have weight 0 is not computed.
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
    advantage, target = weight, row  # a tuple cannot hold None
    if weighed.POLICY:
        advantage = tl.load(tokens.advantages + row, mask=exists, other=0.0)
        target = tl.load(tokens.targets + row, mask=exists, other=-1)
    policy = (advantage[:, None], target[:, None])
    V = student.V
    # The loop has one iteration: see `pair`.
    for begin in range(first, tl.minimum(first + BV, V), BV):
        start = None
        if tokens.bits is not None:
            start = excluded_tile(begin - weighed.begin, row, exists, tokens, BV)
        z_S, z_T = logits_tiles(
            h_S, h_T, W, W_T, student, teacher, tl.program_id(0) * BM, begin, R, tiling, start
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
    """Store the columns of g from `begin` on, in PARTS parts one after the other.

    Args:
        V: the vocabulary's end, or None if all columns are before it.
        of_rows: of each row [BM, 1] the top entry, the `Stats`, the parameters, the advantage and
            the sampled token if `weighed.POLICY`, the weight, and whether it exists.
        g_ptrs: to g of each row; the index of a column is added.
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
        # A mask of the columns would hide that they are contiguous.
        tl.store(g_ptrs + col, round_to(g, g_ptrs.dtype.element_ty), mask=exists)
