"""Under `torch.compile` and on fake tensors: no graph break, the same numbers, no scratch."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from inputs import random_inputs
from marks import slow
from schedules import SCHEDULES
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.lib.allocations import id_of, tensors
from opsd_kernels import (
    FusedJSDLoss,
    fused_jsd_loss,
    fused_log_probs,
    fused_sampled_token_loss,
    kernels,
    token_divergence,
)
from opsd_kernels.problem import STATS, Outputs, Problem
from opsd_kernels.schedules.choice import operator_arguments
from opsd_kernels.schedules.head_gradient import HeadGradients

V = 600


def jsd(h_S: Tensor, h_T: Tensor, W: Tensor, workspace_mib: float | None) -> Tensor:
    weights = (h_S[:, 0] > 0).float()
    return fused_jsd_loss(
        2 * h_S, 2 * h_T, W, token_weights=weights, workspace_mib=workspace_mib
    ).square()


def everything(h_S: Tensor, h_T: Tensor, W: Tensor, workspace_mib: float | None) -> Tensor:
    N = h_S.shape[0]
    told = token_divergence(
        2 * h_S,
        2 * h_T,
        W,
        beta=torch.arange(N, device=h_S.device).remainder(5) / 4,
        temperature=1.3,
        entry_clip=0.01,
        targets=torch.arange(N, device=h_S.device),
        workspace_mib=workspace_mib,
    )
    return told.loss.sum() + (told.entropy_student + told.forward_kl + told.logp_teacher).mean()


def sampled(h_S: Tensor, h_T: Tensor, W: Tensor, workspace_mib: float | None) -> Tensor:
    targets = torch.arange(h_S.shape[0], device=h_S.device)
    return fused_sampled_token_loss(
        2 * h_S, 2 * h_T, W, targets, advantage_clip=1.0, workspace_mib=workspace_mib
    )


def log_probs(h_S: Tensor, h_T: Tensor, W: Tensor, workspace_mib: float | None) -> Tensor:
    targets = torch.arange(h_S.shape[0], device=h_S.device)
    return fused_log_probs(2 * h_S, W, targets, workspace_mib=workspace_mib).exp().sum()


def module(h_S: Tensor, h_T: Tensor, W: Tensor, workspace_mib: float | None) -> Tensor:
    return FusedJSDLoss(beta=0.0, entry_clip=0.05, workspace_mib=workspace_mib)(h_S, h_T, W)


FUNCTIONS = [jsd, everything, sampled, module]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("function", "backend", "dynamic"),
    [
        *((function, "aot_eager", None) for function in FUNCTIONS),
        (everything, "aot_eager", True),
        (jsd, "inductor", None),
        *(slow(function, "aot_eager", True) for function in FUNCTIONS if function != everything),
        *(slow(function, "inductor", None) for function in FUNCTIONS if function != jsd),
    ],
)
def test_one_graph_and_the_same_numbers(function, backend, dynamic, schedule):
    """For several batch sizes: the second compiles once more, with N a symbol; the third not."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    h_S, h_T, W = (t.to(schedule.device) for t in random_inputs(30, V, 16, distance=0.3))
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
    for N in (30, 20, 11):
        results = []
        for call in (function, compiled):
            h = h_S[:N].clone().requires_grad_()
            with torch.device(schedule.device):
                loss = call(h, h_T[:N], W, schedule.workspace_mib)
            loss.backward()
            results.append((loss.detach(), h.grad))
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
    compiles = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiles <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_an_annealed_beta_is_compiled_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    h_S, h_T, W = random_inputs(6, 40, 8)
    loss = FusedJSDLoss()
    compiled = torch.compile(lambda beta: loss(h_S, h_T, W, beta=beta), fullgraph=True)
    for step in range(12):
        beta = torch.tensor(step / 11)
        torch.testing.assert_close(compiled(beta), fused_jsd_loss(h_S, h_T, W, beta=float(beta)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def allocated_in_graph(schedule, N: int) -> list[torch.Size]:
    """Shapes of all tensors that the graphs of a compiled loss make, forward and backward."""
    shapes: list[torch.Size] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        known = set()
        for node in graph.graph.nodes:
            for t in tensors(node.meta.get("val")):
                if node.op == "call_function" and id_of(t) not in known:
                    shapes.append(t.shape)
                known.add(id_of(t))
        return graph

    torch._dynamo.reset()
    h_S, h_T, W = (t.to(schedule.device) for t in random_inputs(N, V, 16))
    h_S.requires_grad_()
    compiled = torch.compile(jsd, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    compiled(h_S, h_T, W, schedule.workspace_mib).backward()
    return shapes


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_graph_holds_results_alone(schedule):
    """What the operator fills is in the graph, and no scratch, whatever the schedule."""
    shapes = allocated_in_graph(schedule, 30)
    assert torch.Size([30, 16]) in shapes  # dh_S
    assert max(max(shape, default=0) for shape in shapes) <= 30


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("function", [jsd, everything, sampled, log_probs])
def test_fake_tensors(function, schedule):
    """Shapes without numbers, as planners and exporters ask for them."""
    with FakeTensorMode(), torch.device(schedule.device):
        h_S, h_T = torch.empty(30, 16, requires_grad=True), torch.empty(30, 16)
        loss = function(h_S, h_T, torch.empty(V, 16), schedule.workspace_mib)
        loss.backward()
    assert loss.shape == ()
    assert h_S.grad.shape == (30, 16)


def test_the_operator_does_what_it_declares():
    """PyTorch's own checks of the schema, the fake implementation, and what is written to."""
    h_S, h_T, W = random_inputs(5, 40, 8)
    operator = torch.ops.opsd_kernels.fill.default
    stats, top = torch.zeros(STATS, 5), torch.zeros(5, dtype=torch.int32)
    outputs = Outputs(torch.zeros(5), torch.zeros(8, 5), torch.zeros(5, 8), stats, top)
    gradients = HeadGradients(torch.zeros(5, 8), torch.zeros(40, 8), torch.zeros(40))
    problem = Problem(h_S, h_T, W, None, torch.float32, 0.5, weights=torch.ones(5))
    kept = replace(problem, stats=stats, top=top)
    forward = operator_arguments(outputs, problem, 2.0**20)
    backward = operator_arguments(gradients, kept, 2.0**20)
    for arguments in (forward, backward):
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, arguments, test_utils=checks)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_the_compiler_asks_whether_a_gpu_runs_kernels(capability):
    """What a GPU can do is a constant of the graph, not a call that breaks it."""
    device = torch.device("cuda", 0)

    def signed(x: Tensor) -> Tensor:
        return x if kernels.available(device) else -x

    torch._dynamo.reset()
    with mock.patch.object(kernels, "capability", return_value=capability):
        compiled = torch.compile(signed, fullgraph=True, backend="aot_eager")
        assert (
            compiled(torch.ones(())) == signed(torch.ones(())) == (1 if capability[0] > 7 else -1)
        )
