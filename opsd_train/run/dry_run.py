"""What a run would do: its prompts as rendered, their lengths, the memory of the loss, one step."""

import torch

from opsd_kernels.problem import Problem
from opsd_kernels.schedules.planning import MIB, default_workspace_mib, make_plan
from opsd_train.config import Config
from opsd_train.models import adapter_weights, vocab_size
from opsd_train.opsd import Setup, loss_name, opsd_loss, score, token_weights
from opsd_train.run.console import say
from opsd_train.sampling import draw_seed, roll_out


def dry_run(config: Config, setup: Setup) -> None:
    problems = setup.problems[: config.micro_batch_size]
    for name, context in (("student", setup.contexts.student), ("teacher", setup.contexts.teacher)):
        lengths = [len(ids) for ids in context.token_ids(setup.problems[: config.batch_size])]
        say(f"{name} prompt, {min(lengths)} to {max(lengths)} tokens:")
        say(f"{context.text(problems[0])}\n")

    seeds = [draw_seed(config.seed, 1, row) for row in range(len(problems))]
    rollout = roll_out(setup.sampler, setup.contexts.student, problems, seeds)
    lengths = [len(c) for c in rollout.completions]
    say(
        f"{len(problems)} rollouts, {min(lengths)} to {max(lengths)} tokens, "
        f"{sum(rollout.finished)} finished within {config.max_new_tokens}"
    )
    N, V = config.micro_batch_size * config.max_new_tokens, vocab_size(setup.head)
    W = setup.head.weight[:V]
    say(f"\nMemory of the loss for up to {N:,} tokens, a micro-batch:")
    budget = config.workspace_mib
    budget = (default_workspace_mib(W.device) if budget is None else budget) * MIB
    h = W.new_empty(0, W.shape[1])
    problem = Problem(h, h, W, None, W.dtype, 0.5)
    used = make_plan(problem, N, budget).bytes if budget else 0
    say_memory(f"this model, V = {V}", used, N, V)
    say_memory("with the vocabulary of Qwen3, V = 151,936", budget, N, 151936)

    scores = score(setup.backbone.train(), setup.teacher, setup.contexts.teacher, rollout)
    weights = token_weights(scores.lengths, config.mean, len(rollout), rollout.tokens)
    loss, statistics = opsd_loss(scores, setup.head, config, weights, setup.teacher.head)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(adapter_weights(setup.model).values(), torch.inf)
    figures = ", ".join(f"{name} {value:.5f}" for name, value in statistics.items())
    say(f"\nOne step: {loss_name(config)} {loss.item():.5f}, gradient norm {norm.item():.5f}.")
    say(f"{figures}. Not saved.")


def say_memory(what: str, workspace: float, N: int, V: int) -> None:
    logits = 2 * 4 * N * V
    say(
        f"  {what}: at most {workspace / MIB:,.1f} MiB of vocabulary-sized tensors "
        f"(fp32 logits of both sides: {logits / MIB:,.1f} MiB, before any softmax)"
    )
