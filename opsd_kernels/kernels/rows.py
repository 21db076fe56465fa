"""rows: ℓ of rows of products u = h Wᵀ in memory, and the gradient in their place.

A program takes one row. A row fits neither registers nor the cache, so the number of sweeps over it
decides the time:

    1. read u_S, u_T:  L_S, L_T, the student's top entry (see `lse`)
    2. read u_S, u_T:  ℓ = Σ f, G − c = Σ s                 s = a − c p
    3. read u_S, u_T:  g = s − (G − c) p, written over u_S

Logits z are u, or what a head makes of u, computed in each sweep (see `head`); where they are
capped, g is multiplied by the slope of the cap.

Where G is known after the first sweep (`KNOWS_G`), the second writes g and there is no third. The
gradient at the student's top entry, or for log p(ŷ) at ŷ, is written apart, in fp32: as in
`finish`, the entry with the most mass is never rounded.

g may be narrower than u_S. It is then written to the first part of the row, over entries that were
read before. The matrix product that follows reads it there, without a copy.
"""

from dataclasses import asdict

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Outputs, Problem
from ..products import score_dtype, score_scale
from . import current, tiles
from .finish import (
    ENTROPY_S,
    LOG_P,
    log_sum,
    policy_gradient,
    statistics,
    top_gradient,
    with_policy,
)
from .head import logits_and_slope
from .logits_tile import round_to
from .lse import S_TOP, C, absorb, combined, log_probs, normalizers, nothing
from .pair import add_each, entries, with_policy_term, zeros
from .pointwise import ENTROPY, LOG_PROB, LOG_SUM, columns_of, formula_of, parameters_of
from .records import (
    STATS,
    STATS_OF_TARGETS,
    SUMS,
    SUMS_OF_STATISTICS,
    PerToken,
    Results,
    RowGradient,
    Rows,
    Stats,
    for_kernels,
)


def launch(
    outputs: Outputs, u_S: Tensor, u_T: Tensor | None, problem: Problem, needs_score: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill loss, statistics, stats and top as far as `outputs` has them, and if `needs_score` u_S
    with the gradient.

    Returns:
        g, top, g_top of `RowGradient`.
    """
    (R, V), member = u_S.shape, problem.member
    map_S, map_T = problem.logit_maps
    needs_statistics = outputs.statistics is not None
    needs_gradient = needs_score or outputs.stats is not None
    g = u_S.view(score_dtype(problem.operand_dtype, problem.has_bounded_scores))[:, :V]
    top, g_top = u_S.new_empty(R, dtype=torch.int32), u_S.new_empty(R)
    row = tiles.lookup(u_S.device, problem.operand_dtype)
    with current(u_S.device):
        rows_kernel[(R,)](
            results=Results(outputs.loss, outputs.statistics, None, outputs.stats, outputs.top),
            gradient=RowGradient(
                tl.constexpr(needs_score),
                tl.constexpr(member.mean_limit(needs_gradient, needs_statistics)),
                g,
                top,
                g_top,
                g.stride(0),
                SCALE=tl.constexpr(score_scale(g.dtype)),
                weights=problem.weights,
            ),
            logits=Rows(u_S, u_T, V, u_S.stride(0), *for_kernels(map_S)[:2], *for_kernels(map_T)),
            targets=problem.targets,
            beta=problem.beta if isinstance(problem.beta, Tensor) else None,
            w_q=problem.w_q,
            w_p=problem.w_p,
            advantages=problem.advantages,
            stride_statistics=outputs.stride,
            formula=formula_of(member, problem.temperature),
            **asdict(row.rows_for(member, needs_statistics)),
        )
    return g, top, g_top


# Numbers that depend on the batch do not cause a recompilation.
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
        results: loss; statistics, those of sampled tokens if there are targets; stats and top.
        gradient: if NEEDED.

    Reads:
        logits, formula: the records.
        targets, beta, w_q, w_p, advantages: see `PerToken`; each may be None. As parameters they
            are not specialized for their alignment, which depends on the chunk.
        BLOCK, PARTS: see `tiles.Sweep`.
    """
    NEEDS_SCORE: tl.constexpr = gradient.NEEDED
    LIMIT: tl.constexpr = gradient.LIMIT
    tokens = PerToken(None, targets, beta, w_q, w_p, advantages)
    KNOWS_G: tl.constexpr = formula.KNOWS_G
    FOR_LATER: tl.constexpr = results.stats is not None
    HAS_STATISTICS: tl.constexpr = results.statistics is not None
    FAMILY: tl.constexpr = formula.FAMILY
    IS_DIVERGENCE: tl.constexpr = FAMILY != LOG_PROB and FAMILY != ENTROPY and FAMILY != LOG_SUM
    STATISTICS: tl.constexpr = HAS_STATISTICS and IS_DIVERGENCE
    OF_STATISTICS: tl.constexpr = SUMS_OF_STATISTICS - 1 + formula.CLIPPED
    # Other values themselves need no second sweep, and a log-sum-exp none for later.
    SECOND: tl.constexpr = NEEDS_SCORE or IS_DIVERGENCE or (FOR_LATER and FAMILY != LOG_SUM)
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

    state = first_sweep(start, logits, target, inverse_temperature, LIMIT, BLOCK, PARTS)
    if targets is not None:
        sampled = log_probs(state, inverse_temperature)
    top = state.index
    if formula.FAMILY == LOG_PROB:
        top = target
    stats = normalizers(state, parameters, advantage, formula, gradient.SCALE)
    column = column_of(stats)
    if NEEDS_SCORE or FOR_LATER:  # before u_S is written over
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
    elif formula.FAMILY == LOG_SUM:
        loss, entropy = log_sum(stats.top_S, stats.p_max, stats.c, inverse_temperature)
        if HAS_STATISTICS:
            tl.store(results.statistics + ENTROPY_S * stride_statistics + one, entropy)
    before_policy = loss
    if advantages is not None:
        loss = with_policy(loss, advantage, sampled[0])
    tl.store(results.loss + one, loss)
    if STATISTICS:
        totals = ()
        for i in tl.static_range(SUMS, len(sums)):
            totals = totals + (tl.sum(sums[i], 1),)
        found = statistics(totals, before_policy, stats.p_max, stats.q_max, parameters, formula)
        for i in tl.static_range(len(found)):
            tl.store(results.statistics + i * stride_statistics + one, found[i])
    if HAS_STATISTICS and targets is not None:
        for i in tl.static_range(STATS_OF_TARGETS):
            to = results.statistics + (LOG_P + i) * stride_statistics + one
            tl.store(to, sampled[i])
    if NEEDS_SCORE or FOR_LATER:
        others = tl.sum(sums[1], 1)
        if advantages is not None:
            g_top, G_minus_c = policy_gradient(
                stats.s_top, others, stats.p_max, advantage, target == top, formula
            )
            g_top *= slope_top
        else:
            g_top = top_gradient(stats.s_top, others, stats.p_max, formula) * slope_top
            G_minus_c = stats.s_top + others
        infinite = tl.abs(loss) == float("inf")
    if FOR_LATER:
        for i in tl.static_range(STATS):
            value = stats[i]
            if i == C and not KNOWS_G:
                value += G_minus_c
            elif i == S_TOP:
                value = g_top
            tl.store(results.stats + i * stride_statistics + one, value)
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
                g = terms[1] - G_minus_c[:, None] * p
                if advantages is not None:
                    g = _policy_term(g, col, top, policy)
                if formula.FORWARD or formula.REVERSE or advantages is not None:
                    g = tl.where(infinite[:, None], 0.0, g)
                _store(g_ptr, _weighed(g * slope, factor, gradient.weights), col, V)
        if gradient.weights is not None:
            rounded = round_to(_weighed(g_top, weight * gradient.SCALE, gradient.weights), DTYPE)
            g_top = _weighed(g_top, weight, gradient.weights)
            g_top -= rounded.to(tl.float32) * (1 / gradient.SCALE)
            tl.debug_barrier()  # other threads have written 0 there
            tl.store(g_ptr + top, rounded)
            tl.store(gradient.g_top + one, g_top)


@triton.jit
def _policy_term(g, col, top, policy):
    """`with_policy_term`, except at the top entry, which is 0 here."""
    return tl.where(col == top[:, None], g, with_policy_term(g, col, policy))


@triton.jit
def _weighed(g, factor, weights):
    """g · factor, and 0 where the weight in the factor is 0, even if g is NaN."""
    product = g * factor
    if weights is not None:
        product = tl.where(factor == 0, 0.0, product)
    return product


@triton.jit
def first_sweep(
    start,
    logits,
    target,
    inverse_temperature,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The `State` [1] of a row."""
    state, V = nothing(1, BLOCK), logits.V
    blocks = tl.arange(0, BLOCK * PARTS)[None, :]
    for v in range(0, V, BLOCK * PARTS):
        z_S, z_T, _slope = _load(start, logits, v + blocks)
        # These are logits already.
        maps = (None, None, None, None, None, None)
        state = absorb(z_S, z_T, v, V, maps, target, state, inverse_temperature, LIMIT, True, PARTS)
    return combined(state, 1, inverse_temperature, LIMIT)


@triton.jit
def column_of(stats):
    """The `Stats` [1] of a row as [1, 1]."""
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
    """Logits of both sides at the columns `col` of the row that begins at `start`, −∞ beyond the
    last, and the slope of the student's cap."""
    V = logits.V
    u_S = tl.load(logits.u_S + start + col, mask=col < V, other=float("-inf"))
    if logits.u_T is not None:
        u_T = tl.load(logits.u_T + start + col, mask=col < V, other=float("-inf"))
    else:
        u_T = tl.zeros(u_S.shape, tl.float32)  # any number: it is not used
    z_S, slope = logits_and_slope(u_S, col, V, logits.bias, logits.softcap, None)
    z_T, _ = logits_and_slope(u_T, col, V, logits.bias_T, logits.softcap_T, logits.scale_T)
    return z_S, z_T, slope


@triton.jit
def _store(g_ptr, g, col, V):
    # g overwrites u_S: every thread must have read this block before.
    tl.debug_barrier()
    tl.store(g_ptr + col, round_to(g, g_ptr.dtype.element_ty), mask=col < V)
