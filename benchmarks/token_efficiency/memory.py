"""Memory of self-distillation, whose teacher is the student with its adapter off, beside that of
distillation from a separate teacher of the same size: counted, bytes alive at once."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import step as whole_step
from benchmarks.lib.allocations import Allocations, fake_device
from benchmarks.lib.measure import MIB
from benchmarks.token_efficiency.cells import Cell, config_of, kept, make_setup, recipe
from benchmarks.token_efficiency.methods import opsd_step
from benchmarks.token_efficiency.warm_start import model_path
from opsd_train.models import adapter_weights

SMALL_WORLD = "the small world"
COUNTED = [("qwen3-8b", 16384), ("qwen3-8b", 1024), ("qwen3-1.7b", 16384), ("qwen3-1.7b", 1024)]
METHOD = "ours, logit-free"
TEACHERS = OWN, SEPARATE = ("the student's own weights", "separate weights")


@dataclass(frozen=True)
class Row:
    """All of a training step: weights, AdamW's state, and the most that is alive besides."""

    model: str
    tokens: int  # of the rollouts
    teacher: str
    how: str
    weights_mib: float
    optimizer_mib: float
    peak_mib: float
    processor_s: float = 0.0

    @property
    def total(self) -> float:
        return self.weights_mib + self.optimizer_mib + self.peak_mib


def row(model: str, tokens: int, teacher: str, cell: Cell, folder: Path) -> dict[str, Any]:
    """A `Row` as plain values, kept: measured in a step of the cell where the model is the world's,
    otherwise counted."""

    def anew() -> dict[str, Any]:
        start = time.process_time()
        if model == SMALL_WORLD:
            made = measure_small_world(cell, teacher, folder)
        else:
            made = count_qwen3(model, tokens, teacher)
        return asdict(made) | {"processor_s": round(time.process_time() - start, 2)}

    key = f"{recipe('memory')}-{model}-{tokens}-{TEACHERS.index(teacher)}-{cell.name}"
    return kept(folder / f"memory-{key}.json", anew)


def measure_small_world(cell: Cell, teacher: str, folder: Path) -> Row:
    """A real step, its second, of the harness; what is alive is seen by PyTorch's dispatcher."""
    config = config_of(cell, folder)
    if teacher == SEPARATE:
        path = model_path(cell.size, cell.warm_steps, folder)
        config = replace(config, teacher_model=str(path))
    setup = make_setup(config, cell, folder)
    weights = {w.data_ptr(): w.nbytes for w in setup.model.parameters()}
    if teacher == SEPARATE:
        weights |= {w.data_ptr(): w.nbytes for w in setup.teacher.backbone.parameters()}
        assert setup.teacher.head is not None
        weights[setup.teacher.head.weight.data_ptr()] = setup.teacher.head.weight.nbytes
    adapter = list(adapter_weights(setup.model).values())
    optimizer = torch.optim.AdamW(adapter, lr=config.learning_rate, weight_decay=0.0)
    opsd_step(config, setup, optimizer, 1)
    with Allocations() as allocations:
        tokens, _ = opsd_step(config, setup, optimizer, 2)
    return Row(
        SMALL_WORLD,
        tokens,
        teacher,
        "measured",
        sum(weights.values()) / MIB,
        2 * sum(w.nbytes for w in adapter) / MIB,
        allocations.peak / MIB,
    )


def count_qwen3(name: str, tokens: int, teacher: str) -> Row:
    """As on a GPU, without running it: one rollout, LoRA of rank 64, bf16, checkpointed layers."""
    fake_mode = FakeTensorMode()
    with torch.device("meta"):
        student: Any = whole_step.make_model(name, torch.bfloat16, METHOD)
        other: Any = None
        if teacher == SEPARATE:
            other = whole_step.make_model(name, torch.bfloat16, METHOD)
    with fake_mode:
        for model in filter(None, (student, other)):
            whole_step.make_fake(model)
    with fake_device("cuda", fake_mode), Allocations() as allocations:
        whole_step.step(student, whole_step.LOSSES[METHOD], tokens, other)
    adapter = sum(w.nbytes for w in student.parameters() if w.requires_grad)
    weights = sum(w.nbytes for w in student.parameters())
    if teacher == SEPARATE:
        weights += weights - adapter
    return Row(
        name,
        tokens,
        teacher,
        "counted",
        weights / MIB,
        2 * adapter / MIB,
        allocations.peak / MIB,
    )
