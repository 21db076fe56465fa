"""A run from its folder to its summary."""

import time
from pathlib import Path

import accelerate
import peft
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from opsd_train.config import Config
from opsd_train.models import (
    adapter_weights,
    base_model,
    base_weights_sha256,
    read_lora_config,
)
from opsd_train.opsd import BaseTeacher, Setup, loss_name
from opsd_train.report import write_report
from opsd_train.run.console import say
from opsd_train.run.dry_run import dry_run
from opsd_train.run.fingerprint import fingerprint
from opsd_train.run.folder import REPORT, RunFolder
from opsd_train.run.lengths import check_batch, fit_lengths
from opsd_train.run.loop import train
from opsd_train.run.memory_plan import peak_on_gpu, plan_memory
from opsd_train.run.setup import make_contexts, set_up
from opsd_train.run.world import World


def run_in(world: World, accelerator: Accelerator) -> None:
    """The run that a world's config asks for, or for a dry run one step of it.

    Raises:
        RunFailed: it cannot go on, or was asked to stop; what it did is saved.
        OSError, ValueError: it cannot begin; the run folder is as it was.
    """
    config = world.config
    run = None if config.dry_run else open_run_folder(config, accelerator)
    materials = world.load(accelerator, run.phase if run is not None else None)
    contexts = make_contexts(config, materials.tokenizer)
    config = world.config = fit_lengths(config, materials.model, contexts, materials.problems)
    setup = set_up(config, accelerator, materials.model, materials.tokenizer, materials.problems)
    check_batch(config, setup.problems)
    if run is None:
        dry_run(config, setup)
        return
    say(world.describe(materials, setup))
    say_plan(config, setup)
    say_memory(config, setup)
    if not world.is_fast:
        say("Hashing the base weights, to see at the end that they did not move ...")
    before = hash_base_weights(config, setup)
    begin(config, run, fingerprint(config, setup, materials, before))
    train(world, setup, run, world.evaluation(materials, setup, run))
    finish(config, setup, run, before, **world.conclude(materials, run))


def say_memory(config: Config, setup: Setup) -> None:
    """What the largest micro-batch will take of a GPU."""
    device = setup.accelerator.device
    if device.type == "cuda":
        there = torch.cuda.memory_allocated(device)
        available = torch.cuda.get_device_properties(device).total_memory
        say(plan_memory(config, setup, peak_on_gpu, there, available).describe(config))


def open_run_folder(config: Config, accelerator: Accelerator) -> RunFolder:
    path = config.output_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    (path,) = broadcast_object_list([path])
    return RunFolder(
        path,
        overwrite=config.overwrite,
        resume=config.resume,
        is_main=accelerator.is_main_process,
    )


def begin(config: Config, run: RunFolder, contents: dict[str, str]) -> None:
    values = {**config.as_dict(), "output_dir": str(run.path)}
    # How a run is started is asked each time: its config.yaml alone must not replace the run.
    values |= {"overwrite": False, "resume": False, "dry_run": False}
    run.begin(values, comment=loss_name(config), contents=contents)
    run.track(config.tracker, values)


def hash_base_weights(config: Config, setup: Setup) -> str:
    """By the main process alone, "" in others; but all take part where each holds a share."""
    if config.shard or setup.accelerator.is_main_process:
        return base_weights_sha256(setup.model)
    return ""


def finish(config: Config, setup: Setup, run: RunFolder, sha256: str, **summary: object) -> None:
    if hash_base_weights(config, setup) != sha256:
        raise RuntimeError(f"the {base_weights(setup)} changed during training")
    run.save_adapter()
    run.write_summary(
        divergence=loss_name(config),
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


def base_weights(setup: Setup) -> str:
    is_teacher = isinstance(setup.teacher, BaseTeacher)
    return "base weights, which are the teacher," if is_teacher else "base weights"


def say_plan(config: Config, setup: Setup) -> None:
    """Model, loss, effective batch and schedule, before the first step."""
    model, processes = setup.model, setup.accelerator.num_processes
    share = config.batch_size // processes
    if config.micro_batch_tokens is not None:
        parts = (
            f"over processes: {processes} × {share}, in micro-batches of up to "
            f"{config.micro_batch_tokens:,} tokens"
        )
    else:
        micro_batches = -(-share // config.micro_batch_size)
        parts = (
            f"processes × micro-batches × at most so many rollouts: {processes} × {micro_batches} "
            f"× {config.micro_batch_size}"
        )
    adapter = sum(w.numel() for w in adapter_weights(model).values())
    parameters = count_parameters(base_model(model)) - adapter
    kind = type(base_model(model)).__name__.removesuffix("ForCausalLM")
    rising = round(config.warmup * config.steps)
    say(
        f"Model: {kind} with {parameters:,} parameters in {setup.head.weight.dtype}, "
        f"{model.config._attn_implementation} attention, on {setup.accelerator.device}; "
        f"adapter of {adapter:,}, rank {config.lora_rank}.\n"
        f"{describe_start(config)}"
        f"Teacher: {config.teacher_model or config.teacher}.\n"
        f"Loss: {loss_name(config)}, temperature {config.temperature}, mean over "
        f"{'each rollout, then the batch' if config.mean == 'rollout' else 'all tokens'}.\n"
        f"Batch: {config.batch_size} rollouts a step ({parts}).\n"
        f"Schedule: {config.steps} steps, {config.steps * config.batch_size:,} rollouts; learning "
        f"rate up to {config.learning_rate:.3g} over {rising} steps, then "
        f"{config.schedule}."
    )


def describe_start(config: Config) -> str:
    """Which adapter training starts from, if it is not a new one."""
    if config.adapter is None:
        return ""
    base = read_lora_config(config.adapter).base_model_name_or_path
    elsewhere = f", made for {base}" if base and base != config.model else ""
    return f"Adapter to start from: {config.adapter}{elsewhere}.\n"


def count_parameters(model: PreTrainedModel) -> int:
    """Of the model, a weight with two names once: sharded, they are two tensors."""
    tied = model.all_tied_weights_keys if model.config.get_text_config().tie_word_embeddings else ()
    return sum(w.numel() for name, w in model.named_parameters() if name not in tied)
