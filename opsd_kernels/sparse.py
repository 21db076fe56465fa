"""A divergence from a sparse teacher, which gives K ids and log-probabilities at each position."""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .checks import Arguments, check_arguments, check_workspace, is_readable
from .divergence import HUGE
from .heads.head import LMHead
from .loss import Reduction, either_divergence, reduce_tokens
from .rest import logits_and_rest
from .scalars import check_bool
from .support import divergence_of_rows, first_slots, log_softmax, with_rest

Outside = Literal["bucket", "renormalize", "ignore"]

# A log q that is not above this marks an absent slot. Servers write −9999 for −∞, which JSON lacks;
# it is still below when it was rounded to bf16 or divided by a T up to 9. No softmax in fp32 of
# logits within ±500 gives so little.
ABSENT = -1000.0
# The least value of 1 − Σ q, the teacher's mass outside the ids: log-probabilities in fp32 do not
# tell less from 0.
LEAST_REST = 1e-7
# The least log q_r with "ignore", which does not compare q_r: as good as −∞, but finite.
LEAST_LOG = -69.0


class TopKLoss(NamedTuple):
    """Loss and statistics of every token, from `fused_top_k_loss` with `return_statistics`. Only
    `loss` has a gradient, and only `loss` is weighted. The others are fp32 [...]."""

    loss: Tensor
    """fp32 scalar, or [...] with reduction "none"."""
    mass_student: Tensor
    """Σ p over the ids: the student's mass on the teacher's tokens."""
    mass_teacher: Tensor
    """Σ q over the ids, as given. It is above 1 if `log_q` is not of a distribution."""
    entropy_student: Tensor
    """−Σ p log p over the whole vocabulary, in nats."""
    logp_student: Tensor | None
    """log p of the target; None without `targets`."""


def fused_top_k_loss(
    h_student: Tensor,
    W: Tensor | LMHead,
    ids: Tensor,
    log_q: Tensor,
    *,
    log_q_rest: Tensor | None = None,
    outside: Outside = "bucket",
    beta: float | Tensor = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    targets: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    workspace_mib: float | None = None,
    return_statistics: bool = False,
) -> Tensor | TopKLoss:
    """Divergence from a teacher that gives K tokens and their log-probabilities at each position,
    as a server does. It is computed from the student's hidden states and LM head, without [N, V]
    logits.

    Each token has the student's p = softmax(h_student Wᵀ / T), the teacher's q, and a support S of
    K ids. All other tokens together have p_r and q_r. D is the divergence that `beta` names in
    `fused_jsd_loss`, a sum of terms f(p, q). `outside` says how the other tokens count:

        "bucket"         D of (p_1 … p_K, p_r) and (q_1 … q_K, q_r): the others are one more entry.
        "renormalize"    D of p and q, each divided by its sum over S. Only K rows of W are read.
                         With K = 1 the loss is 0.
        "ignore"         Σ_S f(p, q). A KL can then be negative: the forward KL where p has more
                         mass on S than q, the reverse KL where p has less.

    The gradient is exact: with "bucket" and "ignore" the logits outside S have a gradient too.

    Args:
        h_student: [..., D], see `fused_jsd_loss`. The gradient flows into them, and into `W` if it
            requires grad.
        W: [V, D] LM head, or an `LMHead`; see `fused_jsd_loss`.
        ids: [..., K] the tokens of S, in any order, of any integer dtype, K ≤ 512. Of equal ids the
            first counts.
        log_q: [..., K] float, the teacher's log-probabilities of these tokens at temperature T; a
            constant. A slot is absent where log_q is NaN or at most −1000 (servers write −9999 for
            −∞), or where its id is negative or not in the vocabulary. A token without a slot has
            loss 0; its weight still counts in a mean.
        log_q_rest: [...] float, log q_r. By default, and where it is NaN, log(1 − Σ q), and at
            least log 1e-7, since log-probabilities in fp32 do not tell less from 0. If
            (q_1 … q_K, q_r) does not sum to 1, it is divided by its sum. Not used with
            "renormalize". Where S has every token that the student's head allows, q_r counts as 0.
        outside: "bucket", "renormalize" or "ignore".
        beta, entry_clip: see `fused_jsd_loss`. Many train on top-k teachers with the forward KL,
            `beta=0`.
        temperature: T divides the student's logits alone. vLLM's prompt log-probabilities are those
            of temperature 1, whatever the request says. With another T they can only be used with
            "renormalize": pass log_q / T.
        targets: [...] ids of the sampled tokens, for `logp_student`; see `token_divergence`.
        token_weights, reduction, workspace_mib: see `fused_jsd_loss`.
        return_statistics: whether to return a `TopKLoss`. With "renormalize" the statistics take a
            pass over the vocabulary.

    Returns:
        fp32 scalar, or [...] with reduction "none"; with `return_statistics` a `TopKLoss`.

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """
    arguments = check_arguments(
        {"h_student": h_student},
        W,
        either_divergence(beta, entry_clip, None),
        ids=("ids", ids),
        targets=targets,
        temperature=temperature,
        token_weights=token_weights,
        reduction=reduction,
    )
    weights = arguments.weights
    check_sparse(ids, log_q, log_q_rest, outside, targets, return_statistics, weights)
    workspace_bytes = check_workspace(workspace_mib, h_student.device)
    problem = arguments.problem
    student = arguments._replace(problem=replace(problem, beta=None, entry_clip=None, targets=None))
    slots, log_q = _present(arguments, log_q)
    has_rest = outside != "renormalize"
    z, L_r, entropy_rest = logits_and_rest(
        student, slots, has_rest, has_rest and return_statistics, workspace_bytes
    )
    counts = slots >= 0
    z_S, z_T = z, log_q
    if L_r is None:
        counts &= z != -torch.inf
    else:
        z_S = with_rest(z, L_r)
        rest = _log_rest(log_q, log_q_rest)
        if outside == "ignore":
            rest = rest.clamp(min=LEAST_LOG)
        z_T = with_rest(z_T, rest.masked_fill(L_r == -torch.inf, -torch.inf))
    # Where there is nothing to compare, both sides get the same logits, so that the loss is 0.
    empty = ~counts.any(-1, keepdim=True)
    loss = divergence_of_rows(
        z_S.masked_fill(empty, 0),
        z_T.masked_fill(empty, 0),
        problem.member,
        ignored=int(outside == "ignore"),
    )
    loss = reduce_tokens(loss.reshape(arguments.leading), arguments.weights, reduction)
    if not return_statistics:
        return loss
    with torch.no_grad():
        if L_r is None:
            z, L_r, entropy_rest = logits_and_rest(student, slots, True, True, workspace_bytes)
        z_y = None
        if targets is not None:
            assert arguments.valid is not None
            sampled = (
                targets.long().reshape(-1, 1).masked_fill(~arguments.valid.reshape(-1, 1), -1).int()
            )
            z_y, *_ = logits_and_rest(student, sampled, False, False, workspace_bytes)
        assert L_r is not None
        assert entropy_rest is not None
        return TopKLoss(loss, *_statistics(arguments, with_rest(z, L_r), entropy_rest, log_q, z_y))


def check_sparse(
    ids: Tensor,
    log_q: Tensor,
    log_q_rest: Tensor | None,
    outside: Outside,
    targets: Tensor | None,
    return_statistics: bool,
    weights: Tensor | None = None,
) -> None:
    """Check the arguments that only `fused_top_k_loss` has; ids [..., K] have been checked."""
    if outside not in ("bucket", "renormalize", "ignore"):
        raise ValueError(f'outside must be "bucket", "renormalize" or "ignore", got {outside!r}')
    check_bool("return_statistics", return_statistics)
    if targets is not None and not return_statistics:
        raise ValueError("targets are for the statistics: return_statistics must be True with them")
    given = {"log_q": (log_q, ids.shape), "log_q_rest": (log_q_rest, ids.shape[:-1])}
    if log_q_rest is None:
        del given["log_q_rest"]
    for name, (t, shape) in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {t.layout}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be float, got {t.dtype}")
        if t.shape != shape:
            raise ValueError(
                f"{name} must have shape {list(shape)} with ids {list(ids.shape)}, got "
                f"{list(t.shape)}"
            )
        if t.device != ids.device:
            raise ValueError(f"{name} is on {t.device}, ids on {ids.device}")
        if is_readable(t) and (_counted(t, weights) == torch.inf).any():
            raise ValueError(f"{name} must not be +inf: it is the logarithm of a probability")


def _counted(t: Tensor, weights: Tensor | None) -> Tensor:
    """The rows of tokens that count."""
    return t if weights is None else t[weights != 0]


def _present(arguments: Arguments, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [N, K] int32 and log q [N, K] float64; −1 and −∞ for slots that are absent or repeat."""
    ids = arguments.ids
    assert ids is not None
    log_q = log_q.detach().reshape(ids.shape).double()
    absent = (ids < 0) | ~(log_q > ABSENT)  # NaN is absent too
    ids = ids.masked_fill(absent, -1)
    absent |= first_slots(ids) != torch.arange(ids.shape[1], device=ids.device)
    return ids.masked_fill(absent, -1), log_q.masked_fill(absent, -torch.inf)


def _log_rest(log_q: Tensor, given: Tensor | None) -> Tensor:
    """log q_r [N] in float64."""
    derived = (1 - log_q.exp().sum(-1)).clamp(min=LEAST_REST).log()
    if given is None:
        return derived
    given = given.detach().reshape(-1).double()
    given = given.masked_fill(given <= ABSENT, -torch.inf)
    return torch.where(given.isnan(), derived, given)


def _statistics(
    arguments: Arguments, z: Tensor, entropy_rest: Tensor, log_q: Tensor, z_y: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The fields of `TopKLoss` after the loss.

    Args:
        z: [N, K + 1] logits of the slots and of the rest.
        entropy_rest: [N] entropy of the softmax of the logits outside the slots.
        log_q: [N, K] of the slots.
        z_y: [N, 1] logits of the targets.
    """
    log_p = log_softmax(z)
    p = log_p.exp()
    entropy = (p * -log_p.clamp(min=-HUGE)).sum(-1) + p[:, -1] * entropy_rest
    fields = [p[:, :-1].sum(-1), log_q.exp().sum(-1).float(), entropy]
    if z_y is not None:
        top = z.amax(-1)
        logp = (z_y[:, 0] - top - (z - top[:, None]).logsumexp(-1)).clamp(max=0)
        assert arguments.valid is not None
        fields.append(logp.masked_fill(~arguments.valid.reshape(-1), torch.nan))
    told = torch.stack(fields).reshape(len(fields), *arguments.leading)
    if arguments.weights is not None:
        told = torch.where(arguments.weights != 0, told, 0)
    return told[0], told[1], told[2], None if z_y is None else told[3]
