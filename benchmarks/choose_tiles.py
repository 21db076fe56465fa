"""Compile candidate tiles and sort them by the rate predicted from their code (see cycles.py).

    python benchmarks/choose_tiles.py --arch sm_90 --kernel pair [--dtype bfloat16]
        [--divergence JSD] [--features 4096] [--seconds 600] [--jobs 1]

No GPU is needed. Those that need not be compiled to be ruled out are not: what does not fit in
shared memory, or leaves no registers beside two tiles of logits. The tile of the table comes first,
then the others, those first whose K-steps should be quickest, and of these those most like it. The
best few are for `benchmarks/tune.py` to measure; the prediction is a range, and ranges that overlap
are no order.
"""

import argparse
import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import triton

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import cycles
from benchmarks.resources import (
    CASES,
    DTYPES,
    Usage,
    Variant,
    compile_variant,
    tile_of,
    wide,
)
from opsd_kernels.kernels import tiles
from opsd_kernels.kernels.tiles import Row, Tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=list(cycles.GPU_OF), required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--kernel", choices=["lse", "pair"], required=True)
    parser.add_argument("--divergence", choices=list(CASES), default="JSD")
    parser.add_argument("--features", type=int, choices=[4096, 2048], default=4096)
    parser.add_argument("--seconds", type=float, default=600, help="time for compiling")
    parser.add_argument("--jobs", type=int, default=1, help="kernels compiled at a time")
    args = parser.parse_args()
    variant = Variant(args.arch, args.dtype, args.kernel, args.divergence)
    row = tiles.TABLE[args.arch, args.dtype]
    start = tile_of(variant, row)
    asked = [start, *candidates(start, variant)]
    until = time.monotonic() + args.seconds
    found = []
    for tile, usage in compiled_usages(variant, row, asked, args.jobs):
        found.append((tile, usage))
        if time.monotonic() > until:
            break
    gpu = cycles.GPU_OF[args.arch]
    print(f"{variant.kernel}, {variant.divergence}, {variant.dtype}, predicted for {gpu.name}, "
          f"D = {args.features}: {len(found)} of {len(asked)} candidates compiled")  # fmt: skip
    print(f"{'of a product':<14}{'registers':>10}{'spilled':>9}{'shared':>9}{'an entry':>10}  tile")
    for tile, usage in sorted(found, key=lambda of: -middle(of[1], args.features)):
        least, most = predicted(usage, args.features)
        ours = "  (the table's)" if tile == start else ""
        print(f"{least:.2f} – {most:.2f}   {usage.registers:>10}{usage.spilled:>9}"
              f"{usage.shared:>9}{usage.instructions:>10}  {tile}{ours}")  # fmt: skip


def with_tile(variant: Variant, row: Row, tile: Tile) -> Row:
    """The row with that tile where `tile_of` finds the variant's."""
    if variant.kernel == "lse":
        return replace(row, lse=tile)
    return replace(row, pair_wide=tile) if wide(variant) else replace(row, pair=tile)


def candidates(start: Tile, variant: Variant) -> Iterator[Tile]:
    """Tiles other than `start` that may fit, the quickest K-steps first, then those most like it;
    what is not a size of the tile is as in `start`."""
    if variant.dtype == "float32":
        sizes = itertools.product((32, 64), (32, 64, 128), (16, 32), (1, 2, 4, 8), (4, 8), (2, 3))
    else:
        sizes = itertools.product(
            (64, 128), (64, 128, 256), (32, 64), (1, 2, 4, 8, 16), (4, 8), (2, 3, 4)
        )
    gpu = cycles.GPU_OF[variant.arch]
    names = ("BM", "BV", "BK", "PARTS", "num_warps", "num_stages")
    fitting = []
    for values in sizes:
        sizes_of_it: dict[str, Any] = dict(zip(names, values, strict=True))
        tile = replace(start, **sizes_of_it)
        if tile != start and fits(tile, variant):
            shape = cycles.Shape(
                tile.BM, tile.BV, tile.BK, tile.num_warps, 0, 0,
                operand=4 if variant.dtype == "float32" else 2,
            )  # fmt: skip
            step, _ = cycles.step_cycles(Counter({"LDGSTS": 1}), shape, gpu)
            unlike = sum(a != b for a, b in zip(astuple(tile), astuple(start), strict=True))
            fitting.append((step / (tile.BM * tile.BV * tile.BK), unlike, tile))
    yield from (tile for _, _, tile in sorted(fitting, key=lambda of: of[:2]))


def fits(tile: Tile, variant: Variant) -> bool:
    """Whether two tiles of logits leave registers for the rest, and the stages fit."""
    gpu = cycles.GPU_OF[variant.arch]
    threads = tile.num_warps * cycles.lanes(gpu)
    in_tensor_memory = variant.arch == "sm_100" and variant.dtype != "float32"
    if in_tensor_memory:
        accumulators = 2 * tile.BV <= 512
    else:
        accumulators = threads * 160 >= 2 * tile.BM * tile.BV
    operand = 4 if variant.dtype == "float32" else 2
    stages = tile.num_stages if variant.arch != "gfx942" else tile.num_stages - 1
    staged = stages * (2 * tile.BM + tile.BV) * tile.BK * operand
    return accumulators and staged <= room(gpu) and tile.PARTS <= tile.BV // 8


def room(gpu: cycles.Gpu) -> int:
    """Bytes of shared memory that one block may have."""
    return gpu.shared - (0 if gpu.amd else cycles.KIB)


def compiled_usages(
    variant: Variant, row: Row, asked: list[Tile], jobs: int = 1
) -> Iterator[tuple[Tile, Usage]]:
    """Each tile with what the variant takes of a multiprocessor, as it is compiled; those that fail
    to compile, or do not fit after all, are told and left out."""
    pool = ProcessPoolExecutor(jobs)
    try:
        futures: dict[Future[Usage], Tile] = {
            pool.submit(compile_variant, variant, with_tile(variant, row, tile)): tile
            for tile in asked
        }
        for future in as_completed(futures):
            tile = futures[future]
            try:
                usage = future.result()
            except (triton.CompilationError, RuntimeError, ValueError) as error:
                print(f"  {tile}: {type(error).__name__}", file=sys.stderr)
                continue
            if usage.shared > room(cycles.GPU_OF[variant.arch]):
                print(f"  {tile}: {usage.shared} bytes of shared memory", file=sys.stderr)
                continue
            yield tile, usage
    finally:
        pool.shutdown(cancel_futures=True)


def predicted(usage: Usage, features: int) -> tuple[float, float]:
    """The fraction of a library product's rate, least and most."""
    if features == 4096:
        return usage.least_4096, usage.most_4096
    return usage.least_2048, usage.most_2048


def middle(usage: Usage, features: int) -> float:
    least, most = predicted(usage, features)
    return (least + most) / 2


if __name__ == "__main__":
    main()
