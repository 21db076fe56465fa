"""Inputs for the tests: hidden states and heads, random and like the real thing."""

import torch
from heads import logits
from textbook import entries
from torch import Tensor

from opsd_kernels import Divergence, LMHead

BETAS = [0.0, 1e-3, 0.3, 0.5, 0.7, 0.999, 1.0]


def some_betas(N: int, seed: int = 0) -> Tensor:
    """[N] β of every member of the family, and between."""
    g = torch.Generator().manual_seed(seed)
    named = torch.tensor(BETAS)[torch.randint(len(BETAS), (N,), generator=g)]
    return torch.where(torch.rand(N, generator=g) < 0.3, torch.rand(N, generator=g), named)


def random_inputs(
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    size: float = 1.0,
    distance: float = 0.1,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """h_S, h_T [N, D] and W [V, D]: logits of standard deviation about `size`, the teacher's hidden
    states a relative `distance` from the student's."""
    g = torch.Generator().manual_seed(seed)
    h_S = (size * torch.randn(N, D, generator=g)).to(dtype)
    h_T = (h_S.float() + distance * size * torch.randn(N, D, generator=g)).to(dtype)
    W = (torch.randn(V, D, generator=g) / D**0.5).to(dtype)
    return h_S, h_T, W


def language_like_inputs(
    N: int, V: int, D: int, dtype: torch.dtype, distance: float, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Peaked next-token distributions: each token's hidden state points at an entry of its own,
    more or less confidently (entropy from 1e-4 nats to that of a flat distribution)."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(V, D, generator=g) / D**0.5
    likely = torch.randint(V, (N,), generator=g)
    confidence = torch.linspace(0, 25, N)[:, None]
    h_S = torch.randn(N, D, generator=g) + confidence * W[likely]
    h_T = h_S + distance * torch.randn(N, D, generator=g)
    return h_S.to(dtype), h_T.to(dtype), W.to(dtype)


def clip_is_clear(
    h_S: Tensor,
    h_T: Tensor,
    W: Tensor | LMHead,
    W_T: Tensor | LMHead,
    divergence: Divergence,
    temperature: float,
) -> bool:
    """No entry sits so near the clip that rounding decides whether it is clipped."""
    assert divergence.entry_clip is not None
    log_p = logits(h_S, W, temperature).log_softmax(-1)
    log_q = logits(h_T, W_T, temperature).log_softmax(-1)
    f = entries(log_p, log_q, divergence.beta, divergence.weights)
    f = f.nan_to_num(nan=0.0)  # of entries that are banned
    return bool(((f / divergence.entry_clip - 1).abs() > 1e-4).all())
