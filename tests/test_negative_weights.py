"""Weights of both signs: a token of negative weight ascends what the others descend."""

import pytest
import torch
from inputs import random_inputs
from schedules import SCHEDULES
from test_trained_head import WAYS, by, close, exact
from torch import Tensor

from opsd_kernels import (
    LMHead,
    fused_jsd_loss,
    fused_log_probs,
    fused_sampled_token_loss,
    fused_top_k_loss,
    reference_jsd_loss,
    reference_sampled_token_loss,
    token_divergence,
)
from opsd_kernels.loss import reduce_tokens

N, V, D = 12, 300, 16
WEIGHTS = torch.linspace(-1, 0.5, N).roll(5) * (torch.arange(N) % 4 > 0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_the_oracle_weighs_the_gradient_of_each_token():
    h_S, h_T, W = (t.double() for t in random_inputs(N, V, D, distance=0.5))
    grads = []
    for weighed in (False, True):
        h = h_S.clone().requires_grad_()
        options = {"token_weights": WEIGHTS, "reduction": "sum"} if weighed else {}
        reference_jsd_loss(h, h_T, W, **({"reduction": "sum"} | options)).backward()
        grads.append(h.grad)
    torch.testing.assert_close(grads[1], WEIGHTS.double()[:, None] * grads[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_against_oracle(way, dtype):
    """Of a trained head, by the way where weights are known in forward too."""
    h_S, h_T, W = random_inputs(N, V, D, dtype, distance=0.5)
    head = LMHead(W, torch.linspace(-1, 1, V).to(dtype))
    reduction = "sum" if "forward" in way else "none"
    options = {"token_weights": WEIGHTS, "reduction": reduction, "temperature": 0.7}
    found = by(way, fused_jsd_loss, h_S, head, h_T, **options)
    # What is summed has both signs, so that its noise is that of the parts.
    close(found, exact(reference_jsd_loss, h_S, head, h_T, **options), dtype, 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_minus_the_weights_is_minus_the_gradient(way):
    """Bit for bit: no bound, scale or rounding has a sign."""
    h_S, h_T, W = random_inputs(N, V, D, torch.float16, distance=0.5)
    for beta in (0.5, 0.0, 1.0):
        options = {"beta": beta, "reduction": "sum"}
        plus, minus = (
            by(way, fused_jsd_loss, h_S, LMHead(W), h_T, token_weights=w, **options)
            for w in (WEIGHTS, -WEIGHTS)
        )
        for a, b in zip(plus, minus, strict=True):
            assert torch.equal(a, -b)
        assert (plus[1][WEIGHTS == 0] == 0).all()
        assert plus[1].abs().sum() > 0


@pytest.mark.parametrize("op", SCHEDULES, ids=str)
def test_a_frozen_head_and_the_other_functions(op):
    h_S, h_T, W = random_inputs(N, V, D, distance=0.5)
    targets = torch.arange(N)

    def gradient(function, *args, **options) -> Tensor:
        h = h_S.clone().requires_grad_()
        value = op.run(function, h, *args, **options)
        (value if isinstance(value, Tensor) else value.loss).sum().backward()
        return h.grad

    none = {"reduction": "none"}
    for function, args, options in (
        (fused_jsd_loss, (h_T, W), none),
        (fused_jsd_loss, (h_T, W), {"reduction": "sum"}),
        (token_divergence, (h_T, W), {"targets": targets}),
        (fused_sampled_token_loss, (h_T, W, targets), none),
        (fused_log_probs, (W, targets), {}),
        (fused_top_k_loss, (W, targets[:, None], torch.full((N, 1), -0.5)), none),
    ):
        expected = WEIGHTS[:, None] * gradient(function, *args, **options)
        found = gradient(function, *args, token_weights=WEIGHTS, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_an_infinite_loss_is_minus_infinite_and_without_gradient(way):
    h_S, h_T, W = random_inputs(6, 50, 8)
    bias = torch.zeros(50)
    banned = bias.clone()
    banned[3] = -torch.inf
    found = by(way, fused_jsd_loss, h_S, LMHead(W, banned), h_T, W_teacher=LMHead(W, bias),
               beta=0.0, reduction="sum", token_weights=-torch.ones(6))  # fmt: skip
    assert found[0] == -torch.inf
    assert all((t == 0).all() for t in found[1:])


@pytest.mark.parametrize(
    "function", [fused_jsd_loss, reference_jsd_loss, fused_sampled_token_loss,
                 reference_sampled_token_loss],
)  # fmt: skip
def test_a_mean_refuses_them(function):
    h_S, h_T, W = random_inputs(N, V, D)
    targets = (torch.arange(N),) if "sampled" in function.__name__ else ()
    for reduction in ("sum", "none"):
        function(h_S, h_T, W, *targets, token_weights=WEIGHTS, reduction=reduction)
    with pytest.raises(ValueError, match='must not be negative with reduction "mean"'):
        function(h_S, h_T, W, *targets, token_weights=WEIGHTS)
    # Those that are 0, even −0, are none.
    function(h_S, h_T, W, *targets, token_weights=-0.0 * torch.ones(N))


def test_where_they_cannot_be_read_a_mean_is_what_is_said():
    loss, weights = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -3.0])
    assert reduce_tokens(loss, weights, "mean") == -5
    assert reduce_tokens(loss, -weights, "mean") == 2.5
