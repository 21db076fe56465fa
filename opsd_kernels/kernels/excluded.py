"""Entries that are excluded from rows of logits, a set for each row: one bit for each entry.

`mark` makes the bits of some columns from K ids of each row. A kernel that makes logits begins the
product of an excluded entry with −∞ in place of 0, so the entry counts as a banned one. `put`
writes given numbers over excluded entries.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import cdiv, current
from .logits_tile import round_to

BITS = tl.constexpr(32)  # of a word
# Words, or ids, that a program of `mark` or `put` handles at once.
BLOCK = tl.constexpr(1024)


def words(columns: int) -> int:
    """Words of a row of bits: enough for whole tiles of up to 256 columns."""
    return cdiv(columns, 256) * 256 // BITS.value


def mark(bits: Tensor, excluded: Tensor, first: int) -> None:
    """bits [R, words] int32 ← the entries from `first` on that are in `excluded` [R, K] int32. Ids
    of other columns are passed over."""
    R, K = excluded.shape
    with current(bits.device):
        mark_kernel[(R,)](bits, excluded, K, first, bits.shape[1], bits.stride(0))


def put(g: Tensor, values: Tensor, excluded: Tensor, first: int, scale: float) -> None:
    """g [R, columns] ← values · scale at excluded entries; a value of 0 is not written."""
    (R, K), columns = excluded.shape, g.shape[1]
    with current(g.device):
        put_kernel[(R,)](g, values, excluded, K, first, columns, g.stride(0), SCALE=scale)


# Numbers that depend on the tile do not cause a recompilation.
@triton.jit(do_not_specialize=["first"])
def mark_kernel(bits, excluded, K, first, words, stride):
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    to = bits + row * stride
    for begin in range(0, words, BLOCK):
        nothing = tl.zeros((BLOCK,), tl.int32)
        tl.store(to + begin + i, nothing, mask=begin + i < words)
    tl.debug_barrier()  # other threads have written 0 there
    for begin in range(0, K, BLOCK):
        k = begin + i
        col = tl.load(excluded + row * K + k, mask=k < K, other=-1) - first
        inside = (col >= 0) & (col < words * BITS)
        tl.atomic_or(to + col // BITS, 1 << (col % BITS), mask=inside, sem="relaxed")


# Numbers that depend on the tile do not cause a recompilation.
@triton.jit(do_not_specialize=["first", "columns"])
def put_kernel(g, values, excluded, K, first, columns, stride, SCALE: tl.constexpr):
    """Grid (rows)."""
    row = tl.program_id(0).to(tl.int64)
    for begin in range(0, K, BLOCK):
        k = begin + tl.arange(0, BLOCK)
        col = tl.load(excluded + row * K + k, mask=k < K, other=-1) - first
        value = tl.load(values + row * K + k, mask=k < K, other=0.0) * SCALE
        inside = (col >= 0) & (col < columns) & (value != 0)
        tl.store(g + row * stride + col, round_to(value, g.dtype.element_ty), mask=inside)


@triton.jit
def excluded_tile(begin, row, exists, tokens, BV: tl.constexpr):
    """[BM, BV] of the columns from `begin` on: −∞ at excluded entries, 0 elsewhere."""
    col = tl.arange(0, BV)[None, :]
    ptrs = tokens.bits + row.to(tl.int64) * tokens.stride_bits + begin // BITS
    word = tl.load(ptrs, mask=exists, other=0)[:, None]
    for i in tl.static_range(1, BV // BITS):
        later = tl.load(ptrs + i, mask=exists, other=0)[:, None]
        word = tl.where(col >= i * BITS, later, word)
    # In two shifts. In the layout of NVIDIA's tensor cores a thread has two of every eight columns.
    # Then the first shift is the same for all columns of a thread, and the second is a constant.
    bit = ((word >> (col & 6)) >> (col & 25)) & 1
    return tl.where(bit != 0, float("-inf"), 0.0)
