"""The two ways to compute one thing: which it is, its scratch, and how it is run.

Scratch is allocated here, for whoever counts allocations to see, and a schedule fills what it is
given. Called as usual, a schedule is plain Python: profilers and dispatch modes see every operation
in it. PyTorch's compiler, and fake tensors, see one opaque operator that writes into its arguments.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from opsd_kernels import head_gradient, row_workspace
from opsd_kernels.head_gradient import HeadGradients
from opsd_kernels.problem import Outputs, Problem

OUTPUTS = tuple(field.name for field in fields(Outputs))
HEAD_GRADIENTS = tuple(field.name for field in fields(HeadGradients))


def allocate(outputs: Outputs, problem: Problem, workspace_bytes: float) -> list[Tensor]:
    """The scratch of `fill`: with a budget of 0 bytes that of the logit-free schedule."""
    needs_statistics = outputs.statistics is not None
    if workspace_bytes == 0:
        from opsd_kernels import logit_free  # needs Triton

        return logit_free.allocate(
            problem, outputs.dh_S is not None, needs_statistics, outputs.stats is not None
        )
    if outputs.dW is not None:
        workspace_bytes = row_workspace.budget_beside_head(problem, workspace_bytes)
    needs_gradient = outputs.dh_S is not None
    return row_workspace.allocate(problem, needs_gradient, needs_statistics, workspace_bytes)


def fill(outputs: Outputs, scratch: list[Tensor], problem: Problem, workspace_bytes: float) -> None:
    """Fill the outputs by the schedule that the scratch is of."""
    if _is_opaque(outputs.loss):
        torch.ops.opsd_kernels.fill(
            *(getattr(outputs, name) for name in OUTPUTS),
            scratch,
            *_values(problem),
            workspace_bytes,
        )
    elif workspace_bytes == 0:
        from opsd_kernels import logit_free

        logit_free.fill(outputs, scratch, problem)
    else:
        row_workspace.fill(outputs, scratch, problem, workspace_bytes)


def fill_head_gradients(
    gradients: HeadGradients,
    scratch: list[Tensor],
    problem: Problem,
    stats: Tensor,
    top: Tensor,
    scale: Tensor,
    workspace_bytes: float,
) -> None:
    """See `head_gradient.fill`; its scratch is `head_gradient.allocate`'s."""
    if _is_opaque(stats):
        torch.ops.opsd_kernels.fill_head_gradients(
            *(getattr(gradients, name) for name in HEAD_GRADIENTS),
            scratch,
            stats,
            top,
            scale,
            *_values(problem),
            workspace_bytes,
        )
    else:
        head_gradient.fill(gradients, scratch, problem, stats, top, scale, workspace_bytes)


def _is_opaque(t: Tensor) -> bool:
    return torch.compiler.is_compiling() or isinstance(t, FakeTensor)


def _values(problem: Problem) -> list[Any]:
    """A problem as arguments of an operator, of which each has one type: a β of each token is one
    of its own."""
    beta, betas = problem.beta, None
    if isinstance(beta, Tensor):
        beta, betas = None, beta
    return [*replace(problem, beta=beta).values(), betas]


def _problem(values: Sequence[Any]) -> Problem:
    *values, betas = values
    problem = Problem(*values)
    return problem if betas is None else replace(problem, beta=betas)


def _define(name: str, filled: type, given: dict[str, str], run: Callable[..., None]) -> None:
    """Define an operator that fills what it is given.

    Args:
        filled: the dataclass of tensors that it writes into, beside its scratch.
        given: types, by name, of what it reads beside a problem and the budget.
        run: of the filled, the scratch, what is given, the problem, and the budget.
    """
    types = {
        Tensor: "Tensor",
        Tensor | None: "Tensor?",
        torch.dtype: "ScalarType",
        float: "float",
        float | None: "float?",
        str | None: "str?",
        float | Tensor | None: "float?",
    }
    into = get_type_hints(filled)
    arguments = [
        f"{types[hint].replace('Tensor', f'Tensor(a{i}!)')} {field}"
        for i, (field, hint) in enumerate(into.items())
    ]
    arguments.append("Tensor(s!)[] scratch")
    arguments += [f"{kind} {field}" for field, kind in given.items()]
    arguments += [f"{types[hint]} {field}" for field, hint in get_type_hints(Problem).items()]
    arguments += ["Tensor? betas", "float workspace_bytes"]

    def function(*values: Any) -> None:
        n = len(into)
        m = n + 1 + len(given)
        filled_in, scratch, rest = filled(*values[:n]), values[n], values[n + 1 : m]
        run(filled_in, scratch, *rest, _problem(values[m:-1]), values[-1])

    operator = torch.library.custom_op(
        f"opsd_kernels::{name}",
        function,
        mutates_args=(*into, "scratch"),
        schema=f"({', '.join(arguments)}) -> ()",
    )
    # Nothing is returned; what is filled has its shape already.
    operator.register_fake(lambda *values: None)


_define("fill", Outputs, {}, fill)
_define(
    "fill_head_gradients",
    HeadGradients,
    {"stats": "Tensor", "top": "Tensor", "scale": "Tensor"},
    lambda into, scratch, stats, top, scale, problem, workspace_bytes: fill_head_gradients(
        into, scratch, problem, stats, top, scale, workspace_bytes
    ),
)
