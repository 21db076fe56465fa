"""The same loss as others compute it, behind one signature: mean JSD_β (β on the teacher, 0 and 1
naming the forward and reverse KL) of [N, D] hidden states, differentiable with respect to h_S.

Peers are imported when called: none of them is needed to use the package.
"""

from typing import Protocol

import torch
from torch import Tensor

from opsd_kernels import fused_jsd_loss


class Loss(Protocol):
    def __call__(
        self, h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
    ) -> Tensor: ...


def ours(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    return fused_jsd_loss(h_S, h_T, W, beta=beta, temperature=temperature)


def row_workspace(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Ours with a workspace of logit rows, which is the default on a CPU alone."""
    return fused_jsd_loss(h_S, h_T, W, beta=beta, temperature=temperature, workspace_mib=320)


def eager(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """What a trainer does with logits: `lm_head`, upcast, log-softmax, the textbook formula."""
    return eager_clipped(h_S, h_T, W, beta, None, temperature)


def eager_clipped(
    h_S: Tensor,
    h_T: Tensor,
    W: Tensor,
    beta: float,
    entry_clip: float | None,
    temperature: float = 1.0,
) -> Tensor:
    """The same with a clip of the entries, as OPSD's authors train now."""
    log_p = (torch.nn.functional.linear(h_S, W).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        log_q = (torch.nn.functional.linear(h_T, W).float() / temperature).log_softmax(-1)
    kl_div = torch.nn.functional.kl_div
    if beta == 0:
        f = kl_div(log_p, log_q, reduction="none", log_target=True)
    elif beta == 1:
        f = kl_div(log_q, log_p, reduction="none", log_target=True)
    else:
        weights = torch.tensor([1 - beta, beta], device=log_p.device).log()
        log_m = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), dim=0)
        f = beta * kl_div(log_m, log_q, reduction="none", log_target=True)
        f = f + (1 - beta) * kl_div(log_m, log_p, reduction="none", log_target=True)
    if entry_clip is not None:
        f = f.clamp(max=entry_clip)
    return f.sum(-1).mean()


def trl(h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """TRL's chunked divergence (trl.kernels.chunked_divergence)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    loss, _entropy = ChunkedDivergenceFunction.apply(h_S, W, None, h_T, W, None, beta, temperature)
    return loss.mean()


def liger(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Liger's chunked JSD loss, soft part only (it runs on a CPU; its Triton JSD does not)."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=beta,
        temperature=temperature,
        compiled=False,
    )
    labels = torch.zeros(h_S.shape[0], dtype=torch.long, device=h_S.device)
    return loss(h_S, W, h_T, W, labels)


PEERS: dict[str, Loss] = {"ours": ours, "eager": eager, "trl": trl, "liger": liger}


def methods(device: torch.device) -> dict[str, Loss]:
    """What there is to compare on a device: on a GPU ours has two schedules."""
    return PEERS if device.type == "cpu" else {**PEERS, "ours, 320 MiB": row_workspace}
