"""Peak memory of forward and backward above the inputs, over the number of tokens.

    python benchmarks/memory.py [--model qwen3-8b --tokens 1024 16384] [--quick] [--output FOLDER]

First the answer, in seconds: what the loss saves beside eager and beside the best peer.

Counted as on a GPU, for any size and without one: the bytes alive at once in the tensors that a
method allocates, its operations run on tensors that have no contents (`allocations.fake_device`).
What is measured above that is an allocator's rounding and libraries' workspaces.

Then measured on this machine, each figure in a process of its own: on a GPU the allocator's
high-water mark, on a CPU that of the process's resident memory, both above what the inputs take and
in a second run. A method that cannot run is a row that says why; running out of memory is a result,
and what certainly takes more memory than there is is not tried.

The returned gradient, 2 N D bytes in bf16, is part of every figure. With --output it writes
memory.csv, memory.md and memory.png to the folder.
"""

import math
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.lib import report
from benchmarks.lib.allocations import Allocations, fake_device
from benchmarks.lib.measure import (
    MIB,
    available_mib,
    high_water,
    in_a_process,
    start_counting,
    tell,
)
from benchmarks.lib.options import Options
from benchmarks.lib.peers import COLORS, METHODS, Loss, why
from benchmarks.lib.shapes import MODELS

# Model and numbers of tokens.
MEASURED = {
    "cpu": ("qwen3-0.6b", [256, 1024, 2048]),
    "cuda": ("qwen3-8b", [1024, 4096, 16384, 65536]),
}
COUNTED = [2**i for i in range(10, 17)]
QUICK = {"cpu": ("qwen3-0.6b", [128]), "cuda": ("qwen3-8b", [1024])}
SHOWN = "qwen3-8b"  # by table and picture
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
NAN = float("nan")


@dataclass(frozen=True)
class Row:
    device: str  # that it was measured on, or "counted"
    model: str
    N: int
    D: int
    V: int
    dtype: str
    method: str
    failure: str = ""
    measured_mib: float = NAN
    counted_mib: float = NAN


def main() -> None:
    options = Options(__doc__)
    options.add_device()
    options.add_dtype("float32 on a CPU")
    options.add_argument("--model", choices=list(MODELS), help="whose LM head")
    options.add_argument("--tokens", type=int, nargs="+")
    options.add_methods(METHODS)
    options.add_processes()
    options.add_quick("little, in two minutes")
    options.add_output("memory.csv", "memory.md", "memory.png")
    args = options.parse_args()
    if args.here:  # the process of one figure
        tell(measure_here, args.here)
        return
    kind = torch.device(args.device).type
    model, tokens = (QUICK if args.quick else MEASURED)[kind]
    model, tokens = args.model or model, args.tokens or tokens
    dtype = args.dtype or DTYPES[kind]
    setting = f"{report.machine(torch.device(args.device))}, {dtype}"
    results = report.Results("memory", setting, args.output, show)
    counted_models = [args.model or SHOWN] if args.model or args.quick else list(MODELS)
    counted_tokens = args.tokens or (COUNTED[::3] if args.quick else COUNTED)
    for name in sorted(counted_models, key=lambda name: name != SHOWN):
        rows = [
            [count(name, N, *MODELS[name], method) for method in args.methods]
            for N in counted_tokens
        ]
        for of_tokens in rows:
            print(answer(of_tokens), flush=True)
        print("\nMiB above the inputs, counted as on a GPU, bfloat16")
        for row in chain(*rows):
            results.add(row)
    D, V = MODELS[model]
    print(f"\n{setting}\nMiB above the inputs: measured, counted")
    for N in tokens:
        for method in args.methods:
            results.add(measure(args.device, model, N, D, V, dtype, method, args.seconds))
    results.finish(summary, plot)


def answer(counted: list[Row]) -> str:
    """What ours saves, in a sentence; of one number of tokens, by what is counted."""
    of = {row.method: row.counted_mib for row in counted if not row.failure}
    ours = [mib for method, mib in of.items() if method.startswith("ours")]
    peers = [method for method in of if not method.startswith(("ours", "eager"))]
    first = counted[0]
    told = f"{first.N:,} tokens, the head of {first.model}, bf16"
    if not ours:
        return f"{told}: ours was not counted"
    best = min(peers, key=of.__getitem__, default=None)
    others = [("eager", "eager")] if "eager" in of else []
    others += [(best, f"the best peer, {best}")] if best else []
    told += f": ours takes {amount(min(ours))}"
    for method, name in others:
        apart = of[method] - min(ours)
        told += f", {amount(abs(apart))} {'less' if apart >= 0 else 'more'} than {name} "
        told += f"({amount(of[method])})"
    return told


def show(row: Row) -> None:
    known = [mib for mib in (row.measured_mib, row.counted_mib) if not math.isnan(mib)]
    figures = row.failure or " ".join(f"{mib:>10,.0f}" for mib in known)
    print(f"{row.model:<12} N = {row.N:<6} {row.method:<20} {figures}", flush=True)


def measure(
    device: str, model: str, N: int, D: int, V: int, dtype: str, method: str, seconds: float
) -> Row:
    """One figure, from a fresh process; or why there is none."""
    at = torch.device(device)
    name = torch.cuda.get_device_name(at) if at.type == "cuda" else "CPU"
    counted = count(model, N, D, V, method, device=at.type, dtype=dtype)
    figures: dict[str, float] = {}
    if counted.failure in ("needs a GPU", report.NOT_INSTALLED):
        failure = counted.failure
    elif inputs_mib(counted) + at_least_mib(counted) > available_mib(at):
        failure = report.DOES_NOT_FIT
    else:
        task = {"device": device, "N": N, "D": D, "V": V, "dtype": dtype, "method": method}
        failure, figures = in_a_process(__file__, task, seconds)
    mib = figures.get("mib", NAN)
    return Row(name, model, N, D, V, dtype, method, failure, mib, counted.counted_mib)


def inputs_mib(row: Row) -> float:
    """Hidden states of both sides, and the head."""
    return (2 * row.N + row.V) * row.D * getattr(torch, row.dtype).itemsize / MIB


def at_least_mib(counted: Row) -> float:
    """What its method allocates at the least: what is counted; of what is compiled, which takes
    less than is counted, the logits of both sides."""
    rows = {"eager, compiled": counted.N, "Liger, chunked": min(counted.N, 1024)}
    if (n := rows.get(counted.method)) is not None:
        return 2 * n * counted.V * getattr(torch, counted.dtype).itemsize / MIB
    return 0 if counted.failure else counted.counted_mib


def measure_here(device: str, N: int, D: int, V: int, dtype: str, method: str) -> dict[str, float]:
    """The same in this process."""
    at, loss = torch.device(device), METHODS[method]
    torch.manual_seed(0)
    h_S = torch.randn(N, D, device=at)
    h_T = (h_S + 0.1 * torch.randn(N, D, device=at)).to(getattr(torch, dtype))
    h_S = h_S.to(getattr(torch, dtype))
    W = torch.empty(V, D, device=at, dtype=getattr(torch, dtype)).normal_(std=D**-0.5)
    forward_and_backward(loss, h_S, h_T, W)
    before = start_counting(at)
    forward_and_backward(loss, h_S, h_T, W)
    return {"mib": (high_water(at) - before) / MIB}


def count(
    model: str,
    N: int,
    D: int,
    V: int,
    method: str,
    *,
    device: str = "cuda",
    dtype: str = "bfloat16",
) -> Row:
    """Bytes alive at once, without running it."""
    failure, mib = "", NAN
    try:
        with fake_device(device):
            h_S = torch.empty(N, D, dtype=getattr(torch, dtype))
            h_T, W = torch.empty_like(h_S), torch.empty(V, D, dtype=h_S.dtype)
            with Allocations() as allocations:
                forward_and_backward(METHODS[method], h_S, h_T, W)
        mib = allocations.peak / MIB
    except Exception as error:
        failure = why(error)
    return Row("counted", model, N, D, V, dtype, method, failure, NAN, mib)


def forward_and_backward(loss: Loss, h_S: Tensor, h_T: Tensor, W: Tensor) -> None:
    h_S = h_S.detach().requires_grad_()
    loss(h_S, h_T, W).backward()


def summary(path: Path) -> str:
    """What is counted for one head, then what was measured, as Markdown."""
    setting, rows = report.read(path, Row)
    parts = [counted_table(shown(rows)), measured_table(rows), f"({setting})"]
    measured = [row for row in rows if row.device != "counted"]
    if measured:
        parts += report.not_recorded(measured, METHODS)
    return "\n\n".join(part for part in parts if part)


def shown(rows: list[Row]) -> list[Row]:
    """What was counted of one head, that of `SHOWN` if it is there, at every other number of
    tokens."""
    counted = [row for row in rows if row.device == "counted"]
    names = {row.model: None for row in counted}
    model = SHOWN if SHOWN in names else next(iter(names), "")
    of_it = [row for row in counted if row.model == model]
    tokens = list(dict.fromkeys(row.N for row in of_it))[::2]
    return [row for row in of_it if row.N in tokens]


def counted_table(rows: list[Row]) -> str:
    """Of the rows of one head those that were counted; empty if there are none."""
    counted = [row for row in rows if row.device == "counted"]
    return _table(f"counted as on a GPU, {counted[0].model}, bf16", counted) if counted else ""


def measured_table(rows: list[Row]) -> str:
    """Those that were measured; empty if there are none."""
    measured = [row for row in rows if row.device != "counted"]
    if not measured:
        return ""
    first = measured[0]
    return _table(f"measured, {first.device}, {first.model}, {first.dtype}", measured)


def _table(head: str, rows: list[Row]) -> str:
    return report.by_method(head, rows, lambda row: f"N = {row.N}", _cell)


def _cell(row: Row) -> str:
    return row.failure or amount(row.counted_mib if row.device == "counted" else row.measured_mib)


def amount(mib: float) -> str:
    return f"{mib:,.0f} MiB" if mib < 10_000 else f"{mib / 1024:,.0f} GiB"


def plot(path: Path, to: Path) -> None:
    """Memory over tokens: counted for one head, and measured here beside what is counted."""
    from matplotlib.figure import Figure

    setting, rows = report.read(path, Row)
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    counted = [row for row in rows if row.device == "counted"]
    model = shown(rows)[0].model
    counted = [row for row in counted if row.model == model]
    measured = [row for row in rows if row.device != "counted"]
    for method, color in COLORS.items():
        width = 2.4 if method.startswith("ours") else 1.4
        points = [row for row in counted if row.method == method and not row.failure]
        left.plot([r.N for r in points], [r.counted_mib / 1024 for r in points],
                  color=color, linewidth=width)  # fmt: skip
        of_it = [row for row in measured if row.method == method]
        right.plot([r.N for r in of_it], [r.measured_mib / 1024 for r in of_it], "o-",
                   color=color, linewidth=width, markersize=4)  # fmt: skip
        if points or any(not row.failure for row in of_it):
            left.plot([], [], color=color, linewidth=width, label=method)
        right.plot([r.N for r in of_it], [r.counted_mib / 1024 for r in of_it], ":",
                   color=color, linewidth=1)  # fmt: skip
    report.memory_lines(left, counted[0].N)
    left.set_title(f"{counted[0].model} head, bf16: counted as on a GPU", fontsize=9, loc="left")
    title = f"{measured[0].model} head, {measured[0].dtype}: measured, {measured[0].device}"
    right.set_title(f"{title} (dotted: counted)", fontsize=9, loc="left")
    for axis in (left, right):
        report.style(axis, log=True)
        axis.set_xlabel("tokens", fontsize=8)
    left.set_ylabel("GiB above the inputs, forward and backward", fontsize=9)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    report.caption(figure, setting)
    figure.savefig(to, dpi=150)


if __name__ == "__main__":
    main()
