"""What only a GPU can tell: compiled code at real sizes, streams, devices, waiting for the host.

The other tests run there too, compiled; `make gpu` runs these first.
"""

import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import operations
import pytest
import torch
from accuracy import SATURATED_TILES
from inputs import random_inputs
from operations import Inputs
from schedules import DEVICE
from torch import Tensor

from benchmarks import memory
from benchmarks.lib import report
from benchmarks.lib.records import OperationError
from opsd_kernels import fused_jsd_loss, reference_jsd_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

QWEN3 = 151936
TOKENS = 1100  # a chunk, and some more


@lru_cache(maxsize=1)
def real_inputs(D: int, dtype: torch.dtype, distance: float, N: int = TOKENS) -> Inputs:
    return operations.make(N, D, QWEN3, dtype, DEVICE, distance)


def check_at_real_size(
    name: str, workspace_mib: int, D: int, dtype: torch.dtype, distance: float
) -> None:
    """Against float64, on some rows; what was found is kept before it is judged."""
    inputs = real_inputs(D, dtype, distance)
    errors = operations.compare(operations.OPERATIONS[name], inputs, workspace_mib)
    known = (name, workspace_mib, TOKENS, D, str(dtype).removeprefix("torch."), distance)
    keep([OperationError(*known, told.what, told.error, told.bound) for told in errors])
    for told in errors:
        assert told.error < told.bound, told


def keep(rows: list[OperationError]) -> None:
    """In operations.csv, of the folder that OPSD_FIGURES names."""
    if folder := os.environ.get("OPSD_FIGURES"):
        results = report.Results(
            "operations", report.machine(DEVICE), Path(folder), lambda row: None, OperationError
        )
        for row in rows:
            results.add(row)


@pytest.mark.parametrize("workspace_mib", [0, 320])
@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_operation_at_real_size(name, workspace_mib):
    check_at_real_size(name, workspace_mib, 4096, torch.bfloat16, 0.3)


@pytest.mark.parametrize(
    ("D", "dtype", "distance"),
    [
        (2048, torch.bfloat16, 1e-3),
        (2048, torch.bfloat16, 0.03),
        (4096, torch.bfloat16, 3.0),
        (2048, torch.float16, 0.1),
        (2048, torch.float32, 0.1),
    ],
)
@pytest.mark.parametrize("workspace_mib", [0, 320])
@pytest.mark.parametrize("name", ["JSD", "forward KL", "reverse KL", "JSD, clipped"])
def test_distance_and_dtype_at_real_size(name, workspace_mib, D, dtype, distance):
    check_at_real_size(name, workspace_mib, D, dtype, distance)


# Passes over the head in backward; in forward, but for the head's gradient; in forward, all of it.
@pytest.mark.parametrize("workspace_mib", [0, 320, 4800])
def test_a_trained_head_at_real_size(workspace_mib):
    """Of fewer tokens: the gradient of the head is a sum over all of them."""
    h_S, h_T, *_, head = real_inputs(4096, torch.bfloat16, 0.3)[:7]
    h, W = h_S[:300].clone().requires_grad_(), head.weight.clone().requires_grad_()
    loss = fused_jsd_loss(h, h_T[:300], W, workspace_mib=workspace_mib)
    grads = torch.autograd.grad(loss, [h, W])
    if "OPSD_RECORD" in os.environ:
        return
    h_exact, W_exact = (t.detach().double().requires_grad_() for t in (h, W))
    expected = reference_jsd_loss(h_exact, h_T[:300].double(), W_exact)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    for grad, exact in zip(grads, torch.autograd.grad(expected, [h_exact, W_exact]), strict=True):
        # At a distance where products of tensor cores cost nothing that shows (docs/maths.md).
        rounding = (exact.bfloat16().double() - exact).norm()
        assert (grad.double() - exact).norm() < SATURATED_TILES * rounding


@pytest.mark.parametrize("workspace_mib", [0, 320])
def test_compiled_by_inductor(workspace_mib):
    h_S, h_T, W = (t.cuda() for t in random_inputs(300, 3000, 64, torch.bfloat16))

    def step(h: Tensor) -> Tensor:
        return fused_jsd_loss(2 * h, 2 * h_T, W, workspace_mib=workspace_mib)

    results = []
    for call in (step, torch.compile(step, fullgraph=True)):
        h = h_S.clone().requires_grad_()
        loss = call(h)
        loss.backward()
        results.append((loss.detach(), h.grad))
    torch.testing.assert_close(*results)


def test_64k_tokens_of_memory():
    """1.1 GiB above the inputs and the returned gradient; dh_S in fp32 is 1 GiB of it."""
    N, D = 65536, 4096
    h_S = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    h_T = torch.randn(N, D, device="cuda", dtype=torch.bfloat16)
    W = torch.randn(32768, D, device="cuda", dtype=torch.bfloat16) / 64
    fused_jsd_loss(h_S[:256], h_T[:256], W).backward()
    h_S.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused_jsd_loss(h_S, h_T, W).backward()
    above = torch.cuda.max_memory_allocated() - before - h_S.grad.nbytes
    assert above < 1.1 * 2**30


@pytest.mark.parametrize("workspace_mib", [0, 64])
@pytest.mark.parametrize("masked", [False, True])
def test_no_host_synchronisation(workspace_mib, masked):
    h_S, h_T, W = (t.cuda() for t in random_inputs(300, 3000, 64, torch.bfloat16))
    h_S.requires_grad_()
    weights = torch.ones(300, device="cuda") if masked else None

    def step() -> None:
        fused_jsd_loss(h_S, h_T, W, token_weights=weights, workspace_mib=workspace_mib).backward()

    step()  # compiles
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("workspace_mib", [0, 64])
def test_captured_in_a_cuda_graph(workspace_mib):
    """Forward and backward, replayed on hidden states that came after the capture."""
    h_S, h_T, W = (t.cuda() for t in random_inputs(300, 3000, 64, torch.bfloat16))
    h_S.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        loss = fused_jsd_loss(h_S, h_T, W, workspace_mib=workspace_mib)
        return loss.detach(), torch.autograd.grad(loss, h_S)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles, and lets libraries allocate
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        h_S.copy_(h_S.flip(0))
    graph.replay()
    torch.testing.assert_close(tuple(t.clone() for t in captured), step())


@pytest.mark.parametrize("workspace_mib", [0, 64])
def test_on_another_stream(workspace_mib):
    h_S, h_T, W = (t.cuda() for t in random_inputs(2000, 3000, 256, torch.bfloat16))

    def gradient() -> Tensor:
        h = h_S.clone().requires_grad_()
        fused_jsd_loss(h, h_T, W, workspace_mib=workspace_mib).backward()
        return h.grad

    expected = gradient()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # the default stream is long done by then
        got = gradient()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("workspace_mib", [0, 64])
def test_on_a_device_that_is_not_the_current_one(workspace_mib):
    h_S, h_T, W = (t.to("cuda:1") for t in random_inputs(50, 1000, 64, torch.bfloat16))
    h_S.requires_grad_()
    with torch.cuda.device(0):
        loss = fused_jsd_loss(h_S, h_T, W, workspace_mib=workspace_mib)
        loss.backward()
    h = h_S.detach().cpu().requires_grad_()
    expected = fused_jsd_loss(h, h_T.cpu(), W.cpu())
    expected.backward()
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=1e-7)
    assert (h_S.grad.cpu() - h.grad).norm() < 1e-2 * h.grad.norm()


def test_a_head_beyond_32_bits():
    """The vocabulary of Gemma times 8192 features: 2³¹ entries and more."""
    W = torch.randn(262400, 8192, device="cuda", dtype=torch.bfloat16) / 90
    h_S = torch.randn(70, 8192, device="cuda", dtype=torch.bfloat16)
    h_T = (h_S + 0.1 * torch.randn_like(h_S)).requires_grad_(False)
    h_S.requires_grad_()
    losses, grads = [], []
    for workspace_mib in (0, 320):
        losses.append(fused_jsd_loss(h_S, h_T, W, workspace_mib=workspace_mib))
        grads.append(torch.autograd.grad(losses[-1], h_S)[0].float())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    assert (grads[0] - grads[1]).norm() < 5e-3 * grads[1].norm()


@pytest.mark.parametrize(
    "method", ["ours, logit-free", "ours, row workspace", "eager", "TRL", "Liger, fused"]
)
def test_memory_is_what_is_counted_without_a_gpu(method):
    """The allocator's high-water mark, against the bytes counted on tensors without contents."""
    package = {"TRL": "trl", "Liger, fused": "liger_kernel"}.get(method, "torch")
    pytest.importorskip(package, reason=f"needs {package}")
    N, D, V = 4096, 2048, 50_000
    measured = memory.measure_here("cuda", N, D, V, "bfloat16", method)["mib"]
    count = f"memory.count('', {N}, {D}, {V}, {method!r})"
    script = f"from benchmarks import memory; row = {count}; print(row.failure, row.counted_mib)"
    printed = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert 0.98 < measured / float(printed.split()[-1]) < 1.1, printed
