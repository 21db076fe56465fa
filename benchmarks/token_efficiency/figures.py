"""The pictures of docs/token_efficiency.md. Lines are means over the seeds; bands and dots show
each seed, from the lowest to the highest."""

from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.lib import report
from benchmarks.token_efficiency.plan import LENGTHS, SELF_DISTILLATION, Result
from benchmarks.token_efficiency.results import Results, finals
from benchmarks.token_efficiency.rollouts import AROUND, around_first_mistake
from benchmarks.token_efficiency.verdicts import pass_at_ks

COLORS = {
    "SFT": "#b9a13d",
    "SFT, own words": "#7d6f1f",
    "GRPO": "#c7502b",
    "sampled token": "#8a6bbf",
    "JSD 0.5": "#1f6fb4",
    "forward KL": "#17889c",
    "forward KL, clipped": "#66b7c4",
    "reverse KL": "#0b3d4f",
    "larger teacher": "#777777",
}
INK = "#333333"


def draw(results: Results, folder: Path) -> None:
    """All pictures for which there are results."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "main": main,
        "methods": methods,
        "length": length,
        "size": size,
        "temperature": temperature,
        "mistakes": mistakes,
    }
    for name, picture in pictures.items():
        figure = picture(results)
        if figure is not None:
            report.caption(figure, results.setting["setting"])
            figure.savefig(folder / f"{name}.png", dpi=150)


def main(results: Results) -> Figure | None:
    """Held-out accuracy over generated tokens, and over steps."""
    if not results.methods:
        return None
    figure = Figure(figsize=(10, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for method in results.methods:
        cells = results.of(method)
        if any(result["curve"][-1]["tokens"] for result in cells):
            curves(left, cells, method, lambda p: p["tokens"] / 1000)
        curves(right, cells, method, lambda p: p["step"])
    titled(left, "Held-out accuracy over generated tokens", "thousands of tokens sampled to train")
    titled(right, "… and over steps (SFT generates no tokens)", "step")
    teacher = results.beginning(results.plan["size"])["teacher"]
    for axis in (left, right):
        axis.axhline(teacher, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    left.annotate(
        "teacher, sees the solution", (1, teacher), (0, 2), fontsize=7, color=INK, ha="right",
        xycoords=("axes fraction", "data"), textcoords="offset points",
    )  # fmt: skip
    handles, names = right.get_legend_handles_labels()
    figure.legend(handles, names, frameon=False, fontsize=8, loc="outside right center")
    return figure


def curves(axis: Any, cells: list[Result], method: str, x: Any) -> None:
    """The mean over seeds, in a band of all."""
    points = list(zip(*(result["curve"] for result in cells), strict=True))
    xs = [fmean(map(x, of_seeds)) for of_seeds in points]
    ys = [[p["accuracy"] for p in of_seeds] for of_seeds in points]
    color = COLORS[method]
    axis.fill_between(xs, list(map(min, ys)), list(map(max, ys)), color=color, alpha=0.13, lw=0)
    axis.plot(xs, list(map(fmean, ys)), color=color, linewidth=1.7, marker="o", markersize=3,
              label=method)  # fmt: skip


def methods(results: Results) -> Figure | None:
    """Accuracy at the end, of each method."""
    if not results.methods:
        return None
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axis = figure.subplots()
    names = results.methods[::-1]
    for row, method in enumerate(names):
        ys = finals(results.of(method))
        axis.barh(row, fmean(ys), color=COLORS[method], alpha=0.35, height=0.6)
        axis.plot(ys, [row] * len(ys), "o", color=COLORS[method], markersize=5)
    begin = results.beginning(results.plan["size"])
    for value, text, side in (
        (begin["curve"][0]["accuracy"], "before ", "right"),
        (begin["greedy"], " before, greedy", "left"),
        (begin["teacher"], "teacher, sees the solution", "center"),
    ):
        axis.axvline(value, color=INK, linewidth=0.8, linestyle=":")
        axis.text(value, len(names) - 0.4, text, fontsize=7, color=INK, ha=side, va="bottom")
    steps = {method: results.of(method)[0]["cell"]["steps"] for method in names}
    axis.set_yticks(range(len(names)), [f"{name}, {steps[name]} steps" for name in names])
    report.style(axis)
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.set_xlim(-0.01, 1)
    axis.set_xlabel("held-out problems solved after the last step, sampled", fontsize=8)
    return figure


def length(results: Results) -> Figure | None:
    """pass@k by the length of rollouts in training."""
    if len({r["cell"]["longest"] for r in results.cells}) < 2:
        return None
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shades = ("#9cc3e2", "#4f93cb", "#12456f")
    for longest, color in zip(LENGTHS, shades, strict=True):
        cells = results.of(longest=longest)
        label = f"at most {longest} tokens"
        ks = [pass_at_ks(r["curve"][-1]["solved"], r["cell"]["samples"]) for r in cells]
        xs = list(ks[0])
        ys = [[of[k] for of in ks] for k in xs]
        left.fill_between(xs, list(map(min, ys)), list(map(max, ys)), color=color, alpha=0.2, lw=0)
        left.plot(xs, list(map(fmean, ys)), color=color, marker="o", markersize=4, label=label)
        points = list(zip(*(r["curve"] for r in cells), strict=True))
        tokens = [fmean(p["tokens"] / 1000 for p in of) for of in points]
        solved = [[p["accuracy"] for p in of] for of in points]
        low, high = list(map(min, solved)), list(map(max, solved))
        right.fill_between(tokens, low, high, color=color, alpha=0.2, lw=0)
        right.plot(tokens, list(map(fmean, solved)), color=color, marker="o", markersize=3)
    left.set_xscale("log", base=2)
    left.set_xticks(xs, [str(k) for k in xs])
    titled(left, "pass@k after as many steps", "k")
    titled(right, "Accuracy over generated tokens", "thousands of tokens sampled to train")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def size(results: Results) -> Figure | None:
    """Before, after, and with the solution in view, by size."""
    sizes = [s for s in results.plan["sizes"] if results.of(size=s)]
    if len(sizes) < 2:
        return None
    figure = Figure(figsize=(6.6, 3.6), layout="constrained")
    axis = figure.subplots()
    for x, name in enumerate(sizes):
        begin, after = results.beginning(name), finals(results.of(size=name))
        axis.plot(
            [x], [begin["curve"][0]["accuracy"]], "s", color=INK, label="before" if x == 0 else None
        )
        axis.plot([x] * len(after), after, "o", color=COLORS[SELF_DISTILLATION],
                  label="after, each seed" if x == 0 else None)  # fmt: skip
        axis.plot([x], [begin["teacher"]], "_", markersize=18, color="#c7502b",
                  label="teacher, sees the solution" if x == 0 else None)  # fmt: skip
    parameters = {m["size"]: m["parameters"] for m in results.setting["models"]}
    axis.set_xticks(range(len(sizes)), [f"{s}\n{parameters[s] / 1e6:.2f}M" for s in sizes])
    titled(axis, "Self-distillation by size", "parameters")
    axis.set_xlim(-0.5, len(sizes) - 0.5)
    figure.legend(frameon=False, fontsize=8, loc="outside right center")
    return figure


def temperature(results: Results) -> Figure | None:
    """Accuracy over steps by the loss's temperature."""
    temperatures = [T for T in results.plan["temperatures"] if results.of(temperature=T)]
    if len(temperatures) < 2:
        return None
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axis = figure.subplots()
    for T, color in zip(temperatures, ("#17889c", "#1f6fb4", "#8a6bbf"), strict=False):
        points = list(zip(*(r["curve"] for r in results.of(temperature=T)), strict=True))
        xs = [of[0]["step"] for of in points]
        ys = [[p["accuracy"] for p in of] for of in points]
        axis.fill_between(xs, list(map(min, ys)), list(map(max, ys)), color=color, alpha=0.15, lw=0)
        axis.plot(
            xs, list(map(fmean, ys)), color=color, marker="o", markersize=3, label=f"T = {T:g}"
        )
    titled(axis, "Temperature of the loss; rollouts at 1", "step")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def mistakes(results: Results) -> Figure | None:
    """Divergence around the first mistake, and some rollouts token by token."""
    if not results.mistakes:
        return None
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    offsets, means, low, high = zip(*around_first_mistake(results.mistakes), strict=True)
    color = COLORS[SELF_DISTILLATION]
    left.fill_between(offsets, low, high, color=color, alpha=0.2, lw=0)
    left.plot(offsets, means, color=color, linewidth=1.6)
    left.axvline(0, color="#c7502b", linewidth=0.8, linestyle=":")
    report.style(left)
    left.set_xlabel("tokens after the first mistake", fontsize=8)
    left.set_title("Teacher's divergence (JSD) on wrong rollouts", loc="left", fontsize=9)
    left.set_xlim(-AROUND, AROUND)

    shown = sorted(results.mistakes[:18], key=lambda r: r.first_mistake)
    paint = LinearSegmentedColormap.from_list("divergence", ["#f3f6fa", color, "#0b1f3a"])
    longest = max(len(r.divergence) for r in shown)
    most = max(max(r.divergence) for r in shown)
    grid = [[*r.divergence, *[float("nan")] * (longest - len(r.divergence))] for r in shown]
    image = right.imshow(grid, aspect="auto", cmap=paint, vmin=0, vmax=most, interpolation="none")
    for row, r in enumerate(shown):
        right.plot(r.first_mistake, row - 0.5, "v", color="#c7502b", markersize=4)
    right.set_yticks([])
    right.set_ylim(len(shown) - 0.5, -1.0)
    right.set_xlabel("token of the rollout", fontsize=8)
    right.set_title("18 of them, a row each; ▾ its first mistake", loc="left", fontsize=9)
    right.tick_params(labelsize=8)
    figure.colorbar(image, ax=right, pad=0.01).ax.tick_params(labelsize=7)
    return figure


def titled(axis: Any, title: str, x: str) -> None:
    """And in the style of all pictures; y is an accuracy."""
    report.style(axis)
    axis.set_title(title, loc="left", fontsize=9, color=INK)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylim(0, 1.02)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(alpha=0.25)
