"""`fused_log_probs` of K tokens at each position, and of all others together."""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from accuracy import LOSS_UNITS
from heads import EXTRAS
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import random_inputs
from moved_logits import units
from test_log_probs import UNITS, WAYS, gradients
from torch import Tensor
from torch.utils._pytree import tree_map_only

from opsd_kernels import LMHead, fused_log_probs, reference_log_probs
from opsd_kernels.schedules import planning

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def together(function: Any, *args: Any, **options: Any) -> Tensor:
    """[N, K + 1] log p of the targets, and of the rest."""
    found = function(*args, rest=True, **options)
    return torch.cat([found.log_probs, found.log_rest[:, None]], -1)


def by(way: str, *args: Any, **options: Any) -> list[Tensor]:
    """`together` of the fused function, and the gradients of its weighed sum."""
    op, workspace_mib, with_rows = WAYS[way]
    args, options = tree_map_only(Tensor, lambda t: t.to(op.device), (args, options))
    uses = with_rows or op.device.type == "cuda"
    with mock.patch.object(planning, "uses_rows_kernel", return_value=uses):
        fused = partial(together, fused_log_probs)
        found = gradients(fused, *args, workspace_mib=workspace_mib, **options)
    return [t.cpu() for t in found]


DRAWN = {
    "N": st.integers(1, 9),
    "V": st.sampled_from([1, 2, 17, 300]),
    "D": st.sampled_from([1, 8, 33]),
    "K": st.sampled_from([1, 2, 5, 40]),
    "dtype": st.sampled_from(DTYPES),
    "temperature": st.sampled_from([1.0, 0.5, 1.7]),
    "log_size": st.floats(-2, 1.2),
    "extras": EXTRAS,
    "trained": st.booleans(),
    "seed": st.integers(0, 2**16),
}


@given(**DRAWN)
@settings(max_examples=80)
def test_against_oracle_in_pytorch(**drawn):
    check("PyTorch, backward", **drawn)


@given(**DRAWN)
@settings(max_examples=10)  # the interpreter takes its time
def test_against_oracle_logit_free(**drawn):
    check("logit-free", **drawn)


@given(**DRAWN)
@settings(max_examples=6)
def test_against_oracle_with_rows(**drawn):
    check("rows, backward", **drawn)


def check(way, N, V, D, K, dtype, temperature, log_size, extras, trained, seed):
    """Any ids: likely, banned, repeated, absent."""
    h, _, W = random_inputs(N, V, D, dtype, size=10**log_size, seed=seed)
    head = LMHead(W) if extras is None else extras.heads(W, None, seed)[0]
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(-2, V + 2, (N, K), generator=g)
    upstream = torch.randn(N, K + 1, generator=g)
    options = {"temperature": temperature}

    found = by(way, h, head, targets, trained=trained, upstream=upstream, **options)
    assert [t.dtype for t in found] == [torch.float32] + [dtype] * (len(found) - 1)
    found[2:] = [t[:V] for t in found[2:]]  # without padded rows

    def oracle(h: Tensor, head: LMHead, moves: Any) -> Tensor:
        return together(reference_log_probs, h, head, targets, **options)

    tiles = dtype != torch.float32 and "PyTorch" not in way
    of_values, *of_gradients = units(found, oracle, h, head, upstream, tiles)
    assert of_values < LOSS_UNITS
    assert all(error < UNITS for error in of_gradients)


def test_one_of_several_is_the_one(op):
    """As without the dimension of several, in value and gradient; and with it K = 1 is allowed."""
    h, _, W = random_inputs(9, 60, 8, size=2.0)
    targets = torch.arange(9) * 6
    expected = op.run(fused_log_probs, h, W, targets)
    several = op.run(fused_log_probs, h, W, targets[:, None])
    assert several.shape == (9, 1)
    torch.testing.assert_close(several[:, 0], expected, rtol=1e-6, atol=1e-6)
    told = op.run(fused_log_probs, h, W, targets, rest=True)
    torch.testing.assert_close(told.log_probs, expected, rtol=1e-6, atol=1e-6)
    sums = told.log_probs.exp() + told.log_rest.exp()
    torch.testing.assert_close(sums, torch.ones(9))
    shaped = op.run(fused_log_probs, h.view(3, 3, 8), W, targets.view(3, 3, 1), rest=True)
    assert (shaped.log_probs.shape, shaped.log_rest.shape) == ((3, 3, 1), (3, 3))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("confidence", [5.0, 16.0, 24.0])
def test_a_token_that_is_almost_certain_keeps_its_digits(way, confidence):
    """1 − p from 0.4 to 1e-9: so do log p, log p of the rest, and the gradient."""
    h, _, W = random_inputs(6, 100, 16)
    bias = torch.zeros(100)
    bias[7] = confidence
    targets = torch.tensor([7, 3, 50]).expand(6, 3)
    head, upstream = LMHead(W, bias), torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(6, 4)
    found = by(way, h, head, targets, trained=False, upstream=upstream)
    wide = tree_map_only(Tensor, Tensor.double, (h, head))
    true = gradients(partial(together, reference_log_probs), *wide, targets, trained=False,
                     upstream=upstream)  # fmt: skip
    torch.testing.assert_close(found[0].double(), true[0], rtol=1e-5, atol=0)
    assert (found[1] - true[1]).norm() < 1e-5 * true[1].norm()


@pytest.mark.parametrize("trained", [False, True])
def test_repeats_and_absent_slots(op, trained):
    """Each slot of a repeated token has its log p and its gradient; an absent one has none."""
    h, _, W = random_inputs(5, 40, 8, size=2.0)
    once = torch.tensor([4, 9, 30]).expand(5, 3)
    repeated = torch.tensor([9, 4, -1, 9, 30, 40, 9]).expand(5, 7)
    upstream = torch.tensor([1.0, 2.0, 5.0, -3.0, 0.5, 7.0, 4.0]).expand(5, 7)
    results = []
    for targets, weights in ((once, torch.tensor([2.0, 2.0, 0.5]).expand(5, 3)),
                             (repeated, upstream)):  # fmt: skip
        leaves = h.clone().requires_grad_(), W.clone().requires_grad_(trained)
        log_p, log_rest = op.run(fused_log_probs, *leaves, targets, rest=True)
        log_p.backward(weights)
        results.append([log_p.detach(), log_rest.detach(), *(t.grad for t in leaves)])
    (log_p, *expected), (found, *others) = results
    torch.testing.assert_close(found[:, [1, 0, 4]], log_p)
    assert torch.equal(found[:, [0, 0]], found[:, [3, 6]])
    assert (found[:, [2, 5]] == -torch.inf).all()
    for got, true in zip(others, expected, strict=True):
        if true is not None:
            torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-6)


def test_weights_and_what_does_not_count(op):
    h, _, W = random_inputs(6, 40, 8)
    targets = torch.arange(18).view(6, 3)
    weights = torch.tensor([1.0, 0.0, -2.0, 0.5, 0.0, 1.0])
    expected = op.run(fused_log_probs, h, W, targets, rest=True)
    h[[1, 4]], targets[1] = torch.nan, 10**6
    h.requires_grad_()
    found = op.run(fused_log_probs, h, W, targets, rest=True, token_weights=weights)
    (found.log_probs.sum() + found.log_rest.sum()).backward()
    for got, true in zip(found, expected, strict=True):
        w = weights.view(6, *[1] * (true.ndim - 1))
        torch.testing.assert_close(got, (w * true).where(w != 0, 0))
    assert h.grad[[1, 4]].count_nonzero() == 0
    assert h.grad.isfinite().all()


def test_all_of_the_vocabulary(op):
    h, _, W = random_inputs(4, 12, 8)
    found = op.run(fused_log_probs, h, W, torch.arange(12).expand(4, 12), rest=True)
    torch.testing.assert_close(found.log_probs, (h @ W.t()).log_softmax(-1))
    assert (found.log_rest == -torch.inf).all()


@pytest.mark.slow
def test_one_graph(op):
    torch._dynamo.reset()
    h, _, W = (t.to(op.device) for t in random_inputs(12, 60, 8))
    targets = torch.arange(36, device=op.device).view(12, 3)

    def loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        options = {"rest": True, "workspace_mib": op.workspace_mib}
        log_p, log_rest = fused_log_probs(2 * h, LMHead(weight), targets, **options)
        return log_p.exp().sum() + log_rest.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (12, 9):
        results = []
        for call in (loss, compiled):
            leaves = h[:N].clone().requires_grad_(), W.clone().requires_grad_()
            value = call(*leaves, targets[:N])
            value.backward()
            results.append([value.detach(), *(t.grad for t in leaves)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_a_target_outside_the_vocabulary():
    """One target must be in the vocabulary; one of several may be absent."""
    h, _, W = random_inputs(3, 20, 8)
    with pytest.raises(ValueError, match="targets must lie in"):
        fused_log_probs(h, W, torch.tensor([1, 2, 20]), rest=True)
    assert fused_log_probs(h, W, torch.full((3, 1), 20), rest=True).log_rest.tolist() == [0, 0, 0]
    for function in (fused_log_probs, reference_log_probs):
        with pytest.raises(ValueError, match=r"targets must be \[..., K\]"):
            function(h, W, torch.zeros(2, 4, dtype=torch.int64))
        with pytest.raises(TypeError, match="targets must be integers"):
            function(h, W, torch.zeros(3, 4))
        with pytest.raises(ValueError, match="must have 1 to 512 ids a token, got K = 513"):
            function(h, W, torch.zeros(3, 513, dtype=torch.int64))
