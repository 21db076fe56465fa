"""The map from products h Wᵀ to logits, entry by entry: what `LogitMap` is for PyTorch.

    u = h Wᵀ + b,   z = C tanh(v),  v = σ u / C;   without a cap z = σ u

and with a cap, where a gradient is needed, the slope ∂z/∂(σ u) = 1 − tanh² v = 1/cosh² v. Bias,
softcap and scale are None if absent, and then cost nothing.

Both come from e = exp(−2|v|), which is at most 1:

    tanh |v| = (1 − e) / (1 + e)        1/cosh² v = 4 e / (1 + e)²

This slope keeps its digits where the cap is reached; 1 − tanh² v would not. tanh near 0 (|v| < ½)
is a series, which has one or two roundings however small v is: the difference of two logits needs
that.
"""

import triton
import triton.language as tl

from .pointwise import exp, quotient


@triton.jit
def logits_and_slope(u, col, V, bias, softcap, scale):
    """Logits z of products u [BM, BV] at the columns `col` [1, BV], and the slope [BM, BV]; without
    a cap the slope is the number 1, which costs nothing.

    Args:
        V: the vocabulary's end, or None if all columns are before it.
        bias: pointer [V], any dtype.
        softcap, scale: fp32 numbers.
    """
    return capped(biased(u, col, V, bias), softcap, scale)


@triton.jit
def biased(u, col, V, bias):
    """u plus the bias of its columns, see `logits_and_slope`."""
    if bias is not None:
        if V is not None:
            u += tl.load(bias + col, mask=col < V, other=0.0).to(tl.float32)
        else:
            u += tl.load(bias + col).to(tl.float32)
    return u


@triton.jit
def capped(u, softcap, scale):
    """z and slope of u, bias included, of any shape; z increases with u."""
    slope = 1.0
    if softcap is not None:
        if scale is not None:
            v = u * (scale / softcap)
        else:
            v = u * (1.0 / softcap)
        t, slope = _tanh_and_slope(v)
        u = tl.where(u == float("-inf"), u, t * softcap)  # a ban stays a ban
    elif scale is not None:
        u *= scale
    return u, slope


@triton.jit
def _tanh_and_slope(v):
    y = tl.abs(v)
    e = exp(y, -2.0)
    t = quotient(1.0 - e, 1.0 + e)
    # y − y³/3 + 2 y⁵/15 − … to y¹⁵: the rest is below 2⁻²⁵ of the sum.
    y2 = y * y
    series = 21844 / 6081075 - y2 * (929569 / 638512875)
    series = -1382 / 155925 + y2 * series
    series = 62 / 2835 + y2 * series
    series = -17 / 315 + y2 * series
    series = 2 / 15 + y2 * series
    series = -1 / 3 + y2 * series
    t = tl.where(y < 0.5, y + y * (y2 * series), t)
    return tl.where(v < 0, -t, t), quotient(4.0 * e, (1.0 + e) * (1.0 + e))
