"""Cross-entropy from hidden states and the LM head: products, error, memory and time, beside peers.

    python benchmarks/more/cross_entropy.py [--methods eager Liger] [--quick] [--output FOLDER]

The mean cross-entropy of N tokens, which are drawn from the distributions, and its gradient; with
a frozen head that of the hidden states alone, with a trained one that of the head too.

Compared first, at a small size: matrix products in U (the tiles that kernels multiply and what the
library multiplies, counted in Triton's interpreter, so without a GPU), and the errors of both
gradients against float64, in norm. Then measured: peak memory above the inputs, returned gradients
included, of a second run, and the median time of the runs after it. On a CPU each of these figures
is taken in a process of its own, and what only a GPU can run at that size is a row that says so;
the processor's time stands beside the wall's. With --output it writes cross_entropy.csv,
cross_entropy.md and cross_entropy.png to the folder.
"""

import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.accuracy import percent
from benchmarks.lib import report
from benchmarks.lib.inputs import make_inputs, sample_targets
from benchmarks.lib.measure import MIB, counted_dots, high_water, in_a_process, start_counting, tell
from benchmarks.lib.options import Options
from benchmarks.lib.peers import CROSS_ENTROPIES, why
from benchmarks.lib.shapes import MODELS
from benchmarks.speed import now
from opsd_kernels import reference_log_probs

HEADS = ("frozen", "trained")
# N, D, V.
COUNTED = (128, 64, 1024)  # whole tiles
COMPARED = {"cpu": (64, 128, 16384), "cuda": (64, 2048, 151936)}
# Model and numbers of tokens.
MEASURED = {"cpu": ("qwen3-0.6b", [512]), "cuda": ("qwen3-8b", [4096, 16384])}
QUICK = {"cpu": ("qwen3-0.6b", [64]), "cuda": ("qwen3-8b", [1024])}
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]}
# What a CPU runs in the interpreter, at a small size; and what it does not run at all.
INTERPRETED = ("ours, logit-free", "Liger")
COMPILED = ("CCE",)
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    """Compared, or measured: what it is not has no figures."""

    device: str
    what: str  # "compared" or "measured"
    N: int
    D: int
    V: int
    dtype: str
    head: str
    method: str
    failure: str = ""
    products: float = NAN  # U, of a size of their own
    h_error: float = NAN  # ‖g − exact‖ / ‖exact‖ of the hidden states' gradient
    h_rounding: float = NAN  # that of the exact gradient, rounded to the dtype
    W_error: float = NAN  # the same of the head's
    W_rounding: float = NAN
    peak_mib: float = NAN  # above the inputs
    seconds: float = NAN
    processor_s: float = NAN  # of this process; on a GPU it says nothing


def main() -> None:
    options = Options(__doc__)
    options.add_device()
    options.add_dtype("of what is measured, both on a CPU")
    options.add_argument("--model", choices=list(MODELS), help="whose LM head is measured")
    options.add_argument("--tokens", type=int, nargs="+")
    options.add_argument("--repeats", type=int, default=3)
    options.add_methods(CROSS_ENTROPIES)
    options.add_processes()
    options.add_quick("few tokens")
    options.add_output("cross_entropy.csv", "cross_entropy.md", "cross_entropy.png")
    args = options.parse_args()
    if args.here:  # the process of one figure
        tell(measure_here, args.here)
        return
    device = torch.device(args.device)
    setting = report.machine(device)
    results = report.Results("cross_entropy", setting, args.output, show)
    print(setting)
    for head in HEADS:
        for method in args.methods:
            results.add(compare(device, *COMPARED[device.type], "bfloat16", head, method))
    model, tokens = (QUICK if args.quick else MEASURED)[device.type]
    D, V = MODELS[args.model or model]
    for N in args.tokens or tokens:
        for dtype in [args.dtype] if args.dtype else DTYPES[device.type]:
            for head in HEADS:
                for method in args.methods:
                    figure = (N, D, V, dtype, head, method)
                    results.add(measure(args.device, *figure, args.repeats, args.seconds))
    results.finish(summary, plot)


def show(row: Row) -> None:
    figures = row.failure or (
        f"{row.products:g} U, errors {row.h_error:.1e} {row.W_error:.1e}"
        if row.what == "compared"
        else f"{row.peak_mib:>8,.0f} MiB {row.seconds:>8.3f} s, processor {row.processor_s:.3f} s"
    )
    print(
        f"N = {row.N:<6} D = {row.D:<5} {row.dtype:<9} {row.head:<8} {row.method:<20} {figures}",
        flush=True,
    )


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


@cache
def inputs(
    N: int, D: int, V: int, dtype: str, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """h [N, D], W [V, D], targets [N]."""
    h, _, W = make_inputs(N, V, D, getattr(torch, dtype), device)
    return h, W, sample_targets(h, W)


@cache
def exact_gradients(
    N: int, D: int, V: int, dtype: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Those of hidden states and head, in float64."""
    h, W, targets = inputs(N, D, V, dtype, device)
    h, W = h.double().requires_grad_(), W.double().requires_grad_()
    dh, dW = torch.autograd.grad(-reference_log_probs(h, W, targets).mean(), [h, W])
    return dh, dW


def gradients(method: str, h: Tensor, W: Tensor, targets: Tensor, head: str) -> list[Tensor]:
    """Of the hidden states; and of a trained head."""
    h, W = h.detach().requires_grad_(), W.detach().requires_grad_(head == "trained")
    CROSS_ENTROPIES[method](h, W, targets).backward()
    return [t.grad for t in (h, W) if t.grad is not None]


def compare(
    device: torch.device, N: int, D: int, V: int, dtype: str, head: str, method: str
) -> Row:
    """Products and errors, or why there are none."""
    figures: dict[str, Any] = {}
    try:
        if device.type == "cpu":
            if method in COMPILED:
                raise NotImplementedError("needs a GPU")
            figures["products"] = count(method, head)
        of_size = N, D, V, dtype, device
        found = gradients(method, *inputs(*of_size), head)
        for name, got, true in zip("hW", found, exact_gradients(*of_size), strict=False):
            figures[f"{name}_error"] = distance(got, true)
            figures[f"{name}_rounding"] = distance(true.to(got.dtype), true)
    except Exception as error:
        figures["failure"] = why(error)
    return Row(name_of(device), "compared", N, D, V, dtype, head, method, **figures)


def distance(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).norm() / true.norm())


def count(method: str, head: str) -> float:
    """Products of forward and backward in U = 2 N D V, of whole tiles on a CPU."""
    N, D, V = COUNTED
    given = inputs(N, D, V, "float32", torch.device("cpu"))
    with (
        torch.compiler.set_stance("force_eager"),  # what is compiled multiplies out of sight
        counted_dots() as dots,
        FlopCounterMode(display=False) as library,
    ):
        gradients(method, *given, head)
    return (2 * sum(dots) + library.get_total_flops()) / (2 * N * D * V)


def measure(
    device: str,
    N: int,
    D: int,
    V: int,
    dtype: str,
    head: str,
    method: str,
    repeats: int,
    seconds: float,
) -> Row:
    """Memory and time; on a CPU, whose high-water mark is the process's, in a fresh process."""
    of_row: dict[str, Any] = {
        "N": N,
        "D": D,
        "V": V,
        "dtype": dtype,
        "head": head,
        "method": method,
    }
    task: dict[str, Any] = {"device": device, "repeats": repeats, **of_row}
    figures: dict[str, Any] = {}
    if torch.device(device).type == "cpu":
        if method in INTERPRETED + COMPILED:
            failure = "needs a GPU"
        else:
            failure, figures = in_a_process(__file__, task, seconds)
    else:
        try:
            failure, figures = "", measure_here(**task)
        except Exception as error:
            failure = why(error)
    return Row(name_of(torch.device(device)), "measured", **of_row, failure=failure, **figures)


def measure_here(
    device: str, N: int, D: int, V: int, dtype: str, head: str, method: str, repeats: int
) -> dict[str, float]:
    """In this process, after a run that warms up."""
    at = torch.device(device)
    given = inputs(N, D, V, dtype, at)
    gradients(method, *given, head)
    before = start_counting(at)
    gradients(method, *given, head)
    peak = high_water(at) - before
    wall, processor = [], []
    for _ in range(repeats):
        start = now(at), time.process_time()
        gradients(method, *given, head)
        wall.append(now(at) - start[0])
        processor.append(time.process_time() - start[1])
    return {
        "peak_mib": peak / MIB,
        "seconds": statistics.median(wall),
        "processor_s": statistics.median(processor),
    }


def summary(path: Path) -> str:
    """What was compared, then what was measured, as Markdown."""
    setting, rows = report.read(path, Row)
    return "\n\n".join([compared_table(rows), measured_table(rows), f"({setting})"])


def compared_table(rows: list[Row]) -> str:
    """Products with either head; errors of the hidden states' gradient with a frozen one and of the
    head's with a trained one."""
    of = {(row.method, row.head): row for row in rows if row.what == "compared"}
    first = next(iter(of.values()))
    body = []
    for method in dict.fromkeys(method for method, _ in of):
        frozen, trained = (of[method, head] for head in HEADS)
        body.append([
            method,
            frozen.failure or products(frozen),
            trained.failure or products(trained),
            frozen.failure or percent(frozen.h_error),
            trained.failure or percent(trained.W_error),
        ])  # fmt: skip
    of_h = next((percent(r.h_rounding) for r in of.values() if not math.isnan(r.h_rounding)), "–")
    of_W = next((percent(r.W_rounding) for r in of.values() if not math.isnan(r.W_rounding)), "–")
    body.append(["*the exact gradient, rounded to bf16*", "", "", of_h, of_W])
    size = f"{first.device}, {first.dtype}, N = {first.N}, D = {first.D}, V = {first.V}"
    heads = ["U, frozen head", "U, trained head", "error of dh", "error of dW"]
    return report.table([size, *heads], body)


def products(row: Row) -> str:
    return "–" if math.isnan(row.products) else f"{row.products:g}"


def measured_table(rows: list[Row]) -> str:
    measured = [row for row in rows if row.what == "measured"]
    first = measured[0]
    size = f"{first.device}, D = {first.D}, V = {first.V}"
    size += ": memory, processor time" if first.device == "CPU" else ": memory, time"
    return report.by_method(size, measured, column, cell)


def column(row: Row) -> str:
    return f"N = {row.N}, {row.dtype}, {row.head} head"


def cell(row: Row) -> str:
    """Memory, and time: on a CPU the processor's."""
    if row.failure:
        return row.failure
    if row.device == "CPU":
        return f"{row.peak_mib:,.0f} MiB, {row.processor_s:.2f} s"
    return f"{row.peak_mib:,.0f} MiB, {1000 * row.seconds:.1f} ms"


def plot(path: Path, to: Path) -> None:
    """Bars: memory and time of each method, with a frozen and with a trained head, of the first
    dtype and the most tokens that were measured."""
    from matplotlib.figure import Figure

    setting, rows = report.read(path, Row)
    measured = [row for row in rows if row.what == "measured"]
    most = max(row.N for row in measured)
    of_size = [row for row in measured if (row.N, row.dtype) == (most, measured[0].dtype)]
    shown = [row for row in of_size if report.is_result(row)]
    methods = list(dict.fromkeys(row.method for row in shown))
    figure = Figure(figsize=(8.4, 2.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    clock = "processor_s" if measured[0].device == "CPU" else "seconds"
    for axis, name, form in ((left, "peak_mib", ",.0f"), (right, clock, ".3g")):
        for head, shift, color in zip(HEADS, (-0.2, 0.2), ("#1f6fb4", "#e09f3e"), strict=True):
            of_it = [row for row in shown if row.head == head]
            at = [methods.index(row.method) + shift for row in of_it]
            values = [0.0 if row.failure else getattr(row, name) for row in of_it]
            bars = axis.barh(at, values, 0.38, color=color, label=f"{head} head")
            labels = [
                row.failure or format(value, form) for row, value in zip(of_it, values, strict=True)
            ]
            axis.bar_label(bars, labels, padding=3, fontsize=7)
        report.style(axis)
        axis.margins(x=0.18)
    left.set_yticks(range(len(methods)), methods, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("MiB above the inputs", fontsize=8)
    right.set_xlabel("seconds" if clock == "seconds" else "seconds of the processor", fontsize=8)
    right.legend(frameon=False, fontsize=8)
    first = measured[0]
    title = f"{first.device}, N = {most}, D = {first.D}, V = {first.V}, {first.dtype}"
    figure.suptitle(f"cross-entropy, {title}", fontsize=9, x=0.01, ha="left")
    report.caption(figure, setting)
    figure.savefig(to, dpi=150)


if __name__ == "__main__":
    main()
