"""What tensor cores, which cut off where others round, do to loss and gradient; simulated.

    python benchmarks/truncation.py [--output FOLDER]

The op as it is, its kernels interpreted, with every product made as an A100 or an H100 makes it
(`benchmarks/tensor_cores.py`), against float64; beside it products in fp32. The teacher's hidden
states are at given distances from the student's, whose features have size 1. Then, of the logits
alone, what would help; and of the last product alone, over a whole vocabulary, what its length
does.

Writes truncation.csv to the folder, and prints the tables that docs/maths.md shows. It takes about
ten minutes on one core, and needs no GPU.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # also where there is a GPU: its products are not simulated

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import report
from benchmarks.accuracy import DIVERGENCES, METHODS, relative
from benchmarks.inputs import make_inputs
from benchmarks.options import Options
from benchmarks.tensor_cores import ARCHITECTURES, TensorCore, matmul, simulated
from opsd_kernels import (
    divergence_name,
    reference_divergence_loss,
    reference_jsd_loss,
    row_workspace,
)
from opsd_kernels.divergence import divergence_rows_

CPU, BF16 = torch.device("cpu"), torch.bfloat16
DISTANCES = [1e-3, 1e-2, 0.1, 1.0, 3.0]
NAMES = {"fp32": "fp32", "sm_80": "A100", "sm_90": "H100"}
BY_BETA = [divergence for divergence in DIVERGENCES if divergence.weights is None]
OURS = [name for name in METHODS if name.startswith("ours")]
Logits = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    arch: str
    """Whose products; fp32 are those of a CPU, which rounds."""
    D: int
    V: int
    distance: float
    mean_jsd: float
    divergence: str
    method: str
    """A schedule; or of the logits alone, how they are summed; or of the last product alone, over
    how many entries."""
    loss_error: float
    """|ℓ − exact| / exact of the mean loss; 0 of the last product."""
    grad_error: float
    """‖g − exact‖ / ‖exact‖."""
    rounding: float
    """That of the exact gradient, rounded to bf16."""


def of_the_op(N: int, V: int, features: list[int]) -> Iterator[Row]:
    """Loss and gradient as they are returned, of the row workspace as it runs on a GPU."""
    with mock.patch.object(row_workspace, "uses_kernel", return_value=True):
        yield from _of_the_op(N, V, features)


def _of_the_op(N: int, V: int, features: list[int]) -> Iterator[Row]:
    for D in features:
        for distance in DISTANCES:
            h_S, h_T, W = make_inputs(N, V, D, BF16, CPU, distance=distance)
            jsd = float(reference_jsd_loss(h_S, h_T, W))
            for arch in NAMES:
                core = ARCHITECTURES.get(arch)
                with nullcontext() if core is None else simulated(core, BF16):
                    for divergence in BY_BETA:
                        h = h_S.double().requires_grad_()
                        exact = reference_divergence_loss(h, h_T.double(), W.double(), divergence)
                        (exact_grad,) = torch.autograd.grad(exact, h)
                        for method in OURS:
                            h = h_S.clone().requires_grad_()
                            loss = METHODS[method](h, h_T, W, divergence)
                            (grad,) = torch.autograd.grad(loss, h)
                            yield Row(
                                arch,
                                D,
                                V,
                                distance,
                                jsd,
                                divergence_name(divergence),
                                method,
                                relative(loss.detach(), exact.detach()),
                                relative(grad, exact_grad),
                                relative(exact_grad.to(BF16), exact_grad),
                            )


def summed_in(parts: int) -> Callable[[Tensor, Tensor, Tensor, TensorCore], Logits]:
    """Logits of both sides from `parts` accumulators, added in fp32 at the end."""

    def logits(h_S: Tensor, h_T: Tensor, W: Tensor, core: TensorCore) -> Logits:
        chunks = zip(h_S.chunk(parts, 1), h_T.chunk(parts, 1), W.chunk(parts, 1), strict=True)
        z_S, z_T = torch.zeros(2, h_S.shape[0], W.shape[0])
        for S, T, W_k in chunks:
            z_S += matmul(S, W_k.t(), core)
            z_T += matmul(T, W_k.t(), core)
        return z_S.double(), z_T.double()

    return logits


def by_difference(h_S: Tensor, h_T: Tensor, W: Tensor, core: TensorCore) -> Logits:
    """z_T = z_S + (h_T − h_S) Wᵀ, the difference of hidden states rounded to their dtype."""
    z_S = matmul(h_S, W.t(), core).double()
    return z_S, z_S + matmul((h_T.float() - h_S.float()).to(h_S.dtype), W.t(), core)


def remedies(D: int) -> dict[str, Callable[[Tensor, Tensor, Tensor, TensorCore], Logits]]:
    return {
        "as it is": summed_in(1),
        "two accumulators": summed_in(2),
        "four accumulators": summed_in(4),
        "added up in fp32 every 256 features": summed_in(D // 256),
        "added up in fp32 every 64 features": summed_in(D // 64),
        "teacher by difference": by_difference,
    }


def of_the_logits(N: int, V: int, D: int) -> Iterator[Row]:
    """The JSD and its gradient of simulated logits, everything after them exact."""
    for distance in (1e-3, 3e-3, 1e-2, 3e-2, 0.1):
        h_S, h_T, W = make_inputs(N, V, D, BF16, CPU, distance=distance)

        def from_logits(z_S: Tensor, z_T: Tensor, W: Tensor = W) -> tuple[Tensor, Tensor]:
            loss = divergence_rows_(z_S, z_T, 0.5, None, needs_score=True)
            return loss.mean(), z_S @ W.double()

        exact, exact_grad = from_logits(*(h.double() @ W.double().t() for h in (h_S, h_T)))
        for arch in ("sm_80", "sm_90"):
            for method, logits in remedies(D).items():
                loss, grad = from_logits(*logits(h_S, h_T, W, ARCHITECTURES[arch]))
                yield Row(
                    arch,
                    D,
                    V,
                    distance,
                    float(exact),
                    divergence_name(0.5),
                    method,
                    relative(loss, exact),
                    relative(grad, exact_grad),
                    relative(exact_grad.to(BF16), exact_grad),
                )


def of_the_last_product(N: int, V: int, D: int) -> Iterator[Row]:
    """The product of a bf16 gradient of logits with the head, in chains of some entries of the
    vocabulary, which are added in fp32."""
    for distance in (1e-3, 1.0):
        h_S, h_T, W = make_inputs(N, V, D, BF16, CPU, distance=distance)
        g, z_T = (h.double() @ W.double().t() for h in (h_S, h_T))
        jsd = float(divergence_rows_(g, z_T, 0.5, None, needs_score=True).mean())
        g = g.to(BF16)
        exact = g.double() @ W.double()
        for arch in ("sm_80", "sm_90"):
            for chain in (8192, V):
                grad = torch.zeros(N, D)
                for g_v, W_v in zip(g.split(chain, 1), W.split(chain), strict=True):
                    grad += matmul(g_v, W_v, ARCHITECTURES[arch])
                yield Row(
                    arch,
                    D,
                    V,
                    distance,
                    jsd,
                    divergence_name(0.5),
                    f"last product, {chain:,} entries at a time",
                    0.0,
                    relative(grad, exact),
                    relative(exact.to(BF16), exact),
                )


def main() -> None:
    options = Options(__doc__)
    options.add_sizes(tokens=32, vocabulary=1024, features=[1024, 2048, 4096])
    options.add_output("truncation.csv")
    args = options.parse_args()
    N, V = args.tokens, args.vocabulary
    setting = f"simulated; bf16, N = {N}, V = {V}"
    results = report.Results("truncation", setting, args.output, show)
    for part in (
        of_the_op(N, V, args.features),
        of_the_logits(N, V, 2048),
        of_the_last_product(N // 4, 151936, 128),
    ):
        for row in part:
            results.add(row)
    if results.path is not None:
        print(summary(results.path))


def show(row: Row) -> None:
    print(
        f"{NAMES[row.arch]:<5} D {row.D:<5} distance {row.distance:<6} "
        f"{row.divergence:<50} {row.method:<40} loss {row.loss_error:8.1e}  gradient "
        f"{row.grad_error / row.rounding:5.2f} roundings",
        flush=True,
    )


def summary(path: Path) -> str:
    """The tables of docs/maths.md."""
    setting, rows = report.read(path, Row)

    def largest(value: Callable[[Row], float], **where: object) -> float:
        """Over the divergences and schedules."""
        return max(
            value(row)
            for row in rows
            if all(getattr(row, name) == wanted for name, wanted in where.items())
        )

    def roundings(row: Row) -> float:
        return row.grad_error / row.rounding

    of_op = [row for row in rows if row.method in OURS]
    features = list(dict.fromkeys(row.D for row in of_op))
    heads = [
        f"{distance:g} ({next(r.mean_jsd for r in of_op if r.distance == distance):.0e})"
        for distance in DISTANCES
    ]
    lines = []
    for what, schedules in (("gradient, in roundings", OURS), ("mean loss, relative", OURS[:1])):
        for method in schedules:
            cells = []
            for arch, name in NAMES.items():
                for D in features:
                    wanted = {"arch": arch, "D": D, "method": method}
                    errors = [
                        f"{largest(roundings, distance=distance, **wanted):.2f}"
                        if what.startswith("gradient")
                        else f"{largest(lambda r: r.loss_error, distance=distance, **wanted):.0e}"
                        for distance in DISTANCES
                    ]
                    cells.append([f"{name}, D = {D}", *errors])
            lines += [report.table([f"{what}: {method}", *heads], cells), ""]
    of_logits = [row for row in rows if row.method in remedies(2048)]
    distances = list(dict.fromkeys(row.distance for row in of_logits))
    cells = [
        [f"{NAMES[arch]}, {method}"]
        + [
            f"{largest(roundings, arch=arch, method=method, distance=distance):.2f}"
            for distance in distances
        ]
        for arch in ("sm_80", "sm_90")
        for method in remedies(2048)
    ]
    head = ["logits alone, D = 2048, in roundings", *(f"{d:g}" for d in distances)]
    lines += [report.table(head, cells), ""]
    last = [row for row in rows if row.method.startswith("last product")]
    cells = [
        [f"{NAMES[row.arch]}, {row.method}", f"{row.distance:g}", f"{row.grad_error:.1e}"]
        for row in last
    ]
    lines += [report.table(["last product alone", "distance", "relative error"], cells), ""]
    return "\n".join([*lines, f"({setting})"])


if __name__ == "__main__":
    main()
