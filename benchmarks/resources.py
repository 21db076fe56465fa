"""What every kernel of the tile table takes of a multiprocessor, by compiling it. No GPU is needed.

    python benchmarks/resources.py [--arch sm_90 ...] [--dtype bfloat16 ...] [--output FOLDER]

For each architecture: registers and spilled bytes a thread, shared memory, and which matrix
instructions the code uses. Kernels are compiled for a contiguous head that both sides share, with D
a multiple of every BK, as language models have it.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from opsd_kernels.kernels import finish, lse, pair, rows, tiles
from opsd_kernels.kernels.pointwise import family, is_wide, knows_G, mean_limit
from opsd_kernels.kernels.tiles import Row, Tile

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TRITON_DTYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}
POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for, as a user asks for it."""

    beta: float | Tensor | None
    clipped: bool = False
    statistics: bool = False  # those of sampled tokens among them


PER_TOKEN = torch.tensor([0.5])
CASES = {
    "JSD": Case(0.5),
    "JSD exchanged": Case(0.9),
    "forward KL": Case(0.0),
    "reverse KL": Case(1.0),
    "JSD, clip": Case(0.5, clipped=True),
    "JSD exchanged, clip": Case(0.9, clipped=True),
    "forward KL, clip": Case(0.0, clipped=True),
    "reverse KL, clip": Case(1.0, clipped=True),
    "JSD, statistics": Case(0.5, statistics=True),
    "forward KL, clip, statistics": Case(0.0, clipped=True, statistics=True),
    "any": Case(PER_TOKEN),
    "any, clip, statistics": Case(PER_TOKEN, clipped=True, statistics=True),
    "log p": Case(None, statistics=True),
}
# The kernels that do not look at entries one by one.
FEWER = {
    "lse": ("JSD", "forward KL", "JSD, statistics", "log p"),
    "merge": ("JSD", "any, clip, statistics"),
    "finish": ("JSD", "any, clip, statistics", "log p"),
}


@dataclass(frozen=True)
class Variant:
    """One kernel, compiled for one case."""

    arch: str
    dtype: str
    kernel: str
    divergence: str


@dataclass(frozen=True)
class Usage:
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    matrix: str  # matrix instructions, "-" if none


def variants(archs: list[str], dtypes: list[str]) -> Iterator[Variant]:
    """Everything the table may be asked for."""
    for arch in archs:
        for dtype in dtypes:
            for kernel in ("pair", "lse", "rows", "merge", "finish"):
                for case in FEWER.get(kernel, CASES):
                    yield Variant(arch, dtype, kernel, case)


def compile_variant(variant: Variant, row: Row | None = None, stored: str | None = None) -> Usage:
    """Compile one variant with the tiles of the table, or of another row; `stored` is the dtype of
    hidden states and head, where autocast rounds them on the way."""
    return _usage(compiled(variant, row, stored))


def compiled(variant: Variant, row: Row | None = None, stored: str | None = None) -> Any:
    """What Triton makes of a variant: see `compile_variant`."""
    row = row or tiles.TABLE[variant.arch, variant.dtype]
    kernel, constants, options = _specialized(variant, row)
    tile = _tile(variant, row)
    names = kernel.arg_names
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        signature[name] = "constexpr" if name in constants else _type(name, variant, stored, tile)
        divisible = signature[name].startswith("*") or name in DIVISIBLE
        if divisible and name not in constants:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()},
        attributes,
    )  # fmt: skip
    if stored is not None and "num_stages" in options:
        options["num_stages"] = 2  # as the launchers do
    return triton.compile(source, target=_target(variant.arch), options=options)


# Integers that a language model has as multiples of 16, which Triton specializes for.
DIVISIBLE = {
    "V", "D", "D_T", "span", "v_begin", "stride_tile", "stride_h_S", "stride_h_T", "stride_Wv",
    "stride_W_Tv", "stride_z", "stride_g",
}  # fmt: skip


def _type(name: str, variant: Variant, stored: str | None, tile: Tile | None) -> str:
    dtype = variant.dtype
    if name in ("index_ptr", "top_ptr", "targets_ptr"):
        return "*i32"
    if name == "beta" and CASES[variant.divergence].beta is PER_TOKEN:
        return "*fp32"
    if name == "keep_ptr":
        return "*i1"
    if name in ("h_S", "h_T", "W", "W_T", "W_ptr"):
        pointer = POINTERS[stored or dtype]
        if tile is None or not tile.BULK:
            return pointer
        return f"tensordesc<{pointer[1:]}[{tile.BM if name[0] == 'h' else tile.BV},{tile.BK}]>"
    if name in ("s_ptr", "p_ptr", "g_ptr"):
        return POINTERS["float32" if dtype == "float16" else dtype]
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name in ("beta", "entry_clip", "inverse_temperature") else "i32"


def _specialized(variant: Variant, row: Row) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """The kernel, its compile-time constants, and its options."""
    case = CASES[variant.divergence]
    limit = {"LIMIT": mean_limit(case.beta)}
    divergence = {"FAMILY": family(case.beta), "CLIPPED": case.clipped}
    wide = is_wide(case.beta, case.statistics)
    no_P = knows_G(case.beta, 1.0 if case.clipped else None)
    no_targets = {} if case.statistics else {"targets_ptr": None}
    no_statistics = {} if case.statistics else {"statistics_ptr": None}
    operand = {"OPERAND": TRITON_DTYPES[variant.dtype]}
    logits = {
        **operand, "keep_ptr": None, "stride_Wd": 1, "stride_W_Td": 1, "SHARED": True,
        "MASKED": False, "EVEN_D": True, "EVEN_V": True, "PRECISION": "ieee",
    }  # fmt: skip
    small = {"num_warps": 4}
    if variant.kernel == "lse":
        return (
            lse.lse_kernel,
            {
                **logits,
                **no_targets,
                **limit,
                **_shape(row.lse),
            },
            _options(row.lse),
        )
    if variant.kernel == "pair":
        statistics = case.statistics and case.beta is not None
        tile = _tile(variant, row)
        assert tile is not None
        constants = {**logits, **divergence, "STATISTICS": statistics, "SCALE": 1.0, **_shape(tile)}
        if no_P:
            constants["p_ptr"] = None
        if case.beta is None:
            constants |= {"h_T": None, "W_T": None}
        return pair.pair_kernel, constants, _options(tile)
    if variant.kernel == "rows":
        block, parts, num_warps = row.rows_wide if wide else row.rows
        constants = {
            **divergence, **no_targets, **no_statistics, "NEEDS_SCORE": True, **limit,
            "SCALE": 1.0, "FINITE": True, "BLOCK": block, "PARTS": parts,
        }  # fmt: skip
        return rows.rows_kernel, constants, {"num_warps": num_warps}
    if variant.kernel == "merge":
        constants = {
            **divergence,
            **limit,
            "SCALE": 1.0,
            "TARGETS": case.statistics,
            "BM": lse.MERGE_BM,
            "SPANS": triton.next_power_of_2(row.spans),
        }
        return lse.merge_kernel, constants, small
    slots = row.columns // row.pair.BV
    constants = {
        **divergence, **operand, **no_statistics, "keep_ptr": None, "stride_Wd": 1,
        "TARGETS": case.statistics, "MASKED": False, "BM": finish.BM, "BD": finish.BD,
        "SLOTS": slots,
    }  # fmt: skip
    if no_P:
        constants["P_ptr"] = None
    return finish.finish_kernel, constants, small


def _tile(variant: Variant, row: Row) -> Tile | None:
    """Of a kernel that makes logits."""
    case = CASES[variant.divergence]
    wide = is_wide(case.beta, case.statistics)
    return {"lse": row.lse, "pair": row.pair_wide if wide else row.pair}.get(variant.kernel)


def _shape(tile: Tile) -> dict[str, Any]:
    return {k: v for k, v in asdict(tile).items() if k.isupper()}


def _options(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _target(arch: str) -> GPUTarget:
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def _usage(compiled: Any) -> Usage:
    if "cubin" not in compiled.asm:
        code = compiled.asm["amdgcn"]

        def number(field: str) -> int:
            found = re.search(rf"\.{field}:\s+(\d+)", code)
            assert found, field
            return int(found[1])

        return Usage(
            number("vgpr_count"), 4 * number("vgpr_spill_count"), compiled.metadata.shared,
            "mfma" if "v_mfma" in code else "-",
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(compiled.asm["cubin"])
        command = [str(CUOBJDUMP), "--dump-resource-usage", path]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    instructions = ["wgmma", "tcgen05.mma", "mma.sync"]
    matrix = next((m for m in instructions if m in compiled.asm["ptx"]), "-")
    return Usage(int(found[1]), int(found[2]), compiled.metadata.shared, matrix)


def main() -> None:
    archs = list(dict.fromkeys(arch for arch, _ in tiles.TABLE))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=archs, default=archs)
    parser.add_argument("--dtype", nargs="+", choices=list(POINTERS), default=list(POINTERS))
    parser.add_argument("--output", type=Path, help="folder for resources.csv")
    args = parser.parse_args()
    found: list[tuple[Variant, Usage]] = []
    print(f"triton {triton.__version__}")
    print(f"{'arch':<8}{'dtype':<10}{'kernel':<8}{'divergence':<30}{'registers':>10}"
          f"{'spilled':>9}{'shared':>9}  matrix")  # fmt: skip
    for variant in variants(args.arch, args.dtype):
        usage = compile_variant(variant)
        found.append((variant, usage))
        print(f"{variant.arch:<8}{variant.dtype:<10}{variant.kernel:<8}{variant.divergence:<30}"
              f"{usage.registers:>10}{usage.spilled:>9}{usage.shared:>9}  {usage.matrix}",
              flush=True)  # fmt: skip
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        with (args.output / "resources.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([f.name for f in (*fields(Variant), *fields(Usage))])
            writer.writerows((*astuple(v), *astuple(u)) for v, u in found)
        print(summary(args.output / "resources.csv"))


def summary(path: Path) -> str:
    """The rows of a resources.csv that the README shows, as Markdown."""
    lines = ["| | kernel | registers | spilled bytes | shared KiB | matrix instructions |"]
    lines.append("|---|---|---|---|---|---|")
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            shown = row["kernel"] in ("lse", "pair") and row["divergence"] == "JSD"
            if shown and row["dtype"] == "bfloat16":
                cells = [row[k] for k in ("arch", "kernel", "registers", "spilled")]
                cells += [f"{int(row['shared']) / 1024:.0f}", row["matrix"]]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
