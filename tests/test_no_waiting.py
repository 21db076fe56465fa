"""Nothing in a call waits for the host: seen without a GPU, on tensors without contents that say
they are on one. (`test_gpu.py` asks CUDA itself.)"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_outside import fused
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib.allocations import fake_device, tensors
from opsd_kernels import (
    Divergence,
    LMHead,
    checks,
    fused_divergence_loss,
    fused_entropy,
    fused_jsd_loss,
    fused_log_probs,
    fused_top_k_loss,
    token_divergence,
)
from opsd_kernels.heads import vocabulary_parallel

N, V, D = 5, 3000, 64
# The host reads a number of the device, or how many entries there are.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")
# A tensor made of Python's numbers lies on the host, wherever it goes next.
FROM_THE_HOST = "lift_fresh"


class Waiting(TorchDispatchMode):
    """Collects the operations for which host and device wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        by_mask = name.startswith("index") and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1:])
        )
        if name in (*READS, FROM_THE_HOST) or by_mask:
            self.seen.append(name)
        return out


def everything(h_S: Tensor, h_T: Tensor, W: Any, **options: Any) -> Tensor:
    return token_divergence(h_S, h_T, W, targets=ids(), entry_clip=0.05, **options).loss.sum()


def family(h_S: Tensor, h_T: Tensor, W: Any, **options: Any) -> Tensor:
    divergence = Divergence(0.3, forward=torch.empty(N), reverse=0.5)
    policy = {"targets": ids(), "advantages": torch.empty(N)}
    return fused_divergence_loss(h_S, h_T, W, divergence, **policy, **options)


def alone(h_S: Tensor, h_T: Tensor, W: Any, **options: Any) -> Tensor:
    of_tokens = fused_log_probs(h_S, W, ids(), **options) + fused_entropy(h_S, W, **options)
    return of_tokens.sum()


def weighed(h_S: Tensor, h_T: Tensor, W: Any, **options: Any) -> Tensor:
    return fused_jsd_loss(h_S, h_T, W, token_weights=torch.empty(N), **options)


def each_beta(h_S: Tensor, h_T: Tensor, W: Any, **options: Any) -> Tensor:
    return fused_jsd_loss(h_S, h_T, W, beta=torch.empty(N), **options)


def outside(h_S: Tensor, h_T: Tensor, W: Any, **options: Any) -> Tensor:
    of_tokens = torch.empty(N, 3, dtype=torch.int32)
    z, L_r, _ = fused(h_S, W, of_tokens, entropy=True, **options)
    alone, _, _ = fused(h_S, W, of_tokens, rest=False, **options)
    return z.sum() + L_r.sum() + alone.sum()


def sparse(h_S: Tensor, h_T: Tensor, W: Any, **options: Any) -> Tensor:
    several, log_q = torch.empty(N, 5, dtype=torch.int64), torch.empty(N, 5)
    told = fused_log_probs(h_S, W, several, rest=True, **options)
    total = told.log_probs.sum() + told.log_rest.sum()
    for outside in ("bucket", "renormalize", "ignore"):
        more = {"outside": outside, "targets": ids(), "return_statistics": True}
        total = total + fused_top_k_loss(h_S, W, several, log_q, **more, **options).loss
    return total


def ids() -> Tensor:
    return torch.empty(N, dtype=torch.int64)


def waits(call: Callable[..., Tensor], workspace_mib: float, trained: bool, group: Any) -> Any:
    """What forward and backward wait for."""
    with fake_device("cuda"):
        h_S = torch.empty(N, D, dtype=torch.bfloat16, requires_grad=True)
        h_T, W = torch.empty_like(h_S), torch.empty(V, D, dtype=h_S.dtype, requires_grad=trained)
        head = LMHead(W, torch.empty(V, dtype=h_S.dtype), softcap=30.0, group=group)
        with Waiting() as waiting:
            call(h_S, h_T, head, workspace_mib=workspace_mib).backward()
    return waiting.seen


CALLS = [fused_jsd_loss, everything, family, alone, weighed, each_beta, outside, sparse]


@pytest.mark.parametrize("workspace_mib", [0, 64])
@pytest.mark.parametrize("call", CALLS)
def test_one_process(call, workspace_mib):
    for trained in (False, True):
        assert waits(call, workspace_mib, trained, None) == []


@pytest.mark.parametrize(
    ("call", "workspace_mib"),
    # A β of each token is read where step 2 is PyTorch's.
    [(call, mib) for call in CALLS for mib in (0, 64) if not (call is each_beta and mib)],
)
def test_processes_that_share_a_vocabulary(call, workspace_mib, monkeypatch):
    """In the row workspace they agree on the rows of a chunk, for which the host waits; for nothing
    else."""
    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    monkeypatch.setattr(checks, "check_group", lambda name, group: group and "group")
    monkeypatch.setattr(vocabulary_parallel, "_find", lambda name: group)
    monkeypatch.setattr(vocabulary_parallel, "_all_gather", lambda *_, **__: None)
    done = SimpleNamespace(wait=lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: done)
    for trained in (False, True):
        agreed = {"_local_scalar_dense"} if workspace_mib else set()
        assert set(waits(call, workspace_mib, trained, group)) == agreed


def test_what_waits_is_seen():
    with fake_device("cuda"):
        h = torch.empty(3, 2)
        for wait in (
            lambda: torch.tensor([3, 2], device=h.device),
            lambda: h.new_tensor(3),
            lambda: h.sum().item(),
            lambda: bool((h == 0).any()),
        ):
            with Waiting() as waiting:
                wait()
            assert waiting.seen, wait
        with Waiting() as waiting:
            h.new_full((2,), 3)[1:].fill_(2)
        assert not waiting.seen
