"""`token_divergence`, and a β of each token: against the oracle, and what is promised of them."""

import math
from unittest import mock

import pytest
import torch
from inputs import BETAS, language_like_inputs, random_inputs, some_betas
from schedules import LOGIT_FREE, ROW_WORKSPACE

from opsd_kernels import reference_token_divergence, token_divergence
from opsd_kernels.schedules import planning, row_workspace

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def loss_and_grad(op, h_S, h_T, W, **options):
    h = h_S.detach().clone().requires_grad_()
    told = op.run(token_divergence, h, h_T, W, **options)
    told.loss.sum().backward()
    return told._replace(loss=told.loss.detach()), h.grad


@pytest.mark.parametrize("entry_clip", [None, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_token_has_the_divergence_of_its_beta(op, dtype, entry_clip):
    """All of the family in one call, as if each member had been called for."""
    h_S, h_T, W = language_like_inputs(28, 1200, 48, dtype, 0.3)
    betas = torch.tensor(BETAS).repeat(4)
    loss, grad = op.loss_and_grad(h_S, h_T, W, beta=betas, entry_clip=entry_clip)
    for beta in BETAS:
        rows = betas == beta
        alone, its_grad = op.loss_and_grad(
            h_S[rows], h_T[rows], W, beta=beta, entry_clip=entry_clip
        )
        torch.testing.assert_close(loss[rows], alone, rtol=1e-5, atol=1e-9)
        # Two results, each with its own rounding.
        unit = 1.5 * torch.finfo(dtype).eps + 1e-4
        assert (grad[rows].double() - its_grad.double()).norm() < unit * its_grad.double().norm()


@pytest.mark.parametrize("distance", [1e-3, 0.3, 3.0])
def test_gradient_of_any_beta_is_rounded_once(op, distance):
    """As tests/test_loss.py has it of each divergence alone."""
    V = 2048 if op is LOGIT_FREE and op.device.type == "cpu" else 8192
    h_S, h_T, W = language_like_inputs(64, V, 128, torch.bfloat16, distance)
    for betas in (some_betas(64), torch.rand(64, generator=torch.Generator().manual_seed(1))):
        _, grad = op.loss_and_grad(h_S, h_T, W, beta=betas)
        h = h_S.double().requires_grad_()
        reference_token_divergence(h, h_T.double(), W.double(), beta=betas).loss.sum().backward()
        rounding = (h.grad.bfloat16() - h.grad).norm()
        assert (grad - h.grad).norm() / rounding < (1.1 if op is ROW_WORKSPACE else 1.5)


def test_betas_that_round_to_an_end_stay_divergences_of_the_middle(op):
    h_S, h_T, W = random_inputs(2, 50, 8, distance=1.0)
    near_ends = torch.tensor([1e-60, 1 - 1e-12], dtype=torch.float64)
    assert (op(h_S, h_T, W, beta=near_ends, reduction="none") < 1e-5).all()
    assert (op(h_S, h_T, W, beta=near_ends.round(), reduction="none") > 1e-2).all()


def test_statistics_of_tokens_that_nearly_agree(op):
    """Both KLs to 1% at 1e-7, where Σ q x in fp32 is noise; logged beside any loss."""
    h_S, h_T, W = random_inputs(32, 16384, 128, distance=5e-4)
    told = op.run(token_divergence, h_S, h_T, W, beta=0.0, entry_clip=1e-9)
    oracle = reference_token_divergence(h_S, h_T, W, beta=0.0, entry_clip=1e-9)
    assert oracle.forward_kl.max() < 1e-6
    for name in ("forward_kl", "reverse_kl"):
        expected = getattr(oracle, name)
        assert ((getattr(told, name) - expected) / expected).abs().max() < 0.01
    assert (oracle.clipped_share > 0.1).all()
    assert (told.clipped_share / oracle.clipped_share - 1).abs().max() < 0.01


def test_loss_is_that_of_the_fused_loss(op):
    h_S, h_T, W = random_inputs(12, 700, 16, distance=0.3)
    h_S, h_T, w = h_S.view(3, 4, 16), h_T.view(3, 4, 16), torch.rand(3, 4)
    w[1, 1] = 0
    targets = torch.randint(700, (3, 4))
    for options in ({"beta": 0.0, "entry_clip": 0.01}, {"beta": some_betas(12).view(3, 4)}):
        told, grad = loss_and_grad(op, h_S, h_T, W, targets=targets, token_weights=w, **options)
        assert all(field.shape == (3, 4) for field in told)
        assert all(field[1, 1] == 0 for field in told)
        expected, its_grad = op.loss_and_grad(h_S, h_T, W, token_weights=w, **options)
        torch.testing.assert_close(told.loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad, its_grad, rtol=1e-4, atol=1e-8)
    without = op.run(token_divergence, h_S, h_T, W)
    assert without.logp_student is None
    assert without.logp_teacher is None


def test_only_the_loss_has_a_gradient(op):
    h_S, h_T, W = random_inputs(5, 30, 8)
    h_S.requires_grad_()
    told = op.run(token_divergence, h_S, h_T, W, targets=torch.arange(5))
    assert [name for name in told._fields if getattr(told, name).requires_grad] == ["loss"]
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            again = op.run(token_divergence, h_S, h_T, W, targets=torch.arange(5))
        assert not again.loss.requires_grad
        for name in told._fields:
            torch.testing.assert_close(getattr(again, name), getattr(told, name).detach())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, "each"])
def test_nan_spoils_one_token_and_dropped_tokens_nothing(op, beta):
    h_S, h_T, W = random_inputs(6, 40, 5)
    options = {"beta": some_betas(6) if beta == "each" else beta, "targets": torch.arange(6)}
    clean, grad = loss_and_grad(op, h_S, h_T, W, entry_clip=0.01, **options)
    h_S[2], h_T[4] = math.nan, math.nan
    told, spoiled = loss_and_grad(op, h_S, h_T, W, entry_clip=0.01, **options)
    others = torch.tensor([0, 1, 3, 5])
    for name in told._fields:
        assert torch.equal(getattr(told, name)[others], getattr(clean, name)[others])
        where = getattr(told, name).isnan().nonzero().flatten().tolist()
        side = {"entropy_student": [2], "logp_student": [2]}
        side |= {"entropy_teacher": [4], "logp_teacher": [4]}
        assert where == side.get(name, [2, 4]), name
    assert torch.equal(spoiled[others], grad[others])
    weights = torch.ones(6)
    weights[[2, 4]] = 0
    options["targets"][2] = -100  # as labels have it, of tokens that do not count
    told, grad = loss_and_grad(op, h_S, h_T, W, entry_clip=0.01, token_weights=weights, **options)
    assert all((field[[2, 4]] == 0).all() and field.isfinite().all() for field in told)
    assert (grad[[2, 4]] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("kernel", [False, True])
def test_dropped_tokens_where_the_mask_is_not_read(kernel):
    """On a GPU the row workspace computes all rows; what it makes of dropped ones is left out."""
    h_S, h_T, W = random_inputs(6, 40, 5)
    h_S[2] = math.nan
    weights, targets = torch.tensor([1.0, 1, 0, 1, 1, 1]), torch.arange(6)
    with (
        mock.patch.object(row_workspace, "kept", return_value=None),
        mock.patch.object(planning, "uses_rows_kernel", return_value=kernel),
    ):
        told, grad = loss_and_grad(
            ROW_WORKSPACE, h_S, h_T, W, token_weights=weights, targets=targets
        )
    assert all(field[2] == 0 and field.isfinite().all() for field in told)
    assert (grad[2] == 0).all()
    assert grad.isfinite().all()


def test_infinite_kls_are_told_beside_a_finite_loss(op):
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-3e38, 0.0]])
    h_S = torch.tensor([[2.0, 0.5], [-0.0, 0.5]])
    h_T = torch.tensor([[-0.0, 0.5], [2.0, 0.5]])
    for options in ({"beta": 0.5}, {"beta": torch.tensor([0.5, 0.3])}):
        told, grad = loss_and_grad(op, h_S, h_T, W, **options)
        assert told.loss.isfinite().all()
        assert grad.isfinite().all()
        assert told.forward_kl.isinf().tolist() == [True, False]
        assert told.reverse_kl.isinf().tolist() == [False, True]
        assert told.entropy_student.isfinite().all()
        assert told.entropy_teacher.isfinite().all()
    told, grad = loss_and_grad(op, h_S, h_T, W, beta=torch.tensor([0.0, 1.0]))
    assert told.loss.isinf().all()
    assert (grad == 0).all()
    told, grad = loss_and_grad(op, h_S, h_T, W, beta=torch.tensor([0.0, 1.0]), entry_clip=0.05)
    assert told.loss.isfinite().all()
    assert (told.clipped_share == 1).all()
    assert grad.isfinite().all()


def test_kls_of_sides_far_apart(op):
    """Log-ratios of 200, beyond what eˣ holds in fp32: no JSD sees a difference, the KLs do."""
    W = torch.eye(3)
    h_S, h_T = torch.tensor([[0.0, -200, -5]] * 4), torch.tensor([[-200.0, 0, -5]] * 4)
    betas = torch.tensor([0.0, 1.0, 0.5, 0.1])
    told, grad = loss_and_grad(op, h_S, h_T, W, beta=betas)
    h = h_S.double().requires_grad_()
    oracle = reference_token_divergence(h, h_T.double(), W.double(), beta=betas)
    oracle.loss.sum().backward()
    for name in ("loss", "forward_kl", "reverse_kl"):
        torch.testing.assert_close(
            getattr(told, name).double(), getattr(oracle, name).detach(), rtol=1e-5, atol=0
        )
    assert (grad - h.grad).abs().max() < 1e-4 * h.grad.abs().max()


def test_no_tokens(op):
    h_S, h_T, W = random_inputs(0, 20, 5)
    empty = torch.zeros(0)
    told, grad = loss_and_grad(op, h_S, h_T, W, beta=empty, targets=empty.long())
    assert all(field.shape == (0,) for field in told)
    assert grad.shape == (0, 5)


def test_what_cannot_be_read_and_is_wrong_gives_nan():
    """On a GPU ids and β are not looked at."""
    h_S, h_T, W = random_inputs(3, 20, 5)
    with mock.patch("opsd_kernels.checks.is_readable", return_value=False):
        oracle = reference_token_divergence(h_S, h_T, W, targets=torch.tensor([3, 20, -1]))
        assert oracle.logp_student.isnan().tolist() == [False, True, True]
        for op in (ROW_WORKSPACE, LOGIT_FREE):
            betas = torch.tensor([0.5, 1.01, -0.1])
            assert op(h_S, h_T, W, beta=betas, reduction="none").isnan().tolist() == [0, 1, 1]
        for op in (ROW_WORKSPACE, LOGIT_FREE):
            told, grad = loss_and_grad(op, h_S, h_T, W, targets=torch.tensor([3, 20, -1]))
            assert told.logp_student.isnan().tolist() == [False, True, True]
            assert told.logp_teacher.isnan().tolist() == [False, True, True]
            assert told.loss.isfinite().all()
            assert grad.isfinite().all()
