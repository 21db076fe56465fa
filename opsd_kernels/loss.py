"""The public losses. Every token has a row of hidden states, in any leading shape [...]."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .autograd import divergence_of_tokens, has_weighed_sum, weighed_sum
from .checks import (
    Arguments,
    check_arguments,
    check_workspace,
)
from .description import Divergence
from .divergence import CLIPPED_SHARE, HUGE, LOG_P, LOG_Q, LOG_RATIO, STATISTICS, Family
from .heads.head import LMHead
from .rest import logits_and_rest
from .scalars import check_beta, check_bool, check_clip
from .support import first_slots, log_softmax, with_rest

Reduction = Literal["mean", "sum", "none"]


def fused_jsd_loss(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor | LMHead,
    *,
    beta: float | Tensor = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    W_teacher: Tensor | LMHead | None = None,
    workspace_mib: float | None = None,
) -> Tensor:
    """Generalized Jensen-Shannon divergence between teacher and student over the full vocabulary,
    from hidden states and the LM head, without [N, V] logits.

    Each token has p = softmax(h_student Wᵀ / T), q = softmax(h_teacher Wᵀ / T) and the mixture
    m = β q + (1 − β) p (On-Policy Self-Distillation, Zhao et al. 2026, Eq. 6). Its loss is

        JSD_β = β KL(q‖m) + (1 − β) KL(p‖m)

    `beta=0` names the forward KL(teacher‖student), `beta=1` the reverse KL(student‖teacher).
    Neither is a limit of JSD_β, which tends to 0 at both ends.

    Args:
        h_student: [..., D] bf16, fp16 or fp32, the student's last hidden states, which enter the LM
            head. The gradient flows into them, and into `W` if it requires grad.
        h_teacher: [..., D], or [..., D_T] with `W_teacher`: the teacher's last hidden states at the
            positions that predict the same tokens. Same leading shape and dtype as `h_student`. A
            constant.
        W: [V, D] LM head, or an `LMHead`, which may have a bias, a softcap, a scale, padded rows,
            or a group of processes that share its rows. A head that requires grad gets the gradient
            of the student's side, summed in fp32; backward then makes the logits once more and
            takes one more matrix product. Detach a head that is frozen.
        beta: in [0, 1], the teacher's weight in the mixture: a number, or a float tensor [...] with
            one β for each token, 0 and 1 included. A constant. `torch.compile` compiles a number
            in: to anneal β under it, pass a 0-dimensional tensor.
        temperature: T from 1e-8 to 1e36. It divides the logits of both sides. The loss is not
            multiplied by T².
        entry_clip: τ > 0. The loss of a token is Σ min(f, τ) over the values f of its vocabulary
            entries, and a clipped entry has no gradient of its own. A clipped KL can be negative.
        token_weights: [...] float, int or bool, finite; constants. 0 drops a token: its loss and
            gradient are exactly 0, even where its hidden states are NaN. A negative weight makes
            the token's divergence rise.
        reduction: "mean" for Σ w ℓ / Σ w, "sum" for Σ w ℓ, "none" for w ℓ of shape [...]. Without
            tokens, or if all weights are 0, the loss and its gradient are 0. "mean" refuses
            negative weights, since Σ w would not count tokens. On a GPU, where weights are not
            read, it returns Σ w ℓ if Σ w is not positive.
        W_teacher: [V, D_T] or an `LMHead`, a head of the teacher's own, a constant. By default the
            teacher uses `W` too, as a constant. If two `LMHead`s have the same weight, it is read
            once.
        workspace_mib: MiB that all temporaries with a vocabulary-sized dimension may take together,
            for any number of tokens. 0, the default on a GPU, allocates none: logits stay in
            registers, and are computed twice. About 320 is faster on a GPU. The default on a CPU is
            128. The result does not depend on it, except for rounding. A head that is trained gets
            its gradient in forward, without computing logits again, from 4 V D bytes plus as much
            for logits (4,800 MiB for Qwen3-8B).

    Returns:
        fp32 scalar, or [...] with reduction "none". Where a KL is infinite the loss is +inf, or
        −inf if its weight is negative, and its gradient is 0.

    Under autocast the operands are rounded as `F.linear` would round them. Shapes, dtypes and
    devices are always checked. The contents of `token_weights` and `beta` are checked on a CPU
    only, so that a GPU never waits for the host, and not under `torch.compile`. There is no second
    derivative, no forward-mode derivative and no transform of `torch.func`: each raises a
    RuntimeError.

    Raises:
        TypeError: an argument of the wrong type, or of a dtype that is not supported.
        ValueError: shapes, devices or values that do not fit. The message names the argument.
    """
    return fused_divergence_loss(
        h_student,
        h_teacher,
        W,
        either_divergence(beta, entry_clip, None),
        temperature=temperature,
        token_weights=token_weights,
        reduction=reduction,
        W_teacher=W_teacher,
        workspace_mib=workspace_mib,
    )


class TokenDivergence(NamedTuple):
    """Loss and statistics of every token, from `token_divergence`: fp32 tensors [...]. Only `loss`
    has a gradient, and only `loss` is weighted."""

    loss: Tensor
    """w ℓ, differentiable with respect to the student's hidden states and a head that is
    trained."""
    forward_kl: Tensor
    """KL(teacher‖student), without clip."""
    reverse_kl: Tensor
    """KL(student‖teacher), without clip."""
    entropy_student: Tensor
    """−Σ p log p, in nats."""
    entropy_teacher: Tensor
    """−Σ q log q, in nats."""
    clipped_share: Tensor
    """The share of the unclipped ℓ that `entry_clip` removed. 0 without a clip; above 1 where the
    rest of a KL is negative."""
    logp_student: Tensor | None
    """log p of the target; None without `targets`."""
    logp_teacher: Tensor | None
    """log q of the target; None without `targets`."""


def token_divergence(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor | LMHead,
    *,
    beta: float | Tensor = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    divergence: Divergence | None = None,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    token_weights: Tensor | None = None,
    W_teacher: Tensor | LMHead | None = None,
    workspace_mib: float | None = None,
) -> TokenDivergence:
    """The loss of every token, and what a run wants to log beside it: both KLs, both entropies, the
    share that the clip removed, and the log-probabilities of the sampled tokens.

    All of it comes from the passes over the vocabulary that `fused_jsd_loss` makes, without another
    matrix product. The KLs are accurate where student and teacher nearly agree, as the loss is.

    Args:
        divergence: a `Divergence`, in place of `beta` and `entry_clip`.
        targets: [...] ids of the sampled tokens, of any integer dtype. The ids are checked on a CPU
            only; elsewhere an id outside the vocabulary gives NaN. The ids of dropped tokens may be
            anything.
        advantages: [...] of a policy term in the loss, see `fused_divergence_loss`.
        token_weights: [...] weights of the loss, of either sign. All that is returned for a token
            of weight 0 is 0.

    For the others see `fused_jsd_loss`.

    Returns:
        A `TokenDivergence`. Its statistics have the temperature of the loss.

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """
    arguments = check_arguments(
        {"h_student": h_student, "h_teacher": h_teacher},
        W,
        either_divergence(beta, entry_clip, divergence),
        temperature=temperature,
        token_weights=token_weights,
        targets=targets,
        advantages=advantages,
        W_teacher=W_teacher,
    )
    loss, statistics = _loss_and_statistics(arguments, workspace_mib)
    log_probs = (None, None) if targets is None else (statistics[LOG_P], statistics[LOG_Q])
    return TokenDivergence(
        reduce_tokens(loss, arguments.weights, "none"),
        *statistics[: CLIPPED_SHARE + 1],  # in the order of its fields
        *log_probs,
    )


def fused_divergence_loss(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor | LMHead,
    divergence: Divergence,
    *,
    targets: Tensor | None = None,
    advantages: Tensor | None = None,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    W_teacher: Tensor | LMHead | None = None,
    workspace_mib: float | None = None,
) -> Tensor:
    """Any divergence of the family, with or without a policy gradient beside it, in the passes over
    the vocabulary that `fused_jsd_loss` makes.

    Each token has the student's p, the teacher's q, the mixture m = β q + (1 − β) p, the sampled
    token ŷ and a constant advantage A. Its loss is

        ℓ = w_q KL(q‖m) + w_p KL(p‖m) − A log p(ŷ)

    Without a β the KLs are KL(q‖p) and KL(p‖q). Weights for each token choose between divergences,
    for instance a forward KL on uncertain tokens only. `fused_jsd_loss` is the case
    `Divergence(beta=beta)`. `fused_sampled_token_loss` is the case of no divergence, with the
    teacher's log-ratio as the advantage.

    Args:
        divergence: see `Divergence`.
        targets: [...] ids ŷ of the sampled tokens, see `token_divergence`.
        advantages: [...] float A of each token, of either sign; constants. They need `targets`. The
            weights of the divergence do not multiply them; `token_weights` and `reduction` apply to
            all of ℓ.

    For the others see `fused_jsd_loss`.

    Returns:
        fp32 scalar, or [...] with reduction "none". ℓ is infinite, and its gradient 0, where a KL
        whose weight is not 0 is infinite: −inf if no weight is positive, +inf otherwise. So it is
        where log p(ŷ) is −∞ and A is not 0; ℓ then has the sign of A.

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """
    arguments = check_arguments(
        {"h_student": h_student, "h_teacher": h_teacher},
        W,
        divergence,
        targets=targets,
        advantages=advantages,
        temperature=temperature,
        token_weights=token_weights,
        reduction=reduction,
        W_teacher=W_teacher,
    )
    workspace_bytes = check_workspace(workspace_mib, h_student.device)
    if reduction != "none" and has_weighed_sum(arguments, workspace_bytes):
        return weighed_sum(arguments, weights_of_sum(arguments, reduction), workspace_bytes)
    loss = _loss(arguments, workspace_mib)
    return reduce_tokens(loss, arguments.weights, reduction)


class SampledTokenLoss(NamedTuple):
    """What `fused_sampled_token_loss` returns with `return_log_probs`."""

    loss: Tensor
    """fp32 scalar, or [...] with reduction "none"."""
    logp_student: Tensor
    """[...] fp32 log p of the target, without gradient."""
    logp_teacher: Tensor
    """[...] fp32 log q of the target."""


def fused_sampled_token_loss(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor | LMHead,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    advantage_clip: float | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    W_teacher: Tensor | LMHead | None = None,
    workspace_mib: float | None = None,
    return_log_probs: bool = False,
) -> Tensor | SampledTokenLoss:
    """The sampled-token objective (Zhao et al. 2026, Eq. 8): a policy gradient whose advantage is
    the log-ratio of teacher and student at the sampled token ŷ.

        A = log q(ŷ) − log p(ŷ), a constant        ℓ = −A log p(ŷ)

    The gradient with respect to the student's logits, A (p − 1[v = ŷ]), is exact. The objective
    uses one entry of the teacher's distribution; logit-free it needs fewer products than a
    divergence. Where log p(ŷ) is −∞ the loss is +inf; where only log q(ŷ) is, and no clip makes the
    advantage finite, it is −inf. The gradient is 0 there.

    Args:
        targets: [...] ids of the sampled tokens, see `token_divergence`.
        advantage_clip: A is clamped to ± this. None for no clip.
        return_log_probs: whether to return both log-probabilities beside the loss.

    For the others see `fused_jsd_loss`.

    Returns:
        fp32 scalar, or [...] with reduction "none"; with `return_log_probs` a `SampledTokenLoss`.

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """
    advantage_clip = check_clip("advantage_clip", advantage_clip)
    check_bool("return_log_probs", return_log_probs)
    arguments = check_arguments(
        {"h_student": h_student, "h_teacher": h_teacher},
        W,
        Family.LOG_PROB,
        W_teacher,
        temperature=temperature,
        token_weights=token_weights,
        reduction=reduction,
        targets=targets,
    )
    value, statistics = _loss_and_statistics(arguments, workspace_mib)
    log_p, log_q, advantage = statistics[LOG_P], statistics[LOG_Q], statistics[LOG_RATIO]
    if advantage_clip is not None:
        advantage = advantage.clamp(-advantage_clip, advantage_clip)
    # Without mass on one side the advantage or log p is infinite: no gradient, as of a KL.
    infinite = (log_p == -torch.inf) | (advantage.abs() > HUGE / 2)
    limit = torch.where(log_p == -torch.inf, torch.inf, -torch.inf)
    loss = torch.where(infinite, limit, -advantage * value)
    loss = reduce_tokens(loss, arguments.weights, reduction)
    return SampledTokenLoss(loss, log_p, log_q) if return_log_probs else loss


class LogProbs(NamedTuple):
    """What `fused_log_probs` returns with `rest`."""

    log_probs: Tensor
    """fp32 w log p of the targets, in their shape."""
    log_rest: Tensor
    """[...] fp32 w log p_r, p_r the probability of all tokens that are not among the targets."""


@overload
def fused_log_probs(
    h: Tensor,
    W: Tensor | LMHead,
    targets: Tensor,
    *,
    rest: Literal[False] = False,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    workspace_mib: float | None = None,
) -> Tensor: ...


@overload
def fused_log_probs(
    h: Tensor,
    W: Tensor | LMHead,
    targets: Tensor,
    *,
    rest: Literal[True],
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    workspace_mib: float | None = None,
) -> LogProbs: ...


def fused_log_probs(
    h: Tensor,
    W: Tensor | LMHead,
    targets: Tensor,
    *,
    rest: bool = False,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    workspace_mib: float | None = None,
) -> Tensor | LogProbs:
    """Log-probabilities of tokens, one or K at each position, from hidden states and the LM head,
    without [N, V] logits and without a teacher. A cross-entropy is minus their mean; a policy
    gradient needs them too.

    With p = softmax(h Wᵀ / T), each token gives w log p(ŷ). Its gradient with respect to logits,
    1[v = ŷ] − p, is computed without subtracting probabilities. Where log p(ŷ) is −∞ it is 0.

    Args:
        h: [..., D] bf16, fp16 or fp32, the last hidden states, which enter the LM head, at the
            positions that predict the targets. The gradient flows into them, and into `W` if it
            requires grad.
        W: [V, D] LM head, or an `LMHead`; see `fused_jsd_loss`.
        targets: [...] ids ŷ of the tokens, see `token_divergence`. Or [..., K], K ≤ 512: ids of K
            tokens, which may repeat. An id that is negative or not in the vocabulary is then an
            absent slot: its log p is −∞, without a gradient.
        rest: whether to return log p_r too, p_r = 1 − Σ p over all distinct targets. It is summed
            over the other tokens, so it keeps its digits where p_r is small.
        temperature: T > 0, divides the logits.
        token_weights: [...] weights w of either sign, 1 by default; see `fused_jsd_loss`. Where w
            is 0, result and gradient are 0, for any target.
        workspace_mib: see `fused_jsd_loss`.

    Returns:
        fp32 in the shape of `targets`, differentiable; with `rest` `LogProbs`. Without tokens it is
        empty.

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """
    check_bool("rest", rest)
    several = isinstance(targets, Tensor) and isinstance(h, Tensor) and targets.ndim == h.ndim
    if several or rest:
        options = {"temperature": temperature, "token_weights": token_weights}
        log_probs, log_rest = _of_several(h, W, targets, several, workspace_mib, **options)
        return LogProbs(log_probs, log_rest) if rest else log_probs
    arguments = check_arguments(
        {"h": h},
        W,
        Family.LOG_PROB,
        temperature=temperature,
        token_weights=token_weights,
        targets=targets,
    )
    log_p = _loss(arguments, workspace_mib)
    # Without mass there is no gradient, as of a KL.
    log_p = torch.where(log_p == -torch.inf, -torch.inf, log_p)
    return reduce_tokens(log_p, arguments.weights, "none")


def _of_several(
    h: Tensor,
    W: Tensor | LMHead,
    targets: Tensor,
    several: bool,
    workspace_mib: float | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`LogProbs` of `fused_log_probs`, for K targets a token if there are several, else for one."""
    one = targets[..., None] if isinstance(targets, Tensor) else targets
    arguments = check_arguments(
        {"h": h},
        W,
        Family.LOG_SUM,
        targets=None if several else targets,
        ids=("targets", targets if several else one),
        **options,
    )
    ids = arguments.ids
    assert ids is not None
    first = first_slots(ids)
    repeats = first != torch.arange(ids.shape[1], device=ids.device)
    workspace_bytes = check_workspace(workspace_mib, h.device)
    z, L_r, _ = logits_and_rest(
        arguments, ids.masked_fill(repeats, -1), True, False, workspace_bytes
    )
    assert L_r is not None
    log_p = log_softmax(with_rest(z, L_r))
    log_rest = reduce_tokens(log_p[:, -1].reshape(arguments.leading), arguments.weights, "none")
    log_probs = log_p[:, :-1].gather(-1, first)
    if not several:
        log_probs = _with_nan(log_probs.reshape(arguments.leading), arguments)
        return reduce_tokens(log_probs, arguments.weights, "none"), log_rest
    weights = None if arguments.weights is None else arguments.weights[..., None]
    return reduce_tokens(log_probs.reshape(targets.shape), weights, "none"), log_rest


def fused_entropy(
    h: Tensor,
    W: Tensor | LMHead,
    *,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    workspace_mib: float | None = None,
) -> Tensor:
    """Entropies of next-token distributions, from hidden states and the LM head, without [N, V]
    logits and without a teacher: for an entropy bonus.

    With p = softmax(h Wᵀ / T), each token gives −w Σ p log p, in nats.

    Args:
        h: [..., D] last hidden states.

    For it and the others see `fused_log_probs`.

    Returns:
        [...] fp32, differentiable. Without tokens it is empty.

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """
    arguments = check_arguments(
        {"h": h},
        W,
        Family.ENTROPY,
        temperature=temperature,
        token_weights=token_weights,
    )
    return reduce_tokens(_loss(arguments, workspace_mib), arguments.weights, "none")


def either_divergence(
    beta: float | Tensor, entry_clip: float | None, divergence: Divergence | None
) -> Divergence:
    """The divergence that is given, or that of a β and a clip."""
    if divergence is None:
        if not isinstance(beta, Tensor):
            beta = check_beta(beta)
        return Divergence(beta=beta, entry_clip=entry_clip)
    if entry_clip is not None or isinstance(beta, Tensor) or beta != 0.5:
        raise ValueError(
            "divergence must be given in place of beta and entry_clip, not beside them"
        )
    return divergence


def reduce_tokens(loss: Tensor, weights: Tensor | None, reduction: Reduction) -> Tensor:
    """Weigh and reduce the losses of tokens [...] by a reduction of `fused_jsd_loss`."""
    if weights is not None:
        # Selected, not multiplied: a dropped token's loss may be anything.
        loss = torch.where(weights != 0, weights * loss, 0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if weights is None:
        return total / max(loss.numel(), 1)
    weight = weights.sum()
    return total / torch.where(weight > 0, weight, 1)


def weights_of_sum(arguments: Arguments, reduction: Reduction) -> Tensor:
    """The weights w [N] with which a reduced loss is Σ w ℓ."""
    if arguments.weights is None:
        N = arguments.h_S.shape[0]
        ones = arguments.h_S.new_ones(N, dtype=torch.float32)
        return ones / max(N, 1) if reduction == "mean" else ones
    weights = arguments.weights.reshape(-1)
    if reduction == "sum":
        return weights
    total = weights.sum()
    return weights / torch.where(total > 0, total, 1)


def _loss(arguments: Arguments, workspace_mib: float | None) -> Tensor:
    """ℓ [...] of every token, not weighted; NaN where it needs a target that is outside the
    vocabulary, and undefined for a token that is dropped."""
    workspace_bytes = check_workspace(workspace_mib, arguments.h_S.device)
    loss, _ = divergence_of_tokens(arguments, False, workspace_bytes)
    return _with_nan(loss.reshape(arguments.leading), arguments)


def _loss_and_statistics(
    arguments: Arguments, workspace_mib: float | None
) -> tuple[Tensor, Tensor]:
    """`_loss`, and statistics [STATISTICS, ...]: 0 for a token that is dropped, NaN where they need
    a target that is outside the vocabulary."""
    workspace_bytes = check_workspace(workspace_mib, arguments.h_S.device)
    loss, statistics = divergence_of_tokens(arguments, True, workspace_bytes)
    assert statistics is not None
    statistics = statistics.reshape(STATISTICS, *arguments.leading)
    if arguments.valid is not None:
        of_target = statistics[LOG_P:].masked_fill(~arguments.valid, torch.nan)
        statistics = torch.cat([statistics[:LOG_P], of_target])
    if arguments.weights is not None:
        statistics = torch.where(arguments.weights != 0, statistics, 0)
    return _with_nan(loss.reshape(arguments.leading), arguments), statistics


def _with_nan(loss: Tensor, arguments: Arguments) -> Tensor:
    """A loss [...] with NaN where it needs a target that is outside the vocabulary."""
    needs_target = arguments.problem.h_T is None or arguments.problem.advantages is not None
    if arguments.valid is None or not needs_target:
        return loss
    return loss * torch.where(arguments.valid, 1, torch.nan)
