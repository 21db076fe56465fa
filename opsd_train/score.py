"""Run student and teacher over the same sampled tokens and keep the hidden states that matter."""

import torch
from peft import PeftModelForCausalLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opsd_train.model import base_model
from opsd_train.prompts import encode, left_pad, right_pad, teacher_prompt
from opsd_train.records import Rollout, Scores


def score(
    model: PeftModelForCausalLM, tokenizer: PreTrainedTokenizerBase, rollout: Rollout
) -> Scores:
    """Hidden states of both contexts at the completion's positions.

    The teacher is the initial policy: the same weights with the adapter off, without gradient. It
    goes first, so that the adapter is on when the student's graph is built (and rebuilt, under
    activation checkpointing).
    """
    teacher_prompts = encode(tokenizer, [teacher_prompt(p) for p in rollout.problems])
    pad_id = tokenizer.pad_token_id
    with model.disable_adapter(), torch.no_grad():
        h_teacher = completion_hidden_states(model, teacher_prompts, rollout.completions, pad_id)
    h_student = completion_hidden_states(model, rollout.prompts, rollout.completions, pad_id)

    device = h_student.device
    lengths = torch.tensor([len(c) for c in rollout.completions], device=device)
    return Scores(
        h_student,
        h_teacher,
        tokens=torch.tensor([t for c in rollout.completions for t in c], device=device),
        weights=(1 / (len(lengths) * lengths)).repeat_interleave(lengths),
    )


def completion_hidden_states(
    model: PeftModelForCausalLM, prompts: list[list[int]], completions: list[list[int]], pad_id: int
) -> Tensor:
    """[N, D] last hidden states of the positions that predict the completions' N tokens.

    Backbone only: the LM head is never applied, neither to prompts nor to completions. Prompts are
    padded on the left and completions on the right, with positions counted over real tokens.
    """
    prompt_ids, prompt_mask = left_pad(prompts, pad_id)
    completion_ids, completion_mask = right_pad(completions, pad_id)
    ids = torch.cat([prompt_ids, completion_ids], dim=1).to(model.device)
    mask = torch.cat([prompt_mask, completion_mask], dim=1).to(model.device)
    backbone = base_model(model).base_model
    h = backbone(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    # One position earlier: the hidden state at a token predicts the next one.
    before = h[:, prompt_ids.shape[1] - 1 : -1]
    return before[completion_mask.bool().to(model.device)]
