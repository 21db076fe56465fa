"""Run student and teacher over the same sampled tokens and keep the hidden states that matter."""

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
    packed one after the other.

    The teacher has no gradient and goes first, so that the student's adapter is on, and as it will
    be, when the student's graph is built (and rebuilt, under activation checkpointing).
    """
    pad_id = teacher_context.tokenizer.pad_token_id

    def sequences(prompts: list[list[int]]) -> tuple[Tensor | None, ...]:
        if packed:
            return pack(prompts, rollout.completions)
        return join(prompts, rollout.completions, pad_id)

    teacher_prompts = teacher_context.token_ids(rollout.problems)
    with teacher.active(), torch.no_grad():
        h_teacher = teacher.backbone(*sequences(teacher_prompts))
    h_student = backbone(*sequences(rollout.prompts))

    device = h_student.device
    return Scores(
        h_student,
        h_teacher,
        tokens=torch.tensor([t for c in rollout.completions for t in c], device=device),
        lengths=torch.tensor([len(c) for c in rollout.completions], device=device),
    )
