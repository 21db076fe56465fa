"""What a run needs to go on as if it had never stopped, written so that it is there whole or not.

checkpoints/step-000120/
    adapter_model.safetensors, adapter_config.json    the adapter, as PEFT loads it; or
    model.safetensors, config.json                    the model, with `train: full`
    optimizer.safetensors                             AdamW's moments, by name of weight
    teacher.safetensors                               the ema teacher's average, if there is one
    ahead.json                                        rollouts of the next step, with --ahead
    state.json                                        the step, and the size of each file above

No random state and no position in the data: every draw, the order of problems and the learning rate
are functions of the seed and the step. Nothing is unpickled.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from opsd_train.files import write_through
from opsd_train.models import adapter_weights, copy_full, full_tensor, peft_name, saved_weights
from opsd_train.opsd import Setup

FOLDER = "checkpoints"
STATE = "state.json"
AHEAD = "ahead.json"
WEIGHTS = {"adapter_model.safetensors": "adapter_config.json", "model.safetensors": "config.json"}
"""Files of weights that were trained, and the config beside each."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    ahead: dict[str, Any] | None = None
    weights_file: str = "adapter_model.safetensors"  # or model.safetensors


def save_checkpoint(run: Path, checkpoint: Checkpoint, adapter_config: str, keep_last: int) -> None:
    """Write a checkpoint of a run folder, then remove all but the last `keep_last`.

    Written beside its place and renamed into it when all of it is on the disk: a run killed at any
    instant leaves a whole checkpoint, or none.

    Raises:
        OSError: it could not be written; the earlier checkpoints are as they were.
    """
    path = _path(run, checkpoint.step)
    if _is_whole(path):
        return
    contents = {
        checkpoint.weights_file: _serialized(checkpoint.adapter),
        WEIGHTS[checkpoint.weights_file]: adapter_config.encode(),
        "optimizer.safetensors": _serialized(checkpoint.optimizer),
        "teacher.safetensors": _serialized(checkpoint.teacher),
    }
    if checkpoint.ahead is not None:
        contents[AHEAD] = json.dumps(checkpoint.ahead).encode()
    state = {"step": checkpoint.step, "bytes": {name: len(data) for name, data in contents.items()}}
    contents[STATE] = json.dumps(state, indent=2).encode()
    _write_folder(run, path, contents)
    for old in _paths(run)[:-keep_last]:
        _set_aside(run, old)
    remove_unfinished(run)


def last_step(run: Path) -> int | None:
    """The step of a run folder's newest checkpoint that is whole, or None."""
    steps = (int(path.name.removeprefix("step-")) for path in _paths(run) if _is_whole(path))
    return max(steps, default=None)


def broken_checkpoints(run: Path) -> list[Path]:
    """Those newer than the newest that is whole."""
    newest = _path(run, last_step(run) or 0)
    return [path for path in _paths(run) if path > newest]


def last_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder that is whole, or None."""
    step = last_step(run)
    if step is None:
        return None
    weights_file = next(name for name in WEIGHTS if (_path(run, step) / name).exists())
    adapter, optimizer, teacher = (
        safetensors.torch.load_file(_path(run, step) / name)
        for name in (weights_file, "optimizer.safetensors", "teacher.safetensors")
    )
    path = _path(run, step) / AHEAD
    ahead = json.loads(path.read_text()) if path.exists() else None
    return Checkpoint(step, adapter, optimizer, teacher, ahead, weights_file)


def copy_adapter(run: Path, to: Path, more: Callable[[Path], object] = lambda path: None) -> None:
    """Copy the adapter of the newest checkpoint, or the model, to a folder of its own, in place of
    what is there. At any instant it is there whole, or not. `more` writes other files into it."""
    last = _path(run, last_step(run) or 0)
    files = [last / name for pair in WEIGHTS.items() for name in pair if (last / name).exists()]
    _write_folder(run, to, {path.name: path.read_bytes() for path in files}, more)


def _write_folder(
    run: Path,
    path: Path,
    contents: Mapping[str, bytes],
    more: Callable[[Path], object] = lambda path: None,
) -> None:
    """Write a folder's files in place of what is there: beside its place, and then renamed."""
    remove_unfinished(run)
    unfinished = run / FOLDER / f"unfinished-{path.name}"
    unfinished.mkdir(parents=True)
    try:
        more(unfinished)
        for name, data in contents.items():
            write_through(unfinished / name, data)
        _sync_folder(unfinished)
        if path.exists():
            _set_aside(run, path)
        unfinished.rename(path)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync_folder(path.parent)
    remove_unfinished(run)


def remove_unfinished(run: Path) -> None:
    """Remove what a run that was killed left of a checkpoint it was writing, or removing."""
    for path in (run / FOLDER).glob("unfinished-*"):
        shutil.rmtree(path)


def _path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:06d}"


def _paths(run: Path) -> list[Path]:
    return sorted((run / FOLDER).glob("step-*"))


def _is_whole(path: Path) -> bool:
    # A rename is atomic, but a folder may have been copied in part.
    try:
        state = json.loads((path / STATE).read_text())
        return all((path / name).stat().st_size == n for name, n in state["bytes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # a file that is missing, or state.json says something else


def _set_aside(run: Path, path: Path) -> None:
    # A removal that is cut short leaves nothing that looks like a checkpoint.
    path.rename(run / FOLDER / f"unfinished-removal-{path.name}")


def _serialized(tensors: Mapping[str, Tensor]) -> bytes:
    found = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return safetensors.torch.save(found, metadata={"format": "pt"})


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Between what is trained and a checkpoint of it


def capture(setup: Setup, optimizer: torch.optim.Optimizer, step: int) -> Checkpoint:
    """The state after a step, whole: called by all processes."""
    weights = adapter_weights(setup.model)
    is_full = setup.config.train == "full"
    return Checkpoint(
        step,
        adapter={name: full_tensor(w) for name, w in saved_weights(setup.model).items()},
        optimizer={
            f"{name}.{moment}": full_tensor(value)
            for name, w in weights.items()
            for moment, value in optimizer.state[w].items()
        },
        teacher={name: full_tensor(value) for name, value in setup.teacher.state().items()},
        ahead=setup.ahead.state() if setup.ahead is not None else None,
        weights_file="model.safetensors" if is_full else "adapter_model.safetensors",
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
