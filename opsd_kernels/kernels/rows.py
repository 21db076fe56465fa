"""rows: rows of logits that exist in memory → ℓ, and their gradient where the logits were.

One program a row, which is too long for registers and for the cache, so that what counts is how
often it is swept over:

    1. read z_S, z_T:  L_S, L_T, the student's top entry (see `lse`)
    2. read z_S, z_T:  ℓ = Σ f, G − c = Σ s                 s = a − c p
    3. read z_S, z_T:  g = s − (G − c) p, written where z_S was

Where G is known after the first sweep (`knows_G`), the second writes g and there is no third. The
entry at the student's top is left to the end, as in `finish`.

g may be narrower than z_S: it is then written into the first part of the row, over entries that
were read before. The matrix product that follows reads it there, with no copy made.
"""

import triton
import triton.language as tl

from opsd_kernels.kernels.finish import top_gradient
from opsd_kernels.kernels.logits_tile import round_to
from opsd_kernels.kernels.lse import absorb, nothing, statistics
from opsd_kernels.kernels.pair import entries
from opsd_kernels.kernels.pointwise import FORWARD_KL, REVERSE_KL


@triton.jit
def rows_kernel(
    loss_ptr,
    g_ptr,
    z_S_ptr,
    z_T_ptr,
    V,
    stride_g,
    stride_z,
    inverse_temperature,
    beta,
    entry_clip,
    FAMILY: tl.constexpr,
    CLIPPED: tl.constexpr,
    NEEDS_SCORE: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rows).

    Writes:
        loss_ptr: [R] fp32.
        g_ptr: [R, V] at stride stride_g, the memory of z_S or its first part, if NEEDS_SCORE.

    Reads:
        z_S_ptr, z_T_ptr: [R, V] fp32 at stride stride_z, before temperature.
        LIMIT: `mean_limit` of β.
    """
    row = tl.program_id(0).to(tl.int64)
    g_ptr += row * stride_g
    z_S_ptr += row * stride_z
    z_T_ptr += row * stride_z
    block = tl.arange(0, BLOCK)
    state = nothing(1)
    for v in range(0, V, BLOCK):
        z_S, z_T = _load(z_S_ptr, z_T_ptr, v + block, V, inverse_temperature)
        state = absorb(z_S, z_T, v + block, V, state, LIMIT)
    top_S, sum_S, top_T, sum_T, d_top, E, top = state
    top_S, p_max, top_T, q_max, log_sums, c, plain, s_top = statistics(
        top_S, sum_S, top_T, sum_T, d_top, E, beta, entry_clip, FAMILY, CLIPPED
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
    KNOWS_G: tl.constexpr = not CLIPPED and (FAMILY == FORWARD_KL or FAMILY == REVERSE_KL)

    total_f = tl.zeros((1, BLOCK), tl.float32)
    total_s = tl.zeros((1, BLOCK), tl.float32)
    for v in range(0, V, BLOCK):
        col = v + block
        z_S, z_T = _load(z_S_ptr, z_T_ptr, col, V, inverse_temperature)
        f, s, p = entries(z_S, z_T, (col == top)[None, :], stats, beta, entry_clip, FAMILY, CLIPPED)
        total_f += f
        total_s += s
        if NEEDS_SCORE and KNOWS_G:
            _store(g_ptr, s, col, V)
    loss = tl.sum(total_f, 1)
    tl.store(loss_ptr + row + tl.arange(0, 1), loss)
    others = tl.sum(total_s, 1)
    g_top = top_gradient(s_top, others, p_max, KNOWS_G)

    if NEEDS_SCORE and KNOWS_G:
        tl.debug_barrier()
        tl.store(g_ptr + top, round_to(g_top, g_ptr.dtype.element_ty))
        if tl.max(loss, 0) == float("inf"):
            tl.debug_barrier()
            for v in range(0, V, BLOCK):
                tl.store(
                    g_ptr + v + block,
                    tl.zeros((BLOCK,), g_ptr.dtype.element_ty),
                    mask=v + block < V,
                )
    elif NEEDS_SCORE:
        missed = (s_top + others)[:, None]  # G − c
        for v in range(0, V, BLOCK):
            col = v + block
            z_S, z_T = _load(z_S_ptr, z_T_ptr, col, V, inverse_temperature)
            is_top = (col == top)[None, :]
            f, s, p = entries(z_S, z_T, is_top, stats, beta, entry_clip, FAMILY, CLIPPED)
            _store(g_ptr, tl.where(is_top, g_top[:, None], s - missed * p), col, V)


@triton.jit
def _load(z_S_ptr, z_T_ptr, col, V, inverse_temperature):
    # Selected after the product, so that no compiler fuses it with the subtraction to come: equal
    # logits must stay equal, and the same in every sweep.
    z_S = tl.load(z_S_ptr + col, mask=col < V, other=0.0) * inverse_temperature
    z_T = tl.load(z_T_ptr + col, mask=col < V, other=0.0) * inverse_temperature
    z_S, z_T = tl.where(col < V, z_S, float("-inf")), tl.where(col < V, z_T, float("-inf"))
    return z_S[None, :], z_T[None, :]


@triton.jit
def _store(g_ptr, g, col, V):
    # g lies over z_S: what this block holds of it must have been read by every thread.
    tl.debug_barrier()
    tl.store(g_ptr + col[None, :], round_to(g, g_ptr.dtype.element_ty), mask=(col < V)[None, :])
