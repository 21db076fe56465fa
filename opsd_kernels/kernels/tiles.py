"""Tile sizes and warp counts, in one frozen table by architecture and dtype.

Nothing is tuned when the package is imported or a kernel first called. `benchmarks/gpu/tune.py`
measures the rows and other tiles on a GPU and prints rows for this table.
`benchmarks/gpu/resources.py` compiles every row and prints its registers and shared memory; a test
holds the rows to these.

Nothing here depends on the number of tokens: a token gets the same value in any batch.
"""

from dataclasses import dataclass, replace

import torch

from ..divergence import Member
from . import capability, cdiv


@dataclass(frozen=True)
class Tile:
    """BM rows by BV columns of logits, of each side, in steps of BK features. The logits are then
    processed in PARTS parts of the columns. With BULK operands are loaded by descriptors, where
    their strides allow it."""

    BM: int
    BV: int
    BK: int
    PARTS: int
    num_warps: int
    num_stages: int
    BULK: bool = False

    def widened(self) -> "Tile":
        """The same for operands of 4 bytes that autocast rounds to 2 bytes, in registers: steps of
        as many bytes, and no bulk copies, which do not pass through registers."""
        return replace(self, BK=self.BK // 2, BULK=False)


@dataclass(frozen=True)
class Sweep:
    """How `rows` goes over a row of logits: BLOCK columns at a time; in the first sweep, which has
    work for each block as well, PARTS times as many."""

    BLOCK: int
    PARTS: int
    num_warps: int


@dataclass(frozen=True)
class Row:
    """The tiles for an architecture and a dtype."""

    lse: Tile
    pair: Tile
    pair_wide: Tile  # for more work on each entry, see `Member.is_wide`
    rows: Sweep = Sweep(2048, 4, 8)
    rows_wide: Sweep = Sweep(1024, 4, 8)
    # A row workspace of up to this many rows makes its last product in parts of the vocabulary at
    # once. `benchmarks/gpu/tune.py` measures whether that is faster.
    split_rows: int = 0
    chunk: int = 1024  # rows in flight, a multiple of each BM
    # Columns of the vocabulary in flight, at most (see `slots`), where scores have two bytes; half
    # as many where scores have four bytes. Both are multiples of each BV of `pair`.
    columns: int = 9216
    multiprocessors: int = 128  # of the GPU itself, see `lookup`

    def pair_for(self, member: Member, needs_statistics: bool) -> Tile:
        return self.pair_wide if member.is_wide(needs_statistics) else self.pair

    def rows_for(self, member: Member, needs_statistics: bool) -> Sweep:
        return self.rows_wide if member.is_wide(needs_statistics) else self.rows


# Architectures by the name that code is generated for. sm_89 stands for every architecture with
# 99 KiB of shared memory a block (sm_86, sm_89, sm_120).
_NARROW = {
    # Two blocks a multiprocessor: one multiplies while the other processes its entries.
    "sm_80": Row(
        lse=Tile(64, 128, 64, 16, 4, 3),
        pair=Tile(64, 128, 64, 16, 4, 3),
        pair_wide=Tile(64, 64, 64, 8, 4, 3),
        multiprocessors=108,
    ),
    "sm_89": Row(
        lse=Tile(128, 128, 32, 16, 8, 3),
        pair=Tile(128, 128, 32, 8, 8, 3),
        pair_wide=Tile(128, 64, 32, 8, 8, 3),
        columns=9088,  # 71 blocks by 8 of rows: four for each of the 142 of an L40S
    ),
    # Measured on an H200 (benchmarks/results/nvidia-h200). One block a multiprocessor: two smaller
    # ones would read twice as much from L2, whose bandwidth is used up. Bulk copies leave registers
    # and issue slots to the products. 256 rows of `rows` are two programs a multiprocessor, of 16
    # warps that hide each other's loads.
    "sm_90": Row(
        lse=Tile(128, 128, 64, 16, 8, 4, BULK=True),
        pair=Tile(128, 128, 64, 8, 8, 4, BULK=True),
        pair_wide=Tile(128, 128, 64, 8, 8, 4, BULK=True),
        rows=Sweep(2048, 2, 16),
        rows_wide=Sweep(2048, 1, 16),
        multiprocessors=132,
    ),
    # Accumulators are in tensor memory, which two tiles of 256 columns fill.
    "sm_100": Row(
        lse=Tile(128, 256, 64, 32, 8, 3),
        pair=Tile(128, 256, 64, 32, 8, 3),
        pair_wide=Tile(128, 256, 64, 32, 8, 3),
        columns=9472,  # 37 blocks by 8 of rows: two for each of the 148
        multiprocessors=148,
    ),
    "gfx942": Row(
        lse=Tile(128, 128, 32, 16, 8, 2),
        pair=Tile(128, 128, 32, 8, 8, 2),
        pair_wide=Tile(64, 128, 32, 8, 8, 2),
        columns=4864,  # 38 blocks by 8 of rows: one for each of the 304
        multiprocessors=304,
    ),
}
# fp32 products do without tensor cores (unless PyTorch allows TF32), and small tiles suffice.
_FP32 = Row(
    lse=Tile(64, 64, 16, 8, 4, 2),
    pair=Tile(64, 64, 16, 8, 4, 2),
    pair_wide=Tile(32, 64, 16, 8, 4, 2),
)
TABLE: dict[tuple[str, str], Row] = {
    **{(arch, dtype): row for arch, row in _NARROW.items() for dtype in ("bfloat16", "float16")},
    **{
        (arch, "float32"): replace(_FP32, multiprocessors=row.multiprocessors)
        for arch, row in _NARROW.items()
    },
}
# The interpreter's time goes by operations, not by entries.
INTERPRETER = Row(
    lse=Tile(32, 256, 64, 2, 1, 1),
    pair=Tile(32, 256, 64, 2, 1, 1),
    pair_wide=Tile(32, 256, 64, 2, 1, 1),
    rows=Sweep(256, 2, 1),
    rows_wide=Sweep(256, 2, 1),
    chunk=64,
    columns=1024,
    multiprocessors=4,
)


def lookup(device: torch.device, dtype: torch.dtype) -> Row:
    """The row for a device and for the dtype of the operands of its products, with the number of
    multiprocessors of that device."""
    if device.type != "cuda":
        return INTERPRETER
    row = TABLE[architecture(device), str(dtype).removeprefix("torch.")]
    found = torch.cuda.get_device_properties(device)
    return replace(row, multiprocessors=found.multi_processor_count)


def slots(V: int, tile: Tile, row: Row, rows: int, columns: int) -> int:
    """Tiles of the vocabulary in one launch over `rows` rows, at most `columns` columns: the number
    for which all launches over the vocabulary, with a short last one, take the least time.

    A launch takes a wave each time its programs fill all multiprocessors, or part of them at the
    end; and half a wave more, in which the product that follows begins and ends.
    """
    all_tiles, row_tiles = cdiv(V, tile.BV), cdiv(rows, tile.BM)

    def duration(slots: int) -> int:  # in half waves
        full, rest = all_tiles // slots, all_tiles % slots
        waves = full * cdiv(row_tiles * slots, row.multiprocessors)
        waves += cdiv(row_tiles * rest, row.multiprocessors)
        return 2 * waves + cdiv(all_tiles, slots)

    best = most = max(1, min(columns // tile.BV, all_tiles))
    for fewer in range(most - 1, most // 2, -1):
        if duration(fewer) < duration(best):
            best = fewer
    return best


# The most spans of `lse`, which bounds the size of `partials`.
MAX_SPANS = 160


def span(V: int, row: Row) -> int:
    """Columns of one program of `lse`: the number of tiles that leaves the fewest multiprocessors
    idle at the end of a full chunk, and not many more than the least, so that a few tokens fill
    many multiprocessors too. It does not depend on the number of tokens."""
    all_tiles, row_tiles = cdiv(V, row.lse.BV), row.chunk // row.lse.BM

    def duration(tiles: int) -> int:  # in tiles, one after the other
        return cdiv(row_tiles * cdiv(all_tiles, tiles), row.multiprocessors) * tiles

    best = least = cdiv(all_tiles, min(MAX_SPANS, row.multiprocessors))
    for tiles in range(least, 2 * least + 1):
        if duration(tiles) < duration(best):
            best = tiles
    return best * row.lse.BV


def architecture(device: torch.device) -> str:
    """The architecture of the table that is nearest to that of a GPU with bf16 matrix units."""
    if torch.version.hip is not None:
        return "gfx942"
    known = {(8, 0): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    return known.get(capability(device), "sm_89")
