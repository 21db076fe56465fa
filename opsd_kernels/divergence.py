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

The sampled-token objective (paper, Eq. 8) needs of the vocabulary one log-probability only: that of
the sampled token ŷ, whose gradient is ∂ log p(ŷ) / ∂z_S = 1[v = ŷ] − p.
"""

import math
from collections.abc import Iterator
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


def divergence_name(beta: float | Tensor, entry_clip: float | None = None) -> str:
    """Name the divergence that `beta` and `entry_clip` select, for logs and plots.

    Libraries disagree on what β weighs and on which KL is "forward"; a name that says it does not.
    """
    if isinstance(beta, Tensor):
        name = "JSD(β on the teacher, token by token)"
    elif beta == 0:
        name = "forward KL(teacher‖student)"
    elif beta == 1:
        name = "reverse KL(student‖teacher)"
    else:
        name = f"JSD(β={beta:g} on the teacher)"
    return name if entry_clip is None else f"{name}, entries clipped at {entry_clip:g}"


def divergence_rows_(
    z_S: Tensor,
    z_T: Tensor,
    beta: float | Tensor,
    entry_clip: float | None,
    needs_score: bool,
    statistics: Tensor | None = None,
    targets: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    vocabulary: Vocabulary = WHOLE,
) -> Tensor:
    """Turn rows of logits into each row's divergence ℓ and, in place, its gradient.

    Args:
        z_S, z_T: [R, V] float32 or float64 logits after temperature. Both are overwritten: z_S by
            the gradient ∂ℓ/∂z_S = a − G p if `needs_score`, z_T by scratch.
        beta, entry_clip: the divergence, see the module docstring; β may be a tensor [R].
        needs_score: whether the gradient is wanted; without it only the values are computed.
        statistics: [STATISTICS, R], filled, the last three fields if there are `targets`.
        targets: [R] ids of sampled tokens, −1 for those that are not among the columns.
        known: stats [STATS, R] and top [R], filled if `needs_score`: all that `logit_gradient_`
            needs to make some columns of the gradient once more; top −1 where it is not among them.
        vocabulary: what the columns are of.

    Returns:
        [R] the divergences. An entry at −∞ on both sides counts for nothing. Where an unclipped KL
        is infinite (no mass where the other side has some) ℓ is +∞ and the row's gradient 0. A NaN
        logit makes its row NaN, and no other.
    """
    if isinstance(beta, Tensor):
        return _each_family(
            z_S, z_T, beta, entry_clip, needs_score, statistics, targets, known, vocabulary
        )
    return _one_family(
        z_S, z_T, beta, entry_clip, needs_score, statistics, targets, known, vocabulary
    )


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


def logit_gradient_(
    z_S: Tensor,
    z_T: Tensor,
    first: int,
    known: tuple[Tensor, Tensor],
    beta: float | Tensor | None,
    entry_clip: float | None,
) -> None:
    """Turn some columns of rows of logits, of which the whole was seen before, into the gradient
    in place.

    Args:
        z_S, z_T: [R, columns] logits; z_S is overwritten by ∂ℓ/∂z_S, z_T by scratch.
        first: the vocabulary's entry that is the first column.
        known: what `divergence_rows_` or, for β None, `log_prob_rows_` filled for these rows.
        beta, entry_clip: the divergence.
    """
    stats, top = known
    if isinstance(beta, Tensor):
        for rows, b in _families(beta):
            part = z_S[rows]
            _columns_gradient(part, z_T[rows], first, stats[:, rows], top[rows], b, entry_clip)
            if isinstance(rows, Tensor):  # parts are copies
                z_S[rows] = part
    else:
        _columns_gradient(z_S, z_T, first, stats, top, beta, entry_clip)


def _columns_gradient(
    z_S: Tensor,
    z_T: Tensor,
    first: int,
    stats: Tensor,
    top: Tensor,
    beta: float | Tensor | None,
    entry_clip: float | None,
) -> None:
    top_S, rest_S, top_T, rest_T, G, g_top = stats[:6, :, None]
    p = (z_S - top_S).exp_().mul_(rest_S.neg().exp_())
    if beta is None:
        g = p.neg_()
    else:
        q = (z_T - top_T).exp_().mul_(rest_T.neg().exp_())
        x = z_T.sub_(z_S).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
        x.clamp_(-HUGE, HUGE).sub_(top_T - top_S).sub_(rest_T - rest_S)
        _, a = value_and_score(p, q, x, beta, entry_clip)
        assert a is not None
        g = a.addcmul_(p, G, value=-1)
    columns = torch.arange(first, first + z_S.shape[1], device=z_S.device)
    torch.where(columns == top[:, None], g_top, g, out=z_S)


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
    known: tuple[Tensor, Tensor] | None,
    vocabulary: Vocabulary,
) -> Tensor:
    """`divergence_rows_` for a β of each row: the rows of one formula at a time."""
    loss = z_S.new_empty(z_S.shape[0])
    for rows, b in _families(beta):
        part_S, part_T = z_S[rows], z_T[rows]
        part = None if statistics is None else statistics[:, rows]
        part_targets = None if targets is None else targets[rows]
        part_known = None if known is None else (known[0][:, rows], known[1][rows])
        loss[rows] = _one_family(
            part_S, part_T, b, entry_clip, needs_score, part, part_targets, part_known, vocabulary
        )
        if isinstance(rows, Tensor):  # parts are copies
            if needs_score:
                z_S[rows] = part_S
            if known is not None and part_known is not None:
                known[0][:, rows], known[1][rows] = part_known
            if statistics is not None and part is not None:
                statistics[:, rows] = part
    return loss


def _families(beta: Tensor) -> Iterator[tuple[Tensor | slice, float | Tensor]]:
    """Rows that share a formula, and their β, as [·, 1] for the JSDs. Reads what beta holds: on a
    GPU too old for the kernels the host waits for that."""
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
    beta: float | Tensor,
    entry_clip: float | None,
    needs_score: bool,
    statistics: Tensor | None,
    targets: Tensor | None,
    known: tuple[Tensor, Tensor] | None,
    vocabulary: Vocabulary,
) -> Tensor:
    student, teacher = vocabulary.softmaxes(z_S, z_T)
    p, q = student.p, teacher.p
    # Sums over these columns, by name.
    parts: dict[str, Tensor] = {}
    if statistics is not None:
        parts |= {"entropy_S": _entropy(z_S, student), "entropy_T": _entropy(z_T, teacher)}
        if targets is not None:
            at_target, here = targets[:, None].clamp(min=0), targets[:, None] >= 0
            parts["z_Sy"] = z_S.gather(-1, at_target).where(here, 0)
            parts["z_Ty"] = z_T.gather(-1, at_target).where(here, 0)
    # x = (z_T − z_S) − (L_T − L_S), not log q − log p: nearly equal logits subtract without
    # rounding. The two parts of L are subtracted one by one: beside a large top logit the other,
    # which is all that tells two confident tokens apart, would be rounded away.
    x = z_T.sub_(z_S).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    unclipped_kl = entry_clip is None and not isinstance(beta, Tensor)
    for kl in (0, 1):
        if statistics is not None or (unclipped_kl and beta == kl):
            nowhere = (x.amax(-1, True) if kl == 0 else -x.amin(-1, True)) == math.inf
            parts[f"nowhere_{kl}"] = nowhere.to(x.dtype)
    x.clamp_(-HUGE, HUGE).sub_(teacher.top - student.top).sub_(teacher.rest - student.rest)
    if statistics is not None:
        for kl in (0, 1):
            f, _ = value_and_score(p, q, x.clone(), kl, None, needs_score=False)
            parts[f"kl_{kl}"] = f.sum(-1, keepdim=True)
        if entry_clip is not None:
            excess = _textbook(p, q, x, beta).sub_(entry_clip).clamp_(min=0)
            parts["removed"] = excess.sum(-1, keepdim=True)
            del excess  # [R, V], as what follows is

    f, a = value_and_score(p, q, x, beta, entry_clip, needs_score, vocabulary)
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

    infinite: dict[float | Tensor, Tensor] = {
        kl: total[f"nowhere_{kl}"] > 0 for kl in (0, 1) if f"nowhere_{kl}" in total
    }
    loss = total["loss"]
    if unclipped_kl and beta in infinite:
        loss = loss.masked_fill(infinite[beta], torch.inf)
    if a is not None and c is not None and top is not None:
        G = total["G"]
        if known is not None:
            fields = (student.top, student.rest, teacher.top, teacher.rest, c + G)
            own_top = top if student.here is None else top.where(student.here, -1)
            _remember(known, (*fields, -G * p.gather(-1, top)), own_top)
        torch.addcmul(a, p, G, value=-1, out=z_S)
        if unclipped_kl and beta in infinite:
            z_S.masked_fill_(infinite[beta], 0)
    if statistics is not None:
        for field, kl in ((FORWARD_KL, 0), (REVERSE_KL, 1)):
            statistics[field] = total[f"kl_{kl}"].masked_fill(infinite[kl], torch.inf).squeeze(-1)
        for field, side, name in ((ENTROPY_S, student, "S"), (ENTROPY_T, teacher, "T")):
            statistics[field] = (side.rest + total[f"entropy_{name}"]).squeeze(-1)
        if targets is not None:
            _log_probs(statistics, total["z_Sy"], total["z_Ty"], student, teacher)
        statistics[CLIPPED_SHARE] = 0
        if entry_clip is not None:
            # Of a KL by the form that is right where it is small, and its terms have both signs.
            taken, whole = total["removed"].squeeze(-1), (loss + total["removed"]).squeeze(-1)
            if not isinstance(beta, Tensor) and beta in (0, 1):
                whole = statistics[FORWARD_KL if beta == 0 else REVERSE_KL]
            share = torch.where(whole == torch.inf, 1, taken / whole)
            statistics[CLIPPED_SHARE] = torch.where(taken == 0, 0, share)
    return loss.squeeze(-1)


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


def _textbook(p: Tensor, q: Tensor, x: Tensor, beta: float | Tensor) -> Tensor:
    """The values that an entry clip is defined on: of the KLs those without the null term."""
    if isinstance(beta, Tensor) or 0 < beta < 1:
        return value_and_score(p, q, x.clone(), beta, None, needs_score=False)[0]
    return x * q if beta == 0 else -x * p


def value_and_score(
    p: Tensor,
    q: Tensor,
    x: Tensor,
    beta: float | Tensor,
    entry_clip: float | None,
    needs_score: bool = True,
    vocabulary: Vocabulary = WHOLE,
) -> tuple[Tensor, Tensor | None]:
    """Value f (stable form) and score a of every vocabulary entry.

    Args:
        p, q: [R, V] probabilities of student and teacher.
        x: [R, V] finite log-ratio log q − log p. Overwritten.
        beta, entry_clip: the divergence, see the module docstring. β may be a tensor [R, 1] of
            JSDs, all with β ≤ ½ or all above.
        needs_score: without it a is None and costs nothing.
        vocabulary: what the columns are of.

    Returns:
        f and a, each [R, V]; for the KLs both carry the null term.
    """
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
