"""Error of loss and gradient against float64, from student ≈ teacher to nothing in common.

    python benchmarks/accuracy.py [--vocabulary 16384] [--model FOLDER] [--output FOLDER]

bf16 hidden states and head, peaked next-token distributions over the vocabulary. The teacher's
hidden states are placed at such a distance from the student's that the mean JSD is 1e-7, 1e-6, …,
0.5; for the divergence of each panel, then, every method's error relative to the oracle: of the
mean loss, and of the gradient in norm. What rounding the exact gradient to bf16 costs is the floor.

Writes accuracy.csv, accuracy.md and accuracy.png to the folder. With --model the hidden states are
those of a real model (lib/real_states.py), rounded to bf16 as its head is, and the files are
real_accuracy.csv and real_accuracy.md.

Without a GPU the logit-free kernels run in Triton's interpreter, their tiles rounded as on a GPU;
so does Liger's fused loss, with the fp32 logits that it makes on a GPU.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.lib import peers, report
from benchmarks.lib.inputs import make_inputs
from benchmarks.lib.options import Options
from opsd_kernels import (
    Divergence,
    divergence_name,
    fused_divergence_loss,
    reference_divergence_loss,
    reference_jsd_loss,
    reference_token_divergence,
)

DIVERGENCES = [
    Divergence(beta=0.5),
    Divergence(beta=0.0),
    Divergence(beta=1.0),
    Divergence(beta=0.0, entry_clip=0.05),
    Divergence(forward=0.5, reverse=0.5),
    Divergence(beta=0.1, forward=1),
]
MEAN_JSD = [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.5]
Method = Callable[..., Tensor]


def of_a_beta(peer: peers.Loss) -> Method:
    def loss(h_S: Tensor, h_T: Tensor, W: Tensor, divergence: Divergence) -> Tensor:
        if not isinstance(divergence.beta, float) or divergence.weights or divergence.entry_clip:
            raise NotImplementedError("neither weights nor an entry clip")
        return peer(h_S, h_T, W, divergence.beta)

    return loss


def liger_fused(
    h_S: Tensor, h_T: Tensor, W: Tensor, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    on_cpu = h_S.device.type == "cpu"
    loss = peers.liger_fused_interpreted if on_cpu else peers.liger_fused
    return loss(h_S, h_T, W, beta, temperature)


def eager_in_fp32(h_S: Tensor, h_T: Tensor, W: Tensor, divergence: Divergence) -> Tensor:
    return peers.eager_described(h_S.float(), h_T.float(), W.float(), divergence)


METHODS: dict[str, Method] = {
    "ours, logit-free": partial(fused_divergence_loss, workspace_mib=0),
    "ours, row workspace": partial(fused_divergence_loss, workspace_mib=320),
    "eager, fp32 logits": eager_in_fp32,
    "eager, bf16 logits": peers.eager_described,
    "eager, compiled": peers.eager_described_compiled,
    "TRL": of_a_beta(peers.trl),
    "Liger, fused": of_a_beta(liger_fused),
    "Liger, chunked": of_a_beta(peers.liger_chunked),
    "ORDA": of_a_beta(peers.orda),
}


STYLES: dict[str, dict[str, Any]] = {
    "ours, logit-free": {"color": "#1f6fb4", "linewidth": 2.2},
    "ours, row workspace": {"color": "#1f6fb4", "linewidth": 1.4, "linestyle": "--"},
    "eager, fp32 logits": {"color": "#333333", "linestyle": "-."},
    "eager, bf16 logits": {"color": "#c7502b"},
    "eager, compiled": {"color": "#e09f3e", "linestyle": "--"},
    "TRL": {"color": "#6b8e23"},
    "Liger, fused": {"color": "#8a6bb1"},
    "Liger, chunked": {"color": "#c39bd3"},
    "ORDA": {"color": "#7f7f7f", "linestyle": "--"},
}


@dataclass(frozen=True)
class Row:
    divergence: str
    mean_jsd: float
    method: str
    loss_error: float
    """|ℓ − exact| / exact of the mean loss."""
    grad_error: float
    """‖g − exact‖ / ‖exact‖."""
    rounding: float
    """That of the exact gradient, rounded to the dtype of the hidden states."""


@dataclass(frozen=True)
class RealRow(Row):
    """Of a real model's hidden states."""

    entropy: float
    """The student's, the mean over all tokens, in nats."""


def at_mean_jsd(
    target: float, N: int, V: int, D: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of that mean JSD, as near as bf16 hidden states can be."""
    low, high = math.log(1e-5), math.log(100.0)
    for _ in range(12):
        middle = (low + high) / 2
        h_S, h_T, W = make_inputs(N, V, D, torch.bfloat16, device, distance=math.exp(middle))
        with torch.no_grad():
            if reference_jsd_loss(h_S, h_T, W) < target:
                low = middle
            else:
                high = middle
    return make_inputs(N, V, D, torch.bfloat16, device, distance=math.exp(high))


def measure(
    N: int, V: int, D: int, device: torch.device, methods: Iterable[str] = tuple(METHODS)
) -> Iterator[Row]:
    for target in MEAN_JSD:
        yield from errors(*at_mean_jsd(target, N, V, D, device), methods)


def errors(h_S: Tensor, h_T: Tensor, W: Tensor, methods: Iterable[str]) -> Iterator[Row]:
    """Of each divergence by each method; one that cannot compute it is left out."""
    jsd = float(reference_jsd_loss(h_S, h_T, W))
    for divergence in DIVERGENCES:
        h = h_S.double().requires_grad_()
        exact = reference_divergence_loss(h, h_T.double(), W.double(), divergence)
        (exact_grad,) = torch.autograd.grad(exact, h)
        rounding = relative(exact_grad.to(h_S.dtype), exact_grad)
        for name in methods:
            h = h_S.clone().requires_grad_()
            try:
                loss = METHODS[name](h, h_T, W, divergence)
            except (ImportError, NotImplementedError):
                continue
            (grad,) = torch.autograd.grad(loss, h)
            yield Row(
                divergence_name(divergence),
                jsd,
                name,
                relative(loss.detach(), exact.detach()),
                relative(grad, exact_grad),
                rounding,
            )


def relative(t: Tensor, exact: Tensor) -> float:
    return float((t.double() - exact).norm() / exact.norm())


def main() -> None:
    options = Options(__doc__)
    options.add_device()
    options.add_sizes(tokens=64, vocabulary=16384, features=128)
    options.add_argument(
        "--model", help="folder or hub name: its hidden states, vocabulary and features"
    )
    options.add_methods(METHODS)
    options.add_output("accuracy.csv", "accuracy.md", "accuracy.png")
    args = options.parse_args()
    device = torch.device(args.device)
    if args.model:
        of_a_model(args.model, args.tokens, device, args.methods, args.output)
        return
    N, V, D = args.tokens, args.vocabulary, args.features
    setting = f"{report.machine(device)}; bf16, N = {N}, V = {V}, D = {D}"
    print(setting)
    results = report.Results("accuracy", setting, args.output, show)
    for row in measure(N, V, D, device, args.methods):
        results.add(row)
    results.finish(summary, plot)


def of_a_model(
    model: str, N: int, device: torch.device, methods: Iterable[str], output: Path | None
) -> None:
    """Errors on N hidden states of a model, at positions evenly spaced over its answers."""
    from benchmarks.lib import real_states  # which imports all that trains

    h_S, h_T, W = real_states.states(model, answers=24, tokens=24)
    every = len(h_S)
    some = torch.linspace(0, every - 1, min(N, every)).long()
    h_S, h_T, W = (t.to(device, torch.bfloat16) for t in (h_S[some], h_T[some], W))
    told = reference_token_divergence(h_S, h_T, W)
    (V, D), name = W.shape, Path(model).name
    setting = (
        f"{report.machine(device)}; {name}, bf16, N = {len(some)} of {every} tokens, V = {V}, "
        f"D = {D}; {real_states.describe(told)}"
    )
    print(setting)
    results = report.Results("real_accuracy", setting, output, show)
    entropy = float(told.entropy_student.mean())
    for row in errors(h_S, h_T, W, methods):
        results.add(RealRow(**asdict(row), entropy=entropy))
    if results.path is not None:
        results.path.with_suffix(".md").write_text(real_summary(results.path) + "\n")


def show(row: Row) -> None:
    print(
        f"{row.divergence:<58} JSD {row.mean_jsd:.1e}  {row.method:<20} "
        f"loss {row.loss_error:8.1e}  gradient {row.grad_error:8.1e} "
        f"= {row.grad_error / row.rounding:8.2f} roundings",
        flush=True,
    )


def summary(path: Path) -> str:
    """Errors of gradient and loss of the JSD, and the largest of all divergences, as Markdown."""
    setting, rows = report.read(path, Row)
    parts = [gradient_table(rows), loss_table(rows), f"({setting})", f"{largest(rows)}."]
    parts += report.not_recorded(rows, METHODS)
    return "\n\n".join(parts)


def real_summary(path: Path) -> str:
    """Errors of gradient and loss of every divergence, as Markdown."""
    setting, rows = report.read(path, RealRow)
    of_gradient = gradients("gradient", rows, name_of_divergence)
    of_loss = losses("mean loss", rows, name_of_divergence)
    return "\n\n".join([of_gradient, of_loss, f"({setting})", *report.not_recorded(rows, METHODS)])


def name_of_divergence(row: Row) -> str:
    return row.divergence


def largest(rows: list[Row], methods: Iterable[str] = tuple(METHODS)) -> str:
    """In words: the largest error of each method's gradient, over all divergences and distances."""
    found = dict[str, float]()
    for row in rows:
        found[row.method] = max(found.get(row.method, 0), row.grad_error / row.rounding)
    listed = [f"{method} {units(found[method])}" for method in methods if method in found]
    return (
        f"Largest error of the gradient over {divergences(rows)} divergences and all distances, in "
        f"units of the rounding of the exact one to bf16: {'; '.join(listed)}"
    )


def units(error: float) -> str:
    return f"{error:.2f}" if error < 10 else f"{error:,.0f}"


def divergences(rows: list[Row]) -> int:
    return len({row.divergence for row in rows})


def caption(path: Path) -> str:
    """What the picture shows."""
    _, rows = report.read(path, Row)
    return (
        f"Error of gradient and loss over the divergence: {divergences(rows)} divergences, "
        f"{len({row.method for row in rows})} methods"
    )


def gradient_table(rows: list[Row]) -> str:
    return gradients("gradient, at a mean JSD of", _shown(rows), level)


def loss_table(rows: list[Row]) -> str:
    return losses("mean loss, at a mean JSD of", _shown(rows), level)


def gradients(corner: str, rows: list[Row], column: Callable[[Row], str]) -> str:
    """Errors by method and column, and below them the rounding of the exact gradient."""
    floor = {column(row): percent(row.rounding) for row in rows}
    last = "| *the exact gradient, rounded to bf16* | " + " | ".join(floor.values()) + " |"
    table = report.by_method(corner, rows, column, lambda row: percent(row.grad_error))
    return f"{table}\n{last}"


def losses(corner: str, rows: list[Row], column: Callable[[Row], str]) -> str:
    return report.by_method(corner, rows, column, lambda row: percent(row.loss_error))


def _shown(rows: list[Row]) -> list[Row]:
    """The JSD's rows, at every other distance of teacher and student and the largest."""
    of_jsd = [row for row in rows if row.divergence == divergence_name(0.5)]
    levels = sorted({row.mean_jsd for row in of_jsd})
    shown = {*levels[::2], *levels[-1:]}
    return [row for row in of_jsd if row.mean_jsd in shown]


def level(row: Row) -> str:
    return f"{row.mean_jsd:.0e}" if row.mean_jsd < 0.1 else f"{row.mean_jsd:.1f}"


def percent(error: float) -> str:
    if error >= 1:
        return f"{error:,.0f} ×" if error >= 10 else f"{error:.1f} ×"
    return f"{error:.2%}" if error > 1e-3 else f"{error:.0e}"


def plot(path: Path, to: Path) -> None:
    """Errors over the mean JSD: a column for each divergence, gradient above loss."""
    from matplotlib.figure import Figure

    setting, rows = report.read(path, Row)
    names = list(dict.fromkeys(row.divergence for row in rows))
    figure = Figure(figsize=(3.1 * len(names), 5.6), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, sharey="row")
    for column, name in zip(axes.T, names, strict=True):
        of_it = [row for row in rows if row.divergence == name]
        for method, style in STYLES.items():
            points = [row for row in of_it if row.method == method]
            if not points:
                continue
            x = [row.mean_jsd for row in points]
            column[0].plot(x, [r.grad_error for r in points], label=method, **style)
            column[1].plot(x, [max(r.loss_error, 1e-8) for r in points], **style)
        ours = [row for row in of_it if row.method == "ours, row workspace"]
        column[0].plot(
            [row.mean_jsd for row in ours],
            [row.rounding for row in ours],
            color="#333333",
            linewidth=0.9,
            linestyle=":",
            label="exact, rounded to bf16",
        )
        title = name.replace(", ", ",\n").replace(" + 0.5 reverse", "\n+ 0.5 reverse")
        column[0].set_title(title, fontsize=9, loc="left")
        column[1].set_xlabel("mean JSD of teacher and student", fontsize=8)
        for axis in column:
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
            axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("relative error of the gradient", fontsize=9)
    axes[1, 0].set_ylabel("relative error of the mean loss", fontsize=9)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    axes[0, 0].set_ylim(bottom=1e-3)
    report.caption(figure, setting)
    figure.savefig(to, dpi=150)


if __name__ == "__main__":
    main()
