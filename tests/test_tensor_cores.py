"""The numerical model of tensor cores, and what follows from it for the op."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from accuracy import CUT_UNITS, exact, noise
from marks import slow
from tensor_cores import (
    ARCHITECTURES,
    FP32_BITS,
    TensorCore,
    matmul,
    multiply_add,
    simulated,
    truncation,
)
from torch import Tensor

from benchmarks.lib.inputs import make_inputs
from opsd_kernels import fused_jsd_loss
from opsd_kernels.kernels import tiles
from opsd_kernels.kernels.logits_tile import INTERPRETED

A100, H100 = ARCHITECTURES["sm_80"], ARCHITECTURES["sm_90"]
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


def dot(a: list[float], b: list[float], c: float, core: TensorCore) -> float:
    """c + Σ a b, on one instruction after the other."""
    a_, b_ = np.array([a]), np.array([b]).T
    return float(multiply_add(a_, b_, np.array([[c]], np.float32), core)[0, 0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("core", "kept"), [(A100, 2), (H100, 4)])
def test_beside_an_accumulator_of_one(core, kept, sign):
    """Its last bit is 2⁻²³; products keep `kept`-ths of it."""
    bit = 2.0**-23

    def beside_one(*products: float) -> float:
        """In last bits, what Σ products adds to 1; all of it negated for a negative sign."""
        a = [sign * product * bit for product in products]
        return (sign * dot(a, [1.0] * len(a), sign, core) - 1) / bit

    assert beside_one(1) == 1
    assert beside_one(0.99) == 0  # nearest is 1
    assert beside_one(1.99) == 1  # nearest is 2
    assert beside_one(*[1 / kept] * kept) == 1  # what is kept adds up
    assert beside_one(*[0.99 / kept] * 8) == 0  # what is not is lost, however often
    assert beside_one(-1 / kept) == -0.5  # below 1 the last bit is half as large
    assert beside_one(-0.99 / kept) == 0


@pytest.mark.parametrize("core", [A100, H100])
def test_the_largest_exponent_decides(core):
    large = 2.0**30
    ones = [1.0, 1.0, 1.0]
    assert dot([large, -large, 1.0], ones, 1.0, core) == 0  # the accumulator is lost too
    assert dot([large, -large, 2.0**5], ones, 0.0, core) == (0 if core is A100 else 2.0**5)
    # Significands of products go up to 4: the exponent of 1.5 · 1.5 is 0, that of 2 is 1.
    least = 2.0**-core.bits
    assert dot([1.5, -1.5], [1.5, 1.5], least, core) == least
    assert dot([2.0, -2.0], [1.0, 1.0], least, core) == 0
    # Blocks of 8 follow each other, where one of 16 loses what is small.
    a = [2.0**26, -(2.0**26), *[0.0] * 6, 1.0]
    assert dot(a, [1.0] * 9, 0.0, core) == (1 if core is A100 else 0)
    assert dot([0.0], [1.0], 0.0, core) == 0


def by_fractions(a: Tensor, b: Tensor, c: float, core: TensorCore) -> float:
    """`dot` by the definition, in rational numbers."""

    def exponent(t: float) -> int:
        return int(np.frexp(t)[1]) - 1

    def cut(t: Fraction, lowest: int) -> Fraction:
        return int(t / Fraction(2) ** lowest) * Fraction(2) ** lowest

    total = Fraction(c)
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    for i in range(0, len(pairs), core.block):
        block = [(x, y) for x, y in pairs[i : i + core.block] if x and y]
        exponents = [exponent(x) + exponent(y) for x, y in block]
        exponents += [exponent(float(total))] if total else []
        if exponents:
            lowest = max(exponents) - core.bits
            products = [cut(Fraction(x) * Fraction(y), lowest) for x, y in block]
            total = cut(total, lowest) + sum(products)
            total = cut(total, exponent(float(total)) - FP32_BITS) if total else total
    return float(total)


@pytest.mark.parametrize("core", [A100, H100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0, 2, 6])
def test_against_the_definition(spread, dtype, core):
    """More blocks than one, the last of them shorter, more columns than are done at a time."""
    g = torch.Generator().manual_seed(spread)
    M, D, N = 2, 37, 300
    a = torch.randn(M, D, generator=g) * 2 ** (spread * torch.randn(M, D, generator=g)).clamp(-9, 9)
    a, b = a.to(dtype), torch.randn(D, N, generator=g).to(dtype)
    a[0, :5] = 0
    c = torch.randn(M, N, generator=g) * (torch.arange(N) % 3)
    got = matmul(a, b, core, c)
    for n in range(0, N, 7):
        for m in range(M):
            assert float(got[m, n]) == by_fractions(a[m], b[:, n], float(c[m, n]), core)


@pytest.mark.parametrize("core", [A100, H100])
def test_sums_of_one_sign_come_out_low(core):
    """Always, by no more than every addition can lose; rounded, they would be high as often."""
    g = torch.Generator().manual_seed(0)
    D = 1000
    a, b = (torch.rand(shape, generator=g).bfloat16() for shape in ((8, D), (D, 64)))
    exact = a.double() @ b.double()
    low = (exact - matmul(a, b, core)) / exact
    assert (low > 0).all()
    kept = 2.0 ** (FP32_BITS - core.bits)
    assert (low < core.steps(D) * (1 + (core.block + 1) * kept) * 2.0**-FP32_BITS).all()
    torch.testing.assert_close(matmul(-a, b, core), -matmul(a, b, core), rtol=0, atol=0)


def test_every_nvidia_architecture_of_the_tile_table_has_a_tensor_core():
    assert set(ARCHITECTURES) == {arch for arch, _ in tiles.TABLE if arch.startswith("sm_")}


def aligned_products(along: float, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [512, D] of random weights, and of hidden states that point `along` times their way."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(512, D, generator=g) / D**0.5
    return (torch.randn(512, D, generator=g) + along * W).to(dtype), W.to(dtype)


@pytest.mark.parametrize("core", [A100, H100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("along", "D"), [(0, 1024), slow(0, 4096), slow(8, 2048), (25, 1024), slow(25, 4096)]
)
def test_what_a_logit_loses_is_predicted(along, D, dtype, core):
    h, W = aligned_products(along, D, dtype)
    # The diagonal of h Wᵀ alone, in blocks.
    cut = torch.cat(
        [matmul(x, w.t(), core).diagonal() for x, w in zip(h.split(16), W.split(16), strict=True)]
    )
    products = h.double() * W.double()
    z = products.sum(1)
    lost = truncation(z, products.norm(dim=1), D, core, dtype)
    low = z - cut
    if along:
        assert 0.7 < low.mean() / lost.mean.mean() < 1.1
    spread = (lost.common.square() + lost.own.square()).mean().sqrt()
    assert 0.8 < (low - lost.mean).std() / spread < 1.35


@interpreted
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("distance", [1e-3, slow(1e-2), slow(0.1), 1.0, slow(3.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_truncation_does_to_loss_and_gradient_is_predicted(dtype, distance, arch):
    """A bound, and one that is not far off: the logits' part of it."""
    core, D = ARCHITECTURES[arch], 2048
    h_S, h_T, W = make_inputs(24, 512, D, dtype, CPU, distance=distance)
    with simulated(core, dtype, last_product=False):
        for beta, entry_clip in ((0.5, None), (0.0, None), (1.0, None), (0.0, 0.05)):
            divergence = {"beta": beta, "entry_clip": entry_clip}
            exact_loss, exact_grad = exact(h_S, h_T, W, **divergence)
            loss_noise, grad_noise = noise(h_S, h_T, W, core=core, **divergence)
            h = h_S.clone().requires_grad_()
            loss = fused_jsd_loss(h, h_T, W, workspace_mib=320, reduction="none", **divergence)
            (grad,) = torch.autograd.grad(loss.sum(), h)
            loss_error = (loss.detach().double() - exact_loss).norm()
            assert 0.2 * loss_noise < loss_error < CUT_UNITS * loss_noise
            rounding = (exact_grad.to(dtype).double() - exact_grad).norm()
            error = (grad.double() - exact_grad).norm()
            assert error < (rounding**2 + (CUT_UNITS * grad_noise) ** 2).sqrt()
            if grad_noise > 0.3 * rounding:
                assert error > (rounding**2 + (0.2 * grad_noise) ** 2).sqrt()


@pytest.mark.parametrize("core", [A100, H100])
@pytest.mark.parametrize("chain", [8192, 65536])
def test_what_the_last_product_loses_is_predicted(chain, core):
    """In long chains of entries of the vocabulary."""
    N, V, D = 4, 65536, 16
    h_S, h_T, W = make_inputs(N, V, D, torch.bfloat16, CPU, distance=0.1, confidence=5.0)
    z_S, z_T = h_S.double() @ W.double().t(), h_T.double() @ W.double().t()
    g = (z_T.softmax(-1) - z_S.softmax(-1)).bfloat16()
    exact_product = g.double() @ W.double()
    got = sum(
        matmul(g_v, W_v, core) for g_v, W_v in zip(g.split(chain, 1), W.split(chain), strict=True)
    )
    chains = V // chain
    size = (g.double().square() @ W.double().square() / chains).sqrt()
    lost = truncation(exact_product / chains, size, chain, core, torch.bfloat16)
    spread = chains * (lost.common.square() + lost.own.square())
    predicted = ((chains * lost.mean).square() + spread).sum().sqrt()
    assert 0.3 < (got - exact_product).norm() / predicted < CUT_UNITS


@interpreted
def test_every_product_of_the_op_is_simulated():
    """The logit-free kernels make the logits that a library makes, and neither rounds."""
    h_S, h_T, W = make_inputs(8, 300, 1024, torch.bfloat16, CPU, distance=1.0)
    exact_loss, _ = exact(h_S, h_T, W)
    errors = []
    for workspace_mib in (0, 320):
        with simulated(A100, torch.bfloat16):
            h = h_S.clone().requires_grad_()
            loss = fused_jsd_loss(h, h_T, W, workspace_mib=workspace_mib, reduction="none")
            loss.sum().backward()
        errors.append(loss.detach() - exact_loss)
    plain = fused_jsd_loss(h_S, h_T, W, workspace_mib=0, reduction="none")
    assert (errors[0] - errors[1]).norm() < 0.3 * errors[0].norm()
    assert (plain - exact_loss).norm() < 0.3 * errors[0].norm()


@interpreted
@pytest.mark.parametrize("workspace_mib", [0, 320])
def test_the_last_product_is_simulated(workspace_mib):
    """As if it kept next to nothing, which nothing but the gradient may notice."""
    h_S, h_T, W = make_inputs(8, 300, 64, torch.bfloat16, CPU, distance=1.0)
    h = h_S.clone().requires_grad_()

    def loss_and_grad(core: TensorCore, **products: bool) -> tuple[Tensor, Tensor]:
        with simulated(core, torch.bfloat16, **products):
            loss = fused_jsd_loss(h, h_T, W, workspace_mib=workspace_mib)
            (grad,) = torch.autograd.grad(loss, h)
        return loss.detach(), grad.float()

    coarse = TensorCore(block=8, bits=3)
    loss, grad = loss_and_grad(A100)
    same_loss, coarse_grad = loss_and_grad(coarse, logits=False)
    torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=0)
    assert (coarse_grad - grad).norm() > 0.1 * grad.norm()


def test_fp32_has_no_such_products():
    with (
        pytest.raises(ValueError, match=r"must be torch\.bfloat16 or torch\.float16"),
        simulated(A100, torch.float32),
    ):
        pass
