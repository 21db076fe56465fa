"""The life of a run: steps, checkpoints and metrics, until it is done, asked to stop or failing."""

import resource
import sys
from itertools import takewhile
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object

from opsd_train.errors import RunFailed
from opsd_train.evaluation import grade
from opsd_train.models import adapter_config, adapter_weights
from opsd_train.opsd import Setup, take_step
from opsd_train.records import Rollout
from opsd_train.run.checkpoint import save_checkpoint
from opsd_train.run.console import progress_bar, say
from opsd_train.run.failures import MAX_SKIPPED, StopRequest, explained
from opsd_train.run.folder import RunFolder
from opsd_train.run.held_out import Evaluate
from opsd_train.run.recording import record_tokens
from opsd_train.run.training_state import capture, restore
from opsd_train.run.world import World


def train(world: World, setup: Setup, run: RunFolder, evaluate: Evaluate) -> None:
    """Algorithm 1, step after step, from the last checkpoint if the run is resumed.

    Raises:
        RunFailed: the run cannot go on, or was asked to stop; what it did is saved.
    """
    config = world.config
    adapter = adapter_weights(setup.model).values()
    optimizer = torch.optim.AdamW(adapter, lr=config.learning_rate, weight_decay=0.0)
    step = restore(run.path, setup, optimizer) if config.resume else 0
    if step > 0:
        say(f"Resumed after step {step}.")

    def save() -> None:
        state = capture(setup, optimizer, step)
        if setup.accelerator.is_main_process:
            run.sync()  # the metrics up to a checkpoint are on the disk before it is
            save_checkpoint(run.path, state, adapter_config(setup.model), config.keep_last)

    def rescue() -> None:
        # What all processes gather is not to be had by one that ran out of memory.
        is_gathered = config.shard or (config.ahead and setup.accelerator.num_processes > 1)
        if step > 0 and not is_gathered:
            save()

    lines = 10 if world.is_fast else config.steps
    with (
        progress_bar("OPSD", config.steps, lines) as bar,
        StopRequest() as stop,
        explained(run, rescue),
    ):
        if step == 0 and (measured := evaluate(0, False)):
            run.write_metrics(step=0, **measured)
        while step < config.steps and not has_stalled(run.metrics, config.patience):
            observe = record_tokens(config, setup, run, step + 1)
            rollout, metrics = take_step(config, setup, optimizer, step + 1, run.phase, observe)
            step += 1

            stopping = asked_to_stop(stop, setup)
            is_last = step == config.steps or has_stalled([*run.metrics, metrics], config.patience)
            metrics |= evaluate(step, is_last)
            completions = grade(setup.tokenizer, rollout, world.grader())
            run.write_completions("rollout", step, gather_object(completions))
            run.write_metrics(**metrics, **cost(run, setup, metrics["tokens"]))
            bar.advance_to(step, **figures(run.metrics))

            is_failing = skipped_in_a_row(run.metrics) >= MAX_SKIPPED
            if is_last or stopping or is_failing or step % config.save_every == 0:
                save()
            if is_failing:
                give_up(run, rollout)
            if stopping and not is_last:
                raise RunFailed(
                    f"stopped after step {step}; {run.path} holds the run so far, go on with "
                    "--resume",
                    status=128 + stopping,
                )


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
    others = ("evaluate", "record")
    speeds = {name: round(tokens / s, 1) for name, s in seconds.items() if name not in others}
    return {
        "seconds": {name: round(s, 4) for name, s in seconds.items()},
        "tokens_per_second": speeds,
        "peak_memory_mib": round(peak, 1),
    }


def figures(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """What is shown of the last step, beside the progress."""
    last = metrics[-1]
    shown = {"loss": f"{last['loss']:.4f}"}
    if skipped := sum(m["skipped"] for m in steps_of(metrics)):
        shown["skipped"] = f"{skipped}"
    if measured := [m["accuracy"] for m in metrics if "accuracy" in m]:
        shown["held-out accuracy"] = f"{measured[-1]:.0%}"
    return shown | {
        "forward KL": f"{last['forward_kl']:.4f}",
        "length": f"{last['length_mean']:.0f}",
        "truncated": f"{last['truncated']:.0%}",
        "seconds": f"{sum(last['seconds'].values()):.1f}",
    }


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


def give_up(run: RunFolder, rollout: Rollout) -> None:
    """Save the batch that has no finite loss, and end the run."""
    batch = {"prompts": rollout.prompts, "completions": rollout.completions}
    path = run.write_json("failed_batch.json", gather_object([batch]))
    raise RunFailed(
        f"the loss or its gradient was not finite in {MAX_SKIPPED} steps one after the other, none "
        f"of which was taken. {path} holds the last batch's token ids, by process; look there, or "
        "begin anew with a smaller --learning-rate or --max-grad-norm"
    )
