"""Rows of logits → each row's ℓ and its gradient, in PyTorch. `kernels/rows.py` does it in Triton.

ℓ = Σ f and its gradient a − G p follow from the value f and the score a of every entry, which are
in `divergence.py`. With c = a/p at the student's top entry, the score a − c p is 0 there: for a
confident token a − G p would otherwise be a small difference of large numbers.

Two more values need the student alone: log p(ŷ) of a sampled token ŷ, for the sampled-token
objective (paper, Eq. 8), and the entropy, whose value and score are the same:

    log p(ŷ)          ∂/∂z_S = 1[v = ŷ] − p
    −Σ p log p        f = a = p (L_S − z_S), shifted p (top_S − z_S)

A policy term −A log p(ŷ) with a constant A adds −A 1[v = ŷ] to the scores, and −A to G.

The columns may be one process's shard of a vocabulary. Sums over a row are then summed over the
processes too, and the index of an entry of another process is −1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergence import (
    CLIPPED_SHARE,
    ENTROPY_S,
    ENTROPY_T,
    FORWARD_KL,
    HUGE,
    LOG_P,
    LOG_Q,
    LOG_RATIO,
    REVERSE_KL,
    Family,
    Member,
    clipped_off,
    value_and_score,
)
from ..heads.vocabulary_parallel import gathered, rank_in, summed_
from ..problem import Problem

# The field of `stats` that is the gradient of the entry `top`. The fields before it: both parts of
# L_S and of L_T, and G with the shift c and the policy term.
G_TOP = 5


class Softmax(NamedTuple):
    """The softmax of rows of logits, whose log-sum-exp is top + rest."""

    p: Tensor  # [R, V]
    top: Tensor  # [R, 1], the largest logit
    rest: Tensor  # [R, 1]
    elsewhere: Tensor | None = None  # [R, 1] bool, whether top is in another process's shard


def divergence_rows_(
    z_S: Tensor,
    z_T: Tensor | None,
    member: Member,
    needs_score: bool,
    statistics: Tensor | None = None,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    seen: tuple[Tensor, Tensor] | None = None,
    group: str | None = None,
    ignored: int = 0,
) -> Tensor:
    """Turn rows of logits into each row's ℓ and, in place, its gradient.

    Args:
        z_S, z_T: [R, V] float32 or float64 logits after temperature. Both are overwritten: z_S by
            the gradient ∂ℓ/∂z_S if `needs_score`, z_T by scratch. z_T is None without a teacher.
        member: the divergence, log p(ŷ) or the entropy.
        needs_score: whether the gradient is wanted; without it only the values are computed.
        statistics: [STATISTICS, R], filled: the last three fields if there are `targets`, the
            others if ℓ is a divergence.
        targets: [R] ids of sampled tokens.
        advantages: [R] A of a policy term −A log p(ŷ) in ℓ.
        seen: stats [STATS, R] and top [R], filled if `needs_score`: all that `logit_gradient_`
            needs to make some columns of the gradient again.
        group: the processes that share the vocabulary, if the columns are a shard of it.
        ignored: entries at the end of a row that add nothing to a divergence, see
            `value_and_score`.

    Returns:
        [R] ℓ. An entry at −∞ on both sides counts for nothing. Where an unclipped KL whose weight
        is not 0 is infinite (no mass where the other side has some) ℓ is +∞, or −∞ if no weight is
        positive, and the row's gradient 0; so it is where log p(ŷ) is −∞ and A not 0. A NaN logit
        makes its row NaN, and no other.
    """

    def summed(t: Tensor) -> Tensor:
        """[R, ·] sums over these columns as sums over the vocabulary."""
        return t if group is None else summed_(t.contiguous(), group)

    if member.family == Family.LOG_PROB:
        advantages = z_S.new_full((z_S.shape[0],), -1.0)  # a policy term with A = −1
    sides = softmaxes([z_S] if z_T is None else [z_S, z_T], group)
    student, p = sides[0], sides[0].p
    sums: dict[str, Tensor] = {}  # over these columns, [R, 1] each
    y = None if targets is None else targets[:, None].long()
    if y is not None and (statistics is not None or advantages is not None):
        sums["z_Sy"] = _at(z_S, y)
        if statistics is not None and z_T is not None:
            sums["z_Ty"] = _at(z_T, y)
        if advantages is not None and needs_score:
            # 1 − p(ŷ), without the subtraction.
            p_y = _at(p, y)
            _put_(p, y, torch.zeros_like(p_y))
            sums["not_sampled"] = p.sum(-1, keepdim=True)
            _put_(p, y, p_y)
    a = None
    if member.family == Family.ENTROPY:
        a = torch.sub(student.top, z_S, out=z_S).clamp_(max=HUGE).mul_(p)
    elif member.is_divergence:
        assert z_T is not None
        teacher = sides[1]
        if statistics is not None:
            sums |= {"entropy_S": _entropy(z_S, student), "entropy_T": _entropy(z_T, teacher)}
        x = _log_ratio_(z_S, z_T, student, teacher, member, statistics is not None, sums)
        if statistics is not None:
            for name, kl in (("forward", Member.of(0.0)), ("reverse", Member.of(1.0))):
                f, _ = value_and_score(p, teacher.p, x.clone(), kl, needs_score=False)
                sums[name] = f.sum(-1, keepdim=True)
                del f  # [R, V]: free it before the next tensor of that size
            if member.entry_clip is not None:
                sums["removed"] = clipped_off(p, teacher.p, x.clone(), member).sum(-1, keepdim=True)
        f, a = value_and_score(p, teacher.p, x, member, needs_score, summed, ignored)
        sums["loss"] = f.sum(-1, keepdim=True)
    top, c = y, torch.zeros_like(student.top)
    if a is not None:
        top = p.argmax(-1, keepdim=True)
        if student.elsewhere is not None:
            top = top.masked_fill(student.elsewhere, -1)
        if member.is_divergence:
            c = summed(_at(a, top).div_(_at(p, top)).where(top >= 0, 0))
            a.addcmul_(p, c, value=-1)
            _put_(a, top, torch.zeros_like(c))
        sums["G"] = a.sum(-1, keepdim=True)
    total: dict[str, Tensor] = dict(
        zip(sums, summed(torch.cat([*sums.values()], -1)).split(1, -1), strict=True)
    )

    divergence = _divergence(total, student, member)
    loss = divergence
    if advantages is not None:
        A = advantages[:, None]
        loss = _with_policy_term(loss, A, total["z_Sy"] - student.top - student.rest)
    if needs_score:
        if a is None:
            z_S.zero_()
        else:
            torch.addcmul(a, p, total["G"], value=-1, out=z_S)
            c = c + total["G"]
        if advantages is not None and y is not None:
            g_y = _at(z_S, y) - A * total["not_sampled"]
            z_S.addcmul_(p, A)
            _put_(z_S, y, g_y)
            c = c - A
        if seen is not None and top is not None:
            stats, tops = seen
            nothing = torch.zeros_like(c)
            L_T = sides[1][1:3] if member.is_divergence else (nothing, nothing)
            fields = torch.cat([student.top, student.rest, *L_T, c, _at(z_S, top)], -1)
            stats[: G_TOP + 1] = fields.t()
            tops.copy_(top.squeeze(-1))
        if member.may_be_infinite or advantages is not None:
            z_S.masked_fill_(loss.isinf(), 0)
    if statistics is not None:
        _fill_statistics(statistics, total, sides, member, divergence)
    return loss.squeeze(-1)


def logit_gradient_(z_S: Tensor, z_T: Tensor | None, problem: Problem, first: int) -> None:
    """Turn some columns of rows of logits into their gradient, once the whole rows were seen.

    Args:
        z_S, z_T: [R, columns] logits; z_S is overwritten by ∂ℓ/∂z_S, z_T by scratch.
        problem: R tokens, with the stats and top that `divergence_rows_` or `log_sum_rows_` filled.
        first: the place of the first column in the vocabulary.
    """
    member, stats, top = problem.member, problem.stats, problem.top
    targets, advantages = problem.targets, problem.advantages
    assert stats is not None
    assert top is not None
    top_S, rest_S, top_T, rest_T, G = stats[:G_TOP, :, None]
    p = (z_S - top_S).exp_().mul_(rest_S.neg().exp_())
    if member.family == Family.LOG_SUM:
        z_S.copy_(p)
        return
    if member.family == Family.LOG_PROB:
        torch.neg(p, out=z_S)
    elif member.family == Family.ENTROPY:
        torch.sub(top_S, z_S, out=z_S).clamp_(max=HUGE).sub_(G).mul_(p)
    else:
        assert z_T is not None
        q = (z_T - top_T).exp_().mul_(rest_T.neg().exp_())
        x = _difference_(z_T, z_S).clamp_(-HUGE, HUGE)
        x.sub_(top_T - top_S).sub_(rest_T - rest_S)
        _, a = value_and_score(p, q, x, member)
        assert a is not None
        torch.addcmul(a, p, G, value=-1, out=z_S)
    columns = torch.arange(first, first + z_S.shape[1], device=z_S.device)
    if targets is not None and advantages is not None:
        sampled = columns == targets[:, None]
        z_S.sub_(advantages[:, None] * sampled)
    # The top entry has its gradient from forward: its score there is 0 exactly.
    torch.where(columns == top[:, None], stats[G_TOP, :, None], z_S, out=z_S)


def logits_(
    z_S: Tensor,
    z_T: Tensor | None,
    problem: Problem,
    needs_slope: bool,
    columns: slice = slice(None),
) -> Tensor | None:
    """Turn products h Wᵀ [R, V] of both sides, or some of their columns, into logits in place.

    Returns:
        The slope of the student's softcap, see `LogitMap.apply_`; None where it is 1.
    """
    map_S, map_T = problem.logit_maps
    slope = map_S.of_columns(columns).apply_(z_S, needs_slope)
    if z_T is not None:
        map_T.of_columns(columns).apply_(z_T)
    if problem.temperature != 1:
        for z in (z_S, z_T):
            if z is not None:
                z.div_(problem.temperature)
    return slope


def weigh_(g: Tensor, slope: Tensor | None, weights: Tensor | None) -> None:
    """Multiply a gradient with respect to logits [R, V] by the slope of a softcap and the weights
    [R] of tokens; a token of weight 0 gets 0, even in place of NaN."""
    if slope is not None:
        g.mul_(slope)
    if weights is not None:
        g.mul_(weights[:, None]).masked_fill_((weights == 0)[:, None], 0)


def softmaxes(logits: list[Tensor], group: str | None) -> list[Softmax]:
    """The softmax of each of several [R, V]."""
    tops = [z.amax(-1, keepdim=True) for z in logits]
    if group is not None:
        # All entries of a shard may be banned.
        own_tops, tops = tops, [top.masked_fill(top == -torch.inf, 0) for top in tops]
    exps = [(z - top).exp_() for z, top in zip(logits, tops, strict=True)]
    totals = [e.sum(-1, keepdim=True) for e in exps]
    if group is None:
        return [
            Softmax(e.div_(total), top, total.log_())
            for e, top, total in zip(exps, tops, totals, strict=True)
        ]
    all_tops, all_totals = gathered(torch.stack([*own_tops, *totals]), group).chunk(2, dim=1)
    found = []
    for i, p in enumerate(exps):
        top = all_tops[:, i].amax(0)
        scale = (all_tops[:, i] - top).exp_()
        total = (all_totals[:, i] * scale).sum(0)
        p.mul_((tops[i] - top).exp_().div_(total))
        # If several processes have an equal top entry, the first of them has it.
        elsewhere = (all_tops[:, i] == top).int().argmax(0) != rank_in(group)
        found.append(Softmax(p, top, total.log_(), elsewhere))
    return found


def _log_ratio_(
    z_S: Tensor,
    z_T: Tensor,
    student: Softmax,
    teacher: Softmax,
    member: Member,
    needs_statistics: bool,
    sums: dict[str, Tensor],
) -> Tensor:
    """x, in the memory of z_T. Adds to `sums` whether x is infinite anywhere, if that matters.

    x = (z_T − z_S) − (L_T − L_S), not log q − log p: nearly equal logits subtract without rounding.
    The two parts of L are subtracted one by one: beside a large top logit the other part, which is
    all that tells two confident tokens apart, would be rounded away.
    """
    x = _difference_(z_T, z_S)
    # Where one side has no mass and the other has some, the KL to the former is infinite.
    if needs_statistics or (member.may_be_infinite and member.has_forward_kl):
        sums["nowhere_S"] = (x.amax(-1, True) == math.inf).to(x.dtype)
    if needs_statistics or (member.may_be_infinite and member.has_reverse_kl):
        sums["nowhere_T"] = (x.amin(-1, True) == -math.inf).to(x.dtype)
    x.clamp_(-HUGE, HUGE).sub_(teacher.top - student.top).sub_(teacher.rest - student.rest)
    return x


def _difference_(z_T: Tensor, z_S: Tensor) -> Tensor:
    """z_T − z_S, in the memory of z_T; 0 where both are −∞."""
    return z_T.sub_(z_S).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)


def _at(rows: Tensor, index: Tensor) -> Tensor:
    """The entry of each row [R, V] at an index [R, 1]; 0 where the index is −1."""
    return rows.gather(-1, index.clamp(min=0)).where(index >= 0, 0)


def _put_(rows: Tensor, index: Tensor, value: Tensor) -> None:
    """Set the entry of each row [R, V] at an index [R, 1]; nothing where the index is −1."""
    column = index.clamp(min=0)
    rows.scatter_(-1, column, value.where(index >= 0, rows.gather(-1, column)))


def _divergence(total: dict[str, Tensor], student: Softmax, member: Member) -> Tensor:
    """ℓ [R, 1] without its policy term; 0 for log p(ŷ), which is nothing but a policy term."""
    if member.family == Family.LOG_PROB:
        return torch.zeros_like(student.top)
    if member.family == Family.ENTROPY:
        return student.rest + total["G"]
    loss = total["loss"]
    if member.may_be_infinite:
        w_q, w_p = member.kl_weights(loss)
        limit = torch.where((w_q <= 0) & (w_p <= 0), -torch.inf, torch.inf).to(loss.dtype)
        for name, weight in (("nowhere_S", w_q), ("nowhere_T", w_p)):
            if name in total:
                loss = torch.where((total[name] > 0) & (weight != 0), limit, loss)
    return loss


def _with_policy_term(loss: Tensor, advantages: Tensor, log_p: Tensor) -> Tensor:
    """ℓ − A log p(ŷ); ℓ alone where A is 0 or ℓ is infinite."""
    given = (advantages != 0) & ~loss.isinf()
    return torch.where(given, loss - advantages * log_p, loss)


def _fill_statistics(
    statistics: Tensor,
    total: dict[str, Tensor],
    sides: list[Softmax],
    member: Member,
    divergence: Tensor,
) -> None:
    """Fill the fields whose sums are in `total`."""
    student, teacher = sides
    if member.is_divergence:
        forward = total["forward"].masked_fill(total["nowhere_S"] > 0, torch.inf)
        reverse = total["reverse"].masked_fill(total["nowhere_T"] > 0, torch.inf)
        statistics[FORWARD_KL], statistics[REVERSE_KL] = forward.squeeze(-1), reverse.squeeze(-1)
        for field, side, name in ((ENTROPY_S, student, "S"), (ENTROPY_T, teacher, "T")):
            statistics[field] = (side.rest + total[f"entropy_{name}"]).squeeze(-1)
        statistics[CLIPPED_SHARE].zero_()
        if member.entry_clip is not None:
            # Textbook terms of a KL have both signs and cancel: the stable form is the whole.
            w_q, w_p = member.kl_weights(divergence)
            kls = _counting(w_q, forward) + _counting(w_p, reverse)
            removed = total["removed"]
            whole = torch.where((w_q != 0) | (w_p != 0), kls, divergence + removed)
            share = torch.where(whole.isinf(), 1, removed / whole)
            statistics[CLIPPED_SHARE] = torch.where(removed == 0, 0, share).squeeze(-1)
    if "z_Ty" in total:
        z_Sy, z_Ty = total["z_Sy"], total["z_Ty"]
        x = (z_Ty - z_Sy).nan_to_num_(nan=0.0, posinf=HUGE, neginf=-HUGE).clamp_(-HUGE, HUGE)
        x.sub_(teacher.top - student.top).sub_(teacher.rest - student.rest)
        statistics[LOG_P] = (z_Sy - student.top - student.rest).squeeze(-1)
        statistics[LOG_Q] = (z_Ty - teacher.top - teacher.rest).squeeze(-1)
        statistics[LOG_RATIO] = x.squeeze(-1)


def _counting(weight: Tensor, value: Tensor) -> Tensor:
    """weight · value, 0 where the weight is 0, whatever the value is."""
    return torch.where(weight == 0, 0, weight * value)


def _entropy(z: Tensor, side: Softmax) -> Tensor:
    """−Σ p log p − rest [R, 1] as a sum of terms ≥ 0."""
    return (side.p * (side.top - z).clamp_(max=HUGE)).sum(-1, keepdim=True)
