"""What each method should take on a GPU, from counted operations and bytes.

    python benchmarks/roofline.py [--tokens 16384] [--features 4096] [--output FOLDER]

Counted, at a small size, per token and vocabulary entry:

    products     passes through the LM head (U = 2 N D V), as the products that run, and for our
                 kernels as tiles that the interpreter multiplies
    operations   elementwise operations of our kernels, and those among them that are exp or log, as
                 the interpreter executes them
    bytes        what a peer's operations read and write of logit-sized tensors, and once each such
                 tensor that its kernels are given, as on a GPU (`allocations.pretended`); of ours
                 what `rows` and `pair` do

and from them, with the data sheet's peaks (of matrix products the fraction a library reaches), a
time for each resource. The larger is the bound if all overlap, the sum if nothing does: a
measurement belongs between the two, and says by where it lies what to look at. Nothing here is
measured on a GPU. With --output it writes roofline.csv, roofline.md and roofline.png to the folder.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from benchmarks.allocations import pretended, tensors
from opsd_kernels import fused_jsd_loss, fused_sampled_token_loss


@dataclass(frozen=True)
class Gpu:
    """Peaks of a data sheet."""

    name: str
    matrix: float  # dense bf16 FLOP/s with fp32 accumulation
    fp32: float  # FLOP/s outside the matrix units, a fused multiply-add counted as two
    transcendental: float  # exp or log a second
    memory: float  # bytes/s


GPUS = [
    Gpu("A100", 312e12, 19.5e12, 108 * 16 * 1.41e9, 2.04e12),
    Gpu("RTX 4090", 165e12, 82.6e12, 128 * 16 * 2.52e9, 1.01e12),
    Gpu("H100", 989e12, 67e12, 132 * 16 * 1.83e9, 3.35e12),
    Gpu("H200", 989e12, 67e12, 132 * 16 * 1.83e9, 4.8e12),
    Gpu("B200", 2250e12, 75e12, 148 * 16 * 1.83e9, 8.0e12),
]
# Of its peak what a library product of these sizes reaches.
MATRIX_FRACTION = 0.75


@dataclass(frozen=True)
class Cost:
    """Of forward and backward, per token and vocabulary entry."""

    products: float  # U
    operations: float = 0.0  # elementwise, of kernels
    transcendentals: float = 0.0  # of these, exp and log
    bytes: float = 0.0


@dataclass(frozen=True)
class Row:
    gpu: str
    method: str
    products: float  # as in `Cost`
    operations: float
    transcendentals: float
    bytes: float
    products_ms: float
    operations_ms: float
    bytes_ms: float
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
            lambda: backward(fused_jsd_loss, workspace_mib=0), bytes=_pair_bytes(2)
        ),
        "ours, logit-free, forward KL": _of_kernels(
            lambda: backward(fused_jsd_loss, beta=0.0, workspace_mib=0), bytes=_pair_bytes(1)
        ),
        "ours, logit-free, sampled token": _of_kernels(
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


def _of_kernels(run: Callable[[], None], bytes: float) -> Cost:
    with _interpreted() as seen, FlopCounterMode(display=False) as library:
        run()
    U, entries = 2 * N * D * V, N * V
    products = (2 * seen["dot"] + library.get_total_flops()) / U
    return Cost(products, seen["operation"] / entries, seen["transcendental"] / entries, bytes)


def _row_workspace(run: Callable[[], None]) -> Cost:
    """With `rows`, as on a GPU: logits written in fp32 by the product, read in three sweeps, the
    gradient written in bf16 and read by the last product."""
    from opsd_kernels import row_workspace

    with mock.patch.object(row_workspace, "uses_kernel", return_value=True):
        return _of_kernels(run, bytes=8 + 3 * 8 + 2 + 2)


@contextmanager
def _interpreted() -> Iterator[dict[str, int]]:
    """Elements of what Triton's interpreter computes meanwhile on tiles of entries."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen = {"dot": 0, "operation": 0, "transcendental": 0}
    builder = InterpreterBuilder
    create_dot, binary_op, unary_op = builder.create_dot, builder.binary_op, builder.unary_op

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        seen["dot"] += a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
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

    with pretended("cuda") as given:
        h_S = torch.empty(N, D, dtype=torch.bfloat16).requires_grad_()
        h_T, W = torch.empty_like(h_S), torch.empty(V, D, dtype=h_S.dtype)
        with Traffic() as traffic:
            loss(h_S, h_T, W).backward()
    in_kernels = sum(shape.numel() * dtype.itemsize for shape, dtype in given if entries(shape))
    moved = (traffic.bytes + in_kernels) / (N * V)
    return Cost(traffic.flops / (2 * N * D * V), bytes=moved)


# What touches no memory.
FREE = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::detach")


def predict(method: str, cost: Cost, gpu: Gpu, tokens: int, features: int, vocabulary: int) -> Row:
    entries = tokens * vocabulary
    U = 2 * entries * features / (gpu.matrix * MATRIX_FRACTION)
    products = cost.products * U
    operations = max(
        cost.operations * entries / (gpu.fp32 / 2),
        cost.transcendentals * entries / gpu.transcendental,
    )
    moved = cost.bytes * entries / gpu.memory
    overlapped = max(products, operations, moved)
    serial = products + operations + moved
    return Row(
        gpu.name,
        method,
        cost.products,
        cost.operations,
        cost.transcendentals,
        cost.bytes,
        1e3 * products,
        1e3 * operations,
        1e3 * moved,
        overlapped / (3 * U),
        serial / (3 * U),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--output", type=Path, help="folder for roofline.csv, .md and .png")
    args = parser.parse_args()
    N, D, V = args.tokens, args.features, args.vocabulary
    rows = [predict(method, cost, gpu, N, D, V) for gpu in GPUS for method, cost in costs().items()]
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
    """The counts, the prediction, and the milliseconds of each resource on each GPU."""
    methods = [row for row in rows if row.gpu == rows[0].gpu]
    counts = [
        [r.method, f"{r.products:.1f}", f"{r.operations:.0f}", f"{r.transcendentals:.1f}",
         f"{r.bytes:.0f}"]
        for r in methods
    ]  # fmt: skip
    times = [
        [r.method, r.gpu, f"{r.products_ms:.1f}", f"{r.operations_ms:.1f}", f"{r.bytes_ms:.1f}"]
        for r in sorted(rows, key=lambda r: r.gpu)
    ]
    peaks = [
        [gpu.name, f"{gpu.matrix / 1e12:.0f}", f"{gpu.fp32 / 1e12:.0f}",
         f"{gpu.transcendental / 1e12:.1f}", f"{gpu.memory / 1e12:.2f}"]
        for gpu in GPUS
    ]  # fmt: skip
    return f"""# What each method should take on a GPU

Not measured: `python benchmarks/roofline.py` counts operations and bytes, and divides by the peaks
of data sheets. A measurement belongs between the two multiples: near the lower one if all overlaps,
near the upper one if nothing does.

## Multiples of three bare products

{summary(rows, setting)}

![The two bounds of each method on each GPU](roofline.png)

## Counted per token and entry of the vocabulary, forward and backward

{report.table(["", "U", "operations", "exp, log", "bytes"], counts)}

Operations are counted of our kernels alone: what peers do between logits is bound by bytes. Reads
of the head are not counted, for anyone: they belong to the products, which hide them as long as a
chunk has some hundred rows.

## Milliseconds of each resource

{report.table(["", "GPU", "products", "operations", "bytes"], times)}

## Peaks

{report.table(["", "bf16 TFLOP/s", "fp32 TFLOP/s", "exp or log, T/s", "memory TB/s"], peaks)}

Of its peak every product is taken to reach {MATRIX_FRACTION:.0%}, as a library's does. That our own
kernels, which make the products of the logit-free schedule's first two steps, do so too is an
assumption, and the first thing to measure.
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
