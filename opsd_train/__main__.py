"""`python -m opsd_train [config.yaml] [--option value ...]`: from the command line to `train`."""

import sys
import time
import warnings
from pathlib import Path

try:
    import accelerate
    import datasets
    import peft
    import rich  # noqa: F401
    import transformers
    import yaml  # noqa: F401
except ImportError as error:
    sys.exit(f"opsd_train needs {error.name}: install it with `pip install 'opsd-kernels[train]'`")

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from opsd_train import demo
from opsd_train.config import Config, parse
from opsd_train.console import console, fail, progress_bar, say
from opsd_train.data import load_problems
from opsd_train.dry_run import dry_run
from opsd_train.failures import RunFailed
from opsd_train.model import base_weights_sha256, load_model, load_tokenizer
from opsd_train.objective import loss_name
from opsd_train.report import RunFolder, check_tracker
from opsd_train.setup import Setup, check_distribution, set_up
from opsd_train.tiny_world import SMALL_WORLD, World, cache_path, is_correct, load_world
from opsd_train.train import train


def main(arguments: list[str] | None = None) -> None:
    config = parse(arguments)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # Micro-batches and dtypes are the config's, whatever a launcher would have them be.
    accelerator = Accelerator(mixed_precision="no", gradient_accumulation_steps=1)
    console.quiet = not accelerator.is_main_process
    try:
        check_tracker(config.tracker)
        check_distribution(config, accelerator)
        if config.model == SMALL_WORLD:
            # Matrices this small do not feed more cores, and threads that wait cost more.
            torch.set_num_threads(min(2, torch.get_num_threads()))
            run_in_small_world(config, accelerator)
        else:
            run_full(config, accelerator)
    except RunFailed as error:
        fail(str(error), error.status)
    except (OSError, ValueError) as error:
        fail(str(error))
    except torch.OutOfMemoryError as error:
        fail(
            "no memory for the model, which each process loads whole, with --shard too: take a "
            f"smaller one, or a larger card. ({error})"
        )
    finally:
        accelerator.end_training()


def run_full(config: Config, accelerator: Accelerator) -> None:
    run = None if config.dry_run else open_run_folder(config, accelerator)
    say(f"Loading {config.data} and {config.model} ...")
    problems = load_problems(config)
    model, tokenizer = load_model(config.model, config), load_tokenizer(config.model)
    setup = set_up(config, accelerator, model, tokenizer, problems)
    if run is None:
        dry_run(config, setup)
        return
    dropped = len(problems) - len(setup.problems)
    say(
        f"Data: {len(setup.problems):,} problems of {config.data}; {dropped:,} dropped, with a "
        f"prompt of more than {config.max_prompt_tokens:,} tokens."
    )
    say_plan(config, setup)
    begin(config, run)
    say("Hashing the base weights, to see at the end that they did not move ...")
    before = hash_base_weights(config, setup)
    train(config, setup, run, evaluate=lambda step, is_last: {})
    finish(config, setup, run, before)


def run_in_small_world(config: Config, accelerator: Accelerator) -> None:
    if config.dry_run:
        if not cache_path(config.seed).exists():
            say("No warm-started model is cached: the step below is taken with random weights.")
        torch.manual_seed(config.seed)
        world = load_world(config.seed, warm=False)
        dry_run(config, set_up_world(config, accelerator, world))
        return
    run = open_run_folder(config, accelerator)
    cached = cache_path(config.seed).exists()
    say(f"{'Cached' if cached else 'Building the'} warm-started model: {cache_path(config.seed)}")
    try:
        with (
            accelerator.main_process_first(),
            run.phase("warm_start"),
            progress_bar("warm start", 100) as bar,
        ):
            world = load_world(config.seed, lambda fraction: bar.advance_to(int(100 * fraction)))
    except OSError as error:
        fail(
            f"{error}; delete {cache_path(config.seed)} or set XDG_CACHE_HOME to a writable folder"
        )
    setup = set_up_world(config, accelerator, world)
    say(f"Data: {len(setup.problems):,} problems of long multiplication.")
    say_plan(config, setup)
    begin(config, run)
    before = hash_base_weights(config, setup)
    train(config, setup, run, demo.measure_held_out(config, setup, world, run))
    demo.plot(config, run)
    finish(config, setup, run, before, **demo.show(config, world, run))


def set_up_world(config: Config, accelerator: Accelerator, world: World) -> Setup:
    return set_up(config, accelerator, world.model, world.tokenizer, world.train, is_correct)


def open_run_folder(config: Config, accelerator: Accelerator) -> RunFolder:
    path = config.output_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    (path,) = broadcast_object_list([path])
    return RunFolder(
        path,
        overwrite=config.overwrite,
        resume=config.resume,
        is_main=accelerator.is_main_process,
    )


def begin(config: Config, run: RunFolder) -> None:
    values = {**config.as_dict(), "output_dir": str(run.path)}
    # How a run is started is asked each time: its config.yaml alone must not replace the run.
    values |= {"overwrite": False, "resume": False, "dry_run": False}
    run.begin(values, comment=loss_name(config))
    run.track(config.tracker, values)


def hash_base_weights(config: Config, setup: Setup) -> str:
    """By the main process alone, "" in others; but all take part where each holds a share."""
    if config.shard or setup.accelerator.is_main_process:
        return base_weights_sha256(setup.model)
    return ""


def finish(config: Config, setup: Setup, run: RunFolder, sha256: str, **summary: object) -> None:
    if hash_base_weights(config, setup) != sha256:
        raise RuntimeError("the base weights, which are the teacher, changed during training")
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
    say(f"\nThe base weights, which are the teacher, did not move. Run folder: {run.path}")


def say_plan(config: Config, setup: Setup) -> None:
    """Model, loss, effective batch and schedule, before the first step."""
    model, processes = setup.model, setup.accelerator.num_processes
    share = config.batch_size // processes
    micro_batches = -(-share // config.micro_batch_size)
    adapter = sum(w.numel() for w in model.parameters() if w.requires_grad)
    parameters = sum(w.numel() for w in model.parameters()) - adapter
    rising = round(config.warmup * config.steps)
    say(
        f"Model: Qwen3 with {parameters:,} parameters in {setup.W.dtype}, "
        f"{model.config._attn_implementation} attention, on {setup.accelerator.device}; "
        f"adapter of {adapter:,}, rank {config.lora_rank}.\n"
        f"Teacher: {config.teacher_model or config.teacher}.\n"
        f"Loss: {loss_name(config)}, temperature {config.temperature}, mean over "
        f"{'each rollout, then the batch' if config.mean == 'rollout' else 'all tokens'}.\n"
        f"Batch: {config.batch_size} rollouts a step (processes × micro-batches × at most so many "
        f"rollouts: {processes} × {micro_batches} × {config.micro_batch_size}).\n"
        f"Schedule: {config.steps} steps, {config.steps * config.batch_size:,} rollouts; learning "
        f"rate up to {config.learning_rate:.3g} over {rising} steps, then "
        f"{config.schedule}."
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", status=130)
