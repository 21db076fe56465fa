"""A head of which every process holds some rows, with real processes: the numbers of one process
with the whole head, what goes over the wire, and what is refused."""

import itertools
import random
import re
import warnings
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import test_outside
import torch
import torch.distributed as dist
from heads import Extras
from inputs import clip_is_clear, random_inputs
from ranks import on_ranks
from torch import Tensor
from torch.utils._pytree import tree_map_only

from opsd_kernels import (
    Divergence,
    LMHead,
    TokenDivergence,
    fused_divergence_loss,
    fused_entropy,
    fused_jsd_loss,
    fused_log_probs,
    fused_sampled_token_loss,
    fused_top_k,
    fused_top_k_loss,
    reference_divergence_loss,
    reference_entropy,
    reference_jsd_loss,
    reference_log_probs,
    reference_sampled_token_loss,
    reference_token_divergence,
    token_divergence,
)
from opsd_kernels.heads import vocabulary_parallel
from opsd_kernels.problem import Problem
from opsd_kernels.products import score_dtype
from opsd_kernels.schedules.planning import MIB, make_plan

CLIPPED_SHARE = TokenDivergence._fields.index("clipped_share")
REFERENCES = {
    fused_jsd_loss: reference_jsd_loss,
    token_divergence: reference_token_divergence,
    fused_sampled_token_loss: reference_sampled_token_loss,
}
FUNCTIONS = list(REFERENCES)
REFERENCES[fused_log_probs] = reference_log_probs
REFERENCES[fused_divergence_loss] = reference_divergence_loss
REFERENCES[fused_entropy] = reference_entropy
# Of sampled tokens alone; and of the student alone.
LOG_PROB = (fused_sampled_token_loss, fused_log_probs)
ALONE = (fused_log_probs, reference_log_probs, fused_entropy, reference_entropy)
# Where the vocabulary is cut, as parts of it: evenly, raggedly, and with nothing for one process.
CUTS = {2: [(0.5,), (0.13,), (1.0,)], 3: [(0.3, 0.6), (0.1, 0.1), (0.7, 1.0)]}


@dataclass(frozen=True)
class Case:
    function: Any = fused_jsd_loss
    workspace_mib: float | None = None
    N: int = 9
    V: int = 300
    D: int = 24
    dtype: torch.dtype = torch.float32
    distance: float = 0.3
    extras: Extras | None = None
    own_head: bool = False
    trained: bool = False
    cuts: tuple[float, ...] = ()
    seed: int = 0
    beta: Any = 0.5
    entry_clip: float | None = None
    temperature: float = 1.0
    weighed: bool = False
    nan_row: bool = False
    twice: bool = False  # is every row of the student's head, and so the largest logit

    def inputs(self) -> tuple[Tensor, Tensor, LMHead, LMHead | None, dict[str, Any]]:
        """h_S, h_T, both heads, and options."""
        N, V, D, seed = self.N, self.V, self.D, self.seed
        h_S, h_T, W = random_inputs(N, V, D, self.dtype, distance=self.distance, seed=seed)
        if self.twice:
            W[V // 2 :] = W[: V - V // 2]
        W_T = random_inputs(1, V, D, self.dtype, seed=seed + 1)[2] if self.own_head else None
        if W_T is not None:
            W_T = (0.9 * W.float() + 0.1 * W_T.float()).to(self.dtype)
        head, head_T = (self.extras or Extras()).heads(W, W_T, seed)
        g = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"temperature": self.temperature}
        if self.function is fused_divergence_loss:
            forward = torch.randn(N, generator=g)
            options["divergence"] = Divergence(self.beta, forward, 0.5, self.entry_clip)
            options["advantages"] = torch.randn(N, generator=g)
        elif self.function not in (*LOG_PROB, fused_entropy):
            beta = self.beta
            if beta == "each":
                beta = torch.linspace(0, 1, N)[torch.randperm(N, generator=g)]
            options |= {"beta": beta, "entry_clip": self.entry_clip}
        if self.function not in (fused_jsd_loss, fused_entropy):
            options["targets"] = torch.randint(V, (N,), generator=g)
        if self.weighed:
            options["token_weights"] = torch.rand(N, generator=g) * (torch.arange(N) % 3 > 0)
        if self.nan_row:
            h_S[N // 2] = torch.nan
        if self.function is not token_divergence and self.function not in ALONE:
            options["reduction"] = "none" if seed % 2 else "mean"
        return h_S, h_T, head, head_T, options

    def shards(self, head: LMHead | None, group: Any = None) -> list[LMHead]:
        """The shards of a head, each of which is padded as the head is, but for the first."""
        if head is None:
            return [None] * (len(self.cuts) + 1)
        V = self.V
        ends = [0, *(round(cut * V) for cut in self.cuts), V]
        shards = []
        for i, (begin, end) in enumerate(itertools.pairwise(ends)):
            padding = slice(V, None if i else V)
            weight = torch.cat([head.weight[begin:end], head.weight[padding]])
            bias = None
            if head.bias is not None:
                bias = torch.cat([head.bias[begin:end], head.bias[padding]])
            vocab_size = None if head.vocab_size is None else end - begin
            shards.append(
                head._replace(weight=weight, bias=bias, vocab_size=vocab_size, group=group)
            )
        return shards


def found(case: Case, head: LMHead, head_T: LMHead | None, inputs: Any, function: Any) -> Any:
    """All that a function returns, and the gradients of the student."""
    h_S, h_T, options = inputs
    h_S = h_S.detach().clone().requires_grad_()
    if case.trained:
        head = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(), head)
    if function in ALONE:
        results = function(h_S, head, **options)
    else:
        results = function(h_S, h_T, head, W_teacher=head_T, **options)
    loss = results if isinstance(results, Tensor) else results.loss
    loss.backward(torch.linspace(0.5, 2, loss.numel()).to(loss).reshape(loss.shape))
    results = [results] if isinstance(results, Tensor) else [t for t in results if t is not None]
    gradients = [h_S.grad]
    if case.trained:
        gradients += [head.weight.grad] + ([] if head.bias is None else [head.bias.grad])
    return [t.detach() for t in results], gradients


def drawn(count: int, processes: int, seed: int) -> list[Case]:
    """Cases of everything at once."""
    draw = random.Random(seed)
    cases: list[Case] = []
    while len(cases) < count:
        clip = draw.choice([None, None, 0.02])
        case = Case(
            function=draw.choice(FUNCTIONS),
            workspace_mib=draw.choice([0, 0.2, None]),
            N=draw.choice([1, 9, 70]),
            V=draw.choice([5, 37, 300]),
            D=draw.choice([8, 24]),
            dtype=draw.choice([torch.float32, torch.bfloat16, torch.float16]),
            distance=10 ** draw.uniform(-3, 0),
            extras=draw.choice([None, *EXTRAS]),
            own_head=draw.random() < 0.3,
            trained=draw.random() < 0.4,
            cuts=draw.choice(CUTS[processes]),
            seed=draw.randrange(2**16),
            beta=draw.choice([0.0, 0.3, 0.5, 0.8, 1.0, "each"]),
            entry_clip=clip,
            temperature=draw.choice([1.0, 0.7, 1.5]),
            weighed=draw.random() < 0.5,
        )
        if clip is None or is_clear(case):
            cases.append(case)
    return cases


EXTRAS = [
    Extras(bias="with bans", softcap=5.0, padding=3),
    Extras(bias="random", scale=0.25, teacher_differs=True),
    Extras(softcap=30.0, scale=3.0, padding=5),
]


def is_clear(case: Case) -> bool:
    """Whether rounding does not decide which entries are clipped."""
    if case.beta == "each" or case.function is fused_sampled_token_loss:
        return False
    h_S, h_T, head, head_T, options = case.inputs()
    divergence = options.get("divergence")
    if divergence is None:
        divergence = Divergence(options["beta"], entry_clip=options["entry_clip"])
    teacher = head if head_T is None else head_T
    return clip_is_clear(h_S, h_T, head, teacher, divergence, options["temperature"])


def cases(processes: int) -> list[Case]:
    """Those of three processes are fewer, and there for the one between the first and the last."""
    even, _ragged, empty = CUTS[processes]
    chosen = drawn({2: 36, 3: 12}[processes], processes, processes)
    for workspace_mib in (0, None):
        here = Case(workspace_mib=workspace_mib, cuts=empty)
        chosen += [
            replace(here, nan_row=True, weighed=True),
            replace(here, nan_row=True, cuts=even, function=token_divergence),
            # Every entry the same: the first has the most mass.
            replace(here, D=8, distance=0, extras=Extras(scale=1e-30), trained=True),
            # Two shards share the largest logit; it counts as the first one's.
            replace(here, twice=True, own_head=True, cuts=even, trained=True),
            # An entry with mass on one side alone.
            replace(here, beta=0.0, own_head=True, extras=Extras("with bans"), V=37),
            replace(here, function=fused_log_probs, weighed=True),
            replace(here, function=fused_entropy, weighed=True, extras=EXTRAS[0], trained=True),
            replace(here, function=fused_entropy, N=70, cuts=even, dtype=torch.bfloat16),
            replace(here, function=fused_divergence_loss, beta=None, cuts=even, N=70, seed=1),
            replace(here, function=fused_divergence_loss, beta=None, extras=EXTRAS[0], V=37,
                    trained=True, weighed=True),
            replace(here, function=fused_divergence_loss, beta=0.3, extras=EXTRAS[2], cuts=even),
            replace(here, function=fused_divergence_loss, beta=0.8, entry_clip=0.02, trained=True),
            replace(here, function=fused_log_probs, N=70, cuts=even, trained=True,
                    extras=EXTRAS[0], temperature=0.7, dtype=torch.bfloat16),
        ]  # fmt: skip
    return chosen


class Wire:
    """Counts collectives, and the bytes that a process gives to them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.patches = [
            mock.patch.object(vocabulary_parallel, "_all_gather", self._gather),
            mock.patch.object(dist, "all_reduce", self._reduce),
        ]
        self.originals = vocabulary_parallel._all_gather, dist.all_reduce

    def _gather(self, out: Tensor, t: Tensor, **options: Any) -> Any:
        self.calls.append(("gather", t.nbytes))
        return self.originals[0](out, t, **options)

    def _reduce(self, t: Tensor, **options: Any) -> Any:
        self.calls.append(("reduce", t.nbytes))
        return self.originals[1](t, **options)

    def __enter__(self) -> "Wire":
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for patch in self.patches:
            patch.stop()


def on_rank(rank: int, processes: int) -> dict[str, Any]:
    """Results of all cases, and what went over the wire."""
    # Infinities and NaN on purpose.
    warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
    dist.init_process_group("gloo")
    results, wires = [], []
    for case in cases(processes):
        h_S, h_T, head, head_T, options = case.inputs()
        shard = case.shards(head, dist.group.WORLD)[rank]
        shard_T = case.shards(head_T, dist.group.WORLD)[rank]
        options["workspace_mib"] = case.workspace_mib
        with Wire() as wire:
            results.append(found(case, shard, shard_T, (h_S, h_T, options), case.function))
        wires.append(wire.calls)
    saved = {"results": results, "wires": wires, "top_k": of_top_k(rank, processes)}
    saved["support"] = [
        of_support(Case(V=41, cuts=cuts).shards(top_k_inputs()[1], dist.group.WORLD)[rank], mib)
        for cuts in CUTS[processes]
        for mib in (0, None)
    ]
    if processes == 2:
        saved |= {"refused": refused(rank), "compiled": compiled(rank), "DTensor": of_dtensor(rank)}
        saved |= {"outside": test_outside.of_shards(rank)}
    return saved


TOP_K_OPTIONS = (
    {"k": 5},
    {"k": 30, "workspace_mib": 0.4, "temperature": 0.7},
    {"k": 41, "token_weights": torch.arange(70) % 3},
)


def top_k_inputs() -> tuple[Tensor, LMHead, Tensor]:
    """Hidden states, a head with bans, and targets. Products of whole numbers are exact."""
    g = torch.Generator().manual_seed(0)
    h, W = (torch.randint(-2, 3, (n, 6), generator=g).float() for n in (70, 41))
    bias = torch.zeros(41)
    bias[::5] = -torch.inf
    return h, LMHead(W, bias), torch.arange(70) % 41


def of_top_k(rank: int, processes: int) -> list[Any]:
    """The likeliest entries, for every cut and all options."""
    h, head, targets = top_k_inputs()
    found = []
    for cuts in CUTS[processes]:
        shard = Case(V=41, cuts=cuts).shards(head, dist.group.WORLD)[rank]
        found += [fused_top_k(h, shard, targets=targets, **options) for options in TOP_K_OPTIONS]
    found.append(fused_top_k(h, shard, 50, targets=targets))
    return [tuple(result) for result in found]


def of_support(head: LMHead, workspace_mib: float | None) -> list[Tensor]:
    """Losses on some ids, among them absent ones, and gradients of the hidden states."""
    h, _, targets = top_k_inputs()
    ids = (targets[:, None] + torch.tensor([0, 7, 20, -5, 7])) % 43 - 1
    log_q = torch.linspace(-3, -2, 5).expand(70, 5)
    made = []
    for outside in ("bucket", "renormalize", "ignore"):
        leaf = (0.1 * h).requires_grad_()
        told = fused_top_k_loss(leaf, head, ids, log_q, outside=outside, targets=targets,
                                workspace_mib=workspace_mib, return_statistics=True)  # fmt: skip
        told.loss.backward()
        log_p = fused_log_probs(leaf, head, ids, rest=True, workspace_mib=workspace_mib)
        made += [*(t.detach() for t in (*told, *log_p)), leaf.grad]
    return made


def refused(rank: int) -> list[str]:
    """What is said of groups that do not fit."""
    h_S, h_T, W = random_inputs(9, 37, 8)
    first, world = dist.new_group([0]), dist.group.WORLD
    head = LMHead(W, group=world)
    said = []
    for args, options in (
        ((h_S[rank:], h_T[rank:], head), {}),
        ((h_S, h_T, LMHead(W, group="tp")), {}),
        ((h_S, h_T, head), {"W_teacher": W}),
        ((h_S, h_T, head), {"W_teacher": LMHead(W[1:], group=world)}),
        ((h_S, h_T, LMHead(W[:0], group=None)), {}),
        ((h_S, h_T, LMHead(W, group=first)), {}),
    ):
        try:
            said.append(float(fused_jsd_loss(*args, **options)))
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    try:
        reference_jsd_loss(h_S, h_T, head)
    except ValueError as error:
        said.append(str(error))
    try:
        targets = torch.full((9,), 74)
        fused_sampled_token_loss(h_S, h_T, head, targets)
    except ValueError as error:
        said.append(str(error))
    return said


def compiled(rank: int) -> list[list[Tensor]]:
    """Loss and gradients, as usual and as PyTorch's compiler traces them."""
    h_S, h_T, W = random_inputs(9, 37, 8, distance=0.5)
    own, targets = (slice(0, 11), slice(11, 37))[rank], torch.arange(9) * 4

    def loss(h: Tensor, W: Tensor) -> Tensor:
        head = LMHead(W, group=dist.group.WORLD)
        return token_divergence(h, h_T, head, targets=targets).loss.mean()

    both = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        h, own_W = h_S.clone().requires_grad_(), W[own].clone().requires_grad_()
        value = function(h, own_W)
        value.backward()
        both.append([value.detach(), h.grad, own_W.grad])
    return both


def of_dtensor(rank: int) -> list[Tensor]:
    """Gradients of hidden states and of a head that is a DTensor."""
    from torch.distributed.tensor import Shard, distribute_tensor

    h_S, h_T, W = random_inputs(9, 37, 8, distance=0.5)
    mesh = dist.init_device_mesh("cpu", (2,))
    weight = torch.nn.Parameter(distribute_tensor(W, mesh, [Shard(0)]))
    h = h_S.clone().requires_grad_()
    fused_jsd_loss(h, h_T, LMHead(weight.to_local(), group=mesh.get_group())).backward()
    return [h.grad, weight.grad.full_tensor()]


@pytest.fixture(scope="module", params=[2, 3], ids=lambda processes: f"{processes} processes")
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    return on_ranks(on_rank, request.param, tmp_path_factory.mktemp("ranks"), request.param)


two_processes = pytest.mark.parametrize("ranks", [2], indirect=True, ids=["2 processes"])


def test_as_one_process(ranks):
    """Against the oracle, with the whole head; the largest error of all cases."""
    for i, case in enumerate(cases(len(ranks))):
        h_S, h_T, head, head_T, options = case.inputs()
        exact = tree_map_only(
            Tensor,
            lambda t: t.double() if t.is_floating_point() else t,
            (h_S, h_T, head, head_T, options),
        )
        values, gradients = found(
            case, exact[2], exact[3], (exact[0], exact[1], exact[4]), REFERENCES[case.function]
        )
        of_ranks = [rank["results"][i] for rank in ranks]
        got_values, (got_dh, *_) = of_ranks[0]
        what = f"{i}: {case}"
        for field, (got, true) in enumerate(zip(got_values, values, strict=True)):
            check_value(got.double(), true, field, case, what)
        check_gradient(got_dh, gradients[0], case, what)
        V = case.V
        for j, true in enumerate(gradients[1:], 1):
            own = [result[1][j] for result in of_ranks]
            rows = [
                t if shard.vocab_size is None else t[: shard.vocab_size]
                for t, shard in zip(own, case.shards(head), strict=True)
            ]
            check_gradient(torch.cat(rows), true[:V], case, what)
            for t, shard in zip(own, case.shards(head), strict=True):
                assert t.shape[0] == shard.weight.shape[0], what
                if shard.vocab_size is not None:
                    assert (t[shard.vocab_size :] == 0).all(), what


def check_value(got: Tensor, true: Tensor, field: int, case: Case, what: str) -> None:
    """One of the results, in their order, to the noise of fp32 logits: a divergence is as small as
    the square of the distance, and keeps its digits."""
    rtol, atol = max(2e-5, 1e-5 / min(0.4, case.distance or 1.0)), 1e-12
    if case.entry_clip is not None and field == 0:
        atol = 2e-7  # a sum of terms of both signs
    if case.function is token_divergence and field == CLIPPED_SHARE:
        atol = 2e-4  # a difference
    got, true = got.nan_to_num(nan=7.0), true.nan_to_num(nan=7.0)
    both = got.isinf() & (got == true)
    error = (got - true).masked_fill(both, 0).abs()
    assert (error <= rtol * true.abs() + atol).all(), (field, got, true, error / true.abs(), what)


def check_gradient(got: Tensor, true: Tensor, case: Case, what: str) -> None:
    """To the rounding of what is returned, that of tiles, and the noise of fp32 logits."""
    finite = true.isfinite()
    assert (got.isfinite() == finite).all(), what
    got, true = got.double()[finite], true[finite]
    rounding = float((true.to(case.dtype).double() - true).norm())
    if case.dtype != torch.float32:
        rounding += torch.finfo(score_dtype(case.dtype, True)).eps / 4 * float(true.norm())
    error = float((got - true).norm())
    # The gradient is as small as the sides are near; its noise, that of logits, is not.
    noise = 4e-6 / min(0.4, case.distance or 1.0) * float(true.norm())
    assert error <= 1.5 * rounding + noise + 1e-8, (error, rounding, noise, what)


def test_top_k(ranks):
    """As one process with the whole head; entries that do not exist are absent."""
    h, head, targets = top_k_inputs()
    whole = [fused_top_k(h, head, targets=targets, **options) for options in TOP_K_OPTIONS]
    for rank in ranks:
        *found, more = rank["top_k"]
        for i, result in enumerate(found):
            for got, true in zip(result, whole[i % len(whole)], strict=True):
                torch.testing.assert_close(got, true, rtol=1e-6, atol=1e-6)
        ids, log_probs, log_rest, _ = more
        assert ids[:, :41].equal(fused_top_k(h, head, 41).ids)
        assert (ids[:, 32:] == -1).all()
        assert (log_probs[:, 32:] == -torch.inf).all()
        assert (log_rest == -torch.inf).all()
        for result, first in zip(rank["top_k"], ranks[0]["top_k"], strict=True):
            assert all(t.equal(of_first) for t, of_first in zip(result, first, strict=True))


def test_ids_of_the_whole_vocabulary(ranks):
    """Losses, statistics and gradients as of one process with the whole head."""
    whole = of_support(top_k_inputs()[1], None)
    for rank in ranks:
        for found in rank["support"]:
            torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)


def test_every_process_has_the_same(ranks):
    for i, case in enumerate(cases(len(ranks))):
        first_values, (first_dh, *_) = ranks[0]["results"][i]
        for rank in ranks[1:]:
            values, (dh, *_) = rank["results"][i]
            for t, first in zip([*values, dh], [*first_values, first_dh], strict=True):
                assert torch.equal(t.nan_to_num(nan=7.0), first.nan_to_num(nan=7.0)), case


def test_collectives_do_not_depend_on_a_shard(ranks):
    for i, case in enumerate(cases(len(ranks))):
        for rank in ranks[1:]:
            assert rank["wires"][i] == ranks[0]["wires"][i], case


def test_bytes_on_the_wire(ranks):
    """Those of the table in docs/maths.md and `vocabulary_parallel`."""
    for i, case in enumerate(cases(len(ranks))):
        expected = expected_bytes(case)
        if expected is not None:
            calls = ranks[0]["wires"][i]
            assert sum(size for _, size in calls) == expected, (calls, case)


def expected_bytes(case: Case) -> int | None:
    """Of a call and its backward; None where β of each token, or a bound on the rows of a chunk,
    has them counted otherwise."""
    if case.beta == "each" or case.workspace_mib == 0.2:
        return None
    has_targets = "targets" in case.inputs()[4]
    policy = case.function is fused_divergence_loss
    statistics = has_targets and not policy
    sampled, sides = case.function in LOG_PROB, 1 if case.function in ALONE else 2
    kl = not sampled and case.beta in (0, 1)
    clip = not sampled and case.entry_clip is not None
    softcap = case.extras is not None and case.extras.softcap is not None
    once, per_token, N = 16, 4 * case.D, case.N
    if case.workspace_mib == 0:
        per_token += 36 if has_targets else 28
        per_token += 8 + 4 * softcap * (2 if policy else 1)
        if statistics and not sampled:
            per_token += 20
    else:
        once += 8  # how many rows a chunk has
        if case.weighed:  # on a CPU, where that costs nothing, tokens of weight 0 are left out
            kept = int((case.inputs()[4]["token_weights"] != 0).sum())
            return once + 4 * case.D * N + kept * of_row(case, sampled, statistics, kl, clip, sides)
        per_token += of_row(case, sampled, statistics, kl, clip, sides)
    return once + per_token * N


def of_row(case: Case, *what: Any) -> int:
    if case.function is fused_entropy:
        return 8 + 4  # normalizers; the mean of a
    if case.function is fused_divergence_loss:
        # Where both KLs are infinite; the mass of clipped entries; z_S and 1 − p at ŷ.
        apart = 8 if case.beta is None and case.entry_clip is None else 0
        return 16 + 4 + 8 + apart + (4 if case.entry_clip is not None else 0) + 8
    return row_bytes(*what)


def row_bytes(sampled: bool, statistics: bool, kl: bool, clip: bool, sides: int) -> int:
    if sampled:
        return 8 * sides + 4 * sides + 4  # normalizers; logits of the sampled token; 1 − p(ŷ)
    of_loss = 16 + 4 + 8 + (4 if kl and clip else 0) + (4 if kl and not clip else 0)
    if not statistics:
        return of_loss
    return of_loss + 8 + 8 + 8 + (4 if kl and not clip else 8) + 4 * clip


@two_processes
def test_what_is_refused(ranks):
    for rank, of_rank in enumerate(ranks):
        said = of_rank["refused"]
        patterns = [
            r"ValueError: the ranks of W.group have \[9, 8\] tokens",
            r"TypeError: W.group must be a torch.distributed.ProcessGroup, got str",
            r"ValueError: W and W_teacher must have the same group",
            r"ValueError: W_teacher has 36 rows, W 37",
            r"ValueError: W.weight must have at least one row",
        ]
        for text, pattern in zip(said, patterns, strict=False):
            assert re.match(pattern, text), text
        if rank == 0:  # a group of one process is none
            h_S, h_T, W = random_inputs(9, 37, 8)
            assert said[5] == float(fused_jsd_loss(h_S, h_T, W))
        else:
            assert "does not have this process among its members" in said[5]
        assert said[6] == "the oracle takes the whole head: W.group must be None"
        assert said[7].startswith("targets must lie in [0, 74)")


@two_processes
def test_compiled(ranks):
    for of_rank in ranks:
        for t, traced in zip(*of_rank["compiled"], strict=True):
            assert t.equal(traced)


@two_processes
def test_a_sharded_dtensor(ranks):
    h_S, h_T, W = (t.double().requires_grad_() for t in random_inputs(9, 37, 8, distance=0.5))
    reference_jsd_loss(h_S, h_T, W).backward()
    for of_rank in ranks:
        for got, true in zip(of_rank["DTensor"], (h_S.grad, W.grad), strict=True):
            torch.testing.assert_close(got.double(), true, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("V", [5, 37_984])
@pytest.mark.parametrize("budget", [16 * MIB, 320 * MIB])
def test_plan(V, budget):
    """All rows of a chunk are one block, and within the budget."""
    W = torch.empty(V, 64, dtype=torch.bfloat16)
    h = torch.empty(10_000, 64, dtype=torch.bfloat16)
    plan = make_plan(Problem(h, h, W, None, W.dtype, 0.5, group="tp"), len(h), budget)
    assert plan.block == plan.rows > 0
    assert plan.bytes <= budget


@two_processes
def test_entries_outside_a_set(ranks):
    """Logits of given entries and the log-sum-exp of all others."""
    test_outside.check_shards([rank["outside"] for rank in ranks])
