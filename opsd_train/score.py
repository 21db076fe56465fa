"""Run student and teacher over the same sampled tokens and keep the hidden states that matter."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd_train.prompts import Context, join
from opsd_train.records import Rollout, Scores
from opsd_train.teachers import Teacher


class Backbone(torch.nn.Module):
    """The model without its LM head, as a module whose forward returns what the loss reads: so data
    parallelism can wrap it, and nobody has to reach around the wrapper."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model: Any = model.base_model

    def forward(self, ids: Tensor, mask: Tensor, predicts: Tensor) -> Tensor:
        """[N, D] last hidden states of the positions that predict the completions' N tokens, of
        sequences as `join` makes them.

        The LM head is never applied, neither to prompts nor to completions.
        """
        device = self.model.device
        mask = mask.to(device)
        h = self.model(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),  # counted over real tokens
            use_cache=False,
        ).last_hidden_state
        return h[predicts.to(device)]

    def gathered(self, call: Callable[[], Any]) -> Any:
        """Call something; where the weights are sharded, with this module's own in place."""
        return call()


def score(
    backbone: torch.nn.Module, teacher: Teacher, teacher_context: Context, rollout: Rollout
) -> Scores:
    """Hidden states of both contexts at the completion's positions.

    The teacher has no gradient and goes first, so that the student's adapter is on, and as it will
    be, when the student's graph is built (and rebuilt, under activation checkpointing).
    """
    pad_id = teacher_context.tokenizer.pad_token_id
    teacher_prompts = teacher_context.token_ids(rollout.problems)
    with teacher.worn(), torch.no_grad():
        h_teacher = teacher.backbone(*join(teacher_prompts, rollout.completions, pad_id))
    h_student = backbone(*join(rollout.prompts, rollout.completions, pad_id))

    device = h_student.device
    return Scores(
        h_student,
        h_teacher,
        tokens=torch.tensor([t for c in rollout.completions for t in c], device=device),
        lengths=torch.tensor([len(c) for c in rollout.completions], device=device),
    )
