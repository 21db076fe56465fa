"""Logits of given entries and the log-sum-exp of all others, against float64: values and gradients
in every schedule, with the head frozen and trained."""

from typing import Any
from unittest import mock

import pytest
import torch
from heads import Extras, logits
from inputs import random_inputs
from test_trained_head import WAYS
from torch import Tensor
from torch.utils._pytree import tree_map_only

from opsd_kernels import LMHead
from opsd_kernels.checks import check_arguments, check_workspace
from opsd_kernels.divergence import Family
from opsd_kernels.rest import logits_and_rest
from opsd_kernels.schedules import planning

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# There are no weights that are known beforehand.
WAYS = {name: way for name, way in WAYS.items() if name != "rows, forward"}


def fused(
    h: Tensor,
    head: LMHead,
    ids: Tensor,
    temperature: float = 1.0,
    *,
    workspace_mib: float | None,
    rest: bool = True,
    entropy: bool = False,
    token_weights: Tensor | None = None,
) -> list[Tensor]:
    """z, L_r and the entropy, those that are wanted."""
    arguments = check_arguments(
        {"h": h}, head, Family.LOG_SUM, temperature=temperature, token_weights=token_weights
    )
    workspace_bytes = check_workspace(workspace_mib, h.device)
    found = logits_and_rest(arguments, ids, rest, entropy, workspace_bytes)
    return [t for t in found if t is not None]


def exact(
    h: Tensor, head: LMHead, ids: Tensor, temperature: float = 1.0, **options: Any
) -> list[Tensor]:
    """The same from whole logits."""
    z = logits(h, head, temperature)
    present = (ids >= 0) & (ids < z.shape[1])
    column = ids.masked_fill(~present, 0).long()
    excluded = torch.zeros(z.shape).scatter_add_(1, column, present.float()) > 0
    others = z.masked_fill(excluded, -torch.inf)
    found = [z.gather(1, column).masked_fill(~present, -torch.inf)]
    if options.get("rest", True):
        found.append(others.logsumexp(1))
    if options.get("entropy"):
        found.append(torch.distributions.Categorical(logits=others.detach()).entropy())
    return found


def gradients(
    function: Any, h: Tensor, head: LMHead, *rest: Any, trained: bool = False, **options: Any
) -> list[Tensor]:
    """The values, and the gradients of a sum that weighs z and L_r."""
    h = h.detach().clone().requires_grad_()
    head = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(trained), head)
    found = function(h, head, *rest, **options)
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros((), device=h.device)
    for t in found[:2]:
        upstream = torch.randn(t.shape, generator=generator).to(t)
        total = total + (torch.where(t.isinf(), 0, t) * upstream).sum()
    total.backward()
    leaves = [h, head.weight, head.bias] if trained else [h]
    return [t.detach() for t in found] + [t.grad for t in leaves if t is not None]


def by(way: str, *args: Any, **options: Any) -> list[Tensor]:
    op, workspace_mib, with_rows = WAYS[way]
    args, options = tree_map_only(Tensor, lambda t: t.to(op.device), (args, options))
    # On a CPU `rows` is interpreted.
    uses = with_rows or op.device.type == "cuda"
    with mock.patch.object(planning, "uses_rows_kernel", return_value=uses):
        found = gradients(fused, *args, workspace_mib=workspace_mib, **options)
    return [t.cpu() for t in found]


def check(way: str, h: Tensor, head: LMHead, *rest: Any, **options: Any) -> list[Tensor]:
    """The results, each as near to the exact ones as its dtype lets it be."""
    found = by(way, h, head, *rest, **options)
    double = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, (h, head))
    true = gradients(exact, *double, *rest, **options)
    for got, expected in zip(found, true, strict=True):
        here = expected.isfinite()
        assert torch.equal(got.isfinite(), here)
        got, expected = got[here].double(), expected[here]
        # Gradients are rounded to their dtype, and tiles before.
        bound = 1e-6 if got is found[0] else 3e-6
        if found[-1].dtype != torch.float32 and expected.shape:
            bound += 1.5 * torch.finfo(found[-1].dtype).eps / 2
        assert (got - expected).norm() <= bound * expected.norm() + 1e-9
    return found


def some_ids(N: int, K: int, V: int, seed: int = 0) -> Tensor:
    """Ids in any order, some of which repeat, and some of which are absent."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (N, K), generator=generator, dtype=torch.int32)
    ids[:, K // 2] = ids[:, 0]
    ids[::3, K // 3] = -1
    ids[1::3, K - 1] = V + 7
    return ids


HEADS = {
    "matrix": Extras(),
    "all": Extras("random", softcap=5.0, scale=0.5, padding=3),
    "bans": Extras("with bans", scale=2.0),
}
READY = [way for way in WAYS if way.startswith("PyTorch")]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("way", READY)
def test_every_way(way, extras, dtype, trained):
    h, _, W = random_inputs(40, 300, 16, dtype, size=2.0)
    head, _ = extras.heads(W, None, 0)
    check(way, h, head, some_ids(40, 6, 300), 0.7, trained=trained)
