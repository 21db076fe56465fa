"""Where metrics go besides the run folder."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import (
    GeneralTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

TRACKERS = {"tensorboard": TensorBoardTracker, "trackio": TrackioTracker, "wandb": WandBTracker}


def check_tracker(name: str) -> None:
    """Raises:
    ValueError: the tracker is not installed.
    """
    if name != "none" and find_spec(name) is None:
        raise ValueError(f"tracker {name} is not installed; install it with `pip install {name}`")


def start_tracker(name: str, config: dict[str, Any], folder: Path) -> GeneralTracker:
    """A tracker that knows the run's config; one that writes files does so in the folder."""
    where = {"logging_dir": folder} if name == "tensorboard" else {}
    tracker = TRACKERS[name]("opsd", **where)
    tracker.start()
    scalars = (bool, int, float, str)
    tracker.store_init_configuration(
        {k: v if isinstance(v, scalars) else str(v) for k, v in config.items()}
    )
    return tracker


def numbers_by_name(values: dict[str, Any]) -> dict[str, float]:
    """Numbers by name, those within a mapping as outer/inner."""
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            numbers |= {f"{name}/{inner}": v for inner, v in numbers_by_name(value).items()}
        elif isinstance(value, int | float):
            numbers[name] = value
    return numbers
