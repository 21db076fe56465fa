"""What each method should take on a GPU, from counted operations and bytes.

    python benchmarks/roofline.py [--tokens 16384] [--features 4096] [--output FOLDER]

Counted, at a small size, per token and vocabulary entry:

    products     passes through the LM head (U = 2 N D V), by PyTorch's FLOP counter, and for our
                 kernels as tiles that the interpreter multiplies
    entries      elementwise operations of our kernels, and those among them that are exp or log, as
                 the interpreter executes them
    bytes        what the operations of a PyTorch method read and write of logit-sized tensors, from
                 fp32 hidden states; of ours what `rows` and `pair` do

and from them, with the data sheet's peaks (of matrix products the fraction a library reaches), a
time for each resource. The larger is the bound if all overlap, the sum if nothing does: a
measurement belongs between the two, and says by where it lies what to look at. Nothing here is
measured on a GPU.
"""

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import peers
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
    products: float
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
    for name, peer in (("eager", peers.eager), ("TRL", peers.trl), ("Liger", peers.liger_chunked)):
        counted[name] = _of_pytorch(partial(backward, peer))
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


class _Traffic(TorchDispatchMode):
    """Bytes that operations read and write of tensors with a vocabulary-sized dimension, products
    and views apart."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.name().split(".")[0] not in ("aten::empty", "aten::detach"):
            for t in tree_leaves((args, kwargs, out)):
                if isinstance(t, Tensor) and V in t.shape and D not in t.shape:
                    self.bytes += t.nbytes
        return out


def _of_pytorch(run: Callable[[], None]) -> Cost:
    try:
        with _Traffic() as traffic, FlopCounterMode(display=False) as products:
            run()
    except ImportError:
        return Cost(float("nan"))
    return Cost(products.get_total_flops() / (2 * N * D * V), bytes=traffic.bytes / (N * V))


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
    parser.add_argument("--output", type=Path, help="folder for roofline.csv")
    args = parser.parse_args()
    counted = costs()
    print("counted per token and entry, forward and backward:")
    print(f"{'method':<34}{'U':>6}{'operations':>12}{'exp, log':>10}{'bytes':>8}")
    for name, cost in counted.items():
        print(f"{name:<34}{cost.products:>6.1f}{cost.operations:>12.0f}"
              f"{cost.transcendentals:>10.1f}{cost.bytes:>8.0f}")  # fmt: skip
    print(
        f"\nN = {args.tokens}, D = {args.features}, V = {args.vocabulary}; milliseconds each takes"
    )
    print(f"{'':<10}{'method':<34}{'products':>9}{'entries':>9}{'bytes':>9}   x 3 products")
    rows = []
    for gpu in GPUS:
        for name, cost in counted.items():
            row = predict(name, cost, gpu, args.tokens, args.features, args.vocabulary)
            rows.append(row)
            print(f"{gpu.name:<10}{name:<34}{row.products_ms:>9.1f}{row.operations_ms:>9.1f}"
                  f"{row.bytes_ms:>9.1f}   {row.overlapped:.2f} to {row.serial:.2f}")  # fmt: skip
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        with (args.output / "roofline.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(f.name for f in fields(Row))
            writer.writerows(astuple(row) for row in rows)


if __name__ == "__main__":
    main()
