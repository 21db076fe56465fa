"""Errors of a function of hidden states and a head, in the units of accuracy.py, whatever it is.

Its oracle is asked again with every logit moved by its last fp32 bit, which shows how far from the
exact results fp32 logits may lead. The moves are features: one of its own for each token, in which
the token is 1 and entry v has the move of its logit. So the gradient of these columns of W is that
with respect to the products.
"""

import math
from collections.abc import Callable, Sequence

import torch
from accuracy import textbook_doubt
from heads import as_head, logits_of_products
from torch import Tensor

from opsd_kernels import LMHead

DRAWS = 4
# Results [N, ...], which depend on one token each, of hidden states [N, ·], a head and a generator
# of random moves of other inputs, or None for none.
Function = Callable[[Tensor, LMHead, torch.Generator | None], Tensor]


def units(
    found: Sequence[Tensor],
    function: Function,
    h: Tensor,
    head: LMHead,
    upstream: Tensor,
    tiles: bool = False,
) -> list[float]:
    """Errors of what was found, in units: of the results, and of the gradients of their sum weighed
    by `upstream` [N, ...], with respect to hidden states, weight and bias.

    Args:
        found: results and the first of the gradients.
        tiles: whether the gradient with respect to logits is rounded to the dtype of h for the last
            product.
    """
    head, dtype = as_head(head), h.dtype
    h, weight = h.detach().double(), head.weight.detach().double()
    bias = None if head.bias is None else head.bias.detach().double()
    N, (V, D) = len(h), weight.shape
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    u = h @ weight.t()
    of_bias = 0 if bias is None else bias.nan_to_num(neginf=0.0).abs()
    # Of the sum of products, of the capped logit, and of its log-sum-exp.
    size = h.norm(dim=1)[:, None] * weight.norm(dim=1) + u.abs() + 2 * of_bias
    size = size + (1 + math.log(V)) / head.scale
    if head.softcap is not None:
        v = head.scale * (u if bias is None else u + bias.nan_to_num(neginf=0.0)) / head.softcap
        size = size + head.softcap / head.scale * v.tanh().abs() * v.cosh().square().clamp(max=1e3)

    def solved(move: Tensor, moves: torch.Generator | None) -> tuple[list[Tensor], Tensor]:
        """Results and gradients; and the gradient with respect to products."""
        wide = torch.cat([weight, move.t()], 1).requires_grad_()
        leaf = torch.cat([h, torch.eye(N, dtype=torch.float64)], 1).requires_grad_()
        leaves = [leaf, wide]
        if bias is not None:
            leaves.append(bias.clone().requires_grad_())
        moved = head._replace(weight=wide, bias=None if bias is None else leaves[2])
        result = function(leaf, moved, moves)
        grads = torch.autograd.grad(result, leaves, upstream.double())
        dz = grads[1][:, D:].t()
        return [result.detach(), grads[0][:, :D], grads[1][:, :D], *grads[2:]], dz

    exact, dz = solved(torch.zeros(N, V, dtype=torch.float64), None)
    # Of the normalizer of a row: it moves all entries together.
    together = logits_of_products(u, head)[0].softmax(-1) * dz.abs().sum(-1, keepdim=True)
    together *= 2.0**-24 * (1 + math.log(V))
    squares = [torch.zeros((), dtype=torch.float64) for _ in exact]
    for _ in range(DRAWS):
        results, _ = solved(2.0**-24 * randn(N, V) * size, g)
        rounded = torch.finfo(dtype if tiles else torch.float32).eps / 2 * randn(N, V) * dz
        rounded += together * randn(N, 1)
        of_entries = [0, rounded @ weight, rounded.t() @ h, rounded.sum(0)]
        for square, t, more, true in zip(squares, results, of_entries, exact, strict=False):
            change = (t + more - true).nan_to_num(0.0, 0.0, 0.0)
            square += change.norm().square() / DRAWS
    # What float64 may be off by, where everything else is exact.
    doubt = textbook_doubt(V) * N**0.5
    errors = []
    for i, (t, true, square) in enumerate(zip(found, exact, squares, strict=False)):
        kept = true.isfinite()
        assert (t[~kept].double() == true[~kept]).all()
        t, true = t[kept], true[kept]
        rounding = (true.to(dtype if i else torch.float32).double() - true).norm()
        unit = rounding + square.sqrt() + doubt
        if i == 0:
            doubt *= 2 * head.scale * float(weight.norm(dim=1).max())
        errors.append(float((t.double() - true).norm() / unit))
    return errors
