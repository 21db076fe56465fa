"""A run from its folder to its summary: steps, checkpoints and metrics, until it is done, is asked
to stop, or fails."""

import resource
import sys
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from opsd_train.config import Config
from opsd_train.errors import RunFailed
from opsd_train.grading import texts
from opsd_train.models import (
    adapter_config,
    adapter_weights,
    base_model,
    base_weights_sha256,
)
from opsd_train.opsd import BaseTeacher, Setup, loss_name, take_step
from opsd_train.records import Rollout
from opsd_train.report import write_report
from opsd_train.run.checkpoint import broken_checkpoints, capture, restore, save_checkpoint
from opsd_train.run.console import progress_bar, say
from opsd_train.run.failures import MAX_SKIPPED, StopRequest, explained
from opsd_train.run.fingerprint import fingerprint
from opsd_train.run.folder import REPORT, RunFolder
from opsd_train.run.held_out import Evaluate, measure_held_out, say_change
from opsd_train.run.plan import dry_run, say_plan
from opsd_train.run.recording import record_tokens
from opsd_train.run.setup import check_batch, load, set_up

TRUNCATED_STEPS = 5  # in a row, before it is said that all rollouts are cut off


def run_training(config: Config, accelerator: Accelerator) -> None:
    """The run that a config asks for, or for a dry run one step of it.

    Raises:
        RunFailed: it cannot go on, or was asked to stop; what it did is saved.
        OSError, ValueError: it cannot begin; the run folder is as it was.
    """
    run = None if config.dry_run else open_run_folder(config, accelerator)
    if run is not None:  # before a large model is loaded; what may be fitted to it, after that
        fitted = ("max_prompt_tokens", "max_new_tokens")
        run.check_same({k: v for k, v in plain_values(config, run).items() if k not in fitted})
    materials = load(config)
    setup = set_up(config, accelerator, materials.model, materials.tokenizer, materials.problems)
    config = setup.config
    check_batch(config, setup.problems)
    say_plan(setup, materials)
    if run is None:
        dry_run(config, setup)
        return
    before = initial = hash_base_weights(setup)
    if config.train == "full":
        initial = hash_base_weights(setup, with_trained=True)
    begin(config, run, fingerprint(config, setup, materials, initial))
    train(config, setup, run, measure_held_out(config, setup, materials.held_out, run))
    finish(setup, run, before, say_change(run))


def open_run_folder(config: Config, accelerator: Accelerator) -> RunFolder:
    path = config.output_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    (path,) = broadcast_object_list([path])
    return RunFolder(
        path,
        overwrite=config.overwrite,
        resume=config.resume,
        is_main=accelerator.is_main_process,
    )


def plain_values(config: Config, run: RunFolder) -> dict[str, Any]:
    """What config.yaml holds. How a run is started is asked each time: the file alone must not
    replace the run."""
    started = {"overwrite": False, "resume": False, "dry_run": False}
    return {**config.as_dict(), "output_dir": str(run.path), **started}


def begin(config: Config, run: RunFolder, contents: dict[str, str]) -> None:
    values = plain_values(config, run)
    run.begin(values, comment=loss_name(config), contents=contents)
    run.track(config.tracker, values)


def hash_base_weights(setup: Setup, with_trained: bool = False) -> str:
    """By the main process alone, "" in others; but all take part where each holds a share."""
    if not (setup.config.shard or setup.accelerator.is_main_process):
        return ""
    with progress_bar("hashing the base weights", len(setup.model.state_dict())) as bar:
        return base_weights_sha256(setup.model, bar.advance_to, with_trained)


def train(config: Config, setup: Setup, run: RunFolder, evaluate: Evaluate) -> None:
    """Algorithm 1, step after step, from the last checkpoint if the run is resumed.

    Raises:
        RunFailed: the run cannot go on, or was asked to stop; what it did is saved.
    """
    adapter = adapter_weights(setup.model).values()
    optimizer = torch.optim.AdamW(adapter, lr=config.learning_rate, weight_decay=0.0)
    step = restore(run.path, setup, optimizer) if config.resume else 0
    if config.resume:
        say_resumed(run, step, config)

    def save() -> None:
        state = capture(setup, optimizer, step)
        if setup.accelerator.is_main_process:
            save_checkpoint(run.path, state, adapter_config(setup.model), config.keep_last)

    def rescue() -> None:
        # What all processes gather cannot be had by one that ran out of memory.
        is_gathered = config.shard or (config.ahead and setup.accelerator.num_processes > 1)
        if step > 0 and not is_gathered:
            save()

    with (
        progress_bar("OPSD", config.steps, step) as bar,
        StopRequest() as stop,
        explained(run, rescue),
    ):
        run.doing = bar.doing
        if step == 0 and (measured := evaluate(0, False)):
            run.write_metrics(step=0, **measured)
            bar.start = time.monotonic()  # no step will take what this took
        while step < config.steps:
            observe = record_tokens(setup, run, step + 1)
            rollout, metrics = take_step(config, setup, optimizer, step + 1, run.phase, observe)
            step += 1

            stopping = asked_to_stop(stop, setup)
            is_last = step == config.steps
            metrics |= evaluate(step, is_last)
            completions = [(x, y, None) for x, y in texts(setup.tokenizer, rollout)]
            run.write_completions("rollout", step, gather_object(completions))
            run.write_metrics(**metrics, **cost(run, setup, metrics["tokens"]))
            bar.advance_to(step, **figures(run.metrics))
            warn_of_truncation(config, run.metrics)

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


def say_resumed(run: RunFolder, step: int, config: Config) -> None:
    for path in broken_checkpoints(run.path):
        say(f"{path} is not whole, and is passed over.")
    if step >= config.steps:
        say(f"All {config.steps} steps of {run.path} are taken: nothing is left to do.")
    elif step > 0:
        say(f"Resumed after step {step}.")


def finish(setup: Setup, run: RunFolder, sha256: str, summary: dict[str, Any]) -> None:
    if hash_base_weights(setup) != sha256:
        raise RuntimeError(f"the {base_weights(setup)} changed during training")
    if setup.config.train == "full":
        run.save_model(lambda folder: save_rest(setup, folder))
    else:
        run.save_adapter()
    run.write_summary(
        divergence=loss_name(setup.config),
        **summary,
        base_weights_sha256=sha256,
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
        accelerate=accelerate.__version__,
    )
    if run.is_main:
        write_report([run.path], run.path / REPORT)
    say(f"\nThe {base_weights(setup)} did not move. Run folder: {run.path}")
    say(f"Report: {run.path / REPORT}")


def save_rest(setup: Setup, folder: Path) -> None:
    """What a model folder needs beside weights and config."""
    setup.tokenizer.save_pretrained(folder)
    base_model(setup.model).generation_config.save_pretrained(folder)


def base_weights(setup: Setup) -> str:
    if setup.config.train == "full":
        return "embeddings and LM head"
    is_teacher = isinstance(setup.teacher, BaseTeacher)
    return "base weights, which are the teacher," if is_teacher else "base weights"


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
    """What is shown of the last step beside the progress: the first is the last to be left out."""
    last = metrics[-1]
    shown = {"loss": f"{last['loss']:.4f}"}
    if skipped := sum(m["skipped"] for m in steps_of(metrics)):
        shown["skipped"] = f"{skipped}"
    if measured := [m["accuracy"] for m in metrics if "accuracy" in m]:
        shown["held-out"] = f"{measured[-1]:.0%}"
    shown |= {"truncated": f"{last['truncated']:.0%}", "length": f"{last['length_mean']:.0f}"}
    if "forward_kl" in last:
        shown["forward KL"] = f"{last['forward_kl']:.4f}"
    return shown | {"seconds": f"{sum(last['seconds'].values()):.1f}"}


def warn_of_truncation(config: Config, metrics: list[dict[str, Any]]) -> None:
    """Say it once, when no rollout has ended by itself for some steps."""
    steps = steps_of(metrics)
    last = steps[-TRUNCATED_STEPS:]
    if len(last) == TRUNCATED_STEPS and all(m["truncated"] == 1 for m in last):
        if len(steps) > TRUNCATED_STEPS and steps[-TRUNCATED_STEPS - 1]["truncated"] == 1:
            return  # said before
        say(
            f"No rollout of the last {TRUNCATED_STEPS} steps ended within max_new_tokens = "
            f"{config.max_new_tokens}: answers are cut off. Raise --max-new-tokens, or see in "
            "completions.jsonl whether the model ends its answers at all."
        )


def steps_of(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m for m in metrics if "loss" in m]


# When to stop


def skipped_in_a_row(metrics: list[dict[str, Any]]) -> int:
    """Steps without a finite loss or gradient, up to the last one."""
    return len(list(takewhile(lambda m: m["skipped"], reversed(steps_of(metrics)))))


def asked_to_stop(stop: StopRequest, setup: Setup) -> int:
    """The number of the signal that any process was sent, or 0."""
    own = torch.tensor(stop.signal or 0, device=setup.accelerator.device)
    return int(setup.accelerator.gather(own[None]).max())


def give_up(run: RunFolder, rollout: Rollout) -> None:
    """Save the batch that has no finite loss, and end the run."""
    batch = {"prompts": rollout.prompts, "completions": rollout.completions}
    path = run.write_json("failed_batch.json", gather_object([batch]))
    raise RunFailed(
        f"the loss or its gradient was not finite in {MAX_SKIPPED} steps one after the other; "
        f"these steps changed nothing. {path} holds the last batch's token ids, by process; look "
        "there, or begin anew with a smaller --learning-rate or --max-grad-norm"
    )
