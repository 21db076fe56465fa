"""curves.png: what a run in the small world looks like."""

from opsd_train.config import Config
from opsd_train.opsd import loss_name
from opsd_train.run import RunFolder


def plot_curves(config: Config, run: RunFolder) -> None:
    """Loss and held-out accuracy over the steps, into curves.png."""
    if not run.is_main:
        return
    metrics = run.metrics
    # A figure of its own, without pyplot: no global state, no display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    student, teacher, ink = "#1f6fb4", "#c7502b", "#333333"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = [(m["step"], m["loss"]) for m in metrics if "loss" in m and not m["skipped"]]
    left.plot(*zip(*losses, strict=True), color=student, linewidth=1.6)
    left.set_title(f"Loss: {loss_name(config)}", loc="left", fontsize=10, color=ink)
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
    figure.savefig(run.path / "curves.png", dpi=150)
