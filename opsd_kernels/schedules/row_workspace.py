"""Schedule: a bounded workspace of logit rows. 3 U of matrix products, on any device.

With U = 2 N D V, one pass of N tokens through the LM head, a chunk of R rows at a time:

    1. [z_S; z_T] = [h_S; h_T] Wᵀ    one GEMM into a [2R, V] fp32 workspace              2 U
    2. z_S ← a − G p,  ℓ = Σ_v f     on a GPU one kernel (`rows`), elsewhere PyTorch, in
                                     row blocks small enough for the cache
    3. dh_S = z_S W / T              one GEMM, accumulated in fp32; on a GPU then        1 U
                                     `top_row`, for the entry with the most mass

With a frozen head, dh_S is made in forward, while the logits exist. With a trained head, dh_S and
dW += gᵀ h_S, another U, are made in forward if the weights of the tokens are known and the budget
holds dW in fp32; otherwise both are made in backward (see `head_gradient`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..divergence import ENTROPY_S, Family
from ..heads.vocabulary_parallel import smallest, summed_
from ..problem import Outputs, Problem
from ..products import (
    project,
    project_back,
    project_back_in_parts,
    project_onto_head,
    score_scale,
)
from . import planning
from .excluded import exclude_, log_sum_rows_
from .planning import PARTS, Plan, budget_beside_head, is_split, make_plan, row_stride
from .rows import divergence_rows_, logits_, weigh_


def allocate(problem: Problem, plan: Plan, needs_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """A workspace [2R, V] fp32, or [R, V] without a teacher; and if step 3 is split, the parts of a
    gradient of R rows."""
    (V, _), D = problem.W.shape, problem.h_S.shape[1]
    new_empty, fp32 = problem.h_S.new_empty, torch.float32
    workspace = new_empty(problem.sides * plan.rows, row_stride(V), dtype=fp32)[:, :V]
    if not needs_gradient or not is_split(problem, plan.rows):
        return workspace, None
    return workspace, new_empty(PARTS, plan.rows, D, dtype=fp32)


def fill(outputs: Outputs, problem: Problem, budget: float) -> None:
    """Fill the outputs of every token that is kept. The budget is that of all temporaries with a
    vocabulary-sized dimension together, in bytes."""
    if outputs.dW is not None:
        budget = budget_beside_head(problem, budget)
    rows = kept(problem.keep)
    N = problem.h_S.shape[0] if rows is None else rows.shape[0]
    plan = make_plan(problem, N, budget, outputs.statistics is not None)
    if problem.group is not None:
        # All processes have the chunks of the largest shard.
        R = smallest(plan.rows, problem.group, problem.h_S.device)
        plan = replace(plan, rows=R, block=R)
    workspace, parts = allocate(problem, plan, outputs.dh_S is not None)
    scale = 1.0
    for n in chunks(rows, N, plan.rows):
        chunk, into = problem.tokens(n), outputs.tokens(n)
        z_S, z_T = _project(workspace, chunk, plan.tile)
        gradient = _step_2(z_S, z_T, chunk, plan.block, into)
        if into.dh_S is not None:
            gradient.onto_hidden_states(into.dh_S, chunk, plan.tile, parts)
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


def _project(workspace: Tensor, chunk: Problem, tile: int) -> tuple[Tensor, Tensor | None]:
    """Products h Wᵀ of the student and, if there is one, the teacher, [R, V] each."""
    R, W, dtype = chunk.h_S.shape[0], chunk.W, chunk.operand_dtype
    z_S, z_T = workspace[:R], workspace[R : 2 * R]
    if chunk.h_T is None:
        project(z_S, chunk.h_S, W, dtype, tile)
        return z_S, None
    if chunk.W_T is None:
        project(workspace[: 2 * R], torch.cat([chunk.h_S, chunk.h_T]), W, dtype, tile)
    else:
        project(z_S, chunk.h_S, W, dtype, tile)
        project(z_T, chunk.h_T, chunk.W_T, dtype, tile)
    return z_S, z_T


@dataclass(frozen=True)
class LogitGradient:
    """∂ℓ/∂z_S of R rows, times the slope of a softcap and the weights of tokens, if there are any.
    It is g over `score_scale` of its dtype, plus g_top at the entry `top` of each row."""

    g: Tensor  # [R, V]
    top: Tensor | None = None  # [R] int32, the entry with the most mass
    # [R] fp32: the whole gradient of that entry, or with weights the part that the rounding of g
    # took. None if there is nothing to add.
    g_top: Tensor | None = None

    def onto_hidden_states(
        self, dh_S: Tensor, chunk: Problem, tile: int, parts: Tensor | None
    ) -> None:
        """dh_S ← gradient · W / T [R, D] in fp32; `parts` is scratch of a product that is
        split."""
        W, dtype, temperature = chunk.W, chunk.operand_dtype, chunk.temperature
        product = dh_S[None]
        if parts is not None:
            product = parts.view(-1)[: PARTS * dh_S.numel()].view(PARTS, *dh_S.shape)
            project_back_in_parts(product, self.g, W, dtype)
        else:
            project_back([(dh_S, self.g)], W, dtype, tile, first=True)
        if self.top is not None and self.g_top is not None:
            from ..kernels import top_row  # needs Triton

            top_row.launch(dh_S, product, self.top, self.g_top, self.scale, chunk)
        elif temperature != 1:
            dh_S.div_(temperature)

    def onto_head(self, outputs: Outputs, chunk: Problem) -> None:
        """dW ← dW + gᵀ h_S, db ← db + Σ g."""
        h = chunk.h_S
        if chunk.keep is not None:
            h = h.masked_fill(~chunk.keep[:, None], 0)  # dropped tokens may hold NaN
        project_onto_head(outputs.dW, outputs.db, self.g, h, chunk.operand_dtype)

    @property
    def scale(self) -> float:
        return score_scale(self.g.dtype)


def _step_2(
    z_S: Tensor, z_T: Tensor | None, chunk: Problem, rows_at_once: int, outputs: Outputs
) -> LogitGradient:
    """Fill loss and statistics, as far as `outputs` has them, from rows of products h Wᵀ [R, V].
    The gradient of the loss, if it is needed, takes the memory of z_S."""
    R, needs_score = z_S.shape[0], outputs.needs_score
    if chunk.excluded is not None:
        exclude_(z_S, chunk.excluded)
    if planning.uses_rows_kernel(chunk):
        in_place = needs_score and outputs.stats is None
        return launch_rows(outputs, z_S, z_T, chunk, in_place)
    for i in range(0, R, rows_at_once):
        rows = slice(i, i + rows_at_once)
        block, into = chunk.tokens(rows), outputs.tokens(rows)
        block_S, block_T = z_S[rows], None if z_T is None else z_T[rows]
        slope = logits_(block_S, block_T, block, needs_score)
        seen = None
        if into.stats is not None and into.top is not None:
            seen = into.stats, into.top
        if block.member.family == Family.LOG_SUM:
            entropy = None if into.statistics is None else into.statistics[ENTROPY_S]
            loss = log_sum_rows_(block_S, needs_score, entropy, seen, block.group)
        else:
            loss = divergence_rows_(
                block_S,
                block_T,
                block.member,
                needs_score,
                into.statistics,
                block.targets,
                block.advantages,
                seen,
                block.group,
            )
        weigh_(block_S, slope, block.weights)
        into.loss.copy_(loss)
    return LogitGradient(z_S)


def launch_rows(
    outputs: Outputs, z_S: Tensor, z_T: Tensor | None, problem: Problem, needs_score: bool
) -> LogitGradient:
    """Step 2 by the kernel."""
    from ..kernels import rows  # needs Triton

    return LogitGradient(*rows.launch(outputs, z_S, z_T, problem, needs_score))


def kept(keep: Tensor | None) -> Tensor | None:
    """Indices of the tokens to compute; None for all. Reading the mask costs nothing on a CPU, and
    elsewhere would make the host wait."""
    if keep is None or keep.device.type != "cpu":
        return None
    return keep.nonzero().squeeze(-1)


def chunks(rows: Tensor | None, N: int, size: int) -> Iterator[slice | Tensor]:
    """The rows, or N tokens, `size` at a time."""
    if rows is not None:
        yield from (rows[i : i + size] for i in range(0, rows.shape[0], size))
    else:
        yield from (slice(i, min(i + size, N)) for i in range(0, N, size))
