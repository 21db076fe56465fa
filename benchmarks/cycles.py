"""Cycles of a tile of logits, from a compiled kernel's instructions and what a GPU does in a cycle:
what fraction of a library product's rate `lse` and `pair` should reach, of a copy's `rows`.

A range, each end of it with its assumptions:

    K-step     the slowest of the matrix units, shared memory, L2 and the issue of instructions. At
               best they overlap; at worst the instructions are issued while nothing is multiplied.
               Matrix units are as fast as a library drives them: it is the power that limits both.
    the rest   of a tile: the slowest pipe, 1.1 to 1.7 times, for instructions wait for one another
               (`STALL`); and the latency of the first loads (`FILL`), of which nothing is hidden if
               one block has the multiprocessor to itself.
    blocks     that fit a multiprocessor together: of two or more, at best the K-loop of one hides
               the rest of another as far as there are slots to issue it, at worst half of it.
    waves      tiles come in whole rounds of all multiprocessors.

Nothing here is measured: compare with `benchmarks/tune.py` on a GPU.
"""

from collections import Counter
from dataclasses import dataclass

from benchmarks.sass import Parts, by_class, class_of, width

Range = tuple[float, float]  # at best, at worst

# Of its peak what a library's bf16 product of such sizes reaches: 770–800 of 989 TFLOP/s on an H200
# and 798 on an H100, 8192³ (measured by us). Taken for other GPUs and fp32 too.
LIBRARY: Range = (0.80, 0.75)
# Of the data sheet's bandwidth what a copy reaches: 4.3 of 4.8 TB/s, H200 (measured by us).
COPY = 0.9
# Times the slowest pipe, for code without loops and two warps a scheduler. An assumption.
STALL: Range = (1.1, 1.7)
# Cycles from a tile's first load to its first product: the latency of L2 (200–300 cycles:
# github.com/RRZE-HPC/gpu-benches, gpu-latency) or of memory, and some addresses. An assumption.
FILL: Range = (300, 1000)
# Seconds between a kernel's end and the start of the next in a stream. An assumption.
GAP: Range = (1e-6, 3e-6)


@dataclass(frozen=True)
class Gpu:
    """What a GPU does in a clock cycle; `multiprocessors` are AMD's compute units.

    Clock, matrix rate and memory are the data sheet's. L2 is measured, from a set of 20 MB down to
    one of some MB, by github.com/RRZE-HPC/gpu-benches (gpu-l2-cache, commit 1038c5d): 5.4 TB/s
    on an A100, 10.3–9.7 TB/s on an H200 (at 1.98 GHz); others as said beside them.
    """

    name: str
    arch: str  # of the tile table
    multiprocessors: int
    clock: float  # Hz
    matrix: int  # dense bf16 FLOP a cycle and multiprocessor, fp32 accumulation
    fp32: int  # FLOP outside the matrix units, a fused multiply-add counted as two
    l2: Range  # bytes a cycle and multiprocessor
    memory: float  # bytes/s
    shared: int  # bytes a multiprocessor
    warps: int = 64  # a multiprocessor's at most

    @property
    def matrix_rate(self) -> float:
        """Dense bf16 FLOP/s."""
        return self.multiprocessors * self.clock * self.matrix

    @property
    def fp32_rate(self) -> float:
        """fp32 FLOP/s."""
        return self.multiprocessors * self.clock * self.fp32

    @property
    def amd(self) -> bool:
        return self.arch.startswith("gfx")


KIB = 1024
GPUS = [
    Gpu("A100", "sm_80", 108, 1.41e9, 2048, 128, (36, 35), 2.04e12, 164 * KIB),
    # An L40, the same chip, measures 5.2 TB/s at 2.49 GHz: 2,090 bytes a cycle.
    Gpu("RTX 4090", "sm_89", 128, 2.52e9, 512, 256, (17, 16), 1.01e12, 100 * KIB, warps=48),
    Gpu("H100", "sm_90", 132, 1.83e9, 4096, 256, (39, 37), 3.35e12, 228 * KIB),
    Gpu("H200", "sm_90", 132, 1.83e9, 4096, 256, (39, 37), 4.8e12, 228 * KIB),
    # Not measured: at worst as an H200, at best the 64 bytes of a multiprocessor's port.
    Gpu("B200", "sm_100", 148, 1.85e9, 8192, 256, (64, 37), 8.0e12, 228 * KIB),
    # 27 TB/s while a chiplet's 4 MB hold the set, 10 TB/s beyond (gpu-cache, same commit).
    Gpu("MI300X", "gfx942", 304, 2.1e9, 2048, 256, (42, 16), 5.3e12, 64 * KIB, warps=32),
]
# Where the table's row for an architecture is meant for: the last of its GPUs.
GPU_OF = {gpu.arch: gpu for gpu in GPUS}

# A cycle and multiprocessor: bytes of shared memory (NVIDIA's and AMD's alike), and of stores to
# L2; lanes of compares, selects and integers, of exp, log and reciprocals, and of shuffles (CUDA
# C++ Programming Guide, throughput of native arithmetic instructions: 64, 16 and 32 from 8.0 on).
SHARED_BYTES, STORE_BYTES = 128, 64
ALU_LANES, SPECIAL_LANES, SHUFFLE_LANES = 64, 16, 32
SCHEDULERS = 4
# What a row of threads of an accumulator's layout stores at once: 8 rows a warp, 32 bytes at least.
SECTORS, SECTOR = 8, 32


@dataclass(frozen=True)
class Shape:
    """A tile as it was compiled."""

    BM: int
    BV: int
    BK: int
    warps: int
    registers: int  # a thread
    shared: int  # bytes a block
    sides: int = 2  # student and teacher
    operand: int = 2  # bytes of an operand


def lanes(gpu: Gpu) -> int:
    return 64 if gpu.amd else 32


def pipes(counts: Counter[str], warps: int, gpu: Gpu) -> dict[str, float]:
    """Cycles that each pipe of a multiprocessor needs for what `warps` warps execute."""
    kinds = by_class(counts)
    threads = warps * lanes(gpu)
    found = {
        "special": kinds["transcendental"] * threads / SPECIAL_LANES,
        "shared": sum(
            n * max(threads * width(name), threads) / _bytes(name)
            for name, n in counts.items()
            if class_of(name) in ("shared", "local")
        ),
        "store": sum(
            n * warps * max(lanes(gpu) * width(name), SECTORS * SECTOR) / STORE_BYTES
            for name, n in counts.items()
            if class_of(name) == "store"
        ),
    }
    if gpu.amd:
        # A vector instruction of a wave takes four cycles of its 16 lanes (packed ones too); others
        # are issued beside them, of other waves.
        vector = ("fp32", "integer", "convert")
        dpp = sum(n for name, n in counts.items() if name.endswith("_dpp"))
        found["shared"] += (kinds["shuffle"] - dpp) * threads / SHUFFLE_LANES
        found["issue"] = (sum(kinds[k] for k in vector) + dpp) * warps / SCHEDULERS * 4
        return found
    found["shared"] += kinds["shuffle"] * threads / SHUFFLE_LANES
    found["issue"] = counts.total() * warps / SCHEDULERS
    multiply_add = sum(n for name, n in counts.items() if name.startswith(FMA))
    found["fma"] = multiply_add * threads / (gpu.fp32 / 2)
    others = kinds["fp32"] + kinds["integer"] + kinds["convert"]
    uniform = sum(n for name, n in counts.items() if name.startswith("U"))
    found["alu"] = max(others - multiply_add - uniform, 0) * threads / ALU_LANES
    return found


FMA = ("FADD", "FMUL", "FFMA", "IMAD")


def _bytes(name: str) -> int:
    """Bytes a cycle: each quarter of a multiprocessor reads tensor memory by itself."""
    return 4 * SHARED_BYTES if name.startswith(("LDTM", "STTM")) else SHARED_BYTES


def step_cycles(step: Counter[str], shape: Shape, gpu: Gpu) -> Range:
    """Cycles of a K-step, none of it waiting for what is beside it."""
    copied = (shape.sides * shape.BM + shape.BV) * shape.BK * shape.operand
    matrix = product_cycles(shape, gpu, shape.BK)
    # Operands that the matrix instructions read from shared memory themselves.
    read = 0
    for name, n in step.items():
        if name.startswith("HGMMA"):  # of each group of four warps: 64 rows and the columns named
            columns = int(name.split(".")[1].split("x")[1])
            read += n * (64 + columns) * 32 * shape.warps // 4
        elif name.startswith("UTC"):  # of the block
            read = shape.sides * (shape.BM + shape.BV) * shape.BK * shape.operand
    if by_class(step)["copy"]:  # past the registers, so no instruction counts what is written
        read += copied
    used = pipes(step, shape.warps, gpu)
    shared = used["shared"] + read / SHARED_BYTES
    best, worst = (
        max(matrix / library, shared, copied / l2, used["issue"])
        for library, l2 in zip(LIBRARY, gpu.l2, strict=True)
    )
    # Without matrix units it is the products that are issued.
    return best, worst + (used["issue"] if by_class(step)["matrix"] else 0)


def product_cycles(shape: Shape, gpu: Gpu, features: int) -> float:
    """Cycles of a tile's products at the peak."""
    rate = gpu.matrix if shape.operand == 2 else gpu.fp32
    return 2 * shape.sides * shape.BM * shape.BV * features / rate


def blocks(shape: Shape, gpu: Gpu) -> int:
    """Blocks that a multiprocessor holds at once."""
    registers = -(-max(shape.registers, 1) // 8) * 8
    if gpu.amd:
        by_registers = SCHEDULERS * (512 // registers) // shape.warps
    else:
        by_registers = 65536 // (registers * 32 * shape.warps)
    reserved = 0 if gpu.amd else KIB  # of each block, by the system
    limits = [by_registers, gpu.warps // shape.warps, gpu.shared // (shape.shared + reserved)]
    if gpu.arch == "sm_100" and shape.operand == 2:
        limits.append(512 // (shape.sides * shape.BV))  # columns of tensor memory
    return max(min(limits), 1)


def tile_cycles(parts: Parts, shape: Shape, gpu: Gpu, features: int) -> Range:
    """Cycles of a multiprocessor for one tile, over all features."""
    steps = -(-features // shape.BK)
    step = step_cycles(parts.step, shape, gpu)
    slowest = max(pipes(parts.tile, shape.warps, gpu).values())
    best, worst = (slowest * stall + fill for stall, fill in zip(STALL, FILL, strict=True))
    if blocks(shape, gpu) > 1:
        free = step[0] - pipes(parts.step, shape.warps, gpu)["issue"]
        best, worst = max(best - steps * free, 0), worst / 2
    return steps * step[0] + best, steps * step[1] + worst


def fraction(parts: Parts, shape: Shape, gpu: Gpu, features: int, evenness: float = 1.0) -> Range:
    """Of the rate of a library's product of the same size: least, most.

    Args:
        evenness: of the multiprocessors' time what the rounds of tiles fill (see `evenness`).
    """
    product = product_cycles(shape, gpu, features)
    tile = tile_cycles(parts, shape, gpu, features)
    ends = (product / f / t * evenness for f, t in zip(LIBRARY, tile, strict=True))
    # What is not bound by matrix units looks better beside the slower library.
    least, most = sorted(ends)
    return least, most


def evenness(tiles: float, programs: int, longest: int, gpu: Gpu) -> float:
    """Of the multiprocessors' time what tiles fill: `programs` of at most `longest` tiles each."""
    rounds = -(-programs // gpu.multiprocessors)
    return tiles / (gpu.multiprocessors * rounds * longest)


def rows_fraction(parts: Parts, warps: int, gpu: Gpu) -> Range:
    """Of a copy's bandwidth what `rows` reaches, least and most: its bytes bind it, or a pipe."""
    moved = sum(
        n * width(name) * warps * lanes(gpu)
        for name, n in parts.tile.items()
        if class_of(name) in ("load", "store")
    )
    by_bytes = moved * gpu.multiprocessors * gpu.clock / (gpu.memory * COPY)
    slowest = max(pipes(parts.tile, warps, gpu).values())
    most, least = (min(by_bytes / (slowest * stall), 1) for stall in STALL)
    return least, most
