"""The one tolerance of this test suite: errors in units of unavoidable rounding.

A result that is stored in some dtype, and made from fp32 logits, cannot be nearer to the truth than
two roundings allow: that of the exact result to its dtype, and what the last bit of the logits, and
of the entries made from them, does to it; and, on tensor cores, what these cut off (derived in
tests/tensor_cores.py). Errors are counted in their sum, the *unit*; the truth is the float64
oracle, and where float64 is too coarse, 60 digits.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from heads import as_head, logits, logits_of_products
from high_precision import row
from tensor_cores import ARCHITECTURES, TensorCore, truncation
from torch import Tensor
from torch.utils._pytree import tree_map_only

from opsd_kernels import Divergence, LMHead, reference_divergence_loss, reference_jsd_loss
from opsd_kernels.divergence import HUGE, Member, value_and_score
from opsd_kernels.kernels import tiles as tile_table
from opsd_kernels.products import score_dtype
from opsd_kernels.schedules.rows import divergence_rows_

# Bounds, over the maxima of thousands of random cases: 2.7 for losses; for gradients 1.0 where
# their dtype rounds them, and 4.3 in fp32, where the noise itself is what is left. With `tiles` the
# unit holds the largest rounding of an entry, and a gradient of one entry and feature has two.
LOSS_UNITS = 4.0
# On peaked distributions over a real vocabulary, in units of the rounding of the exact gradient to
# bf16 alone: what is left of the rounding of the score tiles that bf16 products need. At most 1.04
# where student and teacher agree; where they have nothing in common 1.27 (V = 2048) to 1.57 (8192).
ROUNDED_TILES, SATURATED_TILES = 1.5, 1.6
TILED_GRAD_UNITS = 2.1
# What tensor cores cut off, in units of what `noise` predicts: 0.36 to 1.4 in the simulation, of
# bf16 and fp16, from agreement to nothing in common.
CUT_UNITS = 2.0
GRAD_UNITS = {torch.float32: 6.0, torch.bfloat16: 1.25, torch.float16: 1.25}


def tensor_core() -> TensorCore | None:
    """That of this machine's GPU; None where products round to nearest."""
    if not torch.cuda.is_available():
        return None
    return ARCHITECTURES.get(tile_table.architecture(torch.device("cuda")))


def rounds_scores(dtype: torch.dtype, beta: float | Tensor) -> bool:
    """Whether kernels round scores to the dtype of hidden states before the last product."""
    return score_dtype(dtype, Member.of(beta).has_bounded_scores) != torch.float32


@dataclass(frozen=True)
class Errors:
    """Root-mean-square errors over all tokens, in units."""

    loss: float
    grad: float


def errors(
    loss: Tensor,
    grad: Tensor,
    h_S: Tensor,
    h_T: Tensor,
    W: Tensor | LMHead,
    tiles: bool = False,
    normalizers: bool = False,
    **divergence: Any,
) -> Errors:
    """Errors of per-token losses [N] and of the gradient [N, D] of their sum.

    Args:
        loss, grad: what the op returned with reduction "sum" or "none".
        h_S, h_T, W: its inputs, [N, D], [N, D_T], [V, D] or an `LMHead`.
        tiles: whether the gradient with respect to logits was rounded to the inputs' dtype for the
            last product.
        normalizers: whether the last bit of a row's normalizer counts too. It moves all entries
            together, which shows where the clip takes much, or where there is one feature.
        divergence: beta, temperature, entry_clip, W_teacher; or in place of beta and entry_clip a
            `Divergence`, with targets and advantages if there are such.
    """
    exact_loss, exact_grad = exact(h_S, h_T, W, **divergence)
    loss_noise, grad_noise = noise_of_rows(
        h_S, h_T, W, tiles=tiles, normalizers=normalizers, core=tensor_core(), **divergence
    )
    found = [in_units(loss, exact_loss, loss_noise), in_units(grad, exact_grad, grad_noise)]
    doubts = textbook_doubts(h_S, W, divergence)
    doubtful = [e.unit < 20 * doubt for e, doubt in zip(found, doubts, strict=True)]
    if any(doubtful):
        exact_loss, exact_grad = in_high_precision(h_S, h_T, W, **divergence)
        rows = slice(len(exact_loss))
        if doubtful[0]:
            found[0] = in_units(loss[rows], exact_loss, loss_noise[rows])
        if doubtful[1]:
            found[1] = in_units(grad[rows], exact_grad, grad_noise[rows])
    return Errors(found[0].units, found[1].units)


class Error(NamedTuple):
    units: float
    unit: float


def in_units(found: Tensor, true: Tensor, noise: Tensor) -> Error:
    """The error of what was found [R, ...], given the noise [R] of its rows."""
    # With a vocabulary of one everything is 0, and so is the unit; below this fp32 has no digits.
    floor = torch.finfo(torch.float32).tiny
    unit = float((true.to(found.dtype).double() - true).norm() + noise.norm()) + floor
    return Error(float((found.double() - true).norm()) / unit, unit)


def textbook_doubts(
    h_S: Tensor, W: Tensor | LMHead, divergence: dict[str, Any]
) -> tuple[float, float]:
    """How far from the truth the oracle's losses and gradient may be, in norm."""
    head = as_head(W)
    doubt = textbook_doubt(head.weight.shape[0], divergence.get("divergence"))
    doubt *= len(h_S) ** 0.5
    largest = float(head.weight.double().norm(dim=1).max())
    return doubt, doubt * largest * head.scale / divergence.get("temperature", 1.0)


def textbook_doubt(V: int, divergence: Divergence | None = None) -> float:
    """How far from the truth the oracle's ℓ of a row, or its gradient with respect to logits, may
    be.

    Terms have the size of q |log q| and p |log p|, log V nats in sum at most, and so do the
    log-sum-exps, which move all terms of a side; each is rounded to 2^-53 of itself. ℓ may be small
    because student and teacher agree, its gradient also because both are certain of the same entry:
    then the terms cancel, and their rounding stays.
    """
    weights = (1.0,) if divergence is None or divergence.weights is None else divergence.weights
    largest = max(float(torch.as_tensor(w).abs().max()) for w in weights)
    return 4 * 2.0**-53 * (1 + math.log(V)) * max(largest, 1.0)


def in_high_precision(
    h_S: Tensor,
    h_T: Tensor,
    W: Tensor | LMHead,
    *,
    beta: float | Tensor = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    divergence: Divergence | None = None,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    W_teacher: Tensor | LMHead | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses [R] and gradient [R, D] of the first rows, as many as have 300 entries in all;
    arguments as in `errors`.

    Logits are float64: their rounding moves ℓ by 2^-53 of what separates both sides, and the last
    product is float64, whose terms are exact.
    """
    head, divergence = as_head(W), divergence or Divergence(beta=beta, entry_clip=entry_clip)
    R = min(len(h_S), max(1, 300 // len(head.weight)))
    products = h_S[:R].double() @ head.weight.double().t()
    z_S, slope = (t / temperature for t in logits_of_products(products, head))
    z_T = logits(h_T[:R], W if W_teacher is None else W_teacher, temperature)
    losses, gradients = [], []
    for n in range(R):
        policy: tuple[Any, ...] = ()
        if targets is not None and advantages is not None:
            policy = int(targets[n]), float(advantages[n])
        loss, gradient = row(z_S[n].tolist(), z_T[n].tolist(), divergence, n, *policy)
        losses.append(float(loss))
        gradients.append([float(g) for g in gradient])
    found, dz_S = (h_S.new_tensor(t, dtype=torch.float64) for t in (losses, gradients))
    return found, (dz_S * slope) @ head.weight.double()


def exact(h_S: Tensor, h_T: Tensor, W: Tensor | LMHead, **divergence: Any) -> tuple[Tensor, Tensor]:
    """The oracle's per-token losses [N] and the gradient [N, D] of their sum, both float64."""
    h = h_S.detach().double().requires_grad_()
    W, W_T = tree_map_only(Tensor, Tensor.double, (W, divergence.pop("W_teacher", None)))
    function = reference_divergence_loss if "divergence" in divergence else reference_jsd_loss
    loss = function(h, h_T.double(), W, W_teacher=W_T, reduction="none", **divergence)
    loss.sum().backward()
    assert h.grad is not None
    return loss.detach(), h.grad


def noise(*args: Any, **options: Any) -> tuple[float, float]:
    """`noise_of_rows` of all rows together, in norm."""
    loss, grad = noise_of_rows(*args, **options)
    return float(loss.norm()), float(grad.norm())


def noise_of_rows(
    h_S: Tensor,
    h_T: Tensor,
    W: Tensor | LMHead,
    *,
    tiles: bool = False,
    normalizers: bool = False,
    core: TensorCore | None = None,
    chain: int | None = None,
    dtype: torch.dtype | None = None,
    beta: float | Tensor = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    divergence: Divergence | None = None,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    W_teacher: Tensor | LMHead | None = None,
    draws: int = 4,
) -> tuple[Tensor, Tensor]:
    """RMS change [N] of each row's loss and gradient when the last fp32 bit is noise: of every
    logit, and of every entry's value and score.

    Args:
        h_S, h_T, W: as in `errors`; or in float64, if `dtype` tells what they were.
        tiles: the last bit of its gradient's entries, in the operands' dtype, is noise too.
        normalizers: and that of a row's normalizer.
        core: whose products of bf16 and fp16 these are; then what it cuts off counts too. None for
            products that round to nearest.
        chain: entries of the vocabulary that the last product adds in one chain; all, unless given.
        dtype: of the operands; that of h_S, unless given.
        beta, temperature, entry_clip, divergence, targets, advantages, W_teacher: as in `errors`.
        draws: of the noise.
    """
    dtype, device = dtype or h_S.dtype, h_S.device
    member = Member.of(beta, entry_clip)
    largest = torch.ones((), dtype=torch.float64, device=device)  # weight of each row
    if divergence is not None:
        member = member_of(divergence, len(h_S))
        if divergence.weights is not None:
            _, w_q, w_p = member.columns()
            largest = torch.maximum(w_q.abs(), w_p.abs())
    policy = {} if advantages is None else {"targets": targets, "advantages": advantages.double()}
    last_bit_of_tiles = torch.finfo(dtype).eps / 2
    core = None if dtype == torch.float32 else core
    h_S, h_T = h_S.detach().double(), h_T.detach().double()
    has_own_weight = W_teacher is not None
    head_S = tree_map_only(Tensor, Tensor.double, as_head(W))
    head_T = head_S
    if W_teacher is not None:
        head_T = tree_map_only(Tensor, Tensor.double, as_head(W_teacher))
    W, W_T = head_S.weight, head_T.weight
    generator = torch.Generator(device).manual_seed(0)
    of_rows = torch.Generator(device).manual_seed(1)
    of_cores = torch.Generator(device).manual_seed(2)

    def randn(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=of_cores, dtype=torch.float64, device=device)

    def last_bits() -> Tensor:
        noise = torch.randn(u_S.shape, generator=generator, dtype=torch.float64, device=device)
        return 2.0**-24 * noise

    def products(h: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
        # The size that is rounded: of the products summed into a logit, and of its bias. Tensor
        # cores do not round; the sum is fp32 only afterwards.
        u = h @ head.weight.t()
        size = u.abs() if core else h.norm(dim=1)[:, None] * head.weight.norm(dim=1)
        if head.bias is not None:
            size = size + head.bias.nan_to_num(neginf=0.0).abs()
        return u, size

    def logits_and_slope(
        u: Tensor, head: LMHead, bits: Tensor | float = 0.0
    ) -> tuple[Tensor, Tensor]:
        # And the size of a logit's log-sum-exp; where it is capped, its own.
        z, slope = logits_of_products(u, head)
        size = 1 + math.log(u.shape[1])
        if head.softcap is not None:
            size = size + z.nan_to_num(neginf=0.0).abs() / temperature
        return z / temperature + bits * size, slope / temperature

    (u_S, size_S), (u_T, size_T) = products(h_S, head_S), products(h_T, head_T)
    (z_S, slope), (z_T, _) = logits_and_slope(u_S, head_S), logits_and_slope(u_T, head_T)
    log_p, log_q = z_S.log_softmax(-1), z_T.log_softmax(-1)
    p, q, x = log_p.exp(), log_q.exp(), (log_q - log_p).nan_to_num(0.0, HUGE, -HUGE)
    size_f = (p + q) * x.abs() * largest  # of the terms whose difference a value is
    f, a = _entries(p, q, x, member)
    top = p.argmax(-1, keepdim=True)
    c = a.gather(-1, top) / p.gather(-1, top)
    size_a = (a.abs() + c.abs() * p).scatter_(-1, top, 0)  # the top entry's score is exactly 0
    if advantages is not None and targets is not None:
        size_a += advantages.abs()[:, None] * p
        size_a.scatter_add_(-1, targets[:, None], advantages.double().abs()[:, None])

    if core is not None:
        squares = W.square()
        squares_T = W_T.square()
        terms_S = (h_S.square() @ squares.t()).sqrt()
        terms_T = (h_T.square() @ squares_T.t()).sqrt()
        cut_S = truncation(u_S, terms_S, h_S.shape[1], core, dtype)
        cut_T = truncation(u_T, terms_T, h_T.shape[1], core, dtype)
        # What the sums of both sides lose in common cancels as far as their terms are the same.
        apart = torch.ones((), dtype=torch.float64, device=device)
        if not has_own_weight:
            apart = ((h_T - h_S).square() @ squares.t()).sqrt() / terms_S

    def moved_logits() -> tuple[Tensor, Tensor, Tensor]:
        bits_S, bits_T = last_bits(), last_bits()
        moved_S, moved_T = u_S + bits_S * size_S, u_T + bits_T * size_T
        if core is not None:
            common = randn(u_S.shape)
            of_T = common + apart.clamp(max=1) * randn(u_S.shape)
            moved_S -= cut_S.mean + cut_S.common * common + cut_S.own * randn(u_S.shape)
            moved_T -= cut_T.mean + cut_T.common * of_T + cut_T.own * randn(u_S.shape)
        moved_S, moved_slope = logits_and_slope(moved_S, head_S, bits_S)
        return moved_S, logits_and_slope(moved_T, head_T, bits_T)[0], moved_slope

    g = z_S.clone()
    loss = divergence_rows_(g, z_T.clone(), member, needs_score=True, **policy)
    g *= slope
    grad = g @ W
    if core is not None:
        chain = min(chain or g.shape[1], g.shape[1])
        chains = g.shape[1] / chain
        size = (g.square() @ squares / chains).sqrt()
        cut = truncation(g @ W / chains, size, chain, core, dtype)
    changes = []
    for _ in range(draws):
        moved_S, moved_T, moved_slope = moved_logits()
        moved_loss = divergence_rows_(moved_S, moved_T, member, needs_score=True, **policy)
        moved_grad = (moved_S * moved_slope) @ W
        moved_loss += (last_bits() * size_f).sum(-1)
        if advantages is not None:
            moved_loss += last_bits()[:, 0] * advantages * (1 + math.log(p.shape[1]))
        moved_grad += (last_bits() * size_a * slope) @ W
        if normalizers:
            bit = 2.0**-24 * torch.randn(
                len(p), 1, generator=of_rows, dtype=torch.float64, device=device
            )
            bit *= 1 + math.log(p.shape[1])
            moved_f, moved_a = _entries(p, q * bit.exp(), x + bit, member)
            moved_loss += (moved_f - f).sum(-1)
            da = moved_a - a
            moved_grad += ((da - da.sum(-1, keepdim=True) * p) * slope) @ W
            if member.knows_G:
                # Kernels know G, which is 0, beforehand, and do not project.
                moved_grad += (member.columns()[1] * bit * p * slope) @ W
        if tiles:
            moved_grad += (last_bit_of_tiles * 2.0**24 * last_bits() * g) @ W
        if core is not None:
            spread = (cut.common.square() + cut.own.square()).sqrt() * math.sqrt(chains)
            moved_grad -= chains * cut.mean + spread * randn(grad.shape)
        changes.append(torch.stack([moved_loss - loss, (moved_grad - grad).norm(dim=-1)]))
    of_loss, of_grad = torch.stack(changes).square().mean(0).sqrt()
    return of_loss, of_grad


def member_of(divergence: Divergence, N: int) -> Member:
    """What is described, for N rows in float64."""
    beta, clip = divergence.beta, divergence.entry_clip
    if divergence.weights is None:
        return Member.of(beta, clip)
    w_q, w_p = (
        w.float().double() if isinstance(w, Tensor) else torch.full((N,), w, dtype=torch.float64)
        for w in divergence.weights
    )
    return Member.of(beta, clip, w_q, w_p)


def _entries(p: Tensor, q: Tensor, x: Tensor, member: Member) -> tuple[Tensor, Tensor]:
    f, a = value_and_score(p, q, x.clone(), member)
    assert a is not None
    return f, a
