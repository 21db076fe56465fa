"""The autograd.Functions: they allocate every tensor, and let a schedule fill them.

Tokens are independent: token n's loss depends on row n of h_S alone. So the gradient of Σ_n g_n ℓ_n
with respect to h_S is g_n times the gradient that forward made, for whatever upstream weights g_n
arrive. To the gradient of a head, dW = Σ_n g_n (∂ℓ_n/∂z_n)ᵀ h_n, all tokens add, so that there are
three ways:

    frozen     forward makes dh_S, backward scales its rows
    trained    forward keeps 37 bytes a token, backward makes all gradients (`head_gradient`)
    weighed    the weights are known but for one factor, which is that of a sum: forward makes all
               gradients, backward scales them (where the budget holds dW in fp32)
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import head_gradient, schedules
from opsd_kernels.divergence import STATISTICS
from opsd_kernels.head_gradient import HeadGradients
from opsd_kernels.problem import FIELDS, STATS, Outputs, Problem
from opsd_kernels.row_workspace import can_weigh


def divergence_of_tokens(
    problem: Problem,
    weight: Tensor,
    bias: Tensor | None,
    needs_statistics: bool,
    workspace_bytes: float,
) -> tuple[Tensor, Tensor | None]:
    """Loss and statistics of every token of a problem.

    Args:
        problem: the tokens. Those that it does not keep may be skipped: their results are
            undefined, and the caller selects.
        weight, bias: of the student's head, [rows, D] and [rows], whose first V are the problem's.
        needs_statistics: whether statistics are wanted.
        workspace_bytes: bound on all temporaries with a vocabulary-sized dimension together; 0
            for none.

    Returns:
        The divergence, or log p of the targets where β is None, [N] fp32, differentiable with
        respect to h_S, weight and bias; and the statistics, [STATISTICS, N] fp32 without gradient.
    """
    if is_trained(weight, bias):
        found = _OfHead.apply(weight, bias, needs_statistics, workspace_bytes, *problem.values())
        return found if needs_statistics else (found, None)
    # Under no_grad no gradient work is done.
    needs_gradient = torch.is_grad_enabled() and problem.h_S.requires_grad
    return _Divergence.apply(needs_statistics, needs_gradient, workspace_bytes, *problem.values())


def weighed_sum(
    problem: Problem, weight: Tensor, bias: Tensor | None, weights: Tensor, workspace_bytes: float
) -> Tensor | None:
    """Σ w ℓ of weights [N] that are known, differentiable with respect to h_S, weight and bias, at
    the cost of one product beside those of a frozen head; None where that would not be so."""
    if not is_trained(weight, bias) or workspace_bytes == 0 or problem.h_S.shape[0] == 0:
        return None
    if not can_weigh(problem, workspace_bytes):
        return None
    # Tiles of scores in fp16 want a bound.
    largest = _largest(weights)
    problem = replace(problem, weights=weights / largest)
    return _WeighedSum.apply(weight, bias, largest, workspace_bytes, *problem.values())


def is_trained(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a gradient with respect to the head is wanted."""
    wanted = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and wanted


class _Divergence(torch.autograd.Function):
    """Of a frozen head."""

    @staticmethod
    def forward(
        ctx: Any,
        needs_statistics: bool,
        needs_gradient: bool,
        workspace_bytes: float,
        *values: Any,
    ) -> tuple[Tensor, Tensor | None]:
        problem = Problem(*values)
        dh_S = _zeros(problem, *problem.h_S.shape) if needs_gradient else None
        outputs = _filled(problem, needs_statistics, workspace_bytes, dh_S=dh_S)
        if dh_S is not None:
            ctx.save_for_backward(dh_S)
            ctx.dtype = problem.h_S.dtype
        if outputs.statistics is not None:
            ctx.mark_non_differentiable(outputs.statistics)
        return outputs.loss, outputs.statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (dh_S,) = ctx.saved_tensors
        # A new tensor: scaling dh_S in place would make a second backward wrong. Rounded once.
        grad = torch.empty_like(dh_S, dtype=ctx.dtype)
        torch.mul(dh_S, grad_loss[:, None], out=grad)
        # Selected, not multiplied: a token that does not count may have a gradient of NaN.
        grad.masked_fill_((grad_loss == 0)[:, None], 0)
        return None, None, None, *_gradients(grad)


class _OfHead(torch.autograd.Function):
    """Of a head that is trained."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        needs_statistics: bool,
        workspace_bytes: float,
        *values: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        problem = Problem(*values)
        N = problem.h_S.shape[0]
        stats, top = _zeros(problem, STATS, N), problem.h_S.new_zeros(N, dtype=torch.int32)
        outputs = _filled(problem, needs_statistics, workspace_bytes, stats=stats, top=top)
        # Not the loss itself, which may be weighed in place.
        infinite = outputs.loss.isinf()
        given = (weight, bias, *values)
        ctx.save_for_backward(infinite, stats, top, *_tensors(given))
        ctx.others, ctx.workspace_bytes = _others(given), workspace_bytes
        if outputs.statistics is None:
            return outputs.loss  # PyTorch's compiler takes no None beside it
        ctx.mark_non_differentiable(outputs.statistics)
        return outputs.loss, outputs.statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        infinite, stats, top, *tensors = _saved(ctx)
        weight, bias, *values = _joined(ctx.others, tensors)
        problem = Problem(*values)
        h_S, V = problem.h_S, problem.W.shape[0]
        needs_weight, needs_bias = ctx.needs_input_grad[:2]
        needs_h = ctx.needs_input_grad[4 + FIELDS.index("h_S")]
        # Where ℓ is infinite it has no gradient.
        weights = grad_loss.masked_fill(infinite, 0)
        largest = _largest(weights)
        # What does not count may be NaN, which a product would spread. Its place is that of the
        # gradient, until that is known.
        grad = h_S.masked_fill((weights == 0)[:, None], 0)
        dW = torch.empty_like(weight) if needs_weight else None
        db = _zeros(problem, V) if needs_bias else None
        # A process may have no row of a vocabulary that several share.
        own_rows = None if dW is None or dW.shape[0] == 0 else dW[:V]
        dh_S = _zeros(problem, *h_S.shape) if needs_h else None
        gradients = HeadGradients(dh_S, own_rows, db)
        problem = replace(problem, h_S=grad, weights=weights / largest)
        scratch = head_gradient.allocate(problem, gradients, ctx.workspace_bytes)
        schedules.fill_head_gradients(
            gradients, scratch, problem, stats, top, largest, ctx.workspace_bytes
        )
        if dW is not None:
            dW[V:].zero_()
        if gradients.dh_S is not None:
            grad.copy_(gradients.dh_S)
        return (
            dW,
            None if bias is None or db is None else _padded(db, bias.shape[0], bias.dtype),
            None,
            None,
            *_gradients(grad if needs_h else None),
        )


class _WeighedSum(torch.autograd.Function):
    """Σ w ℓ of a head that is trained, w = problem.weights · largest."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        largest: Tensor,
        workspace_bytes: float,
        *values: Any,
    ) -> Tensor:
        problem = Problem(*values)
        V, D = problem.W.shape
        needs_h = ctx.needs_input_grad[4 + FIELDS.index("h_S")]
        outputs = _filled(
            problem,
            False,
            workspace_bytes,
            dh_S=_zeros(problem, *problem.h_S.shape) if needs_h else None,
            dW=_zeros(problem, V, D),
            db=None if bias is None else _zeros(problem, V),
        )
        weights = problem.weights
        assert weights is not None
        # Not the head, which may be changed before backward, and is not read there.
        ctx.save_for_backward(weights, largest, outputs.dh_S, outputs.dW, outputs.db)
        ctx.dtype, ctx.rows, ctx.dtypes = (
            problem.h_S.dtype,
            weight.shape[0],
            (weight.dtype, None if bias is None else bias.dtype),
        )
        # Selected, not multiplied: a dropped token's loss may be anything.
        return torch.where(weights != 0, weights * largest * outputs.loss, 0).sum()

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        weights, largest, dh_S, dW, db = ctx.saved_tensors
        needs_weight, needs_bias = ctx.needs_input_grad[:2]
        # New tensors: what is saved may be wanted again. Rounded once. Selected, not multiplied:
        # what does not count may be NaN.
        factor = grad_sum * largest
        no_part = factor == 0
        grad = None
        if dh_S is not None:
            grad = torch.empty_like(dh_S, dtype=ctx.dtype)
            torch.mul(dh_S, factor, out=grad)
            grad.masked_fill_(((weights == 0) | no_part)[:, None], 0)
        weight_dtype, bias_dtype = ctx.dtypes
        grad_weight = grad_bias = None
        if needs_weight:
            grad_weight = dW.new_empty(ctx.rows, dW.shape[1], dtype=weight_dtype)
            torch.mul(dW, factor, out=grad_weight[: dW.shape[0]])
            grad_weight[dW.shape[0] :].zero_()
            grad_weight.masked_fill_(no_part, 0)
        if needs_bias:
            grad_bias = _padded((db * factor).masked_fill(no_part, 0), ctx.rows, bias_dtype)
        return grad_weight, grad_bias, None, None, *_gradients(grad)


def refuse_second_derivative() -> None:
    """To be called in backward: the second-order term would be left out in silence.
    (`once_differentiable` notices only an upstream gradient that itself requires one.)"""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("this loss has no second derivative: create_graph must be False")


def _filled(
    problem: Problem, needs_statistics: bool, workspace_bytes: float, **wanted: Tensor | None
) -> Outputs:
    """Loss, statistics if they are needed, and what is wanted besides."""
    N = problem.h_S.shape[0]
    statistics = _zeros(problem, STATISTICS, N) if needs_statistics else None
    outputs = Outputs(_zeros(problem, N), statistics, **wanted)
    scratch = schedules.allocate(outputs, problem, workspace_bytes)
    schedules.fill(outputs, scratch, problem, workspace_bytes)
    return outputs


def _zeros(problem: Problem, *shape: int) -> Tensor:
    return problem.h_S.new_zeros(shape, dtype=torch.float32)


def _largest(weights: Tensor) -> Tensor:
    """Their largest finite size, [] fp32, or 1 if there is none. One that is not finite is left to
    spoil its own token."""
    if weights.shape[0] == 0:
        return weights.new_ones(())
    largest = weights.abs().nan_to_num(nan=0.0, posinf=0.0).amax()
    return torch.where(largest == 0, 1, largest)


def _padded(db: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """db [V] as the gradient of a bias [rows]."""
    return torch.nn.functional.pad(db, (0, rows - db.shape[0])).to(dtype)


def _gradients(grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of the fields of a problem."""
    return tuple((dict.fromkeys(FIELDS) | {"h_S": grad}).values())


def _is_saved(value: Any) -> bool:
    """Whether a value is one for save_for_backward, which takes no tensor of inference mode: such a
    one has no gradient and no version, and may be kept as it is."""
    return isinstance(value, Tensor) and (torch.compiler.is_compiling() or not value.is_inference())


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    return [value for value in values if _is_saved(value)]


def _others(values: tuple[Any, ...]) -> list[Any]:
    """What is not saved, and an empty place for each that is."""
    return [Tensor if _is_saved(value) else value for value in values]


def _joined(others: list[Any], tensors: list[Tensor]) -> list[Any]:
    remaining = iter(tensors)
    return [next(remaining) if value is Tensor else value for value in others]


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """What was saved for backward, unless a tensor that it reads was changed since."""
    if torch.compiler.is_compiling():
        return tuple(ctx.saved_tensors)
    try:
        return tuple(ctx.saved_tensors)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "the LM head, or hidden states, were changed in place between forward and backward, "
            "which reads them once more where the head is trained: call backward before the "
            "optimizer's step, or give the loss a clone"
        ) from error
