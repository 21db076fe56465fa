"""Matrix products with fp32 accumulation and result, for hidden states and heads of any dtype.

CUDA multiplies bf16 and fp16 into fp32. Elsewhere operands are widened, a tile of the head at a
time. All products write to `out=`, which autocast does not change: operands are rounded here, tile
by tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def project(z: Tensor, h: Tensor, W: Tensor, operand_dtype: torch.dtype, tile: int) -> None:
    """z ← h Wᵀ in fp32: [R, V] from [R, D] and [V, D]."""
    dtype = multiplied_dtype(W.device, operand_dtype)
    h = h.to(operand_dtype).to(dtype)
    for v, W_v in _tiles(W, operand_dtype, dtype, tile):
        _multiply(z[:, v], h, W_v.t())


def project_back(
    terms: list[tuple[Tensor, Tensor]],
    W: Tensor,
    operand_dtype: torch.dtype,
    tile: int,
    first: bool = False,
) -> None:
    """out ← out + g W in fp32 for every pair of out [R, D] and g [R, V]. If g is in fp32, and its
    `score_dtype` without a bound is narrower, g is narrowed first. With `first`, out ← g W: out
    need not be initialized."""
    if not terms:
        return
    dtype = _back_dtype(terms[0][1], W, operand_dtype)
    for v, W_v in _tiles(W, operand_dtype, dtype, tile):
        for out, g in terms:
            _multiply(out, g[:, v].to(dtype), W_v, add=not first)
        first = False


def project_back_in_parts(parts: Tensor, g: Tensor, W: Tensor, operand_dtype: torch.dtype) -> None:
    """parts[i] ← g W over the i-th part of the vocabulary, in fp32: [parts, R, D]. The sum of the
    parts is g W; a GPU multiplies all parts at once. W is a head that products read in place."""
    dtype, V = _back_dtype(g, W, operand_dtype), W.shape[0]
    n = parts.shape[0]
    most = V // n // PART_MULTIPLE * PART_MULTIPLE
    g_parts = g[:, : n * most].to(dtype).unflatten(1, (n, most)).transpose(0, 1)
    W_parts = W[: n * most].to(dtype).unflatten(0, (n, most))
    torch.bmm(g_parts, W_parts, **_into_fp32(dtype), out=parts)
    if n * most < V:
        project_back([(parts[-1], g[:, n * most :])], W[n * most :], operand_dtype, V)


# Parts of the vocabulary begin at multiples of this, so rows of g in 16 bits at multiples of 32
# bytes.
PART_MULTIPLE = 16


def _back_dtype(g: Tensor, W: Tensor, operand_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which g is multiplied."""
    g_dtype = g.dtype
    if g_dtype == torch.float32:
        g_dtype = score_dtype(operand_dtype, bounded=False)
    return multiplied_dtype(W.device, g_dtype)


def project_onto_head(
    dW: Tensor | None,
    db: Tensor | None,
    g: Tensor,
    h: Tensor,
    operand_dtype: torch.dtype,
    first: bool = False,
) -> None:
    """dW ← dW + gᵀ h and db ← db + Σ g in fp32: [V, D] and [V], from g [R, V] and h [R, D]. g is
    narrowed as in `project_back`. With `first`, dW ← gᵀ h: dW need not be initialized."""
    if dW is not None:
        dtype = _back_dtype(g, dW, operand_dtype)
        _multiply(dW, g.t().to(dtype), h.to(operand_dtype).to(dtype), add=not first)
    if db is not None:
        db += g.sum(0, dtype=torch.float32)


def _multiply(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out ← a b, or out + a b, in fp32."""
    if add:
        torch.addmm(out, a, b, **_into_fp32(a.dtype), out=out)
    else:
        torch.mm(a, b, **_into_fp32(a.dtype), out=out)


def _into_fp32(dtype: torch.dtype) -> dict[str, Any]:
    """The option by which a product of operands of a dtype has an fp32 result."""
    return {} if dtype == torch.float32 else {"out_dtype": torch.float32}


def score_dtype(operand_dtype: torch.dtype, bounded: bool) -> torch.dtype:
    """The dtype that the gradient with respect to logits is rounded to before a product.

    The range of fp16 is too small: gradients of unlikely tokens, 1e-8 and below, underflow. So the
    gradient is multiplied by `score_scale` first, which needs a bound on its size. Without a bound
    the product is in fp32, which on a GPU is several times slower unless PyTorch may use TF32.
    """
    if operand_dtype == torch.float16 and not bounded:
        return torch.float32
    return operand_dtype


def score_scale(dtype: torch.dtype) -> float:
    """The power of two that scores are multiplied by before they are rounded to a `score_dtype`.
    In fp16 sizes up to 2 then stay below its largest number, 65504, and sizes down to 2⁻²⁸ are no
    denormals."""
    return 2.0**14 if dtype == torch.float16 else 1.0


def multiplied_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a device multiplies operands of `dtype` with an fp32 result."""
    return dtype if device.type == "cuda" else torch.float32


def copied_bytes(W: Tensor, operand_dtype: torch.dtype) -> int:
    """Bytes of the copies that both products make of a row of W; 0 if they read it in place."""
    return max(
        _copied_bytes(W, operand_dtype, multiplied_dtype(W.device, dtype))
        for dtype in (operand_dtype, score_dtype(operand_dtype, bounded=False))
    )


def _copied_bytes(W: Tensor, operand_dtype: torch.dtype, dtype: torch.dtype) -> int:
    rounded = operand_dtype.itemsize if W.dtype != operand_dtype else 0
    widened = dtype.itemsize if dtype != operand_dtype else 0
    compacted = 0 if _has_blas_strides(W) else dtype.itemsize
    return (rounded + widened + compacted) * W.shape[1]


def _tiles(
    W: Tensor, operand_dtype: torch.dtype, dtype: torch.dtype, tile: int
) -> Iterator[tuple[slice, Tensor]]:
    """W in the dtype of the product: all of it, or `tile` rows at a time if it has to be copied."""
    if _copied_bytes(W, operand_dtype, dtype) == 0:
        yield slice(None), W
        return
    for i in range(0, W.shape[0], tile):
        v = slice(i, min(i + tile, W.shape[0]))
        W_v = W[v].to(operand_dtype).to(dtype)
        yield v, W_v if _has_blas_strides(W_v) else W_v.contiguous()


def _has_blas_strides(W: Tensor) -> bool:
    """Whether a matrix product can read W in place."""
    return (W.stride(1) == 1 and W.stride(0) >= W.shape[1]) or (
        W.stride(0) == 1 and W.stride(1) >= W.shape[0]
    )
