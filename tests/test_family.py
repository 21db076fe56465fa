"""Any divergence of the family, with weights of its halves and a policy term, and the entropy:
against the formulas and the oracle, in every schedule, with the head frozen and trained; and what
they cost."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
from heads import EXTRAS, as_head, logits
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import clip_is_clear, language_like_inputs, random_inputs
from test_trained_head import WAYS, close, interpreted
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.allocations import Allocations
from benchmarks.lib.measure import counted_dots
from opsd_kernels import (
    Divergence,
    LMHead,
    divergence_name,
    fused_divergence_loss,
    fused_entropy,
    fused_jsd_loss,
    fused_sampled_token_loss,
    reference_divergence_loss,
    reference_entropy,
    reference_token_divergence,
    token_divergence,
)
from opsd_kernels.schedules import planning

MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by(way: str, function: Any, *args: Any, trained: bool = False, **options: Any) -> list[Tensor]:
    """Values, and gradients of their weighed sum, of what is computed by a way of `WAYS`."""
    op, workspace_mib, with_rows = WAYS[way]
    args, options = tree_map_only(Tensor, lambda t: t.to(op.device), (args, options))
    uses = with_rows or op.device.type == "cuda"
    with mock.patch.object(planning, "uses_rows_kernel", return_value=uses):
        return gradients(function, *args, trained=trained, workspace_mib=workspace_mib, **options)


def gradients(function: Any, h_S: Tensor, head: Any, *rest: Any, trained: bool = False,
              upstream: Tensor | None = None, **options: Any) -> list[Tensor]:  # fmt: skip
    """`function` of h_S, and of h_T if that is the first of the rest."""
    h = h_S.detach().clone().requires_grad_()
    leaf = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(trained), head)
    value = function(h, *rest[:1], leaf, *rest[1:], **options)
    weights = torch.linspace(-1, 2, value.numel()) if upstream is None else upstream
    value.backward(weights.to(value).reshape(value.shape))
    found = [value.detach(), h.grad]
    if trained:
        found += [leaf.weight.grad] + ([] if leaf.bias is None else [leaf.bias.grad])
    return [t.cpu() for t in found]


def exact(function: Any, *args: Any, **options: Any) -> list[Tensor]:
    args, options = tree_map_only(
        Tensor, lambda t: t.double() if t.is_floating_point() else t, (args, options)
    )
    return gradients(function, *args, **options)


def textbook(
    h_S: Tensor,
    h_T: Tensor,
    head: LMHead,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """The formulas as `fused_divergence_loss` states them."""
    there = torch.ones(len(head.weight), dtype=torch.bool)
    if head.bias is not None:
        there = head.bias > -torch.inf
    log_p, log_q = (logits(h, head, temperature)[:, there].log_softmax(-1) for h in (h_S, h_T))
    beta, weights = divergence.beta, divergence.weights
    weights = (beta, 1 - beta) if weights is None else weights
    w_q, w_p = (w[:, None].double() if isinstance(w, Tensor) else w for w in weights)
    log_m = [log_p, log_q]
    if beta is not None:
        log_m = 2 * [torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))]
    f = w_q * log_q.exp() * (log_q - log_m[0]) + w_p * log_p.exp() * (log_p - log_m[1])
    if divergence.entry_clip is not None:
        f = f.clamp(max=divergence.entry_clip)
    loss = f.sum(-1)
    if advantages is not None and targets is not None:
        column = (there.cumsum(0) - 1)[targets]
        loss = loss - advantages * log_p.gather(-1, column[:, None])[:, 0]
    return loss


WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0, 0.5, -0.75, 3.0]), st.just("of tokens"))
DRAWN = {
    "N": st.integers(1, 9),
    "V": st.sampled_from([2, 17, 300]),
    "D": st.sampled_from([1, 8, 33]),
    "dtype": st.sampled_from(DTYPES),
    "beta": st.one_of(st.none(), st.none(), st.floats(0.01, 0.99)),
    "forward": WEIGHTS,
    "reverse": WEIGHTS,
    "entry_clip": st.sampled_from([None, None, 0.05]),
    "policy": st.sampled_from(["none", "random", "likely"]),
    "temperature": st.sampled_from([1.0, 0.5, 1.7]),
    "log_size": st.floats(-2, 1),
    "log_distance": st.floats(-3, 0),
    "extras": EXTRAS,
    "seed": st.integers(0, 2**16),
}


def drawn_inputs(
    *, N, V, D, dtype, beta, forward, reverse, entry_clip, policy, temperature, log_size,
    log_distance, extras, seed,
):  # fmt: skip
    h_S, h_T, W = random_inputs(
        N, V, D, dtype, size=10**log_size, distance=10**log_distance, seed=seed
    )
    head = LMHead(W) if extras is None else extras.heads(W, None, seed)[0]
    g = torch.Generator().manual_seed(seed)
    of_tokens = [torch.randn(N, generator=g) for _ in range(3)]
    weights = [
        of_tokens[i] if w == "of tokens" else w for i, w in enumerate((forward, reverse))
    ]  # fmt: skip
    divergence = Divergence(beta, *weights, entry_clip)
    options: dict[str, Any] = {"temperature": temperature}
    if policy != "none":
        targets = torch.randint(V, (N,), generator=g) // 3 * 3  # none is banned
        if policy == "likely":
            targets = logits(h_S, head).argmax(-1)
        options |= {"targets": targets, "advantages": of_tokens[2]}
    return (h_S, head, h_T, divergence), options


@given(**DRAWN)
@settings(max_examples=100)
def test_oracle_is_the_formula(**drawn):
    args, options = drawn_inputs(**drawn)
    args = (args[0], as_head(args[1]), *args[2:])
    if args[3].entry_clip is not None:
        assume(clip_is_clear(args[0], args[2], args[1], args[1], args[3], options["temperature"]))
    found = exact(reference_divergence_loss, *args, reduction="none", **options)
    true = exact(textbook, *args, **options)
    scale = 1 + float(args[0].double().norm() * args[1].weight.double().norm())
    for got, expected in zip(found, true, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12 * scale)


# --- a few of the family, for what follows


def some(N: int) -> dict[str, Divergence]:
    w = torch.linspace(-1, 2, N)
    return {
        "both KLs": Divergence(forward=0.5, reverse=0.5),
        "both KLs, of tokens": Divergence(forward=w, reverse=1.5 - w),
        "both KLs, clip": Divergence(forward=0.5, reverse=0.5, entry_clip=0.01),
        "skewed": Divergence(beta=0.1, forward=1),
        "skewed, exchanged": Divergence(beta=0.8, forward=0.3, reverse=w),
        "JSD": Divergence(beta=0.5),
    }


SOME = list(some(1))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_trained(way, name, dtype):
    """By each of the ways, with a policy term."""
    N, V = 18, 400
    h_S, h_T, W = random_inputs(N, V, 24, dtype, distance=0.5)
    head = LMHead(W, torch.linspace(-1, 1, V).to(dtype), softcap=4.0)
    targets = logits(h_S, head).argmax(-1)
    targets[::2] = torch.arange(0, 360, 40)
    options = {"targets": targets, "advantages": torch.linspace(-2, 2, N), "temperature": 0.7}
    args = (h_S, head, h_T, some(N)[name])
    reduction = "sum" if "forward" in way else "none"
    options |= {"reduction": reduction, "trained": True}
    found = by(way, fused_divergence_loss, *args, **options)
    assert [t.dtype for t in found[1:]] == [dtype] * 3
    close(found, exact(reference_divergence_loss, *args, **options), dtype, 1e-5)


@pytest.mark.parametrize("way", ["logit-free", "PyTorch, backward", "rows, backward"])
@pytest.mark.parametrize("name", ["both KLs", "skewed"])
def test_a_policy_term_under_a_softcap(way, name):
    """What is of ŷ has the slope of the cap there, whether or not it is the likeliest entry."""
    h_S, h_T, W = random_inputs(8, 300, 16, size=3.0)
    head = LMHead(W, softcap=2.0)
    targets = logits(h_S, head).argmax(-1)
    targets[::2] = torch.arange(4) * 70
    options = {"targets": targets, "advantages": torch.linspace(2, 3, 8), "reduction": "none"}
    args = (h_S, head, h_T, some(8)[name])
    found = by(way, fused_divergence_loss, *args, **options)
    close(found, exact(reference_divergence_loss, *args, **options), torch.float32, 1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*SOME, "skewed, clip"])
def test_statistics_are_those_of_token_divergence(way, name):
    N = 8
    h_S, h_T, W = random_inputs(N, 300, 16, distance=0.5)
    targets, weights = torch.arange(N) * 3, (torch.arange(N) % 3).float()
    known = {"targets": targets, "token_weights": weights}
    told = by_way(way, token_divergence, h_S, h_T, W, entry_clip=0.02, **known)
    clipped = Divergence(beta=0.3, forward=0.5, reverse=1, entry_clip=3e-4)
    divergence = {**some(N), "skewed, clip": clipped}[name]
    options = {**known, "advantages": torch.linspace(-2, 2, N), "divergence": divergence}
    found = by_way(way, token_divergence, h_S, h_T, W, **options)
    oracle = reference_token_divergence(h_S, h_T, W, **options)
    assert (oracle.clipped_share > 0.01).any() == (divergence.entry_clip is not None)
    for field, value in found._asdict().items():
        exact = getattr(oracle, field)
        torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=2e-5)
        if field not in ("loss", "clipped_share"):
            torch.testing.assert_close(value, getattr(told, field), rtol=1e-6, atol=1e-6)
    del options["divergence"]
    loss = by_way(way, fused_divergence_loss, h_S, h_T, W, divergence, **options)
    torch.testing.assert_close(found.loss.sum() / weights.sum(), loss)


def by_way(way: str, function: Any, *args: Any, **options: Any) -> Any:
    op, workspace_mib, with_rows = WAYS[way]
    uses = with_rows or op.device.type == "cuda"
    with mock.patch.object(planning, "uses_rows_kernel", return_value=uses):
        return op.run(function, *args, workspace_mib=workspace_mib, **options)


def test_what_has_other_names(op):
    """A β, the KLs, weights that are a β's own, and the sampled-token objective."""
    h_S, h_T, W = random_inputs(20, 300, 16, distance=0.5)
    one = torch.ones(20)
    same = [
        (Divergence(beta=0.3), {"beta": 0.3}),
        (Divergence(beta=torch.linspace(0, 1, 20)), {"beta": torch.linspace(0, 1, 20)}),
        (Divergence(beta=0.0, entry_clip=0.02), {"beta": 0.0, "entry_clip": 0.02}),
        (Divergence(forward=1, entry_clip=0.02), {"beta": 0.0, "entry_clip": 0.02}),
        (Divergence(reverse=1), {"beta": 1.0}),
        (Divergence(beta=0.3, forward=0.3, reverse=0.7), {"beta": 0.3}),
    ]
    for divergence, options in same:
        found = op.run(fused_divergence_loss, h_S, h_T, W, divergence)
        assert torch.equal(found, op.run(fused_jsd_loss, h_S, h_T, W, **options))
    # By the formulas for weights, to rounding.
    near = [
        (Divergence(beta=0.3, forward=0.3 * one, reverse=0.7 * one), {"beta": 0.3}),
        (Divergence(beta=0.7, forward=0.7 * one, reverse=0.3 * one), {"beta": 0.7}),
        (Divergence(forward=one), {"beta": 0.0}),
        (Divergence(forward=0 * one, reverse=one), {"beta": 1.0}),
        (Divergence(forward=one, entry_clip=0.02), {"beta": 0.0, "entry_clip": 0.02}),
    ]
    for divergence, options in near:
        found = loss_and_grad(op, fused_divergence_loss, h_S, h_T, W, divergence)
        expected = loss_and_grad(op, fused_jsd_loss, h_S, h_T, W, **options)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    targets = torch.arange(20) * 7
    sampled = op.run(fused_sampled_token_loss, h_S, h_T, W, targets, return_log_probs=True)
    advantages = sampled.logp_teacher - sampled.logp_student
    nothing = Divergence(forward=0.0, reverse=0.0)
    found = loss_and_grad(
        op, fused_divergence_loss, h_S, h_T, W, nothing, targets=targets, advantages=advantages
    )
    expected = loss_and_grad(op, fused_sampled_token_loss, h_S, h_T, W, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def loss_and_grad(op: Any, function: Any, h_S: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    h = h_S.detach().clone().requires_grad_()
    loss = op.run(function, h, *args, **options)
    loss.backward()
    assert h.grad is not None
    return [loss.detach(), h.grad]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_where_there_is_no_mass(way, trained):
    """An infinite KL counts if its weight is not 0, and has its sign; so has the policy term. There
    is no gradient then, and no NaN."""
    inf = torch.inf
    h_S, h_T, W = random_inputs(6, 50, 8)
    bias_S, bias_T = torch.zeros(50), torch.zeros(50)
    bias_S[3] = bias_T[4] = -inf
    head, head_T = LMHead(W, bias_S), LMHead(W, bias_T)
    forward = torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0, 0.0])
    reverse = torch.tensor([0.0, 1.0, 0.0, 0.0, -1.0, 0.0])
    targets = torch.tensor([5, 5, 5, 3, 5, 3])
    advantages = torch.tensor([1.0, 1.0, 1.0, 2.0, 1.0, 0.0])
    options = {"targets": targets, "advantages": advantages, "reduction": "none"}
    args = (h_S, head, h_T, Divergence(forward=forward, reverse=reverse))
    found = by(way, fused_divergence_loss, *args, trained=trained, W_teacher=head_T, **options)
    assert found[0].tolist() == [inf, inf, -inf, inf, inf, 0.0]
    assert all((t == 0).all() for t in found[1:])
    skewed = (h_S, head, h_T, Divergence(beta=0.3, forward=forward, reverse=reverse))
    known = {"W_teacher": head_T, "reduction": "none", "trained": trained}
    found = by(way, fused_divergence_loss, *skewed, **known)
    assert all(t.isfinite().all() for t in found)
    close(found, exact(reference_divergence_loss, *skewed, **known), torch.float32, 1e-5)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_what_does_not_count(way, trained):
    N = 8
    h_S, h_T, W = random_inputs(N, 300, 16)
    w = torch.arange(N) % 4 / 2
    keep = w != 0
    forward, advantages = torch.linspace(-1, 1, N), torch.linspace(2, -2, N)
    targets = torch.arange(N) * 7

    def found(beta: float | None, w: Tensor) -> list[Tensor]:
        args = h_S, LMHead(W), h_T, Divergence(beta, forward, 0.5)
        options = {"targets": targets, "advantages": advantages, "token_weights": w}
        return by(way, fused_divergence_loss, *args, trained=trained, reduction="sum", **options)

    expected = [found(beta, w) for beta in (None, 0.8)]
    h_S[~keep] = h_T[~keep] = torch.nan
    forward[~keep], advantages[~keep], targets[~keep] = torch.nan, torch.inf, -100
    for beta, before in zip((None, 0.8), expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(found(beta, w), before, strict=True))
        assert all((t == 0).all() for t in found(beta, torch.zeros(N)))


def test_without_tokens(op):
    h_S, h_T, W = random_inputs(0, 50, 8)
    for divergence in some(0).values():
        loss, grad = loss_and_grad(op, fused_divergence_loss, h_S, h_T, W, divergence)
        assert (loss, grad.shape) == (0, (0, 8))
    assert op.run(fused_entropy, h_S, W).shape == (0,)


def test_one_graph(op):
    """Whatever the number of tokens, which is a symbol."""
    torch._dynamo.reset()
    h_S, h_T, W = (t.to(op.device) for t in random_inputs(30, 300, 16))
    targets, w = torch.arange(30).to(op.device), torch.linspace(-1, 1, 30).to(op.device)

    def loss(h: Tensor, h_T: Tensor, weight: Tensor, w: Tensor, targets: Tensor) -> Tensor:
        head, known = LMHead(weight, None, 5.0, 0.5, 290), {"workspace_mib": op.workspace_mib}
        total = fused_divergence_loss(
            2 * h, h_T, head, Divergence(forward=w, reverse=0.5), targets=targets, advantages=w,
            **known,
        )  # fmt: skip
        skewed = Divergence(beta=0.8, forward=w)
        total = total + fused_divergence_loss(2 * h, h_T, head, skewed, **known)
        return total + fused_entropy(2 * h, head, **known).mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (30, 20):
        results = []
        for call in (loss, compiled):
            leaves = h_S[:N].clone().requires_grad_(), W.clone().requires_grad_()
            value = call(leaves[0], h_T[:N], leaves[1], w[:N], targets[:N])
            value.backward()
            results.append([value.detach(), *(t.grad for t in leaves)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


# --- the entropy


def entropy_of_logits(h: Tensor, head: LMHead, temperature: float = 1.0) -> Tensor:
    log_p = logits(h, head, temperature).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@given(**{k: DRAWN[k] for k in ("N", "V", "D", "temperature", "log_size", "extras", "seed")})
@settings(max_examples=30)
def test_entropy_of_the_oracle_is_the_formula(N, V, D, temperature, log_size, extras, seed):
    h, _, W = (t.double() for t in random_inputs(N, V, D, size=10**log_size, seed=seed))
    head = LMHead(W) if extras is None else as_head(extras.heads(W, None, seed)[0])
    if head.bias is not None:  # banned: as if it were very unlikely
        head = head._replace(bias=head.bias.clamp(min=-200))
    if head.softcap is not None:
        assume((head.bias is None) or (head.bias > -200).all())
    options = {"temperature": temperature, "trained": True}
    found = gradients(reference_entropy, h, head, **options)
    true = gradients(entropy_of_logits, h, head, **options)
    for got, expected in zip(found, true, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "rows, forward"])
def test_entropy_against_oracle(way, dtype, trained):
    """From flat distributions to certain ones."""
    h, _, W = language_like_inputs(40, 500, 24, dtype, 0.0)
    head = LMHead(W, torch.linspace(-1, 1, 500).to(dtype), softcap=60.0)
    options = {"temperature": 0.7, "trained": trained}
    found = by(way, fused_entropy, h, head, **options)
    true = exact(reference_entropy, h, head, **options)
    assert true[0].min() < 1e-3 < 3 < true[0].max()
    assert [t.dtype for t in found] == [torch.float32] + [dtype] * (len(found) - 1)
    close(found, true, dtype, 1e-5)
    assert (found[0] >= 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_entropy_with_bans_weights_and_nan(way):
    h, _, W = random_inputs(12, 50, 8)
    bias = torch.zeros(50)
    bias[::3] = -torch.inf
    w = torch.arange(12) % 3 - 1.0
    expected = exact(reference_entropy, h, LMHead(W, bias), token_weights=w)
    h[w == 0] = torch.nan
    found = by(way, fused_entropy, h, LMHead(W, bias), token_weights=w)
    for got, true in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-6)
    assert (found[0][w == 0] == 0).all()
    bias[:] = -torch.inf
    bias[7] = 0
    certain = by(way, fused_entropy, torch.ones(1, 8), LMHead(W, bias))
    assert all((t == 0).all() for t in certain)


# --- what it costs


COSTS = {
    # Logit-free and in the row workspace, of a frozen head; the same of one that is trained.
    "both KLs": (5, 3, 8, 6),
    "both KLs, of tokens": (5, 3, 8, 6),
    "both KLs, clip": (6, 3, 8, 6),
    "skewed": (6, 3, 8, 6),
    "skewed, exchanged": (6, 3, 8, 6),
    "JSD": (6, 3, 8, 6),
    "entropy": (3, 2, 5, 4),
}


@interpreted
@pytest.mark.parametrize(
    ("name", "policy"),
    [*((name, False) for name in COSTS), *((name, True) for name in COSTS if name != "entropy")],
)
def test_passes(name, policy):
    """A policy term takes no product more; values alone two passes, of the entropy one."""
    N, V, D = 32, 1024, 64
    h_S, h_T, W = random_inputs(N, V, D)
    U = 2 * N * D * V
    options: dict[str, Any] = {}
    if name == "entropy":
        function, args = fused_entropy, (h_S, LMHead(W))
    else:
        function, args = fused_divergence_loss, (h_S, LMHead(W), h_T, some(N)[name])
        options["reduction"] = "none"
        if policy:
            options |= {"targets": torch.arange(N), "advantages": torch.linspace(-1, 1, N)}
    costs = COSTS[name]
    for trained in (False, True):
        for i, way in enumerate(("logit-free", "PyTorch, backward")):
            with counted_dots() as dots, FlopCounterMode(display=False) as library:
                by(way, function, *args, trained=trained, **options)
            assert 2 * sum(dots) + library.get_total_flops() == costs[2 * trained + i] * U
    for way, least in (("logit-free", 4), ("PyTorch, backward", 2)):
        head, rest = args[1], args[2:]
        with counted_dots() as dots, FlopCounterMode(display=False) as library, torch.no_grad():
            function(h_S, *rest[:1], head, *rest[1:], workspace_mib=WAYS[way][1], **options)
        least = 1 if name == "entropy" else least
        assert 2 * sum(dots) + library.get_total_flops() == least * U


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", COSTS)
def test_workspace_bounds_all_temporaries(name, dtype):
    N, V, D, mib = 100, 65536, 50, 6
    h_S, h_T, W = random_inputs(N, V, D, dtype)
    h_S.requires_grad_()
    targets, advantages = torch.arange(N), torch.linspace(-1, 1, N)
    with Allocations(smallest=8 * 1024) as allocations:
        if name == "entropy":
            loss = fused_entropy(h_S, W, workspace_mib=mib).sum()
        else:
            told = token_divergence(
                h_S, h_T, W, divergence=some(N)[name], targets=targets, advantages=advantages,
                workspace_mib=mib,
            )  # fmt: skip
            loss = told.loss.sum()
        loss.backward()
    assert allocations.peak <= mib * MIB + 2 * N * D * 4 + 8 * N * 4
    assert allocations.peak > mib * MIB / 3  # and it is used


@interpreted
@pytest.mark.parametrize("name", COSTS)
def test_logit_free_has_nothing_vocabulary_sized(name):
    N, V, D = 70, 1200, 16
    h_S, h_T, W = (t.bfloat16() for t in random_inputs(N, V, D))
    h_S.requires_grad_()
    with Allocations() as allocations:
        if name == "entropy":
            loss = fused_entropy(h_S, W, workspace_mib=0).sum()
        else:
            loss = fused_divergence_loss(h_S, h_T, W, some(N)[name], workspace_mib=0)
        loss.backward()
    assert not [s for s in allocations.shapes if max(s, default=0) >= V]


# --- what is described, and what it is called


def test_names():
    half, mixture = torch.full((3,), 0.5), "0.1 teacher + 0.9 student"
    names = {
        Divergence(beta=0.5): divergence_name(0.5),
        Divergence(beta=0, entry_clip=0.05): divergence_name(0.0, 0.05),
        Divergence(beta=half): divergence_name(half),
        Divergence(forward=0.5, reverse=0.25): (
            "0.5 forward KL(teacher‖student) + 0.25 reverse KL(student‖teacher)"
        ),
        Divergence(forward=half, reverse=1): (
            "w(token) forward KL(teacher‖student) + reverse KL(student‖teacher)"
        ),
        Divergence(beta=0.1, forward=1): f"KL(teacher‖{mixture})",
        Divergence(beta=0.1, reverse=-2, entry_clip=1): (
            f"-2 KL(student‖{mixture}), entries clipped at 1"
        ),
    }
    for divergence, name in names.items():
        assert divergence_name(divergence) == str(divergence) == name


def test_descriptions_are_compared():
    half = torch.full((3,), 0.5)
    assert Divergence(beta=0) == Divergence(beta=0.0)
    assert hash(Divergence(forward=1)) == hash(Divergence(forward=1.0))
    assert Divergence(forward=half) == Divergence(forward=half)
    assert Divergence(forward=half) != Divergence(forward=half.clone())
    assert Divergence(beta=0.5) != Divergence(beta=0.5, forward=0.5)
    assert Divergence(beta=0.5) != 0.5
    with pytest.raises(AttributeError):
        Divergence(beta=0.5).beta = 0.3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ValueError, "must have beta, or forward and reverse", {}),
        (ValueError, r"beta must lie in \[0, 1\], got 2", {"beta": 2}),
        (TypeError, "beta must be a number, got str", {"beta": "0.5"}),
        (ValueError, "beta must lie strictly between 0 and 1", {"beta": 0, "forward": 1}),
        (ValueError, "beta must lie strictly between 0 and 1", {"beta": 1.0, "reverse": 1}),
        (TypeError, "beta must be a number where", {"beta": torch.ones(3), "forward": 1}),
        (ValueError, "forward must be finite", {"forward": math.inf}),
        (ValueError, "reverse must be finite", {"reverse": math.nan}),
        (TypeError, "reverse must be a number, got list", {"reverse": [1.0]}),
        (ValueError, "entry_clip must be positive", {"forward": 1, "entry_clip": 0}),
    ],
)
def test_descriptions_that_are_refused(error, message, given):
    with pytest.raises(error, match=message):
        Divergence(**given)


H, HEAD, A = torch.ones(6, 5), torch.ones(20, 5), torch.ones(6)
ON_META = torch.ones(6, device="meta")


@pytest.mark.parametrize("function", [fused_divergence_loss, reference_divergence_loss])
@pytest.mark.parametrize(
    ("error", "message", "changed"),
    [
        (TypeError, "divergence must be a Divergence, got float", {"divergence": 0.5}),
        (TypeError, "divergence must be a Divergence, got str", {"divergence": "entropy"}),
        (TypeError, "forward must be float", {"divergence": Divergence(forward=A.int())}),
        (ValueError, r"forward .* \[6\] of h_stud", {"divergence": Divergence(forward=A[:5])}),
        (ValueError, "reverse must be finite", {"divergence": Divergence(reverse=A / 0)}),
        (ValueError, "reverse is on meta", {"divergence": Divergence(reverse=ON_META)}),
        (ValueError, "targets must be given with advantages", {"advantages": A}),
        (TypeError, "advantages must be a torch", {"advantages": 1.0, "targets": A.int()}),
        (TypeError, "advantages must be float", {"advantages": A.int(), "targets": A.int()}),
        (ValueError, r"advantages .* \[6\]", {"advantages": A[:5], "targets": A.int()}),
        (ValueError, "advantages must be finite", {"advantages": A / 0, "targets": A.int()}),
        (ValueError, "targets must lie in", {"advantages": A, "targets": 99 * A.int()}),
        (ValueError, "reduction must be", {"reduction": "max"}),
    ],
)
def test_refused(function, error, message, changed):
    arguments = {"h_student": H, "h_teacher": H, "W": HEAD, "divergence": Divergence(forward=1)}
    with pytest.raises(error, match=message):
        function(**arguments | changed)


def test_a_description_is_in_place_of_a_beta():
    for function in (token_divergence, reference_token_divergence):
        for beside in ({"beta": 0.3}, {"beta": A}, {"entry_clip": 0.1}):
            with pytest.raises(ValueError, match="divergence must be given in place of beta"):
                function(H, H, HEAD, divergence=Divergence(forward=1), **beside)


def test_a_target_out_of_the_vocabulary_where_it_cannot_be_read():
    with mock.patch("opsd_kernels.checks.is_readable", return_value=False):
        loss = fused_divergence_loss(
            H, H, HEAD, Divergence(forward=1, reverse=1), advantages=A, reduction="none",
            targets=torch.tensor([0, 1, 99, 2, -1, 3]),
        )  # fmt: skip
    assert loss.isnan().tolist() == [False, False, True, False, True, False]


# --- what is a teacher


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_geometric_mixture_of_teachers_is_one_of_hidden_states(dtype):
    """log q ∝ Σ cᵢ log qᵢ, of one head without a bias, is the teacher whose hidden states are
    Σ cᵢ hᵢ. In bf16 that is rounded, which is what any of the teachers' are."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(300, 16, generator=g).to(dtype)
    h, *teachers = torch.randn(4, 20, 16, generator=g).to(dtype)
    c = torch.tensor([0.5, 0.8, -0.3])  # they need not be positive
    mixed = sum(c_i * h_i.double() for c_i, h_i in zip(c.tolist(), teachers, strict=True))
    log_q = sum(
        c_i * logits(h_i, W).log_softmax(-1) for c_i, h_i in zip(c.tolist(), teachers, strict=True)
    ).log_softmax(-1)
    torch.testing.assert_close(logits(mixed, W).log_softmax(-1), log_q)
    log_p = logits(h, W).log_softmax(-1)
    expected = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    function = reference_divergence_loss if dtype == torch.float64 else fused_divergence_loss
    found = function(h, mixed.to(dtype), W, Divergence(forward=1))
    error = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-3}[dtype]
    assert abs(float(found) / float(expected) - 1) < error
