"""Forward and backward time of each loss, as a multiple of three bare matrix products.

    python benchmarks/speed.py [--device cpu] [--dtype float32] [--repeats 5]

The floor of a frozen head is 3 U of matrix products (U = 2 N D V): both logits and the gradient of
the student's. It is measured in turns with the losses, in one process, so that a slow moment of the
machine hits all of them; medians are compared. A method that cannot run is a row that says why.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.peers import Loss, methods

# N, D, V
SHAPES = {
    "cpu": [(256, 2048, 32768), (1024, 512, 32768)],
    "cuda": [(1024, 4096, 151936), (4096, 4096, 151936), (16384, 4096, 151936)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    hardware = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    print(f"torch {torch.__version__}, {device}, {hardware}, {dtype}, beta {args.beta}")
    print(f"{'N':>6} {'D':>6} {'V':>7}  {'method':<14} {'seconds':>8} {'x 3 GEMMs':>10}")
    for N, D, V in SHAPES[device.type]:
        for name, result in measure(N, D, V, device, dtype, args.beta, args.repeats).items():
            if not isinstance(result, str):
                result = f"{result[0]:>8.3f} {result[1]:>10.2f}"
            print(f"{N:>6} {D:>6} {V:>7}  {name:<14} {result}", flush=True)


def measure(
    N: int, D: int, V: int, device: torch.device, dtype: torch.dtype, beta: float, repeats: int
) -> dict[str, tuple[float, float] | str]:
    """By method: median seconds, and median multiple of the three products of the same round; or
    why there are none."""
    torch.manual_seed(0)
    h_S = torch.randn(N, D, device=device)
    h_T = (h_S + 0.1 * torch.randn(N, D, device=device)).to(dtype)
    h_S = h_S.to(dtype).requires_grad_()
    W = (torch.randn(V, D, device=device) / D**0.5).to(dtype)

    def forward_and_backward(loss: Loss) -> object:
        return torch.autograd.grad(loss(h_S, h_T, W, beta), h_S)

    z, dh = h_T.new_empty(N, V), h_T.new_empty(N, D)
    runs: dict[str, Callable[[], object]] = {"3 GEMMs": partial(three_products, h_S, h_T, W, z, dh)}
    for name, loss in methods(device).items():
        runs[name] = partial(forward_and_backward, loss)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    failures: dict[str, tuple[float, float] | str] = {}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if name in failures:
                continue
            try:
                elapsed = timed(run, device)
            except (ImportError, torch.OutOfMemoryError) as error:
                failures[name] = type(error).__name__
                continue
            if repeat > 0:  # the first round warms up
                seconds[name].append(elapsed)
    floor = seconds["3 GEMMs"]
    medians: dict[str, tuple[float, float] | str] = {
        name: (
            statistics.median(times),
            statistics.median(t / f for t, f in zip(times, floor, strict=True)),
        )
        for name, times in seconds.items()
        if name not in failures
    }
    return medians | failures


def three_products(h_S: Tensor, h_T: Tensor, W: Tensor, z: Tensor, dh: Tensor) -> None:
    """The products alone, into tensors that exist already."""
    with torch.no_grad():
        torch.mm(h_T, W.t(), out=z)
        torch.mm(h_S, W.t(), out=z)
        torch.mm(z, W, out=dh)


def timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
