"""What only a GPU can tell: compiled code at real sizes, streams, devices, waiting for the host.

The other tests run there too, compiled; `make gpu` runs these first.
"""

import os
import subprocess
import sys

import pytest
import torch
from accuracy import (
    CUT_UNITS,
    GRAD_UNITS,
    LOSS_UNITS,
    ROUNDED_TILES,
    noise,
    tensor_core,
)
from inputs import random_inputs
from torch import Tensor

from benchmarks import memory
from opsd_kernels import (
    Divergence,
    fused_divergence_loss,
    fused_entropy,
    fused_jsd_loss,
    fused_sampled_token_loss,
    reference_divergence_loss,
    reference_entropy,
    reference_sampled_token_loss,
    reference_token_divergence,
    token_divergence,
)
from opsd_kernels.divergence import divergence_rows_
from opsd_kernels.kernels import tiles

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

QWEN3 = 151936
DIVERGENCES = [(0.5, None), (0.9, None), (0.0, None), (1.0, None), (0.0, 0.05), (0.5, 0.05)]


def real_inputs(N: int, D: int, dtype: torch.dtype, distance: float) -> list[Tensor]:
    """Peaked distributions over the vocabulary of Qwen3, made on the GPU."""
    g = torch.Generator("cuda").manual_seed(0)
    W = torch.randn(QWEN3, D, generator=g, device="cuda") / D**0.5
    likely = torch.randint(QWEN3, (N,), generator=g, device="cuda")
    h_S = torch.randn(N, D, generator=g, device="cuda")
    h_S += torch.linspace(0, 25, N, device="cuda")[:, None] * W[likely]
    h_T = h_S + distance * torch.randn(N, D, generator=g, device="cuda")
    return [t.to(dtype) for t in (h_S, h_T, W)]


def exact_in_blocks(h_S, h_T, W, beta, entry_clip):
    """The oracle, a few tokens at a time."""
    losses, grads = [], []
    W = W.double()
    for n in range(0, h_S.shape[0], 64):
        z_S, z_T = (h[n : n + 64].double() @ W.t() for h in (h_S, h_T))
        losses.append(divergence_rows_(z_S, z_T, beta, entry_clip, needs_score=True))
        grads.append(z_S @ W)
    return torch.cat(losses), torch.cat(grads)


def noise_in_blocks(h_S, h_T, W, workspace_mib, **divergence):
    """What fp32, and this GPU's tensor cores, cost losses and gradient (see `noise`)."""
    # The row workspace multiplies all of the vocabulary at once.
    chain = None if workspace_mib else tiles.lookup(h_S.device, W.dtype).columns
    dtype, W = W.dtype, W.double()
    norms = [
        noise(
            h_S[n : n + 64],
            h_T[n : n + 64],
            W,
            dtype=dtype,
            core=tensor_core(),
            chain=chain,
            draws=2,
            **divergence,
        )
        for n in range(0, h_S.shape[0], 64)
    ]
    return torch.tensor(norms).norm(dim=0).tolist()


@pytest.mark.parametrize("workspace_mib", [0, 320])
@pytest.mark.parametrize(
    ("D", "dtype", "distance"),
    [
        (2048, torch.bfloat16, 1e-3),
        (2048, torch.bfloat16, 0.03),
        (4096, torch.bfloat16, 0.3),
        (4096, torch.bfloat16, 3.0),
        (2048, torch.float16, 0.1),
        (2048, torch.float32, 0.1),
    ],
)
@pytest.mark.parametrize(("beta", "entry_clip"), DIVERGENCES)
def test_real_sizes(beta, entry_clip, D, dtype, distance, workspace_mib):
    h_S, h_T, W = real_inputs(300, D, dtype, distance)
    expected, exact_grad = exact_in_blocks(h_S, h_T, W, beta, entry_clip)
    h_S.requires_grad_()
    loss = fused_jsd_loss(
        h_S, h_T, W, beta=beta, entry_clip=entry_clip, reduction="none", workspace_mib=workspace_mib
    )
    (grad,) = torch.autograd.grad(loss.sum(), h_S)
    loss_noise, grad_noise = noise_in_blocks(
        h_S, h_T, W, workspace_mib, beta=beta, entry_clip=entry_clip
    )
    cut = tensor_core() is not None and dtype != torch.float32
    loss_units = CUT_UNITS if cut else LOSS_UNITS
    grad_units = CUT_UNITS if cut else GRAD_UNITS[torch.float32]
    loss_rounding = (expected.float().double() - expected).norm()
    assert (loss - expected).norm() < loss_units * (loss_rounding + loss_noise)
    rounding = (exact_grad.to(dtype).double() - exact_grad).norm()
    assert (grad.double() - exact_grad).norm() < (
        ROUNDED_TILES * rounding + grad_units * grad_noise
    )


@pytest.mark.parametrize("workspace_mib", [0, 320])
@pytest.mark.parametrize("entry_clip", [None, 0.05])
def test_everything_at_real_size(entry_clip, workspace_mib):
    """A β of each token, all statistics, and the sampled-token objective."""
    h_S, h_T, W = real_inputs(300, 2048, torch.bfloat16, 0.3)
    h_S.requires_grad_()
    g = torch.Generator("cuda").manual_seed(1)
    targets = torch.randint(QWEN3, (300,), generator=g, device="cuda")
    betas = torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0], device="cuda").repeat(60)
    options = {"beta": betas, "entry_clip": entry_clip, "targets": targets}
    told = token_divergence(h_S, h_T, W, workspace_mib=workspace_mib, **options)
    (grad,) = torch.autograd.grad(told.loss.sum(), h_S)
    h = h_S.detach().double().requires_grad_()
    oracle = reference_token_divergence(h, h_T.double(), W.double(), **options)
    (exact_grad,) = torch.autograd.grad(oracle.loss.sum(), h)
    for name in told._fields:
        # What is clipped is a difference of values and clip: the error of its share is absolute.
        atol = 2e-4 if name == "clipped_share" else 2e-5
        torch.testing.assert_close(
            getattr(told, name).double(), getattr(oracle, name), rtol=2e-4, atol=atol
        )
    assert_as_near_as_bf16(grad, exact_grad)

    loss = fused_sampled_token_loss(h_S, h_T, W, targets, workspace_mib=workspace_mib)
    (grad,) = torch.autograd.grad(loss, h_S)
    expected = reference_sampled_token_loss(h, h_T.double(), W.double(), targets)
    (exact_grad,) = torch.autograd.grad(expected, h)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    assert_as_near_as_bf16(grad, exact_grad)


@pytest.mark.parametrize("workspace_mib", [0, 320])
@pytest.mark.parametrize("beta", [None, 0.1, 0.9])
def test_the_rest_of_the_family_at_real_size(beta, workspace_mib):
    """Weights of each token, a policy term; and the entropy."""
    h_S, h_T, W = real_inputs(300, 2048, torch.bfloat16, 0.3)
    h_S.requires_grad_()
    g = torch.Generator("cuda").manual_seed(1)
    targets = torch.randint(QWEN3, (300,), generator=g, device="cuda")
    w, advantages = torch.randn(2, 300, generator=g, device="cuda")
    divergence = Divergence(beta, forward=w.abs(), reverse=0.5)
    policy = {"targets": targets, "advantages": advantages}
    h = h_S.detach().double().requires_grad_()
    for options in ({}, policy):
        loss = fused_divergence_loss(
            h_S, h_T, W, divergence, workspace_mib=workspace_mib, **options
        )
        exact = reference_divergence_loss(h, h_T.double(), W.double(), divergence, **options)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)
        assert_as_near_as_bf16(*(torch.autograd.grad(*of)[0] for of in ((loss, h_S), (exact, h))))
    entropy = fused_entropy(h_S, W, workspace_mib=workspace_mib)
    exact = reference_entropy(h, W.double())
    torch.testing.assert_close(entropy.double(), exact, rtol=1e-4, atol=1e-5)
    pairs = ((entropy.sum(), h_S), (exact.sum(), h))
    assert_as_near_as_bf16(*(torch.autograd.grad(*of)[0] for of in pairs))


def assert_as_near_as_bf16(grad: Tensor, exact: Tensor) -> None:
    """At a distance where products of tensor cores cost nothing that shows (docs/maths.md)."""
    rounding = (exact.bfloat16().double() - exact).norm()
    assert (grad.double() - exact).norm() < ROUNDED_TILES * rounding


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
    """1.1 GiB above the inputs and the returned gradient, of which dh_S in fp32 is 1 GiB."""
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
