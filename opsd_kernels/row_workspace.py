"""Schedule: a bounded workspace of logit rows. 3 U of matrix products, on any device.

With U = 2 N D V, one pass of N tokens through the LM head, a chunk of R rows at a time:

    1. [z_S; z_T] = [h_S; h_T] Wᵀ    one GEMM into a [2R, V] fp32 workspace              2 U
    2. z_S ← a − G p,  ℓ = Σ_v f     on a GPU one kernel (`rows`), elsewhere PyTorch, in
                                     row blocks small enough for the cache
    3. dh_S = z_S W / T              one GEMM, accumulated in fp32; on a GPU then        1 U
                                     `top_row`, for the entry with the most mass

Of a frozen head the gradient is made during forward, from logits that exist only once. So is that
of a head that is trained, dW += gᵀ h_S, another U, where tokens' weights are known and the budget
holds dW in fp32; otherwise both are made in backward (see `head_gradient`).
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from opsd_kernels import kernels
from opsd_kernels.divergence import WHOLE, Alone, member_rows_
from opsd_kernels.kernels import tiles
from opsd_kernels.problem import Outputs, Problem
from opsd_kernels.products import (
    PART_MULTIPLE,
    copied_bytes,
    multiplied_dtype,
    project,
    project_back,
    project_back_in_parts,
    project_onto_head,
    score_dtype,
    score_scale,
)
from opsd_kernels.vocabulary_parallel import VocabularyShard, smallest, summed_

MIB = 2**20

# [block, V] fp32 temporaries alive at once inside `divergence_rows_`, at most.
# One more with statistics, one beside them for the slope of a softcap, one for two weights.
BLOCK_TEMPORARIES = 8
# Rows of a chunk at most: hidden states are copied a chunk at a time, and V may be small.
MAX_ROWS = 4096
# Rows of W widened at once at least: below, Python's overhead for each shows.
LEAST_TILE = 64
# Entries of a row block on a CPU: 1 MiB of fp32 for each temporary, to stay in the cache.
CPU_BLOCK_ENTRIES = 2**18
GPU_TILE_ROWS = 128
# Of the vocabulary, where step 3 multiplies them at once (see `is_split`).
PARTS = 4


@dataclass(frozen=True)
class Plan:
    """How many rows and columns are in flight, so that all temporaries together fit a budget."""

    rows: int  # of a chunk; the workspace is [2 rows, V] fp32
    block: int  # rows handled at once in step 2
    tile: int  # rows of W copied at once; V where W is used as it stands
    bytes: int  # of all temporaries with a vocabulary-sized dimension together


def default_workspace_mib(device: torch.device) -> int:
    """128 on a CPU, about 100 rows at a time with a Qwen3 vocabulary; 0 on a GPU, where logits need
    no memory; 320, 256 rows, where that is not to be had."""
    if device.type == "cpu":
        return 128
    return 0 if kernels.available(device) else 320


def uses_kernel(device: torch.device) -> bool:
    """Whether there is a kernel for step 2 here."""
    return device.type == "cuda" and kernels.available(device)


def step_2_is_kernel(problem: Problem) -> bool:
    """Whether step 2 is the `rows` kernel. It is not where processes share the vocabulary, and tell
    each other about a row between its sweeps."""
    return problem.group is None and uses_kernel(problem.h_S.device)


def make_plan(
    N: int,
    heads: tuple[Tensor, ...],
    operand_dtype: torch.dtype,
    budget: float,
    block_temporaries: int = BLOCK_TEMPORARIES,
    max_rows: int = MAX_ROWS,
    shared: bool = False,
    sides: int = 2,
) -> Plan:
    """Fit chunk, block and tile to `budget` bytes.

    Args:
        N: number of tokens.
        heads: the LM heads in use, [V, D] each.
        operand_dtype: the dtype whose rounding the operands of the matrix products have.
        budget: bytes for all temporaries with a vocabulary-sized dimension together.
        block_temporaries: [block, V] fp32 temporaries alive at once in step 2, at most.
        max_rows: of a chunk.
        shared: whether processes share the vocabulary: step 2 is then PyTorch's, and of all rows of
            a chunk at once, for few collectives.
        sides: of which there are logits, 2, or 1 without a teacher.

    Raises:
        ValueError: the budget cannot hold one row; the message names the least that works.
    """
    V, device = heads[0].shape[0], heads[0].device
    row_bytes, block_row_bytes, tile_row_bytes, least_tile = _bytes(
        heads, operand_dtype, block_temporaries, shared, sides
    )
    least = row_bytes + block_row_bytes + least_tile * tile_row_bytes
    if budget < least:
        raise ValueError(
            f"workspace_mib={budget / MIB:g} cannot hold one row of V={V} logits; "
            f"the least that works here is workspace_mib={math.ceil(least / MIB * 1e3) / 1e3:g}"
        )
    tile, copies = V, 0
    if tile_row_bytes:
        tile = int(min(budget / 8, budget - row_bytes - block_row_bytes) // tile_row_bytes)
        tile = min(V, max(least_tile, tile))
        if device.type == "cuda" and tile < V:
            tile = tile // LEAST_TILE * LEAST_TILE  # each begins where a GPU reads 16 bytes at once
        copies = tile * tile_row_bytes
    rest = budget - copies
    block = rows = int(rest // (row_bytes + block_row_bytes * shared))
    if block_row_bytes and not shared:
        block = max(1, int(rest / 2 // block_row_bytes))
        if device.type == "cpu":
            block = min(block, max(1, CPU_BLOCK_ENTRIES // V))
        rows = int((rest - block * block_row_bytes) // row_bytes)
    # GEMMs on a GPU work in tiles of this many rows.
    multiple = GPU_TILE_ROWS if device.type == "cuda" and rows >= GPU_TILE_ROWS else 1
    rows = min(rows // multiple * multiple, max_rows)
    chunks = max(1, -(-N // rows))
    rows = max(1, min(rows, -(-N // (chunks * multiple)) * multiple))
    block = rows if shared else min(block, rows)
    return Plan(rows, block, tile, rows * row_bytes + block * block_row_bytes + copies)


def _bytes(
    heads: tuple[Tensor, ...],
    operand_dtype: torch.dtype,
    block_temporaries: int,
    shared: bool,
    sides: int = 2,
) -> tuple[int, int, int, int]:
    """Bytes of a row of the workspace, of a row of a block, and of a copied row of a head; and how
    many of the last there are at least."""
    V, device = row_stride(heads[0].shape[0]), heads[0].device
    g_dtype = multiplied_dtype(device, score_dtype(operand_dtype, bounded=False))
    row_bytes, block_row_bytes = 4 * sides * V, 0
    if shared or not uses_kernel(device):
        # PyTorch's rows need temporaries, and a narrow copy of the gradient for step 3.
        row_bytes += 0 if g_dtype == torch.float32 else g_dtype.itemsize * V
        block_row_bytes = 4 * block_temporaries * V
    tile_row_bytes = max(copied_bytes(W, operand_dtype) for W in heads)
    return row_bytes, block_row_bytes, tile_row_bytes, min(V, LEAST_TILE)


def _temporaries(problem: Problem) -> int:
    return BLOCK_TEMPORARIES + (problem.softcap is not None) + (problem.w_q is not None)


def _plan(
    problem: Problem, N: int, needs_statistics: bool, budget: float, max_rows: int = MAX_ROWS
) -> Plan:
    temporaries = _temporaries(problem) + needs_statistics
    shared, sides = problem.group is not None, problem.sides
    return make_plan(
        N, problem.heads, problem.operand_dtype, budget, temporaries, max_rows, shared, sides
    )


def budget_beside_head(problem: Problem, budget: float) -> float:
    """What is left of a budget beside dW and db in fp32."""
    return budget - 4 * problem.W.numel() - 4 * problem.W.shape[0]


def can_weigh(problem: Problem, budget: float) -> bool:
    """Whether the budget holds dW and db in fp32, and as much as they take for rows of logits.
    (Processes that share a vocabulary do not know that of each other.)"""
    if problem.group is not None:
        return False
    temporaries = _temporaries(problem)
    row, block_row, copied_row, copied_rows = _bytes(
        problem.heads, problem.operand_dtype, temporaries, shared=False
    )
    least = row + block_row + copied_rows * copied_row
    return budget_beside_head(problem, budget) >= max(least, budget / 2)


def allocate(
    problem: Problem, needs_gradient: bool, needs_statistics: bool, budget: float
) -> list[Tensor]:
    """The scratch of `fill`: a workspace of 2R fp32 rows, or R without a teacher, of which the
    first V entries are used; and where step 3 is split, parts of a gradient of R rows."""
    plan = _plan(problem, problem.h_S.shape[0], needs_statistics, budget)
    stride, D = row_stride(problem.W.shape[0]), problem.h_S.shape[1]
    scratch = [problem.h_S.new_empty(problem.sides * plan.rows, stride, dtype=torch.float32)]
    if needs_gradient and is_split(problem, plan.rows):
        scratch.append(problem.h_S.new_empty(PARTS, plan.rows, D, dtype=torch.float32))
    return scratch


def is_split(problem: Problem, rows: int) -> bool:
    """Whether step 3 multiplies parts of the vocabulary at once: few rows are a product of few
    tiles, which leave multiprocessors idle."""
    if not step_2_is_kernel(problem) or copied_bytes(problem.W, problem.operand_dtype) > 0:
        return False
    row = tiles.lookup(problem.h_S.device, problem.operand_dtype)
    return rows <= row.split_rows and problem.W.shape[0] >= PARTS * PART_MULTIPLE


def row_stride(V: int) -> int:
    """Entries from one row of the workspace to the next: every row begins at a multiple of 64
    bytes, without which a GPU reads and multiplies it by fours."""
    return (V + 15) // 16 * 16


def fill(outputs: Outputs, scratch: list[Tensor], problem: Problem, budget: float) -> None:
    """Fill loss, statistics and gradient of every token that is kept.

    Args:
        outputs: see `Outputs`.
        scratch: see `allocate`.
        problem: the tokens.
        budget: bytes for all temporaries with a vocabulary-sized dimension together.
    """
    if outputs.dW is not None:
        budget = budget_beside_head(problem, budget)
    workspace = scratch[0][:, : problem.W.shape[0]]
    rows = _kept(problem.keep)
    N = problem.h_S.shape[0] if rows is None else rows.shape[0]
    max_rows = workspace.shape[0] // problem.sides
    plan = _plan(problem, N, outputs.statistics is not None, budget, max_rows)
    if problem.group is not None:
        # Chunks are the same on all processes: those of the largest shard.
        R = smallest(plan.rows, problem.group, workspace.device)
        plan = replace(plan, rows=R, block=R)
    W, W_T, dtype = problem.W, problem.W_T, problem.operand_dtype
    scale = 1.0
    for n in _chunks(rows, N, plan.rows):
        chunk, into = problem.tokens(n), outputs.tokens(n)
        R = chunk.h_S.shape[0]
        z_S, z_T = workspace[:R], None
        if chunk.h_T is None:
            project(z_S, chunk.h_S, W, dtype, plan.tile)
        else:
            z, z_T = workspace[: 2 * R], workspace[R : 2 * R]
            if W_T is None:
                project(z, torch.cat([chunk.h_S, chunk.h_T]), W, dtype, plan.tile)
            else:
                project(z_S, chunk.h_S, W, dtype, plan.tile)
                project(z_T, chunk.h_T, W_T, dtype, plan.tile)
        gradient = _step_2(z_S, z_T, chunk, plan, into)
        if into.dh_S is not None:
            gradient.onto_hidden_states(into.dh_S, chunk, plan.tile, scratch[1:])
        if outputs.dW is not None:
            gradient.onto_head(outputs, chunk)
        scale = gradient.scale
        if isinstance(n, Tensor):
            outputs.put(n, into)
    if outputs.dh_S is not None and problem.group is not None:
        summed_(outputs.dh_S, problem.group)
    for total in (outputs.dW, outputs.db):
        if total is not None:
            total.div_(problem.temperature * scale)


@dataclass(frozen=True)
class LogitGradient:
    """∂ℓ/∂z_S of R rows, times the slope of a softcap, times `score_scale` of its dtype, and by
    weights where there are any."""

    g: Tensor  # [R, V], to which is to be added, …
    top: Tensor | None = None  # [R] int32, … at the entry with the most mass, …
    g_top: Tensor | None = None  # [R] fp32, … this, not scaled: all its gradient, or with weights
    # what the rounding took; None if nothing is

    def onto_hidden_states(
        self, dh_S: Tensor, chunk: Problem, tile: int, parts: list[Tensor]
    ) -> None:
        """dh_S ← ∂ℓ/∂z_S · W / T [R, D] in fp32; `parts` holds scratch of the product if it is
        split."""
        W, dtype, temperature = chunk.W, chunk.operand_dtype, chunk.temperature
        product = dh_S[None]
        if parts:
            product = parts[0].view(-1)[: PARTS * dh_S.numel()].view(PARTS, *dh_S.shape)
            project_back_in_parts(product, self.g, W, dtype)
        else:
            project_back([(dh_S, self.g)], W, dtype, tile, first=True)
        if self.top is not None and self.g_top is not None:
            launch_top_row(dh_S, product, self, chunk)
        elif temperature != 1:
            dh_S.div_(temperature)

    def onto_head(self, outputs: Outputs, chunk: Problem) -> None:
        """dW ← dW + gᵀ h_S, db ← db + Σ g."""
        h = chunk.h_S
        if chunk.keep is not None:
            h = h.masked_fill(~chunk.keep[:, None], 0)  # what does not count may be NaN
        project_onto_head(outputs.dW, outputs.db, self.g, h, chunk.operand_dtype)

    @property
    def scale(self) -> float:
        return score_scale(self.g.dtype)


def _step_2(
    z_S: Tensor, z_T: Tensor | None, chunk: Problem, plan: Plan, outputs: Outputs
) -> LogitGradient:
    """Fill loss and statistics of rows of products h Wᵀ [R, V], and make the gradient of their
    loss, which lies where z_S was; as far as `outputs` has them."""
    R, needs_score = z_S.shape[0], outputs.needs_score
    if step_2_is_kernel(chunk):
        in_place = needs_score and outputs.stats is None
        return launch_rows(outputs, z_S, z_T, chunk, in_place)
    map_S, map_T = chunk.logit_maps
    vocabulary = WHOLE if chunk.group is None else VocabularyShard(chunk.group)
    for i in range(0, R, plan.block):
        rows = slice(i, i + plan.block)
        block, into = chunk.tokens(rows), outputs.tokens(rows)
        block_S, block_T = z_S[rows], None if z_T is None else z_T[rows]
        slope = map_S.apply_(block_S, needs_score)
        if block_T is not None:
            map_T.apply_(block_T)
        if chunk.temperature != 1:
            for z in (block_S, block_T):
                if z is not None:
                    z.div_(chunk.temperature)
        targets = None if block.targets is None else block.targets.long()
        known = None
        if into.stats is not None and into.top is not None:
            known = into.stats, into.top
        loss = member_rows_(
            block_S,
            block_T,
            block.member,
            block.entry_clip,
            needs_score,
            into.statistics,
            targets,
            block.advantages,
            known,
            vocabulary,
        )
        if slope is not None:
            block_S.mul_(slope)
        if block.weights is not None:
            block_S.mul_(block.weights[:, None])
            block_S.masked_fill_((block.weights == 0)[:, None], 0)
        into.loss.copy_(loss)
    return LogitGradient(z_S)


def launch_rows(
    outputs: Outputs, z_S: Tensor, z_T: Tensor | None, problem: Problem, needs_score: bool
) -> LogitGradient:
    """Step 2 by the kernel: fills what there is in `outputs`, and z_S with the gradient if that is
    needed here."""
    import triton.language as tl

    from opsd_kernels.kernels import rows
    from opsd_kernels.kernels.pointwise import divergence_record, is_wide, mean_limit
    from opsd_kernels.kernels.records import Results, RowGradient, Rows, for_kernels

    map_S, map_T = problem.logit_maps
    statistics, member = outputs.statistics, problem.member
    needs_mean = needs_score or outputs.stats is not None or member is Alone.ENTROPY
    # What is narrower than fp32 lies in the first part of each row.
    g = z_S.view(score_dtype(problem.operand_dtype, problem.has_bounded_scores))
    g = g[:, : z_S.shape[1]]
    top, g_top = z_S.new_empty(z_S.shape[0], dtype=torch.int32), z_S.new_empty(z_S.shape[0])
    row = tiles.lookup(z_S.device, problem.operand_dtype)
    sweep = row.rows_wide if is_wide(member, statistics is not None) else row.rows
    with kernels.current(z_S.device):
        rows.rows_kernel[(z_S.shape[0],)](
            results=Results(outputs.loss, statistics, stats=outputs.stats, top=outputs.top),
            gradient=RowGradient(
                tl.constexpr(needs_score),
                tl.constexpr(mean_limit(member) if needs_mean else 0.0),
                g,
                top,
                g_top,
                g.stride(0),
                SCALE=tl.constexpr(score_scale(g.dtype)),
                weights=problem.weights,
            ),
            logits=Rows(
                z_S, z_T, z_S.shape[1], z_S.stride(0), *for_kernels(map_S)[:2], *for_kernels(map_T)
            ),
            targets=problem.targets,
            beta=member if isinstance(member, Tensor) else None,
            w_q=problem.w_q,
            w_p=problem.w_p,
            advantages=problem.advantages,
            stride_statistics=outputs.stride,
            divergence=divergence_record(member, problem.entry_clip, problem.temperature),
            **asdict(sweep),
        )
    return LogitGradient(g, top, g_top)


def launch_top_row(
    dh_S: Tensor, product: Tensor, gradient: LogitGradient, problem: Problem
) -> None:
    """dh_S ← (product + g_top W_top) / T, of a product [parts, R, D] with a scaled g."""
    import triton.language as tl

    from opsd_kernels.kernels import top_row
    from opsd_kernels.kernels.records import DTYPE_NAMES, Accumulated, Side

    (R, D), W = dh_S.shape, problem.W
    with kernels.current(dh_S.device):
        top_row.top_row_kernel[(R, kernels.cdiv(D, top_row.BLOCK.value))](
            dh_S=dh_S,
            accumulated=Accumulated(product, None, SCALE=tl.constexpr(gradient.scale)),
            W=W,
            student=Side(W.shape[0], D, D, W.stride(0), W.stride(1)),
            top=gradient.top,
            g_top=gradient.g_top,
            stride=product.stride(0),
            inverse_temperature=1 / problem.temperature,
            PARTS=product.shape[0],
            OPERAND=tl.dtype(DTYPE_NAMES[problem.operand_dtype]),
        )


def _kept(keep: Tensor | None) -> Tensor | None:
    """Indices of the tokens to compute; None for all. On a CPU reading the mask costs nothing;
    elsewhere it would stall the queue."""
    if keep is None or keep.device.type != "cpu":
        return None
    return keep.nonzero().squeeze(-1)


def _chunks(rows: Tensor | None, N: int, size: int) -> Iterator[slice | Tensor]:
    if rows is not None:
        yield from (rows[i : i + size] for i in range(0, rows.shape[0], size))
    else:
        yield from (slice(i, min(i + size, N)) for i in range(0, N, size))
