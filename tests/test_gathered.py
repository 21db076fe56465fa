"""Products with gathered rows of the head, against whole products in float64: in PyTorch, and by
the kernels, which Triton interprets where there is no GPU."""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from compiler import outside_the_interpreter
from schedules import DEVICE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.candidates import SHARED
from benchmarks.lib.allocations import Allocations, fake_device
from opsd_kernels import gathered
from opsd_kernels.gathered import add_rows_, gradient_of_rows_, products_at

N_K_V_D = {
    "PyTorch": [(5, 1, 33, 40), (37, 7, 33, 40), (9, 64, 301, 1030), (3, 512, 600, 72)],
    "kernels": [(5, 1, 33, 40), (6, 7, 33, 40), (1, 64, 50, 1030), (1, 512, 90, 24)],
}
CASES = []
for way, shapes in N_K_V_D.items():
    CASES += [(way, torch.float32, shape) for shape in [*shapes, (0, 3, 9, 8)]]
    CASES += [(way, dtype, shapes[1]) for dtype in (torch.bfloat16, torch.float16)]


def by(way: str):
    if way == "PyTorch":
        return nullcontext()
    return mock.patch.object(gathered, "_uses_kernels", return_value=True)


def inputs(N: int, K: int, V: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """h [N, D], W [V, D] with strides, ids [N, K] with absent and repeated ones, c [N, K] with NaN
    where an id is absent, and c [N, V] with the sum of each entry, in float64."""
    torch.manual_seed(N + K)
    h, W = torch.randn(N, D).to(dtype), torch.randn(V, 2 * D)[:, ::2].to(dtype)
    ids = torch.randint(-3, V + 3, (N, K), dtype=torch.int32)
    ids[:, K // 2] = ids[:, 0]
    ids[:, -1:] = torch.tensor([-1, V, 2**31 - 1], dtype=torch.int32)[torch.arange(N) % 3, None]
    absent = (ids < 0) | (ids >= V)
    c = torch.randn(N, K)
    whole = torch.zeros(N, V, dtype=torch.float64)
    whole.scatter_add_(1, ids.masked_fill(absent, 0).long(), c.double().masked_fill(absent, 0))
    return h, W, ids, c.masked_fill(absent, torch.nan), whole


@pytest.mark.parametrize(("way", "dtype", "shape"), CASES)
def test_values(way, dtype, shape):
    h, W, ids, c, whole = inputs(*shape, dtype)
    V, W64 = W.shape[0], W.double()
    absent = (ids < 0) | (ids >= V)
    u = (h.double() @ W64.t()).gather(1, ids.clamp(0, V - 1).long()).masked_fill(absent, 0)
    out, dW, db = torch.randn(h.shape), torch.randn(W.shape), torch.randn(V)
    sums = out + whole @ W64, dW + whole.t() @ h.double(), db + whole.sum(0)
    device = "cpu" if way == "PyTorch" else DEVICE
    h, W, ids, c, out, dW, db = (t.to(device) for t in (h, W, ids, c, out, dW, db))
    with by(way):
        close(products_at(h, W, ids, dtype), u)
        add_rows_(out, c, W, ids, dtype)
        gradient_of_rows_(dW, db, c, h, ids, dtype)
    for got, true in zip((out, dW, db), sums, strict=True):
        close(got, true)


def close(got: Tensor, true: Tensor) -> None:
    """Within the roundings of fp32 sums."""
    assert got.dtype == torch.float32
    size = true.abs().max().item() if true.numel() else 0
    torch.testing.assert_close(got.cpu().double(), true, rtol=0, atol=2e-6 * size)


@pytest.mark.parametrize("way", N_K_V_D)
def test_operands_are_rounded(way):
    """As autocast rounds them, which itself changes nothing here."""
    h, W, ids, c, _ = inputs(5, 7, 33, 40, torch.float32)
    results = []
    for round_first in (True, False):
        operands = (h.bfloat16(), W.bfloat16()) if round_first else (h, W)
        out, dW = torch.zeros(5, 40), torch.zeros(33, 40)
        with by(way), torch.autocast("cpu", torch.bfloat16, enabled=not round_first):
            h_, W_, ids_, c_, out, dW = (t.to(DEVICE) for t in (*operands, ids, c, out, dW))
            u = products_at(h_, W_, ids_, torch.bfloat16)
            add_rows_(out, c_, W_, ids_, torch.bfloat16)
            gradient_of_rows_(dW, None, c_, h_, ids_, torch.bfloat16)
        results.append((u, out, dW))
    for rounded, got in zip(*results, strict=True):
        assert rounded.equal(got)


@pytest.mark.parametrize("way", N_K_V_D)
def test_a_token_of_nan_spoils_itself_alone(way):
    h, W, ids, c, _ = inputs(5, 7, 33, 40, torch.float32)
    h[2], c[3] = torch.nan, torch.nan
    out, dW = torch.zeros(5, 40), torch.zeros(33, 40)
    h, W, ids, c, out, dW = (t.to(DEVICE) for t in (h, W, ids, c, out, dW))
    with by(way):
        u = products_at(h, W, ids, torch.float32)
        add_rows_(out, c, W, ids, torch.float32)
        gradient_of_rows_(dW, None, c, h, ids, torch.float32)
    present = (ids >= 0) & (ids < 33)
    assert u.isnan().equal(present & (torch.arange(5, device=u.device) == 2)[:, None])
    assert out.isnan().any(1).tolist() == [False, False, False, True, False]
    spoilt = ids[2:4][present[2:4]].unique()
    assert dW.isnan().any(1).nonzero().flatten().equal(spoilt)


@pytest.mark.parametrize("way", N_K_V_D)
def test_the_same_bits_twice(way):
    """Also where many threads, or programs, add to the same rows."""
    shape = (3000, 16, 40, 64) if way == "PyTorch" else (20, 4, 9, 24)
    device = "cpu" if way == "PyTorch" else DEVICE
    h, W, ids, c, _ = (t.to(device) for t in inputs(*shape, torch.float32))
    results = []
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for _ in range(3):
            out, dW, db = torch.zeros_like(h), torch.zeros_like(W), torch.zeros_like(W[:, 0])
            with by(way):
                u = products_at(h, W, ids, torch.float32)
                add_rows_(out, c, W, ids, torch.float32)
                gradient_of_rows_(dW, db, c, h, ids, torch.float32)
            results.append(torch.cat([t.flatten() for t in (u, out, dW, db)]))
    finally:
        torch.set_num_threads(threads)
    assert all(result.equal(results[0]) for result in results)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_are_not_copied_for_all_tokens(device):
    """[N, K, D] in fp32 would take 64 MiB. On a GPU a few numbers for each id are allocated."""
    N, K, V, D = 256, 64, 1000, 1024
    with fake_device(device) if device == "cuda" else nullcontext():
        h, W = torch.empty(N, D, dtype=torch.bfloat16), torch.empty(V, D, dtype=torch.bfloat16)
        ids, c, out = torch.empty(N, K, dtype=torch.int32), torch.empty(N, K), torch.empty(N, D)
        dW, db = torch.empty(V, D), torch.empty(V)
        with Allocations() as allocations:
            products_at(h, W, ids, W.dtype)
            add_rows_(out, c, W, ids, W.dtype)
            gradient_of_rows_(dW, db, c, h, ids, W.dtype)
    bounds = {"cpu": 3 * 4 * gathered.CPU_ENTRIES, "cuda": 24 * N * K}
    assert 0 < allocations.peak <= bounds[device]


def test_passes():
    """Products with K rows for each token are K / V of a pass over the vocabulary."""
    N, K, V, D = 5, 7, 33, 40
    h, W, ids, c, _ = inputs(N, K, V, D, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        products_at(h, W, ids, W.dtype)
        add_rows_(torch.zeros(N, D), c, W, ids, W.dtype)
    assert counter.get_total_flops() == 2 * (2 * N * K * D)


@pytest.mark.parametrize("arch", SHARED)
def test_compiled(arch):
    """Nothing spills, and rows are read 16 bytes a thread at a time."""
    code = f"""
from benchmarks.gpu.resources import GATHERED, Variant, compiled, registers_of
for kernel in GATHERED:
    code = compiled(Variant("{arch}", "bfloat16", kernel, "JSD"))
    wide = "load_dwordx4" if "amdgcn" in code.asm else "v4.b32"
    text = code.asm.get("amdgcn") or code.asm["ptx"]
    print(registers_of(code)[1], code.metadata.shared, wide in text)
"""
    for line in outside_the_interpreter(code).splitlines():
        spilled, shared, wide = line.split()
        assert spilled == "0"
        assert int(shared) <= SHARED[arch]
        assert wide == "True"
