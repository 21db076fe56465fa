"""`fused_top_k_loss` against the oracle, in every mode and schedule; and what its inputs may be."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from accuracy import GRAD_UNITS, LOSS_UNITS, TILED_GRAD_UNITS
from heads import EXTRAS, logits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import BETAS, random_inputs, some_betas
from moved_logits import units
from schedules import ROW_WORKSPACE, Schedule
from test_against_oracle import WAYS
from test_trained_head import interpreted
from textbook import entries
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.allocations import Allocations
from benchmarks.lib.measure import counted_dots
from opsd_kernels import (
    LMHead,
    fused_jsd_loss,
    fused_top_k_loss,
    reference_top_k_loss,
    support,
    token_divergence,
)
from opsd_kernels.divergence import HUGE, Member
from opsd_kernels.schedules import planning
from opsd_kernels.support import divergence_of_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUTSIDE = ["bucket", "renormalize", "ignore"]


def teacher(h_T: Tensor, W: Any, K: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A teacher's K likeliest ids [N, K], their log q, and log q of the rest: float32."""
    log_q = logits(h_T, W, temperature).log_softmax(-1)
    ids = log_q.topk(K).indices
    rest = log_q.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return ids, log_q.gather(-1, ids).float(), rest.float()


def run(op: Schedule, h: Tensor, W: Any, *rest: Any, **options: Any) -> list[Tensor]:
    """Per-token losses and the gradient of their sum."""
    h = h.detach().clone().requires_grad_()
    loss = op.run(fused_top_k_loss, h, W, *rest, reduction="none", **options)
    loss.sum().backward()
    assert h.grad is not None
    return [loss.detach(), h.grad]


def loss_and_grad(way: str, *args: Any, **options: Any) -> list[Tensor]:
    op, workspace_mib, uses_kernel = WAYS[way]
    with mock.patch.object(planning, "uses_rows_kernel", return_value=uses_kernel):
        return run(op, *args, workspace_mib=workspace_mib, **options)


def exact(h: Tensor, W: Any, *rest: Any, **options: Any) -> list[Tensor]:
    h = h.detach().double().requires_grad_()
    head = W if isinstance(W, LMHead) else LMHead(W)
    bias = None if head.bias is None else head.bias.double()
    head = head._replace(weight=head.weight.double(), bias=bias)
    options = {"reduction": "none", **options}
    loss = reference_top_k_loss(h, head, *rest, **options)
    loss.sum().backward()
    assert h.grad is not None
    return [loss.detach(), h.grad]


def moved(t: Tensor, moves: torch.Generator) -> Tensor:
    """Numbers in float64 whose last fp32 bit is noise."""
    return t.double() + 2.0**-24 * (1 + t.abs()) * torch.randn(t.shape, generator=moves).double()


def compared(
    h: Tensor, W: Any, ids: Tensor, log_q: Tensor, log_q_rest: Tensor, outside: str,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log p and log q of the entries that a mode compares, written out, for ids that are all
    present and differ."""
    log_p = logits(h, W, temperature).log_softmax(-1)
    p_r = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    log_p, log_q = log_p.gather(-1, ids), log_q.double()
    if outside == "renormalize":
        return log_p.log_softmax(-1), log_q.log_softmax(-1)
    total = torch.cat([log_q, log_q_rest.double()[:, None]], -1).log_softmax(-1)
    if outside == "ignore":
        return log_p, total[:, :-1]
    return torch.cat([log_p, p_r], -1), total


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_oracle_is_the_formula(outside, beta):
    h, h_T, W = (t.double() for t in random_inputs(9, 40, 6, size=2.0, distance=0.5))
    ids, log_q, log_q_rest = teacher(h_T, W, 5)
    options = {"log_q_rest": log_q_rest, "outside": outside, "beta": beta}
    found = exact(h, W, ids, log_q, **options)
    leaf = h.requires_grad_()
    values = entries(*compared(leaf, W, ids, log_q, log_q_rest, outside), beta).sum(-1)
    values.sum().backward()
    torch.testing.assert_close(found[0], values.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found[1], leaf.grad, rtol=1e-11, atol=1e-12)


DRAWN = {
    "outside": st.sampled_from(OUTSIDE),
    "N": st.integers(1, 9),
    "V": st.sampled_from([2, 17, 64, 300]),
    "D": st.sampled_from([1, 8, 33]),
    "K": st.sampled_from([1, 2, 5, 16, 64]),
    "dtype": st.sampled_from(DTYPES),
    "beta": st.one_of(st.sampled_from(BETAS), st.just("of tokens")),
    "entry_clip": st.sampled_from([None, None, 0.05]),
    "temperature": st.sampled_from([1.0, 0.5, 1.7]),
    "log_size": st.floats(-2, 1.2),
    "log_distance": st.floats(-4, 0),
    "gives_rest": st.booleans(),
    "extras": EXTRAS,
    "seed": st.integers(0, 2**16),
}


@given(**DRAWN)
@settings(max_examples=80)
def test_in_pytorch(**drawn):
    check("PyTorch", **drawn)


@given(**DRAWN)
@settings(max_examples=20)
def test_in_pytorch_a_few_tokens_at_a_time(**drawn):
    check("PyTorch, small budget", **drawn)


@given(**DRAWN)
@settings(max_examples=8)  # the interpreter takes its time
def test_with_rows(**drawn):
    check("rows", **drawn)


@given(**DRAWN)
@settings(max_examples=15)
def test_logit_free(**drawn):
    check("logit-free", **drawn)


def check(
    way, *, outside, N, V, D, K, dtype, beta, entry_clip, temperature, log_size, log_distance,
    gives_rest, extras, seed,
):  # fmt: skip
    K = min(K, V)
    h, h_T, W = random_inputs(
        N, V, D, dtype, size=10**log_size, distance=10**log_distance, seed=seed
    )
    head = LMHead(W) if extras is None else extras.heads(W, None, seed)[0]
    ids, log_q, log_q_rest = teacher(h_T, head, K, temperature)
    if beta == "of tokens":
        beta = some_betas(N, seed)
    options: dict[str, Any] = {
        "outside": outside, "beta": beta, "entry_clip": entry_clip, "temperature": temperature
    }  # fmt: skip
    derived = (1 - log_q.double().exp().sum(-1)).clamp(min=1e-7).log()
    if gives_rest:
        options["log_q_rest"] = derived = log_q_rest
    sides = compared(h, head, ids, log_q, derived, outside, temperature)
    if entry_clip is not None:
        f = entries(*sides, beta).nan_to_num(nan=0.0)
        assume(bool(((f / entry_clip - 1).abs() > 1e-4).all()))
    found = loss_and_grad(way, h, head, ids, log_q, **options)
    assert [t.dtype for t in found] == [torch.float32, dtype]

    # Of the terms whose difference a value is.
    x = (sides[1] - sides[0]).nan_to_num(0.0, HUGE, -HUGE)
    sizes = (sides[0].exp() + sides[1].exp()) * x.abs().clamp(max=1e3)

    def oracle(h: Tensor, head: LMHead, moves: torch.Generator | None) -> Tensor:
        """The last bit of values and of the teacher's numbers is noise too: of 1 − Q after it was
        taken."""
        given = [t.double() if moves is None else moved(t, moves) for t in (log_q, derived)]
        now = {**options, "log_q_rest": given[1], "reduction": "none"}
        loss = reference_top_k_loss(h, head, ids, given[0], **now)
        if moves is not None:
            loss = loss + 2.0**-24 * (torch.randn(x.shape, generator=moves) * sizes).sum(-1)
        return loss

    tiles = "PyTorch" not in way and dtype != torch.float32
    loss, grad = units(found, oracle, h, head, torch.ones(N), tiles)
    assert loss < LOSS_UNITS
    assert grad < (TILED_GRAD_UNITS if tiles else GRAD_UNITS[dtype])


# --- where digits are lost


def stable(
    h: Tensor, W: Tensor, ids: Tensor, log_q: Tensor, rest: Tensor, member: Member
) -> Tensor:
    """ℓ with a bucket, in float64, as `divergence.py` computes it where both sides agree; that is
    proven with 60 digits in test_divergence.py."""
    z = logits(h, W)
    z_r = z.scatter(-1, ids, -torch.inf).logsumexp(-1)
    z_S = torch.cat([z.gather(-1, ids), z_r[:, None]], -1)
    return divergence_of_rows(z_S, torch.cat([log_q, rest[:, None]], -1).double(), member)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("distance", [1e-2, 1e-4])
def test_near_agreement(way, beta, distance):
    """A JSD of 1e-5 or 1e-9 keeps the digits that its logits have, and so does its gradient. The
    textbook's form in fp32 has none left at the smaller distance."""
    h, h_T, W = random_inputs(8, 300, 16, size=2.0, distance=distance)
    teacher_of_all = teacher(h_T, W, 12)
    ids, log_q, rest = teacher_of_all
    found = loss_and_grad(way, h, W, ids, log_q, log_q_rest=rest, beta=beta)

    def oracle(h: Tensor, head: LMHead, moves: torch.Generator | None) -> Tensor:
        numbers = [t if moves is None else moved(t, moves) for t in (log_q, rest)]
        return stable(h, head.weight, ids, *numbers, Member.of(beta))

    loss, grad = units(found, oracle, h, LMHead(W), torch.ones(8))
    assert loss < LOSS_UNITS
    assert grad < GRAD_UNITS[h.dtype]
    if distance < 1e-3:
        log_p, log_q = (log.float() for log in compared(h, W, *teacher_of_all, "bucket"))
        textbook = entries(log_p, log_q, beta).sum(-1)
        assert ((textbook - found[0]).abs() > found[0]).any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rest", [1e-1, 1e-3, 1e-5, 1e-7])
def test_a_small_rest_keeps_its_digits(way, rest):
    """p_r from 0.1 to 1e-7, beside a teacher's rest of 1 %: loss and gradient, whose part outside
    the ids is p_r − q_r times a mean of W. 1 − Σ p in fp32 has an error of 6e-8."""
    h, _, W = random_inputs(6, 200, 16)
    W[:8] += 0.5
    bias = torch.zeros(200)
    ids = torch.arange(8).expand(6, 8)
    z = logits(h, W)
    bias[8:] = float(math.log(rest) + (z[:, :8].logsumexp(-1) - z[:, 8:].logsumexp(-1)).mean())
    head = LMHead(W, bias)
    log_q = torch.linspace(0, 1, 8).expand(6, 8).log_softmax(-1) + math.log(0.99)
    for beta in (0.0, 1.0):
        options = {"beta": beta, "log_q_rest": torch.full((6,), math.log(0.01))}
        found = loss_and_grad(way, h, head, ids, log_q, **options)
        true = exact(h, head, ids, log_q, **options)
        torch.testing.assert_close(found[0].double(), true[0], rtol=3e-6, atol=0)
        assert (found[1] - true[1]).norm() < 3e-6 * true[1].norm()


# --- what may be in a slot


@pytest.mark.parametrize("outside", OUTSIDE)
def test_absent_slots_and_repeats_are_as_if_they_were_not_there(op, outside):
    h, h_T, W = random_inputs(7, 60, 8, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, 4)
    options = {"outside": outside, "reduction": "none"}
    expected = op.run(fused_top_k_loss, h, W, ids, log_q, **options)
    wide = torch.full((7, 9), -1), torch.zeros(7, 9)
    places = [1, 3, 4, 7]
    wide[0][:, places], wide[1][:, places] = ids, log_q
    wide[0][:, 2], wide[1][:, 2] = ids[:, 0], -0.1  # the first of equal ids counts
    wide[0][:, 0], wide[1][:, 0] = ids[:, 3], -torch.inf  # unless it is absent
    wide[0][:, 5] = 60
    wide[0][:, 6], wide[1][:, 6] = 17, torch.tensor([torch.nan, -torch.inf, -9999.0]).repeat(3)[:7]
    wide[0][:, 8] = -100
    for dtype in (torch.int64, torch.int32, torch.int16):
        found = op.run(fused_top_k_loss, h, W, wide[0].to(dtype), wide[1], **options)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_token_without_a_slot(op, outside, beta):
    h, h_T, W = random_inputs(4, 60, 8, distance=0.5)
    ids, log_q, rest = teacher(h_T, W, 4)
    ids[1], log_q[2], rest[1] = -1, -9999.0, -torch.inf
    h.requires_grad_()
    loss = op.run(fused_top_k_loss, h, W, ids, log_q, log_q_rest=rest, outside=outside, beta=beta,
                  reduction="none")  # fmt: skip
    loss.sum().backward()
    assert loss[1:3].tolist() == [0, 0]
    assert h.grad[1:3].count_nonzero() == 0
    assert h.grad[[0, 3]].count_nonzero() == h.grad[[0, 3]].numel()
    mean = op.run(fused_top_k_loss, h, W, ids, log_q, log_q_rest=rest, outside=outside, beta=beta)
    torch.testing.assert_close(mean, loss.mean())  # its weight counts


def test_a_teacher_with_more_mass_than_one(op):
    """By rounding, or because padded slots have log q = 0: the numbers are divided by their sum."""
    h, h_T, W = random_inputs(5, 60, 8, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, 4)
    log_q = log_q.log_softmax(-1)
    for outside in ("bucket", "ignore"):
        expected = op.run(fused_top_k_loss, h, W, ids, log_q, outside=outside, beta=0.0)
        for more in (1e-6, 3.0):
            found = op.run(fused_top_k_loss, h, W, ids, log_q + more, outside=outside, beta=0.0)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_ids_that_are_the_whole_vocabulary(op, beta):
    """Nothing is outside, so there is no bucket: the loss is that of the full vocabulary."""
    h, h_T, W = random_inputs(6, 20, 8, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, 20)
    expected = op.run(fused_jsd_loss, h, h_T, W, beta=beta)
    for outside in OUTSIDE:
        found = op.run(fused_top_k_loss, h, W, ids, log_q, outside=outside, beta=beta)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
    bias = torch.zeros(20)
    bias[:10] = -torch.inf  # nothing outside is allowed
    head = LMHead(W, bias)
    ids, log_q, _ = teacher(h_T, head, 10)
    expected = op.run(fused_jsd_loss, h, h_T, head, beta=beta)
    rest = torch.full((6,), -3.0)
    found = op.run(fused_top_k_loss, h, head, ids, log_q, log_q_rest=rest, beta=beta)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_student_that_bans_what_the_teacher_gives(op, outside):
    """The forward KL is infinite, and has no gradient; the JSD is finite. Renormalized, a student
    that bans all ids compares nothing."""
    h, h_T, W = random_inputs(3, 30, 8, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, 4)
    bias = torch.zeros(30)
    bias[ids[0, 0]] = bias[ids[1]] = -torch.inf
    ids[0, 1:], ids[2] = (bias == 0).nonzero()[:3, 0], (bias == 0).nonzero()[4:8, 0]
    for beta in (0.0, 0.5):
        found, grad = run(op, h, LMHead(W, bias), ids, log_q, outside=outside, beta=beta)
        if beta == 0:
            empty = 0.0 if outside == "renormalize" else torch.inf
            assert found[:2].tolist() == [torch.inf, empty]
            assert grad[:2].count_nonzero() == 0
        else:
            assert found.isfinite().all()
        assert found[2].isfinite()
        assert grad.isfinite().all()


def test_a_teacher_without_a_rest(op):
    """The reverse KL to a teacher that gives nothing outside is infinite; others are finite, and
    what is ignored may be anything."""
    h, h_T, W = random_inputs(5, 30, 8, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, 4)
    log_q, nothing = log_q.log_softmax(-1), torch.full((5,), -torch.inf)
    for beta in (0.0, 0.5):
        found = run(op, h, W, ids, log_q, log_q_rest=nothing, beta=beta)
        assert all(t.isfinite().all() for t in found)
    loss, grad = run(op, h, W, ids, log_q, log_q_rest=nothing, beta=1.0)
    assert (loss == torch.inf).all()
    assert (grad == 0).all()
    loss, grad = run(op, h, W, ids, log_q, log_q_rest=nothing, beta=1.0, outside="ignore")
    expected = run(op, h, W, ids, log_q, beta=1.0, outside="ignore")
    torch.testing.assert_close([loss, grad], expected, rtol=1e-5, atol=1e-6)


def test_a_truncated_kl_is_negative(op):
    """Σ_S q log(q/p), where the student has more mass on S than the teacher; the whole is not."""
    h, h_T, W = random_inputs(5, 30, 8, distance=0.1)
    ids = logits(h, W).topk(3).indices
    log_q = logits(h_T, W).log_softmax(-1).gather(-1, ids).float() - 1
    truncated = run(op, h, W, ids, log_q, outside="ignore", beta=0.0)[0]
    assert (truncated < 0).all()
    assert (run(op, h, W, ids, log_q, beta=0.0)[0] > 0).all()


def test_the_order_of_slots_does_not_matter(op):
    h, h_T, W = random_inputs(6, 60, 8, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, 7)
    expected = run(op, h, W, ids, log_q)
    found = run(op, h, W, ids.flip(-1), log_q.flip(-1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


# --- weights, gradients, statistics


@pytest.mark.parametrize("outside", OUTSIDE)
def test_weights_win_over_everything(op, outside):
    """A token of weight 0 has loss and gradient 0, whatever it holds; others may be negative."""
    h, h_T, W = random_inputs(6, 60, 8, distance=0.5)
    ids, log_q, rest = teacher(h_T, W, 4)
    weights = torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5, 1.0])
    loss, grad = run(op, h, W, ids, log_q, outside=outside)
    expected = [weights * loss, weights[:, None] * grad]
    h[1], ids[1], log_q[1], rest[1] = torch.nan, 2**31 - 1, torch.inf, torch.nan
    h[3], log_q[3] = torch.inf, torch.nan
    options = {"outside": outside, "token_weights": weights}
    found = run(op, h, W, ids, log_q, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert found[0][[1, 3]].tolist() == [0, 0]
    assert found[1][[1, 3]].count_nonzero() == 0
    weights = weights.abs()
    mean = op.run(fused_top_k_loss, h, W, ids, log_q, outside=outside, token_weights=weights)
    torch.testing.assert_close(mean, expected[0].abs().sum() / weights.sum())


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_nan_stays_in_its_token(op, outside):
    """And has no gradient where the caller leaves that token out."""
    h, h_T, W = random_inputs(5, 60, 8, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, 4)
    h[2] = torch.nan
    h.requires_grad_()
    loss = op.run(fused_top_k_loss, h, W, ids, log_q, outside=outside, reduction="none")
    loss[[0, 1, 3, 4]].sum().backward()
    assert loss.isnan().tolist() == [False, False, True, False, False]
    assert h.grad[2].tolist() == [0] * 8
    assert h.grad.isfinite().all()


def test_any_leading_shape(op):
    h, h_T, W = random_inputs(6, 60, 8, distance=0.5)
    ids, log_q, rest = teacher(h_T, W, 4)
    expected = run(op, h, W, ids, log_q, log_q_rest=rest)
    shaped = [t.reshape(2, 3, *t.shape[1:]) for t in (h, ids, log_q, rest)]
    for dtype in (torch.float32, torch.float64):
        log_q = shaped[2].to(dtype)
        loss, grad = run(op, shaped[0], W, shaped[1], log_q, log_q_rest=shaped[3])
        torch.testing.assert_close(loss.flatten(), expected[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(grad.flatten(0, 1), expected[1], rtol=1e-5, atol=1e-7)
    single = run(op, h[0], W, ids[0], log_q[0, 0], log_q_rest=rest[0])
    torch.testing.assert_close(single[0], expected[0][0], rtol=1e-6, atol=1e-7)
    nothing = run(op, h[:0], W, ids[:0], log_q[0, :0])
    assert [t.numel() for t in nothing] == [0, 0]


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_head(op, outside, dtype):
    h, h_T, W = random_inputs(40, 300, 16, dtype, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, 6)
    bias = torch.linspace(-1, 1, 300).to(dtype)
    found, true = [], []
    for result, function, wide in ((found, fused_top_k_loss, dtype),
                                   (true, reference_top_k_loss, torch.float64)):  # fmt: skip
        leaves = [t.detach().to(wide).requires_grad_() for t in (h, W, bias)]
        head = LMHead(*leaves[1:])
        loss = op.run(function, leaves[0], head, ids, log_q, outside=outside, reduction="sum")
        loss.backward()
        result += [loss.detach(), *(t.grad for t in leaves)]
    for got, expected in zip(found, true, strict=True):
        error = (got.double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 3e-6, torch.bfloat16: 5e-3}[dtype]


@pytest.mark.parametrize("outside", OUTSIDE)
def test_a_second_backward_and_no_second_derivative(op, outside):
    h, h_T, W = (t.to(op.device) for t in random_inputs(6, 60, 8, distance=0.5))
    ids, log_q, _ = (t.to(op.device) for t in teacher(h_T, W, 4))
    loss = fused_top_k_loss(h.requires_grad_(), W, ids, log_q, outside=outside,
                            workspace_mib=op.workspace_mib)  # fmt: skip
    (once,) = torch.autograd.grad(loss, h, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, h, retain_graph=True)
    torch.testing.assert_close(twice, 2 * once)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, h, create_graph=True)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_statistics(op, outside):
    h, h_T, W = random_inputs(7, 60, 8, size=2.0, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, 4)
    ids[5] = -1
    weights = torch.ones(7)
    weights[6] = 0
    targets = ids[:, 0].clone()
    targets[1::2] = 59
    options = {"outside": outside, "targets": targets, "return_statistics": True,
               "token_weights": weights}  # fmt: skip
    found = op.run(fused_top_k_loss, h.requires_grad_(), W, ids, log_q, **options)
    true = reference_top_k_loss(h.double(), W.double(), ids, log_q, **options)
    for name, got, expected in zip(found._fields, found, true, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
        assert got.requires_grad == (name == "loss")
    told = op.run(token_divergence, h, h_T, W, targets=targets)
    counts = weights > 0
    torch.testing.assert_close(found.entropy_student[counts], told.entropy_student[counts])
    torch.testing.assert_close(found.logp_student[counts], told.logp_student[counts])
    assert op.run(fused_top_k_loss, h, W, ids, log_q, return_statistics=True).logp_student is None


@pytest.mark.slow
@pytest.mark.parametrize("outside", OUTSIDE)
def test_one_graph(op, outside):
    """Whatever the number of tokens, which is a symbol."""
    check_graph(op, outside, "aot_eager", dynamic=True)


def test_one_graph_is_traced():
    check_graph(ROW_WORKSPACE, "bucket", "eager", dynamic=False)


def check_graph(op: Schedule, outside: str, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    h, h_T, W = (t.to(op.device) for t in random_inputs(12, 60, 8, distance=0.5))
    ids, log_q, _ = (t.to(op.device) for t in teacher(h_T, W, 4))

    def loss(h: Tensor, ids: Tensor, log_q: Tensor) -> Tensor:
        told = fused_top_k_loss(2 * h, W, ids, log_q, outside=outside, targets=ids[:, 0],
                                workspace_mib=op.workspace_mib, return_statistics=True)  # fmt: skip
        return told.loss.square() + told.entropy_student.mean() + told.logp_student.mean()

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for N in (12, 9) if dynamic else (12,):
        results = []
        for call in (loss, compiled):
            leaf = h[:N].clone().requires_grad_()
            value = call(leaf, ids[:N], log_q[:N])
            value.backward()
            results.append([value.detach(), leaf.grad])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


def test_no_vocabulary_is_read_where_both_are_renormalized():
    """K rows of W a token: NaN in all others does not show, and no tensor is as long as V."""
    N, V, D, K = 30, 3000, 16, 4
    h, h_T, W = random_inputs(N, V, D, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, K)
    used = torch.zeros(V, dtype=torch.bool)
    used[ids] = True
    with Allocations() as allocations:
        found = run(ROW_WORKSPACE, h, W.where(used[:, None], torch.nan), ids, log_q,
                    outside="renormalize")  # fmt: skip
    assert all(t.isfinite().all() for t in found)
    made = [shape for shape in allocations.shapes if max(shape, default=0) >= V]
    assert made == [(V, D)]  # of this test


@interpreted
@pytest.mark.parametrize("outside", OUTSIDE)
def test_passes(outside):
    """Logit-free 3 U, in the row workspace 2 U, without gradient 1 U; renormalized none. Besides
    there are products with K rows for each token, once in forward and once in backward."""
    N, V, D, K = 32, 1024, 64, 4
    h, h_T, W = random_inputs(N, V, D, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, K)
    for way, U in (("logit-free", 3), ("PyTorch", 2)):
        options = {"outside": outside, "workspace_mib": WAYS[way][1]}
        for needs_gradient in (True, False):
            passes = 0 if outside == "renormalize" else U if needs_gradient else 1
            with counted_dots() as dots, FlopCounterMode(display=False) as library:
                loss = fused_top_k_loss(h.requires_grad_(needs_gradient), W, ids, log_q, **options)
                if needs_gradient:
                    loss.backward()
            found = 2 * sum(dots) + library.get_total_flops() - passes * 2 * N * D * V
            assert 0 <= found <= 2 * 2 * N * D * K


@pytest.mark.parametrize("outside", ["bucket", "ignore"])
def test_workspace_bounds_all_temporaries(outside):
    N, V, D, K, mib = 100, 65536, 50, 4, 4
    h, _, W = random_inputs(N, V, D)
    ids, log_q = torch.arange(N * K).view(N, K), torch.full((N, K), -2.0)
    with Allocations(smallest=8 * 1024) as allocations:
        options = {"outside": outside, "return_statistics": True, "workspace_mib": mib}
        told = fused_top_k_loss(h.requires_grad_(), W, ids, log_q, targets=ids[:, 0], **options)
        told.loss.backward()
    others = 2 * N * D * 4 + 100 * N * (K + 1) * 4
    assert allocations.peak <= mib * 2**20 + others
    assert allocations.peak > mib * 2**20 / 3  # and it is used


@interpreted
@pytest.mark.parametrize("outside", OUTSIDE)
def test_logit_free_has_nothing_vocabulary_sized(outside):
    N, V, D = 30, 1200, 16
    h, h_T, W = (t.bfloat16() for t in random_inputs(N, V, D, distance=0.5))
    ids, log_q, _ = teacher(h_T, W, 4)
    with Allocations() as allocations:
        options = {"outside": outside, "return_statistics": True, "workspace_mib": 0}
        told = fused_top_k_loss(h.requires_grad_(), W, ids, log_q, **options)
        told.loss.backward()
    assert [s for s in allocations.shapes if max(s, default=0) >= V] == []


# --- what is refused

H, HEAD = torch.ones(6, 5), torch.ones(20, 5)
IDS, LOG_Q = torch.arange(24).view(6, 4) % 20, torch.full((6, 4), -2.0)


@pytest.mark.parametrize("function", [fused_top_k_loss, reference_top_k_loss])
@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "h_student must be a torch.Tensor, got list", {"h_student": [[1.0]]}),
        (TypeError, "ids must be a torch.Tensor, got list", {"ids": [1]}),
        (TypeError, "ids must be integers, .* got torch.float32", {"ids": IDS.float()}),
        (TypeError, "ids must be integers, .* got torch.bool", {"ids": IDS > 0}),
        (ValueError, r"ids must be \[..., K\] .* \[6\] of h_student, got .5, 4.", {"ids": IDS[:5]}),
        (ValueError, r"ids must be \[..., K\] .* of h_student, got \[6\]", {"ids": IDS[:, 0]}),
        (ValueError, "ids .* must have 1 to 512 .* got K = 0", {"ids": IDS[:, :0]}),
        (ValueError, "ids .* must have 1 to 512 .* got K = 600", {"ids": IDS.repeat(1, 150)}),
        (ValueError, "ids is on meta, h_student on cpu", {"ids": IDS.to("meta")}),
        (TypeError, "log_q must be a torch.Tensor, got NoneType", {"log_q": None}),
        (TypeError, "log_q must be float, got torch.int64", {"log_q": LOG_Q.long()}),
        (ValueError, r"log_q must have shape \[6, 4\] .* got \[6, 3\]", {"log_q": LOG_Q[:, :3]}),
        (ValueError, "log_q is on meta, ids on cpu", {"log_q": LOG_Q.to("meta")}),
        (ValueError, r"log_q_rest must have shape \[6\] .* got \[6, 4\]", {"log_q_rest": LOG_Q}),
        (TypeError, "log_q_rest must be float", {"log_q_rest": IDS[:, 0]}),
        (ValueError, 'outside must be "bucket", .* got \'tail\'', {"outside": "tail"}),
        (ValueError, "beta must lie in .0, 1., got 2", {"beta": 2}),
        (ValueError, "entry_clip must be positive", {"entry_clip": 0}),
        (ValueError, "temperature must be positive", {"temperature": 0}),
        (ValueError, "token_weights must not be negative", {"token_weights": -LOG_Q[:, 0].neg()}),
        (ValueError, "return_statistics must be True", {"targets": IDS[:, 0]}),
        (ValueError, r"targets must lie in \[0, 20\)",
         {"targets": IDS[:, 0] + 20, "return_statistics": True}),
    ],
)  # fmt: skip
def test_refused(function, error, message, changed):
    arguments = {"h_student": H, "W": HEAD, "ids": IDS, "log_q": LOG_Q} | changed
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize("outside", OUTSIDE)
def test_what_a_server_writes_for_none_stays_absent(op, outside):
    """−9999 rounds to −9984 in bf16, and is divided by a temperature as other numbers are."""
    h, h_T, W = random_inputs(4, 60, 8, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, 4)
    log_q = log_q.bfloat16()
    log_q[:, 2] = -torch.inf
    options = {"outside": outside, "beta": 1.0}
    expected = op.run(fused_top_k_loss, h, W, ids, log_q, **options)
    log_q[:, 2] = -9999.0
    assert torch.equal(op.run(fused_top_k_loss, h, W, ids, log_q, **options), expected)
    if outside == "renormalize":
        scaled = log_q.float() / 1.2
        kept = [0, 1, 3]
        torch.testing.assert_close(
            op.run(fused_top_k_loss, h, W, ids, scaled, temperature=1.2, **options),
            op.run(
                fused_top_k_loss, h, W, ids[:, kept], scaled[:, kept], temperature=1.2, **options
            ),
        )


@pytest.mark.parametrize("outside", ["bucket", "ignore"])
def test_a_rest_that_is_nan_is_derived(op, outside):
    h, h_T, W = random_inputs(4, 60, 8, distance=0.5)
    ids, log_q, rest = teacher(h_T, W, 4)
    options = {"outside": outside, "reduction": "none"}
    derived = op.run(fused_top_k_loss, h, W, ids, log_q, **options)
    given = op.run(fused_top_k_loss, h, W, ids, log_q, log_q_rest=rest, **options)
    rest[1] = torch.nan
    found = op.run(fused_top_k_loss, h, W, ids, log_q, log_q_rest=rest, **options)
    assert torch.equal(found, torch.where(torch.arange(4) == 1, derived, given))


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_statistics_of_no_tokens(outside, leading):
    h, W = torch.zeros(*leading, 8), torch.zeros(20, 8)
    ids, log_q = torch.zeros(*leading, 4).long(), torch.zeros(*leading, 4)
    told = fused_top_k_loss(
        h, W, ids, log_q, outside=outside, targets=ids[..., 0], return_statistics=True
    )
    assert told.loss == 0
    assert all(field.shape == leading for field in told[1:])


def test_infinite_and_sparse_arguments_are_refused():
    h, W, ids = torch.zeros(3, 8), torch.zeros(20, 8), torch.arange(4).expand(3, 4)
    log_q = torch.full((3, 4), -2.0)
    with pytest.raises(ValueError, match=r"log_q must not be \+inf"):
        fused_top_k_loss(h, W, ids, log_q.masked_fill(ids == 2, torch.inf))
    with pytest.raises(ValueError, match=r"log_q_rest must not be \+inf"):
        fused_top_k_loss(h, W, ids, log_q, log_q_rest=torch.full((3,), torch.inf))
    with pytest.raises(TypeError, match=r"log_q must be a dense tensor, got torch.sparse_coo"):
        fused_top_k_loss(h, W, ids, log_q.to_sparse())
    with pytest.raises(TypeError, match=r"ids must be a dense tensor, got torch.sparse_coo"):
        fused_top_k_loss(h, W, ids.to_sparse(), log_q)


@pytest.mark.parametrize("per_token", [False, True], ids=["one beta", "a beta of each token"])
def test_rows_are_computed_a_few_at_a_time(monkeypatch, per_token):
    h, h_T, W = random_inputs(7, 60, 8, distance=0.5)
    ids, log_q, _ = teacher(h_T, W, 4)
    beta = torch.linspace(0, 1, 7) if per_token else 0.3
    results = []
    for most in (2**20, 3 * 5):
        monkeypatch.setattr(support, "ENTRIES", most)
        leaf = h.clone().requires_grad_()
        loss = fused_top_k_loss(leaf, W, ids, log_q, beta=beta, reduction="none")
        (loss * torch.arange(7)).sum().backward()
        results.append((loss, leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
