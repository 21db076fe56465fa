"""docs/demo.png: loss and held-out accuracy over the steps of a run, the demo's say.

python benchmarks/pages/demo.py RUN
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

OUTPUT = Path(__file__).parents[2] / "docs" / "demo.png"


def draw(run: Path, output: Path) -> None:
    """From the config.yaml and metrics.jsonl of a run folder."""
    loss_name = (run / "config.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    student, teacher, ink = "#1f6fb4", "#c7502b", "#333333"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(m["step"], m["loss"]) for m in metrics if "loss" in m and not m["skipped"]]
    left.plot(*zip(*losses, strict=True), color=student, linewidth=1.6)
    left.set_title(f"Loss: {loss_name}", loc="left", fontsize=10, color=ink)
    left.set_ylim(bottom=0)

    measured = [m for m in metrics if "accuracy" in m]
    steps = [m["step"] for m in measured]
    low, high = zip(*(m["interval_95"] for m in measured), strict=True)
    right.fill_between(steps, low, high, color=student, alpha=0.18, linewidth=0)
    accuracies = [m["accuracy"] for m in measured]
    right.plot(steps, accuracies, color=student, marker="o", markersize=4, label="student, alone")
    for taught in [m["teacher_accuracy"] for m in metrics if "teacher_accuracy" in m]:
        right.axhline(taught, color=teacher, linestyle="--", label="teacher, sees the solution")
    right.set_title("Held-out problems solved", loc="left", fontsize=10, color=ink)
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.legend(loc="lower right", frameon=False, fontsize=9)
    for axes in (left, right):
        axes.set_xlabel("OPSD step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(output, dpi=150)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/pages/demo.py RUN")
    draw(Path(sys.argv[1]), OUTPUT)
