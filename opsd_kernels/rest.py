"""Logits of K given entries of each token, and the log-sum-exp of all others: the rest.

    z_k = z at id_k              L_r = log Σ_{v∉S} exp z_v,    S the ids of the token

A loss on K entries needs nothing else of the vocabulary: the softmax of [z_1 … z_K, L_r] is
exactly (p_1 … p_K, p_r). With the upstream gradients c_k of z_k and c_r of L_r, and the slope s of
a softcap,

    dh = (Σ_k c_k s_k W[id_k] + c_r B) / T        B = Σ_{v∉S} p̃_v s_v W_v

where p̃ is the softmax of the logits outside S alone. B has the size of a row of W, however little
mass the rest has. B does not depend on c_r, so forward makes it if h needs a gradient. Backward
adds K rows of W to c_r B in fp32 and rounds once. The gradient of a trained head takes another pass
over the vocabulary, in backward (`head_gradient`). In its tiles the entries of S hold c_k s_k.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .autograd import (
    filled,
    is_trained,
    padded,
    refuse_second_derivative,
    restored,
    save,
    trained_gradients,
    zeros,
)
from .checks import Arguments
from .divergence import ENTROPY_S
from .gathered import add_rows_, gradient_of_rows_, products_at
from .heads.head import LogitMap
from .heads.vocabulary_parallel import local_ids, summed_
from .problem import STATS, Problem
from .schedules.choice import is_opaque
from .schedules.excluded import sums_of_equal

# Tokens whose gradients are in fp32 at once.
TOKENS_AT_A_TIME = 1024


def logits_and_rest(
    arguments: Arguments,
    ids: Tensor,
    needs_rest: bool,
    needs_entropy: bool,
    workspace_bytes: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits at K ids of each token, and the log-sum-exp of the rest.

    Args:
        arguments: of the call. Results of tokens that do not count are undefined, and their
            gradients 0.
        ids: [N, K] int32, in any order; they may repeat. Ids outside the vocabulary are absent.
        needs_rest: whether L_r is wanted. Without it only K rows of W are read for each token.
        needs_entropy: whether the entropy of p̃ is wanted too.
        workspace_bytes: see `divergence_of_tokens`.

    Returns:
        z [N, K] fp32 after temperature, −∞ where the id is absent or banned; L_r [N] fp32, −∞ where
        nothing is left; and the entropy of p̃ [N], without gradient. z and L_r are differentiable
        with respect to h_S, weight and bias.
    """
    problem, h_S, weight, bias = arguments[:4]
    V = problem.W.shape[0]
    if problem.offset is not None:
        ids = local_ids(ids, problem.offset, V)
    absent = (ids < 0) | (ids >= V)
    if problem.keep is not None:
        absent = absent | ~problem.keep[:, None]
    ids = ids.masked_fill(absent, -1)
    trained = is_trained(arguments)
    needs_gradient = torch.is_grad_enabled() and (h_S.requires_grad or trained)
    options = (needs_gradient, trained, needs_rest, needs_entropy, workspace_bytes)
    z, *rest = _LogitsAndRest.apply(h_S, weight, bias, problem, ids, *options)
    L_r, entropy = [*rest, None, None][:2]
    return z, L_r, entropy


class _LogitsAndRest(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_S: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        ids: Tensor,
        needs_gradient: bool,
        trained: bool,
        needs_rest: bool,
        needs_entropy: bool,
        workspace_bytes: float,
    ) -> tuple[Tensor, ...]:
        z, slope = _logits_at(problem, ids)
        results, made = [z], {"ids": ids, "slope": slope, "gone": z == -torch.inf}
        if needs_rest:
            N = h_S.shape[0]
            problem = replace(problem, targets=None, excluded=ids)
            for_backward: dict[str, Tensor] = {}
            if needs_gradient and trained:
                top = h_S.new_zeros(N, dtype=torch.int32)
                for_backward = {"stats": zeros(problem, STATS, N), "top": top}
            elif needs_gradient:
                for_backward = {"dh_S": zeros(problem, *h_S.shape)}
            outputs = filled(problem, needs_entropy, workspace_bytes, **for_backward)
            problem = replace(problem, stats=outputs.stats, top=outputs.top)
            results.append(outputs.loss)
            made |= {"B": outputs.dh_S, "nothing": outputs.loss == -torch.inf}
            if outputs.statistics is not None:
                results.append(outputs.statistics[ENTROPY_S])
                ctx.mark_non_differentiable(results[-1])
        if needs_gradient:
            if trained:
                made |= {"weight": weight, "head_bias": bias}
            else:  # forward has made B, and backward does not read h_S
                problem = replace(problem, h_S=h_S.new_empty(0))
            save(ctx, problem, **made)
            ctx.trained, ctx.workspace_bytes, ctx.dtype = trained, workspace_bytes, h_S.dtype
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        problem, kept = restored(ctx)
        ids, slope = kept["ids"], kept["slope"]
        # Masked, not multiplied by 0: the gradient of an absent slot may be NaN.
        c = grad_z.masked_fill(kept["gone"], 0)
        if slope is not None:
            c = c * slope
        c_r = None
        if grads:
            c_r = grads[0].masked_fill(kept["nothing"], 0)
            if problem.keep is not None:
                c_r = c_r.masked_fill(~problem.keep, 0)
        nothing_else = (None,) * 7
        if not ctx.trained:
            dh = _gradient_of_h(problem, ids, c, c_r, kept.get("B"), ctx.dtype)
            return dh, None, None, *nothing_else
        heads, needs = (kept["weight"], kept["head_bias"]), ctx.needs_input_grad
        if c_r is None:
            made = _gradients_of_rows(problem, ids, c, *heads, needs)
        else:
            problem = replace(problem, weights=c_r, g_excluded=sums_of_equal(c, ids))
            dropped = (c_r == 0) & (c == 0).all(1)
            made = trained_gradients(problem, dropped, *heads, needs, ctx.workspace_bytes)
        return *made, *nothing_else


def _logits_at(problem: Problem, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """z [N, K] of all processes, and the slope of a softcap at this process's ids."""
    make = ops.logits_at if is_opaque(ids) else _logits_at_ids
    made = make(
        problem.h_S, problem.W, ids, problem.bias, problem.softcap, problem.temperature,
        problem.operand_dtype, problem.group,
    )  # fmt: skip
    return made[0], None if problem.softcap is None else made[1]


def _logits_at_ids(
    h: Tensor,
    W: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    operand_dtype: torch.dtype,
    group: str | None,
) -> Tensor:
    """z, and below it the slope of a softcap if there is one: [1 or 2, N, K]."""
    u = products_at(h, W, ids, operand_dtype)
    of_ids = None if bias is None else bias[ids.clamp(min=0).long()]
    slope = LogitMap(of_ids, softcap, 1.0).apply_(u, needs_slope=True)
    z = u.div_(temperature).masked_fill_(ids < 0, -torch.inf)
    if group is not None:
        # An id is in one shard. But a shard without rows has one too, a banned row.
        there = z != -torch.inf
        total, count = summed_(torch.stack([z.where(there, 0), there.float()]), group)
        z = total.masked_fill_(count == 0, -torch.inf)
    return torch.stack([z] if slope is None else [z, slope])


def _gradient_of_h(
    problem: Problem,
    ids: Tensor,
    c: Tensor,
    c_r: Tensor | None,
    B: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """dh [N, D] of the module docstring; B is divided by T already."""
    grad = c.new_empty(c.shape[0], problem.W.shape[1], dtype=dtype)
    fill = ops.fill_gradient_of_h if is_opaque(c) else _fill_gradient_of_h
    fill(grad, problem.W, ids, c / problem.temperature, c_r, B, problem.operand_dtype,
         problem.group)  # fmt: skip
    return grad


def _fill_gradient_of_h(
    grad: Tensor,
    W: Tensor,
    ids: Tensor,
    c: Tensor,
    c_r: Tensor | None,
    B: Tensor | None,
    operand_dtype: torch.dtype,
    group: str | None,
) -> None:
    """grad ← Σ_k c_k W[id_k] + c_r B, of all processes."""
    for n in range(0, grad.shape[0], TOKENS_AT_A_TIME):
        rows = slice(n, n + TOKENS_AT_A_TIME)
        sums = c.new_zeros(grad[rows].shape)
        add_rows_(sums, c[rows], W, ids[rows], operand_dtype)
        if group is not None:
            summed_(sums, group)
        if c_r is not None and B is not None:
            part = c_r[rows, None]
            # B of a token that does not count may be NaN.
            sums.add_((B[rows] * part).masked_fill_(part == 0, 0))
        grad[rows].copy_(sums)


def _gradients_of_rows(
    problem: Problem,
    ids: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`trained_gradients` for logits without the rest."""
    needs_h, needs_weight, needs_bias = needs[:3]
    grad = grad_weight = grad_bias = None
    if needs_h:
        grad = _gradient_of_h(problem, ids, c, None, None, problem.h_S.dtype)
    if needs_weight or needs_bias:
        V, D = problem.W.shape
        dW, db = zeros(problem, V, D), zeros(problem, V) if needs_bias else None
        # Hidden states of a token that does not count may be NaN.
        h = problem.h_S.masked_fill((c == 0).all(1, keepdim=True), 0)
        fill = ops.fill_rows_of_head if is_opaque(c) else gradient_of_rows_
        fill(dW, db, c / problem.temperature, h, ids, problem.operand_dtype)
        if needs_weight:
            # A shard without rows has one, a banned row, in the problem.
            grad_weight = dW[: weight.shape[0]].to(weight.dtype)
            padding = max(0, weight.shape[0] - V)
            if padding:
                grad_weight = torch.nn.functional.pad(grad_weight, (0, 0, 0, padding))
        if bias is not None and db is not None:
            grad_bias = padded(db, bias.shape[0], bias.dtype)
    return grad, grad_weight, grad_bias


_LOGITS_AT = torch.library.custom_op(
    add_op_namespace_prefix("logits_at"),
    _logits_at_ids,
    mutates_args=(),
    schema="(Tensor h, Tensor W, Tensor ids, Tensor? bias, float? softcap, float temperature, "
    "ScalarType operand_dtype, str? group) -> Tensor",
)
_LOGITS_AT.register_fake(
    lambda h, W, ids, bias, softcap, *_: h.new_empty(
        (1 if softcap is None else 2, *ids.shape), dtype=torch.float32
    )
)
torch.library.custom_op(
    add_op_namespace_prefix("fill_gradient_of_h"),
    _fill_gradient_of_h,
    mutates_args=("grad",),
    schema="(Tensor(a!) grad, Tensor W, Tensor ids, Tensor c, Tensor? c_r, Tensor? B, "
    "ScalarType operand_dtype, str? group) -> ()",
).register_fake(lambda *_: None)
torch.library.custom_op(
    add_op_namespace_prefix("fill_rows_of_head"),
    gradient_of_rows_,
    mutates_args=("dW", "db"),
    schema="(Tensor(a!) dW, Tensor(b!)? db, Tensor c, Tensor h, Tensor ids, "
    "ScalarType operand_dtype) -> ()",
).register_fake(lambda *_: None)
