"""The choice of what fills a record of results, and the operator that PyTorch's compiler sees.

In eager mode a schedule is plain Python: profilers and dispatch modes see each of its operations.
PyTorch's compiler, and fake tensors, see one opaque operator that writes into its arguments.
"""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .._ops import add_op_namespace_prefix, ops
from ..debug import after, before
from ..problem import Outputs, Problem
from . import head_gradient, row_workspace, top_k
from .head_gradient import HeadGradients
from .top_k import Likeliest

Made = Outputs | HeadGradients | Likeliest
RECORDS: dict[str, type[Made]] = {
    "Outputs": Outputs,
    "HeadGradients": HeadGradients,
    "Likeliest": Likeliest,
}


def fill(made: Made, problem: Problem, workspace_bytes: float) -> None:
    """Fill the tensors of a record. A budget of 0 bytes chooses the logit-free schedule."""
    if is_opaque(problem.h_S):
        ops.fill(*operator_arguments(made, problem, workspace_bytes))
        return
    before(problem, made, workspace_bytes)
    if isinstance(made, HeadGradients):
        head_gradient.fill(made, problem, workspace_bytes)
    elif isinstance(made, Likeliest):
        top_k.fill(made, problem, workspace_bytes)
    elif workspace_bytes == 0:
        from . import logit_free  # needs Triton

        logit_free.fill(made, problem)
    else:
        row_workspace.fill(made, problem, workspace_bytes)
    after(made)


def is_opaque(t: Tensor) -> bool:
    """Whether PyTorch's compiler traces t, or t is a fake tensor."""
    return torch.compiler.is_compiling() or isinstance(t, FakeTensor)


def operator_arguments(made: Made, problem: Problem, workspace_bytes: float) -> tuple[Any, ...]:
    """The operator's arguments: the tensors and numbers of both records, and their names."""
    filled, tensors = _those(Tensor, made), _those(Tensor, problem)
    numbers = _those(float, problem)
    return (
        type(made).__name__,
        list(filled.values()), list(tensors.values()), list(numbers.values()),
        " ".join(filled), " ".join(tensors), " ".join(numbers),
        problem.operand_dtype, problem.group, workspace_bytes,
    )  # fmt: skip


def _those(kind: type, record: Any) -> dict[str, Any]:
    """The fields of a record whose values are of a type."""
    # The compiler of PyTorch 2.10 cannot trace vars().
    named = ((field.name, getattr(record, field.name)) for field in fields(record))
    return {name: value for name, value in named if isinstance(value, kind)}


@torch.library.custom_op(
    add_op_namespace_prefix("fill"),
    mutates_args=("filled",),
    schema="(str record, Tensor(a!)[] filled, Tensor[] tensors, float[] numbers, "
    "str filled_names, str tensor_names, str number_names, "
    "ScalarType operand_dtype, str? group, float workspace_bytes) -> ()",
)
def _operator(
    record: str,
    filled: list[Tensor],
    tensors: list[Tensor],
    numbers: list[float],
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
    made = RECORDS[record](**dict(zip(filled_names.split(), filled, strict=True)))
    fill(made, problem, workspace_bytes)


# The operator returns nothing, and the tensors that it fills have their shapes already.
_operator.register_fake(lambda *_: None)
