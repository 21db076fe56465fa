"""Time of forward, of backward and of both, as a multiple of three bare matrix products.

    python benchmarks/speed.py [--model qwen3-8b --tokens 1024 16384] [--quick] [--trained]
                               [--output FOLDER]

The floor of a frozen head is 3 U of matrix products (U = 2 N D V): both logits and the gradient of
the student's. It is measured in turns with the losses, in one process, so that a slow moment of the
machine hits all of them; a multiple is that of the floor of the same round, and the median of all
rounds is given with the lowest and highest. Ours makes its gradient in forward. A method that
cannot run is a row that says why; one that is not installed is left out.

Without a model: on a CPU two shapes that it can hold, on a GPU the head of Qwen3-8B. With --output
it writes speed.csv, speed.md and speed.png to the folder. --profile says instead where our time
goes. With --trained the head gets a gradient too, which is a fourth product that the floor does not
have, and the files are trained.csv and so on.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.lib import report
from benchmarks.lib.inputs import describe, make_inputs
from benchmarks.lib.measure import limit_memory
from benchmarks.lib.options import Options
from benchmarks.lib.peers import METHODS, Loss, color, why
from benchmarks.lib.shapes import MODELS

# N, D, V
SHAPES = {
    "cpu": [(256, 2048, 32768), (1024, 512, 32768)],
    "cuda": [(N, *MODELS["qwen3-8b"]) for N in (1024, 4096, 16384)],
}
QUICK = {"cpu": [(128, 512, 16384)], "cuda": [(1024, *MODELS["qwen3-8b"])]}
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16"]}
FLOOR = "3 GEMMs"


@dataclass(frozen=True)
class Row:
    N: int
    D: int
    V: int
    dtype: str
    method: str
    failure: str = ""
    forward_s: float = float("nan")
    backward_s: float = float("nan")
    both_s: float = float("nan")
    floors: float = float("nan")  # both, as a multiple of the floor of the same round: the median,
    floors_low: float = float("nan")  # the lowest
    floors_high: float = float("nan")  # and the highest


def main() -> None:
    options = Options(__doc__)
    options.add_device()
    options.add_dtype("both on a CPU")
    options.add_argument("--beta", type=float, default=0.5)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--model", choices=list(MODELS), help="whose LM head")
    options.add_argument("--tokens", type=int, nargs="+", default=[1024], help="with --model")
    options.add_methods(METHODS)
    options.add_argument("--flat", action="store_true", help="flat distributions, not peaked ones")
    options.add_argument("--trained", action="store_true", help="the head gets a gradient too")
    options.add_quick("one small shape")
    options.add_argument("--profile", action="store_true", help="ours alone, by operation")
    options.add_output("speed.csv", "speed.md", "speed.png")
    args = options.parse_args()
    device = torch.device(args.device)
    dtypes = [args.dtype] if args.dtype else DTYPES[device.type]
    shapes = (QUICK if args.quick else SHAPES)[device.type]
    if args.model:
        shapes = [(N, *MODELS[args.model]) for N in args.tokens]
    if args.profile:
        for dtype in dtypes:
            profile(*inputs(shapes[-1], dtype, device, args.flat), args.beta)
        return
    if device.type == "cpu":
        limit_memory()
    setting = f"{report.machine(device)}; beta {args.beta}; medians of {args.repeats} rounds"
    print(setting)
    name = "trained" if args.trained else "speed"
    results = report.Results(name, setting, args.output, show)
    for N, D, V in shapes:
        for dtype in dtypes:
            h_S, h_T, W = inputs((N, D, V), dtype, device, args.flat)
            described = describe(h_S, h_T, W)
            if dtype == dtypes[0]:
                results.setting += f"; N = {N}, D = {D}: {described}"
            print(f"\nN = {N}, D = {D}, V = {V}, {dtype}; {described}")
            print(f"{'method':<20}{'forward':>9}{'backward':>9}{'both':>9} s   x {FLOOR}")
            W.requires_grad_(args.trained)
            methods = {name: METHODS[name] for name in args.methods}
            for row in measure(h_S, h_T, W, args.beta, args.repeats, methods):
                results.add(row)
    results.finish(summary, plot)


def inputs(
    shape: tuple[int, int, int], dtype: str, device: torch.device, flat: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N, D, V = shape
    return make_inputs(N, V, D, getattr(torch, dtype), device, confidence=0 if flat else 25)


def show(row: Row) -> None:
    seconds = f"{row.forward_s:>9.3f}{row.backward_s:>9.3f}{row.both_s:>9.3f}"
    print(f"{row.method:<20}{row.failure or seconds + '     ' + multiple(row)}", flush=True)


def profile(h_S: Tensor, h_T: Tensor, W: Tensor, beta: float) -> None:
    """Where the time of our row workspace goes, operation by operation."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = h_S.device.type == "cuda"
    loss, h_S = METHODS["ours, row workspace"], h_S.requires_grad_()
    loss(h_S, h_T, W, beta).backward()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profiler(activities=activities) as seen:
        loss(h_S, h_T, W, beta).backward()
    key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    (N, D), V = h_S.shape, W.shape[0]
    print(f"N = {N}, D = {D}, V = {V}, {h_S.dtype}")
    print(seen.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=40))


def measure(
    h_S: Tensor,
    h_T: Tensor,
    W: Tensor,
    beta: float,
    repeats: int,
    methods: Mapping[str, Loss] = METHODS,
) -> list[Row]:
    """A row for each method, the floor first."""
    (N, D), V, device = h_S.shape, W.shape[0], h_S.device
    h_S = h_S.requires_grad_()

    def forward_and_backward(loss: Loss) -> tuple[float, float]:
        start = now(device)
        value = loss(h_S, h_T, W, beta)
        middle = now(device)
        torch.autograd.grad(value, [h_S, W] if W.requires_grad else h_S)
        return middle - start, now(device) - middle

    def products(z: Tensor, dh: Tensor) -> tuple[float, float]:
        start = now(device)
        three_products(h_S, h_T, W, z, dh)
        return now(device) - start, 0.0

    z, dh = h_T.new_empty(N, V), h_T.new_empty(N, D)
    runs: dict[str, Callable[[], tuple[float, float]]] = {FLOOR: partial(products, z, dh)}
    runs |= {name: partial(forward_and_backward, loss) for name, loss in methods.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    failures: dict[str, str] = {}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if name in failures:
                continue
            try:
                times = run()
            except Exception as error:
                failures[name] = why(error)
                continue
            if repeat > 0:  # the first round warms up
                seconds[name].append(times)
    floor = [sum(times) for times in seconds[FLOOR]]
    rows, dtype = [], str(h_S.dtype).removeprefix("torch.")
    for name, rounds in seconds.items():
        if name in failures:
            rows.append(Row(N, D, V, dtype, name, failures[name]))
            continue
        both = [sum(times) for times in rounds]
        multiples = [b / f for b, f in zip(both, floor, strict=True)]
        rows.append(
            Row(
                N,
                D,
                V,
                dtype,
                name,
                "",
                statistics.median(forward for forward, _ in rounds),
                statistics.median(backward for _, backward in rounds),
                statistics.median(both),
                statistics.median(multiples),
                min(multiples),
                max(multiples),
            )
        )
    return rows


def three_products(h_S: Tensor, h_T: Tensor, W: Tensor, z: Tensor, dh: Tensor) -> None:
    """The products alone, into tensors that exist already."""
    with torch.no_grad():
        torch.mm(h_T, W.t(), out=z)
        torch.mm(h_S, W.t(), out=z)
        torch.mm(z, W, out=dh)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(path: Path) -> str:
    setting, rows = report.read(path, Row)
    return "\n\n".join([table(rows), f"({setting})", *report.not_recorded(rows, METHODS)])


def table(rows: list[Row]) -> str:
    """Multiples of the floor, a column for each shape and dtype, as Markdown."""
    losses = [row for row in rows if row.method != FLOOR]
    heads = {(row.D, row.V, row.dtype) for row in losses}
    if len(heads) > 1:
        return report.by_method("", losses, column, lambda row: row.failure or multiple(row))
    of_all = column(losses[0]).partition(", ")[2] if losses else ""
    return report.by_method(
        of_all, losses, lambda row: f"N = {row.N}", lambda row: row.failure or multiple(row)
    )


def column(row: Row) -> str:
    return f"N = {row.N}, D = {row.D}, V = {row.V}, {row.dtype}"


def multiple(row: Row) -> str:
    return f"{row.floors:.2f} ({row.floors_low:.2f} – {row.floors_high:.2f})"


def plot(path: Path, to: Path) -> None:
    """A group of bars for each shape and dtype: multiples of the floor, of what has a result."""
    from matplotlib.figure import Figure

    setting, rows = report.read(path, Row)
    columns = list(dict.fromkeys(column(row) for row in rows))
    rows = [row for row in rows if row.method != FLOOR and report.is_result(row)]
    across = len(columns) if len(columns) <= 3 else 2
    down = -(-len(columns) // across)
    figure = Figure(figsize=(4.4 * min(2, across) + 0.8, 2.5 * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis in axes[len(columns) :]:
        axis.set_visible(False)
    for axis, name in zip(axes, columns, strict=False):
        of_it = [row for row in rows if column(row) == name][::-1]
        values = [0.0 if row.failure else row.floors for row in of_it]
        names = [row.method for row in of_it]
        bars = axis.barh(names, values, color=[color(row.method) for row in of_it])
        labels = [row.failure or f"{row.floors:.2f}" for row in of_it]
        axis.bar_label(bars, labels, padding=3, fontsize=8)
        axis.axvline(1, color="#333333", linewidth=0.9, linestyle=":")
        title = name.replace(", V", "\nV") if across > 2 else name
        axis.set_title(title, fontsize=9, loc="left")
        report.style(axis)
        axis.margins(x=0.15)
    title = "forward and backward, as multiples of three bare products"
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    report.caption(figure, setting)
    figure.savefig(to, dpi=150)


if __name__ == "__main__":
    main()
