"""The op as others call it: with tensors of inference mode, in-place operations, NaN, numbers of
numpy. Right, or refused by name."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from inputs import random_inputs
from schedules import DEVICE
from torch import Tensor, nn

from opsd_kernels import (
    Divergence,
    LMHead,
    fused_divergence_loss,
    fused_entropy,
    fused_jsd_loss,
    fused_log_probs,
    fused_sampled_token_loss,
    reference_jsd_loss,
    token_divergence,
)

N, V, D = 6, 40, 8
IDS = torch.arange(N)
SCHEDULES = {"row workspace": None, "logit-free": 0}
# Of a head that is trained; with a reduced loss and a budget that holds dW, in forward.
SMALL = 0.004


@pytest.fixture(params=SCHEDULES)
def workspace(request):
    if DEVICE.type != "cpu":
        pytest.skip("run once, on a CPU")
    return SCHEDULES[request.param]


def tensors(trained: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    h_S, h_T, W = random_inputs(N, V, D)
    return h_S.requires_grad_(), h_T, W.requires_grad_(trained)


# ... tensors of inference mode

LOSSES: dict[str, Callable[..., Tensor]] = {
    "jsd": lambda h_S, h_T, W, w, **o: fused_jsd_loss(h_S, h_T, W, token_weights=w, **o),
    "beta of each token": lambda h_S, h_T, W, w, **o: fused_jsd_loss(h_S, h_T, W, beta=w, **o),
    "both KLs": lambda h_S, h_T, W, w, **o: fused_divergence_loss(
        h_S, h_T, W, Divergence(forward=w, reverse=0.5), targets=IDS.clone(), advantages=w, **o
    ),
    "sampled tokens": lambda h_S, h_T, W, w, **o: fused_sampled_token_loss(
        h_S, h_T, W, IDS.clone(), **o
    ),
    "statistics": lambda h_S, h_T, W, w, **o: token_divergence(
        h_S, h_T, W, targets=IDS.clone(), **o
    ).loss.mean(),
    "log p": lambda h_S, h_T, W, w, **o: fused_log_probs(
        h_S, W, IDS.clone(), token_weights=w, **o
    ).mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("trained", ["frozen", "weight", "bias"])
def test_tensors_of_inference_mode(loss, trained, workspace):
    """Whatever they are: a teacher's states, its head, a frozen head, weights, β; and the student's
    states, where the head alone is trained. The same as of others."""

    def results(made: Callable[[Tensor], Tensor]) -> list[Tensor]:
        h_S, h_T, W = tensors()
        bias = torch.linspace(-1, 1, V)
        if trained == "frozen":
            leaves = [h_S]
            head = LMHead(made(W.detach()), made(bias))
        elif trained == "weight":
            leaves = [W.requires_grad_()]
            h_S, head = made(h_S.detach()), LMHead(W, made(bias))
        else:
            leaves = [bias.requires_grad_()]
            h_S, head = made(h_S.detach()), LMHead(made(W.detach()), bias)
        w = made(torch.linspace(0.1, 0.9, N))
        value = LOSSES[loss](h_S, made(h_T), head, w, workspace_mib=workspace)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    def of_inference(t: Tensor) -> Tensor:
        with torch.inference_mode():
            return t.clone()

    for found, expected in zip(results(of_inference), results(torch.clone), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradient(mode, workspace):
    h_S, h_T, W = tensors(trained=True)
    expected = fused_jsd_loss(h_S, h_T, W, workspace_mib=workspace)
    with mode():
        found = fused_jsd_loss(h_S, h_T, W, workspace_mib=workspace)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach())


# ... in-place operations


@pytest.mark.parametrize("trained", [False, True])
def test_losses_weighed_in_place(trained, workspace):
    w = torch.linspace(-1, 2, N)
    gradients = []
    for in_place in (False, True):
        h_S, h_T, W = tensors(trained)
        told = token_divergence(h_S, h_T, W, targets=IDS, workspace_mib=workspace)
        loss = told.loss
        if in_place:
            loss *= w
            told.logp_student.mul_(0)
            told.reverse_kl.zero_()
        else:
            loss = loss * w
        loss.sum().backward()
        gradients.append([t.grad for t in (h_S, W) if t.requires_grad])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


def change(t: Tensor) -> None:
    with torch.no_grad():
        t.mul_(2)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="run once, on a CPU")
# Where the weights are known and dW fits the budget, forward makes all gradients.
@pytest.mark.parametrize(
    ("name", "workspace"),
    [
        *((name, mib) for name in ("frozen", "frozen, reduced") for mib in SCHEDULES.values()),
        ("weighed in forward", SCHEDULES["row workspace"]),
    ],
)
def test_a_head_that_backward_does_not_read_may_be_changed(name, workspace):
    gradients = []
    for changes in (False, True):
        h_S, h_T, W = tensors(trained=name == "weighed in forward")
        reduction = "none" if name == "frozen" else "mean"
        loss = fused_jsd_loss(h_S, h_T, W, reduction=reduction, workspace_mib=workspace)
        if changes:
            change(W)
        loss.sum().backward()
        gradients.append([t.grad for t in (h_S, W) if t.requires_grad])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("changed", ["h_T", "W", "bias"])
def test_what_backward_of_a_trained_head_reads_may_not(changed, workspace):
    h_S, h_T, W = tensors(trained=True)
    bias = torch.zeros(V, requires_grad=True)
    loss = fused_jsd_loss(h_S, h_T, LMHead(W, bias), reduction="none", workspace_mib=workspace)
    change({"h_T": h_T, "W": W, "bias": bias}[changed])
    with pytest.raises(RuntimeError, match=r"LM head, or hidden states, were changed in place .*"):
        loss.sum().backward()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_twice(trained, reduction, workspace):
    h_S, h_T, W = tensors(trained)
    loss = fused_jsd_loss(h_S, h_T, W, reduction=reduction, workspace_mib=workspace).sum()
    loss.backward(retain_graph=True)
    leaves = [t for t in (h_S, W) if t.requires_grad]
    once = [t.grad.clone() for t in leaves]
    loss.backward()
    torch.testing.assert_close([t.grad for t in leaves], [2 * g for g in once], rtol=0, atol=0)
    loss = fused_jsd_loss(h_S, h_T, W, reduction=reduction, workspace_mib=workspace).sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True)


# ... NaN


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_upstream_weight_that_is_not_finite_spoils_its_own_row(bad, trained, dtype, workspace):
    w = torch.linspace(0.5, 2, N)
    gradients = []
    for spoilt in (False, True):
        h_S, h_T, W = (t.detach().to(dtype) for t in tensors())
        h_S.requires_grad_()
        W.requires_grad_(trained)
        loss = fused_jsd_loss(h_S, h_T, W, reduction="none", workspace_mib=workspace)
        (loss * w.where(IDS != 3, bad if spoilt else 1.0)).sum().backward()
        gradients.append((h_S.grad, W.grad))
    (true, _), (found, dW) = gradients
    others = IDS != 3
    assert not found[3].isfinite().any()
    # But for the rounding that the largest weight of a call decides.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(found[others], true[others], rtol=tolerance, atol=1e-6)
    if trained:
        assert not dW.isfinite().any()


@pytest.mark.parametrize("mib", [None, SMALL, 0])
def test_a_hidden_state_of_nan_spoils_its_own_row(mib):
    """Of a reduced loss too; and where its token is dropped, nothing."""
    for dropped in (False, True):
        h_S, h_T, W = tensors(trained=True)
        with torch.no_grad():
            h_S[3] = torch.nan
        w = (IDS != 3).float() if dropped else None
        fused_jsd_loss(h_S, h_T, W, token_weights=w, reduction="sum", workspace_mib=mib).backward()
        assert h_S.grad[IDS != 3].isfinite().all()
        assert h_S.grad[3].isnan().all() if not dropped else (h_S.grad[3] == 0).all()
        assert W.grad.isfinite().all() == dropped


@pytest.mark.parametrize("mib", [None, SMALL, 0])
def test_a_loss_that_is_nan_for_all_leaves_what_is_dropped(mib):
    """The upstream gradient of a mean is NaN: so is all that counts, and nothing else."""
    h_S, h_T, W = tensors(trained=True)
    loss = fused_jsd_loss(h_S, h_T, W, token_weights=IDS != 3, workspace_mib=mib)
    (loss * torch.nan).backward()
    assert (h_S.grad[3] == 0).all()
    assert h_S.grad[IDS != 3].isnan().all()
    assert W.grad.isnan().all()


@pytest.mark.parametrize("mib", [None, SMALL, 0])
def test_a_loss_that_does_not_count_has_no_gradient(mib):
    h_S, h_T, W = tensors(trained=True)
    with torch.no_grad():
        h_S[3] = torch.nan
    loss = fused_jsd_loss(h_S, h_T, W, reduction="sum", workspace_mib=mib)
    (loss.nan_to_num() * 0).backward()
    assert (h_S.grad == 0).all()
    assert (W.grad == 0).all()


# ... what is trained


def test_a_frozen_backbone_makes_no_gradient_of_hidden_states():
    """In either way a product less; and in forward nothing of the size of dh_S is allocated. (In
    backward hidden states are copied, without those that do not count.)"""
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.lib.allocations import Allocations

    n, v, d = 64, 50, 128
    U = 2 * n * d * v
    counts = {}
    for backbone in (False, True):
        for reduction in ("none", "mean"):
            h_S, h_T, W = random_inputs(n, v, d)
            h_S.requires_grad_(backbone)
            W.requires_grad_()
            with Allocations() as made, FlopCounterMode(display=False) as flops:
                loss = fused_jsd_loss(h_S, h_T, W, reduction=reduction)
                loss.sum().backward()
            assert (h_S.grad is not None) == backbone
            counts[backbone, reduction] = flops.get_total_flops() / U
            if not backbone:
                copies = [tuple(shape) for shape in made.shapes].count((n, d))
                assert copies == (0 if reduction == "mean" else 1)
    assert counts == {
        (False, "none"): 5, (True, "none"): 6, (False, "mean"): 3, (True, "mean"): 4,
    }  # fmt: skip


# ... numbers and tensors of all kinds


def test_numbers_of_numpy_and_tensors_without_dimensions():
    h_S, h_T, W = tensors()
    expected = fused_jsd_loss(h_S, h_T, W, beta=0.25, temperature=2.0, entry_clip=0.5)
    for number in (np.float64, np.float32, lambda x: x):
        clip, T = number(0.5), number(2.0)
        for beta in (number(0.25), torch.tensor(0.25), torch.tensor(0.25).bfloat16()):
            found = fused_jsd_loss(h_S, h_T, W, beta=beta, temperature=T, entry_clip=clip)
            torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        fused_jsd_loss(h_S, h_T, W, beta=0.25, temperature=2, entry_clip=0.5), expected
    )


class Named(nn.Parameter):
    """A Parameter by another name."""


def test_tensors_of_other_kinds_and_strides(workspace):
    h_S, h_T, W = tensors()
    expected = fused_jsd_loss(h_S, h_T, W, workspace_mib=workspace)
    for w in (nn.Parameter(W), Named(W), W.T.contiguous().T, W.as_subclass(torch.Tensor)):
        found = fused_jsd_loss(
            h_S.T.contiguous().T, h_T[None].expand(2, N, D)[1], w, workspace_mib=workspace
        )
        torch.testing.assert_close(found, expected)


LAYER = nn.Linear(D, V).requires_grad_(False)
REFUSED = [
    (TypeError, r"W must be .*LMHead, got the module Linear: .*\.weight", {"W": LAYER}),
    (TypeError, r"W_teacher must be .* got the module Linear", {"W_teacher": LAYER}),
    (TypeError, r"W must be a torch\.Tensor or an LMHead, got list", {"W": [[1.0] * D] * V}),
    (TypeError, r"W\.weight must be a torch\.Tensor, got Linear", {"W": LMHead(LAYER)}),
    (TypeError, "W must be one of .*got torch.int8", {"W": torch.ones(V, D, dtype=torch.int8)}),
    (TypeError, "h_teacher must be a torch.Tensor, got ndarray", {"h_teacher": np.zeros((N, D))}),
    (ValueError, "W is on meta, h_student on cpu", {"W": torch.ones(V, D, device="meta")}),
    (ValueError, "temperature must be positive", {"temperature": -1}),
    (ValueError, r"temperature must lie in \[1e-08, 1e\+36\], got 1e-09$", {"temperature": 1e-9}),
    (ValueError, "got 1e\\+40$", {"temperature": 1e40}),
    (ValueError, r"got 1\.0 over a head's scale of 1000000000\.0",
     {"W": LMHead(LAYER.weight, scale=1e9)}),
    (TypeError, "temperature must be a number, got Tensor", {"temperature": torch.tensor(1.0)}),
    (TypeError, "beta must be float, got torch.bool", {"beta": torch.ones(N, dtype=torch.bool)}),
    (TypeError, "beta must be a number, got bool", {"beta": True}),
    (TypeError, "token_weights must be a torch.Tensor, got list", {"token_weights": [1.0] * N}),
    (ValueError, 'reduction must be "mean", "sum" or "none", got \'Mean\'', {"reduction": "Mean"}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "changed"), REFUSED)
def test_what_is_refused(error, message, changed):
    h_S, h_T, W = tensors()
    given = {"h_student": h_S, "h_teacher": h_T, "W": W} | changed
    with pytest.raises(error, match=message):
        fused_jsd_loss(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_targets_that_are_no_ids(dtype):
    h_S, h_T, W = tensors()
    with pytest.raises(TypeError, match="targets must be integers, the ids of tokens, got"):
        fused_sampled_token_loss(h_S, h_T, W, IDS.to(dtype))


@pytest.mark.parametrize("T", [1e-8, 1e-6, 1e-3])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_temperatures_near_zero(T, beta, workspace):
    h_S, h_T, W = tensors()
    loss = fused_jsd_loss(h_S, h_T, W, beta=beta, temperature=T, workspace_mib=workspace)
    loss.backward()
    true = reference_jsd_loss(h_S.double(), h_T.double(), W.double(), beta=beta, temperature=T)
    torch.testing.assert_close(loss.double(), true, rtol=1e-2, atol=1e-6)
    assert h_S.grad.isfinite().all()


def test_transforms_of_torch_func_are_refused():
    h_S, h_T, W = (t.detach() for t in tensors())
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        torch.func.grad(lambda h: fused_jsd_loss(h, h_T, W))(h_S)
    with pytest.raises(RuntimeError, match=r"autograd\.Function"):
        torch.func.vmap(lambda h: fused_entropy(h[None], W))(h_S)


def test_what_a_head_prints():
    head = LMHead(torch.zeros(5, 3, dtype=torch.bfloat16), torch.ones(5), softcap=30.0)
    assert (
        repr(head)
        == str(head)
        == (
            "LMHead(weight=<[5, 3] bfloat16 on cpu>, bias=<[5] float32 on cpu>, softcap=30.0, "
            "scale=1.0, vocab_size=None, group=None)"
        )
    )
    assert "trained" in repr(LMHead(nn.Parameter(torch.zeros(5, 3))))
