"""How `pair` shares out the vocabulary: launches, and the waves in which their programs run,
counted from the grids that are launched, on tensors without contents."""

from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from benchmarks.lib.allocations import fake_device
from opsd_kernels.debug import tensors_of
from opsd_kernels.kernels import cdiv, pair, tiles
from opsd_kernels.kernels.scratch import SCRATCH_MIB
from opsd_kernels.problem import Problem
from opsd_kernels.schedules import head_gradient, logit_free
from opsd_kernels.schedules.head_gradient import HeadGradients

QWEN3, LLAMA3, GEMMA3 = 151936, 128256, 262144


def problem(V: int, dtype: torch.dtype = torch.bfloat16, D: int = 4096, N: int = 1024) -> Problem:
    h = torch.empty(N, D, dtype=dtype, device="meta")
    return Problem(h, h, torch.empty(V, D, dtype=dtype, device="meta"), None, dtype, 0.5)


class Grids:
    """A kernel that is launched and does nothing."""

    def __init__(self) -> None:
        self.programs: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> "Grids":
        self.programs.append(grid[0] * grid[1])
        return self

    def __call__(self, **arguments: object) -> None:
        pass


def counted(V: int, row: tiles.Row) -> tuple[int, int, int]:
    """Columns of a launch; launches and waves of a chunk."""
    grids = Grids()
    with (
        mock.patch.object(tiles, "lookup", return_value=row),
        mock.patch.object(pair, "pair_kernel", grids),
    ):
        given = problem(V)
        scratch = logit_free.allocate(given, needs_gradient=True, needs_statistics=False)
        arguments = pair.arguments(scratch, given)
        for v in range(0, V, scratch.columns):
            pair.launch(arguments, v)
    waves = sum(cdiv(programs, row.multiprocessors) for programs in grids.programs)
    return scratch.columns, len(grids.programs), waves


@pytest.mark.parametrize(
    ("arch", "multiprocessors", "V", "expected", "with_8192"),
    # 8,192 columns were the number before, for any GPU: launches and waves with it.
    [
        ("sm_90", 132, QWEN3, (8448, 18, 72), (19, 75)),  # H200; of 71.9 waves of work
        ("sm_90", 132, LLAMA3, (8448, 16, 61), (16, 63)),
        ("sm_90", 132, GEMMA3, (8448, 32, 125), (32, 128)),
        ("sm_90", 114, QWEN3, (9088, 17, 84), (19, 93)),  # H100 PCIe
        ("sm_90", 78, QWEN3, (8704, 18, 123), (19, 130)),  # H20
        ("sm_100", 148, QWEN3, (9472, 17, 33), (19, 37)),  # B200
        ("sm_80", 108, QWEN3, (8576, 18, 178), (19, 186)),  # A100
        ("sm_89", 142, QWEN3, (9088, 17, 67), (19, 74)),  # L40S
        ("sm_89", 128, QWEN3, (8192, 19, 75), (19, 75)),  # RTX 4090
        ("sm_89", 170, QWEN3, (8064, 19, 57), (19, 74)),  # RTX 5090
    ],
)
def test_launches_and_waves(arch, multiprocessors, V, expected, with_8192):
    row = replace(tiles.TABLE[arch, "bfloat16"], multiprocessors=multiprocessors)
    assert counted(V, row) == expected
    with mock.patch.object(tiles, "slots", return_value=8192 // row.pair.BV):
        assert counted(V, row)[1:] == with_8192


def test_the_short_last_launch_counts():
    """Launches of 32 tiles fill two whole waves, of 40 two and a half. But of 65 tiles the former
    leave one to a launch of its own."""
    row = replace(tiles.TABLE["sm_90", "bfloat16"], multiprocessors=128)
    for V, slots in ((64, 32), (65, 40)):
        assert tiles.slots(128 * V, row.pair, row, row.chunk, 128 * 40) == slots


@pytest.mark.parametrize("multiprocessors", [132, 114])
def test_a_device_is_asked_for_its_multiprocessors(multiprocessors):
    with (
        fake_device("cuda"),
        mock.patch(
            "torch.cuda.get_device_properties",
            return_value=SimpleNamespace(multi_processor_count=multiprocessors),
        ),
    ):
        row = tiles.lookup(torch.device("cuda"), torch.bfloat16)
    assert row == replace(tiles.TABLE["sm_90", "bfloat16"], multiprocessors=multiprocessors)


@pytest.mark.parametrize(("arch", "dtype"), tiles.TABLE)
def test_scratch_is_bounded_whatever_the_size_of_a_gpu(arch, dtype):
    """There is room for 64 copied rows of the head. And columns are whole tiles, as many for few
    tokens as for many."""
    copied = 2 * 2**20
    for multiprocessors in (20, 58, 78, 113, 114, 142, 160, 170, 228, 304):
        row = replace(tiles.TABLE[arch, dtype], multiprocessors=multiprocessors)
        for D in (1024, 4096, 8192):
            widths = set()
            for N in (5, 5000):
                given = replace(
                    problem(GEMMA3, getattr(torch, dtype), D, N),
                    entry_clip=0.05,
                    targets=torch.empty(N, dtype=torch.int32, device="meta"),
                )
                with mock.patch.object(tiles, "lookup", return_value=row):
                    scratch = logit_free.allocate(given, True, needs_statistics=True)
                room = SCRATCH_MIB * 2**20 * max(1, D / 4096)
                assert sum(t.nbytes for t in tensors_of(scratch).values()) <= room - copied
                widths.add(scratch.columns)
            assert len(widths) == 1
            assert widths.pop() % row.pair_wide.BV == 0


def test_waves_of_the_gradient_of_a_head():
    """Its chunks have four times the rows and a quarter of the columns."""
    given = problem(QWEN3, N=4096)
    gradients = HeadGradients(None, given.W, None)
    for multiprocessors, columns in ((132, 2048), (114, 1792)):
        row = replace(tiles.TABLE["sm_90", "bfloat16"], multiprocessors=multiprocessors)
        with mock.patch.object(tiles, "lookup", return_value=row):
            g = head_gradient.allocate(given, gradients, 0)[0]
        assert g.shape == (4096, columns)
