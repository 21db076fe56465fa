"""What every kernel of the tile table takes of a multiprocessor, by compiling it. No GPU is needed.

    python benchmarks/gpu/resources.py [--arch sm_90 ...] [--dtype bfloat16 ...] [--jobs 2]
                                   [--output FOLDER]

For each architecture: registers and spilled bytes a thread, shared memory, which matrix
instructions the code uses, and how many others it executes for an entry (see sass.py). Kernels are
compiled for a contiguous head that both sides share, with D a multiple of every BK, as language
models have it. What Triton's cache holds is counted again, not compiled again.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu import launches, sass
from benchmarks.lib import report
from opsd_kernels import divergence
from opsd_kernels.kernels import excluded, finish, gathered, gradient, lse, pair, tiles, top_row
from opsd_kernels.kernels.tiles import Row, Tile
from opsd_kernels.problem import STATS, Outputs, Problem
from opsd_kernels.products import score_scale
from opsd_kernels.schedules import head_gradient, logit_free, row_workspace
from opsd_kernels.schedules.head_gradient import HeadGradients

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for, as a user asks for it."""

    beta: float | Tensor | None
    clipped: bool = False
    statistics: bool = False  # those of sampled tokens among them
    head: bool = False  # with a bias, a softcap, and for the teacher a scale
    teacher: bool = True
    weights: bool = False  # two for each token, of both halves
    policy: bool = False  # a policy term
    entropy: bool = False
    excluded: int = 0  # entries; the value is the log-sum-exp of all others

    def problem(self, R: int, empty: Callable[..., Tensor]) -> dict[str, Any]:
        """The fields of a `Problem` that say so, for R tokens."""
        alone = self.entropy or self.excluded > 0
        sampled = self.statistics or self.policy or (self.beta is None and not self.weights)
        ids = empty(R, self.excluded, dtype=torch.int32) if self.excluded else None
        return {
            "beta": empty(R) if self.beta is PER_TOKEN else self.beta,
            "entry_clip": 1.0 if self.clipped else None,
            "targets": empty(R, dtype=torch.int32) if sampled and not alone else None,
            "w_q": empty(R) if self.weights else None,
            "w_p": empty(R) if self.weights else None,
            "advantages": empty(R) if self.policy else None,
            "excluded": ids,
        }


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
    "log p, no teacher": Case(None, teacher=False),
    "JSD, bias, softcap, scale": Case(0.5, head=True),
    "both KLs": Case(None, weights=True),
    "both KLs, clip, statistics": Case(None, weights=True, clipped=True, statistics=True),
    "skewed KLs": Case(0.1, weights=True),
    "skewed KLs exchanged": Case(0.9, weights=True),
    "JSD, policy term": Case(0.5, policy=True),
    "both KLs, policy term": Case(None, weights=True, policy=True),
    "entropy": Case(None, teacher=False, entropy=True),
    "outside 64 entries": Case(None, teacher=False, excluded=64),
}
# The kernels that gather rows of W: they do not depend on the case.
GATHERED = ("products_at", "add_rows", "gradient_of_rows")
# Those that mark excluded entries and write what is given of them: neither do they.
EXCLUDED = ("mark", "put")
# The kernels that do not look at entries one by one.
FEWER = {
    "lse": (
        "JSD",
        "forward KL",
        "JSD, statistics",
        "log p",
        "log p, no teacher",
        "JSD, bias, softcap, scale",
        "both KLs, policy term",
        "entropy",
        "outside 64 entries",
    ),
    "merge": ("JSD", "any, clip, statistics", "both KLs, policy term"),
    "shard": ("JSD", "any, clip, statistics"),
    "finish": ("JSD", "any, clip, statistics", "log p", "both KLs, policy term"),
    "top_row": ("JSD",),
    **dict.fromkeys((*GATHERED, *EXCLUDED), ("JSD",)),
    "gradient": (
        "JSD",
        "forward KL, clip",
        "any",
        "log p",
        "JSD, bias, softcap, scale",
        "both KLs, policy term",
        "entropy",
        "outside 64 entries",
    ),
}
KERNELS = (
    *("pair", "lse", "rows", "merge", "shard", "finish", "gradient", "top_row"),
    *GATHERED,
    *EXCLUDED,
)
# Those that multiply hidden states by the head.
MULTIPLY = ("lse", "pair", "gradient")


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
    # Of a thread in each K-step …
    step: int = 0  # instructions
    # … and of all threads for each entry (pair of logits) beside the K-steps; of `rows` for all
    # sweeps. Not counted for the kernels that do not look at entries.
    instructions: float = 0
    shuffles: float = 0
    transcendentals: float = 0
    store: int = 0  # bytes of a thread's stores of scores; 0 if there are none, or bulk copies


VOCABULARY = 151936


def variants(archs: list[str], dtypes: list[str]) -> Iterator[Variant]:
    """Everything the table may be asked for."""
    for arch in archs:
        for dtype in dtypes:
            for kernel in KERNELS:
                for case in FEWER.get(kernel, CASES):
                    yield Variant(arch, dtype, kernel, case)


def compile_variant(variant: Variant, row: Row | None = None, stored: str | None = None) -> Usage:
    """Compile one variant with the tiles of the table, or of another row; `stored` is the dtype of
    hidden states and head, where autocast rounds them on the way."""
    row = row or tiles.TABLE[variant.arch, variant.dtype]
    return _usage(compiled(variant, row, stored), variant, row)


def compiled(variant: Variant, row: Row | None = None, stored: str | None = None) -> Any:
    """What Triton makes of a variant: see `compile_variant`. The launchers themselves ask for it,
    so that it is specialized as on a GPU, with tensors that have no contents."""
    row = row or tiles.TABLE[variant.arch, variant.dtype]
    run, found = JITFunction.run, []

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self.__name__ == f"{variant.kernel}_kernel":
            found.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with (
        launches.without_driver(variant.arch),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(tiles, "lookup", return_value=row),
    ):
        _launch(variant, row, getattr(torch, stored or variant.dtype))
    (kernel,) = found
    return kernel


def _launch(variant: Variant, row: Row, stored: torch.dtype) -> None:
    """A variant's kernel, for a chunk of tokens of a language model: one head for both sides, whose
    sizes are multiples of all that a kernel is specialized for."""
    case = CASES[variant.divergence]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    R, D, V = row.chunk, 4096, VOCABULARY
    problem = Problem(
        empty(R, D, dtype=stored),
        empty(R, D, dtype=stored),
        empty(V, D, dtype=stored),
        None,
        getattr(torch, variant.dtype),
        **case.problem(R, empty),
    )
    if not case.teacher:
        problem = problem.without_teacher()
    if case.head:
        bias = empty(V, dtype=problem.operand_dtype)
        problem = replace(
            problem, bias=bias, bias_T=bias, softcap=30.0, softcap_T=30.0, scale_T=0.5
        )
    statistics = empty(divergence.STATISTICS, R) if case.statistics else None
    outputs = Outputs(empty(R), statistics, empty(R, D))
    if variant.kernel == "rows":
        z_S, z_T = empty(R, V), empty(R, V) if case.teacher else None
        row_workspace.launch_rows(outputs, z_S, z_T, problem, needs_score=True)
        return
    if variant.kernel == "top_row":
        dh_S, top = empty(R, D), empty(R, dtype=torch.int32)
        scale = score_scale(stored)
        top_row.launch(dh_S, dh_S[None], top, empty(R), scale, problem)
        return
    if variant.kernel in GATHERED:
        launch_gathered(variant.kernel, problem, empty)
        return
    if variant.kernel in EXCLUDED:
        launch_excluded(variant.kernel, problem, empty)
        return
    scratch = logit_free.allocate(problem, True, case.statistics)
    if variant.kernel in ("lse", "merge"):
        lse.launch(scratch, problem)
    elif variant.kernel == "shard":
        lse.launch_shard(scratch, problem)
    elif variant.kernel == "pair":
        pair.launch(pair.arguments(scratch, problem), 0)
    elif variant.kernel == "gradient":
        launch_gradient(problem)
    else:
        finish.launch(outputs, scratch, problem)


def launch_gradient(problem: Problem) -> None:
    """The kernel of a head that is trained, on tensors without contents."""
    h_S, (V, D) = problem.h_S, problem.W.shape
    problem = replace(
        problem,
        weights=h_S.new_empty(len(h_S), dtype=torch.float32),
        stats=h_S.new_empty(STATS, len(h_S), dtype=torch.float32),
        top=h_S.new_empty(len(h_S), dtype=torch.int32),
    )
    if problem.excluded is not None:
        given = h_S.new_empty(problem.excluded.shape, dtype=torch.float32)
        problem = replace(problem, g_excluded=given)
    gradients = HeadGradients(None, problem.W.new_empty(V, D), None)
    tiles_of_g, _, bits = head_gradient.allocate(problem, gradients, 0)
    gradient.launch(tiles_of_g, problem, 0, bits)


def launch_gathered(kernel: str, problem: Problem, empty: Callable[..., Tensor]) -> None:
    """A kernel of gathered rows, 64 for each token."""
    h, W, dtype = problem.h_S, problem.W, problem.operand_dtype
    N, K = len(h), 64
    ids, c = empty(N, K, dtype=torch.int32), empty(N, K)
    if kernel == "products_at":
        gathered.products_at(c, h, W, ids, dtype)
    elif kernel == "add_rows":
        gathered.add_rows_(empty(*h.shape), c, W, ids, dtype)
    else:
        pairs = empty(N * K, dtype=torch.int64)
        dW, db = empty(*W.shape), empty(len(W))
        gathered.gradient_of_rows_(dW, db, c, h, ids.flatten(), pairs, dtype)


def launch_excluded(kernel: str, problem: Problem, empty: Callable[..., Tensor]) -> None:
    """A kernel of excluded entries, 64 for each token."""
    R, K, columns = len(problem.h_S), 64, 2304
    ids = empty(R, K, dtype=torch.int32)
    if kernel == "mark":
        excluded.mark(empty(R, excluded.words(VOCABULARY), dtype=torch.int32), ids, 0)
    else:
        g = empty(R, columns, dtype=problem.operand_dtype)
        excluded.put(g, empty(R, K), ids, 0, score_scale(g.dtype))


def _some_problem(divergence: str) -> Problem:
    """A problem of the case, small."""
    one = torch.empty(1, 1)
    return Problem(one, one, one, None, one.dtype, **CASES[divergence].problem(1, torch.empty))


def _usage(compiled: Any, variant: Variant, row: Row) -> Usage:
    registers, spilled, matrix = registers_of(compiled)
    shared = compiled.metadata.shared
    if variant.kernel in ("merge", "shard", "finish", "top_row", *GATHERED, *EXCLUDED):
        return Usage(registers, spilled, shared, matrix)
    multiplies = variant.kernel in MULTIPLY
    parts = sass.parts(sass.text_of(compiled), multiplies)
    if multiplies:
        tile = tile_of(variant, row)
        entries = tile.BM * tile.BV
    else:
        entries = (row.rows_wide if wide(variant) else row.rows).BLOCK
    kinds = sass.by_class(parts.tile)
    lanes = 64 if variant.arch.startswith("gfx") else 32
    share = compiled.metadata.num_warps * lanes / entries
    stores = {n: c for n, c in parts.tile.items() if sass.class_of(n) == "store"}
    commonest = max(stores, key=lambda name: stores[name], default=None)
    return Usage(
        registers,
        spilled,
        shared,
        matrix,
        parts.step.total(),
        round(parts.tile.total() * share, 2),
        round(kinds["shuffle"] * share, 2),
        round(kinds["transcendental"] * share, 2),
        sass.width(commonest) if commonest else 0,
    )


def tile_of(variant: Variant, row: Row) -> Tile:
    """The tile of a kernel that multiplies, as the launchers choose it."""
    if variant.kernel == "lse":
        return row.lse
    return row.pair_wide if wide(variant) else row.pair


def wide(variant: Variant) -> bool:
    """Whether a variant takes what the table has for more than f and s of an entry."""
    case = CASES[variant.divergence]
    return _some_problem(variant.divergence).member.is_wide(case.statistics)


def registers_of(compiled: Any) -> tuple[int, int, str]:
    """Registers and spilled bytes a thread, and the matrix instructions."""
    if "cubin" not in compiled.asm:
        code = compiled.asm["amdgcn"]

        def number(field: str) -> int:
            found = re.search(rf"\.{field}:\s+(\d+)", code)
            assert found, field
            return int(found[1])

        matrix = "mfma" if "v_mfma" in code else "-"
        return number("vgpr_count"), 4 * number("vgpr_spill_count"), matrix
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(compiled.asm["cubin"])
        command = [str(CUOBJDUMP), "--dump-resource-usage", path]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found, printed
    instructions = ["wgmma", "tcgen05.mma", "mma.sync"]
    matrix = next((m for m in instructions if m in compiled.asm["ptx"]), "-")
    return int(found[1]), int(found[2]), matrix


def main() -> None:
    archs = list(dict.fromkeys(arch for arch, _ in tiles.TABLE))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=archs, default=archs)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--jobs", type=int, default=1, help="kernels compiled at a time")
    parser.add_argument("--output", type=Path, help="folder for resources.csv")
    args = parser.parse_args()
    found: list[tuple[Variant, Usage]] = []
    print(f"triton {triton.__version__}")
    print(f"{'arch':<8}{'dtype':<10}{'kernel':<8}{'divergence':<30}{'registers':>10}"
          f"{'spilled':>9}{'shared':>9}{'an entry':>10}  matrix")  # fmt: skip
    asked = list(variants(args.arch, args.dtype))
    with ProcessPoolExecutor(args.jobs) as pool:
        for variant, usage in zip(asked, pool.map(compile_variant, asked), strict=True):
            found.append((variant, usage))
            print(f"{variant.arch:<8}{variant.dtype:<10}{variant.kernel:<8}"
                  f"{variant.divergence:<30}{usage.registers:>10}{usage.spilled:>9}"
                  f"{usage.shared:>9}{usage.instructions:>10}  {usage.matrix}",
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
    head = [
        "", "kernel", "registers", "spilled bytes", "shared KiB", "instructions an entry",
        "shuffles an entry", "bytes a store",
    ]  # fmt: skip
    body = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            shown = row["kernel"] in ("lse", "pair") and row["divergence"] == "JSD"
            if shown and row["dtype"] == "bfloat16":
                cells = [row[k] for k in ("arch", "kernel", "registers", "spilled")]
                cells.append(f"{int(row['shared']) / 1024:.0f}")
                cells += [f"{float(row[k]):.1f}" for k in ("instructions", "shuffles")]
                cells.append(row["store"] if row["store"] != "0" else "–")
                body.append(cells)
    return report.table(head, body)


if __name__ == "__main__":
    main()
