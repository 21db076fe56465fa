"""log p of tokens without a teacher, against the oracle in every schedule, with the head frozen and
trained: values, gradients, and what they cost."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from heads import EXTRAS, as_head, logits, logits_of_products
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import language_like_inputs, random_inputs
from test_trained_head import WAYS, close, interpreted
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.allocations import Allocations
from benchmarks.lib.measure import counted_dots
from opsd_kernels import (
    LMHead,
    checks,
    fused_log_probs,
    fused_sampled_token_loss,
    reference_log_probs,
)
from opsd_kernels.schedules import planning, row_workspace
from opsd_kernels.schedules.planning import make_plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIB = 2**20
# Of errors in units, as in accuracy.py: in thousands of cases at most 4.7, of a gradient that is a
# single number; else below 2.
UNITS = 6.0
# Without weights that are known beforehand a trained head gets its gradient in backward.
WAYS = {name: way for name, way in WAYS.items() if name != "rows, forward"}


def gradients(function: Any, h: Tensor, head: LMHead, *rest: Any, trained: bool = True,
              upstream: Tensor | None = None, **options: Any) -> list[Tensor]:  # fmt: skip
    """Log-probabilities, and the gradients of their sum, weighed by `upstream`."""
    h = h.detach().clone().requires_grad_()
    head = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(trained), head)
    log_p = function(h, head, *rest, **options)
    if upstream is None:
        upstream = torch.ones_like(log_p)
    log_p.backward(upstream.to(log_p))
    found = [log_p.detach(), h.grad]
    if trained:
        found += [head.weight.grad] + ([] if head.bias is None else [head.bias.grad])
    return found


def by(way: str, *args: Any, **options: Any) -> list[Tensor]:
    op, workspace_mib, with_rows = WAYS[way]
    args, options = tree_map_only(Tensor, lambda t: t.to(op.device), (args, options))
    # On a CPU `rows` is interpreted.
    uses = with_rows or op.device.type == "cuda"
    with mock.patch.object(planning, "uses_rows_kernel", return_value=uses):
        found = gradients(fused_log_probs, *args, workspace_mib=workspace_mib, **options)
    return [t.cpu() for t in found]


def exact(*args: Any, **options: Any) -> list[Tensor]:
    args, options = tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, options)
    )
    return gradients(reference_log_probs, *args, **options)


def textbook(h: Tensor, head: Tensor | LMHead, targets: Tensor, temperature: float) -> Tensor:
    log_p = logits(h, head, temperature).log_softmax(-1)
    return log_p.gather(-1, targets[..., None])[..., 0]


@given(extras=EXTRAS, temperature=st.sampled_from([1.0, 0.6]), seed=st.integers(0, 2**16))
@settings(max_examples=20)
def test_oracle_is_the_formula(extras, temperature, seed):
    h, _, W = (t.double() for t in random_inputs(7, 40, 6, size=2.0, seed=seed))
    # Of what is not banned.
    targets = 3 * torch.arange(7)
    head = LMHead(W) if extras is None else extras.heads(W, None, seed)[0]
    head = head._replace(weight=head.weight.nan_to_num(0.0))
    upstream = torch.linspace(-1, 2, 7)
    found = gradients(reference_log_probs, h, head, targets, upstream=upstream,
                      temperature=temperature)  # fmt: skip
    true = gradients(textbook, h, head, targets, temperature, upstream=upstream)
    for got, expected in zip(found, true, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_its_mean_is_the_cross_entropy(op):
    """As PyTorch has it, with its label of what is to be left out."""
    h, _, W = random_inputs(12, 60, 8, size=2.0)
    h, targets = h.view(3, 4, 8).requires_grad_(), torch.arange(12).view(3, 4) * 5
    targets[0, 1] = targets[2, 2] = -100
    expected = F.cross_entropy((h @ W.t()).flatten(0, 1), targets.flatten(), ignore_index=-100)
    (grad,) = torch.autograd.grad(expected, h)
    counts = targets != -100
    log_p = op.run(fused_log_probs, h, W, targets, token_weights=counts)
    assert log_p.shape == (3, 4)
    assert log_p.dtype == torch.float32
    loss = -log_p.sum() / counts.sum()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(h.grad, grad)


DRAWN = {
    "N": st.integers(1, 9),
    "V": st.sampled_from([1, 2, 17, 300]),
    "D": st.sampled_from([1, 8, 33]),
    "dtype": st.sampled_from(DTYPES),
    "temperature": st.sampled_from([1.0, 0.5, 1.7]),
    "log_size": st.floats(-2, 1.2),
    "extras": EXTRAS,
    "trained": st.booleans(),
    "likely": st.booleans(),
    "seed": st.integers(0, 2**16),
}


@given(**DRAWN)
@settings(max_examples=200)
def test_against_oracle_in_pytorch(**drawn):
    check_against_oracle("PyTorch, backward", **drawn)


@given(**DRAWN)
@settings(max_examples=20)  # the interpreter takes its time
def test_against_oracle_logit_free(**drawn):
    check_against_oracle("logit-free", **drawn)


@given(**DRAWN)
@settings(max_examples=8)
def test_against_oracle_with_rows(**drawn):
    check_against_oracle("rows, backward", **drawn)


def check_against_oracle(
    way, N, V, D, dtype, temperature, log_size, extras, trained, likely, seed
):  # fmt: skip
    h, _, W = random_inputs(N, V, D, dtype, size=10**log_size, seed=seed)
    head = LMHead(W) if extras is None else extras.heads(W, None, seed)[0]
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (N,), generator=g) // 3 * 3  # none is banned
    if likely:
        targets = logits(h, head).argmax(-1)
    upstream = torch.randn(N, generator=g)
    options = {"trained": trained, "upstream": upstream, "temperature": temperature}
    # Padded rows are NaN: nothing may come of them.
    found = by(way, h, head, targets, **options)
    true = exact(h, head, targets, **options)
    assert [t.dtype for t in found] == [torch.float32] + [dtype] * (len(found) - 1)
    tiles = dtype != torch.float32 and "PyTorch" not in way
    units = units_of(h, head, targets, upstream.double(), temperature, tiles)
    for got, expected, unit in zip(found, true, units, strict=False):
        assert (got.double() - expected).norm() <= UNITS * unit


def units_of(
    h: Tensor, head: LMHead, targets: Tensor, upstream: Tensor, temperature: float, tiles: bool
) -> list[float]:
    """What rounding makes of log p and of the gradients of h, weight and bias: that of their
    dtypes, of the tiles that they are sums of, and of the last bits of logits, normalizers and
    entries."""
    generator = torch.Generator().manual_seed(0)
    dtype, h = h.dtype, h.double()
    head = tree_map_only(Tensor, Tensor.double, as_head(head))
    u = h @ head.weight.t()
    of_bias = torch.zeros(1) if head.bias is None else head.bias.nan_to_num(neginf=0.0).abs()
    size = h.norm(dim=1)[:, None] * head.weight.norm(dim=1) + of_bias
    of_normalizer = 1 + math.log(u.shape[1])
    is_target = F.one_hot(targets, u.shape[1])

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def results(bit: float) -> list[Tensor]:
        z, slope = logits_of_products(u + bit * randn(*u.shape) * size, head)
        z = z / temperature
        z = z + bit * randn(*z.shape) * z.nan_to_num(neginf=0.0).abs()  # of the cap
        log_p = z.log_softmax(-1) + bit * randn(len(z), 1) * of_normalizer
        g = is_target - log_p.exp()
        g = torch.where(is_target > 0, -(g * (1 - is_target)).sum(-1, keepdim=True), g)
        g = g * (1 + bit * randn(*g.shape)) * slope / temperature * upstream[:, None]
        if tiles and bit:
            g = g * (1 + torch.finfo(dtype).eps / 2 * randn(*g.shape))
        return [log_p.gather(1, targets[:, None])[:, 0], g @ head.weight, g.t() @ h, g.sum(0)]

    true, moved = results(0.0), [results(2.0**-24) for _ in range(16)]
    units = []
    for i, t in enumerate(true):
        rounding = (t.to(dtype if i else torch.float32).double() - t).norm()
        change = torch.stack([(m[i] - t).norm() for m in moved]).square().mean().sqrt()
        units.append(float(rounding + change) + torch.finfo(torch.float32).tiny)
    return units


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_hidden_states_are_rounded_once(way, trained):
    """On peaked distributions, in units of the rounding of the exact gradient to bf16 alone."""
    h, _, W = language_like_inputs(24, 900, 48, torch.bfloat16, 0.0)
    g = torch.Generator().manual_seed(0)
    targets = logits(h, W).softmax(-1).multinomial(1, generator=g)[:, 0]
    true = exact(h, LMHead(W), targets)[1]
    found = by(way, h, LMHead(W), targets, trained=trained)[1]
    rounding = (true.bfloat16() - true).norm()
    assert (found - true).norm() / rounding < (1.05 if "PyTorch" in way else 1.5)


def test_as_a_sampled_token_loss_says(op):
    h, h_T, W = random_inputs(20, 300, 16, distance=0.5)
    targets = torch.arange(20)
    told = op.run(fused_sampled_token_loss, h, h_T, W, targets, return_log_probs=True)
    found = op.run(fused_log_probs, h, W, targets)
    torch.testing.assert_close(found, told.logp_student, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_weights_and_what_does_not_count(way, trained):
    """The gradient is that of w log p; of a token that is dropped nothing is looked at, and a NaN
    stays in its row of the hidden states."""
    h, _, W = random_inputs(16, 300, 16)
    w, targets = torch.arange(16) % 4 / 2, torch.arange(16) * 7
    keep = w != 0
    expected = by(way, h, LMHead(W), targets, trained=trained, upstream=w)
    h[~keep], targets[~keep] = torch.nan, -100
    found = by(way, h, LMHead(W), targets, trained=trained, token_weights=w)
    torch.testing.assert_close(found[0][keep], (w * expected[0])[keep])
    torch.testing.assert_close(found[1][keep], expected[1][keep])
    assert (found[0][~keep] == 0).all()
    assert (found[1][~keep] == 0).all()
    if trained:
        torch.testing.assert_close(found[2], expected[2])
    nothing = by(way, h, LMHead(W), targets, trained=trained, token_weights=torch.zeros(16))
    assert all((t == 0).all() for t in nothing)
    empty = by(way, h[:0], LMHead(W), targets[:0], trained=trained)
    assert empty[0].shape == (0,)
    assert all((t == 0).all() for t in empty)
    if not trained:
        bad = h.clone()
        bad[keep.nonzero()[3]] = torch.nan
        again = by(way, bad, LMHead(W), targets, trained=False, token_weights=w)
        for got, before in zip(again, found, strict=True):
            isnan = got.reshape(16, -1).isnan().any(1)
            assert isnan.nonzero().tolist() == keep.nonzero()[3:4].tolist()
            assert torch.equal(got[~isnan], before[~isnan])


@pytest.mark.parametrize("way", WAYS)
def test_a_token_that_is_banned(way):
    h, _, W = random_inputs(6, 50, 8)
    bias = torch.zeros(50)
    bias[3] = -torch.inf
    targets = torch.tensor([3, 4, 5, 3, 6, 7])
    found = by(way, h, LMHead(W, bias), targets)
    true = exact(h, LMHead(W, bias), targets)
    banned = targets == 3
    assert (found[0][banned] == -torch.inf).all()
    assert (found[1][banned] == 0).all()
    for got, expected in zip(found, true, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_a_second_backward_and_a_loss_scale_of_fp16(way):
    h, _, W = random_inputs(16, 300, 16, torch.float16)
    targets = torch.arange(16)
    upstream = 2.0**14 * torch.linspace(-1, 1, 16)
    true = exact(h, LMHead(W), targets, upstream=upstream)
    close(by(way, h, LMHead(W), targets, upstream=upstream), true, torch.float16, 1e-5)

    op, workspace_mib, _ = WAYS[way]
    h, W, targets = (t.to(op.device) for t in (h, W, targets))
    log_p = fused_log_probs(h.requires_grad_(), W, targets, workspace_mib=workspace_mib)
    (once,) = torch.autograd.grad(log_p.sum(), h, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * log_p.sum(), h)
    torch.testing.assert_close(twice, 2 * once)
    log_p = fused_log_probs(h, W, targets, workspace_mib=workspace_mib)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(log_p.sum(), h, create_graph=True)


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_with_a_head_in_fp32(op, trained):
    h, _, W = random_inputs(40, 300, 16)
    head, targets = LMHead(W, torch.linspace(-1, 1, 300)), torch.arange(40)
    true = exact(*tree_map_only(Tensor, Tensor.bfloat16, (h, head)), targets, trained=trained)

    def autocast(*args: Any, **options: Any) -> Tensor:
        with torch.autocast(op.device.type, dtype=torch.bfloat16):
            return op.run(fused_log_probs, *args, **options)

    found = gradients(autocast, h, head, targets, trained=trained)
    assert [t.dtype for t in found[1:]] == [torch.float32] * (len(found) - 1)
    close(found, true, torch.bfloat16, 1e-3)


def test_one_graph(op):
    """Whatever the number of tokens, which is a symbol."""
    torch._dynamo.reset()
    h, _, W = (t.to(op.device) for t in random_inputs(30, 300, 16))
    targets = torch.arange(30, device=op.device)

    def loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        head = LMHead(weight, None, 5.0, 0.5, 290)
        return fused_log_probs(2 * h, head, targets, workspace_mib=op.workspace_mib).exp().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (30, 20):
        results = []
        for call in (loss, compiled):
            leaves = h[:N].clone().requires_grad_(), W.clone().requires_grad_()
            value = call(*leaves, targets[:N])
            value.backward()
            results.append([value.detach(), *(t.grad for t in leaves)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


# --- what it costs


@interpreted
@pytest.mark.parametrize("trained", [False, True])
def test_passes(trained):
    """Logit-free 3 U, in the row workspace 2 U, without gradient 1 U; of a trained head 5 and 4."""
    N, V, D = 32, 1024, 64
    h, _, W = random_inputs(N, V, D)
    for way, U in (("logit-free", 5 if trained else 3), ("PyTorch, backward", 4 if trained else 2)):
        with counted_dots() as dots, FlopCounterMode(display=False) as library:
            by(way, h, LMHead(W), torch.arange(N), trained=trained)
        assert 2 * sum(dots) + library.get_total_flops() == U * 2 * N * D * V
        workspace_mib = WAYS[way][1]
        with counted_dots() as dots, FlopCounterMode(display=False) as library, torch.no_grad():
            fused_log_probs(h, W, torch.arange(N), workspace_mib=workspace_mib)
        assert 2 * sum(dots) + library.get_total_flops() == 2 * N * D * V


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [65536, 3000])
def test_workspace_bounds_all_temporaries(V, dtype):
    N, D, mib = (100 if V > 3000 else 1000), 50, 4
    h, _, W = random_inputs(N, V, D, dtype)
    with Allocations(smallest=8 * 1024) as allocations:
        log_p = fused_log_probs(h.requires_grad_(), W, torch.arange(N), workspace_mib=mib)
        log_p.sum().backward()
    N_by_D = 2 * N * D * 4 + 8 * N * 4
    assert allocations.peak <= mib * MIB + N_by_D
    assert allocations.peak > min(mib * MIB, 4 * N * V) / 3  # and it is used


def test_a_workspace_row_is_one_side():
    """Without a teacher there are twice as many rows of logits in the same memory."""
    h, h_T, W = random_inputs(4000, 30000, 8)
    targets = torch.zeros(4000, dtype=torch.int32)
    problem = row_workspace.Problem(h, h_T, W, None, torch.float32, None, targets=targets)
    bytes_of = []
    for some in (problem, problem.without_teacher()):
        workspace, _ = row_workspace.allocate(some, make_plan(some, 4000, 64 * MIB), True)
        bytes_of.append(workspace.nbytes)
    assert 0.9 < bytes_of[1] / bytes_of[0] <= 1.1


@interpreted
@pytest.mark.parametrize("trained", [False, True])
def test_logit_free_has_nothing_vocabulary_sized(trained):
    """Beside dW, which is returned; and from forward to backward 37 bytes a token are kept."""
    V, D = 1200, 16
    kept = []
    for N in (70, 140):
        h, _, W = (t.bfloat16().requires_grad_() for t in random_inputs(N, V, D))
        W.requires_grad_(trained)
        targets = torch.arange(N, dtype=torch.int32)
        with Allocations() as allocations:
            log_p = fused_log_probs(h, W, targets, workspace_mib=0)
            kept.append(allocations.alive)
            log_p.sum().backward()
        of_vocabulary = [tuple(s) for s in allocations.shapes if max(s, default=0) >= V]
        assert of_vocabulary == [(V, D)] * trained
    # What is known of a row and its target, or its gradient; what PyTorch keeps of log p, of where
    # it is −∞, and of whether the target is in the vocabulary; and the interpreter, of targets and
    # of log p, as what it was given last.
    per_token = 40 + 4 if trained else 4 * D
    assert kept[1] - kept[0] <= 70 * (per_token + 4 + 1 + 4 + 8)


# --- what is refused

H, HEAD, TARGETS = torch.ones(6, 5), torch.ones(20, 5), torch.arange(6)


@pytest.mark.parametrize("function", [fused_log_probs, reference_log_probs])
@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "h must be a torch.Tensor, got list", {"h": [[1.0]]}),
        (TypeError, "h must be one of .*, got torch.int64", {"h": H.long()}),
        (ValueError, r"h must be \[..., D\], got a scalar", {"h": H[0, 0]}),
        (ValueError, "^h has 4 features, W 5: h .6, 4. must be", {"h": H[:, :4]}),
        (TypeError, "W is torch.float16, h torch.float32", {"W": HEAD.half()}),
        (ValueError, "W is on meta, h on cpu", {"W": HEAD.to("meta")}),
        (TypeError, "targets must be a torch.Tensor, got NoneType", {"targets": None}),
        (TypeError, "targets must be integers", {"targets": TARGETS.float()}),
        (ValueError, r"targets must have .* \[6\] of h, got \[5\]", {"targets": TARGETS[:5]}),
        (ValueError, "targets is on meta, h on cpu", {"targets": TARGETS.to("meta")}),
        (ValueError, r"targets must lie in \[0, 20\)", {"targets": TARGETS - 1}),
        (ValueError, "temperature must be positive", {"temperature": 0}),
        (ValueError, r"token_weights .* \[6\] of h", {"token_weights": torch.ones(5)}),
        (ValueError, "token_weights must be finite", {"token_weights": torch.full((6,), math.nan)}),
    ],
)
def test_refused(function, error, message, changed):
    arguments = {"h": H, "W": HEAD, "targets": TARGETS} | changed
    with pytest.raises(error, match=message):
        function(**arguments)


def test_the_least_workspace_is_named():
    h, _, W = random_inputs(6, 30011, 40)
    with pytest.raises(ValueError, match="cannot hold one row of V=30011") as refusal:
        fused_log_probs(h, W, TARGETS, workspace_mib=1e-3)
    with pytest.raises(ValueError, match="workspace_mib must be finite and not negative"):
        fused_log_probs(h, W, TARGETS, workspace_mib=-1)
    least = float(str(refusal.value).rpartition("=")[2])
    found = fused_log_probs(h, W, TARGETS, workspace_mib=least)
    torch.testing.assert_close(found, fused_log_probs(h, W, TARGETS))


def test_a_target_outside_the_vocabulary_where_it_cannot_be_read(op):
    """As on a GPU, where an error would have the host wait: NaN, of that token alone."""
    h, _, W = random_inputs(6, 40, 8)
    targets = torch.tensor([0, 39, 40, 5, -1, 7])
    with mock.patch.object(checks, "is_readable", return_value=False):
        found = op.run(fused_log_probs, h, W, targets)
        weights = torch.tensor([1.0, 1, 0, 1, 0, 1])
        dropped = op.run(fused_log_probs, h, W, targets, token_weights=weights)
    assert found.isnan().tolist() == [False, False, True, False, True, False]
    inside = [0, 1, 3, 5]
    expected = op.run(fused_log_probs, h[inside], W, targets[inside])
    torch.testing.assert_close(found[inside], expected, rtol=1e-6, atol=1e-6)
    assert dropped[[2, 4]].tolist() == [0, 0]
