"""A cell of the comparison: one run of one method, and what was measured of it, kept in a file."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from accelerate import Accelerator

from benchmarks.token_efficiency.methods import OPTIONS, step_of
from benchmarks.token_efficiency.multiplication import (
    STUDENT_TEMPLATE,
    TEACHER_TEMPLATE,
    judge,
    sample_problems,
)
from benchmarks.token_efficiency.warm_start import load, model_path
from opsd_train.config import Config
from opsd_train.grading import evaluate
from opsd_train.models import adapter_weights
from opsd_train.opsd import Setup
from opsd_train.records import Problem
from opsd_train.run.setup import set_up
from opsd_train.sampling import Sampler, Sampling, draw_seed, make_sampler

LONGEST = 112  # tokens of a rollout: all of the longest solution, and a little more
WARMUP = 4  # steps over which the learning rate rises
TRAIN = 6000  # problems
AT_ONCE = 64  # rollouts of an evaluation, of like length
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
    samples: int = 1  # of each problem after the last step; 1 on the way
    warm_steps: int = 450  # of the model it begins with

    @property
    def name(self) -> str:
        """Of its file."""
        values = [str(getattr(self, f.name)) for f in fields(self)]
        key = hashlib.sha256(repr((asdict(self), recipe())).encode()).hexdigest()[:10]
        return "-".join(values[:4]).replace(" ", "_").replace(",", "") + f"-{key}"


def recipe(*files: str) -> str:
    """A hash of the code and the versions that decide a result: of the cells', and more files."""
    code = [Path(__file__).with_name(f"{name}.py").read_bytes() for name in (*RECIPE, *files)]
    made_by = (code, torch.__version__, transformers.__version__)
    return hashlib.sha256(repr(made_by).encode()).hexdigest()[:10]


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """The cell's result, from its file in the folder or anew.

    Returns:
        `cell`; `curve`, a dictionary for each evaluation: step, tokens generated for training,
        accuracy, how many samples solved each problem; seconds. Of a cell without steps also the
        accuracy of the teacher, and of the student greedily.
    """

    def anew() -> dict[str, Any]:
        wall, processor = time.perf_counter(), time.process_time()
        result = {"cell": asdict(cell), **measure(cell, folder)}
        seconds = (time.perf_counter() - wall, time.process_time() - processor)
        return result | {"wall_s": round(seconds[0], 2), "processor_s": round(seconds[1], 2)}

    return kept(folder / f"{cell.name}.json", anew)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What the file holds, or else what `make` returns, plain values, which it then holds."""
    if not path.exists():
        write_whole(path, json.dumps(make()) + "\n")
    return json.loads(path.read_text())


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
    problems = sorted(sample_problems(cell.part, cell.problems), key=lambda p: len(p.question))
    sampler = sampler_of(config, setup, LONGEST)  # whatever the length of rollouts
    for step in range(cell.steps + 1):
        metrics: dict[str, float] = {}
        if step > 0:
            generated, metrics = take(config, setup, optimizer, step)
            tokens += generated
        if (step % cell.every == 0 and cell.part == "test") or step == cell.steps:
            samples = cell.samples if step == cell.steps else 1
            measured = measure_accuracy(cell, setup, sampler, problems, step, samples)
            curve.append({"step": step, "tokens": tokens, **metrics, **measured})
    beginning = where_it_begins(cell, config, setup, problems) if cell.steps == 0 else {}
    return {"curve": curve, **beginning}


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
        "steps": max(1, cell.steps),
        "batch_size": 32,
        "micro_batch_tokens": 2400,
        "learning_rate": cell.rate,
        "schedule": "constant",
        "warmup": min(0.9, WARMUP / max(1, cell.steps)),
        "seed": cell.seed,
    }
    return Config(**values | options)


def make_setup(config: Config, cell: Cell, folder: Path) -> Setup:
    """The harness's; rollouts are sampled at T = 1, whatever the loss's temperature."""
    model, tokenizer = load(cell.size, cell.warm_steps, folder)
    setup = set_up(config, Accelerator(cpu=True), model, tokenizer, sample_problems("train", TRAIN))
    return replace(setup, sampler=sampler_of(config, setup, cell.longest))


def sampler_of(config: Config, setup: Setup, longest: int, temperature: float = 1.0) -> Sampler:
    return make_sampler(
        config,
        setup.accelerator,
        setup.model,
        setup.backbone,
        setup.tokenizer,
        Sampling(temperature, longest),
    )


def measure_accuracy(
    cell: Cell, setup: Setup, sampler: Sampler, problems: list[Problem], step: int, samples: int
) -> dict[str, Any]:
    each = [p for p in problems for _ in range(samples)]
    seed = draw_seed(cell.seed, "held-out", step)
    attempts = evaluate(sampler, setup.contexts.student, each, judge, seed, AT_ONCE)
    right = [int(a.correct) for a in attempts]
    return {
        "accuracy": fmean(right),
        "solved": [sum(right[i : i + samples]) for i in range(0, len(right), samples)],
        "length": fmean(a.tokens for a in attempts),
    }


def where_it_begins(
    cell: Cell, config: Config, setup: Setup, problems: list[Problem]
) -> dict[str, float]:
    """Of the model before any step: accuracy with the reference in view, and decoded greedily."""
    sampled, greedy = (sampler_of(config, setup, LONGEST, T) for T in (1.0, 0.01))
    measured = {}
    for name, sampler, context in (
        ("teacher", sampled, setup.contexts.teacher),
        ("greedy", greedy, setup.contexts.student),
    ):
        attempts = evaluate(sampler, context, problems, judge, cell.seed, AT_ONCE)
        measured[name] = fmean(a.correct for a in attempts)
    return measured
