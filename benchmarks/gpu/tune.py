"""Measure candidate tiles on a GPU and print the best as rows of the tile table.

    python benchmarks/gpu/tune.py [--dtype bfloat16] [--features 4096] [--seconds 300]
        [--output FOLDER]

`lse` and `pair` are timed on one chunk of tokens, with β = 0.5 and with the clipped forward KL that
OPSD's authors train with, the tiles of the table first; what is printed is the fraction of the rate
of a library product of the same size in the same run. `rows` is compared with the bandwidth of a
copy. The last product of the row workspace is timed whole and in parts of the vocabulary, for as
many rows as a workspace of 160 to 1,280 MiB has. All candidates are compiled beforehand, in
parallel (see compile.py): one that takes long or spills much is not measured, and said. tune.json
is written anew after every measurement. Nothing is changed: put the printed row into
opsd_kernels/kernels/tiles.py, and run benchmarks/gpu/resources.py again.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu import launches
from benchmarks.gpu import run as gpu
from benchmarks.gpu.candidates import RIVALS, candidates
from benchmarks.gpu.compile import Compiled
from benchmarks.gpu.resources import Variant
from benchmarks.lib import report
from benchmarks.lib.hashes import settle_hashes
from opsd_kernels.kernels import lse, pair, tiles, top_row
from opsd_kernels.kernels.scratch import Scratch
from opsd_kernels.kernels.tiles import Row, Sweep
from opsd_kernels.problem import Outputs, Problem
from opsd_kernels.products import score_dtype
from opsd_kernels.schedules import logit_free, planning, row_workspace
from opsd_kernels.schedules.row_workspace import LogitGradient

VOCABULARY = 151936
DIVERGENCES = [(0.5, None), (0.0, 0.05)]
# Of the time: for compiling, and until then for each kernel.
SHARES = {"compile": 0.4, "lse": 0.6, "pair": 0.8, "rows": 1.0}
# Bytes a thread spills at most: a few hundred may be worth their bytes, thousands never.
MOST_SPILLED = 1024

Timer = Callable[[Callable[[], object]], float]


@dataclass
class Report:
    """What tune.json holds: of each kernel the candidates in the order they were tried."""

    device: str
    arch: str
    torch: str
    triton: str
    dtype: str
    features: int
    product_seconds: float
    lse: list[dict[str, Any]] = field(default_factory=list)
    pair: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    # Of the row workspace's last product: rows, whether it is split, and the fraction.
    split: list[dict[str, Any]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """All of it or nothing, whenever the process is ended."""
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / "tune.json.unfinished"
        unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n")
        os.replace(unfinished, folder / "tune.json")


class Skipped(Exception):
    """Why a candidate is not measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=300, help="for all of it")
    parser.add_argument("--output", type=Path, help="folder for tune.json")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--dry", action="store_true", help="launch once, time nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.dry:
        parser.error("needs a GPU: nothing else can say which tiles are fast")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, start = getattr(torch, args.dtype), time.monotonic()
    settle_hashes()
    row = tiles.lookup(device, dtype)
    arch = os.environ.get("OPSD_ARCH") or tiles.architecture(device)
    if args.dry:
        problem = chunk(row.chunk, args.features, dtype, device, torch.zeros, args.vocabulary)
        # In turns: however many there is time for, some are of each kernel.
        kernels = ("lse", "pair", "rows")
        for turn in itertools.zip_longest(*(asked_of(row, k, arch, args.dtype) for k in kernels)):
            for kernel, candidate in zip(kernels, turn, strict=True):
                if candidate is not None:
                    measure(kernel, candidate, row, problem, once)
        for split in (False, True):
            launch_end_of_last_product(problem, split)
        return
    with tempfile.TemporaryDirectory() as temporary:
        compiled = compile_first(args, Path(temporary), SHARES["compile"] * args.seconds)
    problem = chunk(row.chunk, args.features, dtype, device, torch.randn, args.vocabulary)
    found = Report(
        torch.cuda.get_device_name(),
        arch,
        torch.__version__,
        triton.__version__,
        args.dtype,
        args.features,
        seconds_of(lambda: problem.h_S @ problem.W.t()),
    )
    print(f"{found.device}, {found.arch}, torch {found.torch}, triton {found.triton}; ", end="")
    print(f"a product of this size takes {found.product_seconds * 1e3:.2f} ms")
    both_sides = 2 * found.product_seconds
    bounds = {"lse": both_sides, "pair": both_sides}
    bounds["rows"] = rows_bound(problem)
    with compiled_beforehand(compiled):
        for told in last_products(problem, found.product_seconds, seconds_of):
            found.split.append(told)
        for kernel, bound in bounds.items():
            until = start + SHARES[kernel] * args.seconds
            asked = asked_of(row, kernel, arch, args.dtype)
            for told in tried(kernel, asked, row, problem, bound, seconds_of, until):
                getattr(found, kernel).append(told)
                if args.output:
                    found.write(args.output)
    print("\n" + best(found))


def chunk(
    N: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    make: Callable[..., torch.Tensor],
    V: int = VOCABULARY,
) -> Problem:
    """A chunk of tokens; `make` is torch.randn, or torch.zeros where the numbers do not matter."""
    torch.manual_seed(0)
    h_S = make(N, D, device=device)
    h_T = h_S + 0.1 * make(N, D, device=device)
    W = make(V, D, device=device, dtype=dtype).div_(D**0.5)
    return Problem(h_S.to(dtype), h_T.to(dtype), W, None, dtype, 0.5)


def asked_of(row: Row, kernel: str, arch: str, dtype: str) -> Iterator[Any]:
    """Of a kernel, a `Tile`, of `rows` a `Sweep`: that of the table first, then its rivals,
    then others, the likest first (see candidates.py)."""
    start = getattr(row, kernel)
    yield start
    if kernel == "rows":
        yield from (sweep for sweep in sweeps() if sweep != start)
        return
    rivals = () if dtype == "float32" else RIVALS[arch][kernel]
    yield from rivals
    others = candidates(start, Variant(arch, dtype, kernel, "JSD"))
    others = (tile for tile in others if tile not in rivals)
    yield from itertools.islice(others, MOST_CANDIDATES)


def sweeps() -> Iterator[Sweep]:
    """Those with many entries under way first."""
    for warps, entries, parts in itertools.product((16, 8, 4), (4, 8), (2, 1, 4)):
        yield Sweep(32 * warps * entries, parts, warps)


# Of `lse` and `pair` beside the table's: what can be compiled and measured in a minute or two.
MOST_CANDIDATES = 20


def compile_first(args: argparse.Namespace, folder: Path, seconds: float) -> dict[str, Compiled]:
    """All candidates, in parallel, in the process of compile.py; by digest."""
    here = Path(__file__).resolve()
    command = [str(here.with_name("compile.py")), str(folder), "--seconds", f"{seconds:.0f}"]
    dry = [str(here), "--dry", "--dtype", args.dtype, "--features", str(args.features)]
    dry += ["--vocabulary", str(args.vocabulary)]
    subprocess.run([sys.executable, *command, "--script", *dry], env=gpu.environment(), check=False)
    path = folder / "compile.csv"
    rows = report.read(path, Compiled)[1] if path.exists() else []
    return {row.digest: row for row in rows}


@contextmanager
def compiled_beforehand(compiled: dict[str, Compiled]) -> Iterator[None]:
    """Within it a kernel is launched if it was compiled in time and spills little; otherwise
    `Skipped` says why not. Where nothing was compiled, nothing is checked."""
    if not compiled:
        print("nothing was compiled beforehand: each candidate is compiled in its turn")
        yield
        return

    def check(*, key: str, fn: Any, **_: Any) -> bool:
        known = compiled.get(launches.digest(fn.jit_function, key))
        if known is None:
            raise Skipped("not compiled in the time there was")
        if known.failure:
            raise Skipped(known.failure)
        if known.spilled > MOST_SPILLED:
            raise Skipped(f"spills {known.spilled} bytes a thread")
        return False

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", check):
        yield


def tried(
    kernel: str,
    asked: Iterable[Any],
    row: Row,
    problem: Problem,
    bound: float,
    timer: Timer,
    until: float,
) -> Iterator[dict[str, Any]]:
    """Of each candidate, as long as there is time: what it is, and the fraction of the bound in
    seconds that it reaches, or why it was not measured."""
    start = getattr(row, kernel)
    for candidate in asked:
        if time.monotonic() > until:
            return
        told = {"candidate": asdict(candidate), "of_table": candidate == start}
        try:
            told["fraction"] = bound / measure(kernel, candidate, row, problem, timer)
            print(f"  {kernel} {candidate}: {told['fraction']:.0%}", flush=True)
        except Exception as error:  # whatever it is, the next may do
            told["failure"] = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
            print(f"  {kernel} {candidate}: {told['failure']}", flush=True)
        yield told


def measure(kernel: str, candidate: Any, row: Row, problem: Problem, timer: Timer) -> float:
    """Seconds for one sweep over the vocabulary, the mean over the divergences; of `rows` for one
    pass over its rows."""
    changed: Row = replace(row, **{kernel: candidate})
    if kernel == "rows":
        return measure_rows(changed, problem, timer)
    times = []
    for beta, entry_clip in DIVERGENCES:
        case = replace(problem, beta=beta, entry_clip=entry_clip)
        with mock.patch.object(tiles, "lookup", return_value=changed):
            scratch = logit_free.allocate(case, needs_gradient=True, needs_statistics=False)
        lse.launch(scratch, case)

        def sweep(case: Problem = case, scratch: Scratch = scratch) -> None:
            if kernel == "lse":
                lse.launch(scratch, case)
                return
            arguments = pair.arguments(scratch, case)
            for v in range(0, len(problem.W), scratch.columns):
                pair.launch(arguments, v)

        times.append(timer(sweep))
    return statistics.mean(times)


ROWS = 256  # what a workspace of 320 MiB holds


def measure_rows(row: Row, problem: Problem, timer: Timer) -> float:
    z = torch.randn(2 * ROWS, len(problem.W), device=problem.W.device)
    loss = torch.empty(ROWS, device=z.device)
    problem = problem.tokens(slice(ROWS))

    def sweep() -> None:
        row_workspace.launch_rows(Outputs(loss), z[:ROWS], z[ROWS:], problem, True)

    with mock.patch.object(tiles, "lookup", return_value=row):
        return timer(sweep)


# What workspaces of 160, 320, 640 and 1,280 MiB hold.
LAST_PRODUCTS = (128, 256, 512, 1024)


def last_products(
    problem: Problem, product_seconds: float, timer: Timer
) -> Iterator[dict[str, Any]]:
    """Of the last product of the row workspace, whole and split, for several numbers of rows: the
    fraction of the rate of a library product of all rows of the problem, or why there is none."""
    for rows, split in itertools.product(LAST_PRODUCTS, (False, True)):
        told: dict[str, Any] = {"rows": rows, "split": split}
        try:
            seconds = measure_last_product(problem.tokens(slice(rows)), split, timer)
            told["fraction"] = product_seconds * rows / len(problem.h_S) / seconds
            print(f"  last product, {rows} rows, {split=}: {told['fraction']:.0%}", flush=True)
        except Exception as error:  # whatever it is, the next may do
            told["failure"] = f"{type(error).__name__}: {error}".partition("\n")[0][:120]
            print(f"  last product, {rows} rows, {split=}: {told['failure']}", flush=True)
        yield told


def measure_last_product(problem: Problem, split: bool, timer: Timer) -> float:
    dh_S, parts, gradient = _last_product(problem, split)
    return timer(lambda: gradient.onto_hidden_states(dh_S, problem, len(problem.W), parts))


def launch_end_of_last_product(problem: Problem, split: bool) -> None:
    """The kernel alone."""
    dh_S, parts, gradient = _last_product(problem.tokens(slice(1)), split)
    product = dh_S[None] if parts is None else parts
    assert gradient.top is not None
    assert gradient.g_top is not None
    top_row.launch(dh_S, product, gradient.top, gradient.g_top, gradient.scale, problem)


def _last_product(
    problem: Problem, split: bool
) -> tuple[torch.Tensor, torch.Tensor | None, LogitGradient]:
    """dh_S, scratch, and a gradient of logits that lies as `rows` writes it."""
    W, (R, D) = problem.W, problem.h_S.shape
    z = torch.randn(R, planning.row_stride(len(W)), device=W.device)
    g = z.view(_score_dtype(problem))[:, : len(W)].normal_()
    top = torch.zeros(R, dtype=torch.int32, device=W.device)
    dh_S = torch.empty(R, D, device=W.device)
    parts = dh_S.new_empty(planning.PARTS, R, D) if split else None
    return dh_S, parts, LogitGradient(g, top, z.new_ones(R))


def _score_dtype(problem: Problem) -> torch.dtype:
    return score_dtype(problem.operand_dtype, problem.has_bounded_scores)


def rows_bound(problem: Problem) -> float:
    """Seconds for the bytes of `rows` at the bandwidth of a copy."""
    z = torch.randn(2 * ROWS, len(problem.W), device=problem.W.device)
    copied = torch.empty_like(z)
    bandwidth = 2 * z.nbytes / seconds_of(lambda: copied.copy_(z))
    written = ROWS * len(problem.W) * _score_dtype(problem).itemsize
    return (3 * z.nbytes + written) / bandwidth  # read in three sweeps


def seconds_of(run: Callable[[], object]) -> float:
    """Median seconds of a call, by events on the GPU."""
    return triton.testing.do_bench(run, warmup=20, rep=100, return_mode="median") / 1e3


def once(run: Callable[[], object]) -> float:
    run()
    return 1.0


def best(found: Report) -> str:
    """The row of the table with the best of all that were tried."""
    lines = [f"    ({found.arch!r}, {found.dtype!r}): Row("]
    for kernel, bound in (("lse", "product's rate"), ("pair", "product's rate"),
                          ("rows", "copy's bandwidth")):  # fmt: skip
        measured = [t for t in getattr(found, kernel) if "fraction" in t]
        if measured:
            first = max(measured, key=lambda told: told["fraction"])
            values = tuple(first["candidate"].values())
            kind = "Sweep" if kernel == "rows" else "Tile"
            lines.append(
                f"        {kernel}={kind}{values},  # {first['fraction']:.0%} of a {bound}"
            )
    if found.split:
        lines.append(f"        split_rows={split_rows(found.split)},")
    return "\n".join([*lines, "    ),"])


def split_rows(told: list[dict[str, Any]]) -> int:
    """The most rows up to which the last product is faster split, of those measured."""
    fractions = {(t["rows"], t["split"]): t.get("fraction", 0) for t in told}
    most = 0
    for rows in sorted({rows for rows, _ in fractions}):
        if fractions[rows, True] <= fractions[rows, False]:
            break
        most = rows
    return most


if __name__ == "__main__":
    main()
