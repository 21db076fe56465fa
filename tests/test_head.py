"""`LMHead`: a head that is more than a matrix. That any is right in any case is drawn in the tests
of the losses; here is what can be said of a head alone."""

import math
from unittest import mock

import pytest
import textbook
import torch
import triton
import triton.language as tl
from accuracy import exact
from heads import as_head, logits
from inputs import random_inputs
from marks import slow
from schedules import DEVICE, LOGIT_FREE, ROW_WORKSPACE
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.lib.allocations import Allocations
from opsd_kernels import (
    Divergence,
    FusedJSDLoss,
    LMHead,
    checks,
    fused_jsd_loss,
    fused_log_probs,
    fused_sampled_token_loss,
    fused_top_k_loss,
    reference_jsd_loss,
    reference_sampled_token_loss,
    token_divergence,
)
from opsd_kernels.checks import check_arguments
from opsd_kernels.heads.head import LogitMap
from opsd_kernels.kernels.head import logits_and_slope
from opsd_kernels.schedules import planning

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
V = 50


def head_of(W: Tensor, softcap: float | None = 2.0, scale: float = 0.7, seed: int = 0) -> LMHead:
    g = torch.Generator().manual_seed(seed)
    bias = torch.randn(W.shape[0], generator=g, dtype=torch.float64).to(W.dtype)
    return LMHead(W, bias, softcap, scale)


# --- the oracle


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("entry_clip", [None, 0.05])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.8, 1.0])
def test_oracle_is_the_formula(beta, entry_clip, softcap):
    h_S, h_T, W = (t.double() for t in random_inputs(7, V, 6, size=2.0, distance=0.5))
    W_T = W + 0.1
    head, head_T = head_of(W, softcap), head_of(W_T, None if softcap is None else 3.0, 1.2, seed=1)
    options = {"beta": beta, "entry_clip": entry_clip, "temperature": 1.3}
    for teacher in (None, head._replace(scale=0.5), head_T):
        loss, grad = exact(h_S, h_T, head, W_teacher=teacher, **options)
        h = h_S.clone().requires_grad_()
        z_T = logits(h_T, head if teacher is None else teacher, 1.3)
        expected = textbook.divergence(logits(h, head, 1.3), z_T, beta, entry_clip)
        expected.sum().backward()
        assert (loss - expected).abs().max() < 1e-13
        assert (grad - h.grad).abs().max() < 1e-13


def test_oracle_gradcheck():
    h_S, h_T, W = (t.double() for t in random_inputs(3, 11, 4, distance=0.5))
    head = head_of(W)
    assert torch.autograd.gradcheck(
        lambda h: reference_jsd_loss(h, h_T, head, temperature=1.3), h_S.requires_grad_()
    )


# --- what a head's parts mean


def check_same(op, first, second, beta=0.5, **options):
    """Of (h_S, h_T, W, W_teacher): loss and gradient are those of another problem."""
    results = [
        op.loss_and_grad(*problem[:3], W_teacher=problem[3], beta=beta, **options)
        for problem in (first, second)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_banned_entry_is_as_if_its_row_were_not_there(op, beta, softcap):
    h_S, h_T, W = random_inputs(6, V, 8)
    head = head_of(W, softcap)
    banned = torch.arange(V) % 3 == 1
    with_bans = head._replace(bias=head.bias.masked_fill(banned, -math.inf))
    without = head._replace(weight=W[~banned], bias=head.bias[~banned])
    check_same(op, (h_S, h_T, with_bans, None), (h_S, h_T, without, None), beta)


def test_an_entry_that_one_side_bans(op):
    """No mass where the other has some: the KL in that direction is infinite, with gradient 0, and
    nothing else is."""
    h_S, h_T, W = random_inputs(6, V, 8)
    head = head_of(W)
    bans = head._replace(bias=head.bias.clone().index_fill_(0, torch.tensor([3, 40]), -math.inf))
    for student, teacher, infinite in ((bans, head, 0.0), (head, bans, 1.0)):
        for beta in (0.0, 0.3, 1.0):
            loss, grad = op.loss_and_grad(h_S, h_T, student, W_teacher=teacher, beta=beta)
            assert (loss == math.inf).all() == (beta == infinite)
            assert grad.isfinite().all()
            assert (grad == 0).all() == (beta == infinite)
            expected = exact(h_S, h_T, student, W_teacher=teacher, beta=beta)
            torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(grad.double(), expected[1], rtol=1e-4, atol=1e-6)


def test_padded_rows_count_for_nothing(op):
    h_S, h_T, W = random_inputs(6, V, 8)
    head = head_of(W)
    nan = torch.full((7, 8), math.nan)
    padded = head._replace(
        weight=torch.cat([W, nan]), bias=torch.cat([head.bias, nan[:, 0]]), vocab_size=V
    )
    loss, grad = op.loss_and_grad(h_S, h_T, head)
    assert torch.equal(op.loss_and_grad(h_S, h_T, padded)[0], loss)
    assert torch.equal(op.loss_and_grad(h_S, h_T, padded, W_teacher=head)[1], grad)
    assert torch.equal(op.loss_and_grad(h_S, h_T, LMHead(padded.weight, vocab_size=V))[0],
                       op.loss_and_grad(h_S, h_T, W)[0])  # fmt: skip


def test_a_scale_is_a_temperature_of_its_side(op):
    h_S, h_T, W = random_inputs(6, V, 8)
    loss, grad = op.loss_and_grad(h_S, h_T, W, temperature=2.0)
    same = op.loss_and_grad(h_S, h_T, LMHead(W, scale=0.5))
    assert torch.equal(same[0], loss)
    assert torch.equal(same[1], grad)
    check_same(op, (h_S, h_T, W, LMHead(W, scale=0.5)), (h_S, 0.5 * h_T, W, None))
    of_student, _ = op.loss_and_grad(h_S, h_T, LMHead(W, scale=0.5), W_teacher=W)
    torch.testing.assert_close(of_student, op.loss_and_grad(0.5 * h_S, h_T, W)[0])


def test_a_head_that_is_a_matrix_is_that_matrix(op):
    h_S, h_T, W = random_inputs(6, V, 8)
    loss, grad = op.loss_and_grad(h_S, h_T, W)
    for W_teacher in (None, W, LMHead(W)):
        same = op.loss_and_grad(h_S, h_T, LMHead(W), W_teacher=W_teacher)
        assert torch.equal(same[0], loss)
        assert torch.equal(same[1], grad)


def test_one_weight_is_read_once_for_both_sides():
    """Whatever else the two heads have, and whichever views they came in."""
    h_S, h_T, W = random_inputs(6, V, 8)
    student = LMHead(W, vocab_size=40)
    for teacher, shared in (
        (None, True),
        (W[:40], True),
        (LMHead(W.detach(), torch.zeros(V), 5.0, 2.0, 40), True),
        (LMHead(W.clone(), vocab_size=40), False),
        (W[1:41], False),
    ):
        hidden = {"h_student": h_S, "h_teacher": h_T}
        arguments = check_arguments(hidden, student, Divergence(beta=0.5), teacher)
        assert (arguments.problem.W_T is None) == shared


@pytest.mark.parametrize("way", ["logit-free", "row workspace", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_tokens(way, dtype):
    h_S, h_T, W = random_inputs(9, 300, 16, dtype, size=3.0)
    head = head_of(W)
    teacher = LMHead(W, None, 4.0, 1.1)
    targets = torch.arange(9) * 30
    targets[::2] = logits(h_S, head).argmax(-1)[::2]
    h = h_S.double().requires_grad_()
    wide, wide_T = tree_map_only(Tensor, Tensor.double, (head, teacher))
    log_p = logits(h, wide).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    log_q = logits(h_T, wide_T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = (log_p - log_q).detach() * log_p
    expected.sum().backward()
    h_ref = h_S.double().requires_grad_()
    oracle = reference_sampled_token_loss(
        h_ref, h_T.double(), wide, targets, W_teacher=wide_T, reduction="none"
    )
    oracle.sum().backward()
    torch.testing.assert_close(oracle, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h_ref.grad, h.grad, rtol=1e-12, atol=1e-12)
    op = LOGIT_FREE if way == "logit-free" else ROW_WORKSPACE
    low = h_S.clone().requires_grad_()
    with mock.patch.object(planning, "uses_rows_kernel", return_value=way == "rows"):
        loss = op.run(
            fused_sampled_token_loss, low, h_T, head, targets, W_teacher=teacher, reduction="none"
        )
        loss.sum().backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    rounding = (h.grad.to(dtype).double() - h.grad).norm()
    assert (low.grad.double() - h.grad).norm() < 2.0 * rounding + 1e-5 * h.grad.norm()


# --- the map of products to logits


@triton.jit
def map_kernel(u_ptr, z_ptr, slope_ptr, softcap, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[None, :]
    z, slope = logits_and_slope(tl.load(u_ptr + at), at, None, None, softcap, None)
    tl.store(z_ptr + at, z)
    tl.store(slope_ptr + at, slope)


def test_a_cap_and_its_slope_keep_their_digits():
    """From where the cap does nothing to where nothing else does."""
    u = 10 ** torch.linspace(-6, math.log10(40), 4096)
    u[::2] *= -1
    softcap = 2.0
    v = u.double() / softcap
    z, slope = softcap * torch.tanh(v), torch.cosh(v) ** -2
    mapped = u.clone()
    found = [(mapped, LogitMap(None, softcap, 1.0).apply_(mapped, needs_slope=True))]
    kernels = torch.empty_like(u, device=DEVICE), torch.empty_like(u, device=DEVICE)
    map_kernel[(1,)](u.to(DEVICE), *kernels, softcap, BLOCK=4096)
    found.append(tuple(t.cpu() for t in kernels))
    for got_z, got_slope in found:
        assert ((got_z - z) / z).abs().max() < 4e-7
        assert ((got_slope - slope) / slope).abs().max() < 1e-5
        assert ((got_slope - slope) / slope)[v.abs() < 1].abs().max() < 1e-6


def test_a_ban_passes_the_cap():
    u = torch.tensor([-math.inf, math.inf, 0.0, -0.0])
    LogitMap(None, 2.0, 1.0).apply_(u)
    assert u.tolist() == [-math.inf, 2.0, 0.0, 0.0]


# --- what holds of every loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_the_bias_too(op, dtype):
    h_S, h_T, W = random_inputs(6, 700, 32)
    head = head_of(W)
    narrow = tree_map_only(Tensor, lambda t: t.to(dtype), head)
    expected, _ = op.loss_and_grad(h_S.to(dtype), h_T.to(dtype), narrow)
    with torch.autocast(op.device.type, dtype=dtype):
        loss = op(h_S, h_T, head, reduction="none", workspace_mib=0 if op.logit_free else 0.2)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])
def test_one_graph(op, backend):
    torch._dynamo.reset()
    h_S, h_T, W = (t.to(op.device) for t in random_inputs(12, 300, 16, distance=0.3))
    bias = torch.linspace(-1, 1, 300, device=op.device)

    def loss(h: Tensor) -> Tensor:
        head = LMHead(W, bias, 5.0, 0.5, 290)
        teacher = head._replace(softcap=None)
        module = FusedJSDLoss(beta=0.3, workspace_mib=op.workspace_mib)
        told = token_divergence(2 * h, h_T, head, W_teacher=teacher, workspace_mib=op.workspace_mib)
        return module(2 * h, h_T, head, W_teacher=teacher) + told.loss.sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        h = h_S.clone().requires_grad_()
        value = call(h)
        value.backward()
        results.append((value.detach(), h.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


def test_no_logits_are_allocated():
    h_S, h_T, W = random_inputs(200, 3000, 16)
    head = head_of(W, 30.0)
    h_S.requires_grad_()
    with Allocations(smallest=4 * 3000) as allocations:
        fused_jsd_loss(h_S, h_T, head, W_teacher=head._replace(scale=2.0),
                       workspace_mib=4).backward()  # fmt: skip
    N_by_D = 2 * 200 * 16 * 4
    assert allocations.peak <= 4 * 2**20 + N_by_D
    plain, capped = (
        tree_map_only(
            Tensor, lambda t: t.to(DEVICE), (h_S[:64].detach().requires_grad_(), h_T[:64], h)
        )
        for h in (LMHead(W), head)
    )
    peaks = []
    for arguments in (plain, capped):
        with Allocations(smallest=4 * 3000) as allocations:
            fused_jsd_loss(*arguments, workspace_mib=0).backward()
        peaks.append(allocations.peak)
    assert peaks[1] <= peaks[0] + 4 * 3000 * 4  # a field of sums more


# --- bad input

HEAD = random_inputs(6, V, 8)[2]


@pytest.mark.parametrize("loss", [fused_jsd_loss, reference_jsd_loss])
@pytest.mark.parametrize("name", ["W", "W_teacher"])
@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, r"NAME\.weight must be a torch.Tensor, got Linear",
         {"weight": torch.nn.Linear(8, V)}),
        (TypeError, r"NAME\.weight must be one of .*, got torch.uint8", {"weight": HEAD.byte()}),
        (ValueError, r"NAME\.weight must be \[V, D\], got shape \[400\].*FSDP",
         {"weight": HEAD.flatten()}),
        (TypeError, r"NAME\.bias must be a torch.Tensor, got float", {"bias": 0.5}),
        (TypeError, r"NAME\.bias is torch.float16, h_student", {"bias": torch.zeros(V).half()}),
        (ValueError, r"NAME\.bias is on meta", {"bias": torch.zeros(V, device="meta")}),
        (ValueError, r"NAME\.bias must have one number for each of the 50 rows of NAME\.weight.*49",
         {"bias": torch.zeros(V - 1)}),
        (ValueError, r"NAME\.bias must have .* got shape \[50, 1\]", {"bias": torch.zeros(V, 1)}),
        (ValueError, r"NAME\.bias must be finite, or −∞", {"bias": torch.full((V,), math.inf)}),
        (ValueError, r"NAME\.bias must be finite, or −∞", {"bias": torch.full((V,), math.nan)}),
        (ValueError, r"NAME\.bias is −∞ for the whole vocabulary",
         {"bias": torch.full((V,), -math.inf)}),
        (ValueError, r"NAME\.bias is −∞ for the whole vocabulary",
         {"bias": torch.eye(V)[-1].log(), "vocab_size": V - 1}),
        (ValueError, r"NAME\.softcap must be positive and finite.*got 0", {"softcap": 0}),
        (ValueError, r"NAME\.softcap .*got -30", {"softcap": -30.0}),
        (ValueError, r"NAME\.softcap .*got inf", {"softcap": math.inf}),
        (ValueError, r"NAME\.softcap .*got nan", {"softcap": math.nan}),
        (TypeError, r"NAME\.softcap must be a number, got str", {"softcap": "30"}),
        (ValueError, r"NAME\.scale must be positive and finite, got 0", {"scale": 0}),
        (ValueError, r"NAME\.scale .*got -1", {"scale": -1.0}),
        (ValueError, r"NAME\.scale .*got inf", {"scale": math.inf}),
        (TypeError, r"NAME\.scale must be a number, got NoneType", {"scale": None}),
        (ValueError, r"NAME\.vocab_size must lie in \[1, 50\].*got 51", {"vocab_size": 51}),
        (ValueError, r"NAME\.vocab_size must lie in \[1, 50\].*got 0", {"vocab_size": 0}),
        (TypeError, r"NAME\.vocab_size must be an int, got float", {"vocab_size": 50.0}),
    ],
)  # fmt: skip
def test_refused(loss, name, error, message, changed):
    h_S, h_T, W = random_inputs(6, V, 8)
    head = LMHead(W)._replace(**changed)
    heads = {"W": W, "W_teacher": W} | {name: head}
    with pytest.raises(error, match="^" + message.replace("NAME", name)):
        loss(h_S, h_T, heads["W"], W_teacher=heads["W_teacher"])


def test_where_a_bias_is_not_read_a_head_without_entries_gives_nan(monkeypatch):
    monkeypatch.setattr(checks, "is_readable", lambda _: False)
    h_S, h_T, W = random_inputs(6, V, 8)
    nothing = LMHead(W, torch.full((V,), -math.inf))
    ids = torch.arange(12).reshape(6, 2)
    log_q = torch.full((6, 2), -1.0)
    for loss in (
        fused_jsd_loss(h_S, h_T, nothing),
        fused_jsd_loss(h_S, h_T, W, W_teacher=nothing),
        fused_log_probs(h_S, nothing, ids).sum(),
        fused_top_k_loss(h_S, nothing, ids, log_q, outside="bucket"),
        fused_top_k_loss(h_S, nothing, ids, log_q, outside="ignore"),
    ):
        assert loss.isnan()
    assert fused_top_k_loss(h_S, nothing, ids, log_q, outside="renormalize") == 0


def test_vocabularies_must_be_one():
    h_S, h_T, W = random_inputs(6, V, 8)
    with pytest.raises(ValueError, match=r"W_teacher has 50 rows, W 45: .*vocab_size"):
        fused_jsd_loss(h_S, h_T, LMHead(W, vocab_size=45), W_teacher=W)


def test_a_frozen_head_is_detached():
    h_S, h_T, W = random_inputs(6, V, 8)
    head = LMHead(W.requires_grad_(), torch.zeros(V, requires_grad=True), 5.0, 2.0, 45)
    frozen = head.detach()
    assert not frozen.weight.requires_grad
    assert not frozen.bias.requires_grad
    assert frozen[2:] == head[2:]
    fused_jsd_loss(h_S.requires_grad_(), h_T, frozen).backward()
    assert W.grad is None


def test_the_padded_rows_of_a_head_written_out_are_left_out():
    head = as_head(LMHead(HEAD, torch.zeros(V), vocab_size=45))
    assert head.weight.shape == (45, 8)
    assert head.bias.shape == (45,)
