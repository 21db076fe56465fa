"""The run folder, and what is shown while a run goes on.

config.yaml         what was asked for, and the divergence by name
metrics.jsonl       a line a step; held-out accuracy where it was measured
completions.jsonl   every solution sampled: phase, step, prompt, completion, correct
summary.json        accuracy before and after with intervals, seconds by phase
adapter/            as PEFT saves it
curves.png          loss and held-out accuracy over the steps
"""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModelForCausalLM

from opsd_train.evaluate import Accuracy, Completion

FILES = ["config.yaml", "metrics.jsonl", "completions.jsonl", "summary.json", "curves.png"]
ADAPTER = "adapter"


class RunFolder:
    """Writes a run's files. Lines reach the disk as they are made, so that an interrupted run keeps
    what it has."""

    def __init__(self, path: Path, overwrite: bool = False):
        """Open a folder for a new run.

        Raises:
            FileExistsError: it holds a run already, and `overwrite` does not say to replace it.
            NotADirectoryError: it is a file.
        """
        self.path = path
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is not a folder; name another with --output-dir")
        found = [name for name in [*FILES, ADAPTER] if (path / name).exists()]
        if found and not overwrite:
            raise FileExistsError(
                f"{path} holds a run already ({', '.join(found)}); "
                "name another folder with --output-dir, or replace the run with --overwrite"
            )
        path.mkdir(parents=True, exist_ok=True)
        self.replaced = found
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.metrics: list[dict[str, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds spent within towards a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def begin(self, config: dict[str, Any]) -> None:
        """Remove the run that is replaced, if any, and write config.yaml. Until then the folder is
        as it was: a run that fails before it begins costs nothing."""
        for name in self.replaced:
            if name == ADAPTER:
                shutil.rmtree(self.path / name)
            else:
                (self.path / name).unlink()
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (self.path / "config.yaml").write_text(text, encoding="utf-8")

    def write_metrics(self, **metrics: Any) -> None:
        self.metrics.append(metrics)
        self._append("metrics.jsonl", [metrics])

    def write_completions(self, phase: str, step: int, completions: Iterable[Completion]) -> None:
        self._append(
            "completions.jsonl", ({"phase": phase, "step": step, **asdict(c)} for c in completions)
        )

    def write_summary(self, **summary: Any) -> None:
        seconds = {**self.seconds, "total": time.perf_counter() - self.start}
        seconds = {name: round(spent, 2) for name, spent in seconds.items()}
        text = json.dumps({**summary, "seconds": seconds}, indent=2, ensure_ascii=False)
        (self.path / "summary.json").write_text(text + "\n", encoding="utf-8")

    def save_adapter(self, model: PeftModelForCausalLM) -> None:
        model.save_pretrained(str(self.path / ADAPTER))

    def plot(self, divergence: str) -> None:
        """Loss and held-out accuracy over the steps, into curves.png."""
        plot_curves(self.metrics, divergence, self.path / "curves.png")

    def _append(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def accuracy_record(accuracy: Accuracy) -> dict[str, Any]:
    low, high = accuracy.interval
    return {
        "accuracy": round(accuracy.mean, 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "correct": accuracy.correct,
        "problems": accuracy.total,
    }


def plot_curves(metrics: list[dict[str, Any]], divergence: str, path: Path) -> None:
    # A figure of its own, without pyplot: no global state, no display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    student, teacher, ink = "#1f6fb4", "#c7502b", "#333333"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    left.plot(*zip(*losses, strict=True), color=student, linewidth=1.6)
    left.set_title(f"Loss: {divergence}", loc="left", fontsize=10, color=ink)
    left.set_ylim(bottom=0)

    measured = [m for m in metrics if "accuracy" in m]
    steps = [m["step"] for m in measured]
    means = [m["accuracy"] for m in measured]
    low, high = zip(*(m["interval_95"] for m in measured), strict=True)
    right.fill_between(steps, low, high, color=student, alpha=0.18, linewidth=0)
    right.plot(steps, means, color=student, marker="o", markersize=4, label="student, alone")
    taught = [m["teacher_accuracy"] for m in metrics if "teacher_accuracy" in m]
    if taught:
        right.axhline(taught[0], color=teacher, linestyle="--", label="teacher, sees the solution")
    right.set_title(
        "Held-out problems solved, sampled at T = 1", loc="left", fontsize=10, color=ink
    )
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.legend(loc="lower right", frameon=False, fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("OPSD step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)
