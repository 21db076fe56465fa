"""Between what is trained and a checkpoint of it."""

from pathlib import Path

import torch

from opsd_train.models import adapter_weights, copy_full, full_tensor, peft_name
from opsd_train.opsd import Setup
from opsd_train.run.checkpoint import Checkpoint, last_checkpoint


def capture(setup: Setup, optimizer: torch.optim.Optimizer, step: int) -> Checkpoint:
    """The state after a step, whole: called by all processes."""
    weights = adapter_weights(setup.model)
    return Checkpoint(
        step,
        adapter={peft_name(name): full_tensor(w) for name, w in weights.items()},
        optimizer={
            f"{name}.{moment}": full_tensor(value)
            for name, w in weights.items()
            for moment, value in optimizer.state[w].items()
        },
        teacher={name: full_tensor(value) for name, value in setup.teacher.state().items()},
        ahead=setup.ahead.state() if setup.ahead is not None else None,
    )


def restore(run: Path, setup: Setup, optimizer: torch.optim.Optimizer) -> int:
    """Go back to a run folder's last checkpoint, if there is one, and return its step, or 0."""
    checkpoint = last_checkpoint(run)
    if checkpoint is None:
        return 0
    weights = adapter_weights(setup.model)
    for name, w in weights.items():
        copy_full(w, checkpoint.adapter[peft_name(name)])
    for key, value in checkpoint.optimizer.items():
        name, _, moment = key.rpartition(".")
        state = optimizer.state[weights[name]]
        if moment == "step":  # a number, which AdamW keeps on the CPU
            state[moment] = value
        else:
            state[moment] = torch.empty_like(weights[name])
            copy_full(state[moment], value)
    for name, average in setup.teacher.state().items():
        copy_full(average, checkpoint.teacher[name])
    if setup.ahead is not None and checkpoint.ahead is not None:
        setup.ahead.restore(checkpoint.ahead)
    return checkpoint.step
