"""Distributions of a real model, with its tails: every loss, in both schedules, against the
oracle."""

import itertools

import pytest
import torch
from accuracy import GRAD_UNITS, LOSS_UNITS, TILED_GRAD_UNITS, errors
from inputs import clip_is_clear
from marks import slow
from real_rows import FILE, LIKELY, real_rows, shrink
from test_against_oracle import check_statistics, loss_and_grad
from test_family import by, close, exact
from test_log_probs import UNITS as LOG_P_UNITS
from test_log_probs import by as log_probs_by
from test_log_probs import exact as exact_log_probs
from test_log_probs import units_of

from opsd_kernels import (
    Divergence,
    LMHead,
    fused_entropy,
    reference_entropy,
    reference_token_divergence,
    token_divergence,
)

DTYPES = [torch.float32, torch.bfloat16]
WAYS = ["PyTorch", "logit-free"]
DIVERGENCES = {
    "JSD": Divergence(0.5),
    "forward KL": Divergence(0.0),
    "reverse KL": Divergence(1.0),
    "clipped": Divergence(0.0, entry_clip=0.05),
    "both KLs": Divergence(None, forward=0.5, reverse=0.5),
}
# The interpreter takes its time: what fp32 alone would show there, the JSD shows.
CASES = [
    slow(*case) if case[0] != "JSD" and case[1:] == (torch.float32, "logit-free") else case
    for case in itertools.product(DIVERGENCES, DTYPES, WAYS)
]


def test_the_rows_are_like_a_real_model_s():
    """Certain and uncertain ones, near and far from the teacher's; and the file is small."""
    h_S, h_T, W = real_rows(torch.float64)
    told = reference_token_divergence(h_S, h_T, W)
    entropy, jsd = told.entropy_student, told.loss
    assert entropy.min() < 0.05 < 1.5 < entropy.mean() < 2.5 < 4 < entropy.max()
    assert jsd.min() < 1e-5 < 0.03 < jsd.mean() < 0.05 < 0.2 < jsd.max()
    assert FILE.stat().st_size < 300_000


def test_they_are_made_without_loss():
    """But for bf16, and for the least likely entries, which keep their mass together."""
    g = torch.Generator().manual_seed(0)
    h_S, h_T = torch.randn(2, 64, 200, generator=g)
    W = torch.randn(1200, 200, generator=g) / 7
    made = shrink(h_S, h_T, W)
    for name, h in (("h_S", h_S), ("h_T", h_T)):
        p = (made[name].double() @ made["W"].double().t()).softmax(-1)
        true = (h.double() @ W.double().t()).softmax(-1)
        found, likely = (t.topk(8).values for t in (p, true))
        torch.testing.assert_close(found, likely, rtol=0.05, atol=0)
        assert p[:, LIKELY:].sum(1).max() > 0.05


@pytest.mark.parametrize(("name", "dtype", "way"), CASES)
def test_divergences(name, dtype, way):
    """Losses, gradients, and the statistics beside them: KLs, entropies, log p."""
    h_S, h_T, W = real_rows(dtype)
    divergence = DIVERGENCES[name]
    targets = (h_S.double() @ W.double().t()).argmax(-1)
    options = {"temperature": 1.0, "W_teacher": None, "targets": targets}
    clipped = divergence.entry_clip is not None
    if clipped:
        assert clip_is_clear(h_S, h_T, W, W, divergence, 1.0)
    loss, grad, told = loss_and_grad(way, token_divergence, h_S, h_T, W, divergence, options)
    tiles = way == "logit-free" and dtype == torch.bfloat16
    error = errors(
        loss, grad, h_S, h_T, W, tiles=tiles, normalizers=clipped or divergence.weights is not None,
        divergence=divergence, **options,
    )  # fmt: skip
    assert error.loss < LOSS_UNITS
    assert error.grad < (TILED_GRAD_UNITS if tiles else GRAD_UNITS[dtype])
    assert told is not None
    check_statistics(told, h_S, h_T, W, divergence, options)


@pytest.mark.parametrize("way", ["PyTorch, backward", "logit-free"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_entropy(dtype, way):
    h_S, _, W = real_rows(dtype)
    close(by(way, fused_entropy, h_S, LMHead(W)), exact(reference_entropy, h_S, LMHead(W)), dtype)


@pytest.mark.parametrize("way", ["PyTorch, backward", "logit-free"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_p(dtype, way):
    """Of entries from likely to all but impossible."""
    h_S, _, W = real_rows(dtype)
    ranks = torch.arange(64)[:, None] ** 2 // 8
    targets = (h_S.double() @ W.double().t()).argsort(descending=True).gather(1, ranks)[:, 0]
    options = {"trained": False, "upstream": torch.linspace(-1, 2, 64)}
    found = log_probs_by(way, h_S, LMHead(W), targets, **options)
    true = exact_log_probs(h_S, LMHead(W), targets, **options)
    tiles = dtype != torch.float32 and way == "logit-free"
    units = units_of(h_S, LMHead(W), targets, options["upstream"].double(), 1.0, tiles)
    assert true[0].min() < -8
    for got, expected, unit in zip(found, true, units, strict=False):
        assert (got.double() - expected).norm() <= LOG_P_UNITS * unit
