"""rows: rows of logits that exist in memory → ℓ, and their gradient where the logits were.

One program a row, which is too long for registers and for the cache, so that what counts is how
often it is swept over:

    1. read z_S, z_T:  L_S, L_T, the student's top entry (see `lse`)
    2. read z_S, z_T:  ℓ = Σ f, G − c = Σ s                 s = a − c p
    3. read z_S, z_T:  g = s − (G − c) p, written where z_S was

Where G is known after the first sweep (`knows_G`), the second writes g and there is no third. The
gradient at the student's top, or for log p(ŷ) that at ŷ, is given apart, in fp32: as in `finish`,
the entry with the most mass is never rounded.

g may be narrower than z_S: it is then written into the first part of the row, over entries that
were read before. The matrix product that follows reads it there, with no copy made.
"""

import triton
import triton.language as tl

from opsd_kernels.kernels.finish import LOG_P, statistics, top_gradient
from opsd_kernels.kernels.logits_tile import round_to
from opsd_kernels.kernels.lse import (
    STATS_OF_TARGETS,
    absorb,
    combined,
    log_probs,
    normalizers,
    nothing,
)
from opsd_kernels.kernels.pair import SUMS, SUMS_OF_STATISTICS, add_each, entries, zeros
from opsd_kernels.kernels.pointwise import FORWARD_KL, LOG_PROB, MIXED, REVERSE_KL
from opsd_kernels.kernels.records import Stats


# What depends on the batch is no reason to compile again.
@triton.jit(
    do_not_specialize=["stride_statistics"],
    do_not_specialize_on_alignment=["targets", "beta"],
)
def rows_kernel(
    results,
    gradient,
    logits,
    targets,
    beta,
    stride_statistics,
    divergence,
    LIMIT: tl.constexpr,
    NEEDS_SCORE: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (rows).

    Writes:
        results: loss; of statistics what there is of sampled tokens if there are targets.
        gradient: if NEEDS_SCORE.

    Reads:
        logits, divergence: the records.
        targets: [R] int32, the sampled tokens, or None.
        beta: [R] fp32 if MIXED.
        LIMIT: `mean_limit` of β.
        BLOCK, PARTS: see `tiles.Sweep`.
    """
    UNCLIPPED: tl.constexpr = not divergence.CLIPPED
    IS_KL: tl.constexpr = divergence.FAMILY == FORWARD_KL or divergence.FAMILY == REVERSE_KL
    KNOWS_G: tl.constexpr = (UNCLIPPED and IS_KL) or divergence.FAMILY == LOG_PROB
    HAS_STATISTICS: tl.constexpr = results.statistics is not None
    STATISTICS: tl.constexpr = HAS_STATISTICS and divergence.FAMILY != LOG_PROB
    OF_STATISTICS: tl.constexpr = SUMS_OF_STATISTICS - 1 + divergence.CLIPPED
    # Log-probabilities alone need no second sweep.
    SECOND: tl.constexpr = NEEDS_SCORE or divergence.FAMILY != LOG_PROB
    row = tl.program_id(0).to(tl.int64)
    V, inverse_temperature = logits.V, divergence.inverse_temperature
    g_ptr = gradient.g + row * gradient.stride
    z_ptrs = (logits.z_S + row * logits.stride, logits.z_T + row * logits.stride)
    block = tl.arange(0, BLOCK)[None, :]
    one = row + tl.arange(0, 1)
    target = None
    if targets is not None:
        target = tl.load(targets + one)
    of_row, of_entries = divergence.beta, divergence.beta
    if divergence.FAMILY == MIXED:
        of_row = tl.load(beta + one)
        of_entries = of_row[:, None]

    state = seen(z_ptrs, V, target, inverse_temperature, LIMIT, BLOCK, PARTS)
    if targets is not None:
        sampled = log_probs(state, inverse_temperature)
    top = state.index
    if divergence.FAMILY == LOG_PROB:
        top = target
    stats = normalizers(state, of_row, divergence, gradient.SCALE)
    column = column_of(stats)
    sums = zeros(SUMS + STATISTICS * OF_STATISTICS, 1, BLOCK)
    for v in range(0, V if SECOND else 0, BLOCK):
        col = v + block
        z_S, z_T = _load(z_ptrs, col, V)
        terms, _p = entries(z_S, z_T, col == top, column, of_entries, divergence, STATISTICS)
        sums = add_each(sums, terms)
        if NEEDS_SCORE and KNOWS_G:
            _store(g_ptr, terms[1] * gradient.SCALE, col, V)
    loss = tl.sum(sums[0], 1)
    if divergence.FAMILY == LOG_PROB:
        loss = sampled[0]
    tl.store(results.loss + one, loss)
    if STATISTICS:
        totals = ()
        for i in tl.static_range(SUMS, len(sums)):
            totals = totals + (tl.sum(sums[i], 1),)
        found = statistics(totals, loss, stats.p_max, stats.q_max, of_row, divergence)
        for i in tl.static_range(len(found)):
            tl.store(results.statistics + i * stride_statistics + one, found[i])
    if HAS_STATISTICS and targets is not None:
        for i in tl.static_range(STATS_OF_TARGETS):
            to = results.statistics + (LOG_P + i) * stride_statistics + one
            tl.store(to, sampled[i])
    if NEEDS_SCORE:
        others = tl.sum(sums[1], 1)
        g_top = top_gradient(stats.s_top, others, stats.p_max, divergence.FAMILY, KNOWS_G)
        infinite = loss == float("inf")
        tl.store(gradient.top + one, top)
        tl.store(gradient.g_top + one, tl.where(infinite, 0.0, g_top))
        if KNOWS_G:
            _erase(g_ptr, infinite, block, V)
        else:
            missed = (stats.s_top + others)[:, None]  # G − c
            for v in range(0, V, BLOCK):
                col = v + block
                z_S, z_T = _load(z_ptrs, col, V)
                terms, p = entries(z_S, z_T, col == top, column, of_entries, divergence, False)
                g = terms[1] - missed * p
                if divergence.FAMILY == MIXED:
                    g = tl.where(infinite[:, None], 0.0, g)
                _store(g_ptr, g * gradient.SCALE, col, V)


@triton.jit
def seen(
    z_ptrs,
    V,
    target,
    inverse_temperature,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """First sweep: the `State` [1] of a row."""
    state = nothing(1, BLOCK)
    blocks = tl.arange(0, BLOCK * PARTS)[None, :]
    for v in range(0, V, BLOCK * PARTS):
        z_S, z_T = _load(z_ptrs, v + blocks, V)
        state = absorb(z_S, z_T, v, V, target, state, inverse_temperature, LIMIT, True, PARTS)
    return combined(state, 1, inverse_temperature, LIMIT)


@triton.jit
def column_of(stats):
    """`Stats` [1, 1] from those [1] of a row."""
    column = ()
    for i in tl.static_range(len(stats)):
        column = column + (stats[i][:, None],)
    return Stats(*column)


@triton.jit
def _erase(g_ptr, infinite, block, V):
    """g ← 0 if the loss of the row is infinite."""
    if tl.max(infinite.to(tl.int32), 0) > 0:
        tl.debug_barrier()
        for v in range(0, V, block.shape[1]):
            nothing_left = tl.zeros(block.shape, g_ptr.dtype.element_ty)
            tl.store(g_ptr + v + block, nothing_left, mask=v + block < V)


@triton.jit
def _load(z_ptrs, col, V):
    """A block of logits of both sides [1, BLOCK]."""
    z_S_ptr, z_T_ptr = z_ptrs
    z_S = tl.load(z_S_ptr + col, mask=col < V, other=float("-inf"))
    return z_S, tl.load(z_T_ptr + col, mask=col < V, other=float("-inf"))


@triton.jit
def _store(g_ptr, g, col, V):
    # g lies over z_S: what this block holds of it must have been read by every thread.
    tl.debug_barrier()
    tl.store(g_ptr + col, round_to(g, g_ptr.dtype.element_ty), mask=col < V)
