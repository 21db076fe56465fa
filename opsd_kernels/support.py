"""The support S of a token: K ids. With the rest of the vocabulary it has a row of K + 1 logits.

    L_r = log Σ_{v∉S} exp(z_v)        log-sum-exp of the logits outside S

The softmax of [z_1 … z_K, L_r] is (p_1 … p_K, p_r): the probabilities of the K ids in the full
softmax, and that of all other entries together. So a loss on a support is pointwise on [N, K + 1].
L_r is summed over the other entries: 1 − Σ p_k would have no digits left where p_r is small.

A slot whose id is −1 is absent; its logit is −∞.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .autograd import refuse_second_derivative
from .divergence import Member
from .schedules.rows import divergence_rows_


def first_slots(ids: Tensor) -> Tensor:
    """For each slot of ids [N, K] the first slot with the same id, [N, K]."""
    sorted_ids, slots = ids.sort(dim=-1, stable=True)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    repeats = torch.zeros_like(ids, dtype=torch.bool)
    repeats[:, 1:] = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    begin = place.masked_fill(repeats, 0).cummax(-1).values
    return torch.empty_like(slots).scatter_(-1, slots, slots.gather(-1, begin))


def with_rest(of_ids: Tensor, of_rest: Tensor) -> Tensor:
    """[N, K + 1] numbers of K ids, and of the rest."""
    return torch.cat([of_ids, of_rest[:, None]], -1)


def log_softmax(z: Tensor) -> Tensor:
    """log p [N, K + 1] of rows of logits. Value and gradient keep their digits where p is almost 1.
    An entry at −∞ has no gradient."""
    log_p: Tensor = _LogSoftmax.apply(z)
    return log_p


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        top, index = z.max(-1, keepdim=True)
        below = z - top
        others = below.exp().scatter_(-1, index, 0).sum(-1, keepdim=True)
        log_p = below.sub_(others.log1p_())
        ctx.save_for_backward(log_p, index)
        return log_p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        refuse_second_derivative()
        log_p, index = ctx.saved_tensors
        g = grad.masked_fill(log_p == -torch.inf, 0)
        # g − G p; for the largest entry g (1 − p) − (G − g) p, without the subtraction 1 − p.
        log_p_top, g_top = log_p.gather(-1, index), g.gather(-1, index)
        g_others = g.scatter(-1, index, 0).sum(-1, keepdim=True)
        dz = torch.addcmul(g, log_p.exp(), g_top + g_others, value=-1)
        at_top = -log_p_top.expm1() * g_top - log_p_top.exp() * g_others
        return dz.scatter_(-1, index, at_top)


def divergence_of_rows(z_S: Tensor, z_T: Tensor, member: Member, ignored: int = 0) -> Tensor:
    """ℓ [N] from rows of logits [N, ·]: the student's z_S and the teacher's z_T, a constant.

    Args:
        ignored: number of entries at the end of a row that add nothing to ℓ, although they have
            mass.
    """
    needs_gradient = torch.is_grad_enabled() and z_S.requires_grad
    loss: Tensor = _Divergence.apply(z_S, z_T, member, ignored, needs_gradient)
    return loss


# Numbers that are in float64 at once: 8 MiB for each temporary.
ENTRIES = 2**20


def _pieces(z: Tensor) -> list[slice]:
    """Slices of rows, for a bounded number of entries at once. PyTorch's compiler, to which the
    number of rows is a symbol, gets all rows as one."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    rows = max(1, ENTRIES // z.shape[1])
    return [slice(n, n + rows) for n in range(0, z.shape[0], rows)]


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_S: Tensor, z_T: Tensor, member: Member, ignored: int, needs_gradient: bool
    ) -> Tensor:
        # In float64: z_S are logits, z_T can be log-probabilities. They differ by a normalizer, and
        # in fp32 it would take the last digits of x.
        loss = z_S.new_empty(z_S.shape[0])
        dz = torch.empty_like(z_S) if needs_gradient else None
        for rows in _pieces(z_S):
            z, other = (t[rows].to(torch.float64, copy=True) for t in (z_S, z_T))
            some = member
            if isinstance(member.beta, Tensor):
                some = replace(member, beta=member.beta[rows])
            loss[rows] = divergence_rows_(z, other, some, needs_gradient, ignored=ignored)
            if dz is not None:
                dz[rows] = z
        if dz is not None:
            ctx.save_for_backward(dz)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (dz,) = ctx.saved_tensors
        # Masked, not multiplied by 0: the gradient of a dropped token may be NaN.
        return (dz * grad[:, None]).masked_fill_((grad == 0)[:, None], 0), None, None, None, None
