"""Run student and teacher over the same sampled tokens and keep the hidden states that matter."""

from dataclasses import replace

import torch
from torch import Tensor

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
    """Likewise, of token ids.

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
