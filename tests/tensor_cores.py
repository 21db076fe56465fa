"""Products as NVIDIA's tensor cores make them: exact, then cut off where a sum must fit a register.

A matrix instruction adds a block of K products to an fp32 accumulator, in four steps:

    1. every product is exact
    2. all K of them and the accumulator are shifted to the largest exponent among them, and what
       lies below 2^−F of that is cut off: towards zero, nothing is rounded
    3. the sum of what is left is exact
    4. it is cut off to the 24 bits of fp32, towards zero again

The exponent of a product is the sum of its factors', so that its significand is in [1, 4). A
product over D features is a chain of D / K such additions, and each loses a little.

What is known, and from where: truncation, and the alignment to the largest exponent, from Fasi et
al., "Numerical behavior of NVIDIA tensor cores", PeerJ CS 330 (V100, T4, A100); K and F from
Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores", arXiv 2512.07004 (which calls F − 23
extra alignment bits), and Xie et al., "MMA-Sim", arXiv 2511.10909; both compared their models bit
by bit with A100, Ada, H100 and B200, and they agree. On sm_80 and sm_89 an instruction of 16
products is two blocks of 8, one after the other. `sm_89` stands for sm_86 and sm_120 too, as in the
table of tiles: of sm_120 MMA-Sim has K = 16, F = 25, so what is said of it here is too much. Not
modelled are infinities, NaN, and what underflows.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FP32_BITS = 23  # after the leading one
_BIAS = np.int16(1023)  # of float64's exponent
_LARGE = np.int16(500)  # beyond every exponent of fp32 and of a product
_COLUMNS = 256  # at a time, to stay in the cache


@dataclass(frozen=True)
class TensorCore:
    """What bf16 and fp16 operands meet on an architecture."""

    block: int
    """K, products added at a time."""
    bits: int
    """F, kept after the leading one of what is largest."""

    def steps(self, D: int) -> int:
        """Additions one after the other in a product over D features."""
        return -(-D // self.block)


# By the names of `opsd_kernels.kernels.tiles.TABLE`.
ARCHITECTURES = {
    "sm_80": TensorCore(block=8, bits=24),
    "sm_89": TensorCore(block=8, bits=24),
    "sm_90": TensorCore(block=16, bits=25),
    "sm_100": TensorCore(block=16, bits=25),
}


def multiply_add(
    a: NDArray[Any], b: NDArray[Any], c: NDArray[np.float32], core: TensorCore
) -> NDArray[np.float32]:
    """c + a b [M, N] fp32 from a [M, D], b [D, N], c [M, N].

    Args:
        a, b: of any floating dtype, holding what bf16 or fp16 can hold.
        c: the accumulator.
        core: which tensor core.
    """
    a, b = np.ascontiguousarray(a.T, np.float64), np.ascontiguousarray(b, np.float64)
    exponents_a, exponents_b = _exponents(a), _exponents(b)
    out = np.empty_like(c)
    for n in range(0, b.shape[1], _COLUMNS):
        columns = slice(n, n + _COLUMNS)
        total = c[:, columns].astype(np.float64)
        for k in range(0, len(a), core.block):
            block = slice(k, k + core.block)
            _add_block(
                total,
                a[block],
                b[block, columns],
                exponents_a[block],
                exponents_b[block, columns],
                core.bits,
            )
        out[:, columns] = total
    return out


def _add_block(
    total: NDArray[np.float64],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    exponents_a: NDArray[np.int16],
    exponents_b: NDArray[np.int16],
    bits: int,
) -> None:
    """total [M, N] ← total + aᵀ b of a block, [K, M] and [K, N], as one instruction does it."""
    exponents = _exponents(total)
    of_product = np.empty_like(exponents)
    for e_a, e_b in zip(exponents_a, exponents_b, strict=True):
        np.add(e_a[:, None], e_b, out=of_product)
        np.maximum(exponents, of_product, out=exponents)
    np.maximum(exponents, -_LARGE, out=exponents)  # nothing but zeros
    unit = _power_of_two(exponents - np.int16(bits))  # what is below it is cut off
    scale = 1 / unit
    total *= scale
    np.trunc(total, out=total)
    product = np.empty_like(total)
    for a_k, b_k in zip(a, b, strict=True):
        np.multiply(a_k[:, None], b_k, out=product)
        product *= scale
        np.trunc(product, out=product)
        total += product
    total *= unit
    # The bits that float64 has beyond those of fp32.
    total.view(np.int64)[...] &= -(1 << (52 - FP32_BITS))


def _exponents(t: NDArray[np.float64]) -> NDArray[np.int16]:
    """e of t = ± 1.… · 2^e; for 0 one below all others."""
    e = (t.view(np.int64) >> 52).astype(np.int16) & np.int16(0x7FF)
    return np.where(e == 0, -2 * _LARGE, e - _BIAS)


def _power_of_two(e: NDArray[np.int16]) -> NDArray[np.float64]:
    return ((e + _BIAS).astype(np.int64) << 52).view(np.float64)


def matmul(a: Tensor, b: Tensor, core: TensorCore, c: Tensor | None = None) -> Tensor:
    """`multiply_add` of tensors; c is 0 unless given."""
    start = np.zeros((a.shape[0], b.shape[1]), np.float32) if c is None else c.numpy()
    return torch.from_numpy(multiply_add(a.double().numpy(), b.double().numpy(), start, core))


class Truncation(NamedTuple):
    """What a product comes out low by, as `truncation` tells it; three tensors like the product."""

    mean: Tensor
    """Of the sign of the product."""
    common: Tensor
    """Standard deviation of what depends on the terms smoothly: a product of nearly the same terms
    has nearly the same."""
    own: Tensor
    """Standard deviation of what depends on their last digits: no two products have the same."""


def truncation(
    z: Tensor, size: Tensor, terms: int, core: TensorCore, dtype: torch.dtype
) -> Truncation:
    """What a chain of additions loses, derived, not simulated.

    After a share t of the terms the partial sum is A = t z give or take √(t (1 − t)) · size, as of
    a walk that ends at z. The last fp32 bit of it is 2^−23 |A| / m, its mantissa m as often in one
    part of an octave (in logarithm) as in another. With g = 2^(23 − F), what an addition keeps
    below that bit,

        the sum of what was kept is a multiple of g last bits, and is cut to whole ones;
        each of the K products is cut to multiples of g last bits, if it has digits below.

    What is cut is spread evenly. In the mean the first is proportional to A, and its sum over the
    walk to z, give or take size; the second has the sign of its product, and in the mean remains as
    far as these agree.

    Args:
        z: exact products, of any shape.
        size: the root of the sum of squares of the terms, likewise.
        terms: how many are summed in one chain.
        core: which tensor core.
        dtype: of the operands, bf16 or fp16.
    """
    steps, K, g = core.steps(terms), core.block, 2.0 ** (FP32_BITS - core.bits)
    last_bit = 2.0**-FP32_BITS / (2 * math.log(2))  # E 1/m = 1 / (2 log 2)
    last_bit_squared = 4.0**-FP32_BITS * 3 / (8 * math.log(2))
    size = size.clamp(min=torch.finfo(torch.float32).tiny)
    A = (z.square() / 4 + size.square() / 10).sqrt()  # |A| in the mean over the walk
    A_squared = z.square() / 3 + size.square() / 6
    # Two factors of d digits after the point have a product of 2 d: whether some of them are below
    # what is kept, for products spread exponentially about their mean.
    digits = 2 * {torch.bfloat16: 7, torch.float16: 10}[dtype]
    product = math.sqrt(0.5) * ((z / terms).square() + size.square() / terms).sqrt()
    shortest = 2.0 ** (digits + 1) * g * last_bit * A / product
    cut = 1 + (-shortest).expm1() / shortest
    agreement = (math.sqrt(2 / math.pi / terms) * z / size).clamp(-1, 1)
    mean = (1 - g) * z / 2 + K * g * cut * agreement * A
    of_walk = steps * last_bit * (1 - g) / 2 * size / math.sqrt(12)
    of_signs = steps * last_bit_squared * K * g**2 * cut / 4 * A_squared
    own = steps * last_bit_squared * (1 - g**2 + K * g**2 * cut) / 12 * A_squared
    return Truncation(steps * last_bit / 2 * mean, (of_walk.square() + of_signs).sqrt(), own.sqrt())


@contextmanager
def simulated(
    core: TensorCore, dtype: torch.dtype, *, logits: bool = True, last_product: bool = True
) -> Iterator[None]:
    """Within it this package's products on a CPU are a tensor core's: `tl.dot` where Triton is
    interpreted, and the library's.

    Args:
        core: which tensor core.
        dtype: bf16 or fp16, of hidden states and heads. With bf16 the gradient with respect to
            logits is rounded before it is multiplied, as on a GPU; with fp16, where it would have
            to be scaled, the last product stays what it is.
        logits: whether h Wᵀ is such a product.
        last_product: whether g W is one.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be torch.bfloat16 or torch.float16, not {dtype}")
    remembered = _Remembered(core)
    with ExitStack() as stack:
        if logits:
            from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

            def create_dot(_: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
                return TensorHandle(remembered(a.data, b.data, d.data), d.dtype.scalar)

            stack.enter_context(mock.patch.object(InterpreterBuilder, "create_dot", create_dot))
        stack.enter_context(
            _LibraryProducts(
                remembered if logits else None,
                core if last_product and dtype == torch.bfloat16 else None,
            )
        )
        yield


class _Remembered:
    """`multiply_add`, of the same operands once: every kernel makes the same logits."""

    def __init__(self, core: TensorCore) -> None:
        self.core = core
        self.results: dict[bytes, NDArray[np.float32]] = {}

    def __call__(
        self, a: NDArray[Any], b: NDArray[Any], c: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        key = blake2b()
        for operand in (a, b, c):
            key.update(repr(operand.shape).encode())
            key.update(operand.tobytes())
        result = self.results.get(key.digest())
        if result is None:
            result = self.results[key.digest()] = multiply_add(a, b, c, self.core)
        return result.copy()


class _LibraryProducts(TorchDispatchMode):
    """mm by a transposed head, which makes logits; mm and addmm by the head, which make of their
    gradient that of hidden states. What is added to fp32 a library adds at the end, to the whole
    product, rounding to nearest."""

    def __init__(self, logits: _Remembered | None, last_product: TensorCore | None) -> None:
        super().__init__()
        self.logits, self.last_product = logits, last_product

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.mm.out:
            makes_logits = args[1].stride(0) == 1
            if makes_logits and self.logits is not None:
                a, b = (t.numpy() for t in args)
                z = self.logits(a, b, np.zeros((a.shape[0], b.shape[1]), np.float32))
                return kwargs["out"].copy_(torch.from_numpy(z))
            if not makes_logits and self.last_product is not None:
                g, W = args
                return kwargs["out"].copy_(matmul(g.bfloat16(), W, self.last_product))
        if func is torch.ops.aten.addmm.out and self.last_product is not None:
            c, g, W = args
            return kwargs["out"].copy_(c + matmul(g.bfloat16(), W, self.last_product))
        return func(*args, **(kwargs or {}))
