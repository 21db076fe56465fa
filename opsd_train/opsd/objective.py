"""Both sides' hidden states over the same rollouts, and the OPSD objective of them."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels import LMHead, divergence_name, fused_sampled_token_loss, token_divergence
from opsd_train.config import Config
from opsd_train.data import Context, join, pack
from opsd_train.opsd.teachers import Teacher
from opsd_train.records import Rollout, Scores


def score(
    backbone: torch.nn.Module,
    teacher: Teacher,
    teacher_context: Context,
    rollout: Rollout,
    packed: bool = False,
) -> Scores:
    """Hidden states of both contexts at the completion's positions, of sequences side by side or
    packed one after the other."""
    teacher_prompts = teacher_context.token_ids(rollout.problems)
    pad_id = teacher_context.tokenizer.pad_token_id
    scores = score_sequences(
        backbone, teacher, rollout.prompts, teacher_prompts, rollout.completions, pad_id, packed
    )
    if rollout.log_probs is None:
        return scores
    drawn = [p for row in rollout.log_probs for p in row]
    return replace(scores, logp_sampler=torch.tensor(drawn, device=scores.tokens.device))


def score_sequences(
    backbone: torch.nn.Module,
    teacher: Teacher,
    prompts: list[list[int]],
    teacher_prompts: list[list[int]],
    completions: list[list[int]],
    pad_id: int,
    packed: bool,
) -> Scores:
    """The same for prompts that are given as token ids.

    The teacher has no gradient and goes first, so that the student's adapter is on, and as it will
    be, when the student's graph is built (and rebuilt, under activation checkpointing).
    """

    def sequences(of: list[list[int]]) -> tuple[Tensor | None, ...]:
        return pack(of, completions) if packed else join(of, completions, pad_id)

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
    return divergence_name(config.divergence)


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
    common: dict[str, Any] = {
        "temperature": config.temperature,
        "token_weights": weights,
        "W_teacher": teacher_head,
        "workspace_mib": config.workspace_mib,
    }
    is_sampled = config.objective == "sampled_token"
    with torch.no_grad() if is_sampled else nullcontext():
        divergence = token_divergence(
            scores.h_student,
            scores.h_teacher,
            head,
            divergence=config.divergence,
            targets=scores.tokens,
            **common,
        )
    assert divergence.logp_student is not None  # there are targets
    assert divergence.logp_teacher is not None
    statistics = {
        "forward_kl": divergence.forward_kl,
        "reverse_kl": divergence.reverse_kl,
        "clipped_share": divergence.clipped_share,
        "entropy_student": divergence.entropy_student,
        "entropy_teacher": divergence.entropy_teacher,
        "log_ratio": divergence.logp_teacher - divergence.logp_student,
    }
    if scores.logp_sampler is not None:
        off = divergence.logp_student.detach() - scores.logp_sampler
        statistics |= {"sampler_log_ratio": off, "sampler_log_ratio_size": off.abs()}
    loss = divergence.loss.sum()
    if is_sampled:
        if scores.logp_sampler is not None:
            # A policy gradient of tokens that another policy drew; a divergence is no expectation
            # of that kind: each of its tokens counts as it comes.
            common["token_weights"] = weights * off.exp().clamp(max=MOST_IMPORTANCE)
        sampled = fused_sampled_token_loss(
            scores.h_student,
            scores.h_teacher,
            head,
            scores.tokens,
            advantage_clip=config.advantage_clip,
            reduction="sum",
            **common,
        )
        assert isinstance(sampled, Tensor)  # without return_log_probs
        loss = sampled
    return loss, {name: (weights * s).sum() for name, s in statistics.items()}
