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


# What depends on the batch is no reason to compile again.
@triton.jit(
    do_not_specialize=["stride_statistics"],
    do_not_specialize_on_alignment=["beta", "targets_ptr"],
)
def rows_kernel(
    loss_ptr,
    statistics_ptr,
    g_ptr,
    top_ptr,
    g_top_ptr,
    z_S_ptr,
    z_T_ptr,
    targets_ptr,
    V,
    stride_statistics,
    stride_g,
    stride_z,
    inverse_temperature,
    beta,
    entry_clip,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
    NEEDS_SCORE: tl.constexpr,
    SCALE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Grid (rows).

    Writes:
        loss_ptr: [R] fp32, ℓ or log p(ŷ).
        statistics_ptr: [STATISTICS, R] fp32 at stride stride_statistics, or None; what there is of
            sampled tokens if there are targets.
        g_ptr: [R, V] at stride stride_g, the memory of z_S or its first part, if NEEDS_SCORE; the
            gradient times SCALE, but 0 at the top entry …
        top_ptr, g_top_ptr: [R] int32, fp32: … which is this one, with that gradient.

    Reads:
        z_S_ptr, z_T_ptr: [R, V] fp32 at stride stride_z, before temperature.
        targets_ptr: [R] int32, the sampled tokens, or None.
        beta: β, or a pointer to [R] if MIXED.
        LIMIT: `mean_limit` of β.
        BLOCK, PARTS: see `tiles.Sweep`.
    """
    row = tl.program_id(0).to(tl.int64)
    g_ptr += row * stride_g
    z_S_ptr += row * stride_z
    z_T_ptr += row * stride_z
    block = tl.arange(0, BLOCK)[None, :]
    one = row + tl.arange(0, 1)
    target = None
    if targets_ptr is not None:
        target = tl.load(targets_ptr + one)
    betas = beta
    if FAMILY == MIXED:
        beta = tl.load(beta + one)
        betas = beta[:, None]
    state = nothing(1, BLOCK)
    blocks = tl.arange(0, BLOCK * PARTS)[None, :]
    for v in range(0, V, BLOCK * PARTS):
        z_S, z_T = _load(z_S_ptr, z_T_ptr, v + blocks, V)
        state = absorb(z_S, z_T, v, V, target, state, inverse_temperature, LIMIT, True, PARTS)
    state = combined(state, 1, inverse_temperature, LIMIT)
    if targets_ptr is not None:
        sampled = log_probs(state, inverse_temperature)
    top = state[6]
    if FAMILY == LOG_PROB:
        top = target
    top_S, p_max, top_T, q_max, log_sums, c, plain, s_top = normalizers(
        state, inverse_temperature, beta, entry_clip, FAMILY, CLIPPED, SCALE
    )
    stats = (
        top_S[:, None],
        p_max[:, None],
        top_T[:, None],
        q_max[:, None],
        log_sums[:, None],
        c[:, None],
        plain[:, None],
    )
    UNCLIPPED_KL: tl.constexpr = not CLIPPED and (FAMILY == FORWARD_KL or FAMILY == REVERSE_KL)
    KNOWS_G: tl.constexpr = UNCLIPPED_KL or FAMILY == LOG_PROB
    STATISTICS: tl.constexpr = statistics_ptr is not None and FAMILY != LOG_PROB

    totals = zeros(SUMS + STATISTICS * (SUMS_OF_STATISTICS - 1 + CLIPPED), 1, BLOCK)
    # Log-probabilities alone need no second sweep.
    for v in range(0, V if NEEDS_SCORE or FAMILY != LOG_PROB else 0, BLOCK):
        col = v + block
        z_S, z_T = _load(z_S_ptr, z_T_ptr, col, V)
        is_top = col == top
        terms, p = entries(
            z_S, z_T, is_top, stats, inverse_temperature, betas, entry_clip,
            FAMILY, CLIPPED, STATISTICS,
        )  # fmt: skip
        totals = add_each(totals, terms)
        if NEEDS_SCORE and KNOWS_G:
            _store(g_ptr, terms[1] * SCALE, col, V)
    loss = tl.sum(totals[0], 1)
    if FAMILY == LOG_PROB:
        loss = sampled[0]
    tl.store(loss_ptr + one, loss)
    if STATISTICS:
        sums = ()
        for i in tl.static_range(SUMS, len(totals)):
            sums = sums + (tl.sum(totals[i], 1),)
        told = statistics(sums, loss, p_max, q_max, inverse_temperature, beta, FAMILY)
        for i in tl.static_range(len(told)):
            tl.store(statistics_ptr + i * stride_statistics + one, told[i])
    if statistics_ptr is not None and targets_ptr is not None:
        for i in tl.static_range(STATS_OF_TARGETS):
            tl.store(statistics_ptr + (LOG_P + i) * stride_statistics + one, sampled[i])
    others = tl.sum(totals[1], 1)
    g_top = top_gradient(s_top, others, p_max, FAMILY, KNOWS_G)

    if NEEDS_SCORE:
        infinite = loss == float("inf")
        tl.store(top_ptr + one, top)
        tl.store(g_top_ptr + one, tl.where(infinite, 0.0, g_top))
        if KNOWS_G:
            if tl.max(infinite.to(tl.int32), 0) > 0:
                tl.debug_barrier()
                for v in range(0, V, BLOCK):
                    nothing_left = tl.zeros((1, BLOCK), g_ptr.dtype.element_ty)
                    tl.store(g_ptr + v + block, nothing_left, mask=v + block < V)
        else:
            missed = (s_top + others)[:, None]  # G − c
            for v in range(0, V, BLOCK):
                col = v + block
                z_S, z_T = _load(z_S_ptr, z_T_ptr, col, V)
                is_top = col == top
                terms, p = entries(
                    z_S, z_T, is_top, stats, inverse_temperature, betas, entry_clip,
                    FAMILY, CLIPPED, False,
                )  # fmt: skip
                g = terms[1] - missed * p
                if FAMILY == MIXED:
                    g = tl.where(infinite[:, None], 0.0, g)
                _store(g_ptr, g * SCALE, col, V)


@triton.jit
def _load(z_S_ptr, z_T_ptr, col, V):
    """A block of logits of both sides [1, BLOCK]."""
    z_S = tl.load(z_S_ptr + col, mask=col < V, other=float("-inf"))
    return z_S, tl.load(z_T_ptr + col, mask=col < V, other=float("-inf"))


@triton.jit
def _store(g_ptr, g, col, V):
    # g lies over z_S: what this block holds of it must have been read by every thread.
    tl.debug_barrier()
    tl.store(g_ptr + col, round_to(g, g_ptr.dtype.element_ty), mask=col < V)
