"""Measure candidate tiles on a GPU and print the best as rows of the tile table.

    python benchmarks/tune.py [--dtype bfloat16] [--features 4096] [--seconds 120] [--output FOLDER]

`lse` and `pair` are timed on one chunk of tokens, with β = 0.5 and with the clipped forward KL that
OPSD's authors train with, the tiles of the table first; what is printed is the fraction of the rate
of a library product of the same size in the same run. `rows` is compared with the bandwidth of a
copy. Nothing is changed: put the printed row into opsd_kernels/kernels/tiles.py, and run
benchmarks/resources.py again.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))
from opsd_kernels import logit_free, row_workspace
from opsd_kernels.kernels import tiles
from opsd_kernels.kernels.tiles import Row, Tile
from opsd_kernels.problem import Outputs, Problem

VOCABULARY = 151936
DIVERGENCES = [(0.5, None), (0.0, 0.05)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=120, help="time for each kernel")
    parser.add_argument("--output", type=Path, help="folder for tune.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU: nothing else can say which tiles are fast")
    device, dtype = torch.device("cuda"), getattr(torch, args.dtype)
    arch = tiles.architecture(device)
    row = tiles.lookup(device, dtype)
    problem = chunk(row.chunk, args.features, dtype, device)
    product = seconds_of(lambda: problem.h_S @ problem.W.t())
    print(f"{torch.cuda.get_device_name()}, {arch}, torch {torch.__version__}, triton ", end="")
    print(f"{triton.__version__}; a product of this size takes {product * 1e3:.2f} ms")
    found: dict[str, list[tuple[float, Tile]]] = {"lse": [], "pair": []}
    for kernel, results in found.items():
        until = time.monotonic() + args.seconds
        for tile in candidates(getattr(row, kernel), dtype):
            if time.monotonic() > until:
                break
            try:
                changed = replace(row, lse=tile) if kernel == "lse" else replace(row, pair=tile)
                elapsed = measure(kernel, changed, problem)
            except (triton.OutOfResources, triton.CompilationError, RuntimeError) as error:
                print(f"  {kernel} {tile}: {type(error).__name__}")
                continue
            results.append((2 * product / elapsed, tile))  # both sides: two products
            print(f"  {kernel} {tile}: {results[-1][0]:.0%} of the product's rate", flush=True)
        results.sort(key=lambda result: -result[0])
    rows = rows_rates(row, device)
    print(f"\n    ({arch!r}, {args.dtype!r}): Row(")
    for kernel, results in found.items():
        if results:
            rate, best = results[0]
            print(f"        {kernel}=Tile{tuple(asdict(best).values())},  # {rate:.0%}")
    best_rows, rate = max(rows.items(), key=lambda item: item[1])
    print(f"        rows={best_rows},  # {rate:.0%} of a copy's bandwidth\n    ),")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        report = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "dtype": args.dtype,
            "features": args.features,
            "product_seconds": product,
            "rows": {str(k): v for k, v in rows.items()},
            **{k: [(rate, asdict(tile)) for rate, tile in v] for k, v in found.items()},
        }
        (args.output / "tune.json").write_text(json.dumps(report, indent=1))


def chunk(N: int, D: int, dtype: torch.dtype, device: torch.device) -> Problem:
    g = torch.Generator(device).manual_seed(0)
    h_S = torch.randn(N, D, generator=g, device=device)
    h_T = h_S + 0.1 * torch.randn(N, D, generator=g, device=device)
    W = torch.randn(VOCABULARY, D, generator=g, device=device) / D**0.5
    return Problem(h_S.to(dtype), h_T.to(dtype), W.to(dtype), None, dtype, 0.5)


def candidates(start: Tile, dtype: torch.dtype) -> Iterator[Tile]:
    """The table's tile first, then the others, those nearest to it before the rest."""
    if dtype == torch.float32:
        shapes = itertools.product((32, 64), (32, 64), (16, 32), (1, 2), (4, 8), (2, 3))
    else:
        shapes = itertools.product(
            (64, 128), (64, 128, 256), (32, 64), (1, 4, 8), (4, 8), (2, 3, 4)
        )
    others = [Tile(*shape) for shape in shapes]
    # Two fp32 accumulators in the registers of the threads, with room for the rest.
    others = [t for t in others if t.num_warps * 32 * 160 >= 2 * t.BM * t.BV and t != start]
    sizes = asdict(start)

    def distance(tile: Tile) -> float:
        return sum(abs(v / sizes[k] - 1) for k, v in asdict(tile).items())

    yield start
    yield from sorted(others, key=distance)


def measure(kernel: str, row: Row, problem: Problem) -> float:
    """Seconds for one sweep over the vocabulary, the mean over the divergences."""
    times = []
    for beta, entry_clip in DIVERGENCES:
        case = replace(problem, beta=beta, entry_clip=entry_clip)
        with mock.patch.object(tiles, "lookup", return_value=row):
            tensors = logit_free.allocate(case, needs_gradient=True, needs_statistics=False)
            scratch = logit_free.Scratch.of(tensors, case, needs_statistics=False)
        logit_free.launch_lse(scratch, case)

        def sweep(case: Problem = case, scratch: logit_free.Scratch = scratch) -> None:
            if kernel == "lse":
                logit_free.launch_lse(scratch, case)
                return
            for v in range(0, VOCABULARY, scratch.columns):
                logit_free.launch_pair(scratch, case, v, min(v + scratch.columns, VOCABULARY))

        times.append(seconds_of(sweep))
    return statistics.mean(times)


def rows_rates(row: Row, device: torch.device) -> dict[tuple[int, int], float]:
    """Of each block and warp count of `rows`, its bytes a second as a fraction of a copy's."""
    R = 128
    z = torch.randn(2 * R, VOCABULARY, device=device)
    problem = chunk(1, 16, torch.bfloat16, device)
    loss = torch.empty(R, device=device)
    g = z[:R].view(torch.bfloat16)[:, :VOCABULARY]
    copied = torch.empty_like(z)
    bandwidth = 2 * z.nbytes / seconds_of(lambda: copied.copy_(z))
    moved = 3 * z.nbytes + R * VOCABULARY * 2  # three sweeps read, one written
    rates = {}
    for shape in itertools.product((2048, 4096, 8192, 16384), (4, 8, 16, 32)):
        with mock.patch.object(tiles, "lookup", return_value=replace(row, rows=shape)):
            elapsed = seconds_of(
                lambda: row_workspace._launch_rows(Outputs(loss), g, z[:R], z[R:], problem, True)
            )
        rates[shape] = moved / elapsed / bandwidth
        print(f"  rows {shape}: {rates[shape]:.0%} of a copy's bandwidth", flush=True)
    return rates


def seconds_of(run: Callable[[], object]) -> float:
    """Median seconds of a call, by events on the GPU."""
    return triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median") / 1e3


if __name__ == "__main__":
    main()
