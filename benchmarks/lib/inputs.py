"""Hidden states and heads like the real thing: peaked next-token distributions, a teacher near the
student; and flat ones, which are what random hidden states give."""

import torch
from torch import Tensor

from opsd_kernels import reference_token_divergence


def make_inputs(
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    distance: float = 0.1,
    confidence: float = 25.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """h_S, h_T [N, D] and W [V, D].

    Args:
        distance: of the teacher's hidden states from the student's, per feature, whose own size
            is 1.
        confidence: each token's hidden state points at an entry of its own, the last of them this
            confidently, the first not at all: with 25 entropies go from 1e-4 nats to that of a flat
            distribution. 0 leaves all of them flat.
    """
    g = torch.Generator(device).manual_seed(0)
    W = torch.randn(V, D, generator=g, device=device) / D**0.5
    likely = torch.randint(V, (N,), generator=g, device=device)
    towards = torch.linspace(0, confidence, N, device=device)[:, None]
    h_S = torch.randn(N, D, generator=g, device=device) + towards * W[likely]
    h_T = h_S + distance * torch.randn(N, D, generator=g, device=device)
    return h_S.to(dtype), h_T.to(dtype), W.to(dtype)


def sample_targets(h: Tensor, W: Tensor) -> Tensor:
    """[N] ids, each drawn from its token's distribution; the same ones every time."""
    g = torch.Generator(h.device).manual_seed(1)
    drawn = [
        (rows.float() @ W.float().t()).softmax(-1).multinomial(1, generator=g)[:, 0]
        for rows in h.detach().split(256)
    ]
    return torch.cat(drawn)


def describe(h_S: Tensor, h_T: Tensor, W: Tensor, tokens: int = 32) -> str:
    """Mean teacher entropy and JSD, in nats, of some of the tokens."""
    some = torch.linspace(0, h_S.shape[0] - 1, min(tokens, h_S.shape[0])).long().to(h_S.device)
    with torch.no_grad():
        stats = reference_token_divergence(h_S[some], h_T[some], W)
    entropy, jsd = stats.entropy_teacher.mean(), stats.loss.mean()
    return f"mean teacher entropy {entropy:.2f} nats, mean JSD {jsd:.1e}"
