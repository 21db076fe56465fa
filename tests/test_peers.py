"""The mistakes others made (each seen in a released library), and equality where they are right."""

import math
from functools import partial

import pytest
import textbook
import torch
from accuracy import exact
from inputs import language_like_inputs, random_inputs
from schedules import DEVICE

from benchmarks.lib import peers
from opsd_kernels import fused_log_probs

BETAS = [0.0, 0.3, 0.5, 1.0]


@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("peer", ["eager", "TRL", "Liger, chunked"])
def test_equal_to_the_peers_where_they_are_right(op, peer, beta, temperature):
    """fp32, student and teacher well apart: there the textbook forms hold."""
    package = {"TRL": "trl", "Liger, chunked": "liger_kernel"}.get(peer, "torch")
    pytest.importorskip(package, reason=f"needs {package}")
    h_S, h_T, W = random_inputs(20, 500, 16, distance=1.0)
    results = []
    theirs = {**peers.METHODS, "Liger, chunked": partial(peers.liger_chunked, compiled=False)}
    for loss in (op, theirs[peer]):
        h = h_S.clone().requires_grad_()
        value = loss(h, h_T, W, beta=beta, temperature=temperature)
        value.backward()
        results.append((value.detach(), h.grad))
    (ours, our_grad), (theirs, their_grad) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert (our_grad - their_grad).norm() < 1e-5 * our_grad.norm()


@pytest.mark.parametrize("peer", ["eager", "Liger", "CCE, torch.compile"])
def test_cross_entropies_are_equal(op, peer):
    """fp32: values, and gradients of hidden states and head. Liger's kernel is interpreted."""
    needed = {"Liger": "liger_kernel", "CCE, torch.compile": "cut_cross_entropy"}
    package = needed.get(peer, "torch")
    pytest.importorskip(package, reason=f"needs {package}")
    h, _, W = random_inputs(20, 500, 16)
    targets = 7 * torch.arange(20)

    def ours(*args):
        return -op.run(fused_log_probs, *args).mean()

    def theirs(*args):
        return peers.CROSS_ENTROPIES[peer](*(t.to(DEVICE) for t in args)).cpu()

    results = []
    with torch.compiler.set_stance("force_eager"):
        for loss in (ours, theirs):
            leaves = [t.clone().requires_grad_() for t in (h, W)]
            value = loss(*leaves, targets)
            value.backward()
            results.append([value.detach(), *(t.grad for t in leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-8)


def gradient(loss, h_S, h_T, W, **options):
    h = h_S.clone().requires_grad_()
    loss(h, h_T, W, **options).backward()
    return h.grad.double()


def test_logits_are_not_rounded_to_bf16(op):
    """Mistake 1. Eager bf16 logits at JSD near 1e-5: gradient and loss are mostly noise."""
    h_S, h_T, W = language_like_inputs(32, 8192, 128, torch.bfloat16, distance=0.01)
    loss, grad = exact(h_S, h_T, W)
    loss, grad = loss.mean(), grad / 32

    def error(other):
        return float((gradient(other, h_S, h_T, W) - grad).norm() / grad.norm())

    assert loss < 1e-4
    assert error(peers.eager) > 0.05
    assert error(op) < 0.002  # bf16's own rounding of the result
    assert abs(float(op(h_S, h_T, W) / loss) - 1) < 1e-4


def test_small_kl_is_not_lost(op):
    """Mistake 2. Σ q x in fp32 at KL near 1e-7: zero, negative or anything."""
    h_S, h_T, W = random_inputs(32, 16384, 128, distance=5e-4)
    expected, _ = exact(h_S, h_T, W, beta=0)
    naive = textbook.divergence(h_S @ W.T, h_T @ W.T, beta=0)
    ours = op(h_S, h_T, W, beta=0, reduction="none")
    assert expected.max() < 1e-6
    assert ((naive - expected) / expected).abs().max() > 0.5
    assert ((ours - expected) / expected).abs().max() < 0.01


@pytest.mark.parametrize("beta", [0.3, 0.5])
def test_both_probabilities_may_vanish(op, beta):
    """Mistake 3. log(βq + (1−β)p) with both below e^−104, or both logits −∞, was NaN."""
    W = torch.tensor([[100.0, 0.0], [0.0, 1.0], [-100.0, 1.0], [-3e38, 0.0]])
    h_S, h_T = torch.tensor([[2.0, 0.5]]), torch.tensor([[2.0, 0.1]])
    h = h_S.requires_grad_()
    loss = op(h, h_T, W, beta=beta)
    loss.backward()
    assert (h_S @ W.T)[0, 3] == -math.inf
    assert loss.isfinite()
    assert h.grad.isfinite().all()


def test_saved_gradient_is_not_scaled_in_place(op):
    """Mistake 4. A second backward, with another scale, must not see the first."""
    h_S, h_T, W = random_inputs(8, 50, 6)
    h = h_S.requires_grad_()
    loss = op(h, h_T, W)
    (once,) = torch.autograd.grad(3 * loss, h, retain_graph=True)
    (again,) = torch.autograd.grad(loss, h)
    torch.testing.assert_close(once, 3 * again)


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_goes_through_the_mixture(op, beta):
    """Mistake 5. The first-order (1−β)(p − m) is another direction; ours is the true one."""
    h_S, h_T, W = random_inputs(8, 300, 16, distance=1.0)
    ours = gradient(op, h_S, h_T, W, beta=beta).flatten()
    _, true = exact(h_S, h_T, W, beta=beta)
    cosine = torch.nn.functional.cosine_similarity(ours, true.flatten(), dim=0)
    assert cosine > 1 - 1e-9


def test_gradient_is_summed_in_fp32_and_rounded_once(op):
    """Mistake 7. Rounded per vocabulary chunk, errors add up with the number of chunks: here a
    small budget makes W pass in hundreds of tiles of bf16."""
    h_S, h_T, W = random_inputs(16, 20000, 128, torch.bfloat16, distance=0.3)
    _, true = exact(h_S, h_T, W)
    rounding = (true.bfloat16().double() - true).norm()
    grad = gradient(op, h_S, h_T, W, reduction="sum", workspace_mib=0 if op.logit_free else 1)
    assert (grad - true).norm() < 1.05 * rounding


def test_beta_zero_is_forward_kl_of_teacher_from_student(op):
    """Mistake 10. Which KL is which, on a case where they differ by a factor."""
    p, q = torch.tensor([0.99, 0.01]), torch.tensor([0.5, 0.5])
    h_S, h_T = p.log()[None], q.log()[None]
    W = torch.eye(2)
    forward, reverse = (q * (q / p).log()).sum(), (p * (p / q).log()).sum()
    assert forward > 2 * reverse
    torch.testing.assert_close(op(h_S, h_T, W, beta=0), forward)
    torch.testing.assert_close(op(h_S, h_T, W, beta=1), reverse)
