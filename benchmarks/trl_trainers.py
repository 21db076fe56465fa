"""Memory and time of one loss of each of TRL's trainers, with and without ours.

    python benchmarks/trl_trainers.py [--losses whole top-k] [--quick] [--output benchmarks/results]

Each figure is taken in a process of its own: a trainer of TRL's, made of a Qwen3 under LoRA, is
given a batch of one sequence, and computes the loss and its gradient. Losses and gradients of both
ways are recorded too; they start from the same weights. Without a GPU the memory is the process's
resident set, the time that of its processor, and the model is small but for its vocabulary.

TRL is at its best: `DistillationTrainer` and `AsyncDistillationTrainer` make the logits of 256
tokens at a time, always. The others have no such switch, and no trainer here has one for a loss of
Liger's; `use_liger_kernel` replaces layers, by kernels for GPUs.
"""

import os
import statistics
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.lib import report
from benchmarks.lib.measure import MIB, clock, high_water, in_a_process, start_counting, tell
from benchmarks.lib.options import Options
from benchmarks.lib.shapes import QWEN3
from benchmarks.lib.trl_losses import TOP_K, WHOLE, batch, make_trainer, step

# The losses by what they compare: all of the vocabulary, or K tokens; and the names of the files.
GROUPS = {"whole": WHOLE, "top-k": TOP_K}
FILES = {"whole": "trl_trainers", "top-k": "trl_top_k"}
METHODS = ("TRL", "ours")
MEASURED = {"cpu": ("tiny", [512]), "cuda": ("qwen3-1.7b", [1024, 4096, 16384])}
QUICK = {"cpu": ("tiny", [64]), "cuda": ("qwen3-0.6b", [1024])}
# A loss is computed up to three times, and not again after these seconds.
LONG_ENOUGH = 3
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    device: str
    model: str
    N: int
    dtype: str
    trainer: str
    loss: str
    method: str
    failure: str = ""
    peak_mib: float = NAN  # above what there was before the loss
    seconds: float = NAN
    value: float = NAN  # of the loss
    gradient: float = NAN  # its norm


def main() -> None:
    options = Options(__doc__)
    options.add_device()
    options.add_argument("--model", choices=list(QWEN3))
    options.add_argument("--tokens", type=int, nargs="+")
    options.add_argument("--losses", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    trainers = list(WHOLE | TOP_K)
    options.add_argument("--trainers", nargs="+", choices=trainers, default=trainers)
    options.add_processes()
    options.add_quick("little, in five minutes")
    options.add_output(
        *(f"{name}.{kind}" for name in FILES.values() for kind in ("csv", "md", "png"))
    )
    args = options.parse_args()
    if args.here:
        tell(measure_here, args.here)
        return
    kind = torch.device(args.device).type
    dtype = "float32" if kind == "cpu" else "bfloat16"
    setting = f"{report.machine(torch.device(args.device))}, {dtype}"
    print(setting)
    model, tokens = (QUICK if args.quick else MEASURED)[kind]
    for group in args.losses:
        results = report.Results(FILES[group], setting, args.output, show)
        for N, (trainer, losses) in product(args.tokens or tokens, GROUPS[group].items()):
            for loss, method in product(losses if trainer in args.trainers else (), METHODS):
                task = {
                    "device": args.device,
                    "model": args.model or model,
                    "N": N,
                    "dtype": dtype,
                    "trainer": trainer,
                    "loss": loss,
                    "method": method,
                }
                failure, figures = in_a_process(__file__, task, args.seconds)
                name = torch.cuda.get_device_name(args.device) if kind == "cuda" else "CPU"
                results.add(Row(**task | {"device": name}, failure=failure, **figures))
        results.finish(summary, plot)


def show(row: Row) -> None:
    figures = row.failure or f"{row.peak_mib:>8,.0f} MiB, {row.seconds:.2f} s, loss {row.value:.7g}"
    name = f"{row.trainer} {row.loss}"
    print(f"{row.model} N = {row.N} {name:<64} {row.method:<5} {figures}", flush=True)


def measure_here(
    device: str, model: str, N: int, dtype: str, trainer: str, loss: str, method: str
) -> dict[str, float]:
    """In this process, after a short loss that warms up: the most memory, and the median time."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.filterwarnings("ignore")
    at = torch.device(device)
    from opsd_kernels.trl import apply_opsd_kernels_to_trl, routes

    made = make_trainer(at, model, getattr(torch, dtype), trainer, loss)
    with apply_opsd_kernels_to_trl([trainer]) if method == "ours" else nullcontext():
        step(made, batch(at, made, 8))
        inputs = batch(at, made, N)
        before, seconds = start_counting(at), list[float]()
        while len(seconds) < 3 and sum(seconds) < LONG_ENOUGH:
            start = clock(at)
            value, gradient = step(made, inputs)  # ends with figures on the host
            seconds.append(clock(at) - start)
        peak = high_water(at) - before
    whose = {route.whose for route in routes(clear=True)}
    if whose != ({"ours"} if method == "ours" else set()):
        raise RuntimeError(f"computed was a loss that is {' and '.join(whose) or 'not counted'}")
    return {
        "peak_mib": peak / MIB,
        "seconds": statistics.median(seconds),
        "value": value,
        "gradient": gradient,
    }


Pairs = dict[tuple[str, str, int], tuple[Row, Row]]


def pairs(rows: list[Row]) -> Pairs:
    """Without and with ours, by trainer, loss and number of tokens."""
    theirs, ours = (
        {(row.trainer, row.loss, row.N): row for row in rows if row.method == method}
        for method in METHODS
    )
    return {key: (theirs[key], ours[key]) for key in theirs}


def summary(path: Path) -> str:
    """Memory and time of a loss without and with ours, as Markdown."""
    setting, rows = report.read(path, Row)
    both = pairs(rows)
    tokens = list(dict.fromkeys(row.N for row in rows))
    clock_name = "processor time" if rows[0].device == "CPU" else "time"
    heads = [f"N = {N}: {what}" for N in tokens for what in ("memory", clock_name)]
    body = []
    for trainer, loss in dict.fromkeys((row.trainer, row.loss) for row in rows):
        of_loss = [both[trainer, loss, N] for N in tokens]
        cells = []
        for theirs, ours in of_loss:
            cells += [
                f"{cell(theirs, 'peak_mib', ',.0f', ' MiB')} → "
                f"**{cell(ours, 'peak_mib', ',.0f', ' MiB')}**",
                f"{cell(theirs, 'seconds', '.2f', ' s')} → "
                f"**{cell(ours, 'seconds', '.2f', ' s')}**",
            ]
        body.append([f"`{trainer}`", loss, *cells, apart(of_loss)])
    head = ["TRL's own → **with ours**", "loss", *heads, "loss, gradient apart"]
    table = report.table(head, body)
    return f"{table}\n\n({setting}; {rows[0].model}, V = {QWEN3[rows[0].model]['vocab_size']})"


def saved(path: Path) -> str:
    """What ours saves at the most tokens, and each loss where it saves nothing, in words."""
    _, rows = report.read(path, Row)
    N = max(row.N for row in rows)
    both = [pair for (_, _, n), pair in pairs(rows).items() if n == N]
    both = [pair for pair in both if not pair[0].failure + pair[1].failure]
    clock_name = "s of processor time" if rows[0].device == "CPU" else "s"
    worse = [
        f"`{theirs.trainer}`, {theirs.loss} ({what})"
        for what, name in (("memory", "peak_mib"), ("time", "seconds"))
        for theirs, ours in both
        if getattr(ours, name) > getattr(theirs, name)
    ]
    return (
        f"{N} tokens take {_range(both, 'peak_mib', ',.0f', 'MiB')}, and "
        f"{_range(both, 'seconds', '.1f', clock_name)}. Ours took more in "
        f"{'; '.join(worse) or 'none of them'}. ({report.source(path)})"
    )


def _range(both: list[tuple[Row, Row]], name: str, form: str, unit: str) -> str:
    """The least and the most of ours, and of TRL's."""
    theirs, ours = ([getattr(pair[i], name) for pair in both] for i in (0, 1))
    told = [f"{min(of):{form}} to {max(of):{form}}" for of in (ours, theirs)]
    return f"{told[0]} {unit} with ours, {told[1]} without"


def cell(row: Row, name: str, form: str, unit: str) -> str:
    return row.failure or format(getattr(row, name), form) + unit


def apart(both: list[tuple[Row, Row]]) -> str:
    """The largest relative difference of loss and of the gradient's norm."""
    both = [(theirs, ours) for theirs, ours in both if not theirs.failure + ours.failure]
    if not both:
        return "–"
    loss = max(abs(ours.value / theirs.value - 1) for theirs, ours in both)
    gradient = max(abs(ours.gradient / theirs.gradient - 1) for theirs, ours in both)
    return f"{loss:.0e}, {gradient:.0e}"


def plot(path: Path, to: Path) -> None:
    """Bars: memory of each trainer's loss, at the most tokens."""
    from matplotlib.figure import Figure

    setting, rows = report.read(path, Row)
    most = max(row.N for row in rows)
    both = {
        f"{trainer.removesuffix('Trainer')}, {loss}": pair
        for (trainer, loss, N), pair in pairs(rows).items()
        if most == N
    }
    figure = Figure(figsize=(6.4, 1 + 0.32 * len(both)), layout="constrained")
    axis = figure.subplots()
    looks = {"TRL": ("TRL's own", -0.2, "#999999"), "ours": ("with ours", 0.2, "#17889c")}
    for method, (label, shift, color) in looks.items():
        of_it = [pair[METHODS.index(method)] for pair in both.values()]
        at = [i + shift for i in range(len(of_it))]
        widths = [0 if row.failure else row.peak_mib for row in of_it]
        axis.barh(at, widths, 0.38, color=color, label=label)
        for y, x, row in zip(at, widths, of_it, strict=True):
            text = row.failure or f"{row.peak_mib:,.0f}"
            axis.text(x, y, f" {text}", va="center", fontsize=7)
    axis.set_yticks(range(len(both)), list(both), fontsize=8)
    axis.invert_yaxis()
    report.style(axis)
    axis.set_xlabel(f"MiB above the weights, N = {most}", fontsize=8)
    axis.legend(frameon=False, fontsize=8)
    report.caption(figure, setting)
    figure.savefig(to, dpi=150)


if __name__ == "__main__":
    main()
