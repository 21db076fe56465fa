"""What a run needs to go on as if it had never stopped, written so that it is there whole or not.

checkpoints/step-000120/
    adapter_model.safetensors, adapter_config.json    the adapter, as PEFT loads it
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

FOLDER = "checkpoints"
STATE = "state.json"
AHEAD = "ahead.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Checkpoint:
    step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    ahead: dict[str, Any] | None = None


def save_checkpoint(run: Path, checkpoint: Checkpoint, adapter_config: str, keep_last: int) -> None:
    """Write a checkpoint of a run folder, then remove all but the last `keep_last`.

    Written beside its place and renamed into it when all of it is on the disk: a run killed at any
    instant leaves a whole checkpoint, or none.

    Raises:
        OSError: it could not be written; the earlier checkpoints are as they were.
    """
    folder, path = run / FOLDER, _path(run, checkpoint.step)
    if _is_whole(path):
        return
    remove_unfinished(run)
    unfinished = folder / f"unfinished-{path.name}"
    contents = {
        "adapter_model.safetensors": _serialized(checkpoint.adapter),
        "adapter_config.json": adapter_config.encode(),
        "optimizer.safetensors": _serialized(checkpoint.optimizer),
        "teacher.safetensors": _serialized(checkpoint.teacher),
    }
    if checkpoint.ahead is not None:
        contents[AHEAD] = json.dumps(checkpoint.ahead).encode()
    state = {"step": checkpoint.step, "bytes": {name: len(data) for name, data in contents.items()}}
    contents[STATE] = json.dumps(state, indent=2).encode()
    unfinished.mkdir(parents=True)
    try:
        for name, data in contents.items():
            write_through(unfinished / name, data)
        _sync_folder(unfinished)
        if path.exists():  # one that is not whole
            _remove(path)
        unfinished.rename(path)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _sync_folder(folder)
    for old in _paths(run)[:-keep_last]:
        _remove(old)


def last_step(run: Path) -> int | None:
    """The step of a run folder's newest checkpoint that is whole, or None."""
    steps = (int(path.name.removeprefix("step-")) for path in _paths(run) if _is_whole(path))
    return max(steps, default=None)


def last_checkpoint(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder that is whole, or None."""
    step = last_step(run)
    if step is None:
        return None
    adapter, optimizer, teacher = (
        safetensors.torch.load_file(_path(run, step) / f"{name}.safetensors")
        for name in ("adapter_model", "optimizer", "teacher")
    )
    path = _path(run, step) / AHEAD
    ahead = json.loads(path.read_text()) if path.exists() else None
    return Checkpoint(step, adapter, optimizer, teacher, ahead)


def copy_adapter(run: Path, to: Path) -> None:
    """Copy the adapter of the newest checkpoint to a folder of its own, in place of what is there.
    At any instant it is there whole, or not."""
    remove_unfinished(run)
    unfinished = run / FOLDER / "unfinished-adapter"
    unfinished.mkdir()
    for name in ADAPTER_FILES:
        write_through(unfinished / name, (_path(run, last_step(run) or 0) / name).read_bytes())
    _sync_folder(unfinished)
    if to.exists():
        to.rename(run / FOLDER / "unfinished-removal-adapter")
    unfinished.rename(to)
    _sync_folder(to.parent)
    remove_unfinished(run)


def write_through(path: Path, data: bytes) -> None:
    """Write a file, and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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


def _remove(path: Path) -> None:
    # Renamed first: a removal that is cut short leaves nothing that looks like a checkpoint.
    unfinished = path.with_name(f"unfinished-removal-{path.name}")
    path.rename(unfinished)
    shutil.rmtree(unfinished)


def _serialized(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: t.detach().cpu() for name, t in tensors.items()})


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
