"""The sampled-token objective (paper, Eq. 8), against autograd, the oracle and the divergences."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import language_like_inputs, random_inputs
from schedules import LOGIT_FREE, ROW_WORKSPACE
from torch import Tensor

from opsd_kernels import (
    LMHead,
    SampledTokenLoss,
    fused_sampled_token_loss,
    reference_sampled_token_loss,
    token_divergence,
)
from opsd_kernels.schedules import planning

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def textbook(h_S, h_T, W, targets, temperature=1.0, advantage_clip=None, W_teacher=None):
    """Eq. 8 as it is written, [N]."""
    log_p = (h_S @ W.T / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    W_T = W if W_teacher is None else W_teacher
    log_q = (h_T @ W_T.T / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    A = (log_q - log_p).detach()
    if advantage_clip is not None:
        A = A.clamp(-advantage_clip, advantage_clip)
    return -A * log_p


def loss_and_grad(op, h_S, h_T, W, targets, **options):
    h = h_S.detach().clone().requires_grad_()
    loss = op.run(fused_sampled_token_loss, h, h_T, W, targets, reduction="none", **options)
    loss.sum().backward()
    return loss.detach(), h.grad


def test_oracle_is_the_formula():
    h_S, h_T, W = (t.double() for t in random_inputs(7, 50, 6, size=2.0, distance=0.5))
    targets = torch.arange(7)
    for options in ({}, {"temperature": 1.3}, {"advantage_clip": 0.1}):
        h, h_ref = h_S.clone().requires_grad_(), h_S.clone().requires_grad_()
        expected = textbook(h, h_T, W, targets, **options)
        loss = reference_sampled_token_loss(h_ref, h_T, W, targets, reduction="none", **options)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-14)
        expected.sum().backward()
        loss.sum().backward()
        torch.testing.assert_close(h.grad, h_ref.grad, rtol=1e-13, atol=1e-13)


@settings(max_examples=60)  # the interpreter takes its time
@given(
    N=st.integers(1, 9),
    V=st.sampled_from([1, 2, 17, 300, 1000]),
    D=st.sampled_from([1, 8, 33]),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 1.7]),
    advantage_clip=st.sampled_from([None, 0.05]),
    log_size=st.floats(-2, 1.5),
    log_distance=st.floats(-4, 0),
    own_head=st.booleans(),
    likely=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_against_oracle(
    op, N, V, D, dtype, temperature, advantage_clip, log_size, log_distance, own_head, likely, seed
):
    h_S, h_T, W = random_inputs(
        N, V, D, dtype, size=10**log_size, distance=10**log_distance, seed=seed
    )
    options = {"temperature": temperature, "advantage_clip": advantage_clip}
    if own_head:
        h_T = torch.cat([h_T, torch.ones(N, 1, dtype=dtype)], dim=1)
        options["W_teacher"] = torch.cat([W, 0.1 * torch.ones(V, 1, dtype=dtype)], dim=1)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    if likely:
        targets = (h_S.double() @ W.double().T).argmax(-1)
    loss, grad = loss_and_grad(op, h_S, h_T, W, targets, **options)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    h = h_S.double().requires_grad_()
    expected = reference_sampled_token_loss(
        h, h_T.double(), W.double(), targets, reduction="none", **wide
    )
    expected.sum().backward()
    # The last fp32 bits of a logit and of its log-sum-exp, in the advantage and in log p.
    sizes = h_S.double().norm(dim=1) * W.double().norm(dim=1).max()
    bits = 1e-6 * (1 + 2 * sizes / temperature + math.log(V))
    log_p = (h_S.double() @ W.double().T / temperature).log_softmax(-1)
    log_p = log_p.gather(1, targets[:, None])[:, 0]
    A = (expected / log_p).abs().nan_to_num(0)
    assert ((loss - expected).abs() <= bits * (A + log_p.abs() + 1e-6)).all()
    # … and in the advantage, which the gradient is a multiple of; and its rounding.
    unit = h.grad / torch.where(A == 0, 1, A)[:, None]
    noise = bits[:, None] * (1 + A[:, None]) * (unit.norm(dim=1, keepdim=True) + sizes[:, None])
    rounding = 1.5 * torch.finfo(dtype).eps * h.grad.norm(dim=1, keepdim=True)
    assert ((grad - h.grad).abs() <= noise + rounding + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("distance", [0.03, 0.3, 3.0])
@pytest.mark.parametrize("sampled", ["likely", "random"])
def test_gradient_is_rounded_once(op, distance, sampled):
    """On peaked distributions, in units of the rounding of the exact gradient to bf16 alone."""
    V = 2048 if op is LOGIT_FREE and op.device.type == "cpu" else 8192
    h_S, h_T, W = language_like_inputs(64, V, 128, torch.bfloat16, distance)
    logits = h_S.double() @ W.double().T
    g = torch.Generator().manual_seed(0)
    targets = (
        logits.softmax(-1).multinomial(1, generator=g)[:, 0]
        if sampled == "likely"
        else torch.randint(V, (64,), generator=g)
    )
    _, grad = loss_and_grad(op, h_S, h_T, W, targets)
    h = h_S.double().requires_grad_()
    textbook(h, h_T.double(), W.double(), targets).sum().backward()
    rounding = (h.grad.bfloat16() - h.grad).norm()
    assert (grad - h.grad).norm() / rounding < (1.05 if op is ROW_WORKSPACE else 1.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_workspace_with_the_kernel(dtype):
    """As it runs on a GPU, where `rows` takes the place of PyTorch; likely tokens and unlikely."""
    h_S, h_T, W = language_like_inputs(40, 1300, 48, dtype, 0.3)
    targets = (h_S.double() @ W.double().T).argmax(-1)
    targets[::3] = torch.arange(len(targets[::3]))
    h = h_S.double().requires_grad_()
    expected = reference_sampled_token_loss(
        h, h_T.double(), W.double(), targets, reduction="none", return_log_probs=True
    )
    expected.loss.sum().backward()
    with mock.patch.object(planning, "uses_rows_kernel", return_value=True):
        loss, grad = loss_and_grad(ROW_WORKSPACE, h_S, h_T, W, targets, workspace_mib=1)
        with torch.no_grad():
            told = ROW_WORKSPACE.run(
                fused_sampled_token_loss, h_S, h_T, W, targets, return_log_probs=True
            )
    torch.testing.assert_close(loss.double(), expected.loss.detach(), rtol=1e-4, atol=1e-5)
    for name in ("logp_student", "logp_teacher"):
        field = getattr(told, name)
        torch.testing.assert_close(field.double(), getattr(expected, name), rtol=1e-5, atol=1e-5)
    rounding = (h.grad.to(dtype).double() - h.grad).norm()
    assert (grad.double() - h.grad).norm() < 1.5 * rounding + 1e-5 * h.grad.norm()


def test_log_probabilities_on_request(op):
    h_S, h_T, W = random_inputs(12, 60, 8, distance=0.5)
    h_S, h_T, targets = h_S.view(3, 4, 8), h_T.view(3, 4, 8), torch.arange(12).view(3, 4)
    h_S.requires_grad_()
    told = op.run(fused_sampled_token_loss, h_S, h_T, W, targets, return_log_probs=True)
    assert isinstance(told, SampledTokenLoss)
    assert told.loss.shape == ()
    same = op.run(token_divergence, h_S, h_T, W, targets=targets)
    for name in ("logp_student", "logp_teacher"):
        field = getattr(told, name)
        assert field.shape == (3, 4)
        assert not field.requires_grad
        torch.testing.assert_close(field, getattr(same, name), rtol=1e-6, atol=1e-6)
    expected = textbook(h_S, h_T, W, targets).mean()
    torch.testing.assert_close(told.loss, expected)
    with torch.no_grad():
        again = op.run(fused_sampled_token_loss, h_S, h_T, W, targets)
    torch.testing.assert_close(again, expected.detach())


def test_weights_reductions_and_a_second_backward(op):
    h_S, h_T, W = random_inputs(6, 40, 8, distance=0.5)
    targets, w = torch.arange(6), torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0])
    expected = w * textbook(h_S, h_T, W, targets)
    h_S[1], targets[1], h_T[4] = math.nan, -100, math.inf
    h_S.requires_grad_()
    options = {"token_weights": w}
    none = op.run(fused_sampled_token_loss, h_S, h_T, W, targets, reduction="none", **options)
    total = op.run(fused_sampled_token_loss, h_S, h_T, W, targets, reduction="sum", **options)
    mean = op.run(fused_sampled_token_loss, h_S, h_T, W, targets, **options)
    torch.testing.assert_close(none.detach(), expected)
    torch.testing.assert_close(total.detach(), expected.sum())
    torch.testing.assert_close(mean.detach(), expected.sum() / w.sum())
    (once,) = torch.autograd.grad(3 * total, h_S, retain_graph=True)
    (again,) = torch.autograd.grad(total, h_S)
    torch.testing.assert_close(once, 3 * again)
    assert once.isfinite().all()
    assert (once[[1, 4]] == 0).all()


def test_a_teacher_that_agrees_teaches_nothing(op):
    h_S, _, W = language_like_inputs(20, 600, 32, torch.float32, 0.0)
    loss, grad = loss_and_grad(op, h_S, h_S.clone(), W, torch.arange(20))
    assert (loss == 0).all()
    assert (grad == 0).all()


def test_impossible_tokens_do_not_spoil_others(op):
    """log p(ŷ) of −∞, log q(ŷ), both, neither, from logits that overflow."""
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-3e38, 0.0]])
    h_S = torch.tensor([[2.0, 0.5], [-0.0, 0.5], [2.0, 0.5], [-0.0, 0.5]])
    h_T = torch.tensor([[-0.0, 0.5], [2.0, 0.5], [2.0, 0.3], [-0.0, 0.1]])
    targets = torch.full((4,), 2)
    loss, grad = loss_and_grad(op, h_S, h_T, W, targets)
    assert loss[:3].tolist() == [math.inf, -math.inf, math.inf]
    assert (grad[:3] == 0).all()
    assert grad[3].isfinite().all()
    assert (grad[3] != 0).any()
    # A clipped advantage is finite, and so is its gradient where p(ŷ) is not 0.
    loss, grad = loss_and_grad(op, h_S, h_T, W, targets, advantage_clip=1.0)
    assert loss[1].isfinite()
    assert grad.isfinite().all()
    assert (grad[1] != 0).any()


def test_banned_tokens(op):
    """By the student, the teacher, both, neither: as the oracle has it."""
    h_S, h_T, W = random_inputs(3, 20, 8)
    free, bans = torch.zeros(20), torch.zeros(20)
    bans[7] = -math.inf
    targets = torch.full((3,), 7)
    for of_student, of_teacher in ((bans, free), (free, bans), (bans, bans), (free, free)):
        args = (h_S, h_T, LMHead(W, of_student), targets)
        for clip in (None, 1.0):
            options = {"W_teacher": LMHead(W, of_teacher), "advantage_clip": clip}
            loss, _ = loss_and_grad(op, *args, **options)
            expected = reference_sampled_token_loss(*args, reduction="none", **options)
            torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


def test_in_expectation_it_is_the_reverse_kl(op):
    """Σ_ŷ p(ŷ) ∇ℓ(ŷ) is the gradient of KL(student‖teacher): what the paper derives it from."""
    h_S, h_T, W = random_inputs(1, 25, 8, distance=0.5)
    targets, p = torch.arange(25), (h_S @ W.T).softmax(-1)[0]
    h = h_S.expand(25, 8)
    _, grad = loss_and_grad(op, h, h_T.expand(25, 8), W, targets)
    _, expected = op.loss_and_grad(h_S, h_T, W, beta=1.0)
    torch.testing.assert_close((p[:, None] * grad).sum(0), expected[0], rtol=1e-4, atol=1e-6)
