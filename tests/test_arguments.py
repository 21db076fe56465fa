"""Bad input: an error that names the argument, what came and what is wanted."""

import math

import pytest
import torch
from inputs import random_inputs

from opsd_kernels import (
    FusedJSDLoss,
    fused_jsd_loss,
    fused_log_probs,
    fused_sampled_token_loss,
    fused_top_k_loss,
    reference_jsd_loss,
    reference_log_probs,
    reference_sampled_token_loss,
    reference_token_divergence,
    reference_top_k_loss,
    token_divergence,
)

H_S, H_T, HEAD = random_inputs(6, 20, 5)


@pytest.mark.parametrize("loss", [fused_jsd_loss, reference_jsd_loss])
@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (ValueError, r"beta must lie in \[0, 1\], got 1.5", {"beta": 1.5}),
        (ValueError, "beta .* got -0.1", {"beta": -0.1}),
        (ValueError, "beta .* got nan", {"beta": math.nan}),
        (TypeError, "beta must be a number, got str", {"beta": "0.5"}),
        (TypeError, "beta must be float, got torch.int64", {"beta": torch.ones(6).long()}),
        (TypeError, "beta must be a number, got NoneType", {"beta": None}),
        (ValueError, r"beta must lie in \[0, 1\]", {"beta": torch.tensor(1.5)}),
        (ValueError, r"beta .* shape \[6\] .* got \[6, 1\]", {"beta": torch.ones(6, 1)}),
        (ValueError, "beta is on meta", {"beta": torch.ones(6, device="meta")}),
        (ValueError, r"beta must lie in \[0, 1\].*some token", {"beta": torch.full((6,), 1.01)}),
        (ValueError, r"beta must lie in \[0, 1\].*some", {"beta": torch.full((6,), math.nan)}),
        (TypeError, "beta must be a number, got bool", {"beta": True}),
        (ValueError, "temperature must be positive and finite, got 0", {"temperature": 0}),
        (ValueError, "temperature .* got -1", {"temperature": -1.0}),
        (ValueError, "temperature .* got nan", {"temperature": math.nan}),
        (ValueError, "temperature .* got inf", {"temperature": math.inf}),
        (ValueError, "entry_clip must be positive and below .*, got 0", {"entry_clip": 0}),
        (ValueError, "entry_clip .* got -0.05", {"entry_clip": -0.05}),
        (ValueError, "entry_clip .* got nan", {"entry_clip": math.nan}),
        (ValueError, "entry_clip .* got inf", {"entry_clip": math.inf}),
        (ValueError, "temperature is too large", {"temperature": 10**400}),
        (TypeError, "W must be a dense tensor", {"W": HEAD.to_sparse()}),
        (
            ValueError,
            'reduction must be "mean", "sum" or "none", got \'avg\'',
            {"reduction": "avg"},
        ),
        (ValueError, "reduction .* got None", {"reduction": None}),
        (TypeError, "h_student must be a torch.Tensor, got list", {"h_student": [[1.0]]}),
        (
            TypeError,
            r"W must be .*Tensor \[V, D\] or an LMHead, got the module Linear: .* its \.weight",
            {"W": torch.nn.Linear(5, 20)},
        ),
        (TypeError, "h_student must be one of .*, got torch.int64", {"h_student": H_S.long()}),
        (TypeError, "h_teacher is torch.bfloat16, h_student", {"h_teacher": H_T.bfloat16()}),
        (TypeError, "W is torch.float16, h_student torch.float32", {"W": HEAD.half()}),
        (ValueError, "h_teacher is on meta, h_student on cpu", {"h_teacher": H_T.to("meta")}),
        (ValueError, r"W must be \[V, D\], got shape \[100\]; .*FSDP", {"W": HEAD.flatten()}),
        (ValueError, r"W must be \[V, D\]", {"W": HEAD[None]}),
        (ValueError, r"W must have at least one row.*got shape \[0, 5\]", {"W": HEAD[:0]}),
        (ValueError, r"h_student must be \[..., D\], got a scalar", {"h_student": H_S[0, 0]}),
        (ValueError, "same leading shape", {"h_teacher": H_T[:5]}),
        (ValueError, "same leading shape", {"h_teacher": H_T.view(2, 3, 5)}),
        (ValueError, "h_student has 4 features, W 5", {"h_student": H_S[:, :4]}),
        (ValueError, "h_teacher has 4 features, W 5", {"h_teacher": H_T[:, :4]}),
        (ValueError, "h_teacher has 5 features, W_teacher 4", {"W_teacher": HEAD[:, :4]}),
        (ValueError, "W_teacher has 19 rows, W 20", {"W_teacher": HEAD[:19]}),
        (TypeError, "token_weights must be a torch.Tensor, got list", {"token_weights": [1] * 6}),
        (TypeError, "token_weights must be float, int", {"token_weights": torch.ones(6) * 1j}),
        (
            ValueError,
            r"token_weights .* \[6\] .* got \[3, 2\]",
            {"token_weights": torch.ones(3, 2)},
        ),
        (ValueError, "token_weights is on meta", {"token_weights": torch.ones(6, device="meta")}),
        (
            ValueError,
            'must not be negative with reduction "mean"',
            {"token_weights": -torch.ones(6)},
        ),
        (ValueError, "token_weights must be finite", {"token_weights": torch.full((6,), math.inf)}),
        (ValueError, "token_weights must be finite", {"token_weights": torch.full((6,), math.nan)}),
    ],
)
def test_refused(loss, error, message, changed):
    tensors = {"h_student": H_S, "h_teacher": H_T, "W": HEAD}
    tensors.update((k, changed[k]) for k in changed if k in tensors)
    options = {k: v for k, v in changed.items() if k not in tensors}
    with pytest.raises(error, match=message):
        loss(tensors["h_student"], tensors["h_teacher"], tensors["W"], **options)


TARGETS = torch.arange(6)


@pytest.mark.parametrize(
    "function",
    [
        token_divergence,
        reference_token_divergence,
        fused_sampled_token_loss,
        reference_sampled_token_loss,
    ],
)
@pytest.mark.parametrize(
    ("error", "message", "targets"),
    [
        (TypeError, "targets must be a torch.Tensor, got list", [1] * 6),
        (TypeError, "targets must be integers.*got torch.float32", TARGETS.float()),
        (TypeError, "targets must be integers.*got torch.bool", TARGETS.bool()),
        (ValueError, r"targets .* shape \[6\] .* got \[5\]", TARGETS[:5]),
        (ValueError, "targets is on meta, h_student on cpu", TARGETS.to("meta")),
        (ValueError, r"targets must lie in \[0, 20\), the vocabulary", TARGETS - 1),
        (ValueError, r"targets must lie in \[0, 20\)", TARGETS + 15),
        (ValueError, r"targets must lie in \[0, 20\)", torch.full((6,), 2**40)),
    ],
)
def test_targets_refused(function, error, message, targets):
    with pytest.raises(error, match=message):
        function(H_S, H_T, HEAD, targets=targets)


@pytest.mark.parametrize("wrong", ["no", 1, None, torch.tensor(True)], ids=repr)
@pytest.mark.parametrize(
    ("name", "function", "arguments"),
    [
        ("rest", fused_log_probs, (H_S, HEAD, TARGETS)),
        ("rest", reference_log_probs, (H_S, HEAD, TARGETS)),
        ("return_log_probs", fused_sampled_token_loss, (H_S, H_T, HEAD, TARGETS)),
        ("return_log_probs", reference_sampled_token_loss, (H_S, H_T, HEAD, TARGETS)),
        ("return_statistics", fused_top_k_loss, (H_S, HEAD, TARGETS[:, None], -H_S[:, :1].abs())),
        (
            "return_statistics",
            reference_top_k_loss,
            (H_S, HEAD, TARGETS[:, None], -H_S[:, :1].abs()),
        ),
    ],
)
def test_only_a_bool_is_a_flag(name, function, arguments, wrong):
    """Python would take "no" for True."""
    function(*arguments, **{name: True})
    with pytest.raises(TypeError, match=f"^{name} must be a bool, got {type(wrong).__name__}$"):
        function(*arguments, **{name: wrong})


def test_a_beta_without_dimensions_is_that_of_every_token():
    for beta in (0.0, 0.3, 1.0):
        expected = fused_jsd_loss(H_S, H_T, HEAD, beta=beta)
        torch.testing.assert_close(
            fused_jsd_loss(H_S, H_T, HEAD, beta=torch.tensor(beta)), expected
        )


@pytest.mark.parametrize("function", [token_divergence, reference_token_divergence])
def test_no_divergence_is_no_beta(function):
    with pytest.raises(TypeError, match="beta must be a number, got NoneType"):
        function(H_S, H_T, HEAD, beta=None, targets=TARGETS)


@pytest.mark.parametrize("function", [fused_sampled_token_loss, reference_sampled_token_loss])
def test_sampled_token_loss_refuses(function):
    with pytest.raises(TypeError, match=r"targets must be a torch.Tensor, got NoneType"):
        function(H_S, H_T, HEAD, None)
    for clip in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="advantage_clip must be positive"):
            function(H_S, H_T, HEAD, TARGETS, advantage_clip=clip)
    with pytest.raises(ValueError, match="reduction must be"):
        function(H_S, H_T, HEAD, TARGETS, reduction="avg")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_targets_of_any_integer_dtype(dtype):
    """Also where the vocabulary is larger than the dtype counts."""
    for V in (20, 300, 40_000):
        h_S, h_T, W = random_inputs(6, V, 5)
        told = token_divergence(h_S, h_T, W, targets=TARGETS.to(dtype))
        expected = token_divergence(h_S, h_T, W, targets=TARGETS)
        assert torch.equal(told.logp_student, expected.logp_student)


def test_module():
    """What defines the loss is checked when it is made, and shown."""
    options = {"beta": 0.0, "temperature": 1.2, "entry_clip": 0.05, "reduction": "sum"}
    module = FusedJSDLoss(**options)
    assert repr(module) == (
        "FusedJSDLoss(forward KL(teacher‖student), entries clipped at 0.05, "
        "temperature=1.2, reduction='sum')"
    )
    assert not list(module.parameters())
    w = torch.arange(6)
    expected = fused_jsd_loss(H_S, H_T, HEAD, token_weights=w, W_teacher=2 * HEAD, **options)
    assert module(H_S, H_T, HEAD, token_weights=w, W_teacher=2 * HEAD) == expected
    for name, value in (("beta", 2), ("temperature", 0), ("entry_clip", -1), ("reduction", "x")):
        with pytest.raises(ValueError, match=name):
            FusedJSDLoss(**{**options, name: value})
    with pytest.raises(TypeError, match="beta must be a number, got Tensor"):
        FusedJSDLoss(beta=torch.zeros(6))


@pytest.mark.parametrize(
    ("error", "workspace_mib"),
    [(ValueError, -1), (ValueError, math.nan), (ValueError, math.inf), (TypeError, "128")],
)
def test_workspace_refused(error, workspace_mib):
    with pytest.raises(error, match="workspace_mib must be"):
        fused_jsd_loss(H_S, H_T, HEAD, workspace_mib=workspace_mib)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_least_workspace_is_the_least(dtype):
    h_S, h_T, W = random_inputs(6, 30011, 40, dtype)
    with pytest.raises(ValueError, match="cannot hold one row of V=30011") as refusal:
        fused_jsd_loss(h_S, h_T, W, workspace_mib=1e-3)
    least = float(str(refusal.value).rpartition("=")[2])
    loss = fused_jsd_loss(h_S, h_T, W, workspace_mib=least)
    torch.testing.assert_close(loss, fused_jsd_loss(h_S, h_T, W))
    with pytest.raises(ValueError, match=f"workspace_mib={least:g}"):
        fused_jsd_loss(h_S, h_T, W, workspace_mib=least - 0.01)


def test_float64_is_for_the_oracle():
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        fused_jsd_loss(H_S.double(), H_T.double(), HEAD.double())
    assert reference_jsd_loss(H_S.double(), H_T.double(), HEAD.double()).dtype == torch.float64
