"""`python -m opsd_train`: on-policy self-distillation (Zhao et al., 2026, Algorithm 1).

Config and output at the edges; in the middle, `train` reads as the algorithm.
"""

import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import peft
    import rich  # noqa: F401
    import transformers
    import yaml  # noqa: F401
except ImportError as error:
    sys.exit(f"opsd_train needs {error.name}: install it with `pip install 'opsd-kernels[train]'`")

import torch
from peft import PeftModelForCausalLM

from opsd_kernels import divergence_name
from opsd_train.config import Config, parse
from opsd_train.console import fail, progress_bar, say, show_attempt
from opsd_train.dry_run import dry_run
from opsd_train.evaluate import Accuracy, Completion, evaluate, grade
from opsd_train.model import add_adapter, base_weights_sha256, lm_head
from opsd_train.objective import opsd_loss
from opsd_train.prompts import student_prompt, teacher_prompt
from opsd_train.records import Problem
from opsd_train.report import RunFolder, accuracy_record
from opsd_train.rollout import sample
from opsd_train.score import score
from opsd_train.tiny_world import World, cache_path, is_correct, load_world


def train(config: Config, model: PeftModelForCausalLM, world: World, run: RunFolder) -> None:
    """Algorithm 1: the student samples, the teacher scores the same tokens with the solution in
    view, the student moves towards the teacher's whole next-token distribution."""
    W = lm_head(model)
    adapter = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, config.steps))
    batches = shuffled_batches(len(world.train), config)

    with progress_bar("OPSD", config.steps) as bar:
        for step in range(1, config.steps + 1):
            problems = [world.train[i] for i in next(batches)]  # (x, y*) ~ S

            with run.phase("rollout"):  # ŷ ~ p_S(· | x)
                rollout = sample(
                    model,
                    world.tokenizer,
                    problems,
                    temperature=config.temperature,
                    max_new_tokens=config.max_new_tokens,
                )
            with run.phase("score"):  # both contexts over the same ŷ
                scores = score(model, world.tokenizer, rollout)
            with run.phase("loss"):  # mean over each rollout's tokens, then over the batch
                loss = opsd_loss(scores, W, config)
            with run.phase("step"):
                loss.backward()
                grad_norm = torch.nn.utils.clip_grad_norm_(adapter, 1.0)
                (learning_rate,) = schedule.get_last_lr()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

            metrics = {
                "step": step,
                "loss": loss.item(),
                "grad_norm": grad_norm.item(),
                "learning_rate": learning_rate,
                "tokens": len(scores.tokens),
                "finished": sum(rollout.finished) / len(problems),
            }
            run.write_completions("rollout", step, grade(world.tokenizer, rollout, is_correct))
            if step % config.eval_every == 0 and step < config.steps:
                held_out = world.held_out[: min(128, config.eval_problems)]
                accuracy, _ = solve(config, model, world, run, "held-out", step, held_out)
                metrics |= accuracy_record(accuracy)
            run.write_metrics(**metrics)
            bar.advance_to(step, loss=f"{metrics['loss']:.4f}", **last_accuracy(run))


def main() -> None:
    config = parse()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # Matrices this small do not feed more cores, and threads that wait for each other cost more.
    torch.set_num_threads(min(2, torch.get_num_threads()))
    divergence = divergence_name(config.beta, config.entry_clip)
    if config.dry_run:
        torch.manual_seed(config.seed)
        dry_run(config, load_world(config.seed, warm=False), divergence)
        return

    path = config.output_dir or Path("runs") / time.strftime("%Y%m%d-%H%M%S")
    try:
        run = RunFolder(path, config.overwrite)
    except OSError as error:
        fail(str(error))
    run_in(run, config, divergence)


def run_in(run: RunFolder, config: Config, divergence: str) -> None:
    say(f"Loss: {divergence}, temperature {config.temperature}.")
    cached = cache_path(config.seed).exists()
    say(f"{'Cached' if cached else 'Building the'} warm-started model: {cache_path(config.seed)}")
    try:
        with run.phase("warm_start"), progress_bar("warm start", 100) as bar:
            world = load_world(config.seed, lambda fraction: bar.advance_to(int(100 * fraction)))
    except OSError as error:
        fail(
            f"{error}; delete {cache_path(config.seed)} or set XDG_CACHE_HOME to a writable folder"
        )
    run.begin({**config.as_dict(), "output_dir": str(run.path), "divergence": divergence})
    parameters = sum(w.numel() for w in world.model.parameters())
    say(f"Qwen3 with {parameters:,} parameters; {len(world.train):,} problems to learn from.")

    torch.manual_seed(config.seed)
    model = add_adapter(world.model, config.lora_rank)
    teacher_sha256 = base_weights_sha256(model)
    held_out = world.held_out[: config.eval_problems]

    with model.disable_adapter():
        teacher, attempts = solve(config, model, world, run, "teacher", 0, held_out)
    before, attempts_before = solve(config, model, world, run, "before", 0, held_out)
    say(f"\nteacher, sees the solution: {teacher}")
    say(f"student, before:            {before}\n")
    run.write_metrics(step=0, teacher_accuracy=teacher.mean, **accuracy_record(before))

    try:
        train(config, model, world, run)
    except KeyboardInterrupt:
        run.save_adapter(model)
        say(f"\n{run.path} holds the run so far, and the adapter as it stands.")
        raise

    after, attempts_after = solve(config, model, world, run, "after", config.steps, held_out)
    run.write_metrics(step=config.steps, **accuracy_record(after))
    if base_weights_sha256(model) != teacher_sha256:
        raise RuntimeError("the base weights, which are the teacher, changed during training")
    run.save_adapter(model)
    run.plot(divergence)
    say(f"\nstudent, before:            {before}")
    say(f"student, after:             {after}")
    for i in [i for i, attempt in enumerate(attempts_before) if not attempt.correct][:2]:
        say(f"\n{world.held_out[i].question} ({world.held_out[i].answer.lstrip('0')})")
        show_attempt("before ", attempts_before[i])
        show_attempt("after  ", attempts_after[i])
        show_attempt("teacher", attempts[i])
    run.write_summary(
        divergence=divergence,
        student_before=accuracy_record(before),
        student_after=accuracy_record(after),
        teacher=accuracy_record(teacher),
        base_weights_sha256=teacher_sha256,
        torch=torch.__version__,
        transformers=transformers.__version__,
        peft=peft.__version__,
    )
    say(f"\nThe base weights, which are the teacher, did not move. Run folder: {run.path}")


def solve(
    config: Config,
    model: PeftModelForCausalLM,
    world: World,
    run: RunFolder,
    phase: str,
    step: int,
    problems: list[Problem],
) -> tuple[Accuracy, list[Completion]]:
    """Sampled accuracy, its completions written to the run folder."""
    with run.phase("evaluate"), torch.random.fork_rng():
        # Draws of its own: how often a run is evaluated does not change how it trains.
        torch.manual_seed(config.seed + 1000 * step)
        accuracy, completions = evaluate(
            model,
            world.tokenizer,
            problems,
            is_correct,
            max_new_tokens=config.max_new_tokens,
            prompt=teacher_prompt if phase == "teacher" else student_prompt,
        )
    run.write_completions(phase, step, completions)
    return accuracy, completions


def last_accuracy(run: RunFolder) -> dict[str, str]:
    measured = [m["accuracy"] for m in run.metrics if "accuracy" in m]
    return {"held-out accuracy": f"{measured[-1]:.0%}"} if measured else {}


def rate(step: int, steps: int) -> float:
    """Learning rate: up over 5 steps, down to 0 over the second half."""
    return min(1.0, (step + 1) / 5) * min(1.0, 2 * (steps - step) / steps)


def shuffled_batches(total: int, config: Config) -> Iterator[list[int]]:
    """Batches of problem indices, every problem once before any comes again."""
    generator = torch.Generator().manual_seed(config.seed)
    queue: list[int] = []
    while True:
        while len(queue) < config.batch_size:
            queue += torch.randperm(total, generator=generator).tolist()
        yield queue[: config.batch_size]
        del queue[: config.batch_size]


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted", status=130)
