"""Schedule: logits in registers only. 6 U of matrix products on a GPU, no vocabulary-sized tensor.

With U = 2 N D V, one pass of N tokens through the LM head, a chunk of R rows at a time:

    1. L_S, L_T, top entry, c       `lse`: logits and their log-sum-exp in one kernel      2 U
    2. Σ f, Σ s; tiles s and p      `pair`: logits again, a tile of the vocabulary         2 U
    3. A += s W, P += p W           library product over the tile, accumulated in fp32     2 U
       dh_S ← (A − (G − c) P + g_top W_top) / T      `finish`, after the last tile

G is known after step 2. The gradient is linear in G, so no third pass over the logits is needed.
For the unclipped KLs step 1 gives G, and step 2 stores one tile: 5 U. Without a gradient there is
no step 3: 4 U.

The tiles are scratch of a bounded size, used again for each part of the vocabulary. Beside them
there are dh_S in fp32 and a few numbers for each row. s and p are stacked: where D is small, a
product of R rows by D features has too few tiles for a GPU, and step 3 is one product of both.
"""

from dataclasses import replace

from torch import Tensor

from .. import kernels
from ..divergence import Family
from ..heads.vocabulary_parallel import begin_sum_, summed_
from ..kernels import excluded, finish, lse, pair
from ..kernels.scratch import Scratch, allocate
from ..problem import Outputs, Problem
from ..products import project_back


def fill(outputs: Outputs, problem: Problem) -> None:
    """Fill loss, statistics and gradient of every token that counts."""
    scratch = allocate(
        problem,
        needs_gradient=outputs.dh_S is not None,
        needs_statistics=outputs.statistics is not None,
        needs_stats=outputs.stats is not None,
    )
    # Other values themselves follow from step 1, and what backward needs of a log-sum-exp too, but
    # for a slope.
    needs_step_2 = problem.member.is_divergence or outputs.needs_score
    if problem.member.family == Family.LOG_SUM and outputs.dh_S is None:
        needs_step_2 = scratch.slopes > 0
    v_stop = problem.W.shape[0] if needs_step_2 else 0
    problem = problem.with_contiguous_rows()  # once, for all kernels
    unfinished = []
    with kernels.current(outputs.loss.device):
        for n in range(0, outputs.loss.shape[0], scratch.rows):
            rows = slice(n, n + scratch.rows)
            chunk, into = problem.tokens(rows), outputs.tokens(rows)
            if scratch.bits is not None and chunk.excluded is not None:
                excluded.mark(scratch.bits[: chunk.excluded.shape[0]], chunk.excluded, 0)
            lse.launch(scratch, chunk)
            arguments = pair.arguments(scratch, chunk)
            for v in range(0, v_stop, scratch.columns):
                pair.launch(arguments, v)
                _accumulate(scratch, chunk, into.dh_S, v)
            if chunk.group is None:
                finish.launch(into, scratch, chunk)
                continue
            of_all = replace(scratch, sums=_sums_of_all(scratch, chunk)) if v_stop > 0 else scratch
            finish.launch(into, of_all, chunk)
            if into.dh_S is not None:
                # The first kernels of the next chunk do not need the other processes.
                unfinished.append(begin_sum_(into.dh_S, chunk.group))
        for sum_of_all in unfinished:
            sum_of_all.wait()


def _accumulate(scratch: Scratch, chunk: Problem, dh_S: Tensor | None, v: int) -> None:
    """A ← A + s W,  P ← P + p W  over the columns from v on. A may be dh_S, which is 0 at first."""
    R, W = chunk.h_S.shape[0], chunk.W[v : v + scratch.columns]
    s, p = scratch.s_and_p(R)
    A, P = scratch.A_and_P(R, dh_S)
    if scratch.A_P is not None and v == 0:
        scratch.A_P.zero_()
    terms = [(out, g) for out, g in ((A, s), (P, p)) if out is not None and g is not None]
    if scratch.A_P is not None and scratch.s_p is not None and A is not dh_S:
        terms = [(scratch.A_P[: 2 * R], scratch.s_p[: 2 * R])]
    narrow = [(out, g[:, : W.shape[0]]) for out, g in terms]
    project_back(narrow, W, chunk.operand_dtype, scratch.copied_rows)


def _sums_of_all(scratch: Scratch, chunk: Problem) -> Tensor:
    """The sums of a chunk's tokens over all slots of all processes, [2 to 9, 1, R]."""
    assert chunk.group is not None
    R, (fields, _slots, stride) = chunk.h_S.shape[0], scratch.sums.shape
    of_all = scratch.sums.new_empty(fields, 1, stride)
    of_all[:, 0, :R] = summed_(scratch.sums[:, :, :R].sum(1), chunk.group)
    return of_all
