"""Every divergence, by every entry point, in every schedule, against the oracle."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from accuracy import GRAD_UNITS, LOSS_UNITS, TILED_GRAD_UNITS, errors
from heads import EXTRAS, as_head, logits, size_of_logits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import BETAS, clip_is_clear, random_inputs, some_betas
from schedules import LOGIT_FREE, ROW_WORKSPACE
from torch import Tensor

from opsd_kernels import (
    Divergence,
    fused_divergence_loss,
    fused_jsd_loss,
    reference_token_divergence,
    token_divergence,
)
from opsd_kernels.loss import TokenDivergence
from opsd_kernels.schedules import planning, row_workspace

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The schedule, its budget, and whether `rows` takes the place of PyTorch, as on a GPU.
WAYS = {
    "PyTorch": (ROW_WORKSPACE, 128, False),
    "PyTorch, small budget": (ROW_WORKSPACE, 0.25, False),
    "rows": (LOGIT_FREE, 1, True),
    "logit-free": (LOGIT_FREE, 0, False),
}

WEIGHTS = st.one_of(st.sampled_from([None, 0.0, 1.0, 0.5, -0.75, 3.0]), st.just("of tokens"))
NAMED = st.fixed_dictionaries(
    {"beta": st.one_of(st.sampled_from(BETAS), st.floats(1e-4, 1 - 1e-4), st.just("of tokens"))}
)
WEIGHED = st.fixed_dictionaries(
    {
        "beta": st.one_of(st.none(), st.floats(0.01, 0.99)),
        "forward": WEIGHTS,
        "reverse": WEIGHTS.filter(lambda weight: weight is not None),
    }
)
DRAWN = {
    "entry": st.sampled_from([fused_jsd_loss, fused_divergence_loss, token_divergence]),
    "described": st.one_of(NAMED, WEIGHED),
    "N": st.integers(1, 9),
    "V": st.sampled_from([1, 2, 3, 17, 64, 300, 1000]),
    "D": st.sampled_from([1, 3, 8, 33, 64]),
    "dtype": st.sampled_from(DTYPES),
    "entry_clip": st.sampled_from([None, None, 0.05, 1e-3]),
    "policy": st.sampled_from(["none", "none", "random", "likely"]),
    "temperature": st.sampled_from([1.0, 0.5, 1.7]),
    "log_size": st.floats(-2, 1.2),
    "log_distance": st.floats(-4, 0),
    "own_head": st.booleans(),
    "extras": EXTRAS,
    "seed": st.integers(0, 2**16),
}


@given(**DRAWN)
@settings(max_examples=150)
def test_in_pytorch(**drawn):
    check("PyTorch", **drawn)


@given(**DRAWN)
@settings(max_examples=50)
def test_in_pytorch_a_few_tokens_at_a_time(**drawn):
    check("PyTorch, small budget", **drawn)


@given(**DRAWN)
@settings(max_examples=60)  # the interpreter takes its time
def test_with_rows(**drawn):
    check("rows", **drawn)


@given(**DRAWN)
@settings(max_examples=100)
def test_logit_free(**drawn):
    check("logit-free", **drawn)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_large_logits_and_more_columns_than_a_tile(way, dtype, beta):
    check(
        way, entry=fused_jsd_loss, described={"beta": beta}, N=5, V=1100, D=33, dtype=dtype,
        entry_clip=None, policy="none", temperature=1.0, log_size=1.5, log_distance=-1.0,
        own_head=False, extras=None, seed=0,
    )  # fmt: skip


def check(
    way, *, entry, described, N, V, D, dtype, entry_clip, policy, temperature, log_size,
    log_distance, own_head, extras, seed,
):  # fmt: skip
    h_S, h_T, W = random_inputs(
        N, V, D, dtype, size=10**log_size, distance=10**log_distance, seed=seed
    )
    W_teacher = None
    if own_head:  # the teacher has one feature more
        h_T = torch.cat([h_T, torch.ones(N, 1, dtype=dtype)], dim=1)
        W_teacher = torch.cat([W, 0.1 * torch.ones(V, 1, dtype=dtype)], dim=1)
    if extras is not None:
        W, W_teacher = extras.heads(W, W_teacher, seed)
    divergence = make_divergence(described, entry_clip, N, seed)
    is_named = divergence.weights is None
    options: dict[str, Any] = {"temperature": temperature, "W_teacher": W_teacher}
    if entry is fused_jsd_loss and not is_named:
        entry = fused_divergence_loss
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (N,), generator=g)  # some are banned
    if entry is not fused_jsd_loss and policy != "none":
        targets = logits(h_S, W).argmax(-1) if policy == "likely" else targets // 3 * 3
        options |= {"targets": targets, "advantages": torch.randn(N, generator=g)}
    elif entry is token_divergence:
        options["targets"] = targets
    if entry_clip is not None:
        teacher = W if W_teacher is None else W_teacher
        assume(clip_is_clear(h_S, h_T, W, teacher, divergence, temperature))

    loss, grad, told = loss_and_grad(way, entry, h_S, h_T, W, divergence, options)
    assert (loss.dtype, grad.dtype) == (torch.float32, dtype)
    # Kernels round scores to the inputs' dtype; in fp16 only scores that have a bound.
    is_number = is_named and not isinstance(divergence.beta, Tensor)
    is_bounded = is_number and divergence.beta != 1 and "advantages" not in options
    tiles = "PyTorch" not in way and (
        dtype == torch.bfloat16 or (dtype != torch.float32 and is_bounded)
    )
    normalizers = entry_clip is not None or not is_number
    error = errors(
        loss, grad, h_S, h_T, W, tiles=tiles, normalizers=normalizers, divergence=divergence,
        **options,
    )  # fmt: skip
    assert error.loss < LOSS_UNITS
    assert error.grad < (TILED_GRAD_UNITS if tiles else GRAD_UNITS[dtype])
    if told is not None:
        check_statistics(told, h_S, h_T, W, divergence, options)


def make_divergence(
    described: dict[str, Any], entry_clip: float | None, N: int, seed: int
) -> Divergence:
    g = torch.Generator().manual_seed(seed)
    fields = {
        name: torch.randn(N, generator=g) if value == "of tokens" else value
        for name, value in described.items()
    }
    if described["beta"] == "of tokens":
        fields["beta"] = some_betas(N, seed)
    return Divergence(**fields, entry_clip=entry_clip)


def loss_and_grad(
    way: str, entry: Any, h_S: Tensor, h_T: Tensor, W: Any, divergence: Divergence, options: Any
) -> tuple[Tensor, Tensor, TokenDivergence | None]:
    """Per-token losses, the gradient of their sum, and what `token_divergence` tells besides."""
    op, workspace_mib, uses_kernel = WAYS[way]
    options = {**options, "workspace_mib": workspace_mib}
    h = h_S.detach().clone().requires_grad_()
    with mock.patch.object(planning, "uses_rows_kernel", return_value=uses_kernel):
        if entry is fused_jsd_loss:
            named = {"beta": divergence.beta, "entry_clip": divergence.entry_clip}
            loss = op.run(entry, h, h_T, W, reduction="none", **named, **options)
        elif entry is fused_divergence_loss:
            loss = op.run(entry, h, h_T, W, divergence, reduction="none", **options)
        else:
            told = op.run(entry, h, h_T, W, divergence=divergence, **options)
            loss = told.loss
        loss.sum().backward()
    assert h.grad is not None
    return loss.detach(), h.grad, told if entry is token_divergence else None


def check_statistics(
    told: TokenDivergence, h_S: Tensor, h_T: Tensor, W: Any, divergence: Divergence, options: Any
) -> None:
    temperature, W_teacher = options["temperature"], options["W_teacher"]
    known = {"temperature": temperature, "W_teacher": W_teacher, "normalizers": True}
    for kl, beta in ((told.forward_kl, 0.0), (told.reverse_kl, 1.0)):
        unclipped = Divergence(beta)
        assert errors(kl, h_S, h_S, h_T, W, divergence=unclipped, **known).loss < LOSS_UNITS
    oracle = reference_token_divergence(h_S, h_T, W, divergence=divergence, **options)
    # The last fp32 bits of a logit and of its log-sum-exp.
    head_T = as_head(W if W_teacher is None else W_teacher)
    V = len(head_T.weight)
    sizes = size_of_logits(h_S, as_head(W)) + size_of_logits(h_T, head_T)
    bits = 4e-7 * (1 + sizes / temperature + math.log(V))
    for name in ("entropy_student", "entropy_teacher", "logp_student", "logp_teacher"):
        field, exact = getattr(told, name), getattr(oracle, name)
        assert field.dtype == torch.float32
        # An entropy is as uncertain as its logits, times their spread.
        spread = 1 + math.log(V) if name.startswith("entropy") else 1
        assert (((field - exact).abs() < spread * bits) | (field == exact)).all(), name
    assert (told.entropy_student >= -1e-6).all()
    if divergence.entry_clip is None:
        assert (told.clipped_share == 0).all()
    elif divergence.weights is None and "advantages" not in options:
        unclipped = oracle.loss / (1 - oracle.clipped_share)
        removed, exact = (share * unclipped for share in (told.clipped_share, oracle.clipped_share))
        noise = 1e-5 * exact + 10 * bits * (exact > 0)
        assert ((removed - exact).abs() <= noise)[unclipped.isfinite()].all()


def test_every_way_is_what_it_is_named_for():
    """The drawn cases reach the code that their test is for."""
    h_S, h_T, W = random_inputs(9, 300, 64)
    for way in WAYS:
        with (
            mock.patch.object(row_workspace, "fill", side_effect=row_workspace.fill) as filled,
            mock.patch.object(
                row_workspace, "launch_rows", side_effect=row_workspace.launch_rows
            ) as launched,
        ):
            loss_and_grad(way, fused_jsd_loss, h_S, h_T, W, Divergence(0.5), {})
        assert filled.called == (way != "logit-free")
        assert launched.called == (way == "rows")


@pytest.mark.parametrize("way", WAYS)
def test_a_vocabulary_of_one(way):
    """Both sides are certain, and nothing is divided by nothing."""
    h_S, h_T, W = random_inputs(1, 1, 1, size=1.0, distance=1.0)
    for entry in (fused_jsd_loss, fused_divergence_loss, token_divergence):
        loss, grad, _ = loss_and_grad(way, entry, h_S, h_T, W, Divergence(0.5), {})
        assert loss.item() == 0
        assert grad.item() == 0
