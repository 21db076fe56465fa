"""A head that FSDP2 has sharded, with real processes: what the messages say to do is right."""

import pytest
import torch
import torch.distributed as dist
from inputs import random_inputs
from ranks import on_ranks
from torch import Tensor

from opsd_kernels import LMHead, fused_jsd_loss, reference_jsd_loss

PROCESSES = 2


def on_rank(rank: int) -> list[Tensor]:
    """Gradients, where each rank has some of the tokens, and some rows of the head."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Partial

    dist.init_process_group("gloo")
    h_S, h_T, W = random_inputs(8, 41, 16)
    head = torch.nn.Linear(16, 41, bias=False)
    head.weight.data.copy_(W)
    fully_shard(head, mesh=dist.init_device_mesh("cpu", (PROCESSES,)))
    weight, mine = head.weight, (slice(0, 3), slice(3, 8))[rank]
    with pytest.raises(TypeError, match=r"W\.weight is a DTensor.*grad_placements=\[Partial\(\)\]"):
        fused_jsd_loss(h_S, h_T, LMHead(weight))

    def gradients(given: Tensor) -> list[Tensor]:
        h = h_S[mine].clone().requires_grad_()
        (fused_jsd_loss(h, h_T[mine], given, reduction="sum") / 8).backward()
        return [h.grad]

    saved = gradients(weight.full_tensor().detach())
    for placements in ([Partial()], None):
        gradients(weight.full_tensor(grad_placements=placements))
        saved.append(weight.grad.full_tensor())
        weight.grad = None
    return saved


def test_a_sharded_head(tmp_path):
    ranks = on_ranks(on_rank, PROCESSES, tmp_path)
    h_S, h_T, W = (t.double() for t in random_inputs(8, 41, 16))
    h_S.requires_grad_()
    W.requires_grad_()
    reference_jsd_loss(h_S, h_T, W).backward()
    frozen = torch.cat([of_rank[0] for of_rank in ranks])
    torch.testing.assert_close(frozen.double(), h_S.grad, rtol=1e-4, atol=1e-8)
    for of_rank in ranks:
        torch.testing.assert_close(of_rank[1].double(), W.grad, rtol=1e-4, atol=1e-8)
        # Without placements each rank's own tokens alone would count, for its own rows.
        assert (of_rank[2].double() - W.grad).norm() > 0.1 * W.grad.norm()
