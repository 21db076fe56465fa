"""Products of each token with K rows of the head, which are gathered by id.

    u_k = h · W[id_k]          out ← out + Σ_k c_k W[id_k]          dW[id_k] ← dW[id_k] + c_k h

An id outside [0, V) is absent: its product is 0, and its coefficient, which may be NaN, counts as
0. Ids may repeat. Operands are rounded to `operand_dtype`. Products are summed in fp32, always in
the same order. On a GPU kernels read the rows where they lie; elsewhere a bounded number of rows at
a time is copied.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import kernels

# Entries of rows that are copied at once, where there are no kernels.
CPU_ENTRIES, GPU_ENTRIES = 2**20, 2**24


def products_at(h: Tensor, W: Tensor, ids: Tensor, operand_dtype: torch.dtype) -> Tensor:
    """u = h · W[id] [N, K] in fp32, from h [N, D], W [V, D] and ids [N, K] int32."""
    u = h.new_empty(ids.shape, dtype=torch.float32)
    if _uses_kernels(W):
        from .kernels import gathered  # needs Triton

        gathered.products_at(u, h.contiguous(), W, ids.contiguous(), operand_dtype)
        return u
    for n, k in _pieces(ids, W):
        rows = _gather(W, ids[n, k], operand_dtype)
        h_n = h[n].to(operand_dtype).float()
        torch.bmm(rows, h_n[:, :, None], out=u[n, k, None])
    return u.masked_fill_(_absent(ids, W), 0)


def add_rows_(out: Tensor, c: Tensor, W: Tensor, ids: Tensor, operand_dtype: torch.dtype) -> None:
    """out ← out + Σ_k c_k W[id_k] [N, D] in fp32 and contiguous, from c [N, K] fp32."""
    if _uses_kernels(W):
        from .kernels import gathered

        gathered.add_rows_(out, c.contiguous(), W, ids.contiguous(), operand_dtype)
        return
    c = c.masked_fill(_absent(ids, W), 0)
    for n, k in _pieces(ids, W):
        rows, sums = _gather(W, ids[n, k], operand_dtype), out[n, None]
        torch.baddbmm(sums, c[n, None, k], rows, out=sums)


def gradient_of_rows_(
    dW: Tensor,
    db: Tensor | None,
    c: Tensor,
    h: Tensor,
    ids: Tensor,
    operand_dtype: torch.dtype,
) -> None:
    """dW[id_k] ← dW[id_k] + c_k h and db[id_k] ← db[id_k] + c_k in fp32: [V, D] and [V]. With
    kernels the N · K ids are sorted first."""
    if _uses_kernels(dW):
        from .kernels import gathered

        sorted_ids, pairs = ids.flatten().sort(stable=True)
        gathered.gradient_of_rows_(
            dW, db, c.contiguous(), h.contiguous(), sorted_ids, pairs, operand_dtype
        )
        return
    absent = _absent(ids, dW)
    c = c.masked_fill(absent, 0)
    at = ids.masked_fill(absent, 0).long()
    for n, k in _pieces(ids, dW):
        h_n = h[n].to(operand_dtype).float()
        rows = (c[n, k, None] * h_n[:, None]).masked_fill_(absent[n, k, None], 0)
        _add_at_(dW, at[n, k].flatten(), rows.flatten(0, 1))
    if db is not None:
        _add_at_(db, at.flatten(), c.flatten())


def _uses_kernels(W: Tensor) -> bool:
    return W.device.type == "cuda" and kernels.available(W.device)


def _add_at_(out: Tensor, at: Tensor, rows: Tensor) -> None:
    """out[at] ← out[at] + rows, for indices that may repeat, in one order."""
    if out.device.type == "cpu":
        out.index_add_(0, at, rows)
    else:
        # index_put_ sorts the indices. index_add_ would add atomically, in any order.
        out.index_put_((at,), rows, accumulate=True)


def _absent(ids: Tensor, W: Tensor) -> Tensor:
    return (ids < 0) | (ids >= W.shape[0])


def _gather(W: Tensor, ids: Tensor, operand_dtype: torch.dtype) -> Tensor:
    """W[ids] [n, k, D], rounded, in fp32. Where an id is absent, the row is some row of W."""
    at = ids.clamp(0, W.shape[0] - 1).flatten()
    return W.index_select(0, at).to(operand_dtype).float().unflatten(0, ids.shape)


def _pieces(ids: Tensor, W: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of tokens and of their ids, for a bounded number of rows at once."""
    (N, K), entries = ids.shape, CPU_ENTRIES if W.device.type == "cpu" else GPU_ENTRIES
    pairs = max(1, entries // W.shape[1])
    n = max(1, pairs // K)
    for i in range(0, N, n):
        for j in range(0, K, pairs):
            yield slice(i, i + n), slice(j, j + pairs)
