"""Every operation of the package, to be compared with float64 on a few rows of a real size.

How far a result may be from the exact one, on rows n of N tokens:

    loss, statistics   UNITS · (rounding to fp32 + what moved logits do)
    gradient           SATURATED_TILES · rounding to bf16 + UNITS · (what moved logits do
                       + what the last product loses)

"What moved logits do" is computed, by the oracle itself: its logits are moved by as much as those
of the kernels are off, which a bias of the whole vocabulary does, row by row. They are off by the
last bit of an fp32 sum; and on tensor cores, which cut off where others round, by `truncation`
(tests/tensor_cores.py): that of a chain of D products, low in the mean, which both sides have in
common as far as their terms are the same. What the last product loses is the truncation of a chain
over the vocabulary, as long as the schedule makes it. SATURATED_TILES is what bf16 tiles of the
gradient with respect to logits cost (tests/accuracy.py, docs/maths.md).
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from accuracy import CUT_UNITS, GRAD_UNITS, LOSS_UNITS, SATURATED_TILES, tensor_core
from tensor_cores import TensorCore, truncation
from torch import Tensor

import opsd_kernels
from benchmarks.lib.inputs import make_inputs
from opsd_kernels import Divergence, LMHead
from opsd_kernels.kernels import tiles

ROWS = 8  # compared with float64
DRAWS = 2  # of the noise
CLIP = 0.05
SHARE_BITS = 2.0**-20  # of a share of a sum: it is a difference of numbers near 1


class Inputs(NamedTuple):
    """Of N tokens, a row or a number each; and the heads."""

    h_S: Tensor
    h_T: Tensor
    targets: Tensor
    betas: Tensor
    weights: Tensor  # of a KL, positive
    advantages: Tensor  # of either sign, as token weights may be
    W: LMHead
    W_T: LMHead | None = None  # the teacher's, where it has one of its own

    def of(self, rows: slice) -> "Inputs":
        return Inputs(*(t[rows] for t in self[:6]), self.W, self.W_T)  # type: ignore[arg-type]


class Result(NamedTuple):
    """[N] each."""

    loss: Tensor  # differentiable
    others: dict[str, Tensor]


Find = Callable[[str], Any]  # a function of the package, or its oracle, by what it computes
Options = dict[str, Any]


@dataclass(frozen=True)
class Operation:
    compute: Callable[[Find, Inputs, Options], Result]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs


def fused(name: str) -> Any:
    return getattr(opsd_kernels, name if name == "token_divergence" else f"fused_{name}")


def oracle(name: str) -> Any:
    return getattr(opsd_kernels, f"reference_{name}")


def jsd(find: Find, of: Inputs, options: Options, **more: Any) -> Result:
    options = {"reduction": "none", "W_teacher": of.W_T, **options, **more}
    return Result(find("jsd_loss")(of.h_S, of.h_T, of.W, **options), {})


def betas(find: Find, of: Inputs, options: Options, **more: Any) -> Result:
    return jsd(find, of, options, beta=of.betas, **more)


def weighed(find: Find, of: Inputs, options: Options) -> Result:
    return jsd(find, of, options, temperature=1.2, token_weights=of.advantages)


def family(
    find: Find, of: Inputs, options: Options, beta: float | None, policy: bool = False
) -> Result:
    """Both KLs, the forward one with a weight of each token."""
    divergence = Divergence(beta, forward=of.weights, reverse=0.5)
    terms = {"targets": of.targets, "advantages": of.advantages} if policy else {}
    options = {"reduction": "none", "W_teacher": of.W_T, **options, **terms}
    return Result(find("divergence_loss")(of.h_S, of.h_T, of.W, divergence, **options), {})


def statistics(find: Find, of: Inputs, options: Options, **more: Any) -> Result:
    options = {"targets": of.targets, "W_teacher": of.W_T, **options, **more}
    told = find("token_divergence")(of.h_S, of.h_T, of.W, **options)._asdict()
    return Result(told.pop("loss"), told)


def sampled_token(find: Find, of: Inputs, options: Options) -> Result:
    options = {"reduction": "none", "W_teacher": of.W_T, **options}
    told = find("sampled_token_loss")(
        of.h_S, of.h_T, of.W, of.targets, advantage_clip=5.0, return_log_probs=True, **options
    )._asdict()
    return Result(told.pop("loss"), told)


def log_p(find: Find, of: Inputs, options: Options) -> Result:
    return Result(find("log_probs")(of.h_S, of.W, of.targets, **options), {})


def some_ids(of: Inputs) -> Tensor:
    """[N, 16] for each token, its target first."""
    step = 97 * torch.arange(16, device=of.targets.device)
    return (of.targets[:, None] + step) % (len(of.W.weight) - PADDING)


def several_log_p(find: Find, of: Inputs, options: Options) -> Result:
    told = find("log_probs")(of.h_S, of.W, some_ids(of), rest=True, **options)
    return Result(told.log_probs.sum(-1) + 3 * told.log_rest, {"rest": told.log_rest.detach()})


def top_k(find: Find, of: Inputs, options: Options, **more: Any) -> Result:
    """A teacher that gives some tokens 0.9 of its mass."""
    ids = some_ids(of)
    log_q = (of.advantages[:, None] * torch.linspace(0, 3, 16, device=ids.device)).log_softmax(-1)
    options = {"reduction": "none", "return_statistics": True, "targets": of.targets, **options}
    told = find("top_k_loss")(of.h_S, of.W, ids, log_q + math.log(0.9), **options, **more)
    told = told._asdict()
    return Result(told.pop("loss"), told)


def entropy(find: Find, of: Inputs, options: Options) -> Result:
    return Result(find("entropy")(of.h_S, of.W, **options), {})


def decorate(of: Inputs) -> Inputs:
    """A head with a softcap, a scale, a bias that bans some entries, and rows that count for
    nothing."""
    W = of.W.weight
    g = torch.Generator(W.device).manual_seed(2)
    bias = torch.randn(len(W), generator=g, device=W.device).to(W.dtype)
    bias[1::97] = -torch.inf
    return of._replace(W=LMHead(W, bias, softcap=30.0, scale=0.9, vocab_size=len(W) - PADDING))


def halve_the_teacher(of: Inputs) -> Inputs:
    """A teacher with a head of its own, and half the features."""
    half = of.h_T.shape[1] // 2
    head = LMHead(of.W.weight[:, :half].contiguous())
    return of._replace(h_T=of.h_T[:, :half].contiguous(), W_T=head)


PADDING = 7
# The most valuable first.
OPERATIONS: dict[str, Operation] = {
    "JSD": Operation(jsd),
    "forward KL": Operation(partial(jsd, beta=0.0)),
    "reverse KL": Operation(partial(jsd, beta=1.0)),
    "forward KL, clipped": Operation(partial(jsd, beta=0.0, entry_clip=CLIP)),
    "statistics": Operation(statistics),
    "statistics, clipped": Operation(partial(statistics, beta=0.0, entry_clip=CLIP)),
    "sampled token": Operation(sampled_token),
    "log p": Operation(log_p),
    "JSD, beta 0.9": Operation(partial(jsd, beta=0.9)),
    "JSD, clipped": Operation(partial(jsd, entry_clip=CLIP)),
    "a beta of each token": Operation(betas),
    "a beta of each token, clipped": Operation(partial(betas, entry_clip=CLIP)),
    "both KLs": Operation(partial(family, beta=None)),
    "both KLs, policy term": Operation(partial(family, beta=None, policy=True)),
    "skewed KLs": Operation(partial(family, beta=0.1)),
    "skewed KLs, policy term": Operation(partial(family, beta=0.1, policy=True)),
    "log p of several": Operation(several_log_p),
    "top-k, bucket": Operation(partial(top_k, beta=0.0)),
    "top-k, renormalized": Operation(partial(top_k, outside="renormalize")),
    "top-k, ignored": Operation(partial(top_k, beta=1.0, outside="ignore")),
    "entropy": Operation(entropy),
    "temperature, token weights": Operation(weighed),
    "softcap, bias, padding": Operation(jsd, decorate),
    "a teacher's own head": Operation(jsd, halve_the_teacher),
}


def make(
    N: int, D: int, V: int, dtype: torch.dtype, device: torch.device, distance: float
) -> Inputs:
    """Peaked distributions, as `make_inputs` makes them."""
    h_S, h_T, W = make_inputs(N, V, D, dtype, device, distance=distance)
    g = torch.Generator(device).manual_seed(1)
    return Inputs(
        h_S,
        h_T,
        torch.randint(V - PADDING, (N,), generator=g, device=device),
        torch.tensor([0.0, 0.3, 0.5, 0.9, 1.0], device=device).repeat(-(-N // 5))[:N],
        torch.rand(N, generator=g, device=device) + 0.5,
        torch.randn(N, generator=g, device=device),
        LMHead(W),
    )


@dataclass(frozen=True)
class Error:
    """Norm over the rows, and what it may be at most."""

    what: str  # loss, gradient, or a statistic
    error: float
    bound: float


def compare(operation: Operation, inputs: Inputs, workspace_mib: float) -> list[Error]:
    """Errors of an operation in one schedule, on some of the rows."""
    inputs = operation.prepare(inputs)
    h = inputs.h_S.detach().requires_grad_()
    result = operation.compute(fused, inputs._replace(h_S=h), {"workspace_mib": workspace_mib})
    (grad,) = torch.autograd.grad(result.loss.sum(), h)
    got = {"loss": result.loss.detach(), **result.others, "gradient": grad}
    if "OPSD_RECORD" in os.environ:
        return []  # nothing was computed (benchmarks/gpu/launches.py)
    rows = torch.linspace(0, len(h) - 1, min(ROWS, len(h))).long().tolist()
    chain = None
    if not workspace_mib:
        row, V = tiles.lookup(h.device, h.dtype), inputs.W.weight.shape[0]
        columns = row.columns * 2 // h.itemsize
        chain = row.pair.BV * tiles.slots(V, row.pair, row, row.chunk, columns)
    parts: dict[str, list[Tensor]] = {name: [] for name in got}
    for n in rows:
        row = of_row(operation, inputs, n)
        for name, exact in row.exact.items():
            noise = row.noise[name]
            if name == "gradient":
                noise = noise + lost_by_the_last_product(row, inputs, chain)
            exact = exact.double()
            rounding = (exact.to(got[name].dtype).double() - exact).norm()
            error = (got[name][n : n + 1].double() - exact).norm()
            parts[name].append(torch.stack([error, rounding, noise]))
    units = LOSS_UNITS if core_of(h.dtype) is None else CUT_UNITS
    grad_units = max(units, GRAD_UNITS[h.dtype])
    errors = []
    for name, of_rows in parts.items():
        error, rounding, noise = torch.stack(of_rows).norm(dim=0).tolist()
        bound = units * (rounding + noise)
        if name == "gradient":
            bound = SATURATED_TILES * rounding + grad_units * noise
        elif name == "clipped_share":
            bound += SHARE_BITS * math.sqrt(len(rows))
        errors.append(Error(name, error, bound + torch.finfo(torch.float32).tiny))
    return errors


def core_of(dtype: torch.dtype) -> TensorCore | None:
    """Which tensor core multiplies operands of this dtype here; None where products round."""
    return None if dtype == torch.float32 else tensor_core()


class OfRow(NamedTuple):
    """What the oracle says of one row."""

    exact: dict[str, Tensor]  # [1] each; the gradient is [1, D]
    noise: dict[str, Tensor]  # norms of what moved logits do
    dz: Tensor  # [V] gradient with respect to products


@lru_cache(maxsize=ROWS)  # both schedules are compared with the same
def of_row(operation: Operation, inputs: Inputs, n: int) -> OfRow:
    inputs = inputs.of(slice(n, n + 1))
    dtype, core = inputs.h_S.dtype, core_of(inputs.h_S.dtype)
    student = _double(inputs.W)
    heads = [student, student if inputs.W_T is None else _double(inputs.W_T)]
    sides = [inputs.h_S.double(), inputs.h_T.double()]
    W = heads[0].weight
    generator = torch.Generator(W.device).manual_seed(0)

    def randn() -> Tensor:
        return torch.randn(len(W), generator=generator, dtype=torch.float64, device=W.device)

    def solved(moves: list[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Results by name; and the gradient with respect to products."""
        h = sides[0].clone().requires_grad_()
        student, teacher = (
            head._replace(bias=(move if head.bias is None else head.bias + move))
            for head, move in zip(heads, moves, strict=True)
        )
        bias = student.bias.requires_grad_()
        moved = inputs._replace(h_S=h, h_T=sides[1], W=student, W_T=teacher)
        result = operation.compute(oracle, moved, {})
        grad, dz = torch.autograd.grad(result.loss.sum(), [h, bias])
        return {"loss": result.loss.detach(), **result.others, "gradient": grad}, dz

    products = [h[0] @ head.weight.t() for h, head in zip(sides, heads, strict=True)]

    def moves() -> list[Tensor]:
        return _moves(sides, heads, products, core, dtype, randn)

    still = torch.zeros(len(W), dtype=torch.float64, device=W.device)
    exact, dz = solved([still, still])
    changes: dict[str, list[Tensor]] = {name: [] for name in exact}
    for _ in range(DRAWS):
        for name, value in solved(moves())[0].items():
            changes[name].append((value - exact[name]).norm())
    noise = {name: torch.stack(of_it).square().mean().sqrt() for name, of_it in changes.items()}
    return OfRow(exact, noise, dz)


def lost_by_the_last_product(row: OfRow, inputs: Inputs, chain: int | None) -> Tensor:
    """What tensor cores cut off the gradient: a norm.

    Args:
        chain: entries of the vocabulary that are added one after the other; None: all.
    """
    core, grad = core_of(inputs.h_S.dtype), row.exact["gradient"][0]
    if core is None:
        return grad.new_zeros(())
    W = _in_float64(inputs.W.weight)
    length = min(chain or len(W), len(W))
    chains = len(W) / length
    size = (row.dz.square() @ _squares(W) / chains).sqrt()
    cut = truncation(grad / chains, size, length, core, inputs.h_S.dtype)
    spread = chains * (cut.common.square() + cut.own.square())
    return ((chains * cut.mean).square() + spread).sum().sqrt()


def _moves(
    sides: list[Tensor],
    heads: list[LMHead],
    products: list[Tensor],
    core: TensorCore | None,
    dtype: torch.dtype,
    randn: Callable[[], Tensor],
) -> list[Tensor]:
    """How far the logits of both sides may be from the exact ones: a draw for each, [V]."""
    moved, terms = [], []
    for (h,), head, u in zip(sides, heads, products, strict=True):
        # Of the sum of products, of the logit, and of its log-sum-exp.
        size = u.abs() if core else h.norm() * head.weight.norm(dim=1)
        moved.append(2.0**-24 * (size + u.abs() + 1 + math.log(len(u))) * randn())
        terms.append((h.square() @ _squares(head.weight).t()).sqrt())
    if core is None:
        return moved
    common = [randn(), randn()]
    if heads[0] is heads[1]:
        (h_S,), (h_T,) = sides
        apart = ((h_T - h_S).square() @ _squares(heads[0].weight).t()).sqrt() / terms[0]
        common[1] = common[0] + apart.clamp(max=1) * common[1]
    for i, (u, size) in enumerate(zip(products, terms, strict=True)):
        cut = truncation(u, size, sides[i].shape[1], core, dtype)
        moved[i] = moved[i] - cut.mean - cut.common * common[i] - cut.own * randn()
    return moved


def _double(head: LMHead) -> LMHead:
    bias = None if head.bias is None else head.bias.double()
    return head._replace(weight=_in_float64(head.weight), bias=bias)


@lru_cache(maxsize=2)
def _in_float64(W: Tensor) -> Tensor:
    """Of the last heads that were asked for: at a real size they are copied once."""
    return W.double()


@lru_cache(maxsize=2)
def _squares(W: Tensor) -> Tensor:
    return W.square()
