"""Forward and backward time of each loss, as a multiple of three bare matrix products.

    python benchmarks/speed.py [--device cpu] [--repeats 5]

The floor of a frozen head is 3 U of matrix products (U = 2 N D V): both logits and the gradient of
the student's. It is measured in turns with the losses, in one process, so that a slow moment of the
machine hits all of them; medians are compared.
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
from benchmarks.peers import PEERS, Loss

SHAPES = [(256, 2048, 32768), (1024, 512, 32768)]  # N, D, V


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(f"torch {torch.__version__}, {device}, {dtype}, {torch.get_num_threads()} threads")
    print(f"{'N':>6} {'D':>6} {'V':>7}  {'method':<8} {'seconds':>8} {'x 3 GEMMs':>10}")
    for N, D, V in SHAPES:
        for name, seconds, ratio in measure(N, D, V, device, dtype, args.beta, args.repeats):
            print(f"{N:>6} {D:>6} {V:>7}  {name:<8} {seconds:>8.3f} {ratio:>10.2f}", flush=True)


def measure(
    N: int, D: int, V: int, device: torch.device, dtype: torch.dtype, beta: float, repeats: int
) -> list[tuple[str, float, float]]:
    """(method, median seconds, median multiple of the three products of the same round)."""
    torch.manual_seed(0)
    h_S = torch.randn(N, D, device=device)
    h_T = (h_S + 0.1 * torch.randn(N, D, device=device)).to(dtype)
    h_S = h_S.to(dtype).requires_grad_()
    W = (torch.randn(V, D, device=device) / D**0.5).to(dtype)

    def forward_and_backward(loss: Loss) -> object:
        return torch.autograd.grad(loss(h_S, h_T, W, beta), h_S)

    z, dh = h_T.new_empty(N, V), h_T.new_empty(N, D)
    methods: dict[str, Callable[[], object]] = {
        "3 GEMMs": partial(three_products, h_S, h_T, W, z, dh)
    }
    for name, loss in PEERS.items():
        methods[name] = partial(forward_and_backward, loss)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, run in methods.items():
            elapsed = timed(run, device)
            if repeat > 0:  # the first round warms up
                seconds[name].append(elapsed)
    floor = seconds["3 GEMMs"]
    return [
        (
            name,
            statistics.median(times),
            statistics.median(t / f for t, f in zip(times, floor, strict=True)),
        )
        for name, times in seconds.items()
    ]


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
