"""What is allocated, what is computed, and that a GPU never waits for the host."""

import pytest
import torch
from inputs import random_inputs
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.allocations import Allocations
from opsd_kernels import LMHead, fused_jsd_loss, fused_sampled_token_loss, token_divergence

MIB = 2**20


def peak_of_vocabulary_sized(N, V, D, dtype, *, smallest=None, backward=True, **options):
    h_S, h_T, W = random_inputs(N, V, D, dtype)
    if options.pop("own_head", False):
        options["W_teacher"] = W.clone()
    if options.pop("autocast", False):
        W = W.float()
    if options.pop("capped", False):
        W = LMHead(W, torch.zeros(V, dtype=dtype), softcap=30.0)
    h_S.requires_grad_(backward)
    # Everything that could have a vocabulary-sized dimension; what has none is smaller.
    function = options.pop("function", fused_jsd_loss)
    with Allocations(smallest=smallest or 4 * V) as allocations:
        loss = function(h_S, h_T, W, **options)
        if backward:
            loss.backward()
    return allocations.peak


@pytest.mark.parametrize("workspace_mib", [3.5, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", [(0.5, None), (0.9, None), (0, None), (1, None), (0, 0.05)])
def test_workspace_bounds_all_temporaries(workspace_mib, dtype, divergence):
    """W alone would be 12.5 MiB in fp32, the logits of the two sides 75 MiB each."""
    beta, entry_clip = divergence
    peak = peak_of_vocabulary_sized(
        100,
        65536,
        50,
        dtype,
        smallest=64 * 1024,  # tiles of W are smaller than 4 V
        beta=beta,
        entry_clip=entry_clip,
        workspace_mib=workspace_mib,
    )
    N_by_D = 2 * 100 * 50 * 4  # dh_S in fp32 and the returned gradient pass for temporaries here
    assert peak <= workspace_mib * MIB + N_by_D
    assert peak > workspace_mib * MIB / 3  # and it is used


def everything(h_S, h_T, W, **options):
    return token_divergence(h_S, h_T, W, **options).loss.sum()


@pytest.mark.parametrize("V", [65536, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", ["statistics", "each beta", "all", "sampled", "capped"])
def test_workspace_bounds_all_temporaries_with(option, dtype, V):
    """3000 entries: rows are handled many at a time, and those of one formula copied."""
    N, mib = (100 if V > 3000 else 1000), 4
    targets = torch.arange(N)
    betas = torch.full((N,), 0.3)
    betas[::9] = 0.0  # most rows of a block share a formula, which is the most to copy
    options = {
        "statistics": {"function": everything, "beta": 0.0, "entry_clip": 0.01, "targets": targets},
        "each beta": {"beta": betas, "entry_clip": 0.01},
        "all": {"function": everything, "beta": betas, "entry_clip": 0.01, "targets": targets},
        "sampled": {"function": fused_sampled_token_loss, "targets": targets},
    }
    options["capped"] = options["all"] | {"capped": True}
    options = options[option]
    peak = peak_of_vocabulary_sized(
        N, V, 50, dtype, smallest=8 * 1024, workspace_mib=mib, **options
    )
    N_by_D = 2 * N * 50 * 4 + 8 * N * 4
    assert peak <= mib * MIB + N_by_D
    assert peak > min(mib * MIB, 8 * N * V) / 3


@pytest.mark.parametrize("option", ["own_head", "temperature", "weights", "strides", "autocast"])
def test_workspace_bound_holds_with(option):
    N, V, D = 200, 65536, 50
    options = {
        "own_head": {"own_head": True},
        "temperature": {"temperature": 1.2},
        "weights": {"token_weights": torch.arange(N).remainder(3)},
    }.get(option, {})
    h_S, h_T, W = random_inputs(N, V, D, torch.bfloat16 if option == "autocast" else torch.float32)
    if options.pop("own_head", False):
        options["W_teacher"] = W.clone()
    if option == "strides":
        W = torch.stack([W, W], dim=-1)[..., 0]
    if option == "autocast":
        W = W.float()
    h_S.requires_grad_()
    with (
        Allocations(smallest=64 * 1024) as allocations,
        torch.autocast("cpu", torch.bfloat16, enabled=option == "autocast"),
    ):
        fused_jsd_loss(h_S, h_T, W, workspace_mib=4, **options).backward()
    assert allocations.peak <= 4 * MIB + 2 * N * D * 4


def test_temporaries_do_not_grow_with_tokens():
    """Peer mistake: a 3-D input chunked along its batch dimension, N = 2047 made one chunk."""
    V, D = 20000, 8
    peaks = [
        peak_of_vocabulary_sized(N, V, D, torch.float32, workspace_mib=4) for N in (50, 500, 2047)
    ]
    h_S, h_T, W = random_inputs(2047, V, D)
    with Allocations(smallest=4 * V) as allocations:
        fused_jsd_loss(
            h_S.view(1, 2047, D).requires_grad_(), h_T.view(1, 2047, D), W, workspace_mib=4
        ).backward()
    assert max(peaks) <= 4 * MIB + 2 * 2047 * D * 4
    assert allocations.peak <= 4 * MIB + 2 * 2047 * D * 4


def test_a_padded_head_is_a_view():
    """Peer mistake: padded rows counted as logits of 0. Ours: pass `W[:vocab_size]`, no copy."""
    h_S, h_T, W = random_inputs(20, 30000, 16)
    padded = torch.cat([W, torch.zeros(100, 16)])
    with Allocations(smallest=W.nbytes // 2) as allocations, torch.no_grad():
        loss = fused_jsd_loss(h_S, h_T, padded[:30000], workspace_mib=2)
    assert allocations.peak == 0 or allocations.peak <= 2 * MIB
    torch.testing.assert_close(loss, fused_jsd_loss(h_S, h_T, W))
    assert (fused_jsd_loss(h_S, h_T, padded) / loss - 1).abs() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_mib", [1, 128])
def test_matrix_products_are_three_passes(dtype, workspace_mib):
    N, V, D = 100, 5000, 64
    U = 2 * N * D * V
    h_S, h_T, W = random_inputs(N, V, D, dtype)
    h_S.requires_grad_()
    keep = torch.arange(N) % 4 == 0

    def passes(**options) -> float:
        with FlopCounterMode(display=False) as counter:
            loss = fused_jsd_loss(h_S, h_T, W, workspace_mib=workspace_mib, **options)
            if loss.requires_grad:
                loss.backward()
        return counter.get_total_flops() / U

    assert passes() == 3
    assert passes(W_teacher=W.clone()) == 3
    assert passes(token_weights=keep) == 0.75
    assert passes(beta=torch.linspace(0, 1, N), entry_clip=0.01) == 3
    with torch.no_grad():
        assert passes() == 2


@pytest.mark.parametrize("function", [token_divergence, fused_sampled_token_loss])
def test_statistics_and_sampled_tokens_add_no_products(function):
    N, V, D = 100, 5000, 64
    h_S, h_T, W = random_inputs(N, V, D)
    for needs_gradient, expected in ((True, 3), (False, 2)):
        h_S.requires_grad_(needs_gradient)
        with FlopCounterMode(display=False) as counter:
            result = function(h_S, h_T, W, targets=torch.arange(N), workspace_mib=16)
            if needs_gradient:
                (result if isinstance(result, torch.Tensor) else result.loss.sum()).backward()
        assert counter.get_total_flops() == expected * 2 * N * D * V


@pytest.mark.parametrize("divergence", [(0.5, None), (0, None), (1, None), (0.5, 0.05), (0, 0.05)])
def test_no_host_synchronisation(divergence):
    """Tensors of the meta device have no contents: reading one raises. A CUDA device takes the same
    path, where reading would stall the queue."""
    beta, entry_clip = divergence
    h_S, h_T, W = (t.to("meta") for t in random_inputs(40, 3000, 16))
    w = torch.ones(40, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        w.nonzero()
    h_S.requires_grad_()
    for weights in (None, w):
        loss = fused_jsd_loss(
            h_S, h_T, W, beta=beta, entry_clip=entry_clip, token_weights=weights, workspace_mib=2
        )
        loss.backward()
        assert h_S.grad.shape == h_S.shape


def test_a_shared_head_is_read_once_for_both_sides():
    """[h_S; h_T] Wᵀ is one product: on a long head that is bound by reading W, half the time."""
    h_S, h_T, W = random_inputs(40, 3000, 16)
    for options, products in (({}, 1), ({"W_teacher": W.clone()}, 2)):
        with Allocations() as allocations:
            fused_jsd_loss(h_S, h_T, W, **options)
        assert allocations.ops.count("aten::mm.out") == products


@pytest.mark.parametrize("divergence", [(0.5, None), (0, None), (1, None), (0.5, 0.05), (0, 0.05)])
def test_no_gradient_work_under_no_grad(divergence):
    beta, entry_clip = divergence
    h_S, h_T, W = random_inputs(40, 3000, 16)
    h_S.requires_grad_()
    ops = {}
    for grad in (True, False):
        with Allocations() as allocations, torch.set_grad_enabled(grad):
            fused_jsd_loss(h_S, h_T, W, beta=beta, entry_clip=entry_clip)
        ops[grad] = allocations.ops
    of_the_gradient = {"aten::addcmul.out", "aten::argmax"}
    assert of_the_gradient <= set(ops[True])
    assert not of_the_gradient & set(ops[False])
    assert [ops[grad].count("aten::mm.out") for grad in (True, False)] == [2, 1]


def test_the_function_keeps_one_tensor_for_backward():
    """dh_S in fp32 is all that waits between forward and backward."""
    h_S, h_T, W = random_inputs(40, 3000, 16, torch.bfloat16)
    h_S.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_jsd_loss(h_S, h_T, W, reduction="sum")
    assert [(t.shape, t.dtype) for t in saved] == [((40, 16), torch.float32)]
