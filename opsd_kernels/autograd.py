"""The autograd.Functions of one value a token: they allocate every tensor, and let a schedule fill
them.

Tokens are independent: token n's loss depends on row n of h_S alone. So the gradient of Σ_n g_n ℓ_n
with respect to h_S is g_n times the gradient that forward made, for any upstream weights g_n. The
gradient of a head, dW = Σ_n g_n (∂ℓ_n/∂z_n)ᵀ h_n, is a sum over all tokens. That makes three ways:

    frozen head    forward makes dh_S, backward scales its rows
    trained head   forward keeps 37 bytes a token, backward makes all gradients (`head_gradient`)
    weighed sum    a trained head whose tokens have weights that are known in forward: forward makes
                   all gradients of Σ w ℓ, backward scales them (where the budget holds dW in fp32)
"""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from .checks import Arguments
from .divergence import STATISTICS
from .problem import STATS, Outputs, Problem
from .schedules import choice
from .schedules.head_gradient import HeadGradients, largest_size
from .schedules.planning import can_weigh


def divergence_of_tokens(
    arguments: Arguments, needs_statistics: bool, workspace_bytes: float
) -> tuple[Tensor, Tensor | None]:
    """Loss and statistics of every token.

    Args:
        arguments: of the call. Results of tokens that do not count are undefined: they may be
            skipped.
        needs_statistics: whether statistics are wanted.
        workspace_bytes: bound on all temporaries with a vocabulary-sized dimension together; 0
            for none.

    Returns:
        ℓ [N] fp32 (see `Problem.member`), differentiable with respect to h_S, weight and bias; and
        the statistics, [STATISTICS, N] fp32 without gradient.
    """
    problem, h_S, weight, bias = arguments[:4]
    if is_trained(arguments):
        found = _TrainedHead.apply(h_S, weight, bias, problem, needs_statistics, workspace_bytes)
        return found if needs_statistics else (found, None)
    # Under no_grad no gradient work is done.
    needs_gradient = torch.is_grad_enabled() and h_S.requires_grad
    return _FrozenHead.apply(h_S, problem, needs_gradient, needs_statistics, workspace_bytes)


def has_weighed_sum(arguments: Arguments, workspace_bytes: float) -> bool:
    """Whether forward can make all gradients of a weighed sum, see the module docstring."""
    if not is_trained(arguments) or workspace_bytes == 0 or arguments.h_S.shape[0] == 0:
        return False
    return can_weigh(arguments.problem, workspace_bytes)


def weighed_sum(arguments: Arguments, weights: Tensor, workspace_bytes: float) -> Tensor:
    """Σ w ℓ of weights w [N], differentiable with respect to h_S, weight and bias, at the cost of
    one product more than with a frozen head."""
    problem, h_S, weight, bias = arguments[:4]
    # Tiles of scores in fp16 need weights with a bound.
    largest = largest_size(weights)
    problem = replace(problem, weights=weights / largest)
    total: Tensor = _WeighedSum.apply(h_S, weight, bias, problem, largest, workspace_bytes)
    return total


def is_trained(arguments: Arguments) -> bool:
    """Whether a gradient with respect to the head is wanted."""
    weight, bias = arguments.weight, arguments.bias
    wanted = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and wanted


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_S: Tensor,
        problem: Problem,
        needs_gradient: bool,
        needs_statistics: bool,
        workspace_bytes: float,
    ) -> tuple[Tensor, Tensor | None]:
        dh_S = zeros(problem, *h_S.shape) if needs_gradient else None
        outputs = filled(problem, needs_statistics, workspace_bytes, dh_S=dh_S)
        if dh_S is not None:
            ctx.save_for_backward(dh_S)
            ctx.dtype = h_S.dtype
        if outputs.statistics is not None:
            ctx.mark_non_differentiable(outputs.statistics)
        return outputs.loss, outputs.statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (dh_S,) = ctx.saved_tensors
        return _scaled(dh_S, grad_loss[:, None], grad_loss == 0, ctx.dtype), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_S: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        needs_statistics: bool,
        workspace_bytes: float,
    ) -> Tensor | tuple[Tensor, Tensor]:
        N = h_S.shape[0]
        stats, top = zeros(problem, STATS, N), h_S.new_zeros(N, dtype=torch.int32)
        outputs = filled(problem, needs_statistics, workspace_bytes, stats=stats, top=top)
        # Not the loss itself: the caller may weigh it in place.
        infinite = outputs.loss.isinf()
        problem = replace(problem, stats=stats, top=top)
        save(ctx, problem, infinite=infinite, weight=weight, head_bias=bias)
        ctx.workspace_bytes = workspace_bytes
        if outputs.statistics is None:
            return outputs.loss  # PyTorch's compiler takes no None beside it
        ctx.mark_non_differentiable(outputs.statistics)
        return outputs.loss, outputs.statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        problem, kept = restored(ctx)
        # Where ℓ is infinite it has no gradient.
        weights = grad_loss.masked_fill(kept["infinite"], 0)
        problem = replace(problem, weights=weights)
        heads = kept["weight"], kept["head_bias"]
        made = trained_gradients(
            problem, weights == 0, *heads, ctx.needs_input_grad, ctx.workspace_bytes
        )
        return *made, None, None, None


def trained_gradients(
    problem: Problem,
    dropped: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, ...],
    workspace_bytes: float,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of h_S, weight and bias, as far as the first three of `needs` say, from the
    upstream weights of the problem; see `head_gradient.fill`. Tokens that are `dropped` [N] have
    none."""
    needs_h, needs_weight, needs_bias = needs[:3]
    h_S, V = problem.h_S, problem.W.shape[0]
    # Hidden states of a token that does not count may be NaN, which a product would spread.
    # The memory is used again for their gradient.
    grad = h_S.masked_fill(dropped[:, None], 0)
    dW = torch.empty_like(weight) if needs_weight else None
    db = zeros(problem, V) if needs_bias else None
    # A process may have no row of a vocabulary that several share.
    own_rows = None if dW is None or dW.shape[0] == 0 else dW[:V]
    dh_S = zeros(problem, *h_S.shape) if needs_h else None
    gradients = HeadGradients(dh_S, own_rows, db)
    choice.fill(gradients, replace(problem, h_S=grad), workspace_bytes)
    if dW is not None:
        dW[V:].zero_()
    if dh_S is not None:
        grad.copy_(dh_S)
    db = None if bias is None or db is None else padded(db, bias.shape[0], bias.dtype)
    return grad if needs_h else None, dW, db


class _WeighedSum(torch.autograd.Function):
    """Σ w ℓ with a trained head, w = problem.weights · largest."""

    @staticmethod
    def forward(
        ctx: Any,
        h_S: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        largest: Tensor,
        workspace_bytes: float,
    ) -> Tensor:
        V, D = problem.W.shape
        outputs = filled(
            problem,
            False,
            workspace_bytes,
            dh_S=zeros(problem, *h_S.shape) if ctx.needs_input_grad[0] else None,
            dW=zeros(problem, V, D),
            db=None if bias is None else zeros(problem, V),
        )
        weights = problem.weights
        assert weights is not None
        # Not the head: backward does not read it, and it may have changed by then.
        ctx.save_for_backward(weights, largest, outputs.dh_S, outputs.dW, outputs.db)
        ctx.rows = weight.shape[0]
        ctx.dtypes = h_S.dtype, weight.dtype, None if bias is None else bias.dtype
        # Selected, not multiplied: a dropped token's loss may be anything.
        return torch.where(weights != 0, weights * largest * outputs.loss, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        weights, largest, dh_S, dW, db = ctx.saved_tensors
        dtype, weight_dtype, bias_dtype = ctx.dtypes
        _, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        factor = grad_sum * largest
        no_part = factor == 0
        grad = grad_weight = grad_bias = None
        if dh_S is not None:
            grad = _scaled(dh_S, factor, (weights == 0) | no_part, dtype)
        if needs_weight:
            grad_weight = dW.new_zeros(ctx.rows, dW.shape[1], dtype=weight_dtype)
            torch.mul(dW, factor, out=grad_weight[: dW.shape[0]])
            grad_weight.masked_fill_(no_part, 0)
        if needs_bias:
            grad_bias = padded((db * factor).masked_fill(no_part, 0), ctx.rows, bias_dtype)
        return grad, grad_weight, grad_bias, None, None, None


def refuse_second_derivative() -> None:
    """Called in backward: refuse a second derivative, whose second-order term would be missing
    without notice. (`once_differentiable` sees only an upstream gradient that requires grad.)"""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("this loss has no second derivative: create_graph must be False")


def filled(
    problem: Problem, needs_statistics: bool, workspace_bytes: float, **gradients: Tensor | None
) -> Outputs:
    """Outputs with the loss, the statistics if they are needed, and the gradients, all filled."""
    N = problem.h_S.shape[0]
    statistics = zeros(problem, STATISTICS, N) if needs_statistics else None
    outputs = Outputs(zeros(problem, N), statistics, **gradients)
    choice.fill(outputs, problem, workspace_bytes)
    return outputs


def zeros(problem: Problem, *shape: int) -> Tensor:
    return problem.h_S.new_zeros(shape, dtype=torch.float32)


def _scaled(dh_S: Tensor, factor: Tensor, dropped: Tensor, dtype: torch.dtype) -> Tensor:
    """factor · dh_S, rounded once, in a new tensor: a second backward reads dh_S again. Rows of
    dropped tokens are set to 0, not multiplied: they may be NaN."""
    grad = torch.empty_like(dh_S, dtype=dtype)
    torch.mul(dh_S, factor, out=grad)
    return grad.masked_fill_(dropped[:, None], 0)


def padded(db: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """db [V] as the gradient of a bias [rows]."""
    return torch.nn.functional.pad(db, (0, rows - db.shape[0])).to(dtype)


def save(ctx: Any, problem: Problem, **more: Any) -> None:
    """Keep a problem and named values for backward. `save_for_backward` takes no tensor of
    inference mode: such a tensor has no gradient and no version, and is kept as it is."""
    # The compiler of PyTorch 2.10 cannot trace vars().
    ctx.fields = [field.name for field in fields(problem)]
    values = {name: getattr(problem, name) for name in ctx.fields} | more
    compiling = torch.compiler.is_compiling()
    ctx.names = [
        name
        for name, value in values.items()
        if isinstance(value, Tensor) and (compiling or not value.is_inference())
    ]
    ctx.save_for_backward(*(values[name] for name in ctx.names))
    ctx.others = {name: value for name, value in values.items() if name not in ctx.names}


def restored(ctx: Any) -> tuple[Problem, dict[str, Any]]:
    """What `save` kept, unless a tensor was changed since."""
    try:
        kept = ctx.others | dict(zip(ctx.names, ctx.saved_tensors, strict=True))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "the LM head, or hidden states, were changed in place between forward and backward, "
            "which reads them once more: call backward before the optimizer's step, or give the "
            "loss a clone"
        ) from error
    problem = Problem(**{name: kept.pop(name) for name in ctx.fields})
    return problem, kept
