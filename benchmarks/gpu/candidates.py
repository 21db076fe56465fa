"""Candidate tiles for the tuner, without compiling them: those that fit, the likest first.

A tile is left out if its stages do not fit in shared memory, or if two tiles of logits leave no
registers for the rest.
"""

import itertools
from collections.abc import Iterator
from dataclasses import astuple, replace
from typing import Any

from benchmarks.gpu.resources import Variant
from opsd_kernels.kernels.tiles import Tile

# Bytes of shared memory (LDS) that one block may have.
SHARED = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
# Columns of fp32 in the tensor memory of a multiprocessor (sm_100), where accumulators lie.
TENSOR_MEMORY = 512
# Registers of a thread that accumulators may take; it has 255.
ACCUMULATORS = 160

# Candidates to benchmark against the tiles of `lse` and `pair`, for bf16 and fp16: predicted to be
# about as fast, or unpredictable because loads by descriptors overlap with other work. (One loop
# over tiles and K-steps, so that the loads of a tile begin before the last tile is done, was slower
# on an H200.)
RIVALS: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm_80": {
        "lse": (Tile(128, 128, 64, 16, 8, 3), Tile(64, 256, 64, 32, 8, 3)),
        "pair": (Tile(128, 128, 64, 8, 8, 3), Tile(64, 128, 64, 16, 4, 2)),
    },
    "sm_89": {
        "lse": (Tile(64, 256, 32, 32, 8, 3), Tile(128, 128, 32, 16, 8, 2)),
        "pair": (Tile(64, 256, 32, 32, 8, 3), Tile(128, 128, 32, 16, 8, 3)),
    },
    "sm_90": {
        "lse": (
            Tile(128, 128, 64, 16, 8, 3),
            Tile(128, 128, 64, 8, 8, 4, BULK=True),
            Tile(128, 128, 32, 16, 8, 8, BULK=True),
            Tile(64, 256, 64, 16, 8, 4, BULK=True),
            Tile(64, 256, 64, 32, 8, 4, BULK=True),
        ),
        "pair": (
            Tile(128, 128, 64, 8, 8, 3),
            Tile(128, 128, 64, 16, 8, 4, BULK=True),
            Tile(128, 128, 64, 4, 8, 4, BULK=True),
            Tile(128, 128, 32, 8, 8, 8, BULK=True),
            Tile(64, 256, 64, 16, 8, 4, BULK=True),
            Tile(64, 128, 64, 16, 4, 4, BULK=True),
        ),
    },
    "sm_100": {
        "lse": (Tile(128, 256, 64, 32, 8, 3, BULK=True), Tile(128, 128, 64, 8, 8, 3)),
        "pair": (
            Tile(128, 256, 64, 32, 8, 3, BULK=True),
            Tile(128, 256, 64, 16, 8, 3, BULK=True),
            Tile(128, 128, 64, 8, 8, 3),
        ),
    },
    "gfx942": {
        "lse": (Tile(128, 128, 32, 8, 8, 2), Tile(128, 64, 32, 8, 8, 2)),
        "pair": (Tile(64, 128, 32, 8, 8, 2), Tile(128, 64, 32, 4, 8, 2)),
    },
}


def candidates(start: Tile, variant: Variant) -> Iterator[Tile]:
    """Tiles other than `start` that fit: those that differ from `start` in the fewest fields
    first, and of these the larger ones, which read less for each product. Every other field is
    that of `start`."""
    if variant.dtype == "float32":
        sizes = itertools.product((32, 64), (32, 64, 128), (16, 32), (1, 2, 4, 8), (4, 8), (2, 3))
    else:
        sizes = itertools.product(
            (64, 128), (64, 128, 256), (32, 64), (1, 2, 4, 8, 16), (4, 8), (2, 3, 4)
        )
    names = ("BM", "BV", "BK", "PARTS", "num_warps", "num_stages")
    fitting = []
    for values in sizes:
        fields: dict[str, Any] = dict(zip(names, values, strict=True))
        tile = replace(start, **fields)
        if tile != start and fits(tile, variant):
            unlike = sum(a != b for a, b in zip(astuple(tile), astuple(start), strict=True))
            fitting.append((unlike, -tile.BM * tile.BV, tile))
    yield from (tile for *_, tile in sorted(fitting, key=lambda found: found[:2]))


def fits(tile: Tile, variant: Variant) -> bool:
    """Whether two tiles of logits leave registers for the rest, and the stages fit."""
    threads = tile.num_warps * (64 if variant.arch.startswith("gfx") else 32)
    if variant.arch == "sm_100" and variant.dtype != "float32":
        accumulators = 2 * tile.BV <= TENSOR_MEMORY
    else:
        accumulators = threads * ACCUMULATORS >= 2 * tile.BM * tile.BV
    operand = 4 if variant.dtype == "float32" else 2
    stages = tile.num_stages if variant.arch != "gfx942" else tile.num_stages - 1
    staged = stages * (2 * tile.BM + tile.BV) * tile.BK * operand
    return accumulators and staged <= SHARED[variant.arch] and tile.PARTS <= tile.BV // 8
