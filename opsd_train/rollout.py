"""Sample solutions from the model as it stands, in batches, through transformers' `generate`."""

from collections.abc import Callable

import torch
from peft import PeftModelForCausalLM
from transformers import GenerationConfig, PreTrainedTokenizerBase

from opsd_train.prompts import encode, left_pad, student_prompt
from opsd_train.records import Problem, Rollout


def sample(
    model: PeftModelForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    prompt: Callable[[Problem], str] = student_prompt,
    temperature: float,
    max_new_tokens: int,
) -> Rollout:
    """One completion a problem, from the full distribution at `temperature` (no top-k or top-p)."""
    prompt_ids = encode(tokenizer, [prompt(p) for p in problems])
    ids, mask = left_pad(prompt_ids, tokenizer.pad_token_id)
    generation = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.no_grad():
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=generation,
        )
    completions, finished = [], []
    for row in out[:, ids.shape[1] :].tolist():
        ends = tokenizer.eos_token_id in row
        completions.append(row[: row.index(tokenizer.eos_token_id) + 1] if ends else row)
        finished.append(ends)
    return Rollout(problems, prompt_ids, completions, finished)
