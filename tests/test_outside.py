"""Logits of given entries and the log-sum-exp of all others, against float64: values and gradients
in every schedule, with the head frozen and trained; and what they cost."""

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from heads import Extras, logits
from inputs import random_inputs
from marks import slow
from schedules import DEVICE, ROW_WORKSPACE, SCHEDULES
from test_trained_head import WAYS, interpreted
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.allocations import Allocations, fake_device
from benchmarks.lib.measure import counted_dots
from opsd_kernels import LMHead
from opsd_kernels.checks import check_arguments, check_workspace
from opsd_kernels.divergence import Family
from opsd_kernels.rest import logits_and_rest
from opsd_kernels.schedules import planning
from opsd_kernels.schedules.excluded import sums_of_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# There are no weights that are known beforehand.
WAYS = {name: way for name, way in WAYS.items() if name != "rows, forward"}
HEADS = {
    "matrix": Extras(),
    "bias, softcap, scale, padding": Extras("random", softcap=5.0, scale=0.5, padding=3),
    "bans": Extras("with bans", scale=2.0),
}


class Found(NamedTuple):
    """What a call gives, and the gradients of Σ a z + Σ b L_r with some weights a, b."""

    z: Tensor
    rest: Tensor | None
    entropy: Tensor | None
    gradients: list[Tensor]  # of h, weight and bias, those that there are


def fused(
    h: Tensor,
    head: LMHead,
    ids: Tensor,
    temperature: float = 1.0,
    *,
    workspace_mib: float | None = None,
    rest: bool = True,
    entropy: bool = False,
    token_weights: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    arguments = check_arguments(
        {"h": h}, head, Family.LOG_SUM, temperature=temperature, token_weights=token_weights
    )
    return logits_and_rest(arguments, ids, rest, entropy, check_workspace(workspace_mib, h.device))


def exact(
    h: Tensor, head: LMHead, ids: Tensor, temperature: float = 1.0, **options: Any
) -> tuple[Tensor | None, ...]:
    """The same from whole logits."""
    z = logits(h, head, temperature)
    present = (ids >= 0) & (ids < z.shape[1])
    column = ids.masked_fill(~present, 0).long()
    excluded = torch.zeros(z.shape).scatter_add_(1, column, present.float()) > 0
    others = z.masked_fill(excluded, -torch.inf)
    L_r = entropy = None
    if options.get("rest", True):
        L_r = others.logsumexp(1)
    if options.get("entropy"):
        log_p = (others.detach() - L_r.detach()[:, None]).nan_to_num(nan=0.0, neginf=0.0)
        entropy = -(others.detach().softmax(1).nan_to_num(0.0) * log_p).sum(1)
    return z.gather(1, column).masked_fill(~present, -torch.inf), L_r, entropy


def weighed(function: Any, h: Tensor, head: LMHead, *rest: Any, trained: bool, **options: Any):
    h = h.detach().clone().requires_grad_()
    head = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(trained), head)
    values = function(h, head, *rest, **options)
    generator = torch.Generator().manual_seed(0)
    upstream = [torch.randn(t.shape, generator=generator) for t in values if t is not None]
    some = [t for t in values[:2] if t is not None]
    sums = [
        (t.masked_fill(t.isinf(), 0) * w.to(t)).sum() for t, w in zip(some, upstream, strict=False)
    ]
    sum(sums).backward()
    leaves = [h, head.weight, head.bias] if trained else [h]
    values = [None if t is None else t.detach() for t in values]
    return Found(*values, [t.grad for t in leaves if t is not None])


def by(way: str, *args: Any, **options: Any) -> Found:
    op, workspace_mib, with_rows = WAYS[way]
    args, options = tree_map_only(Tensor, lambda t: t.to(op.device), (args, options))
    # On a CPU `rows` is interpreted.
    uses = with_rows or op.device.type == "cuda"
    options.setdefault("trained", False)
    with mock.patch.object(planning, "uses_rows_kernel", return_value=uses):
        found = weighed(fused, *args, workspace_mib=workspace_mib, **options)
    return tree_map_only(Tensor, Tensor.cpu, found)


def true(h: Tensor, head: LMHead, *rest: Any, **options: Any) -> Found:
    options.pop("token_weights", None)
    options.setdefault("trained", False)
    double = tree_map_only(Tensor, Tensor.double, (h, head))
    return weighed(exact, *double, *rest, **options)


def near(found: Found, expected: Found, bound: float = 1e-6) -> None:
    """Values to fp32, gradients to the rounding of their dtype as well, and of tiles."""
    for got, value in zip(found[:3], expected[:3], strict=True):
        assert (got is None) == (value is None)
        if got is not None:
            here = value.isfinite()
            assert torch.equal(got[~here].double(), value[~here])
            assert (got[here] - value[here]).norm() <= bound * value[here].norm()
    for got, value in zip(found.gradients, expected.gradients, strict=True):
        rounding = 0 if got.dtype == torch.float32 else 1.5 * torch.finfo(got.dtype).eps / 4
        assert (got - value).norm() <= (3 * bound + rounding) * value.norm()


def some_ids(N: int, K: int, V: int, seed: int = 0) -> Tensor:
    """Ids in any order. Some repeat, and some are absent."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(V, (N, K), generator=generator, dtype=torch.int32)
    ids[:, K // 2] = ids[:, 0]
    ids[::3, K // 3] = -1
    ids[1::3, K - 1] = V + 7
    return ids


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    ("extras", "dtype"),
    [
        *zip(HEADS.values(), DTYPES, strict=True),
        *(slow(e, d) for e in HEADS.values() for d in DTYPES),
    ],
    ids=lambda x: None,
)
@pytest.mark.parametrize("way", WAYS)
def test_against_float64(way, extras, dtype, trained):
    h, _, W = random_inputs(12, 300, 16, dtype, size=2.0)
    head, _ = extras.heads(W, None, 0)
    args, options = (h, head, some_ids(12, 6, 300), 0.7), {"entropy": True, "trained": trained}
    near(by(way, *args, **options), true(*args, **options))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", ["logit-free", "PyTorch, backward"])
def test_without_the_rest(way, trained):
    """K rows of the head are multiplied, and nothing else."""
    h, _, W = random_inputs(12, 300, 16, torch.bfloat16)
    head, _ = HEADS["bias, softcap, scale, padding"].heads(W, None, 0)
    args, options = (h, head, some_ids(12, 6, 300), 0.7), {"rest": False, "trained": trained}
    with FlopCounterMode(display=False) as library:
        found = by(way, *args, **options)
    near(found, true(*args, **options))
    if DEVICE.type == "cpu":
        assert library.get_total_flops() == 2 * 2 * 12 * 6 * 16  # in forward and in backward


@pytest.mark.parametrize("way", WAYS)
def test_a_rest_of_almost_nothing(way):
    """From 1e-5 down to 1e-30: as exact as any other, where 1 − Σ p is noise."""
    V, K = 60, 4
    z = torch.full((26, V), 0.0)
    z[:, K:] = torch.linspace(-1, 1, V - K) - torch.linspace(15, 72, 26)[:, None]
    ids = torch.arange(K, dtype=torch.int32).expand(26, K).contiguous()
    found = by(way, z, LMHead(torch.eye(V)), ids)
    expected = true(z, LMHead(torch.eye(V)), ids)

    def rest_of(found: Found) -> Tensor:
        return torch.cat([found.z, found.rest[:, None]], 1).log_softmax(1)

    p_r, exact_p_r = rest_of(found)[:, K].exp().double(), rest_of(expected)[:, K].exp()
    assert exact_p_r.max() < 1e-5
    # Of log p_r itself the last bit is 2e-6 from −16 on, and 8e-6 from −64 on.
    error = (p_r / exact_p_r - 1).abs()
    assert (error <= 2e-6).where(exact_p_r > 1e-13, error <= 8e-6).all()
    subtracted = 1 - rest_of(found)[:, :K].exp().sum(1)
    assert ((subtracted / exact_p_r - 1).abs() > 0.01).float().mean() > 0.9
    near(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_of_little_is_not_little(way, dtype):
    """B does not underflow, however small the rest: in fp16 p_r itself would."""
    z = torch.zeros(6, 40)
    z[:, 0] = torch.linspace(20, 40, 6)
    h, W = z.to(dtype), torch.eye(40, dtype=dtype)
    ids = torch.zeros(6, 1, dtype=torch.int32)
    found, expected = by(way, h, LMHead(W), ids), true(h, LMHead(W), ids)
    assert expected.gradients[0][:, 1:].abs().max() > 1e-2
    near(found, expected)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_all_excluded_and_nothing_excluded(way, trained):
    h, _, W = random_inputs(6, 5, 8)
    ids = torch.arange(5, dtype=torch.int32).repeat(6, 2)
    ids[3:] = -1
    found = by(way, h, LMHead(W), ids, trained=trained, entropy=True)
    assert (found.rest[:3] == -torch.inf).all()
    assert (found.entropy[:3] == 0).all()
    assert (found.z[3:] == -torch.inf).all()
    expected = true(h, LMHead(W), ids, trained=trained, entropy=True)
    near(found, expected)
    log_sum = logits(h, LMHead(W)).logsumexp(1)
    torch.testing.assert_close(found.rest[3:].double(), log_sum[3:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["logit-free", "PyTorch, backward"])
def test_many_ids(way):
    """512 of 700, in more than one tile of columns and with a ragged end; and one."""
    h, _, W = random_inputs(2, 700, 8, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(700, generator=generator) for _ in range(2)]).int()
    for K, trained in ((512, True), (1, False)):
        args = (h, LMHead(W), order[:, :K].contiguous())
        near(by(way, *args, trained=trained), true(*args, trained=trained))


def test_sums_of_equal_ids():
    ids = torch.tensor([[3, 1, 3, -1, 3, 1, -1], [0, 1, 2, 3, 4, 5, 6]])
    values = torch.tensor([[1.0, 2, 4, 8, 16, 32, 64], [1, 2, 3, 4, 5, 6, 7]])
    found = sums_of_equal(values, ids)
    assert found.tolist() == [[21, 34, 0, 72, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("way", WAYS)
def test_of_a_trained_head_the_logits_alone(way):
    """Where nothing flows into L_r the gradient of h is c W[id], rounded once, not in a tile."""
    h, _, W = random_inputs(20, 300, 16, torch.bfloat16)
    ids = torch.arange(20, dtype=torch.int32)[:, None] * 13

    def logits_alone(function: Any) -> Any:
        return lambda *args, **options: (function(*args, **options)[0], None, None)

    with mock.patch(f"{__name__}.fused", logits_alone(fused)):
        found = by(way, h, LMHead(W), ids, trained=True)
    with mock.patch(f"{__name__}.exact", logits_alone(exact)):
        expected = true(h, LMHead(W), ids, trained=True)
    near(found, expected)
    dh = expected.gradients[0]
    rounding = (dh.bfloat16() - dh).norm()
    assert (found.gradients[0] - dh).norm() <= 1.02 * rounding


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_does_not_count(way, trained):
    """Of a token that is dropped nothing is looked at, its ids neither."""
    h, _, W = random_inputs(10, 300, 16)
    keep, ids = torch.arange(10) % 3 != 0, some_ids(10, 5, 300)
    expected = by(way, h, LMHead(W), ids, trained=trained, token_weights=keep)
    h[~keep], ids[~keep] = torch.nan, torch.tensor([2**31 - 1, -(2**31), 7, 7, 300]).int()
    found = by(way, h, LMHead(W), ids, trained=trained, token_weights=keep)
    torch.testing.assert_close(found.z[keep], expected.z[keep])
    torch.testing.assert_close(found.rest[keep], expected.rest[keep])
    assert (found.gradients[0][~keep] == 0).all()
    torch.testing.assert_close(found.gradients[0][keep], expected.gradients[0][keep])
    if trained:
        torch.testing.assert_close(found.gradients[1], expected.gradients[1])
    empty = by(way, h[:0], LMHead(W), ids[:0], trained=trained)
    assert empty.z.shape == (0, 5)
    assert all((t == 0).all() for t in empty.gradients)


@pytest.mark.parametrize("way", WAYS)
def test_nan_stays_in_its_row(way):
    h, _, W = random_inputs(6, 300, 16)
    h[2, 3] = torch.nan
    found = by(way, h, LMHead(W), some_ids(6, 5, 300))
    for t in (found.z, found.rest, found.gradients[0]):
        assert t.reshape(6, -1).isnan().any(1).nonzero().tolist() == [[2]]


@pytest.mark.parametrize("rest", [False, True])
def test_a_second_backward_and_a_head_that_changed(rest):
    h, _, W = random_inputs(6, 300, 16)
    h.requires_grad_()
    z, L_r, _ = fused(h, LMHead(W), some_ids(6, 5, 300), rest=rest)
    total = z[z > -torch.inf].sum() + (L_r.sum() if rest else 0)
    (once,) = torch.autograd.grad(total, h, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * total, h, retain_graph=True)
    torch.testing.assert_close(twice, 2 * once)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(total, h, create_graph=True, retain_graph=True)
    W.mul_(2)  # its K rows are read once more
    with pytest.raises(RuntimeError, match="changed in place"):
        total.backward()


@pytest.mark.parametrize(
    ("op", "trained", "rest"),
    [
        (ROW_WORKSPACE, True, True),
        *(slow(op, trained, rest) for op in SCHEDULES for trained in (0, 1) for rest in (0, 1)),
    ],
    ids=str,
)
def test_one_graph(op, trained, rest):
    """Whatever the number of tokens, which is a symbol."""
    torch._dynamo.reset()
    h, _, W = (t.to(op.device) for t in random_inputs(12, 300, 16))
    ids = some_ids(12, 5, 290).to(op.device)

    def loss(h: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        head = LMHead(weight, None, 5.0, 0.5, 290)
        options = {"workspace_mib": op.workspace_mib, "rest": bool(rest), "entropy": bool(rest)}
        values = fused(2 * h, head, ids, **options)
        return sum(t.exp().sum() for t in values if t is not None)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (12, 8):
        results = []
        for call in (loss, compiled):
            leaves = h[:N].clone().requires_grad_(), W.clone().requires_grad_(bool(trained))
            value = call(*leaves, ids[:N])
            value.backward()
            results.append([value.detach(), *(t.grad for t in leaves if t.requires_grad)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


# --- what it costs


@interpreted
def test_passes():
    """Logit-free 3 U, in the row workspace 2 U, without gradient 1 U; of a trained head 4; and K
    rows of the head for each token."""
    N, V, D, K = 32, 512, 64, 4
    h, _, W = random_inputs(N, V, D)
    ids = some_ids(N, K, V)
    U, rows = 2 * N * D * V, 2 * N * D * K
    ways = {"logit-free": (3, 4), "PyTorch, backward": (2, 4)}
    for way, costs in ways.items():
        for trained, cost in zip((False, True), costs, strict=True):
            with counted_dots() as dots, FlopCounterMode(display=False) as library:
                by(way, h, LMHead(W), ids, trained=trained)
            gathered = rows * (1 if trained else 2)
            assert 2 * sum(dots) + library.get_total_flops() == cost * U + gathered
        with counted_dots() as dots, FlopCounterMode(display=False) as library, torch.no_grad():
            fused(h, LMHead(W), ids, workspace_mib=WAYS[way][1])
        assert 2 * sum(dots) + library.get_total_flops() == U + rows


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("workspace_mib", [0, 320])
def test_nothing_of_the_size_of_logits_is_allocated(workspace_mib, trained):
    """At the size of a language model: scratch of a bounded size beside what is returned and, in
    fp32, the gradient of h; no [N, V], and no row of the head for each id."""
    N, V, D, K = 1100, 40000, 1024, 64
    with fake_device("cuda"):
        h = torch.empty(N, D, dtype=torch.bfloat16, requires_grad=True)
        W = torch.empty(V, D, dtype=h.dtype, requires_grad=trained)
        ids = torch.empty(N, K, dtype=torch.int32)
        with Allocations() as seen:
            z, L_r, _ = fused(h, LMHead(W), ids, workspace_mib=workspace_mib)
            (z.sum() + L_r.sum()).backward()
    of_ids = 20 * 4 * N * K
    returned = 2 * N * D + 2 * V * D * trained
    fp32 = 4 * N * D + 4 * 1024 * D
    scratch = max(workspace_mib, 64) * 2**20
    assert seen.peak < returned + fp32 + scratch + of_ids
    assert not any(N in shape and V in shape for shape in seen.shapes)
    assert not any(shape.numel() >= N * K * D for shape in seen.shapes if V not in shape)


# --- processes that share a vocabulary, called from test_vocabulary_parallel.py


def of_shards(rank: int) -> list[Found]:
    """What one of two processes finds, the second with an empty shard too."""
    found = []
    for way, cut, trained in CUTS:
        h, head, ids = shared_inputs()
        own = slice(0, cut) if rank == 0 else slice(cut, None)
        V = head.weight[own].shape[0]
        bias = head.bias[own]
        if V == 0:  # a shard of padding alone
            own, bias = slice(0, 4), head.bias[:4]
        shard = LMHead(head.weight[own], bias, head.softcap, head.scale, V, dist.group.WORLD)
        found.append(by(way, h, shard, ids, 0.7, trained=trained, entropy=True))
    return found


CUTS = [
    (way, cut, trained)
    for way in ("logit-free", "PyTorch, backward")
    for cut, trained in ((11, True), (37, False), (20, False))
]


def shared_inputs() -> tuple[Tensor, LMHead, Tensor]:
    h, _, W = random_inputs(7, 37, 8)
    head = LMHead(W, torch.linspace(-1, 1, 37), 5.0, 0.5)
    ids = some_ids(7, 5, 37)
    ids[0], ids[1] = torch.arange(5) + 9, -1
    return h, head, ids


def check_shards(of_ranks: list[list[Found]]) -> None:
    h, head, ids = shared_inputs()
    for i, (_way, _cut, trained) in enumerate(CUTS):
        expected = true(h, head, ids, 0.7, trained=trained, entropy=True)
        found = [of_rank[i] for of_rank in of_ranks]
        if trained:
            gradients = [
                torch.cat(parts) for parts in zip(*(f.gradients[1:] for f in found), strict=True)
            ]
            found = [f._replace(gradients=[f.gradients[0], *gradients]) for f in found]
        for of_rank in found:
            near(of_rank, expected)
