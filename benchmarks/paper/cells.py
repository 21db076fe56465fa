"""A cell of the comparison: one run of one method, and what was measured of it, kept in a file."""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from accelerate import Accelerator

from benchmarks.paper.methods import OPTIONS, step_of
from benchmarks.paper.multiplication import (
    STUDENT_TEMPLATE,
    TEACHER_TEMPLATE,
    judge,
    sample_problems,
)
from benchmarks.paper.warm_start import load, model_path
from opsd_train.config import Config
from opsd_train.evaluation import evaluate
from opsd_train.evaluation.metrics import pass_at
from opsd_train.models import adapter_weights
from opsd_train.opsd import Setup
from opsd_train.records import Problem
from opsd_train.run.setup import set_up
from opsd_train.sampling import Sampler, Sampling, draw_seed, make_sampler

LONGEST = 112  # tokens of a rollout: all of the longest solution, and a little more
TRAIN = 6000  # problems
RECIPE = ("multiplication", "warm_start", "methods", "cells")  # the files that decide a result


@dataclass(frozen=True)
class Cell:
    """What decides a result, beside the recipe."""

    method: str
    rate: float
    seed: int
    steps: int
    every: int  # steps between evaluations
    size: str = "middle"
    part: str = "test"  # of the problems, to evaluate on
    problems: int = 128
    temperature: float = 1.0  # of the loss; rollouts are sampled at 1
    longest: int = LONGEST  # rollout
    samples: int = 1  # of each problem after the last step
    warm_steps: int = 450  # of the model it begins with

    @property
    def name(self) -> str:
        """Of its file."""
        values = [str(getattr(self, f.name)) for f in fields(self)]
        key = hashlib.sha256(repr((asdict(self), recipe())).encode()).hexdigest()[:10]
        return "-".join(values[:4]).replace(" ", "_").replace(",", "") + f"-{key}"


def recipe() -> str:
    """A hash of the code and the versions that decide a result."""
    code = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in RECIPE]
    made_by = (code, torch.__version__, transformers.__version__)
    return hashlib.sha256(repr(made_by).encode()).hexdigest()[:10]


def cached(cell: Cell, folder: Path) -> dict[str, Any] | None:
    path = folder / f"{cell.name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """The cell's result, from its file or anew.

    Returns:
        `cell`; `curve`, a dictionary for each evaluation: step, tokens generated, accuracy, and
        whether each problem was solved, as text of 0 and 1; `pass_at` by k where there are several
        samples; seconds.
    """
    if known := cached(cell, folder):
        return known
    wall, processor = time.perf_counter(), time.process_time()
    result = {"cell": asdict(cell), **measure(cell, folder)}
    result["wall_s"] = round(time.perf_counter() - wall, 2)
    result["processor_s"] = round(time.process_time() - processor, 2)
    write_whole(folder / f"{cell.name}.json", json.dumps(result) + "\n")
    return result


def write_whole(path: Path, text: str) -> None:
    """All of it or, interrupted, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.replace(path)


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    config = config_of(cell, folder)
    setup = make_setup(config, cell, folder)
    optimizer = torch.optim.AdamW(
        adapter_weights(setup.model).values(), lr=config.learning_rate, weight_decay=0.0
    )
    take, tokens, curve = step_of(cell.method), 0, []
    problems = sample_problems(cell.part, cell.problems)
    sampler = sampler_of(config, setup, LONGEST)  # whatever the length of rollouts
    for step in range(cell.steps + 1):
        metrics: dict[str, float] = {}
        if step > 0:
            generated, metrics = take(config, setup, optimizer, step)
            tokens += generated
        if step % cell.every == 0 or step == cell.steps:
            measured = measure_accuracy(cell, setup, sampler, problems, step)
            curve.append({"step": step, "tokens": tokens, **metrics, **measured})
    return {"curve": curve, "pass_at": pass_at_k(cell, setup, sampler, problems)}


def config_of(cell: Cell, folder: Path) -> Config:
    options = dict(OPTIONS[cell.method])
    if "teacher_model" in options:
        options["teacher_model"] = str(
            model_path(options["teacher_model"], cell.warm_steps, folder)
        )
    values: dict[str, Any] = {
        "model": cell.size,
        "data": "long multiplication",
        "dtype": "float32",
        "activation_checkpointing": False,
        "max_prompt_tokens": 128,
        "lora_rank": 16,
        "lora_alpha": 32,
        "student_template": STUDENT_TEMPLATE,
        "teacher_template": TEACHER_TEMPLATE,
        "temperature": cell.temperature,
        "max_new_tokens": cell.longest,
        "steps": cell.steps,
        "batch_size": 32,
        "micro_batch_tokens": 2400,
        "learning_rate": cell.rate,
        "schedule": "constant",
        "warmup": min(0.9, 4 / cell.steps),
        "seed": cell.seed,
    }
    return Config(**values | options)


def make_setup(config: Config, cell: Cell, folder: Path) -> Setup:
    """The harness's; rollouts are sampled at T = 1, whatever the loss's temperature."""
    model, tokenizer = load(cell.size, cell.warm_steps, folder)
    setup = set_up(config, Accelerator(cpu=True), model, tokenizer, sample_problems("train", TRAIN))
    return replace(setup, sampler=sampler_of(config, setup, cell.longest))


def sampler_of(config: Config, setup: Setup, longest: int) -> Sampler:
    return make_sampler(
        config,
        setup.accelerator,
        setup.model,
        setup.backbone,
        setup.tokenizer,
        Sampling(1.0, longest),
    )


def measure_accuracy(
    cell: Cell, setup: Setup, sampler: Sampler, problems: list[Problem], step: int
) -> dict[str, Any]:
    """Of one sample a problem."""
    seed = draw_seed(cell.seed, "held-out", step)
    attempts = evaluate(sampler, setup.contexts.student, problems, judge, seed)
    return {
        "accuracy": fmean(a.correct for a in attempts),
        "solved": "".join(str(int(a.correct)) for a in attempts),
        "length": fmean(a.tokens for a in attempts),
    }


def pass_at_k(
    cell: Cell, setup: Setup, sampler: Sampler, problems: list[Problem]
) -> dict[int, float]:
    """By k, from several samples of each problem; none from one."""
    n = cell.samples
    if n == 1:
        return {}
    seed = draw_seed(cell.seed, "pass@k")
    attempts = evaluate(
        sampler, setup.contexts.student, [p for p in problems for _ in range(n)], judge, seed
    )
    right = [sum(a.correct for a in attempts[i : i + n]) for i in range(0, len(attempts), n)]
    ks = [2**i for i in range(n.bit_length()) if 2**i <= n]
    return {k: fmean(pass_at(k, n, c) for c in right) for k in ks}
