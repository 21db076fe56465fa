"""What each method should take on a GPU, from counted operations and bytes.

    python benchmarks/roofline.py [--tokens 16384] [--features 4096] [--output FOLDER]

Counted, at a small size, per token and vocabulary entry:

    products     passes through the LM head (U = 2 N D V), as the products that run, and for our
                 kernels as tiles that the interpreter multiplies
    operations   elementwise operations of our kernels, and those among them that are exp or log, as
                 the interpreter executes them
    bytes        what a peer's operations read and write of logit-sized tensors, and once each such
                 tensor that its kernels are given, as on a GPU (`allocations.fake_device`); of ours
                 what `rows` and `pair` do

A library's products run at the fraction of the peak that such products are known to reach, bytes at
a copy's bandwidth. Of our own kernels, which multiply and make something of the logits besides, the
rate is what results/resources.csv predicts from the instructions of the compiled code, at most and
at least (see cycles.py); their elementwise operations are in it. A measurement belongs between two
bounds: all that can overlap does and our kernels run at their best, or nothing does and they run at
their worst. Nothing here is measured on a GPU. With --output it writes roofline.csv, roofline.md
and roofline.png to the folder.
"""

import csv
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

if __name__ == "__main__" or not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import peers, report
from benchmarks.allocations import fake_device, tensors
from benchmarks.cycles import COPY, GAP, GPUS, LIBRARY, SPECIAL_LANES, Gpu, Range
from benchmarks.options import Options
from opsd_kernels import fused_jsd_loss, fused_sampled_token_loss, logit_free
from opsd_kernels.kernels import tiles

RESOURCES = Path(__file__).parent / "results" / "resources.csv"
# The middle of what a library product of these sizes reaches of its peak: the unit of all.
MATRIX_FRACTION = sum(LIBRARY) / 2


@dataclass(frozen=True)
class Cost:
    """Of forward and backward, per token and vocabulary entry."""

    products: float  # U
    lse: float = 0.0  # U that `lse` multiplies
    pair: float = 0.0  # U that `pair` multiplies; the others are a library's
    operations: float = 0.0  # elementwise, of kernels
    transcendentals: float = 0.0  # of these, exp and log
    bytes: float = 0.0
    rows: float = 0.0  # of these, what the kernel `rows` moves
    case: str = ""  # what our kernels are compiled for, as results/resources.csv calls it


@dataclass(frozen=True)
class Row:
    gpu: str
    method: str
    products: float  # as in `Cost`
    operations: float
    transcendentals: float
    bytes: float
    library_ms: float  # of a library's products
    kernels_best_ms: float  # of our kernels
    kernels_worst_ms: float
    bytes_ms: float  # of what other kernels and operations move
    gaps_worst_ms: float  # between the kernels of the logit-free schedule
    overlapped: float  # multiples of three bare products
    serial: float


N, D, V = 32, 64, 2048  # whole tiles, and all different


def costs() -> dict[str, Cost]:
    """By method, as counted here and now."""
    h_S = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    h_T, W = h_S + 0.1, torch.randn(V, D, generator=torch.Generator().manual_seed(1)) / 8
    targets = torch.arange(N)

    def backward(function: Callable[..., Any], *args: Tensor, **options: Any) -> None:
        h = h_S.clone().requires_grad_()
        function(h, h_T, W, *args, **options).backward()

    counted = {
        "ours, logit-free": _of_kernels(
            "JSD", lambda: backward(fused_jsd_loss, workspace_mib=0), bytes=_pair_bytes(2)
        ),
        "ours, logit-free, forward KL": _of_kernels(
            "forward KL",
            lambda: backward(fused_jsd_loss, beta=0.0, workspace_mib=0),
            bytes=_pair_bytes(1),
        ),
        "ours, logit-free, sampled token": _of_kernels(
            "log p",
            lambda: backward(fused_sampled_token_loss, targets, workspace_mib=0),
            bytes=_pair_bytes(1),
        ),
        "ours, row workspace": _row_workspace(lambda: backward(fused_jsd_loss, workspace_mib=1)),
    }
    for name in ("eager", "TRL", "Liger, fused", "Liger, chunked"):
        try:
            counted[name] = _of_a_peer(peers.METHODS[name])
        except ImportError:
            continue
    return counted


def _pair_bytes(tiles: int) -> float:
    """bf16 tiles of scores, written by `pair` and read by the product."""
    return tiles * (2 + 2)


def _of_kernels(case: str, run: Callable[[], None], bytes: float, rows: float = 0.0) -> Cost:
    # In as many parts as on a GPU: what is done once a tile is then as much of an entry's.
    tile = replace(tiles.INTERPRETER.lse, PARTS=16)
    row = replace(
        tiles.INTERPRETER, lse=tile, pair=tile, pair_wide=tile, rows=tiles.Sweep(256, 4, 1)
    )
    with (
        mock.patch.object(tiles, "lookup", return_value=row),
        _interpreted() as seen,
        FlopCounterMode(display=False) as library,
    ):
        run()
    U, entries = 2 * N * D * V, N * V
    lse, pair = 2 * seen["launch_lse"] / U, 2 * seen["pair_launcher"] / U
    return Cost(
        lse + pair + library.get_total_flops() / U,
        lse,
        pair,
        seen["operation"] / entries,
        seen["transcendental"] / entries,
        bytes,
        rows,
        case,
    )


def _row_workspace(run: Callable[[], None]) -> Cost:
    """With `rows`, as on a GPU: logits written in fp32 by the product, read in three sweeps, the
    gradient written in bf16 and read by the last product."""
    from opsd_kernels import row_workspace

    with mock.patch.object(row_workspace, "uses_kernel", return_value=True):
        return _of_kernels("JSD", run, bytes=8 + 3 * 8 + 2 + 2, rows=3 * 8 + 2)


@contextmanager
def _interpreted() -> Iterator[dict[str, int]]:
    """Elements of what Triton's interpreter computes meanwhile on tiles of entries; of products the
    multiplications, by the launch that they belong to."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen = {"launch_lse": 0, "pair_launcher": 0, "operation": 0, "transcendental": 0}
    launched = ""
    builder = InterpreterBuilder
    create_dot, binary_op, unary_op = builder.create_dot, builder.binary_op, builder.unary_op

    def launching(name: str) -> Callable[..., Any]:
        launch = getattr(logit_free, name)

        def noted(*args: Any, **options: Any) -> Any:
            nonlocal launched
            launched = name
            return launch(*args, **options)

        return noted

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        seen[launched] += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return create_dot(self, a, b, *rest)

    def binary(self: Any, a: Any, b: Any, op: Any) -> Any:
        out = binary_op(self, a, b, op)
        if out.data.dtype.kind == "f":
            seen["operation"] += out.data.size
        return out

    def unary(self: Any, a: Any, op: Any) -> Any:
        out = unary_op(self, a, op)
        seen["operation"] += out.data.size
        if op.__name__ in ("exp", "log", "exp2", "log2"):
            seen["transcendental"] += out.data.size
        return out

    with (
        mock.patch.object(logit_free, "launch_lse", launching("launch_lse")),
        mock.patch.object(logit_free, "pair_launcher", launching("pair_launcher")),
        mock.patch.object(builder, "create_dot", dot),
        mock.patch.object(builder, "binary_op", binary),
        mock.patch.object(builder, "unary_op", unary),
    ):
        yield seen


def _of_a_peer(loss: peers.Loss) -> Cost:
    N, D, V = 2048, 1280, 151936  # so large that peers go by chunks

    def entries(shape: torch.Size) -> bool:
        return len(shape) > 1 and shape[-1] > 10_000 and D not in shape

    class Traffic(TorchDispatchMode):
        """Bytes that operations read and write of logit-sized tensors, and operations of matrix
        products (which PyTorch's counter does not know with an out_dtype)."""

        bytes = flops = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            out = func(*args, **kwargs)
            if func.namespace == "prim":  # a question about a tensor
                return out
            if func.name().split(".")[0] in ("aten::mm", "aten::addmm"):
                a, b = [t for t in args if isinstance(t, Tensor)][-2:]
                self.flops += 2 * a.numel() * b.shape[1]
            if not func.is_view and func.name().split(".")[0] not in FREE:
                # What is written comes back as `out`; what is expanded is not in memory.
                read = {name: value for name, value in kwargs.items() if name != "out"}
                seen = [t for t in tensors((args, read, out)) if entries(t.shape)]
                self.bytes += sum(t.nbytes for t in seen if 0 not in t.stride())
            return out

    with fake_device("cuda") as given:
        h_S = torch.empty(N, D, dtype=torch.bfloat16).requires_grad_()
        h_T, W = torch.empty_like(h_S), torch.empty(V, D, dtype=h_S.dtype)
        with Traffic() as traffic:
            loss(h_S, h_T, W).backward()
    in_kernels = sum(shape.numel() * dtype.itemsize for shape, dtype in given if entries(shape))
    moved = (traffic.bytes + in_kernels) / (N * V)
    return Cost(traffic.flops / (2 * N * D * V), bytes=moved)


# What touches no memory.
FREE = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::detach")


def predict(
    method: str,
    cost: Cost,
    gpu: Gpu,
    N: int,
    D: int,
    V: int,
    recorded: dict[tuple[str, ...], dict[str, str]],
) -> Row:
    """The bounds of a method on a GPU, with the rates of our kernels as recorded (see `rates`)."""
    entries = N * V
    U = 2 * entries * D / (gpu.matrix_rate * MATRIX_FRACTION)
    copied = entries / (gpu.memory * COPY)  # seconds for a byte of each entry
    library = (cost.products - cost.lse - cost.pair) * U
    times = {"lse": cost.lse * U, "pair": cost.pair * U, "rows": cost.rows * copied}
    kernels = [0.0, 0.0]
    for kernel, seconds in times.items():
        if seconds:
            of_it = recorded[gpu.arch, kernel, cost.case]
            for i, rate in enumerate(rates(of_it, D)):
                kernels[i] += seconds / rate
    moved = (cost.bytes - cost.rows) * copied
    gaps = [_launches(cost, gpu, N, D, V) * gap for gap in GAP]
    overlapped = max(library + kernels[0], moved) + gaps[0]
    serial = library + kernels[1] + moved + gaps[1]
    return Row(
        gpu.name,
        method,
        cost.products,
        cost.operations,
        cost.transcendentals,
        cost.bytes,
        1e3 * library,
        1e3 * kernels[0],
        1e3 * kernels[1],
        1e3 * moved,
        1e3 * gaps[1],
        overlapped / (3 * U),
        serial / (3 * U),
    )


def _launches(cost: Cost, gpu: Gpu, N: int, D: int, V: int) -> int:
    """Kernels that the logit-free schedule runs, one after the other: of each chunk of rows `lse`,
    `merge`, `finish` and a zeroing, and for each part of the vocabulary `pair` and the products."""
    if not cost.pair:
        return 0
    row = tiles.TABLE[gpu.arch, "bfloat16"]
    products = round(cost.products - cost.lse - cost.pair)
    if logit_free.is_stacked(row.chunk, D):
        products = 1
    return -(-N // row.chunk) * (4 + -(-V // row.columns) * (1 + products))


def kernels_recorded(path: Path = RESOURCES) -> dict[tuple[str, ...], dict[str, str]]:
    """What resources.csv holds of bf16 kernels, by architecture, kernel and divergence."""
    with path.open(newline="") as file:
        return {
            (row["arch"], row["kernel"], row["divergence"]): row
            for row in csv.DictReader(file)
            if row["dtype"] == "bfloat16"
        }


def rates(recorded: dict[str, str], features: int) -> Range:
    """The predicted fraction of a library product's rate (of `rows`, a copy's): best, worst.

    Of a tile the K-loop's cycles go with the features, the others do not: between and beyond the
    two numbers of features recorded, the fraction's inverse is linear in theirs.
    """
    found = []
    for end in ("most", "least"):
        at_4096, at_2048 = (1 / float(recorded[f"{end}_{D}"]) for D in (4096, 2048))
        slope = (at_2048 - at_4096) / (1 / 2048 - 1 / 4096)
        found.append(1 / (at_4096 + slope * (1 / features - 1 / 4096)))
    return found[0], found[1]


def main() -> None:
    options = Options(__doc__)
    options.add_sizes(tokens=16384, vocabulary=151936, features=4096)
    options.add_output("roofline.csv", "roofline.md", "roofline.png")
    args = options.parse_args()
    N, D, V = args.tokens, args.features, args.vocabulary
    recorded = kernels_recorded()
    rows = [
        predict(method, cost, gpu, N, D, V, recorded)
        for method, cost in costs().items()
        for gpu in GPUS
    ]
    setting = f"predicted from counts, N = {N}, D = {D}, V = {V}, bf16"
    print(summary(rows, setting))
    if args.output:
        path = args.output / "roofline.csv"
        report.write(path, setting, rows)
        path.with_suffix(".md").write_text(page(rows, setting))
        plot(rows, setting, path.with_suffix(".png"))


def summary(rows: list[Row], setting: str) -> str:
    """Multiples of three bare products, a column for each GPU, as Markdown."""
    gpus = list(dict.fromkeys(row.gpu for row in rows))
    body = []
    for method in dict.fromkeys(row.method for row in rows):
        of_it = {row.gpu: row for row in rows if row.method == method}
        cells = [f"{of_it[gpu].overlapped:.2f} – {of_it[gpu].serial:.2f}" for gpu in gpus]
        body.append([method, f"{of_it[gpus[0]].products:.1f}", *cells])
    return report.table(["", "U", *gpus], body) + f"\n\n({setting})"


def page(rows: list[Row], setting: str) -> str:
    """The counts, the prediction, and the milliseconds of each part on each GPU."""
    methods = [row for row in rows if row.gpu == rows[0].gpu]
    counts = [
        [r.method, f"{r.products:.1f}", f"{r.operations:.0f}", f"{r.transcendentals:.1f}",
         f"{r.bytes:.0f}"]
        for r in methods
    ]  # fmt: skip
    times = [
        [r.method, r.gpu, f"{r.library_ms:.1f}",
         f"{r.kernels_best_ms:.1f} – {r.kernels_worst_ms:.1f}" if r.kernels_best_ms else "–",
         f"{r.bytes_ms:.1f}", f"{r.gaps_worst_ms:.1f}" if r.gaps_worst_ms else "–"]
        for gpu in GPUS for r in rows if r.gpu == gpu.name
    ]  # fmt: skip
    peaks = [
        [gpu.name, f"{gpu.matrix_rate / 1e12:.0f}", f"{gpu.fp32_rate / 1e12:.0f}",
         f"{gpu.multiprocessors * gpu.clock * SPECIAL_LANES / 1e12:.1f}",
         f"{gpu.l2[1]:.0f} – {gpu.l2[0]:.0f}", f"{gpu.memory / 1e12:.2f}"]
        for gpu in GPUS
    ]  # fmt: skip
    return f"""# What each method should take on a GPU

Not measured: `python benchmarks/roofline.py` counts operations and bytes. A measurement belongs
between the two multiples: near the lower one if all overlaps that can and our kernels run at their
best, near the upper one if nothing does and they run at their worst.

## Multiples of three bare products

{summary(rows, setting)}

![The two bounds of each method on each GPU](roofline.png)

## Counted per token and entry of the vocabulary, forward and backward

{report.table(["", "U", "operations", "exp, log", "bytes"], counts)}

Operations are counted of our kernels alone: what peers do between logits is bound by bytes. Reads
of the head are not counted, for anyone: they belong to the products, which hide them as long as a
chunk has some hundred rows.

## Milliseconds

{
        report.table(
            ["", "GPU", "library products", "our kernels", "other bytes", "gaps, at most"], times
        )
    }

Our kernels are `lse` and `pair` with the products they make, and `rows`; their elementwise
operations are in these times. The rates are those that [resources.csv](resources.csv) predicts from
their instructions, at best and at worst, and what is assumed for it stands in
[cycles.py](../cycles.py): that matrix units are driven as hard as by a library and no harder, what
L2 delivers, how much instructions wait for one another (1.1 to 1.7 times), how long the first
loads of a tile take, and that a second block on a multiprocessor hides all of a tile's other work
or half of it. Gaps are those between the kernels of the logit-free schedule, {1e6 * GAP[0]:.0f} to
{1e6 * GAP[1]:.0f} µs each, if the host keeps up; the launches of others are not counted.
The kernels were compiled with the tiles of the table, which no GPU has measured.

## Peaks

{
        report.table(
            [
                "",
                "bf16 TFLOP/s",
                "fp32 TFLOP/s",
                "exp or log, T/s",
                "L2 bytes a cycle and multiprocessor",
                "memory TB/s",
            ],
            peaks,
        )
    }

Every bare product is taken to reach {MATRIX_FRACTION:.1%} of its peak, the middle of {
        LIBRARY[1]:.0%}
to {LIBRARY[0]:.0%}: on an H100 and an H200 as much was measured. A copy is taken to reach
{COPY:.0%} of the memory's bandwidth, as on an H200. What L2 delivers is measured by others, and for
the B200 a guess.
"""


def plot(rows: list[Row], setting: str, to: Path) -> None:
    """A bar from the lower to the upper bound for each method, a panel for each GPU."""
    from matplotlib.figure import Figure

    gpus = list(dict.fromkeys(row.gpu for row in rows))
    figure = Figure(figsize=(2.6 * len(gpus) + 1.5, 3.2), layout="constrained")
    for axis, gpu in zip(figure.subplots(1, len(gpus), sharey=True), gpus, strict=True):
        of_it = [row for row in rows if row.gpu == gpu][::-1]
        axis.barh(
            [row.method for row in of_it],
            [max(row.serial - row.overlapped, 0.03) for row in of_it],
            left=[row.overlapped for row in of_it],
            color=["#1f6fb4" if row.method.startswith("ours") else "#b9b9b9" for row in of_it],
        )
        axis.axvline(1, color="#333333", linewidth=0.9, linestyle=":")
        axis.set_xlim(left=0)
        axis.set_title(gpu, fontsize=9, loc="left")
        report.style(axis)
    figure.supxlabel(f"multiples of three bare products; {setting}", fontsize=7, color="#555555")
    figure.savefig(to, dpi=150)


if __name__ == "__main__":
    main()
