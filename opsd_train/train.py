"""On-policy self-distillation (Zhao et al., 2026, Algorithm 1), step by step."""

import math
import resource
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from itertools import takewhile
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from opsd_train.checkpoint import Checkpoint, last_checkpoint, save_checkpoint
from opsd_train.config import Config
from opsd_train.console import progress_bar, say
from opsd_train.evaluate import grade
from opsd_train.failures import MAX_SKIPPED, RunFailed, StopRequest, explained
from opsd_train.model import adapter_config, adapter_weights
from opsd_train.objective import opsd_loss, token_weights
from opsd_train.records import Rollout
from opsd_train.report import RunFolder
from opsd_train.rollout import draw_seed, roll_out
from opsd_train.score import score
from opsd_train.setup import Setup

Evaluate = Callable[[int, bool], dict[str, Any]]
"""Called after each step, with the step and whether it is the last; returns metrics."""


def train(config: Config, setup: Setup, run: RunFolder, evaluate: Evaluate) -> None:
    """Algorithm 1: the student samples, the teacher scores the same tokens with the solution in
    view, the student moves towards the teacher's whole next-token distribution.

    Raises:
        RunFailed: the run cannot go on, or was asked to stop; what it did is saved.
    """
    accelerator, teacher = setup.accelerator, setup.teacher
    adapter = list(adapter_weights(setup.model).values())
    optimizer = torch.optim.AdamW(adapter, lr=config.learning_rate, weight_decay=0.0)
    step = restore(run, setup, optimizer) if config.resume else 0

    def save(step: int) -> None:
        if accelerator.is_main_process:
            keep_checkpoint(config, run, setup, optimizer, step)

    with (
        progress_bar("OPSD", config.steps) as bar,
        StopRequest() as stop,
        explained(run, rescue=lambda: save(step)),
    ):
        if step == 0 and (measured := evaluate(0, False)):
            run.write_metrics(step=0, **measured)
        while step < config.steps and not has_stalled(run.metrics, config.patience):
            rows = own_rows(config, setup, step + 1)
            indices = problem_indices(len(setup.problems), config, step + 1)
            problems = [setup.problems[indices[row]] for row in rows]  # (x, y*) ~ S

            with run.phase("rollout"):  # ŷ ~ p_S(· | x)
                seeds = [draw_seed(config.seed, step + 1, row) for row in rows]
                rollout = roll_out(setup.sampler, setup.contexts.student, problems, seeds)
                metrics = {"step": step + 1, **describe(rollout, setup)}

            totals: dict[str, Tensor] = {}
            parts = rollout.micro_batches(config.micro_batch_size)
            for part in parts:
                is_last = part is parts[-1]
                # Gradients are added up here, and over the processes with the last micro-batch.
                with nullcontext() if is_last else accelerator.no_sync(setup.backbone):
                    with run.phase("score"):  # both contexts over the same ŷ
                        setup.backbone.train()
                        scores = score(setup.backbone, teacher, setup.contexts.teacher, part)
                    with run.phase("loss"):  # mean over each rollout's tokens, then over the batch
                        weights = token_weights(
                            scores.lengths, config.mean, config.batch_size, metrics["tokens"]
                        )
                        loss, told = opsd_loss(scores, setup.W, config, weights, teacher.W)
                    with run.phase("backward"):
                        # The processes' gradients are averaged, and are parts of a sum.
                        (loss * accelerator.num_processes).backward()
                for name, value in {"loss": loss.detach(), **told}.items():
                    totals[name] = totals.get(name, 0) + value.double()

            metrics |= {name: accelerator.reduce(t, "sum").item() for name, t in totals.items()}
            with run.phase("step"):
                metrics["learning_rate"] = set_rate(optimizer, config, step + 1)
                norm = torch.nn.utils.clip_grad_norm_(adapter, config.max_grad_norm)
                metrics["grad_norm"] = norm.item()
                metrics["skipped"] = not math.isfinite(metrics["loss"] + metrics["grad_norm"])
                if not metrics["skipped"]:
                    optimizer.step()
                    teacher.follow()
                optimizer.zero_grad()
            step += 1

            stopping = asked_to_stop(stop, setup)
            is_last = step == config.steps or has_stalled([*run.metrics, metrics], config.patience)
            metrics |= evaluate(step, is_last)
            completions = grade(setup.tokenizer, rollout, setup.is_correct)
            run.write_completions("rollout", step, gather_object(completions))
            run.write_metrics(**metrics, **cost(run, setup, metrics["tokens"]))
            bar.advance_to(step, **figures(run.metrics))
            failing = skipped_in_a_row(run.metrics) >= MAX_SKIPPED
            if stopping or is_last or failing or step % config.save_every == 0:
                save(step)
            if failing:
                give_up(run, setup, rollout)
            if stopping and not is_last:
                raise RunFailed(
                    f"stopped after step {step}; {run.path} holds the run so far, go on with "
                    "--resume",
                    status=128 + stopping,
                )


# Which problems, which learning rate: functions of the seed and the step


def own_rows(config: Config, setup: Setup, step: int) -> range:
    """The rows of the batch that this process takes."""
    share = config.batch_size // setup.accelerator.num_processes
    first = share * setup.accelerator.process_index
    return range(first, first + share)


def problem_indices(total: int, config: Config, step: int) -> list[int]:
    """The problems of a step's batch: every problem once before any comes again."""
    first = (step - 1) * config.batch_size
    places = [divmod(place, total) for place in range(first, first + config.batch_size)]
    return [shuffled(total, config.seed, epoch)[place] for epoch, place in places]


@lru_cache(maxsize=2)
def shuffled(total: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(draw_seed(seed, "epoch", epoch))
    return torch.randperm(total, generator=generator).tolist()


def learning_rate(config: Config, step: int) -> float:
    """Of the step, from 1: up over the first `warmup` of the steps, then constant, or down half a
    cosine to 0 after the last."""
    rising = round(config.warmup * config.steps)
    if step <= rising:
        return config.learning_rate * step / rising
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - rising) / (config.steps - rising + 1)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def set_rate(optimizer: torch.optim.Optimizer, config: Config, step: int) -> float:
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


# What a step tells


def describe(rollout: Rollout, setup: Setup) -> dict[str, Any]:
    """Lengths and stop reasons of all processes' rollouts."""
    own = [[len(c), end] for c, end in zip(rollout.completions, rollout.finished, strict=True)]
    device = setup.accelerator.device
    lengths, finished = setup.accelerator.gather(torch.tensor(own, device=device)).T.tolist()
    return {
        "tokens": sum(lengths),
        "length_mean": fmean(lengths),
        "length_max": max(lengths),
        "finished": fmean(finished),  # reached the end of text
        "truncated": 1 - fmean(finished),  # reached max_new_tokens
    }


def cost(run: RunFolder, setup: Setup, tokens: int) -> dict[str, Any]:
    """Seconds of the step by phase, sampled tokens a second of each, the most memory held: the only
    metrics that are not the same whenever a run is repeated."""
    seconds = run.lap()
    if setup.accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
    else:
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {
        "seconds": {name: round(s, 4) for name, s in seconds.items()},
        "tokens_per_second": {name: round(tokens / s, 1) for name, s in seconds.items() if s > 0},
        "peak_memory_mib": round(peak, 1),
    }


def figures(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """What the progress bar shows."""
    shown = {"loss": f"{metrics[-1]['loss']:.4f}"}
    if skipped := sum(m["skipped"] for m in steps_of(metrics)):
        shown["skipped"] = f"{skipped}"
    if measured := [m["accuracy"] for m in metrics if "accuracy" in m]:
        shown["held-out accuracy"] = f"{measured[-1]:.0%}"
    return shown


def steps_of(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m for m in metrics if "loss" in m]


# When to stop


def skipped_in_a_row(metrics: list[dict[str, Any]]) -> int:
    """Steps without a finite loss or gradient, up to the last one."""
    return len(list(takewhile(lambda m: m["skipped"], reversed(steps_of(metrics)))))


def has_stalled(metrics: list[dict[str, Any]], patience: int | None) -> bool:
    """Whether the mean loss of the last `patience` steps is no less than of those before them."""
    losses = [m["loss"] for m in steps_of(metrics) if not m["skipped"]]
    if patience is None or len(losses) < 2 * patience:
        return False
    return fmean(losses[-patience:]) >= fmean(losses[-2 * patience : -patience])


def asked_to_stop(stop: StopRequest, setup: Setup) -> int:
    """The number of the signal that any process was sent, or 0."""
    own = torch.tensor(stop.signal or 0, device=setup.accelerator.device)
    return int(setup.accelerator.gather(own[None]).max())


def give_up(run: RunFolder, setup: Setup, rollout: Rollout) -> None:
    """Save the batch that has no finite loss, and end the run."""
    batch = {"prompts": rollout.prompts, "completions": rollout.completions}
    path = run.write_json("failed_batch.json", gather_object([batch]))
    raise RunFailed(
        f"the loss or its gradient was not finite in {MAX_SKIPPED} steps one after the other, none "
        f"of which was taken. {path} holds the last batch's token ids, by process; look there, or "
        "begin anew with a smaller --learning-rate or --max-grad-norm"
    )


# What a checkpoint holds


def keep_checkpoint(
    config: Config, run: RunFolder, setup: Setup, optimizer: torch.optim.Optimizer, step: int
) -> None:
    checkpoint = Checkpoint(
        step,
        adapter=get_peft_model_state_dict(setup.model, save_embedding_layers=False),
        optimizer={
            f"{name}.{key}": value
            for name, w in adapter_weights(setup.model).items()
            for key, value in optimizer.state[w].items()
        },
        teacher=setup.teacher.state(),
    )
    run.sync()  # the metrics up to a checkpoint are on the disk before it is
    save_checkpoint(run.path, checkpoint, adapter_config(setup.model), config.keep_last)


def restore(run: RunFolder, setup: Setup, optimizer: torch.optim.Optimizer) -> int:
    """Go back to the last checkpoint, if there is one, and return its step, or 0."""
    checkpoint = last_checkpoint(run.path)
    if checkpoint is None:
        return 0
    set_peft_model_state_dict(setup.model, dict(checkpoint.adapter))
    weights = adapter_weights(setup.model)
    for key, value in checkpoint.optimizer.items():
        name, _, moment = key.rpartition(".")
        w = weights[name]
        optimizer.state[w][moment] = value if moment == "step" else value.to(w.device)
    for name, value in setup.teacher.state().items():
        value.copy_(checkpoint.teacher[name])
    say(f"Resumed after step {checkpoint.step}.")
    return checkpoint.step
