"""Products with gathered rows of the head, against whole products in float64."""

import pytest
import torch
from torch import Tensor

from opsd_kernels.gathered import add_rows_, gradient_of_rows_, products_at

# N, K, V, D
SHAPES = [(5, 1, 33, 40), (37, 7, 33, 40), (9, 64, 301, 1030), (3, 512, 600, 72), (0, 3, 10, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(N: int, K: int, V: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """h [N, D], W [V, D] with strides, ids [N, K] with absent and repeated ones, c [N, K] with NaN
    where an id is absent, and the dense c [N, V] in float64."""
    torch.manual_seed(N + K)
    h, W = torch.randn(N, D).to(dtype), torch.randn(V, 2 * D)[:, ::2].to(dtype)
    ids = torch.randint(-3, V + 3, (N, K), dtype=torch.int32)
    ids[:, K // 2] = ids[:, 0]
    ids[:, -1:] = torch.tensor([-1, V, 2**31 - 1], dtype=torch.int32)[torch.arange(N) % 3, None]
    absent = (ids < 0) | (ids >= V)
    c = torch.randn(N, K)
    dense = torch.zeros(N, V, dtype=torch.float64)
    dense.scatter_add_(1, ids.masked_fill(absent, 0).long(), c.double().masked_fill(absent, 0))
    return h, W, ids, c.masked_fill(absent, torch.nan), dense


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, dtype):
    h, W, ids, c, dense = inputs(*shape, dtype)
    V = W.shape[0]
    h64, W64 = h.double(), W.double()
    absent = (ids < 0) | (ids >= V)
    u = (h64 @ W64.t()).gather(1, ids.clamp(0, V - 1).long()).masked_fill(absent, 0)
    close(products_at(h, W, ids, dtype), u)
    out, dW, db = torch.randn(h.shape), torch.randn(W.shape), torch.randn(V)
    sums = out + dense @ W64, dW + dense.t() @ h64, db + dense.sum(0)
    add_rows_(out, c, W, ids, dtype)
    gradient_of_rows_(dW, db, c, h, ids, dtype)
    for got, true in zip((out, dW, db), sums, strict=True):
        close(got, true)


def close(got: Tensor, true: Tensor) -> None:
    """Within the roundings of fp32 sums."""
    assert got.dtype == torch.float32
    size = true.abs().max().item() if true.numel() else 0
    torch.testing.assert_close(got.double(), true, rtol=0, atol=2e-6 * size)
