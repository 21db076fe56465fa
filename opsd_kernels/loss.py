"""The face of the package: losses of tokens, whose hidden states come in any leading shape."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from opsd_kernels import divergence
from opsd_kernels.autograd import divergence_of_tokens, weighed_sum
from opsd_kernels.checks import (
    Arguments,
    check_arguments,
    check_number_beta,
    check_reduction,
    check_workspace,
)
from opsd_kernels.description import Divergence
from opsd_kernels.head import LMHead
from opsd_kernels.scalars import check_clip

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

    Per token, with p = softmax(h_student Wᵀ / T), q = softmax(h_teacher Wᵀ / T) and the mixture
    m = β q + (1 − β) p (On-Policy Self-Distillation, Zhao et al. 2026, Eq. 6):

        JSD_β = β KL(q‖m) + (1 − β) KL(p‖m)

    `beta=0` and `beta=1` name the forward KL(teacher‖student) and the reverse
    KL(student‖teacher). They are not the limits of JSD_β, which tends to 0 at both ends.

    Args:
        h_student: [..., D] student's last hidden states (what enters the LM head), bf16, fp16 or
            fp32. The gradient flows here, and into `W` if that requires grad.
        h_teacher: [..., D], or [..., D_T] with `W_teacher`; the teacher's, at the positions that
            predict the same tokens. Same leading shape and dtype. Treated as a constant.
        W: [V, D] LM head, or an `LMHead`, with a bias, a softcap, a scale, padded rows, or rows
            that a group of processes shares. One that requires grad gets the student's gradient,
            summed up in fp32, for one more product and a second look at the vocabulary in backward;
            detach a head that is frozen.
        beta: in [0, 1], the teacher's weight in the mixture: a number, or a float tensor [...] that
            gives each token its own divergence, 0 and 1 included. A constant. (Under
            `torch.compile` a number is compiled in; to anneal β make it a 0-dimensional tensor.)
        temperature: T from 1e-8 to 1e36, divides both logits. The loss carries no factor T².
        entry_clip: τ > 0: each vocabulary entry's value is min(f, τ) before the sum, and a clipped
            entry has no gradient of its own. A clipped KL can be negative.
        token_weights: [...] float, int or bool, finite; constants. 0 drops the token: its loss and
            gradient are exactly 0 even where its hidden states are NaN. A negative one ascends the
            token's divergence.
        reduction: "mean" Σ w ℓ / Σ w, "sum" Σ w ℓ, or "none" w ℓ of shape [...]. Without tokens,
            or with all weights 0, the loss and its gradient are 0. A mean takes no negative
            weights: Σ w would be no number of tokens. (Where they cannot be read, and Σ w is not
            positive, it is Σ w ℓ.)
        W_teacher: [V, D_T] or an `LMHead`, the teacher's own, a constant; by default `W` serves
            both, as a constant on the teacher's side. Where only what an `LMHead` adds is the
            teacher's own, its weight, the same, is read once.
        workspace_mib: MiB that all temporaries with a vocabulary-sized dimension may take together,
            whatever the number of tokens. 0, the default on a GPU, allocates none: logits exist in
            registers only, and are computed twice. 320 or so is faster on a GPU. On a CPU the
            default is 128. The result does not depend on it beyond rounding. From 4 V D bytes and
            as much for logits on (4,800 for Qwen3-8B), a head that is trained gets its gradient in
            forward, without the second look.

    Returns:
        fp32 scalar, or [...] with reduction "none". Where a KL is infinite it is +inf, or −inf
        where its weight is negative, with gradient 0.

    Under autocast the operands are rounded as `F.linear` would round them. Shapes, dtypes and
    devices are always checked; what `token_weights` and `beta` hold on a CPU only, so that a GPU
    never waits for the host, and not under `torch.compile`. There is no second derivative, and no
    forward-mode one; transforms of `torch.func` are not supported, and raise a RuntimeError.

    Raises:
        TypeError: an argument of the wrong type, or of a dtype that is not supported.
        ValueError: shapes, devices or values that do not fit; the message names the argument.
    """
    check_reduction(reduction)
    checked = check_arguments(
        {"h_student": h_student, "h_teacher": h_teacher},
        W,
        W_teacher,
        beta=check_number_beta(beta),
        temperature=temperature,
        entry_clip=entry_clip,
        token_weights=token_weights,
        reduction=reduction,
    )
    if reduction != "none":
        total = weighed_sum(
            checked,
            weights_of_sum(checked, reduction),
            check_workspace(workspace_mib, h_student.device),
        )
        if total is not None:
            return total
    tokens = _compute(checked, workspace_mib, needs_statistics=False)
    return reduce_tokens(tokens.value, tokens.weights, reduction)


class TokenDivergence(NamedTuple):
    """What `token_divergence` tells of every token: fp32 tensors of the leading shape. All but
    `loss` are without gradient, and not weighted."""

    loss: Tensor
    """w ℓ, differentiable with respect to the student's hidden states."""
    forward_kl: Tensor
    """KL(teacher‖student), without clip."""
    reverse_kl: Tensor
    """KL(student‖teacher), without clip."""
    entropy_student: Tensor
    """−Σ p log p, in nats."""
    entropy_teacher: Tensor
    """−Σ q log q, in nats."""
    clipped_share: Tensor
    """The part of the unclipped ℓ that `entry_clip` removed: 0 without a clip, above 1 where what
    is left of a KL is negative."""
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
    """The loss of every token, and from the same passes over the vocabulary what one wants to know
    of a run: both KLs, both entropies, what the clip took, log-probabilities of the sampled tokens.

    No matrix products are added to those of `fused_jsd_loss`, whose arguments these are. The KLs
    are right where student and teacher nearly agree, as the loss is.

    Args:
        divergence: in place of beta and entry_clip, see `Divergence`.
        targets: [...] ids of the tokens that were sampled, of any integer dtype. What they are is
            checked on a CPU only; elsewhere an id outside the vocabulary gives NaN. Those of
            dropped tokens may be anything.
        advantages: [...] of a policy term of the loss, see `fused_divergence_loss`.
        token_weights: [...] weights of the loss, of either sign. A token of weight 0 is dropped:
            all that is returned for it is 0.

    Returns:
        A `TokenDivergence`. All statistics are at the temperature of the loss.

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """
    checked = check_divergence_arguments(
        {"h_student": h_student, "h_teacher": h_teacher},
        W,
        either_divergence(beta, entry_clip, divergence),
        temperature=temperature,
        token_weights=token_weights,
        targets=targets,
        advantages=advantages,
        W_teacher=W_teacher,
    )
    tokens = _compute(checked, workspace_mib, needs_statistics=True)
    return tokens.divergence()


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
    """Any divergence of the family, and with it a policy gradient, in the passes over the
    vocabulary that `fused_jsd_loss` makes.

    Per token, with p and q of the student and the teacher, m = β q + (1 − β) p, a constant A, and
    the token ŷ that was sampled:

        ℓ = w_q KL(q‖m) + w_p KL(p‖m) − A log p(ŷ)

    Without a β the KLs are KL(q‖p) and KL(p‖q). Weights of each token choose between divergences
    (a forward KL on uncertain tokens only, say), and scale what a reward of A is added to.
    `fused_jsd_loss` is the case `Divergence(beta=beta)`; `fused_sampled_token_loss` that of no
    divergence and an advantage that the teacher gives.

    Args:
        divergence: see `Divergence`.
        targets: [...] ids ŷ of the sampled tokens, see `token_divergence`.
        advantages: [...] float A of each token, of either sign; constants. With `targets`. They are
            not weighed by the divergence, but by `token_weights` and `reduction` as all of ℓ is.

    For the others see `fused_jsd_loss`.

    Returns:
        fp32 scalar, or [...] with reduction "none".
        Where a KL whose weight is not 0 is infinite ℓ is +inf, or −inf if no weight is positive,
        with gradient 0; so it is where log p(ŷ) is −∞ and A not 0, and ℓ has the sign of A then.

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """
    check_reduction(reduction)
    checked = check_divergence_arguments(
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
    if reduction != "none":
        total = weighed_sum(
            checked,
            weights_of_sum(checked, reduction),
            check_workspace(workspace_mib, h_student.device),
        )
        if total is not None:
            return total
    tokens = _compute(checked, workspace_mib, needs_statistics=False)
    return reduce_tokens(tokens.value, tokens.weights, reduction)


class SampledTokenLoss(NamedTuple):
    """What `fused_sampled_token_loss` returns on request."""

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
    the teacher's log-probability of the sampled token ŷ over the student's.

        A = log q(ŷ) − log p(ŷ), a constant        ℓ = −A log p(ŷ)

    Its gradient with respect to the student's logits, A (p − 1[v = ŷ]), is exact. It knows of one
    entry of the teacher's distribution only; logit-free it needs fewer products than a divergence.
    Where log p(ŷ) or log q(ŷ) is −∞ the gradient is 0, unless a clip makes the advantage finite.

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
    check_reduction(reduction)
    advantage_clip = check_clip("advantage_clip", advantage_clip)
    checked = check_arguments(
        {"h_student": h_student, "h_teacher": h_teacher},
        W,
        W_teacher,
        beta=None,
        temperature=temperature,
        token_weights=token_weights,
        reduction=reduction,
        targets=targets,
    )
    tokens = _compute(checked, workspace_mib, needs_statistics=True)
    return tokens.sampled_token_loss(advantage_clip, reduction, return_log_probs)


def fused_log_probs(
    h: Tensor,
    W: Tensor | LMHead,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    workspace_mib: float | None = None,
) -> Tensor:
    """Log-probabilities of tokens, from hidden states and the LM head, without [N, V] logits and
    without a teacher: what a cross-entropy, which is their mean negated, and a policy gradient are
    made of.

    Per token, with p = softmax(h Wᵀ / T), it is w log p(ŷ). Its gradient with respect to logits,
    1[v = ŷ] − p, is made without a difference of probabilities. Where log p(ŷ) is −∞ it is 0.

    Args:
        h: [..., D] last hidden states (what enters the LM head) at the positions that predict the
            targets, bf16, fp16 or fp32. The gradient flows here, and into `W` if that requires
            grad.
        W: [V, D] LM head, or an `LMHead`; see `fused_jsd_loss`.
        targets: [...] ids ŷ of the tokens, see `token_divergence`.
        temperature: T > 0, divides the logits.
        token_weights: [...] weights w of either sign, 1 by default; see `fused_jsd_loss`. Where
            they are 0, so are result and gradient, whatever the target is.
        workspace_mib: see `fused_jsd_loss`.

    Returns:
        [...] fp32, differentiable. Without tokens it is empty.

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """
    checked = check_arguments(
        {"h": h},
        W,
        None,
        beta=None,
        temperature=temperature,
        token_weights=token_weights,
        targets=targets,
    )
    return _compute(checked, workspace_mib, needs_statistics=False).log_probs()


def fused_entropy(
    h: Tensor,
    W: Tensor | LMHead,
    *,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    workspace_mib: float | None = None,
) -> Tensor:
    """Entropies of next-token distributions, from hidden states and the LM head, without [N, V]
    logits and without a teacher: what an entropy bonus is made of.

    Per token, with p = softmax(h Wᵀ / T), it is −w Σ p log p, in nats.

    Args:
        h: [..., D] last hidden states; see `fused_log_probs`, as for the others.

    Returns:
        [...] fp32, differentiable. Without tokens it is empty.

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """
    checked = check_arguments(
        {"h": h},
        W,
        None,
        beta=None,
        temperature=temperature,
        token_weights=token_weights,
        entropy=True,
    )
    return _compute(checked, workspace_mib, needs_statistics=False).entropies()


def either_divergence(
    beta: float | Tensor, entry_clip: float | None, divergence: Divergence | None
) -> Divergence | tuple[float | Tensor, float | None]:
    """The divergence that is described, or else β and clip."""
    if divergence is None:
        return beta, entry_clip
    if entry_clip is not None or isinstance(beta, Tensor) or beta != 0.5:
        raise ValueError(
            "divergence must be given in place of beta and entry_clip, not beside them"
        )
    return divergence


def check_divergence_arguments(
    hidden: dict[str, Tensor],
    W: Tensor | LMHead,
    described: Divergence | tuple[float | Tensor, float | None],
    **options: Any,
) -> Arguments:
    """`check_arguments` of what a `Divergence` describes, or a β and a clip."""
    if isinstance(described, tuple):
        given, clip = described
        return check_arguments(hidden, W, beta=check_number_beta(given), entry_clip=clip, **options)
    if not isinstance(described, Divergence):
        raise TypeError(f"divergence must be a Divergence, got {type(described).__name__}")
    beta, weights, clip = described.beta, described.weights, described.entry_clip
    if weights is not None and not any(isinstance(w, Tensor) for w in weights):
        # What a β names has kernels of its own.
        named = {0.0: (1.0, 0.0), 1.0: (0.0, 1.0)}
        if isinstance(beta, float):
            named = {beta: (beta, 1 - beta)}
        for b, of_beta in named.items():
            if weights == of_beta:
                beta, weights = b, None
                break
    return check_arguments(hidden, W, beta=beta, halves=weights, entry_clip=clip, **options)


def reduce_tokens(loss: Tensor, weights: Tensor | None, reduction: Reduction) -> Tensor:
    """Weigh and reduce per-token losses [...]; see `fused_jsd_loss` for what each reduction is."""
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


def weights_of_sum(checked: Arguments, reduction: Reduction) -> Tensor:
    """The weights [N] of which a reduced loss is the sum of w ℓ."""
    if checked.weights is None:
        N = checked.problem.h_S.shape[0]
        ones = checked.problem.h_S.new_ones(N, dtype=torch.float32)
        return ones / max(N, 1) if reduction == "mean" else ones
    weights = checked.weights.reshape(-1)
    if reduction == "sum":
        return weights
    total = weights.sum()
    return weights / torch.where(total > 0, total, 1)


@dataclass(frozen=True)
class Tokens:
    """What is known of every token, in the leading shape of the hidden states: what the functions
    above, and the oracle's, make their results of."""

    value: Tensor  # the divergence, or log p of the targets
    weights: Tensor | None
    statistics: Tensor  # [STATISTICS, ...]; empty if none were asked for
    valid: Tensor | None  # which targets lie in the vocabulary; None without targets

    def divergence(self) -> TokenDivergence:
        statistics = self.statistics
        return TokenDivergence(
            reduce_tokens(self.value, self.weights, "none"),
            statistics[divergence.FORWARD_KL],
            statistics[divergence.REVERSE_KL],
            statistics[divergence.ENTROPY_S],
            statistics[divergence.ENTROPY_T],
            statistics[divergence.CLIPPED_SHARE],
            None if self.valid is None else statistics[divergence.LOG_P],
            None if self.valid is None else statistics[divergence.LOG_Q],
        )

    def entropies(self) -> Tensor:
        return reduce_tokens(self.value, self.weights, "none")

    def log_probs(self) -> Tensor:
        # Without mass there is no gradient, as of a KL; nor is there a number without a target.
        log_p = torch.where(self.value == -torch.inf, -torch.inf, self.value)
        if self.valid is not None:
            log_p = log_p * torch.where(self.valid, 1, torch.nan)
        return reduce_tokens(log_p, self.weights, "none")

    def sampled_token_loss(
        self, advantage_clip: float | None, reduction: Reduction, return_log_probs: bool
    ) -> Tensor | SampledTokenLoss:
        log_p, log_q = self.statistics[divergence.LOG_P], self.statistics[divergence.LOG_Q]
        advantage = self.statistics[divergence.LOG_RATIO]
        if advantage_clip is not None:
            advantage = advantage.clamp(-advantage_clip, advantage_clip)
        loss = -advantage * self.value
        # Without mass on one side the advantage or log p is infinite: no gradient, as of a KL.
        infinite = (log_p == -torch.inf) | (advantage.abs() > divergence.HUGE / 2)
        limit = (-advantage * log_p).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        loss = reduce_tokens(torch.where(infinite, limit, loss), self.weights, reduction)
        return SampledTokenLoss(loss, log_p, log_q) if return_log_probs else loss


def tokens_of(checked: Arguments, value: Tensor, statistics: Tensor | None) -> Tokens:
    """Name what was computed of every token. A dropped token's statistics are 0, whatever a
    schedule made of it; those of a target outside the vocabulary are NaN."""
    leading, weights, valid = checked.leading, checked.weights, checked.valid
    if checked.problem.advantages is not None and valid is not None:
        value = value * torch.where(valid.reshape(-1), 1, torch.nan)
    if statistics is None:
        return Tokens(value.reshape(leading), weights, value.new_empty(0), valid)
    statistics = statistics.reshape(divergence.STATISTICS, *leading)
    if valid is not None:
        of_target = statistics[divergence.LOG_P :].masked_fill(~valid, torch.nan)
        statistics = torch.cat([statistics[: divergence.LOG_P], of_target])
    if weights is not None:
        statistics = torch.where(weights != 0, statistics, 0)
    return Tokens(value.reshape(leading), weights, statistics, valid)


def _compute(checked: Arguments, workspace_mib: float | None, needs_statistics: bool) -> Tokens:
    workspace_bytes = check_workspace(workspace_mib, checked.h_S.device)
    return tokens_of(checked, *divergence_of_tokens(checked, needs_statistics, workspace_bytes))
