"""A real model trained by `opsd_train`, and by TRL's `SDFTTrainer` with our loss and with its own.

    python benchmarks/more/adoptions.py --model FOLDER [--steps 4] [--output FOLDER]

All begin with the same adapter, have the same prompts and problems, and sample greedily, so that
the rollouts are the same as well. The teacher's prompt is one message, which is what SDFT has. Each
runs in a process of its own. Recorded are the loss and the norm of its gradient at each step, the
most resident memory of the process during the steps, weights included, and the time of its
processor.

With --output it writes adoptions.csv and adoptions.md to the folder.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.lib import real_states, report
from benchmarks.lib.measure import MIB, clock, high_water, in_a_process, start_counting, tell
from benchmarks.lib.options import Options
from benchmarks.more.same_training import no_phase
from opsd_train.models import adapter_weights
from opsd_train.opsd import Setup, take_step
from opsd_train.opsd.step import problem_indices

HARNESS, TRL_OURS, TRL = "ours, opsd_train", "ours, TRL", "TRL"
METHODS = (HARNESS, TRL_OURS, TRL)
CPU = torch.device("cpu")
LEARNING_RATE = 2e-4
NAN = float("nan")
ONE_MESSAGE = (real_states.SYSTEM, {"role": "user", "content": "{problem}\n\n{solution}"})


@dataclass(frozen=True)
class Row:
    method: str
    failure: str = ""
    peak_mib: float = NAN  # of the process
    seconds: float = NAN  # of its processor, for all steps
    losses: str = ""  # of each step
    grad_norms: str = ""


def main() -> None:
    options = Options(__doc__)
    options.add_argument("--model", help="folder or hub name")
    options.add_argument("--steps", type=int, default=4)
    options.add_argument("--rollouts", type=int, default=8, help="a step")
    options.add_argument("--tokens", type=int, default=24, help="of a rollout, at most")
    options.add_processes()
    options.add_output("adoptions.csv", "adoptions.md")
    args = options.parse_args()
    if args.here:
        tell(measure_here, args.here)
        return
    if args.model is None:
        options.error("--model must name a folder or a model of the hub")
    setting = (
        f"{report.machine(CPU)}; {Path(args.model).name}, float32, LoRA, {args.steps} steps of "
        f"{args.rollouts} rollouts of at most {args.tokens} tokens"
    )
    print(setting)
    results = report.Results("adoptions", setting, args.output, show)
    for method in METHODS:
        task = {"device": "cpu", "method": method, "model": args.model, "steps": args.steps,
                "rollouts": args.rollouts, "tokens": args.tokens}  # fmt: skip
        failure, figures = in_a_process(__file__, task, args.seconds)
        results.add(Row(method, failure, **figures))
    if results.path is not None:
        results.path.with_suffix(".md").write_text(summary(results.path) + "\n")


def measure_here(
    device: str, method: str, model: str, steps: int, rollouts: int, tokens: int
) -> dict[str, Any]:
    """In this process."""
    warnings.filterwarnings("ignore")
    setup = real_states.prepare(
        model,
        real_states.problems(steps * rollouts),
        teacher_template=ONE_MESSAGE,
        steps=steps,
        batch_size=rollouts,
        micro_batch_size=rollouts,
        max_new_tokens=tokens,
        top_k=1,
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup=0.0,
    )
    train = by_the_harness(setup) if method == HARNESS else by_trl(setup, method == TRL_OURS)
    start_counting(CPU)
    start = clock(CPU)
    losses, grad_norms = train()
    return {
        "seconds": clock(CPU) - start,
        "peak_mib": high_water(CPU) / MIB,
        "losses": " ".join(map(str, losses)),
        "grad_norms": " ".join(map(str, grad_norms)),
    }


Train = Callable[[], tuple[list[float], list[float]]]
"""Takes all steps, and returns the losses and the norms of the gradients."""


def by_the_harness(setup: Setup) -> Train:
    config = setup.config
    optimizer = torch.optim.AdamW(adapter_weights(setup.model).values(), weight_decay=0.0)

    def train() -> tuple[list[float], list[float]]:
        told = [
            take_step(config, setup, optimizer, step + 1, no_phase)[1]
            for step in range(config.steps)
        ]
        return [m["loss"] for m in told], [m["grad_norm"] for m in told]

    return train


def by_trl(setup: Setup, with_ours: bool) -> Train:
    """The same model, adapter and prompts in TRL's trainer."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    from opsd_kernels.trl import apply_opsd_kernels_to_trl

    config = setup.config
    steps = range(1, config.steps + 1)
    order = [i for step in steps for i in problem_indices(len(setup.problems), config, step)]
    taken = [setup.problems[i] for i in order]
    columns = {
        "prompt": [
            [real_states.SYSTEM, {"role": "user", "content": problem.question}] for problem in taken
        ],
        "privileged_context": [problem.solution for problem in taken],
    }
    args = SDFTConfig(
        output_dir=tempfile.mkdtemp(),
        distillation_mode="full_logits",
        num_generations=1,
        shuffle_dataset=False,
        max_completion_length=config.max_new_tokens,
        top_k=config.top_k,
        per_device_train_batch_size=config.batch_size,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model: Any = setup.model
    trainer = SDFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(columns),
        processing_class=setup.tokenizer,
    )

    def train() -> tuple[list[float], list[float]]:
        with apply_opsd_kernels_to_trl(["SDFTTrainer"]) if with_ours else nullcontext():
            trainer.train()
        if getattr(trainer, "_opsd_kernels_notices", None):
            raise RuntimeError("fell back to TRL's own loss")
        told = [log for log in trainer.state.log_history if "loss" in log]
        return [log["loss"] for log in told], [log["grad_norm"] for log in told]

    return train


def show(row: Row) -> None:
    figures = row.failure or f"{row.peak_mib:,.0f} MiB, {row.seconds:.1f} s, losses {row.losses}"
    print(f"{row.method:<18} {figures}", flush=True)


def summary(path: Path) -> str:
    """Memory, time, and loss and gradient norm of each step, as Markdown."""
    setting, rows = report.read(path, Row)
    body = []
    for row in rows:
        told = zip(row.losses.split(), row.grad_norms.split(), strict=True)
        cells = [f"{float(loss):.6f}, {float(norm):.5f}" for loss, norm in told]
        of_process = [f"{row.peak_mib:,.0f} MiB", f"{row.seconds:.1f} s"]
        body.append([row.method, *([row.failure] if row.failure else [*of_process, *cells])])
    steps = max(len(cells) for cells in body) - 3
    head = ["", "memory", "processor time", *(f"step {i + 1}" for i in range(steps))]
    return f"{report.table(head, body)}\n\n({setting})"


if __name__ == "__main__":
    main()
