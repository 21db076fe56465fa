"""The oracle: every loss as a textbook writes it, in float64, from whole logits, by autograd.

    z = C tanh(σ (h Wᵀ + b) / C) / T        logits of a side, whose head has b, σ and C
    log p, log q                            log_softmax of the student's z and of the teacher's
    m_b = b q + (1 − b) p                   a mixture
    f = w_q q log(q / m_{b_q}) + w_p p log(p / m_{b_p})
    ℓ = Σ_v min(f_v, τ) − A log p(ŷ)        entry clip τ, advantage A of the sampled token ŷ

    S, of K ids      [z_1 … z_K, log Σ_{v∉S} exp z_v] in place of the student's z, or z_1 … z_K

    divergence       w_q    w_p      b_q   b_p
    JSD_β            β      1 − β    β     β
    forward KL       1      0        0     –
    reverse KL       0      1        –     1
    both KLs         given  given    0     1
    skewed KLs       given  given    β     β

It takes the checks of arguments from the package, with the records and names that these use, and
none of its mathematics. It is slow and large on purpose: a dozen [N, V] tensors in float64.

The terms of f cancel where student and teacher agree. The error of ℓ is about 1e-15 times the
larger weight, so a divergence of 1e-9 has six digits. The error of a gradient with respect to
logits is about 1e-15 too.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .checks import FLOAT_DTYPES, check_arguments
from .description import Divergence
from .divergence import Family
from .heads.head import LMHead
from .loss import (
    LogProbs,
    SampledTokenLoss,
    TokenDivergence,
    either_divergence,
    fused_divergence_loss,
    fused_entropy,
    fused_jsd_loss,
    fused_log_probs,
    fused_sampled_token_loss,
    token_divergence,
)
from .scalars import check_bool, check_clip
from .sparse import ABSENT, LEAST_REST, TopKLoss, check_sparse, fused_top_k_loss
from .top_k import TopK, check_k, fused_top_k

# Stands for log 0, so that 0 · log 0 is 0, and p log(p / 0) is 1e30 p, beyond a clip.
LOG_ZERO = -1e30

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(kw_only=True)
class _Call:
    """The arguments of a call of any loss. One that the loss does not take has its default."""

    W: Tensor | LMHead
    h: Any = None
    h_student: Any = None
    h_teacher: Any = None
    beta: Any = 0.5
    entry_clip: float | None = None
    divergence: Divergence | None = None
    targets: Tensor | None = None
    rest: bool = False
    ids: Any = None
    log_q: Any = None
    log_q_rest: Tensor | None = None
    outside: Any = "bucket"
    advantages: Tensor | None = None
    advantage_clip: float | None = None
    temperature: float = 1.0
    token_weights: Tensor | None = None
    reduction: Any = "none"
    W_teacher: Tensor | LMHead | None = None
    workspace_mib: float | None = None
    k: int = 1
    return_log_probs: bool = False
    return_statistics: bool = False

    def check(
        self, value: Divergence | Family, *hidden: str, ids: tuple[str, Any] | None = None
    ) -> None:
        """Refuse what the fused loss refuses, except for float64, and a head that is not whole."""
        if isinstance(self.W, LMHead) and self.W.group is not None:
            raise ValueError("the oracle takes the whole head: W.group must be None")
        self.advantage_clip = check_clip("advantage_clip", self.advantage_clip)
        check_bool("rest", self.rest)
        check_bool("return_log_probs", self.return_log_probs)
        check_arguments(
            {name: getattr(self, name) for name in hidden},
            self.W,
            value,
            self.W_teacher,
            temperature=self.temperature,
            token_weights=self.token_weights,
            reduction=self.reduction,
            targets=None if ids is not None and ids[0] == "targets" else self.targets,
            ids=ids,
            advantages=self.advantages,
            dtypes=(*FLOAT_DTYPES, torch.float64),
        )

    @cached_property
    def weights(self) -> Tensor:
        """[...] w. The tokens that count are those with w ≠ 0; there are R of them."""
        h = self.h if self.h_student is None else self.h_student
        if self.token_weights is None:
            return torch.ones(h.shape[:-1], dtype=torch.float64, device=h.device)
        return self.token_weights.detach().double()

    def of_tokens(self, value: Any) -> Tensor:
        """[R, 1] a number, or its values [...] at the tokens that count; a constant."""
        value = torch.as_tensor(value, dtype=torch.float64, device=self.weights.device).detach()
        return value.expand_as(self.weights)[self.weights != 0, None]

    def log_softmax(self, h: Tensor, W: Tensor | LMHead) -> Tensor:
        """[R, V] log softmax of the logits of one side."""
        head = W if isinstance(W, LMHead) else LMHead(W)
        V = head.vocab_size
        z = h[self.weights != 0].double() @ head.weight[:V].double().t()
        if head.bias is not None:
            z = z + head.bias[:V].double()
        z = head.scale * z
        if head.softcap is not None:
            z = torch.where(z == -torch.inf, z, head.softcap * (z / head.softcap).tanh())
        log_p = (z / self.temperature).log_softmax(-1)
        return log_p.masked_fill(log_p == -torch.inf, LOG_ZERO)

    def both_sides(self) -> tuple[Tensor, Tensor]:
        """log p and log q [R, V]; the teacher's is a constant."""
        with torch.no_grad():
            W_T = self.W if self.W_teacher is None else self.W_teacher
            log_q = self.log_softmax(self.h_teacher, W_T)
        return self.log_softmax(self.h_student, self.W), log_q

    def at_targets(self, log_p: Tensor) -> Tensor:
        """[R] log p(ŷ); NaN where ŷ is outside the vocabulary."""
        assert self.targets is not None
        targets, V = self.targets[self.weights != 0].long(), log_p.shape[1]
        found = log_p.gather(-1, targets.clamp(0, V - 1)[:, None]).squeeze(-1)
        found = torch.where(found == LOG_ZERO, -torch.inf, found)
        return torch.where((targets >= 0) & (targets < V), found, torch.nan)

    def slots(self, V: int) -> tuple[Tensor, Tensor]:
        """The teacher's ids [R, K] and log q; V and −∞ for a slot that is absent or repeats."""
        ids, log_q = (t.detach()[self.weights != 0] for t in (self.ids.long(), self.log_q.double()))
        for row, logs in zip(ids, log_q, strict=True):
            found = set[int]()
            for k, v in enumerate(row.tolist()):
                if 0 <= v < V and logs[k] > ABSENT and v not in found:
                    found.add(v)
                else:
                    row[k], logs[k] = V, -torch.inf
        return ids, log_q

    def spread(self, values: Tensor) -> Tensor:
        """Values [...] from those [R] of the tokens that count; 0 for the others."""
        return torch.zeros_like(self.weights).masked_scatter(self.weights != 0, values)

    def reduced(self, values: Tensor) -> Tensor:
        """Σ w ℓ / Σ w, Σ w ℓ, or w ℓ [...], from ℓ [R]."""
        weighted = self.weights * self.spread(values)
        if self.reduction == "none":
            return weighted
        total = self.weights.sum() if self.reduction == "mean" else 1
        return weighted.sum() / (total if total > 0 else 1)


def _oracle_of(fused: Callable[P, R]) -> Callable[[Callable[[_Call], R]], Callable[P, R]]:
    """Give a function of a `_Call` the signature of a fused loss."""
    signature = inspect.signature(fused)

    def decorate(oracle: Callable[[_Call], R]) -> Callable[P, R]:
        @wraps(oracle)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return oracle(_Call(**bound.arguments))

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


@_oracle_of(fused_jsd_loss)
def reference_jsd_loss(call: _Call) -> Tensor:
    """`fused_jsd_loss` in float64: same arguments, same meaning, and float64 inputs besides.

    `workspace_mib` is accepted and ignored.

    Returns:
        float64 scalar, or [...] with reduction "none". The gradient has the dtype of `h_student`;
        pass `h_student.double()` to have it unrounded. There is a second derivative.
    """
    return call.reduced(_divergence(call, either_divergence(call.beta, call.entry_clip, None)).loss)


@_oracle_of(fused_divergence_loss)
def reference_divergence_loss(call: _Call) -> Tensor:
    """`fused_divergence_loss` in float64; see `reference_jsd_loss`."""
    return call.reduced(_divergence(call, call.divergence).loss)


@_oracle_of(token_divergence)
def reference_token_divergence(call: _Call) -> TokenDivergence:
    """`token_divergence` in float64; see `reference_jsd_loss`."""
    divergence = either_divergence(call.beta, call.entry_clip, call.divergence)
    loss, *rest = _divergence(call, divergence)
    statistics: list[Any] = [None if t is None else call.spread(t.detach()) for t in rest]
    return TokenDivergence(call.reduced(loss), *statistics)


@_oracle_of(fused_sampled_token_loss)
def reference_sampled_token_loss(call: _Call) -> Tensor | SampledTokenLoss:
    """`fused_sampled_token_loss` in float64; see `reference_jsd_loss`."""
    call.check(Family.LOG_PROB, "h_student", "h_teacher")
    log_p, log_q = (call.at_targets(log) for log in call.both_sides())
    A = (log_q - log_p).detach()
    if call.advantage_clip is not None:
        A = A.clamp(-call.advantage_clip, call.advantage_clip)
    # Without mass on a side A or log p is infinite: so is ℓ, without a gradient.
    infinite = A.isinf() | log_p.isinf()
    limit = torch.where(log_p.isinf(), torch.inf, -torch.inf)
    loss = call.reduced(torch.where(infinite, limit, -A.masked_fill(infinite, 0) * log_p))
    if not call.return_log_probs:
        return loss
    return SampledTokenLoss(loss, call.spread(log_p.detach()), call.spread(log_q))


@_oracle_of(fused_log_probs)
def reference_log_probs(call: _Call) -> Any:
    """`fused_log_probs` in float64; see `reference_jsd_loss`."""
    targets, h = call.targets, call.h
    several = isinstance(targets, Tensor) and isinstance(h, Tensor) and targets.ndim == h.ndim
    if several:
        call.check(Family.LOG_SUM, "h", ids=("targets", targets))
    else:
        call.check(Family.LOG_PROB, "h")
    assert targets is not None
    log_p = call.log_softmax(h, call.W)
    V = log_p.shape[1]
    ids = targets[call.weights != 0].long().reshape(len(log_p), -1)
    ids = torch.where((ids >= 0) & (ids < V), ids, V)
    if several:
        log_probs = torch.stack([call.reduced(log) for log in _at(log_p, ids).unbind(-1)], -1)
    else:
        log_probs = call.reduced(call.at_targets(log_p))
    return LogProbs(log_probs, call.reduced(_outside(log_p, ids))) if call.rest else log_probs


@_oracle_of(fused_top_k_loss)
def reference_top_k_loss(call: _Call) -> Tensor | TopKLoss:
    """`fused_top_k_loss` in float64; see `reference_jsd_loss`."""
    divergence = either_divergence(call.beta, call.entry_clip, None)
    call.check(divergence, "h_student", ids=("ids", call.ids))
    check_sparse(
        call.ids, call.log_q, call.log_q_rest, call.outside, call.targets, call.return_statistics,
        call.token_weights,
    )  # fmt: skip
    log_p = call.log_softmax(call.h_student, call.W)
    ids, log_q = call.slots(log_p.shape[1])
    Q, p_r = log_q.exp().sum(-1), _outside(log_p, ids)
    sides = [_at(log_p, ids), log_q]
    if call.outside != "renormalize":
        q_r = (1 - Q).clamp(min=LEAST_REST).log()
        if call.log_q_rest is not None:
            given = call.of_tokens(call.log_q_rest).squeeze(-1)
            q_r = torch.where(given.isnan(), q_r, given)
        q_r = torch.where((p_r == -torch.inf) | (q_r <= ABSENT), -torch.inf, q_r)
        sides = [torch.cat([k, r[:, None]], -1) for k, r in zip(sides, (p_r, q_r), strict=True)]
    # The one of p sums to 1 already, unless it is renormalized.
    sides = [log.clamp(min=LOG_ZERO).log_softmax(-1) for log in sides]
    if call.outside == "ignore":
        sides = [log[:, :-1] for log in sides]
    loss, *_ = _values(call, divergence, *sides)
    counts = log_q > -torch.inf
    if call.outside == "renormalize":
        counts &= _at(log_p, ids) > -torch.inf
    loss = call.reduced(torch.where(counts.any(-1), loss, 0))
    if not call.return_statistics:
        return loss
    told = [_at(log_p, ids).exp().sum(-1), Q, _entropy(log_p)]
    if call.targets is not None:
        told.append(call.at_targets(log_p))
    mass_p, mass_q, entropy, *logp = (call.spread(t.detach()) for t in told)
    return TopKLoss(loss, mass_p, mass_q, entropy, logp[0] if logp else None)


@_oracle_of(fused_top_k)
def reference_top_k(call: _Call) -> TopK:
    """`fused_top_k` in float64; see `reference_jsd_loss`. Its order is that of float64."""
    call.check(Family.ENTROPY, "h")
    with torch.no_grad():
        log_p = call.log_softmax(call.h, call.W)
        check_k(call.k, log_p.shape[1])
        ids = log_p.sort(dim=-1, descending=True, stable=True).indices[:, : call.k]
        log_probs = _at(log_p, ids)
        log_rest = call.spread(_outside(log_p, ids))
        logp = None if call.targets is None else call.spread(call.at_targets(log_p))
    counts = call.weights != 0
    all_ids = ids.new_full((*counts.shape, call.k), -1)
    all_log_probs = log_probs.new_full(all_ids.shape, -torch.inf)
    all_ids[counts] = ids.masked_fill(log_probs == -torch.inf, -1)
    all_log_probs[counts] = log_probs
    return TopK(all_ids, all_log_probs, log_rest, logp)


@_oracle_of(fused_entropy)
def reference_entropy(call: _Call) -> Tensor:
    """`fused_entropy` in float64; see `reference_jsd_loss`."""
    call.check(Family.ENTROPY, "h")
    return call.reduced(_entropy(call.log_softmax(call.h, call.W)))


def _divergence(call: _Call, divergence: Any) -> TokenDivergence:
    """ℓ and all statistics of the tokens that count, [R] each."""
    call.check(divergence, "h_student", "h_teacher")
    log_p, log_q = call.both_sides()
    loss, forward, reverse, share = _values(call, divergence, log_p, log_q)
    logp = None if call.targets is None else call.at_targets(log_p)
    logq = None if call.targets is None else call.at_targets(log_q)
    if call.advantages is not None and logp is not None:
        A = call.of_tokens(call.advantages).squeeze(-1)
        # An infinite ℓ, with or without the policy term, stays as it is and has no gradient.
        loss = loss + torch.where((A == 0) | loss.isinf(), 0, -A * logp)
        loss = torch.where(loss.isinf(), loss.detach(), loss)
    return TokenDivergence(
        loss, forward, reverse, _entropy(log_p), _entropy(log_q), share, logp, logq
    )


def _values(
    call: _Call, divergence: Divergence, log_p: Tensor, log_q: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[R] ℓ, both KLs and the share that the clip removes, from log p and log q of the entries."""
    clip = divergence.entry_clip
    w_q, w_p, b_q, b_p = _halves(call, divergence)
    f_q = w_q * _kl(log_q, _mixture(log_p, log_q, b_q))
    f = f_q + w_p * _kl(log_p, _mixture(log_p, log_q, b_p))
    forward, reverse = _total_kl(log_q, log_p), _total_kl(log_p, log_q)
    infinite = (w_q != 0) & (b_q == 0) & forward.isinf()[:, None]
    infinite |= (w_p != 0) & (b_p == 1) & reverse.isinf()[:, None]
    loss, share = f.sum(-1), torch.zeros_like(forward)
    if clip is None:
        limit = torch.where((w_q <= 0) & (w_p <= 0), -torch.inf, torch.inf)
        loss = torch.where(infinite, limit, loss[:, None]).squeeze(-1)
    else:
        taken = (f - clip).clamp(min=0).sum(-1)
        share = torch.where(taken == 0, 0, torch.where(infinite.squeeze(-1), 1, taken / loss))
        loss = f.clamp(max=clip).sum(-1)
    return loss, forward, reverse, share


def _halves(call: _Call, divergence: Divergence) -> Iterable[Tensor]:
    """w_q, w_p, b_q and b_p of the table above, [R, 1] each."""
    beta, weights = divergence.beta, divergence.weights
    if weights is not None:
        return map(call.of_tokens, (*weights, *((0, 1) if beta is None else (beta, beta))))
    beta = call.of_tokens(beta)
    is_kl = (beta == 0) | (beta == 1)
    w_q = torch.where(is_kl, 1 - beta, beta)
    return w_q, 1 - w_q, beta, beta


def _at(log_p: Tensor, ids: Tensor) -> Tensor:
    """[R, K] log p of ids, −∞ of the id V."""
    log_p = torch.nn.functional.pad(log_p, (0, 1), value=LOG_ZERO).gather(-1, ids)
    return torch.where(log_p == LOG_ZERO, -torch.inf, log_p)


def _outside(log_p: Tensor, ids: Tensor) -> Tensor:
    """[R] log of the probability of all entries that are not among the ids."""
    R, V = log_p.shape
    inside = torch.zeros(R, V + 1, dtype=torch.bool, device=ids.device).scatter(-1, ids, True)
    others = log_p.masked_fill(inside[:, :V], LOG_ZERO).logsumexp(-1)
    return torch.where(others < LOG_ZERO / 2, -torch.inf, others)


def _mixture(log_p: Tensor, log_q: Tensor, b: Tensor) -> Tensor:
    """log m_b."""
    log_b, log_rest = (weight.log().clamp(min=LOG_ZERO) for weight in (b, 1 - b))
    # torch.logaddexp has no second derivative where its arguments lie far apart.
    return torch.stack([log_q + log_b, log_p + log_rest]).logsumexp(0)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """a log(a / b) of every entry."""
    return log_a.exp() * (log_a - log_b)


def _total_kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """[R] KL(a‖b), infinite where b has no mass and a has some."""
    infinite = ((log_a > LOG_ZERO) & (log_b == LOG_ZERO)).any(-1)
    return torch.where(infinite, torch.inf, _kl(log_a, log_b).sum(-1))


def _entropy(log_p: Tensor) -> Tensor:
    """[R] −Σ p log p."""
    return -(log_p.exp() * log_p).sum(-1)
