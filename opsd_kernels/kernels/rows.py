"""rows: rows of products u = h Wᵀ that exist in memory → ℓ, and the gradient in their place.

One program a row, which is too long for registers and for the cache, so that what counts is how
often it is swept over:

    1. read u_S, u_T:  L_S, L_T, the student's top entry (see `lse`)
    2. read u_S, u_T:  ℓ = Σ f, G − c = Σ s                 s = a − c p
    3. read u_S, u_T:  g = s − (G − c) p, written where u_S was

Logits z are u, or what a head makes of it, each time anew (see `head`); where they are capped, g is
multiplied by the slope of the cap.

Where G is known after the first sweep (`knows_G`), the second writes g and there is no third. The
gradient at the student's top, or for log p(ŷ) that at ŷ, is given apart, in fp32: as in `finish`,
the entry with the most mass is never rounded.

g may be narrower than u_S: it is then written into the first part of the row, over entries that
were read before. The matrix product that follows reads it there, with no copy made.
"""

import triton
import triton.language as tl

from opsd_kernels.kernels.finish import (
    LOG_P,
    policy_gradient,
    statistics,
    top_gradient,
    with_policy,
)
from opsd_kernels.kernels.head import logits_and_slope
from opsd_kernels.kernels.logits_tile import round_to
from opsd_kernels.kernels.lse import (
    S_TOP,
    STATS,
    STATS_OF_TARGETS,
    C,
    absorb,
    combined,
    log_probs,
    normalizers,
    nothing,
)
from opsd_kernels.kernels.pair import (
    SUMS,
    SUMS_OF_STATISTICS,
    add_each,
    entries,
    with_policy_term,
    zeros,
)
from opsd_kernels.kernels.pointwise import ENTROPY, LOG_PROB, columns_of, parameters_of
from opsd_kernels.kernels.records import Stats, Tokens


# What depends on the batch is no reason to compile again.
@triton.jit(
    do_not_specialize=["stride_statistics"],
    do_not_specialize_on_alignment=["targets", "beta", "w_q", "w_p", "advantages"],
)
def rows_kernel(
    results,
    gradient,
    logits,
    targets,
    beta,
    w_q,
    w_p,
    advantages,
    stride_statistics,
    formula,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (rows).

    Writes:
        results: loss; of statistics what there is of sampled tokens if there are targets; stats
            and top.
        gradient: if NEEDED.

    Reads:
        logits, formula: the records.
        targets, beta, w_q, w_p, advantages: as in `Tokens`, or None.
        BLOCK, PARTS: see `tiles.Sweep`.
    """
    NEEDS_SCORE: tl.constexpr = gradient.NEEDED
    LIMIT: tl.constexpr = gradient.LIMIT
    tokens = Tokens(None, targets, beta, None, None, w_q, w_p, advantages)
    KNOWS_G: tl.constexpr = formula.KNOWS_G
    FOR_LATER: tl.constexpr = results.stats is not None
    HAS_STATISTICS: tl.constexpr = results.statistics is not None
    STATISTICS: tl.constexpr = HAS_STATISTICS and formula.FAMILY != LOG_PROB
    OF_STATISTICS: tl.constexpr = SUMS_OF_STATISTICS - 1 + formula.CLIPPED
    # Log-probabilities alone need no second sweep.
    IS_DIVERGENCE: tl.constexpr = formula.FAMILY != LOG_PROB and formula.FAMILY != ENTROPY
    SECOND: tl.constexpr = NEEDS_SCORE or FOR_LATER or IS_DIVERGENCE
    row = tl.program_id(0).to(tl.int64)
    V, inverse_temperature = logits.V, formula.inverse_temperature
    g_ptr = gradient.g + row * gradient.stride
    DTYPE: tl.constexpr = gradient.g.dtype.element_ty
    start = row * logits.stride
    block = tl.arange(0, BLOCK)[None, :]
    one = row + tl.arange(0, 1)
    target = None
    if targets is not None:
        target = tl.load(targets + one)
    parameters = parameters_of(tokens, one, None, formula)
    of_entries = columns_of(parameters)
    advantage = None
    if advantages is not None and target is not None:
        advantage = tl.load(advantages + one)
        policy = advantage[:, None], target[:, None]

    state = seen(start, logits, target, inverse_temperature, LIMIT, BLOCK, PARTS)
    if targets is not None:
        sampled = log_probs(state, inverse_temperature)
    top = state.index
    if formula.FAMILY == LOG_PROB:
        top = target
    stats = normalizers(state, parameters, advantage, formula, gradient.SCALE)
    column = column_of(stats)
    if NEEDS_SCORE or FOR_LATER:  # before it is written over
        _z, _z_T, slope_top = _load(start, logits, top)
    factor = gradient.SCALE
    if gradient.weights is not None:
        weight = tl.load(gradient.weights + one)
        factor = weight[:, None] * gradient.SCALE
    sums = zeros(SUMS + STATISTICS * OF_STATISTICS, 1, BLOCK)
    for v in range(0, V if SECOND else 0, BLOCK):
        col = v + block
        z_S, z_T, slope = _load(start, logits, col)
        terms, _p = entries(z_S, z_T, col == top, column, of_entries, formula, STATISTICS)
        sums = add_each(sums, terms)
        if NEEDS_SCORE and KNOWS_G:
            g = terms[1]
            if advantages is not None:
                g = _policy_term(g, col, top, policy)
            _store(g_ptr, _weighed(g * slope, factor, gradient.weights), col, V)
    loss = tl.sum(sums[0], 1)
    if formula.FAMILY == LOG_PROB:
        loss = sampled[0]
    elif formula.FAMILY == ENTROPY:
        loss = stats.c - tl.log(stats.p_max)
    whole = loss  # what a clip takes of
    if advantages is not None:
        loss = with_policy(loss, advantage, sampled[0])
    tl.store(results.loss + one, loss)
    if STATISTICS:
        totals = ()
        for i in tl.static_range(SUMS, len(sums)):
            totals = totals + (tl.sum(sums[i], 1),)
        found = statistics(totals, whole, stats.p_max, stats.q_max, parameters, formula)
        for i in tl.static_range(len(found)):
            tl.store(results.statistics + i * stride_statistics + one, found[i])
    if HAS_STATISTICS and targets is not None:
        for i in tl.static_range(STATS_OF_TARGETS):
            to = results.statistics + (LOG_P + i) * stride_statistics + one
            tl.store(to, sampled[i])
    if NEEDS_SCORE or FOR_LATER:
        others = tl.sum(sums[1], 1)
        if advantages is not None:
            g_top, missed = policy_gradient(
                stats.s_top, others, stats.p_max, advantage, target == top, formula
            )
            g_top *= slope_top
        else:
            g_top = top_gradient(stats.s_top, others, stats.p_max, formula) * slope_top
            missed = stats.s_top + others  # G − c
        infinite = tl.abs(loss) == float("inf")
    if FOR_LATER:
        for i in tl.static_range(STATS):
            known = stats[i]
            if i == C and not KNOWS_G:
                known += missed
            elif i == S_TOP:
                known = g_top
            tl.store(results.stats + i * stride_statistics + one, known)
        tl.store(results.top + one, top)
    if NEEDS_SCORE:
        g_top = tl.where(infinite, 0.0, g_top)
        tl.store(gradient.top + one, top)
        tl.store(gradient.g_top + one, g_top)
        if KNOWS_G:
            _erase(g_ptr, infinite, block, V)
        else:
            for v in range(0, V, BLOCK):
                col = v + block
                z_S, z_T, slope = _load(start, logits, col)
                terms, p = entries(z_S, z_T, col == top, column, of_entries, formula, False)
                g = terms[1] - missed[:, None] * p
                if advantages is not None:
                    g = _policy_term(g, col, top, policy)
                if formula.FORWARD or formula.REVERSE or advantages is not None:
                    g = tl.where(infinite[:, None], 0.0, g)
                _store(g_ptr, _weighed(g * slope, factor, gradient.weights), col, V)
        if gradient.weights is not None:
            rounded = round_to(_weighed(g_top, weight * gradient.SCALE, gradient.weights), DTYPE)
            g_top = _weighed(g_top, weight, gradient.weights)
            g_top -= rounded.to(tl.float32) * (1 / gradient.SCALE)
            tl.debug_barrier()  # others have written 0 there
            tl.store(g_ptr + top, rounded)
            tl.store(gradient.g_top + one, g_top)


@triton.jit
def _policy_term(g, col, top, policy):
    """`with_policy_term`, but for the top entry, which is 0 here."""
    return tl.where(col == top[:, None], g, with_policy_term(g, col, policy))


@triton.jit
def _weighed(g, factor, weights):
    """g · factor, 0 where a weight in the factor is 0, whatever g holds."""
    product = g * factor
    if weights is not None:
        product = tl.where(factor == 0, 0.0, product)
    return product


@triton.jit
def seen(
    start,
    logits,
    target,
    inverse_temperature,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """First sweep: the `State` [1] of a row."""
    state, V = nothing(1, BLOCK), logits.V
    blocks = tl.arange(0, BLOCK * PARTS)[None, :]
    for v in range(0, V, BLOCK * PARTS):
        z_S, z_T, _slope = _load(start, logits, v + blocks)
        # They are logits already.
        maps = (None, None, None, None, None, None)
        state = absorb(z_S, z_T, v, V, maps, target, state, inverse_temperature, LIMIT, True, PARTS)
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
def _load(start, logits, col):
    """A block of logits of both sides, −∞ beyond the last, and the slope of the student's, of a row
    that begins at `start`; of the shape of `col`."""
    V = logits.V
    u_S = tl.load(logits.u_S + start + col, mask=col < V, other=float("-inf"))
    if logits.u_T is not None:
        u_T = tl.load(logits.u_T + start + col, mask=col < V, other=float("-inf"))
    else:
        u_T = tl.zeros(u_S.shape, tl.float32)  # any number: nothing is made of it
    z_S, slope = logits_and_slope(u_S, col, V, logits.bias, logits.softcap, None)
    z_T, _ = logits_and_slope(u_T, col, V, logits.bias_T, logits.softcap_T, logits.scale_T)
    return z_S, z_T, slope


@triton.jit
def _store(g_ptr, g, col, V):
    # g lies over u_S: what this block holds of it must have been read by every thread.
    tl.debug_barrier()
    tl.store(g_ptr + col, round_to(g, g_ptr.dtype.element_ty), mask=col < V)
