"""The family and the oracle, proven against autograd through the formulas as they are written."""

import math
from dataclasses import replace

import pytest
import textbook
import torch
from accuracy import exact, textbook_doubt
from high_precision import row
from inputs import random_inputs
from mpmath import mp

from opsd_kernels import (
    Divergence,
    divergence_name,
    reference_divergence_loss,
    reference_jsd_loss,
    reference_token_divergence,
)
from opsd_kernels.divergence import Member
from opsd_kernels.schedules.rows import divergence_rows_

BETAS = [0.0, 1e-3, 0.3, 0.5, 0.8, 0.999, 1.0]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("entry_clip", [None, 1e-3, 0.05])
@pytest.mark.parametrize("beta", BETAS)
def test_oracle_is_the_formula(beta, entry_clip, temperature):
    h_S, h_T, W = (t.double() for t in random_inputs(7, 50, 6, size=2.0, distance=0.5))
    loss, grad = exact(h_S, h_T, W, beta=beta, entry_clip=entry_clip, temperature=temperature)
    h = h_S.clone().requires_grad_()
    expected = textbook.divergence(h @ W.T / temperature, h_T @ W.T / temperature, beta, entry_clip)
    expected.sum().backward()
    assert (loss - expected).abs().max() < 1e-14
    assert (grad - h.grad).abs().max() < 1e-14


@pytest.mark.parametrize("beta", BETAS)
def test_oracle_gradcheck(beta):
    """The first derivative and the second."""
    h_S, h_T, W = (t.double() for t in random_inputs(3, 11, 4, distance=0.5))
    options = {"temperature": 1.3, "token_weights": torch.tensor([1.0, 0.0, 2.0])}
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(
            lambda h: reference_jsd_loss(h, h_T, W, beta=beta, **options),
            h_S.requires_grad_(),
            fast_mode=True,
        )


FAMILY = [
    *(Divergence(beta=beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)),
    Divergence(beta=torch.tensor([0.0, 0.3, 1.0])),
    Divergence(forward=0.5, reverse=-2.0),
    Divergence(beta=0.3, forward=1.5),
    Divergence(beta=0.8, forward=torch.tensor([0.5, -1.0, 0.0]), reverse=1.0),
]


@pytest.mark.parametrize("distance", [1.0, 1e-7])
@pytest.mark.parametrize("entry_clip", [None, 0.02])
@pytest.mark.parametrize("divergence", FAMILY, ids=str)
def test_oracle_against_sixty_digits(divergence, entry_clip, distance):
    """Value and gradient with respect to logits, with a policy term, within what `textbook_doubt`
    allows; and the gradient of 60 digits is that of its values."""
    V = 6
    z_S, z_T, _ = (t.double() for t in random_inputs(3, 1, V, size=2.0, distance=distance))
    divergence = replace(divergence, entry_clip=entry_clip)
    A, targets = torch.tensor([0.0, 1.5, -0.5]), torch.tensor([0, 2, 5])
    z = z_S.clone().requires_grad_()
    options = {"targets": targets, "advantages": A, "reduction": "none"}
    loss = reference_divergence_loss(z, z_T, torch.eye(V).double(), divergence, **options)
    loss.sum().backward()
    doubt = textbook_doubt(V, divergence)
    for n in range(3):
        policy = int(targets[n]), float(A[n])

        def true_loss(*student, n=n, policy=policy):
            return row(student, z_T[n].tolist(), divergence, n, *policy)[0]

        at = z_S[n].tolist()
        true, gradient = row(at, z_T[n].tolist(), divergence, n, *policy)
        assert abs(float(true - loss[n].item())) < doubt * (1 + abs(loss[n].item()))
        for v in range(V):
            assert abs(float(gradient[v] - z.grad[n, v].item())) < 2 * doubt
        v = n + 3
        by_difference = mp.diff(true_loss, at, tuple(int(v == u) for u in range(V)))
        assert abs(float(by_difference - gradient[v])) < 1e-15


@pytest.mark.parametrize("entry_clip", [None, 1e-3, 0.05])
def test_oracle_of_a_beta_of_each_token_is_that_of_each_beta(entry_clip):
    h_S, h_T, W = (t.double() for t in random_inputs(21, 50, 6, size=2.0, distance=0.5))
    betas = torch.tensor(BETAS, dtype=torch.float64).repeat(3)
    loss, grad = exact(h_S, h_T, W, beta=betas, entry_clip=entry_clip)
    for beta in BETAS:
        rows = betas == beta
        expected = exact(h_S[rows], h_T[rows], W, beta=beta, entry_clip=entry_clip)
        torch.testing.assert_close(loss[rows], expected[0], rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(grad[rows], expected[1], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("entry_clip", [None, 1e-3, 0.05])
@pytest.mark.parametrize("beta", BETAS)
def test_oracle_tells_what_the_formulas_say(beta, entry_clip):
    h_S, h_T, W = (t.double() for t in random_inputs(7, 50, 6, size=2.0, distance=0.5))
    targets, T = torch.arange(7) * 3, 1.3
    told = reference_token_divergence(
        h_S, h_T, W, beta=beta, entry_clip=entry_clip, targets=targets, temperature=T
    )
    z_S, z_T = h_S @ W.T / T, h_T @ W.T / T
    log_p, log_q = z_S.log_softmax(-1), z_T.log_softmax(-1)
    clipped = textbook.divergence(z_S, z_T, beta, entry_clip)
    whole = textbook.divergence(z_S, z_T, beta)
    expected = {
        "loss": clipped,
        "forward_kl": textbook.divergence(z_S, z_T, 0),
        "reverse_kl": textbook.divergence(z_S, z_T, 1),
        "entropy_student": torch.distributions.Categorical(logits=z_S).entropy(),
        "entropy_teacher": torch.distributions.Categorical(logits=z_T).entropy(),
        "clipped_share": 1 - clipped / whole,
        "logp_student": log_p.gather(1, targets[:, None])[:, 0],
        "logp_teacher": log_q.gather(1, targets[:, None])[:, 0],
    }
    assert list(expected) == list(told._fields)
    for name, field in expected.items():
        torch.testing.assert_close(getattr(told, name), field, rtol=1e-10, atol=1e-12)
    if entry_clip == 1e-3 and beta in (0, 0.5, 1):
        assert (told.clipped_share > 0.1).any()


def test_beta_weighs_the_teacher():
    """β → 1 makes the mixture the teacher: JSD_β / (1 − β) tends to KL(student‖teacher)."""
    h_S, h_T, W = (t.double() for t in random_inputs(5, 20, 4, distance=0.5))

    def loss(beta: float) -> float:
        return reference_jsd_loss(h_S, h_T, W, beta=beta).item()

    assert loss(1 - 1e-6) / 1e-6 == pytest.approx(loss(1.0), rel=1e-4)
    assert loss(1e-6) / 1e-6 == pytest.approx(loss(0.0), rel=1e-4)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("distance", [1e-3, 1e-2, 0.1, 1.0])
def test_fp32_values_keep_their_digits(beta, distance):
    """Where student and teacher agree, the textbook forms return noise, even negative sums. Given
    the same fp32 logits, the stable forms are right to 1e-3 of the smallest divergence here."""
    h_S, h_T, W = random_inputs(32, 4096, 64, distance=distance)
    z_S, z_T = h_S @ W.T, h_T @ W.T
    expected = divergence_rows_(z_S.double(), z_T.double(), Member.of(beta), needs_score=False)
    loss = divergence_rows_(z_S.clone(), z_T.clone(), Member.of(beta), needs_score=False)
    error = ((loss - expected) / expected).abs().max()
    assert error < 1e-6 / distance, f"mean divergence {expected.mean():.1e}"
    if distance == 1e-3:
        naive = textbook.divergence(z_S, z_T, beta)
        assert ((naive - expected) / expected).abs().max() > 100 * error


@pytest.mark.parametrize("entry_clip", [None, 0.05])
@pytest.mark.parametrize("beta", BETAS)
def test_infinite_logits(beta, entry_clip):
    """−∞ on both sides counts for nothing, on one side for what the formula's limit says."""
    inf = math.inf
    both = torch.tensor([[1.0, 2.0, -inf, 0.5]]), torch.tensor([[0.5, 2.0, -inf, 1.0]])
    student_only = torch.tensor([[1.0, 2.0, -inf, 0.5]]), torch.tensor([[0.5, 2.0, -1.0, 1.0]])
    teacher_only = student_only[1], student_only[0]
    far = torch.tensor([[0.0, -500.0, -600.0]]), torch.tensor([[0.0, -600.0, -500.0]])
    opposite = torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]])
    beyond = torch.tensor([[0.0, -3e7]]), torch.tensor([[-3e7, 0.0]])
    for (z_S, z_T), name in [
        (both, "both"),
        (student_only, "student_only"),
        (teacher_only, "teacher_only"),
        (far, "far"),
        (opposite, "opposite"),
        (beyond, "beyond"),
    ]:
        grad = z_S.clone()
        loss = divergence_rows_(grad, z_T.clone(), Member.of(beta, entry_clip), needs_score=True)
        assert not loss.isnan().any(), name
        assert not grad.isnan().any(), name
        divergent = {"student_only": 0, "teacher_only": 1}.get(name)
        if beta == divergent and entry_clip is None:
            assert loss.item() == inf
            assert (grad == 0).all()
        else:
            # −∞ stands for a probability that float64 rounds away.
            finite_S, finite_T = (z.double().nan_to_num(neginf=-700) for z in (z_S, z_T))
            finite_S.requires_grad_()
            expected = textbook.divergence(finite_S, finite_T, beta, entry_clip)
            expected.sum().backward()
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-12), name
            assert (grad - finite_S.grad).abs().max() < 1e-6, name


@pytest.mark.parametrize("beta", BETAS)
def test_saturation(beta):
    """Student and teacher on different entries: the divergence no longer depends on how far."""
    z_S, z_T = torch.tensor([[0.0, -60.0]]), torch.tensor([[-60.0, 0.0]])
    for b in (beta, 1e-6, 1 - 1e-6):
        if b in (0, 1):
            continue
        loss = divergence_rows_(z_S.clone(), z_T.clone(), Member.of(b), needs_score=False)
        expected = textbook.divergence(z_S.double(), z_T.double(), b)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("entry_clip", [None, 0.05])
@pytest.mark.parametrize("beta", BETAS)
def test_nan_stays_in_its_row(beta, entry_clip):
    z_S, z_T = torch.randn(4, 9), torch.randn(4, 9)
    z_S[1, 3], z_T[2, 5] = math.nan, math.nan
    loss = divergence_rows_(z_S, z_T, Member.of(beta, entry_clip), needs_score=True)
    assert loss.isnan().tolist() == [False, True, True, False]
    assert z_S.isnan().any(-1).tolist() == [False, True, True, False]


@pytest.mark.parametrize("gap", [1.0, 2**-10])
@pytest.mark.parametrize("entry_clip", [None, 0.05])
@pytest.mark.parametrize("beta", BETAS)
def test_confident_tokens_keep_their_digits(beta, entry_clip, gap):
    """1 − p of a millionth: unless shifted, the gradient is a difference of numbers near 1."""
    z_S, z_T = torch.full((1, 1000), -21.0), torch.full((1, 1000), -21.0 + gap)
    z_S[0, 7] = z_T[0, 7] = 0.0
    expected, grad = z_S.double(), z_S.clone()
    expected_loss = divergence_rows_(
        expected, z_T.double(), Member.of(beta, entry_clip), needs_score=True
    )
    loss = divergence_rows_(grad, z_T.clone(), Member.of(beta, entry_clip), needs_score=True)
    assert (grad - expected).norm() < (1e-5 + 1e-7 / gap) * expected.norm()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-4)


def test_mostly_clipped_rows_keep_their_digits():
    """Nearly all the mass in one clipped entry: the null term would cost more than it saves."""
    z_S = torch.tensor([[-7.5078, -4.5514, -0.011164]])
    z_T = torch.tensor([[-7.7128, -6.1914, -0.0024971]])
    expected = textbook.divergence(z_S.double(), z_T.double(), 0, 1e-3)
    loss = divergence_rows_(z_S, z_T, Member.of(0, 1e-3), needs_score=False)
    assert loss.item() == pytest.approx(expected.item(), rel=5e-6)


def test_names():
    assert divergence_name(0.0) == "forward KL(teacher‖student)"
    assert divergence_name(1.0) == "reverse KL(student‖teacher)"
    assert divergence_name(0.5) == "JSD(β=0.5 on the teacher)"
    assert divergence_name(0.0, 0.05).endswith("entries clipped at 0.05")
    assert divergence_name(torch.zeros(3)) == "JSD(β on the teacher, token by token)"
