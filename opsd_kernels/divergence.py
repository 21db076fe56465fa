"""The family of divergences, entry by entry: value f and score a, in PyTorch.

Notation (used everywhere in this package):

    h_S, h_T  [N, D]    last hidden states of student and teacher, one row a token
    W         [V, D]    LM head
    z_S, z_T  [N, V]    logits h Wᵀ / T, temperature T; always fp32 or wider
    L_S, L_T  [N]       log-sum-exp of a row of logits
    p, q      [N, V]    softmax of z_S (student) and of z_T (teacher)
    x                   log q − log p, the log-ratio; small where the two agree
    m                   β q + (1 − β) p, the mixture: β weighs the TEACHER (OPSD paper, Eq. 6)
    f, a                value of an entry, and its score a = p ∂f/∂p
    G         [N]       Σ_v a_v

A token's divergence is ℓ = Σ_v f_v and, for every member of the family,

    ∂ℓ/∂z_S = a − G p.

    divergence           β          value f                                score a
    JSD_β                0 < β < 1  β q log(q/m) + (1−β) p log(p/m)        −(1−β) p log(m/p)
    forward KL(q‖p)      β = 0      q x                                    −q
    reverse KL(p‖q)      β = 1      −p x                                   p (1 − x)

β = 0 and β = 1 *name* the two KLs, as everywhere in the field. Eq. 6 itself vanishes at both ends,
so the family jumps there: β = 0.01 gives about a hundredth of the forward KL.

With an entry clip τ each value is min(f, τ) before the sum, and the score of a clipped entry is 0.
A clipped KL can be negative: its negative entries are not clipped.

Values. Self-distillation lives where p ≈ q, and there the textbook values cancel to noise. Those
computed here have the same sum and are second order in x, entry by entry, with nothing subtracted
that was exponentiated first. JSD_β, for β ≤ ½ (else with p, q, x, β exchanged for q, p, −x, 1 − β,
which leaves it as it is):

    f = p (β (1 + t) (x − lm) − (1 − β) lm),   t = expm1(x),   lm = log(m/p) = log1p(β t)

The KLs, with u = −|x|, t = expm1(u) and base = max(p, q); the reverse KL is the forward KL with
p, q and x exchanged likewise:

    forward KL   base ((1 + t) u − t)  where x ≤ 0, else  base (t − u)           = q x + p − q
    reverse KL   base (t − u)          where x ≤ 0, else  base ((1 + t) u − t)   = −p x + q − p

Their null term ±(p − q) sums to zero over the vocabulary. A clipped entry carries it too, so that
the clipped sum keeps the accuracy of the others, unless most of the row's mass is clipped.

Scores. a ← a − c p, G ← G − c leaves a − G p as it is for any c. The null term shifts the scores of
the KLs so, to p − q and −p x, and that of a clipped entry to ±p: none is then a small difference of
large numbers. With c = a/p at the student's top entry besides, the score of that entry is exactly
0; otherwise, for a confident token, a − G p would be such a difference.

Both halves with weights of their own, w_q KL(q‖m) + w_p KL(p‖m): of the JSD's m these are skewed
KLs, of which the JSD is that with w_q = β and w_p = 1 − β; without a β, KL(q‖p) and KL(p‖q). Entry
by entry, with κ = w_p β − w_q (1 − β), or w_p − w_q without a β,

    value   w_q q log(q/m) + w_p p log(p/m)  + κ (q − p)
    score   −w_p p log(m/p) + κ p (q − m)/m      without a β: w_q (p − q) − w_p p x

The null term κ (q − p), which also sums to zero, makes of each half a sum of terms ≥ 0: q (e^−d − 1
+ d) with d = log(q/m), and p (β t − lm). The score is shifted by it, and that of a clipped entry is
−κ p.

Of the student alone are the log-probability of a sampled token ŷ, which is all of the vocabulary
that the sampled-token objective needs (paper, Eq. 8), and the entropy, whose value and score are
the same:

    log p(ŷ)          ∂/∂z_S = 1[v = ŷ] − p
    −Σ p log p        f = a = p (L_S − z_S), shifted p (top_S − z_S)

A policy term −A log p(ŷ) with a constant A adds −A 1[v = ŷ] to the scores, and −A to G.
"""

import math
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

# Log-ratios are held within ±HUGE, so that 0 · x stays 0 where one side is −∞ and the other not.
HUGE = 1e30
# Above this log-ratio the JSD of an entry no longer depends on it, and eˣ still fits fp32.
SATURATED = 80.0

# What `token_divergence` tells of a token beside its loss: the fields of [STATISTICS, N] fp32. The
# last three are those of a sampled token ŷ: log p(ŷ), log q(ŷ), and their difference log q − log p.
(FORWARD_KL, REVERSE_KL, ENTROPY_S, ENTROPY_T, CLIPPED_SHARE, LOG_P, LOG_Q, LOG_RATIO) = range(8)
STATISTICS = 8


class Halves(NamedTuple):
    """w_q KL(q‖m) + w_p KL(p‖m)."""

    w_q: Tensor  # [R], as is …
    w_p: Tensor  # … this
    beta: float | None  # of m; None for KL(q‖p) and KL(p‖q)

    def rows(self, rows: Tensor | slice) -> "Halves":
        return self._replace(w_q=self.w_q[rows], w_p=self.w_p[rows])


class Alone(Enum):
    """What is of the student alone, and no divergence."""

    LOG_PROB = "log p(ŷ)"
    ENTROPY = "entropy"


# What a token's ℓ is: the divergence of a β, of all tokens or [R] of each, or of two weights; or
# what is of the student alone.
Member = float | Tensor | Halves | Alone


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
    entry_clip: float | None,
    needs_score: bool,
    statistics: Tensor | None = None,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> Tensor:
    """Turn rows of logits into each row's ℓ and, in place, its gradient: see `divergence_rows_`,
    `log_prob_rows_` and `entropy_rows_`. z_T may be None of what is of the student alone."""
    if member is Alone.LOG_PROB:
        assert targets is not None
        return log_prob_rows_(z_S, z_T, targets, needs_score, statistics, known, vocabulary)
    if member is Alone.ENTROPY:
        return entropy_rows_(z_S, needs_score, known, vocabulary)
    assert z_T is not None
    return divergence_rows_(
        z_S, z_T, member, entry_clip, needs_score, statistics, targets, advantages, known,
        vocabulary,
    )  # fmt: skip


def divergence_rows_(
    z_S: Tensor,
    z_T: Tensor,
    member: float | Tensor | Halves,
    entry_clip: float | None,
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
        member, entry_clip: the divergence, see the module docstring.
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
    if isinstance(member, Tensor):
        return _each_family(
            z_S, z_T, member, entry_clip, needs_score, statistics, targets, advantages, known,
            vocabulary,
        )  # fmt: skip
    return _one_family(
        z_S, z_T, member, entry_clip, needs_score, statistics, targets, advantages, known,
        vocabulary,
    )  # fmt: skip


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
    entry_clip: float | None,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
) -> None:
    """Turn some columns of rows of logits, of which the whole was seen before, into the gradient
    in place.

    Args:
        z_S, z_T: [R, columns] logits; z_S is overwritten by ∂ℓ/∂z_S, z_T by scratch.
        first: the vocabulary's entry that is the first column.
        known: what `member_rows_` filled for these rows.
        member, entry_clip: what ℓ is.
        targets, advantages: [R] of the policy term, if ℓ has one.
    """
    stats, top = known
    if isinstance(member, Tensor):
        for rows, b in _families(member):
            part = z_S[rows]
            _columns_gradient(part, z_T[rows], stats[:, rows], b, entry_clip)
            if isinstance(rows, Tensor):  # parts are copies
                z_S[rows] = part
    else:
        _columns_gradient(z_S, z_T, stats, member, entry_clip)
    columns = torch.arange(first, first + z_S.shape[1], device=z_S.device)
    if targets is not None and advantages is not None:
        sampled = columns == targets[:, None]
        z_S.sub_(advantages[:, None] * sampled)
    torch.where(columns == top[:, None], stats[G_TOP, :, None], z_S, out=z_S)


# The field of what is known of a row that is the gradient of its top entry.
G_TOP = 5


def _columns_gradient(
    z_S: Tensor, z_T: Tensor, stats: Tensor, member: Member, entry_clip: float | None
) -> None:
    """All but the top entry's, and the policy term at ŷ."""
    top_S, rest_S, top_T, rest_T, G = stats[:G_TOP, :, None]
    p = (z_S - top_S).exp_().mul_(rest_S.neg().exp_())
    if member is Alone.LOG_PROB:
        torch.neg(p, out=z_S)
    elif member is Alone.ENTROPY:
        y = torch.sub(top_S, z_S, out=z_S).clamp_(max=HUGE)
        y.sub_(G).mul_(p)
    else:
        q = (z_T - top_T).exp_().mul_(rest_T.neg().exp_())
        x = z_T.sub_(z_S).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
        x.clamp_(-HUGE, HUGE).sub_(top_T - top_S).sub_(rest_T - rest_S)
        _, a = value_and_score(p, q, x, member, entry_clip)
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


def _each_family(
    z_S: Tensor,
    z_T: Tensor,
    beta: Tensor,
    entry_clip: float | None,
    needs_score: bool,
    statistics: Tensor | None,
    targets: Tensor | None,
    advantages: Tensor | None,
    known: tuple[Tensor, Tensor] | None,
    vocabulary: Vocabulary,
) -> Tensor:
    """`divergence_rows_` for a β of each row: the rows of one formula at a time."""
    loss = z_S.new_empty(z_S.shape[0])
    for rows, b in _families(beta):
        part_S, part_T = z_S[rows], z_T[rows]
        part = None if statistics is None else statistics[:, rows]
        part_targets = None if targets is None else targets[rows]
        part_advantages = None if advantages is None else advantages[rows]
        part_known = None if known is None else (known[0][:, rows], known[1][rows])
        loss[rows] = _one_family(
            part_S, part_T, b, entry_clip, needs_score, part, part_targets, part_advantages,
            part_known, vocabulary,
        )  # fmt: skip
        if isinstance(rows, Tensor):  # parts are copies
            if needs_score:
                z_S[rows] = part_S
            if known is not None and part_known is not None:
                known[0][:, rows], known[1][rows] = part_known
            if statistics is not None and part is not None:
                statistics[:, rows] = part
    return loss


def _families(beta: Tensor) -> Iterator[tuple[Tensor | slice, float | Tensor]]:
    """Rows that share a formula, and their β, as [·, 1] for the JSDs. Reads what beta holds: the
    host waits for a GPU too old for the kernels, or that shares the vocabulary with others."""
    forward, reverse, below = beta == 0, beta == 1, (beta > 0) & (beta <= 0.5)
    above = ~(forward | reverse | below)
    for member, b in ((forward, 0.0), (reverse, 1.0), (below, None), (above, None)):
        rows = member.nonzero().squeeze(-1)
        if rows.numel() == 0:
            continue
        of_all = rows.numel() == beta.numel()  # then no copies are made
        yield slice(None) if of_all else rows, beta[rows, None] if b is None else b


def _one_family(
    z_S: Tensor,
    z_T: Tensor,
    member: float | Tensor | Halves,
    entry_clip: float | None,
    needs_score: bool,
    statistics: Tensor | None,
    targets: Tensor | None,
    advantages: Tensor | None,
    known: tuple[Tensor, Tensor] | None,
    vocabulary: Vocabulary,
) -> Tensor:
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
    kls = _unclipped_kls(member) if entry_clip is None else {}
    for kl in (0, 1):
        if statistics is not None or kl in kls:
            nowhere = (x.amax(-1, True) if kl == 0 else -x.amin(-1, True)) == math.inf
            parts[f"nowhere_{kl}"] = nowhere.to(x.dtype)
    x.clamp_(-HUGE, HUGE).sub_(teacher.top - student.top).sub_(teacher.rest - student.rest)
    if statistics is not None:
        for kl in (0, 1):
            f, _ = value_and_score(p, q, x.clone(), kl, None, needs_score=False)
            parts[f"kl_{kl}"] = f.sum(-1, keepdim=True)
        if entry_clip is not None:
            excess = _textbook(p, q, x, member).sub_(entry_clip).clamp_(min=0)
            parts["removed"] = excess.sum(-1, keepdim=True)
            del excess  # [R, V], as what follows is

    f, a = value_and_score(p, q, x, member, entry_clip, needs_score, vocabulary)
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

    infinite = {kl: total[f"nowhere_{kl}"] > 0 for kl in (0, 1) if f"nowhere_{kl}" in total}
    loss = total["loss"]
    limit = _limit(member)
    for kl, counts in kls.items():
        loss = torch.where(infinite[kl] & counts, limit, loss)
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
        if kls or advantages is not None:
            z_S.masked_fill_(loss.isinf(), 0)
    if statistics is not None:
        for field, kl in ((FORWARD_KL, 0), (REVERSE_KL, 1)):
            statistics[field] = total[f"kl_{kl}"].masked_fill(infinite[kl], torch.inf).squeeze(-1)
        for field, side, name in ((ENTROPY_S, student, "S"), (ENTROPY_T, teacher, "T")):
            statistics[field] = (side.rest + total[f"entropy_{name}"]).squeeze(-1)
        if targets is not None:
            _log_probs(statistics, total["z_Sy"], total["z_Ty"], student, teacher)
        statistics[CLIPPED_SHARE].zero_()
        if entry_clip is not None:
            # Of a KL by the form that is right where it is small, and its terms have both signs.
            taken, whole = total["removed"].squeeze(-1), (whole + total["removed"]).squeeze(-1)
            if isinstance(member, Halves) and member.beta is None:
                whole = _counting(member.w_q, statistics[FORWARD_KL])
                whole = whole + _counting(member.w_p, statistics[REVERSE_KL])
            elif not isinstance(member, Tensor | Halves) and member in (0, 1):
                whole = statistics[FORWARD_KL if member == 0 else REVERSE_KL]
            share = torch.where(whole.isinf(), 1, taken / whole)
            statistics[CLIPPED_SHARE] = torch.where(taken == 0, 0, share)
    return loss.squeeze(-1)


def _unclipped_kls(member: float | Tensor | Halves) -> dict[int, Tensor | bool]:
    """The KLs between both sides, 0 forward and 1 reverse, that ℓ is made of; of which rows."""
    if isinstance(member, Halves):
        if member.beta is None:
            return {0: member.w_q[:, None] != 0, 1: member.w_p[:, None] != 0}
    elif not isinstance(member, Tensor) and member in (0, 1):
        return {int(member): True}
    return {}


def _limit(member: float | Tensor | Halves) -> Tensor | float:
    """What ℓ is where a KL is infinite."""
    if isinstance(member, Halves):
        descends = ((member.w_q <= 0) & (member.w_p <= 0))[:, None]
        return torch.where(descends, -torch.inf, torch.inf).to(member.w_q.dtype)
    return torch.inf


def _with_policy_term(loss: Tensor, advantages: Tensor, log_p: Tensor) -> Tensor:
    """ℓ − A log p(ŷ); where A is 0, ℓ, and where that is infinite, ℓ as well."""
    given = (advantages != 0) & ~loss.isinf()
    return torch.where(given, loss - advantages * log_p, loss)


def _counting(weight: Tensor, value: Tensor) -> Tensor:
    """weight · value, 0 where the weight is, whatever the value is."""
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


def _textbook(p: Tensor, q: Tensor, x: Tensor, member: float | Tensor | Halves) -> Tensor:
    """The values that an entry clip is defined on: of the KLs those without the null term."""
    if isinstance(member, Halves):
        textbook = _of_halves(p, q, x.clone(), member, False, needs_textbook=True)[2]
        assert textbook is not None
        return textbook
    if isinstance(member, Tensor) or 0 < member < 1:
        return value_and_score(p, q, x.clone(), member, None, needs_score=False)[0]
    return x * q if member == 0 else -x * p


def value_and_score(
    p: Tensor,
    q: Tensor,
    x: Tensor,
    member: float | Tensor | Halves,
    entry_clip: float | None,
    needs_score: bool = True,
    vocabulary: Vocabulary = WHOLE,
) -> tuple[Tensor, Tensor | None]:
    """Value f (stable form) and score a of every vocabulary entry.

    Args:
        p, q: [R, V] probabilities of student and teacher.
        x: [R, V] finite log-ratio log q − log p. Overwritten.
        member, entry_clip: the divergence, see the module docstring. β may be a tensor [R, 1] of
            JSDs, all with β ≤ ½ or all above.
        needs_score: without it a is None and costs nothing.
        vocabulary: what the columns are of.

    Returns:
        f and a, each [R, V]; for the KLs, and of halves, both carry the null term.
    """
    if isinstance(member, Halves):
        f, a, textbook = _of_halves(p, q, x, member, needs_score, entry_clip is not None)
        if textbook is not None and entry_clip is not None:
            clipped, kappa = textbook > entry_clip, _kappa(member)
            torch.where(clipped, (q - p).mul_(kappa).add_(entry_clip), f, out=f)
            # See `_clip_kullback_leibler`.
            taken = [(side * clipped).sum(-1, keepdim=True) for side in (p, q)]
            plain = torch.maximum(*vocabulary.sums(*taken)) > 0.5
            torch.where(plain, textbook.clamp_(max=entry_clip), f, out=f)
            if a is not None:
                torch.where(clipped, p * -kappa, a, out=a)
        return f, a
    beta = member
    # Exchanging keeps β ≤ ½; beyond, the form of the JSD would cancel by another 1/(1 − β).
    exchanged = bool((beta > 0.5).any()) if isinstance(beta, Tensor) else beta > 0.5
    P, Q, b, y = (q, p, 1 - beta, x.neg_()) if exchanged else (p, q, beta, x)
    if isinstance(b, Tensor) or b > 0:
        f, a = _jensen_shannon(P, Q, b, y, exchanged, needs_score)
        if entry_clip is not None:
            if a is not None:
                a.masked_fill_(f > entry_clip, 0)
            f.clamp_(max=entry_clip)
        return f, a

    f, a = _kullback_leibler(P, Q, y, exchanged, needs_score)
    if entry_clip is not None:
        f, clipped = _clip_kullback_leibler(f, P, Q, y, entry_clip, vocabulary)
        if a is not None:
            a = torch.where(clipped, -Q if exchanged else P, a)
    return f, a


def _kappa(halves: Halves) -> Tensor:
    """κ [R, 1] of the null term."""
    w_q, w_p, beta = halves
    kappa = w_p - w_q if beta is None else w_p * beta - w_q * (1 - beta)
    return kappa[:, None]


def _of_halves(
    p: Tensor, q: Tensor, x: Tensor, halves: Halves, needs_score: bool, needs_textbook: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Value and score with the null term, and the value without it; overwrites x."""
    of_halves = _of_both_kls if halves.beta is None else _of_skewed_kls
    return of_halves(p, q, x, halves, needs_score, needs_textbook)


def _of_both_kls(
    p: Tensor, q: Tensor, x: Tensor, halves: Halves, needs_score: bool, needs_textbook: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    w_q, w_p = halves.w_q[:, None], halves.w_p[:, None]
    # As in `_kullback_leibler`, of which the reverse KL is the other half.
    base, positive = torch.maximum(p, q), torch.gt(x, 0, out=torch.empty_like(x))
    u = x.abs().neg_()
    t = torch.expm1(u)
    a = None
    if needs_score:
        # p − q, without the subtraction where it would cancel.
        a = torch.mul(base, t).copysign_(x).neg_().mul_(w_q)
        a.sub_(torch.mul(x, p).mul_(w_p))
    near = (t + 1).mul_(u).sub_(t)
    far = t.sub_(u)
    f = near.lerp(far, positive).clamp_(min=0).mul_(w_q)
    f.add_(far.lerp_(near, positive).clamp_(min=0).mul_(w_p)).mul_(base)
    del base, positive, u, t, near, far
    textbook = x.mul_((q * w_q).sub_(p * w_p)) if needs_textbook else None
    return f, a, textbook


def _of_skewed_kls(
    p: Tensor, q: Tensor, x: Tensor, halves: Halves, needs_score: bool, needs_textbook: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    w_q, w_p, beta = halves.w_q[:, None], halves.w_p[:, None], halves.beta
    assert beta is not None
    # As in `value_and_score`.
    exchanged = beta > 0.5
    P, Q, b, y = (q, p, 1 - beta, x.neg_()) if exchanged else (p, q, beta, x)
    w_P, w_Q = (w_q, w_p) if exchanged else (w_p, w_q)
    y.clamp_(max=SATURATED)
    near = (y > -0.5) & (y < 0.5)
    t = torch.expm1(y)
    lm = torch.mul(t, b).log1p_()  # log(m/P)
    d = y.sub_(lm)  # log(Q/m)
    Q_minus_P = Q - P
    f = torch.expm1(-d).add_(d).mul_(Q)
    far = torch.mul(Q, d).sub_(Q_minus_P, alpha=1 - b)
    torch.where(near, f, far, out=f).clamp_(min=0).mul_(w_Q)
    of_P = torch.mul(t, b, out=far).sub_(lm).mul_(P)
    far = Q_minus_P.mul_(b).addcmul_(P, lm, value=-1)
    f.add_(torch.where(near, of_P, far, out=of_P).clamp_(min=0).mul_(w_P))
    del Q_minus_P, of_P, far
    textbook = None
    if needs_textbook:
        textbook = torch.mul(Q, d).mul_(w_Q).sub_(torch.mul(P, lm).mul_(w_P))
    a = None
    if needs_score:
        # (q − m)/m, or (P − m)/m where sides are exchanged, by κ.
        off = t.div_((t * b).add_(1)).mul_(-b if exchanged else 1 - b).mul_(_kappa(halves))
        a = d.mul_(w_Q) if exchanged else lm.mul_(w_P).neg_()
        a.add_(off).mul_(Q if exchanged else P)
    return f, a, textbook


def _jensen_shannon(
    P: Tensor, Q: Tensor, b: float | Tensor, y: Tensor, exchanged: bool, needs_score: bool
) -> tuple[Tensor, Tensor | None]:
    y.clamp_(max=SATURATED)
    t = torch.expm1(y)
    lm = torch.mul(t, b).log1p_()  # log(m/P)
    d = y.sub_(lm)  # log(Q/m)
    a = None
    if needs_score:
        a = torch.mul(d, Q).mul_(b) if exchanged else torch.mul(lm, P).mul_(b - 1)
    f = t.add_(1).mul_(b).mul_(d).sub_(lm.mul_(1 - b))
    # Past saturation P has no digits left, and Q e^−y stands for it.
    scale = torch.maximum(P, Q * math.exp(-SATURATED))
    return f.mul_(scale).clamp_(min=0), a


def _kullback_leibler(
    P: Tensor, Q: Tensor, y: Tensor, exchanged: bool, needs_score: bool
) -> tuple[Tensor, Tensor | None]:
    base = torch.maximum(P, Q)
    # Selecting by lerp with a float mask is many times faster on a CPU than torch.where.
    positive = torch.gt(y, 0, out=torch.empty_like(y))
    u = y.abs().neg_()
    t = torch.expm1(u)
    a = None
    if needs_score:
        # P − Q = −base t where y ≤ 0, else base t
        a = Q * y if exchanged else (base * t).mul_(positive.mul(2).sub_(1))
    near = (t + 1).mul_(u).sub_(t)
    far = t.sub_(u)
    return near.lerp_(far, positive).mul_(base).clamp_(min=0), a


def _clip_kullback_leibler(
    f: Tensor, P: Tensor, Q: Tensor, y: Tensor, entry_clip: float, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Values clipped, and which entries are. Overwrites y."""
    textbook = y.mul_(Q)
    clipped = textbook > entry_clip
    f = torch.where(clipped, (P - Q).add_(entry_clip), f)
    # The null term trades the rounding of the unclipped mass for that of the clipped: where the
    # clip takes most of a row, the row is better off without.
    (mass,) = vocabulary.sums((Q * clipped).sum(-1, keepdim=True))
    return torch.where(mass > 0.5, textbook.clamp_(max=entry_clip), f), clipped


def _softmax(z: Tensor) -> Softmax:
    """Of rows [R, V] that are all there is."""
    top = z.amax(-1, keepdim=True)
    p = (z - top).exp_()
    total = p.sum(-1, keepdim=True)
    return Softmax(p.div_(total), top, total.log_(), None)
