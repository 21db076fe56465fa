"""The choice between the two schedules, which compute the same results in different ways.

`allocate` makes the scratch and `fill` uses it, so that tests can see every allocation. In eager
mode a schedule is plain Python: profilers and dispatch modes see each of its operations. PyTorch's
compiler, and fake tensors, see one opaque operator that writes into its arguments.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .._ops import add_op_namespace_prefix, ops
from ..debug import after, before
from ..problem import Outputs, Problem
from . import head_gradient, row_workspace, top_k
from .head_gradient import HeadGradients
from .planning import budget_beside_head
from .top_k import Likeliest


def allocate(outputs: Outputs, problem: Problem, workspace_bytes: float) -> list[Tensor]:
    """The scratch of `fill`; a budget of 0 bytes chooses the logit-free schedule."""
    needs_gradient, needs_statistics = outputs.dh_S is not None, outputs.statistics is not None
    if workspace_bytes == 0:
        from . import logit_free  # needs Triton

        needs_stats = outputs.stats is not None
        return logit_free.allocate(problem, needs_gradient, needs_statistics, needs_stats)
    if outputs.dW is not None:
        workspace_bytes = budget_beside_head(problem, workspace_bytes)
    return row_workspace.allocate(problem, needs_gradient, needs_statistics, workspace_bytes)


def fill(outputs: Outputs, scratch: list[Tensor], problem: Problem, workspace_bytes: float) -> None:
    """Fill the outputs by the schedule that `allocate` made the scratch for."""
    if is_opaque(outputs.loss):
        arguments = operator_arguments(outputs, scratch, problem, [], workspace_bytes)
        ops.fill(*arguments)
        return
    before(problem, outputs, workspace_bytes)
    if workspace_bytes == 0:
        from . import logit_free

        logit_free.fill(outputs, scratch, problem)
    else:
        row_workspace.fill(outputs, scratch, problem, workspace_bytes)
    after(outputs)


def fill_head_gradients(
    gradients: HeadGradients,
    scratch: list[Tensor],
    problem: Problem,
    seen: tuple[Tensor, Tensor],
    workspace_bytes: float,
) -> None:
    """`head_gradient.fill`, with scratch from `head_gradient.allocate`."""
    if is_opaque(problem.h_S):
        arguments = operator_arguments(gradients, scratch, problem, list(seen), workspace_bytes)
        ops.fill(*arguments)
        return
    before(problem, gradients, workspace_bytes, seen)
    head_gradient.fill(gradients, scratch, problem, seen, workspace_bytes)
    after(gradients)


def fill_top_k(found: Likeliest, problem: Problem, workspace_bytes: float) -> None:
    """`top_k.fill`."""
    if is_opaque(problem.h_S):
        arguments = operator_arguments(found, [], problem, [], workspace_bytes)
        ops.fill(*arguments)
        return
    before(problem, found, workspace_bytes)
    top_k.fill(found, problem, workspace_bytes)
    after(found)


def is_opaque(t: Tensor) -> bool:
    """Whether PyTorch's compiler traces t, or t is a fake tensor."""
    return torch.compiler.is_compiling() or isinstance(t, FakeTensor)


def operator_arguments(
    outputs: Outputs | HeadGradients | Likeliest,
    scratch: list[Tensor],
    problem: Problem,
    seen: list[Tensor],
    workspace_bytes: float,
) -> tuple[Any, ...]:
    """The operator's arguments: the tensors and numbers of the records, and their names."""
    filled, tensors = _those(Tensor, outputs), _those(Tensor, problem)
    numbers = _those(float, problem)
    return (
        list(filled.values()), scratch, list(tensors.values()), list(numbers.values()), seen,
        " ".join(filled), " ".join(tensors), " ".join(numbers),
        problem.operand_dtype, problem.group, workspace_bytes,
    )  # fmt: skip


def _those(kind: type, record: Any) -> dict[str, Any]:
    """The fields of a record whose values are of a type."""
    return {name: value for name, value in vars(record).items() if isinstance(value, kind)}


@torch.library.custom_op(
    add_op_namespace_prefix("fill"),
    mutates_args=("filled", "scratch"),
    schema="(Tensor(a!)[] filled, Tensor(b!)[] scratch, Tensor[] tensors, float[] numbers, "
    "Tensor[] seen, str filled_names, str tensor_names, str number_names, "
    "ScalarType operand_dtype, str? group, float workspace_bytes) -> ()",
)
def _operator(
    filled: list[Tensor],
    scratch: list[Tensor],
    tensors: list[Tensor],
    numbers: list[float],
    seen: list[Tensor],
    filled_names: str,
    tensor_names: str,
    number_names: str,
    operand_dtype: torch.dtype,
    group: str | None,
    workspace_bytes: float,
) -> None:
    named: dict[str, Any] = dict(zip(tensor_names.split(), tensors, strict=True))
    named |= zip(number_names.split(), numbers, strict=True)
    absent: dict[str, Any] = {"h_T": None, "W_T": None, "beta": None}
    problem = Problem(**(absent | named), operand_dtype=operand_dtype, group=group)
    outputs = dict(zip(filled_names.split(), filled, strict=True))
    if seen:
        gradients = HeadGradients(**outputs)
        fill_head_gradients(gradients, scratch, problem, (seen[0], seen[1]), workspace_bytes)
    elif "ids" in outputs:
        fill_top_k(Likeliest(**outputs), problem, workspace_bytes)
    else:
        fill(Outputs(**outputs), scratch, problem, workspace_bytes)


# The operator returns nothing, and the tensors that it fills have their shapes already.
_operator.register_fake(lambda *_: None)
