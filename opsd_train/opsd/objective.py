"""What both sides make of the same rollouts, and the OPSD objective of it."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import (
    LMHead,
    TopKLoss,
    divergence_name,
    fused_log_probs,
    fused_sampled_token_loss,
    fused_top_k_loss,
    token_divergence,
)
from opsd_train.config import Config
from opsd_train.data import Context, join, pack
from opsd_train.opsd.teachers import Teacher
from opsd_train.records import Rollout, Scores, TeacherTopK


def score(
    backbone: torch.nn.Module,
    teacher: Teacher,
    teacher_context: Context,
    rollout: Rollout,
    packed: bool = False,
) -> Scores:
    """Both contexts at the completion's positions, of sequences side by side or packed one after
    the other."""
    teacher_prompts = teacher_context.token_ids(rollout.problems)
    pad_id = teacher_context.tokenizer.pad_token_id
    scores = score_sequences(
        backbone, teacher, rollout.prompts, teacher_prompts, rollout.completions, pad_id, packed
    )
    device = scores.tokens.device
    if rollout.top_k is not None:
        ids = torch.cat([of.ids for of in rollout.top_k]).to(device)
        log_q = torch.cat([of.log_q for of in rollout.top_k]).to(device)
        scores = replace(scores, top_k=TeacherTopK(ids, log_q))
    if rollout.log_probs is None:
        return scores
    drawn = [p for row in rollout.log_probs for p in row]
    return replace(scores, logp_sampler=torch.tensor(drawn, device=device))


def score_sequences(
    backbone: torch.nn.Module,
    teacher: Teacher,
    prompts: list[list[int]],
    teacher_prompts: list[list[int]],
    completions: list[list[int]],
    pad_id: int,
    packed: bool,
) -> Scores:
    """The same for prompts that are given as token ids. A teacher on servers is left out.

    The teacher has no gradient and goes first, so that the student's adapter is on, and as it will
    be, when the student's graph is built (and rebuilt, under activation checkpointing).
    """

    def sequences(of: list[list[int]]) -> tuple[Tensor | None, ...]:
        return pack(of, completions) if packed else join(of, completions, pad_id)

    h_teacher = None
    if teacher.backbone is not None:
        with teacher.active(), torch.no_grad():
            h_teacher = teacher.backbone(*sequences(teacher_prompts))
    h_student = backbone(*sequences(prompts))

    device = h_student.device
    return Scores(
        h_student,
        h_teacher,
        tokens=torch.tensor([t for c in completions for t in c], device=device),
        lengths=torch.tensor([len(c) for c in completions], device=device),
    )


# What a token's p, as it is trained over as it was sampled, may weigh it by: truncated importance
# sampling, with the bound that is usual for engines that differ from the trainer.
MOST_IMPORTANCE = 2.0


def loss_name(config: Config) -> str:
    if config.objective == "sampled_token":
        return "sampled-token policy gradient"
    name = divergence_name(config.divergence)
    if not config.teacher_urls:
        return name
    outside = {"bucket": "all others as one", "renormalize": "renormalized", "ignore": "truncated"}
    return f"{name} of the teacher's top {config.teacher_top_k}, {outside[config.outside]}"


def token_weights(lengths: Tensor, mean: str, rollouts: int, tokens: int) -> Tensor:
    """[N] a weight for each token of a part of the batch. The weights of all parts, that is of all
    micro-batches in all processes, sum to 1: the parts' weighted sums add up to the batch's mean,
    however the batch is divided.

    Args:
        lengths: [rollouts of this part] tokens of each.
        mean: "rollout", over each rollout's tokens, then over the rollouts (Algorithm 1); or
            "token", over all tokens alike.
        rollouts, tokens: how many the whole batch has.
    """
    each = 1 / (rollouts * lengths) if mean == "rollout" else torch.full_like(lengths, 1) / tokens
    return each.float().repeat_interleave(lengths)


def compare(
    scores: Scores,
    head: LMHead,
    config: Config,
    weights: Tensor | None = None,
    teacher_head: LMHead | None = None,
) -> dict[str, Tensor]:
    """[N] the divergence of each token, times its weight and with gradient, under "loss"; and, of
    both sides, statistics by name, with neither. KLs are never clipped.

    Of a teacher on servers what needs its other tokens is not known: its entropy and the KLs; at
    another temperature than 1, where a server's is 1, its log-probability and mass are not either.
    """
    common: dict[str, Any] = {
        "temperature": config.temperature,
        "token_weights": weights,
        "targets": scores.tokens,
        "workspace_mib": config.workspace_mib,
    }
    if scores.top_k is None:
        assert scores.h_teacher is not None
        of_all = token_divergence(
            scores.h_student,
            scores.h_teacher,
            head,
            divergence=config.divergence,
            W_teacher=teacher_head,
            **common,
        )
        return of_all._asdict()
    assert config.beta is not None  # as the config makes sure
    T, log_q = config.temperature, scores.top_k.log_q
    of_top = fused_top_k_loss(
        scores.h_student,
        head,
        scores.top_k.ids,
        log_q / T,  # of "renormalize", if T is not 1
        outside=config.outside,
        beta=config.beta,
        entry_clip=config.entry_clip,
        reduction="none",
        return_statistics=True,
        **common,
    )
    assert isinstance(of_top, TopKLoss)  # with return_statistics
    found = of_top._asdict()
    if T != 1:
        del found["mass_teacher"]
        return found
    return found | {"logp_teacher": log_q[:, 0]}


def opsd_loss(
    scores: Scores,
    head: LMHead,
    config: Config,
    weights: Tensor,
    teacher_head: LMHead | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ w ℓ over the tokens, and Σ w of each statistic: what is added up over all micro-batches and
    processes is the batch's loss, and each statistic's mean.

    Returns:
        The loss, with gradient; and the statistics by name, without it. KLs are never clipped.
    """
    is_sampled = config.objective == "sampled_token"
    with torch.no_grad() if is_sampled else nullcontext():
        statistics = compare(scores, head, config, weights, teacher_head)
    loss = statistics.pop("loss").sum()
    logp_student = statistics.pop("logp_student")
    if (logp_teacher := statistics.pop("logp_teacher", None)) is not None:
        statistics["log_ratio"] = logp_teacher - logp_student
    if scores.logp_sampler is not None:
        off = logp_student.detach() - scores.logp_sampler
        statistics |= {"sampler_log_ratio": off, "sampler_log_ratio_size": off.abs()}
    means = {name: (weights * s).sum() for name, s in statistics.items()}
    if is_sampled:
        if scores.logp_sampler is not None:
            # A policy gradient of tokens that another policy drew; a divergence is no expectation
            # of that kind: each of its tokens counts as it comes.
            weights = weights * off.exp().clamp(max=MOST_IMPORTANCE)
        loss = sampled_token_loss(scores, head, config, weights, teacher_head)
    return loss, means


def sampled_token_loss(
    scores: Scores,
    head: LMHead,
    config: Config,
    weights: Tensor,
    teacher_head: LMHead | None,
) -> Tensor:
    """Σ w ℓ of Eq. 8."""
    common: dict[str, Any] = {
        "temperature": config.temperature,
        "workspace_mib": config.workspace_mib,
    }
    if scores.top_k is None:
        assert scores.h_teacher is not None
        loss = fused_sampled_token_loss(
            scores.h_student,
            scores.h_teacher,
            head,
            scores.tokens,
            advantage_clip=config.advantage_clip,
            token_weights=weights,
            reduction="sum",
            W_teacher=teacher_head,
            **common,
        )
        assert isinstance(loss, Tensor)  # without return_log_probs
        return loss
    log_p = fused_log_probs(scores.h_student, head, scores.tokens, **common)
    assert isinstance(log_p, Tensor)  # without rest
    advantage = scores.top_k.log_q[:, 0] - log_p.detach()
    if config.advantage_clip is not None:
        advantage = advantage.clamp(-config.advantage_clip, config.advantage_clip)
    return -(weights * advantage * log_p).sum()
