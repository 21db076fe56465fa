"""Heads that are more than a matrix, written out: what the package computes in place."""

from dataclasses import dataclass
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from opsd_kernels import LMHead


def as_head(W: Tensor | LMHead) -> LMHead:
    """The head that a loss makes of W, without its padded rows."""
    head = W if isinstance(W, LMHead) else LMHead(W)
    V = head.weight.shape[0] if head.vocab_size is None else head.vocab_size
    bias = None if head.bias is None else head.bias[:V]
    return head._replace(weight=head.weight[:V], bias=bias, vocab_size=None)


def logits_of_products(u: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
    """Logits before temperature from products h Wᵀ [N, V], and their derivative by them, float64.

    Formulas of transformers' models: Cohere's scale, Phi's bias, Gemma's cap.
    """
    if head.bias is not None:
        u = u + head.bias.double()
    z = head.scale * u
    slope = torch.full_like(z, head.scale)
    if head.softcap is not None:
        slope = slope / torch.cosh(z / head.softcap) ** 2
        z = head.softcap * torch.tanh(z / head.softcap)
        if head.bias is not None:
            z = torch.where(head.bias == -torch.inf, -torch.inf, z)
    return z, slope


def logits(h: Tensor, W: Tensor | LMHead, temperature: float = 1.0) -> Tensor:
    """Logits [N, V] in float64, differentiable."""
    head = as_head(W)
    z, _ = logits_of_products(h.double() @ head.weight.double().T, head)
    return z / temperature


def size_of_logits(h: Tensor, head: LMHead) -> Tensor:
    """[N] what the largest sum of products of a row may be, bias and scale included."""
    size = h.double().norm(dim=1) * head.weight.double().norm(dim=1).max()
    if head.bias is not None:
        size = size + head.bias[head.bias > -torch.inf].double().abs().max()
    return head.scale * size


@dataclass(frozen=True)
class Extras:
    """What a drawn head has beside its matrix."""

    bias: Literal["none", "random", "with bans"] = "none"
    softcap: float | None = None
    scale: float = 1.0
    padding: int = 0  # rows
    teacher_differs: bool = False  # in all but its weight and what is banned

    def heads(self, W: Tensor, W_T: Tensor | None, seed: int) -> tuple[LMHead, LMHead | None]:
        """The student's head, and the teacher's if it is not the same."""
        student = self._head(W, seed)
        if W_T is None and not self.teacher_differs:
            return student, None
        teacher = student if W_T is None else self._head(W_T, seed)
        if self.teacher_differs:
            bias = None if teacher.bias is None else 0.9 * teacher.bias
            softcap = None if self.softcap is None else 1.1 * self.softcap
            teacher = teacher._replace(bias=bias, softcap=softcap, scale=0.8 * self.scale)
        return student, teacher

    def _head(self, W: Tensor, seed: int) -> LMHead:
        V = W.shape[0]
        g = torch.Generator().manual_seed(seed)
        padding = torch.full((self.padding, W.shape[1]), torch.nan, dtype=W.dtype)
        bias = None
        if self.bias != "none":
            bias = torch.randn(V + self.padding, generator=g).to(W.dtype)
            if self.bias == "with bans":
                bias[1:V:3] = -torch.inf  # never all
        return LMHead(
            torch.cat([W, padding]), bias, self.softcap, self.scale, V if self.padding else None
        )


EXTRAS = st.one_of(
    st.none(),
    st.builds(
        Extras,
        bias=st.sampled_from(["none", "random", "with bans"]),
        softcap=st.sampled_from([None, 1.0, 5.0, 30.0]),
        scale=st.sampled_from([1.0, 0.25, 3.0]),
        padding=st.integers(0, 5),
        teacher_differs=st.booleans(),
    ),
)
