"""The mean over the tokens of a group, where each process holds some of a sequence's tokens.

    torchrun --nproc-per-node 2 examples/sequence_parallel.py

Sequence, context and data parallelism need nothing of the loss but the right mean:

    L = Σ_ranks Σ w ℓ / Σ_ranks Σ w

Each process computes its own Σ w ℓ (`reduction="sum"`), and divides by Σ w of all. A mean of means
would weigh a token by the company it keeps: that of a rank with few tokens counts for more.

Gradients of parameters that every process holds must be *summed* over the group. Where they are
averaged (DistributedDataParallel, FSDP), multiply the loss by the number of processes.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels import fused_jsd_loss


def mean_over_group(h_S: Tensor, h_T: Tensor, W: Tensor, w: Tensor, *, averaged: bool) -> Tensor:
    """This process's part of L: the parts of all add up to it.

    Args:
        h_S, h_T: [n, D] of this process's tokens; n may be 0.
        W: [V, D] the head, whole.
        w: [n] weights of the tokens.
        averaged: whether gradients are averaged over the group afterwards, not summed.
    """
    total = w.sum()
    dist.all_reduce(total)
    part = fused_jsd_loss(h_S, h_T, W, token_weights=w, reduction="sum")
    return part / total.clamp(min=1e-30) * (dist.get_world_size() if averaged else 1)


def main() -> None:
    if not dist.is_torchelastic_launched():
        sys.exit("run it as torchrun --nproc-per-node 2 examples/sequence_parallel.py")
    use_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if use_gpu else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    N, D, V = 12, 16, 200
    x, x_T = torch.randn(2, N, D, generator=generator).to(device)
    W = torch.randn(V, D, generator=generator).to(device)
    w = torch.arange(1.0, N + 1, device=device) % 4
    A = torch.eye(D, device=device, requires_grad=True)  # a parameter that all processes hold

    # Ragged on purpose: each takes twice as many as the one before; of more than three, some none.
    bounds = [min(2**r - 1, N) for r in range(size)] + [N]
    mine = slice(bounds[rank], bounds[rank + 1])
    loss = mean_over_group(x[mine] @ A, x_T[mine], W, w[mine], averaged=False)
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    dA = A.grad
    assert dA is not None
    dist.all_reduce(dA)

    B = torch.eye(D, device=device, requires_grad=True)
    whole = fused_jsd_loss(x @ B, x_T, W, token_weights=w)
    (dB,) = torch.autograd.grad(whole, B)
    if rank == 0:
        apart = float((dA - dB).norm() / dB.norm())
        print(f"loss of the group {float(loss):.6f}, of one process {whole.item():.6f}")
        print(f"gradients differ by {apart:.1e} of their size")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
