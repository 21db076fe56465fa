"""What a run would do: its prompts as rendered, their lengths, the memory of the loss, one step."""

import torch

from opsd_kernels.row_workspace import MIB, default_workspace_mib, make_plan
from opsd_train.config import Config
from opsd_train.console import say
from opsd_train.model import add_adapter, lm_head
from opsd_train.objective import opsd_loss
from opsd_train.prompts import encode, student_prompt, teacher_prompt
from opsd_train.rollout import sample
from opsd_train.score import score
from opsd_train.tiny_world import World, cache_path


def dry_run(config: Config, world: World, divergence: str) -> None:
    problems = world.train[: config.batch_size]
    for name, prompt in (("student", student_prompt), ("teacher", teacher_prompt)):
        lengths = [len(ids) for ids in encode(world.tokenizer, [prompt(p) for p in problems])]
        say(f"{name} prompt, {min(lengths)} to {max(lengths)} tokens:\n  {prompt(problems[0])}")
    if not cache_path(config.seed).exists():
        say("No warm-started model is cached: this step is taken with random weights.")

    model = add_adapter(world.model, config.lora_rank)
    W = lm_head(model)
    rollout = sample(
        model,
        world.tokenizer,
        problems,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
    )
    lengths = [len(c) for c in rollout.completions]
    say(
        f"{len(problems)} rollouts, {min(lengths)} to {max(lengths)} tokens, "
        f"{sum(rollout.finished)} finished within {config.max_new_tokens}"
    )
    N = config.batch_size * config.max_new_tokens
    say(f"\nMemory of the loss for up to {N:,} tokens:")
    budget = default_workspace_mib(W.device) * MIB
    used = make_plan(N, (W,), W.dtype, budget).bytes if budget else 0
    say_memory(f"this model, V = {W.shape[0]}", used, N, W.shape[0])
    say_memory("with the vocabulary of Qwen3, V = 151,936", budget, N, 151936)

    scores = score(model, world.tokenizer, rollout)
    loss = opsd_loss(scores, W, config)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_([w for w in model.parameters() if w.requires_grad], 1.0)
    say(f"\nOne step: {divergence} {loss.item():.5f}, gradient norm {norm.item():.5f}. Not saved.")


def say_memory(what: str, workspace: float, N: int, V: int) -> None:
    logits = 2 * 4 * N * V
    say(
        f"  {what}: at most {workspace / MIB:,.1f} MiB of vocabulary-sized tensors "
        f"(fp32 logits of both sides: {logits / MIB:,.1f} MiB, before any softmax)"
    )
