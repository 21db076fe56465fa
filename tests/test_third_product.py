"""The row workspace's way back from the gradient of logits to that of hidden states: what it
launches, its candidates, and its kernel."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from inputs import random_inputs
from schedules import DEVICE
from torch import Tensor

from benchmarks.gpu import tune
from benchmarks.lib import allocations
from benchmarks.lib.gpu_work import recorded_launches
from opsd_kernels import LMHead, fused_jsd_loss, fused_log_probs, token_divergence
from opsd_kernels.kernels import tiles, top_row
from opsd_kernels.kernels.logits_tile import INTERPRETED
from opsd_kernels.problem import Problem
from opsd_kernels.products import project_back, project_back_in_parts
from opsd_kernels.schedules import planning, row_workspace
from opsd_kernels.schedules.row_workspace import LogitGradient

QWEN3 = 151936
MIB = 2**20
interpreted = pytest.mark.skipif(not INTERPRETED, reason="a GPU has the kernel anyway")


def launched(
    call: Any, N: int, split_rows: int = 0, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> list[str]:
    """By a call, as on an H200, without backward."""
    row = replace(tiles.TABLE["sm_90", "bfloat16"], split_rows=split_rows)
    with allocations.fake_device("cuda"):
        h_S = torch.empty(N, 64, dtype=dtype, requires_grad=True)
        h_T, W = torch.empty_like(h_S), torch.empty(QWEN3, 64, dtype=dtype)
        with recorded_launches() as names, mock.patch.object(tiles, "lookup", return_value=row):
            call(h_S, h_T, W, workspace_mib=320, **options)
    return names


def log_probs(h_S: Tensor, h_T: Tensor, W: Tensor, **options: Any) -> Tensor:
    return fused_log_probs(h_S, W, torch.empty(len(h_S), dtype=torch.int64), **options)


@pytest.mark.parametrize(
    ("call", "options", "rows"),
    [
        (fused_jsd_loss, {}, 256),
        (fused_jsd_loss, {"temperature": 0.7, "beta": 0.0}, 256),
        (fused_jsd_loss, {"temperature": 0.7, "beta": 0.0, "dtype": torch.float16}, 128),
        (token_divergence, {}, 256),
        (log_probs, {}, 512),
        (fused_jsd_loss, {"split_rows": 256}, 256),
    ],
)
def test_launches_of_a_chunk(call, options, rows):
    """Those of a call with a chunk more. 14 there were: a zeroing before the last product, which
    added to it, six for the top entry, 1/T, and two copies."""
    one, two = launched(call, rows, **options), launched(call, 2 * rows, **options)
    for name in one:
        two.remove(name)
    both_sides = [] if call is log_probs else ["cat"]
    last = "bmm" if "split_rows" in options else "mm"
    assert sorted(two) == sorted([*both_sides, "mm", last, "rows_kernel", "top_row_kernel"])


@interpreted
@pytest.mark.parametrize("V", [64, 1000, 4096, 4100])
def test_candidates_agree(V):
    """Of whole numbers exactly, for these have no rounding; else to that of sums in fp32."""
    g = torch.Generator().manual_seed(V)
    for whole in (True, False):
        s, W = (torch.randn(*shape, generator=g) for shape in ((24, V), (V, 40)))
        if whole:
            s, W = (3 * s).round(), (3 * W).round()
        out, parts = torch.full((24, 40), torch.nan), torch.full((4, 24, 40), torch.nan)
        project_back([(out, s)], W, W.dtype, V, first=True)
        project_back_in_parts(parts, s, W, W.dtype)
        found = parts.sum(0)
        if whole:
            assert found.equal(out)
        else:
            size = s.abs() @ W.abs()
            assert ((found - out).abs() <= 4e-7 * size).all()
        added = torch.ones(24, 40)
        project_back([(added, s)], W, W.dtype, V)
        assert torch.allclose(added - 1, out, rtol=1e-5, atol=1e-4)


@contextmanager
def row_kernels(split_rows: int) -> Any:
    """The row workspace as on a GPU, interpreted."""
    row = replace(tiles.INTERPRETER, split_rows=split_rows)
    with (
        mock.patch.object(planning, "uses_rows_kernel", return_value=True),
        mock.patch.object(tiles, "lookup", return_value=row),
    ):
        yield


@interpreted
def test_a_loss_by_either():
    """The last chunk is short; everything that the last product is part of is on."""
    h_S, h_T, W = random_inputs(11, 300, 24, distance=0.3)
    options = {"beta": 0.3, "temperature": 0.7, "workspace_mib": 0.02, "reduction": "none"}
    found, products = [], []
    for split_rows in (0, 8):
        h = h_S.clone().requires_grad_()
        with row_kernels(split_rows), allocations.Allocations() as seen:
            loss = fused_jsd_loss(h, h_T, LMHead(W, softcap=30.0), **options)
            loss.sum().backward()
        found.append((loss.detach(), h.grad))
        products.append([seen.ops.count(f"aten::{name}.out") for name in ("mm", "bmm", "addmm")])
    (loss, grad), (same, grad_of_parts) = found
    assert loss.equal(same)
    assert 0 < (grad - grad_of_parts).norm() <= 1e-6 * grad.norm()
    assert products == [[4, 0, 0], [2, 2, 2]]  # 300 = 4 · 64 + 44


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strided", [False, True])
def test_top_row(dtype, strided):
    """Whole numbers, for which the formula is exact; more features than a program has."""
    R, D, V = 3, 1500, 7
    g = torch.Generator().manual_seed(0)
    product = torch.randint(-9, 9, (4, R, D), generator=g).to(DEVICE, torch.float32)
    W = torch.randint(-9, 9, (V, D), generator=g).to(DEVICE, dtype)
    if strided:
        W = W.t().contiguous().t()
    top = torch.tensor([6, 0, 3], dtype=torch.int32, device=DEVICE)
    g_top = torch.tensor([2.0, -3.0, 0.0], device=DEVICE)
    scores = torch.empty(R, V, dtype=dtype)
    gradient = LogitGradient(scores, top, g_top)
    problem = Problem(torch.empty(R, D), None, W, None, dtype, None, temperature=0.5)
    for parts in (1, 4):
        dh_S = product[0].clone()
        given = dh_S[None] if parts == 1 else product
        top_row.launch(dh_S, given, top, g_top, gradient.scale, problem)
        expected = product[:parts].sum(0) / gradient.scale + g_top[:, None] * W[top.long()].float()
        assert dh_S.equal(2 * expected)


@pytest.mark.parametrize(("mib", "rows"), [(320, 256), (640, 512), (1280, 1024), (2560, 2048)])
def test_rows_of_a_workspace(mib, rows):
    """Of Qwen3, one tile of the last product for each 128 rows and 128 features: R = 1024 gives an
    H200's 132 multiprocessors 256 of them. Every chunk of 16,384 tokens is as large."""
    with allocations.fake_device("cuda"):
        h = torch.empty(16384, 4096, dtype=torch.bfloat16)
        W = torch.empty(QWEN3, 4096, dtype=h.dtype)
        problem = Problem(h, h, W, None, h.dtype, 0.5)
        for split_rows, parts in ((0, None), (rows, (4, rows, 4096)), (rows - 1, None)):
            row = replace(tiles.TABLE["sm_90", "bfloat16"], split_rows=split_rows)
            with mock.patch.object(tiles, "lookup", return_value=row):
                plan = planning.make_plan(problem, 16384, mib * MIB)
                workspace, split = row_workspace.allocate(problem, plan, True)
                _, alone = row_workspace.allocate(problem, plan, False)
            assert workspace.shape == (2 * rows, QWEN3)
            assert (None if split is None else tuple(split.shape)) == parts
            assert alone is None
    assert all(row.split_rows == 0 for row in tiles.TABLE.values())  # none was measured yet


@pytest.mark.parametrize("mib", [320, 500])
def test_a_head_that_is_copied_is_so_in_64s(mib):
    """Under autocast: g of every tile of W then begins at a multiple of 16 bytes."""
    with allocations.fake_device("cuda"):
        h, W = torch.empty(4096, 4096), torch.empty(QWEN3, 4096)
        problem = Problem(h, h, W, None, torch.bfloat16, 0.5)
        plan = planning.make_plan(problem, 4096, mib * MIB)
    assert plan.tile % 64 == 0 < plan.tile < QWEN3
    assert plan.bytes <= mib * MIB


@interpreted
def test_the_tuner_times_the_candidates(monkeypatch):
    """On a device; here each is called once."""
    monkeypatch.setattr(tune, "LAST_PRODUCTS", (2, 4))
    problem = tune.chunk(4, 16, torch.float32, torch.device("cpu"), torch.randn, 300)
    seconds = iter([2.0, 1.0, 3.0, 4.0])

    def timer(run: Any) -> float:
        run()
        return next(seconds)

    told = list(tune.last_products(problem, 1.0, timer))
    assert [(t["rows"], t["split"], t["fraction"]) for t in told] == [
        (2, False, 1 / 4), (2, True, 1 / 2), (4, False, 1 / 3), (4, True, 1 / 4),
    ]  # fmt: skip
    found = tune.Report("some GPU", "sm_90", "2", "3", "float32", 16, 0.5, split=told)
    assert "split_rows=2," in tune.best(found)
    assert tune.split_rows(told[2:]) == 0
