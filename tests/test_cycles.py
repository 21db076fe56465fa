"""Predicted cycles against those counted by hand."""

from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.cycles import (
    FILL,
    GPU_OF,
    GPUS,
    LIBRARY,
    STALL,
    Shape,
    blocks,
    evenness,
    fraction,
    pipes,
    product_cycles,
    rows_fraction,
    step_cycles,
    tile_cycles,
)
from benchmarks.sass import Parts

H200 = GPU_OF["sm_90"]
A100 = GPU_OF["sm_80"]
TILE = Shape(128, 128, 64, warps=8, registers=255, shared=144 * 1024)
# Of a thread of 256: the products of both sides, and the copies of three operands.
STEP = Counter({"HGMMA.64x128x16.F32.BF16": 8, "LDGSTS.E.BYPASS.128": 12, "IADD3": 80})


def test_peaks_are_those_of_the_data_sheets():
    peaks = {"A100": 312, "RTX 4090": 165, "H100": 989, "H200": 989, "B200": 2250, "MI300X": 1307}
    for gpu in GPUS:
        assert gpu.matrix_rate == pytest.approx(1e12 * peaks[gpu.name], rel=0.01)


def test_pipes():
    counts = Counter(
        {
            "FFMA": 100,
            "FSETP.GT.AND": 30,
            "UIADD3": 10,
            "MUFU.EX2": 20,
            "SHFL.BFLY": 8,
            "LDS.128": 4,
        }
    )
    found = pipes(counts, 8, H200)
    assert found["issue"] == 172 * 8 / 4
    assert found["fma"] == 100 * 256 / 128
    assert found["alu"] == 30 * 256 / 64
    assert found["special"] == 20 * 256 / 16
    assert found["shared"] == 8 * 256 / 32 + 4 * 16 * 256 / 128
    assert pipes(counts, 8, A100)["fma"] == 100 * 256 / 64


def test_narrow_stores_are_slow():
    """As many bytes; a store of two bytes a thread fills eight rows' sectors a bit each."""
    narrow, wide = (
        pipes(Counter({name: n}), 8, H200)["store"]
        for name, n in (("STG.E.U16", 128), ("STG.E.128", 16))
    )
    assert narrow == 128 * 8 * 8 * 32 / 64
    assert wide == 16 * 8 * 32 * 16 / 64


def test_amd_issues_a_wave_in_four_cycles():
    counts = Counter(
        {"v_fma_f32": 100, "s_add_i32": 50, "v_mov_b32_dpp": 8, "ds_swizzle_b32": 4, "s_waitcnt": 9}
    )
    found = pipes(counts, 8, GPU_OF["gfx942"])
    assert found["issue"] == (100 + 8) * 8 / 4 * 4
    assert found["shared"] == 4 * 8 * 64 / 32


def test_a_step_takes_as_long_as_its_slowest_part():
    assert product_cycles(TILE, H200, 64) == 1024
    issued = 100 * 8 / 4
    quick = replace(H200, l2=(1e9, 1e9))
    assert step_cycles(STEP, TILE, quick) == pytest.approx(
        (1024 / LIBRARY[0], 1024 / LIBRARY[1] + issued)
    )
    copied = (2 * 128 + 128) * 64 * 2
    assert step_cycles(STEP, TILE, replace(H200, l2=(8, 4))) == pytest.approx(
        (copied / 8, copied / 4 + issued)
    )
    # Shared memory: 96 bytes a cycle at the matrix units' peak are read, 48 written, of 128.
    doubled = Counter({**STEP, "HGMMA.64x128x16.F32.BF16": 16})
    expected = (2 * 96 + 48) * 1024 / 128
    assert step_cycles(doubled, TILE, quick)[0] == pytest.approx(expected)
    # A loop that issues as long as it multiplies.
    busy = Counter({**STEP, "IADD3": 980})
    assert step_cycles(busy, TILE, quick)[0] == pytest.approx(2000)


def test_products_without_matrix_units_are_what_is_issued():
    tile = Shape(64, 64, 16, warps=4, registers=128, shared=12 * 1024, operand=4)
    step = step_cycles(Counter({"FFMA": 1024, "IADD3": 26}), tile, H200)
    assert product_cycles(tile, H200, 16) == 1024
    assert step == pytest.approx((1024 / LIBRARY[0], 1024 / LIBRARY[1]))
    busy = Parts(Counter({"FFMA": 1024, "IADD3": 976}), Counter(), Counter())
    least, most = fraction(busy, tile, H200, 4096)
    assert least < most


def test_a_tile():
    parts = Parts(STEP, Counter({"FADD": 4000}), Counter())
    step = step_cycles(STEP, TILE, H200)
    expected = [64 * s + 4000 * 2 * w + f for s, w, f in zip(step, STALL, FILL, strict=True)]
    assert tile_cycles(parts, TILE, H200, 4096) == pytest.approx(expected)
    least, most = fraction(parts, TILE, H200, 4096)
    assert most == pytest.approx(64 * 1024 / LIBRARY[0] / expected[0])
    assert least == pytest.approx(64 * 1024 / LIBRARY[1] / expected[1])
    assert least < most < 1
    assert fraction(parts, TILE, H200, 4096, evenness=0.5) == pytest.approx((least / 2, most / 2))
    shorter = fraction(parts, TILE, H200, 2048)
    assert shorter[0] < least
    assert shorter[1] < most


def test_two_blocks_hide_what_is_beside_the_steps():
    small = replace(TILE, registers=128, shared=96 * 1024)
    assert blocks(small, H200) == 2
    parts = Parts(STEP, Counter({"FADD": 4000}), Counter())
    best, worst = tile_cycles(parts, small, H200, 4096)
    step = step_cycles(STEP, small, H200)
    assert best == 64 * step[0]
    assert worst == pytest.approx(64 * step[1] + (8000 * STALL[1] + FILL[1]) / 2)


@pytest.mark.parametrize(
    ("changes", "arch", "expected"),
    [
        ({}, "sm_90", 1),
        ({"registers": 128}, "sm_90", 1),  # of shared memory there is room for one
        ({"registers": 81, "shared": 0}, "sm_90", 2),  # 88 registers are taken
        ({"registers": 32, "shared": 0}, "sm_90", 8),  # of 64 warps
        ({"registers": 32, "shared": 0}, "sm_89", 6),  # of 48 warps
        ({"registers": 64, "shared": 32 * 1024}, "sm_100", 2),  # 512 columns of tensor memory
        ({"registers": 128, "shared": 32 * 1024}, "gfx942", 2),
        ({"registers": 256, "shared": 32 * 1024}, "gfx942", 1),
    ],
)
def test_blocks(changes, arch, expected):
    assert blocks(replace(TILE, **changes), GPU_OF[arch]) == expected


def test_evenness():
    assert evenness(132, 132, 1, H200) == 1
    assert evenness(133, 133, 1, H200) == 133 / 264
    assert evenness(8 * 1187, 8 * 132, 9, H200) == 8 * 1187 / (132 * 8 * 9)


def test_rows_are_bound_by_bytes_or_instructions():
    moves = Counter({"LDG.E.128": 24, "STG.E.128": 2})  # 26 bytes for each of 16 entries
    assert rows_fraction(Parts(Counter(), moves, Counter()), 8, H200) == (1, 1)
    heavy = moves + Counter({"FADD": 16 * 270 - 26})
    least, most = rows_fraction(Parts(Counter(), heavy, Counter()), 8, H200)
    # 6.0 ps for the bytes of an entry, 8.7 to issue 270 instructions.
    seconds = 26 / (4.8e12 * 0.9), 270 / 32 / 4 / (132 * 1.83e9)
    assert most == pytest.approx(seconds[0] / seconds[1] / STALL[0])
    assert least == pytest.approx(seconds[0] / seconds[1] / STALL[1])
