"""gathered: products of each token with K rows of the head, which are read where they lie.

    products_at         u_k = h · W[id_k]
    add_rows            out ← out + Σ_k c_k W[id_k]
    gradient_of_rows    dW[id_k] ← dW[id_k] + c_k h,  db[id_k] ← db[id_k] + c_k

An id outside [0, V) is absent. Each sum has one order and needs no atomics: `gradient_of_rows` is
given the pairs (token, k) sorted by id, and one program adds up all pairs of an id.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cdiv, current
from .logits_tile import round_to
from .records import DTYPE_NAMES, Side

# Features of a row, and the most rows of W, that a program loads at once.
BLOCK, MOST_ROWS = tl.constexpr(1024), 4
# Features and rows of h that a program of `gradient_of_rows` loads at once. Few programs do all the
# work of an id that every token has, so each loads many rows and few features.
BLOCK_OF_PAIRS, PAIRS = tl.constexpr(256), tl.constexpr(16)


def products_at(u: Tensor, h: Tensor, W: Tensor, ids: Tensor, operand_dtype: torch.dtype) -> None:
    """u ← h · W[id], from h [N, D] with contiguous features."""
    N, K = ids.shape
    rows = _rows(K)
    with current(u.device):
        products_at_kernel[(N, cdiv(K, rows))](
            u=u,
            h=h,
            W=W,
            head=_side(W, h.stride(0)),
            ids=ids,
            K=K,
            ROWS=rows,
            OPERAND=tl.dtype(DTYPE_NAMES[operand_dtype]),
        )


def add_rows_(out: Tensor, c: Tensor, W: Tensor, ids: Tensor, operand_dtype: torch.dtype) -> None:
    """out ← out + Σ_k c_k W[id_k], all but W contiguous."""
    N, K = ids.shape
    with current(out.device):
        add_rows_kernel[(N, cdiv(W.shape[1], BLOCK.value))](
            out=out,
            c=c,
            W=W,
            head=_side(W, None),
            ids=ids,
            K=K,
            ROWS=_rows(K),
            OPERAND=tl.dtype(DTYPE_NAMES[operand_dtype]),
        )


def gradient_of_rows_(
    dW: Tensor,
    db: Tensor | None,
    c: Tensor,
    h: Tensor,
    ids: Tensor,
    pairs: Tensor,
    operand_dtype: torch.dtype,
) -> None:
    """dW[id] ← dW[id] + c h and db[id] ← db[id] + c, from h [N, D] with contiguous features; `ids`
    [N · K] are sorted, and `pairs` are their places in c [N, K]."""
    (P,), D = ids.shape, dW.shape[1]
    with current(dW.device):
        gradient_of_rows_kernel[(P, cdiv(D, BLOCK_OF_PAIRS.value))](
            dW=dW,
            db=db,
            c=c,
            h=h,
            head=_side(dW, h.stride(0)),
            ids=ids,
            pairs=pairs,
            P=P,
            K=c.shape[1],
            OPERAND=tl.dtype(DTYPE_NAMES[operand_dtype]),
        )


def _side(W: Tensor, stride_h: int | None) -> Side:
    return Side(W.shape[0], W.shape[1], stride_h, W.stride(0), W.stride(1))


def _rows(K: int) -> int:
    return min(MOST_ROWS, triton.next_power_of_2(K))


@triton.jit
def products_at_kernel(u, h, W, head, ids, K, ROWS: tl.constexpr, OPERAND: tl.constexpr):
    """Grid (tokens, blocks of ROWS ids).

    Writes:
        u: [N, K] fp32; 0 where an id is absent.

    Reads:
        h: [N, D], features contiguous.
        W, head: W [V, D] and its `Side`.
        ids: [N, K] int32.
        OPERAND: the dtype that h and W are rounded to.
    """
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row, present = _row_of_id(ids + n * K + k, k < K, head.V)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, head.D, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        h_d = _rounded(tl.load(h + n * head.stride_h + d, mask=d < head.D, other=0.0), OPERAND)
        sums += h_d[None, :] * _rows_of_head(W, head, row, d, present, OPERAND)
    products = tl.where(present, tl.sum(sums, 1), 0.0)
    tl.store(u + n * K + k, products, mask=k < K)


@triton.jit
def add_rows_kernel(out, c, W, head, ids, K, ROWS: tl.constexpr, OPERAND: tl.constexpr):
    """Grid (tokens, blocks of features).

    Writes:
        out: [N, D] fp32, added to.

    Reads:
        c: [N, K] fp32.
        W, head, ids, OPERAND: as in `products_at_kernel`, ROWS ids at a time.
    """
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(0, K, ROWS):
        k = begin + tl.arange(0, ROWS)
        row, present = _row_of_id(ids + n * K + k, k < K, head.V)
        c_k = tl.load(c + n * K + k, mask=present, other=0.0)
        sums += c_k[:, None] * _rows_of_head(W, head, row, d, present, OPERAND)
    at = out + n * head.D + d
    inside = d < head.D
    tl.store(at, tl.load(at, mask=inside, other=0.0) + tl.sum(sums, 0), mask=inside)


# Numbers that depend on the batch do not cause a recompilation.
@triton.jit(do_not_specialize=["P"])
def gradient_of_rows_kernel(dW, db, c, h, head, ids, pairs, P, K, OPERAND: tl.constexpr):
    """Grid (pairs, blocks of features). The program at the first pair of an id adds up all pairs of
    this id; the others end at once.

    Writes:
        dW, head: dW [V, D] fp32 and its `Side`, added to.
        db: [V] fp32, added to, or None.

    Reads:
        ids: [P] int32, sorted.
        pairs: [P] int64, n K + k of each.
        c: [N, K] fp32.
        h: [N, D], features contiguous.
        OPERAND: the dtype that h is rounded to.
    """
    first = tl.program_id(0)
    id = tl.load(ids + first)
    previous = tl.load(ids + first - 1, mask=first > 0, other=-1)
    if (id >= 0) & (id < head.V) & (id != previous):
        d = tl.program_id(1) * BLOCK_OF_PAIRS + tl.arange(0, BLOCK_OF_PAIRS)
        inside = d < head.D
        sums = tl.zeros((PAIRS, BLOCK_OF_PAIRS), tl.float32)
        sums_of_c = tl.zeros((PAIRS,), tl.float32)
        begin, following = first, id
        while following == id:
            at = begin + tl.arange(0, PAIRS)
            same = tl.load(ids + at, mask=at < P, other=-1) == id
            pair = tl.load(pairs + at, mask=same, other=0)
            c_pair = tl.load(c + pair, mask=same, other=0.0)
            h_pair = tl.load(
                h + (pair // K)[:, None] * head.stride_h + d[None, :],
                mask=same[:, None] & inside[None, :],
                other=0.0,
            )
            sums += c_pair[:, None] * _rounded(h_pair, OPERAND)
            sums_of_c += c_pair
            begin += PAIRS
            following = tl.load(ids + begin, mask=begin < P, other=-1)
        at_dW = dW + id.to(tl.int64) * head.stride_v + d.to(tl.int64) * head.stride_d
        tl.store(at_dW, tl.load(at_dW, mask=inside, other=0.0) + tl.sum(sums, 0), mask=inside)
        if db is not None:
            total = tl.load(db + id) + tl.sum(sums_of_c, 0)
            tl.store(db + id, total, mask=tl.program_id(1) == 0)


@triton.jit
def _row_of_id(at, exists, V):
    """The rows of W that ids name, int64, and whether they are present."""
    id = tl.load(at, mask=exists, other=-1)
    return id.to(tl.int64), (id >= 0) & (id < V)


@triton.jit
def _rows_of_head(W, head, row, d, present, OPERAND: tl.constexpr):
    """Some features of rows of W, [rows, features] fp32, 0 where an id is absent."""
    at = row[:, None] * head.stride_v + d.to(tl.int64)[None, :] * head.stride_d
    inside = present[:, None] & (d < head.D)[None, :]
    return _rounded(tl.load(W + at, mask=inside, other=0.0), OPERAND)


@triton.jit
def _rounded(t, OPERAND: tl.constexpr):
    """t in fp32, after it was rounded to OPERAND."""
    return round_to(t.to(tl.float32), OPERAND).to(tl.float32)
