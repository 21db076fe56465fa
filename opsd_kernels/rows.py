"""Rows of logits into values and gradients, in PyTorch; the family itself is in `divergence.py`.

A row's ℓ = Σ f and its gradient a − G p are made of every entry's value and score. With c = a/p at
the student's top entry, the scores a − c p are 0 there: for a confident token a − G p would
otherwise be a small difference of large numbers.

Of the student alone are the log-probability of a sampled token ŷ, which is all of the vocabulary
that the sampled-token objective needs (paper, Eq. 8), and the entropy, whose value and score are
the same:

    log p(ŷ)          ∂/∂z_S = 1[v = ŷ] − p
    −Σ p log p        f = a = p (L_S − z_S), shifted p (top_S − z_S)

A policy term −A log p(ŷ) with a constant A adds −A 1[v = ŷ] to the scores, and −A to G.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .divergence import (
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


class Softmax(NamedTuple):
    """What is known of rows of logits [R, V]."""

    p: Tensor  # [R, V]
    top: Tensor  # [R, 1], as all that follow: the two parts of L = top + rest
    rest: Tensor
    here: Tensor | None  # bool, whether the largest logit is among these columns; None: all are


class Vocabulary:
    """What is made of all columns of rows of logits [R, V], of which there is none elsewhere."""

    def softmaxes(self, *logits: Tensor) -> list[Softmax]:
        """The softmax of each."""
        return [_softmax(z) for z in logits]

    def sums(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums over all columns, [R, 1] each, of those over these columns."""
        return parts


WHOLE = Vocabulary()


def member_rows_(
    z_S: Tensor,
    z_T: Tensor | None,
    member: Member,
    needs_score: bool,
    statistics: Tensor | None = None,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> Tensor:
    """Turn rows of logits into each row's ℓ and, in place, its gradient: see `divergence_rows_`,
    `log_prob_rows_` and `entropy_rows_`. z_T may be None of what is of the student alone."""
    if member.family == Family.LOG_PROB:
        assert targets is not None
        return log_prob_rows_(z_S, z_T, targets, needs_score, statistics, known, vocabulary)
    if member.family == Family.ENTROPY:
        return entropy_rows_(z_S, needs_score, known, vocabulary)
    assert z_T is not None
    return divergence_rows_(
        z_S, z_T, member, needs_score, statistics, targets, advantages, known, vocabulary
    )


def divergence_rows_(
    z_S: Tensor,
    z_T: Tensor,
    member: Member,
    needs_score: bool,
    statistics: Tensor | None = None,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> Tensor:
    """Turn rows of logits into each row's divergence ℓ and, in place, its gradient.

    Args:
        z_S, z_T: [R, V] float32 or float64 logits after temperature. Both are overwritten: z_S by
            the gradient ∂ℓ/∂z_S = a − G p if `needs_score`, z_T by scratch.
        member: the divergence.
        needs_score: whether the gradient is wanted; without it only the values are computed.
        statistics: [STATISTICS, R], filled, the last three fields if there are `targets`.
        targets: [R] ids of sampled tokens, −1 for those that are not among the columns.
        advantages: [R] A of a policy term −A log p(ŷ) that ℓ has besides.
        known: stats [STATS, R] and top [R], filled if `needs_score`: all that `logit_gradient_`
            needs to make some columns of the gradient once more; top −1 where it is not among them.
        vocabulary: what the columns are of.

    Returns:
        [R] ℓ. An entry at −∞ on both sides counts for nothing. Where an unclipped KL whose weight
        is not 0 is infinite (no mass where the other side has some) ℓ is +∞, or −∞ if no weight is
        positive, and the row's gradient 0; as it is where log p(ŷ) is −∞ and A not 0. A NaN logit
        makes its row NaN, and no other.
    """
    student, teacher = vocabulary.softmaxes(z_S, z_T)
    p, q = student.p, teacher.p
    # Sums over these columns, by name.
    parts: dict[str, Tensor] = {}
    if statistics is not None:
        parts |= {"entropy_S": _entropy(z_S, student), "entropy_T": _entropy(z_T, teacher)}
    at_target = here = None
    if targets is not None and (statistics is not None or advantages is not None):
        at_target, here = targets[:, None].clamp(min=0), targets[:, None] >= 0
        parts["z_Sy"] = z_S.gather(-1, at_target).where(here, 0)
        if statistics is not None:
            parts["z_Ty"] = z_T.gather(-1, at_target).where(here, 0)
        if advantages is not None and needs_score:
            # 1 − p(ŷ), without the subtraction.
            p_y = p.gather(-1, at_target)
            _put(p, at_target, here, torch.zeros_like(p_y))
            parts["not_sampled"] = p.sum(-1, keepdim=True)
            _put(p, at_target, here, p_y)
    # x = (z_T − z_S) − (L_T − L_S), not log q − log p: nearly equal logits subtract without
    # rounding. The two parts of L are subtracted one by one: beside a large top logit the other,
    # which is all that tells two confident tokens apart, would be rounded away.
    x = z_T.sub_(z_S).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    # Where one side has no mass and the other has some, the KL to the former is infinite.
    if statistics is not None or (member.may_be_infinite and member.has_forward_kl):
        parts["nowhere_S"] = (x.amax(-1, True) == math.inf).to(x.dtype)
    if statistics is not None or (member.may_be_infinite and member.has_reverse_kl):
        parts["nowhere_T"] = (x.amin(-1, True) == -math.inf).to(x.dtype)
    x.clamp_(-HUGE, HUGE).sub_(teacher.top - student.top).sub_(teacher.rest - student.rest)
    if statistics is not None:
        for name, kl in (("forward", Member.of(0.0)), ("reverse", Member.of(1.0))):
            f, _ = value_and_score(p, q, x.clone(), kl, needs_score=False)
            parts[name] = f.sum(-1, keepdim=True)
            del f  # [R, V], as what follows is
        if member.entry_clip is not None:
            parts["removed"] = clipped_off(p, q, x.clone(), member).sum(-1, keepdim=True)

    f, a = value_and_score(p, q, x, member, needs_score, lambda sums: vocabulary.sums(sums)[0])
    parts["loss"] = f.sum(-1, keepdim=True)
    c = top = None
    if a is not None:
        top = p.argmax(-1, keepdim=True)
        c = a.gather(-1, top).div_(p.gather(-1, top))
        if student.here is not None:
            (c,) = vocabulary.sums(c.where(student.here, 0))
        a.addcmul_(p, c, value=-1)
        _put(a, top, student.here, torch.zeros_like(c))
        parts["G"] = a.sum(-1, keepdim=True)
    total = dict(zip(parts, vocabulary.sums(*parts.values()), strict=True))

    loss = total["loss"]
    if member.may_be_infinite:
        loss = _infinite_where(loss, total, member)
    whole = loss
    if advantages is not None:
        A = advantages[:, None]
        loss = _with_policy_term(loss, A, total["z_Sy"] - student.top - student.rest)
    if a is not None and c is not None and top is not None:
        G = total["G"]
        own_top = top if student.here is None else top.where(student.here, -1)
        torch.addcmul(a, p, G, value=-1, out=z_S)
        if advantages is not None and at_target is not None:
            g_y = z_S.gather(-1, at_target).sub_(A * total["not_sampled"])
            z_S.addcmul_(p, A)
            _put(z_S, at_target, here, g_y)
            c = c - A
        if known is not None:
            fields = (student.top, student.rest, teacher.top, teacher.rest, c + G)
            _remember(known, (*fields, z_S.gather(-1, top)), own_top)
        if member.may_be_infinite or advantages is not None:
            z_S.masked_fill_(loss.isinf(), 0)
    if statistics is not None:
        forward = total["forward"].masked_fill(total["nowhere_S"] > 0, torch.inf)
        reverse = total["reverse"].masked_fill(total["nowhere_T"] > 0, torch.inf)
        statistics[FORWARD_KL], statistics[REVERSE_KL] = forward.squeeze(-1), reverse.squeeze(-1)
        for field, side, name in ((ENTROPY_S, student, "S"), (ENTROPY_T, teacher, "T")):
            statistics[field] = (side.rest + total[f"entropy_{name}"]).squeeze(-1)
        if targets is not None:
            _log_probs(statistics, total["z_Sy"], total["z_Ty"], student, teacher)
        statistics[CLIPPED_SHARE].zero_()
        if member.entry_clip is not None:
            # A KL has terms of both signs; its stable form is right where it is small.
            w_q, w_p = member.kl_weights()
            kls = _counting(w_q, forward) + _counting(w_p, reverse)
            taken = total["removed"]
            whole = torch.where((w_q != 0) | (w_p != 0), kls, whole + taken)
            share = torch.where(whole.isinf(), 1, taken / whole)
            statistics[CLIPPED_SHARE] = torch.where(taken == 0, 0, share).squeeze(-1)
    return loss.squeeze(-1)


def log_prob_rows_(
    z_S: Tensor,
    z_T: Tensor | None,
    targets: Tensor,
    needs_score: bool,
    statistics: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> Tensor:
    """Turn rows of logits into log p(ŷ) of each row's sampled token and, in place, its gradient.

    Args:
        z_S, z_T, needs_score, statistics, known, vocabulary: as in `divergence_rows_`, the gradient
            being that of log p(ŷ), 1[v = ŷ] − p; of the statistics only the last three are filled,
            and without them z_T may be None.
        targets: [R] ids of the sampled tokens ŷ, −1 for those that are not among the columns.

    Returns:
        [R] log p(ŷ).
    """
    logits = [z_S] if statistics is None or z_T is None else [z_S, z_T]
    student, *teachers = vocabulary.softmaxes(*logits)
    p, at_target, here = student.p, targets[:, None].clamp(min=0), targets[:, None] >= 0
    z_y = [z.gather(-1, at_target).where(here, 0) for z in logits]
    others = []
    if needs_score:
        _put(p, at_target, here, torch.zeros_like(student.top))
        # 1 − p(ŷ), without the subtraction.
        others = [p.sum(-1, keepdim=True)]
    z_Sy, *found = vocabulary.sums(*z_y, *others)
    if statistics is not None:
        _log_probs(statistics, z_Sy, found[0], student, *teachers)
    log_p = (z_Sy - student.top - student.rest).squeeze(-1)
    if needs_score:
        torch.neg(p, out=z_S)
        _put(z_S, at_target, here, found[-1])
        if known is not None:
            nothing = torch.zeros_like(student.top)
            fields = (student.top, student.rest, nothing, nothing, nothing, found[-1])
            _remember(known, fields, targets[:, None])
    return log_p


def entropy_rows_(
    z_S: Tensor,
    needs_score: bool,
    known: tuple[Tensor, Tensor] | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> Tensor:
    """Turn rows of logits into each row's entropy −Σ p log p and, in place, its gradient.

    Args:
        z_S, needs_score, known, vocabulary: as in `divergence_rows_`.

    Returns:
        [R] the entropies, in nats.
    """
    (student,) = vocabulary.softmaxes(z_S)
    p = student.p
    y = torch.sub(student.top, z_S, out=z_S).clamp_(max=HUGE)
    a = y.mul_(p)
    (G,) = vocabulary.sums(a.sum(-1, keepdim=True))
    if needs_score:
        a.addcmul_(p, G, value=-1)
        if known is not None:
            top = p.argmax(-1, keepdim=True)
            nothing = torch.zeros_like(G)
            fields = (student.top, student.rest, nothing, nothing, G, a.gather(-1, top))
            _remember(known, fields, top if student.here is None else top.where(student.here, -1))
    return (student.rest + G).squeeze(-1)


def logit_gradient_(
    z_S: Tensor,
    z_T: Tensor,
    first: int,
    known: tuple[Tensor, Tensor],
    member: Member,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
) -> None:
    """Turn some columns of rows of logits, of which the whole was seen before, into the gradient
    in place.

    Args:
        z_S, z_T: [R, columns] logits; z_S is overwritten by ∂ℓ/∂z_S, z_T by scratch.
        first: the vocabulary's entry that is the first column.
        known: what `member_rows_` filled for these rows.
        member: what ℓ is.
        targets, advantages: [R] of the policy term, if ℓ has one.
    """
    stats, top = known
    _columns_gradient(z_S, z_T, stats, member)
    columns = torch.arange(first, first + z_S.shape[1], device=z_S.device)
    if targets is not None and advantages is not None:
        sampled = columns == targets[:, None]
        z_S.sub_(advantages[:, None] * sampled)
    torch.where(columns == top[:, None], stats[G_TOP, :, None], z_S, out=z_S)


# The field of what is known of a row that is the gradient of its top entry.
G_TOP = 5


def _columns_gradient(z_S: Tensor, z_T: Tensor, stats: Tensor, member: Member) -> None:
    """All but the top entry's, and the policy term at ŷ."""
    top_S, rest_S, top_T, rest_T, G = stats[:G_TOP, :, None]
    p = (z_S - top_S).exp_().mul_(rest_S.neg().exp_())
    if member.family == Family.LOG_PROB:
        torch.neg(p, out=z_S)
    elif member.family == Family.ENTROPY:
        y = torch.sub(top_S, z_S, out=z_S).clamp_(max=HUGE)
        y.sub_(G).mul_(p)
    else:
        q = (z_T - top_T).exp_().mul_(rest_T.neg().exp_())
        x = z_T.sub_(z_S).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
        x.clamp_(-HUGE, HUGE).sub_(top_T - top_S).sub_(rest_T - rest_S)
        _, a = value_and_score(p, q, x, member)
        assert a is not None
        torch.addcmul(a, p, G, value=-1, out=z_S)


def _put(rows: Tensor, at: Tensor, here: Tensor | None, value: Tensor) -> None:
    """Into each of rows [R, V] at an entry [R, 1] a value [R, 1], unless it is not here."""
    rows.scatter_(-1, at, value if here is None else value.where(here, rows.gather(-1, at)))


def _remember(known: tuple[Tensor, Tensor], fields: tuple[Tensor, ...], top: Tensor) -> None:
    """Fill what is known of rows from [R, 1] each."""
    stats, tops = known
    stats[: len(fields)] = torch.cat(fields, -1).t()
    tops.copy_(top.squeeze(-1))


def _infinite_where(loss: Tensor, total: dict[str, Tensor], member: Member) -> Tensor:
    """ℓ [R, 1], but infinite where a KL in it is: see `divergence_rows_`."""
    w_q, w_p = member.kl_weights()
    limit = torch.where((w_q <= 0) & (w_p <= 0), -torch.inf, torch.inf).to(loss.dtype)
    for name, weight in (("nowhere_S", w_q), ("nowhere_T", w_p)):
        if name in total:
            loss = torch.where((total[name] > 0) & (weight != 0), limit, loss)
    return loss


def _with_policy_term(loss: Tensor, advantages: Tensor, log_p: Tensor) -> Tensor:
    """ℓ − A log p(ŷ); where A is 0, ℓ, and where that is infinite, ℓ as well."""
    given = (advantages != 0) & ~loss.isinf()
    return torch.where(given, loss - advantages * log_p, loss)


def _counting(weight: Tensor, value: Tensor) -> Tensor:
    """weight · value, 0 where the weight is 0, whatever the value is."""
    return torch.where(weight == 0, 0, weight * value)


def _entropy(z: Tensor, side: Softmax) -> Tensor:
    """−Σ p log p − rest [R, 1] as a sum of terms ≥ 0."""
    return (side.p * (side.top - z).clamp_(max=HUGE)).sum(-1, keepdim=True)


def _log_probs(
    statistics: Tensor, z_Sy: Tensor, z_Ty: Tensor, student: Softmax, teacher: Softmax
) -> None:
    """Fill the fields of the sampled token, whose logits these are."""
    x = (z_Ty - z_Sy).nan_to_num_(nan=0.0, posinf=HUGE, neginf=-HUGE).clamp_(-HUGE, HUGE)
    x.sub_(teacher.top - student.top).sub_(teacher.rest - student.rest)
    statistics[LOG_P] = (z_Sy - student.top - student.rest).squeeze(-1)
    statistics[LOG_Q] = (z_Ty - teacher.top - teacher.rest).squeeze(-1)
    statistics[LOG_RATIO] = x.squeeze(-1)


def _softmax(z: Tensor) -> Softmax:
    """Of rows [R, V] that are all there is."""
    top = z.amax(-1, keepdim=True)
    p = (z - top).exp_()
    total = p.sum(-1, keepdim=True)
    return Softmax(p.div_(total), top, total.log_(), None)
