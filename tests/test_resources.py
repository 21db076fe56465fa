"""The tile table, compiled for every architecture without a GPU: what it takes of each, and what
must not be in the code. In a process of its own (see compiler.py)."""

import csv
import json

import pytest
from compiler import ROOT, outside_the_interpreter
from marks import slow

from benchmarks.gpu.candidates import SHARED
from opsd_kernels.kernels import tiles

RECORDED = ROOT / "benchmarks" / "results" / "resources.csv"
# Compiling all of the table takes 20 minutes; of the rest the recorded figures must hold. Here are
# variants that ptxas takes little time for,
QUICK = {
    ("bfloat16", "lse", "JSD"),
    ("bfloat16", "pair", "log p"),
    ("bfloat16", "rows", "JSD"),
    ("bfloat16", "finish", "JSD"),
    ("bfloat16", "top_row", "JSD"),
    ("float32", "pair", "JSD"),
}
# and the ones that matter most.
MORE = {
    ("bfloat16", "pair", "JSD"),
    ("bfloat16", "pair", "forward KL, clip"),
    ("bfloat16", "pair", "any, clip, statistics"),
    ("bfloat16", "lse", "log p, no teacher"),
    ("bfloat16", "rows", "log p, no teacher"),
    ("bfloat16", "gradient", "JSD"),
}
MULTIPLY = ("lse", "pair", "gradient")


def recorded() -> list[dict[str, str]]:
    with RECORDED.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("arch", "compiled"),
    [
        *((arch, QUICK) for arch in SHARED),
        ("sm_90", MORE),
        *(slow(arch, MORE) for arch in SHARED if arch != "sm_90"),
    ],
    ids=lambda x: x if isinstance(x, str) else "quick" if x is QUICK else "more",
)
def test_compiled_as_recorded(arch, compiled):
    rows = [
        row
        for row in recorded()
        if row["arch"] == arch and (row["dtype"], row["kernel"], row["divergence"]) in compiled
    ]
    assert len(rows) == len(compiled)
    variants = [[row[k] for k in ("arch", "dtype", "kernel", "divergence")] for row in rows]
    code = f"""
import json
from dataclasses import asdict
from benchmarks.gpu.resources import Variant, compile_variant
for arguments in {variants}:
    print(json.dumps(asdict(compile_variant(Variant(*arguments)))))
"""
    lines = outside_the_interpreter(code).splitlines()
    for row, line in zip(rows, lines, strict=True):
        usage = json.loads(line)
        assert usage["spilled"] <= int(row["spilled"]), row
        # What a tile costs beside its products, and each K-step; a few are the compiler's mood.
        for counted in ("instructions", "shuffles", "transcendentals", "step"):
            assert usage[counted] <= 1.02 * float(row[counted]), (counted, row)
        assert usage["store"] >= int(row["store"]), row
        assert usage["shared"] <= SHARED[arch], row
        assert usage["matrix"] == row["matrix"], row


@pytest.mark.parametrize(
    ("arch", "kernel"),
    [("sm_80", "lse"), ("sm_90", "lse"), ("sm_90", "pair"), slow("sm_80", "pair")],
)
def test_a_counted_step_makes_the_products_of_a_step(arch, kernel):
    """The instructions' shapes times their number: [BM × BK]·[BK × BV] of both sides."""
    code = f"""
from benchmarks.gpu import sass
from benchmarks.gpu.resources import Variant, compiled, tile_of
from opsd_kernels.kernels import tiles
variant = Variant("{arch}", "bfloat16", "{kernel}", "JSD")
step = sass.parts(sass.text_of(compiled(variant))).step
tile = tile_of(variant, tiles.TABLE["{arch}", "bfloat16"])
made = 0
for name, n in step.items():
    if name.startswith("HGMMA"):  # 64 × columns × 16, of each four warps
        made += n * 64 * int(name.split(".")[1].split("x")[1]) * 16 * tile.num_warps // 4
    elif name.startswith("HMMA.16816"):
        made += n * 16 * 8 * 16 * tile.num_warps
print(made, 2 * tile.BM * tile.BV * tile.BK)
"""
    made, asked = outside_the_interpreter(code).split()
    assert made == asked


def test_candidate_tiles():
    """What does not fit is not asked for; what is likest the table's tile comes first."""
    code = """
from dataclasses import astuple, replace
from benchmarks.gpu.candidates import candidates, fits
from benchmarks.gpu.resources import Variant, tile_of
from opsd_kernels.kernels import tiles
variant = Variant("sm_90", "bfloat16", "pair", "forward KL")
row = tiles.TABLE["sm_90", "bfloat16"]
start = tile_of(variant, row)
others = list(candidates(start, variant))
assert start not in others and len(set(others)) == len(others) > 20
assert not any(fits(replace(t, num_stages=99), variant) for t in others)
assert not any(fits(replace(t, BM=128, BV=256), variant) for t in others)
print(sum(a != b for a, b in zip(astuple(others[0]), astuple(start))))
"""
    assert outside_the_interpreter(code).split() == ["1"]


def test_nothing_in_the_table_spills_much_or_does_not_fit():
    """What the kernels that multiply spill is bytes moved beside those of the operands. Of
    `rows` on sm_90, with 64 registers for each thread of 16 warps, two words are nothing beside
    what it loads; the other kernels have no reason to."""
    rows = recorded()
    assert {(row["arch"], row["dtype"]) for row in rows} == set(tiles.TABLE)
    for row in rows:
        spilled = int(row["spilled"])
        if row["kernel"] in MULTIPLY:
            tile = tile_of(row)
            lanes = 64 if row["arch"] == "gfx942" else 32
            moved = 2 * spilled * tile.num_warps * lanes
            operands = (2 * tile.BM + tile.BV) * 4096 * (4 if row["dtype"] == "float32" else 2)
            assert moved <= operands / 3, row
        else:
            narrow = (row["arch"], row["kernel"]) == ("sm_90", "rows")
            assert spilled <= (8 if narrow else 0), row
        assert int(row["shared"]) <= SHARED[row["arch"]], row
        if row["kernel"] in MULTIPLY and row["dtype"] != "float32":
            assert row["matrix"] != "-", row


def tile_of(row: dict[str, str]) -> tiles.Tile:
    of_arch = tiles.TABLE[row["arch"], row["dtype"]]
    wide = row["divergence"].startswith("any") or "statistics" in row["divergence"]
    return getattr(of_arch, "lse" if row["kernel"] == "lse" else "pair_wide" if wide else "pair")


def test_the_benchmarks_page_shows_what_is_recorded():
    code = "from benchmarks.gpu import resources; from pathlib import Path\n"
    table = outside_the_interpreter(f"{code}print(resources.summary(Path({str(RECORDED)!r})))")
    assert table in (ROOT / "docs" / "benchmarks.md").read_text()


def test_no_atomics():
    """Sums have one order, whatever runs first: no kernel's code updates memory atomically."""
    code = """
import re
from benchmarks.gpu.resources import Variant, compiled
from benchmarks.gpu.resources import GATHERED
kernels = ("lse", "merge", "pair", "finish", "rows", "top_row", *GATHERED)
compiled = [compiled(Variant("sm_90", "bfloat16", kernel, "JSD")) for kernel in kernels]
atomics = [re.findall(r"\\b(?:atom|red)\\.", c.asm["ptx"]) for c in compiled]
print(len(compiled), sum(map(len, atomics)), sum("st.global" in c.asm["ptx"] for c in compiled))
"""
    assert outside_the_interpreter(code).split() == ["9", "0", "9"]


@pytest.mark.parametrize(
    ("arch", "kernel"),
    [
        *((arch, "lse") for arch in SHARED),
        *((arch, "pair") for arch in ("sm_89", "sm_90")),
        *(slow(arch, "pair") for arch in ("sm_80", "sm_100", "gfx942")),
    ],
)
def test_fits_under_autocast(arch, kernel):
    """Hidden states and head in fp32, rounded to bf16 on the way: they take twice the room."""
    code = f"""
from benchmarks.gpu.resources import Variant, compile_variant
print(compile_variant(Variant("{arch}", "bfloat16", "{kernel}", "JSD"), stored="float32").shared)
"""
    assert int(outside_the_interpreter(code)) <= SHARED[arch]


@pytest.mark.parametrize("divergence", ["JSD", "reverse KL", "forward KL, clip"])
def test_rows_keeps_its_blocks_in_registers(divergence):
    """What passes through shared memory is a row's sums at the end, not its logits."""
    code = f"""
from benchmarks.gpu.resources import Variant, compiled
kernel = compiled(Variant("sm_90", "float32", "rows", "{divergence}"))
print(kernel.metadata.shared, kernel.asm["ptx"].count("ld.global.v4"))
"""
    shared, loads = map(int, outside_the_interpreter(code).split())
    assert loads > 10
    assert shared <= 256


@pytest.mark.parametrize("divergence", ["JSD", "forward KL, clip"])
def test_equal_logits_stay_equal(divergence):
    """In `rows`: logits are subtracted from one another before anything is multiplied, so no fused
    multiply-add can make something of the difference of equal ones."""
    code = f"""
import re
from benchmarks.gpu.resources import Variant, compiled
ptx = compiled(Variant("sm_90", "float32", "rows", "{divergence}")).asm["ptx"]
lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
logits = set()
for line in lines:  # loaded, moved, and selected where the row ends
    name, _, operands = line.partition("\t")
    registers = re.findall(r"%r\\d+", line)
    if "ld.global" in line:
        logits.update(re.findall(r"%r\\d+", line[: line.index("[")]))
    elif re.match(r"(mov|selp)\\.", line) and logits.intersection(registers[1:]):
        logits.add(registers[0])
def uses(*operations):
    found = [re.match(r"([a-z0-9_.]+)\\s+(.*);", line) for line in lines]
    return sum(
        m[1].startswith(operations) and bool(logits.intersection(re.findall(r"%r\\d+", m[2])[1:]))
        for m in found if m
    )
print(len(logits), uses("sub."), uses("mul.", "fma.", "mad."))
"""
    logits, subtracted, multiplied = map(int, outside_the_interpreter(code).split())
    assert logits > 10
    assert subtracted > 10
    assert multiplied == 0


def test_tiles_divide():
    """What the launchers take for granted of a row."""
    for row in [*tiles.TABLE.values(), tiles.INTERPRETER]:
        assert row.chunk % row.lse.BM == row.chunk % row.pair.BM == 0
        assert row.columns % row.pair.BV == 0
        assert row.rows.BLOCK & (row.rows.BLOCK - 1) == 0  # of tl.arange
