"""Run student and teacher over the same sampled tokens and keep the hidden states that matter."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opsd_train.prompts import Context, left_pad, right_pad
from opsd_train.records import Rollout, Scores


class Backbone(torch.nn.Module):
    """The model without its LM head, as a module whose forward returns what the loss reads: so data
    parallelism can wrap it, and nobody has to reach around the wrapper."""

    def __init__(self, model: PreTrainedModel, pad_id: int):
        super().__init__()
        self.model: Any = model.base_model
        self.pad_id = pad_id

    def forward(self, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
        """[N, D] last hidden states of the positions that predict the completions' N tokens.

        The LM head is never applied, neither to prompts nor to completions. Prompts are padded on
        the left and completions on the right, with positions counted over real tokens.
        """
        prompt_ids, prompt_mask = left_pad(prompts, self.pad_id)
        completion_ids, completion_mask = right_pad(completions, self.pad_id)
        device = self.model.device
        mask = torch.cat([prompt_mask, completion_mask], dim=1).to(device)
        h = self.model(
            input_ids=torch.cat([prompt_ids, completion_ids], dim=1).to(device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        # One position earlier: the hidden state at a token predicts the next one.
        before = h[:, prompt_ids.shape[1] - 1 : -1]
        return before[completion_mask.bool().to(device)]

    def gathered(self, call: Callable[[], Any]) -> Any:
        """Call something; where the weights are sharded, with this module's own in place."""
        return call()


class Teacher(Protocol):
    """A model, and what it wears while it scores; see teachers.py."""

    backbone: torch.nn.Module

    def worn(self) -> AbstractContextManager[None]: ...


def score(
    backbone: torch.nn.Module, teacher: Teacher, teacher_context: Context, rollout: Rollout
) -> Scores:
    """Hidden states of both contexts at the completion's positions.

    The teacher has no gradient and goes first, so that the student's adapter is on, and as it will
    be, when the student's graph is built (and rebuilt, under activation checkpointing).
    """
    teacher_prompts = teacher_context.token_ids(rollout.problems)
    with teacher.worn(), torch.no_grad():
        h_teacher = teacher.backbone(teacher_prompts, rollout.completions)
    h_student = backbone(rollout.prompts, rollout.completions)

    device = h_student.device
    return Scores(
        h_student,
        h_teacher,
        tokens=torch.tensor([t for c in rollout.completions for t in c], device=device),
        lengths=torch.tensor([len(c) for c in rollout.completions], device=device),
    )
