"""The run folder, and the seconds of a run by phase. What a run writes, docs/training.md lists."""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.tracking import (
    GeneralTracker,
    TensorBoardTracker,
    TrackioTracker,
    WandBTracker,
)

from opsd_train.config import Config, make_config, options
from opsd_train.errors import difference
from opsd_train.files import (
    append_lines,
    as_lines,
    read_json,
    read_lines,
    read_yaml,
    replace_file,
)
from opsd_train.run.checkpoint import (
    FOLDER,
    copy_adapter,
    last_step,
    remove_unfinished,
)
from opsd_train.run.console import say

REPORT = "report.html"
FINGERPRINT = "fingerprint.json"
FILES = [
    *("config.yaml", FINGERPRINT, "metrics.jsonl", "completions.jsonl", "summary.json"),
    *("tokens.jsonl", REPORT, "failed_batch.json", "evaluation"),
]
LINES = ("metrics.jsonl", "completions.jsonl", "tokens.jsonl")  # added to after every step
ADAPTER, MODEL = "adapter", "model"

# Options on which the metrics do not depend, beyond rounding.
MAY_DIFFER_WHEN_RESUMED = [
    *("output_dir", "resume", "overwrite", "dry_run", "tracker", "save_every", "keep_last"),
    *("attention", "liger", "activation_checkpointing", "workspace_mib"),
    *("offload_checkpoints", "mlp_tokens", "engine_urls", "engine_folder"),
    *("micro_batch_size", "micro_batch_tokens", "rollout_batch_size", "shard"),
    "record_rollouts",
]


class RunFolder:
    """Writes a run's files, in the main process of several. Lines reach the disk as they are made,
    so that an interrupted run keeps what it has."""

    def __init__(
        self, path: Path, *, overwrite: bool = False, resume: bool = False, is_main: bool = True
    ):
        """Open a folder for a run.

        Raises:
            FileExistsError: it holds a run already, and neither `overwrite` says to replace it nor
                `resume` to go on with it; or one to resume that has lost its checkpoints.
            NotADirectoryError: it is a file.
        """
        self.path, self.resume, self.is_main = path, resume, is_main
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is not a folder; name another with --output-dir")
        found = [name for name in [FOLDER, *FILES, ADAPTER, MODEL] if (path / name).exists()]
        if found and is_main and not (overwrite or resume):
            raise FileExistsError(
                f"{path} holds a run already ({', '.join(found)}); name another folder with "
                "--output-dir, go on with --resume, or replace the run with --overwrite"
            )
        if resume and is_main:
            self._check_not_lost()
        if is_main:
            path.mkdir(parents=True, exist_ok=True)
        self.replaced = found
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.lap_seconds: dict[str, float] = {}
        self.current_phase = ""
        self.metrics: list[dict[str, Any]] = []
        self.doing: Callable[[str], None] = lambda phase: None  # called with what is done now
        self.tracker: GeneralTracker | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds spent within towards a phase; an error within is reported with its
        name."""
        self.current_phase = name
        self.doing(name)
        synchronize()
        start = time.perf_counter()
        yield
        synchronize()
        spent = time.perf_counter() - start
        for seconds in (self.seconds, self.lap_seconds):
            seconds[name] = seconds.get(name, 0.0) + spent
        self.current_phase = ""

    def lap(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        lap, self.lap_seconds = self.lap_seconds, {}
        return lap

    def begin(
        self, config: dict[str, Any], comment: str, contents: Mapping[str, str] | None = None
    ) -> None:
        """Go on with the run in the folder, or remove it and write config.yaml, a comment above.
        Until then the folder is as it was: a run that fails before it begins costs nothing.

        Args:
            contents: hashes of what the run is made of, for fingerprint.json.

        Raises:
            ValueError: the run to go on with has other options, whether or not it came to a
                checkpoint; or is made of something else.
        """
        contents = contents or {}
        self.check_same(config)
        resumed = last_step(self.path) if self.resume else None
        if resumed is not None:
            self._check_contents(contents)
            self.metrics = self._lines("metrics.jsonl", up_to=resumed)
        if not self.is_main:
            return
        if resumed is not None:
            # What the run did after its last checkpoint will be done again.
            for name in LINES:
                replace_file(self.path / name, as_lines(self._lines(name, up_to=resumed)))
            was = self._was_asked_for()
            if config.get("steps") != was.get("steps"):  # which can be raised
                self._write_config(was | {"steps": config["steps"]}, comment)
            self._write_contents(contents)
            remove_unfinished(self.path)
            return
        for name in self.replaced:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name)
            else:
                (self.path / name).unlink(missing_ok=True)
        self._write_config(config, comment)
        self._write_contents(contents)

    def track(self, name: str, config: dict[str, Any]) -> None:
        """Send metrics to a tracker as well, if any is named."""
        if self.is_main and name != "none":
            self.tracker = start_tracker(name, config, self.path)

    def write_metrics(self, **metrics: Any) -> None:
        """A line of metrics.jsonl; what is not finite is null there."""
        self.metrics.append(metrics)
        self._append("metrics.jsonl", [finite_only(metrics)])
        if self.tracker is not None:
            self.tracker.log(numbers_by_name(metrics), step=metrics["step"])

    def write_completions(
        self, phase: str, step: int, completions: Iterable[tuple[str, str, bool | None]]
    ) -> None:
        """Prompts, completions and whether they are right, None where they are not graded."""
        columns = ("phase", "step", "prompt", "completion", "correct")
        rows = (dict(zip(columns, (phase, step, *c), strict=True)) for c in completions)
        self._append("completions.jsonl", rows)

    def write_tokens(self, rows: Iterable[dict[str, Any]]) -> None:
        self._append("tokens.jsonl", rows)

    def completions(self, phase: str, step: int) -> list[dict[str, Any]]:
        """The lines of a step."""
        rows = read_lines(self.path / "completions.jsonl")
        return [row for row in rows if (row["phase"], row["step"]) == (phase, step)]

    def write_json(self, name: str, values: Any) -> Path:
        if self.is_main:
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            replace_file(self.path / name, text)
        return self.path / name

    def write_summary(self, **summary: Any) -> None:
        seconds = {**self.seconds, "total": time.perf_counter() - self.start}
        seconds = {name: round(spent, 2) for name, spent in seconds.items()}
        self.write_json("summary.json", {**summary, "seconds": seconds})
        if self.tracker is not None:
            self.tracker.finish()

    def save_adapter(self) -> None:
        """That of the last checkpoint."""
        if self.is_main:
            copy_adapter(self.path, self.path / ADAPTER)

    def save_model(self, more: Callable[[Path], object]) -> None:
        """That of the last checkpoint, where all of it was trained; `more` writes other files."""
        if self.is_main:
            copy_adapter(self.path, self.path / MODEL, more)

    def _check_not_lost(self) -> None:
        """Without a checkpoint a resumed run starts anew: right if it was killed before the first,
        but not if that would remove more than the lines written until then."""
        if last_step(self.path) is not None:
            return
        kept = [ADAPTER, MODEL, "summary.json", "evaluation", f"{FOLDER}/step-*"]
        if found := [name for name in kept if any(self.path.glob(name))]:
            raise FileExistsError(
                f"{self.path} has no whole checkpoint to go on from, but results of a run "
                f"({', '.join(found)}), which --resume does not remove; name another folder with "
                "--output-dir, or replace the run with --overwrite"
            )

    def check_same(self, config: dict[str, Any]) -> None:
        """Raises:
        ValueError: the run to go on with has other options.
        """
        if not (self.resume and (self.path / "config.yaml").exists()):
            return
        # A run of an earlier version has no value for options that are newer.
        was: dict[str, Any] = {f.name: f.default for f in options()} | self._was_asked_for()
        for name, value in config.items():
            if name == "steps" and value > was["steps"]:
                self._check_can_go_on(was["steps"], config, last_step(self.path) or 0)
            elif name == "teacher_urls" and value and was.get(name):
                continue  # other servers with the same teacher, as fingerprint.json makes sure
            elif name not in MAY_DIFFER_WHEN_RESUMED and was.get(name) != value:
                what, before, now = difference(name, was.get(name), value)
                raise ValueError(
                    f"{what} was {before} in the run to resume, and is {now} now; ask for the "
                    "same, or name another folder with --output-dir"
                )

    def _check_can_go_on(self, was: int, config: dict[str, Any], done: int) -> None:
        """Raises:
        ValueError: a run of more steps would have had other learning rates until now.
        """
        steps, rising = config["steps"], round(config["warmup"] * config["steps"])
        if config["schedule"] == "constant" and done >= rising:
            return
        why = f"the warm-up would be {rising} steps, and {done} are taken"
        if config["schedule"] != "constant":
            why = f"the {config['schedule']} schedule, which ends with the last step, another"
        raise ValueError(
            f"steps was {was} in the run to resume, and is {steps} now: {why}. Ask for {was}, or "
            f"start a run from this one's adapter, with --adapter {self.path / ADAPTER}"
        )

    def _check_contents(self, contents: Mapping[str, str]) -> None:
        """Raises:
        ValueError: what the run is made of has changed.
        """
        path = self.path / FINGERPRINT
        if not path.exists():
            say(
                f"{self.path} is of an earlier version, without {FINGERPRINT}: that model and data "
                "are those that it began with cannot be checked, but from now on."
            )
            return
        was = read_json(path)
        changed = [name for name, value in contents.items() if was.get(name, value) != value]
        if changed:
            raise ValueError(
                f"{', '.join(changed)}: changed since the run to resume began, though the names "
                f"are the same ({path}); put back what was there, or name another folder with "
                "--output-dir"
            )

    def _write_contents(self, contents: Mapping[str, str]) -> None:
        if contents and not (self.path / FINGERPRINT).exists():
            self.write_json(FINGERPRINT, contents)

    def _was_asked_for(self) -> dict[str, Any]:
        was = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(was, dict):
            raise ValueError(
                f"{self.path / 'config.yaml'} holds no options of the run to resume; "
                "replace the run with --overwrite, or name another folder with --output-dir"
            )
        return was

    def _write_config(self, config: dict[str, Any], comment: str) -> None:
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        replace_file(self.path / "config.yaml", f"# {comment}\n{text}")

    def _append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        if self.is_main:
            append_lines(self.path / name, rows)

    def _lines(self, name: str, up_to: float) -> list[dict[str, Any]]:
        """The rows of a file, up to a step."""
        return list(takewhile(lambda row: row["step"] <= up_to, read_lines(self.path / name)))


def config_of_adapter(folder: Path) -> Config:
    """The config of a run that trained an adapter. The one that it started from is left out, since
    the run's own includes it.

    Raises:
        FileNotFoundError: it is no run folder.
        ValueError: the run trained all weights.
    """
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml")
    values = read_yaml(folder / "config.yaml")
    values.pop("adapter", None)
    config = make_config({}, preset=values)
    if config.train == "full":
        raise ValueError(
            f"{folder} trained all weights; {folder / 'model'} is the model, whole, and can be "
            "named as the model of a config file"
        )
    return config


def synchronize() -> None:
    """Wait for what a GPU has been asked to do, so that seconds are those of the work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def finite_only(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows neither infinity nor NaN."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


# Trackers: where metrics go besides the run folder

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
