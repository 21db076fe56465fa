"""What the logit-free schedule promises besides numbers: no vocabulary-sized tensor, bounded
scratch, counted work, invariance, no waiting for the host."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from accuracy import noise
from inputs import language_like_inputs, random_inputs
from schedules import DEVICE, LOGIT_FREE, ROW_WORKSPACE
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.allocations import Allocations
from benchmarks.lib.measure import counted_dots
from opsd_kernels import fused_jsd_loss, fused_sampled_token_loss, token_divergence
from opsd_kernels.debug import tensors_of
from opsd_kernels.kernels import finish, lse, pair, tiles
from opsd_kernels.kernels.logits_tile import INTERPRETED
from opsd_kernels.kernels.scratch import SCRATCH_MIB
from opsd_kernels.problem import Problem
from opsd_kernels.schedules import logit_free, row_workspace
from opsd_kernels.schedules.planning import make_plan

MIB = 2**20
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
DIVERGENCES = [(0.5, None), (0.9, None), (0.0, None), (1.0, None), (0.5, 0.05), (0.0, 0.05)]


def inputs(N, V, D, dtype=torch.float32, **options):
    return [t.to(DEVICE) for t in random_inputs(N, V, D, dtype, **options)]


@contextmanager
def tiles_of(row: tiles.Row) -> Iterator[None]:
    with mock.patch.object(tiles, "lookup", return_value=row):
        yield


@pytest.fixture
def interpreters_tiles() -> Iterator[None]:
    """Whatever tiles the other tests run with: those that counts are made for."""
    with tiles_of(tiles.INTERPRETER):
        yield


@interpreted
@pytest.mark.usefixtures("interpreters_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("beta", "entry_clip"), DIVERGENCES)
def test_no_tensor_has_a_vocabulary_sized_dimension(beta, entry_clip, dtype):
    N, V, D = 40, 1101, 24
    h_S, h_T, W = inputs(N, V, D, dtype)
    h_S.requires_grad_()
    with Allocations() as allocations:
        fused_jsd_loss(h_S, h_T, W, beta=beta, entry_clip=entry_clip, workspace_mib=0).backward()
    assert len(allocations.shapes) > 10
    largest = max(max(shape, default=0) for shape in allocations.shapes)
    assert largest <= tiles.INTERPRETER.columns < V


@interpreted
@pytest.mark.usefixtures("interpreters_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nor_with_statistics_a_beta_of_each_token_or_sampled_tokens(dtype):
    N, V, D = 40, 1101, 24
    h_S, h_T, W = inputs(N, V, D, dtype)
    h_S.requires_grad_()
    targets = torch.arange(N, device=DEVICE)
    betas = torch.linspace(0, 1, N, device=DEVICE)
    with Allocations() as allocations:
        told = token_divergence(
            h_S, h_T, W, beta=betas, entry_clip=0.01, targets=targets, workspace_mib=0
        )
        told.loss.sum().backward()
        fused_sampled_token_loss(h_S, h_T, W, targets, workspace_mib=0).backward()
    assert len(allocations.shapes) > 20
    largest = max(max(shape, default=0) for shape in allocations.shapes)
    assert largest <= tiles.INTERPRETER.columns < V


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scratch_is_bounded(dtype):
    """With the tiles of a GPU, at D = 4096: at most 64 MiB beside dh_S and the returned gradient,
    of which nothing grows with N or V."""

    def nothing(*_: object, **options: object) -> None:
        """In place of a product: the numbers do not matter here, and are what takes the time."""

    N, D = 1040, 4096
    row = tiles.TABLE["sm_90", str(dtype).removeprefix("torch.")]
    peaks = []
    for V in (9000, 18000):
        h_S, h_T, W = inputs(1, V, D, dtype)
        h_S, h_T = h_S.expand(N, D).contiguous().requires_grad_(), h_T.expand(N, D).contiguous()
        with (
            tiles_of(row),
            mock.patch.object(lse, "launch"),
            mock.patch.object(pair, "launch"),
            mock.patch.object(finish, "launch"),
            mock.patch.object(torch, "addmm", new=nothing),
            Allocations() as allocations,
        ):
            fused_jsd_loss(h_S, h_T, W, workspace_mib=0)
        peaks.append(allocations.peak)
    dh_S = 4 * N * D
    vectors = 16 * N
    assert peaks[1] <= peaks[0] + 2 * MIB  # one more or less of `lse`'s spans a few vectors
    assert 32 * MIB < max(peaks) - dh_S <= 64 * MIB + vectors


@pytest.mark.parametrize(("arch", "dtype"), tiles.TABLE)
@pytest.mark.parametrize("D", [1024, 2560, 4096, 5120, 8192])
def test_scratch_of_the_table(arch, dtype, D):
    """The same by sizes alone for the whole table: 64 MiB, in proportion to D above 4096."""
    h_S = torch.empty(2**17, D, dtype=getattr(torch, dtype), device="meta")
    W = torch.empty(262144, D, dtype=h_S.dtype, device="meta")
    targets = torch.empty(len(h_S), dtype=torch.int32, device="meta")
    problem = Problem(h_S, h_S, W, None, h_S.dtype, 0.5, entry_clip=0.05, targets=targets)
    with tiles_of(tiles.TABLE[arch, dtype]):
        scratch = logit_free.allocate(problem, needs_gradient=True, needs_statistics=True)
    bound = SCRATCH_MIB * max(1, D / 4096)
    for_copies = 4
    assert sum(t.nbytes for t in tensors_of(scratch).values()) / MIB <= bound - for_copies


@pytest.mark.parametrize("D", [1024, 2560, 4096, 8192])
def test_what_products_read_is_aligned(D):
    """Where the head is copied, under autocast, it is in 64s: tiles of scores then begin at
    multiples of 16 bytes. Rows of logits do too, whatever the vocabulary."""
    h_S = torch.empty(5000, D, device="meta")
    W = torch.empty(151669, D, device="meta")
    for operand_dtype in (torch.bfloat16, torch.float16):
        problem = Problem(h_S, h_S, W, None, operand_dtype, 1.0)
        with tiles_of(tiles.TABLE["sm_90", str(operand_dtype).removeprefix("torch.")]):
            scratch = logit_free.allocate(problem, needs_gradient=True, needs_statistics=False)
        assert scratch.copied_rows % 64 == 0 < scratch.copied_rows
    workspace, _ = row_workspace.allocate(problem, make_plan(problem, 5000, 2**30), True)
    assert workspace.stride(0) == 151680


@interpreted
@pytest.mark.usefixtures("interpreters_tiles")
@pytest.mark.parametrize(
    ("beta", "entry_clip", "U"),
    [
        (0.5, None, 6),
        (0.9, None, 6),
        (0.5, 0.05, 6),
        (0.0, 0.05, 6),
        (0.0, None, 5),
        (1.0, None, 5),
    ],
)
@pytest.mark.parametrize("own_head", [False, True])
def test_passes_over_the_head(beta, entry_clip, U, own_head):
    """6 U of products, 5 U for the unclipped KLs, 4 U without gradient: tiles multiplied by the
    kernels, and what the library multiplies."""
    N, V, D = 32, 512, 64  # whole tiles
    h_S, h_T, W = inputs(N, V, D)
    options = {"beta": beta, "entry_clip": entry_clip, "W_teacher": W.clone() if own_head else None}
    for needs_gradient, expected in ((True, U), (False, 4)):
        h_S.requires_grad_(needs_gradient)
        with counted_dots() as dots, FlopCounterMode(display=False) as library:
            loss = fused_jsd_loss(h_S, h_T, W, workspace_mib=0, **options)
            if needs_gradient:
                loss.backward()
        assert 2 * sum(dots) + library.get_total_flops() == expected * 2 * N * D * V


@interpreted
@pytest.mark.usefixtures("interpreters_tiles")
def test_passes_of_everything_else():
    """Statistics and targets ride in the same passes, and a β of each token; the log-probability of
    a sampled token needs the teacher's logits once and one tile: 4 U, 2 U without gradient."""
    N, V, D = 32, 512, 64
    h_S, h_T, W = inputs(N, V, D)
    targets = torch.arange(N, device=DEVICE)
    betas = torch.linspace(0, 1, N, device=DEVICE)

    def everything(*args, **options):
        return token_divergence(*args, targets=targets, **options).loss.sum()

    def sampled(*args, **options):
        return fused_sampled_token_loss(*args, targets, **options)

    for function, options, U, without in (
        (everything, {"beta": 0.5}, 6, 4),
        (everything, {"beta": 0.0, "entry_clip": 0.05}, 6, 4),
        (everything, {"beta": 1.0}, 5, 4),
        (fused_jsd_loss, {"beta": betas}, 6, 4),
        (everything, {"beta": betas, "entry_clip": 0.05}, 6, 4),
        (sampled, {}, 4, 2),
        (sampled, {"W_teacher": W.clone()}, 4, 2),
    ):
        for needs_gradient, expected in ((True, U), (False, without)):
            h_S.requires_grad_(needs_gradient)
            with counted_dots() as dots, FlopCounterMode(display=False) as library:
                loss = function(h_S, h_T, W, workspace_mib=0, **options)
                if needs_gradient:
                    loss.backward()
            assert 2 * sum(dots) + library.get_total_flops() == expected * 2 * N * D * V


@interpreted
@pytest.mark.usefixtures("interpreters_tiles")
def test_tiles_of_dropped_rows_are_skipped():
    N, V, D = 128, 512, 64  # four tiles of rows
    h_S, h_T, W = inputs(N, V, D)
    weights = torch.zeros(N)
    weights[40:50] = 1
    with counted_dots() as dots:
        fused_jsd_loss(h_S, h_T, W, token_weights=weights, workspace_mib=0)
    assert 2 * sum(dots) == 2 * N * D * V  # 4 U of one tile in four


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("told", [False, True])
def test_a_tokens_loss_does_not_depend_on_its_batch(dtype, told):
    """Bitwise, wherever the batch ends: nothing is split by the number of tokens."""
    h_S, h_T, W = (t.to(DEVICE) for t in language_like_inputs(150, 1100, 48, dtype, 0.3))

    betas = torch.linspace(0, 1, 150, device=DEVICE)

    def loss(N: int) -> torch.Tensor:
        if told:
            targets = torch.arange(N, device=DEVICE)
            fields = token_divergence(
                h_S[:N], h_T[:N], W, beta=betas[:N], targets=targets, workspace_mib=0
            )
            return torch.stack(fields, dim=1)
        return fused_jsd_loss(h_S[:N], h_T[:N], W, reduction="none", workspace_mib=0)

    whole = loss(150)
    for N in (1, 31, 33, 65):
        assert torch.equal(loss(N), whole[:N])


@pytest.mark.parametrize("beta", [0.5, 0.0])
def test_gradient_is_reproducible(beta):
    h_S, h_T, W = inputs(70, 1100, 48, torch.bfloat16)
    h_S.requires_grad_()
    grads = [
        torch.autograd.grad(fused_jsd_loss(h_S, h_T, W, beta=beta, workspace_mib=0), h_S)[0]
        for _ in range(2)
    ]
    assert torch.equal(*grads)


class Untouched:
    """A kernel that is launched and does nothing."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> "Untouched":
        assert all(isinstance(n, int) and n > 0 for n in grid)
        return self

    def __call__(self, **arguments: object) -> None:
        self.launches += 1


@pytest.mark.parametrize("masked", [False, True])
def test_no_host_synchronisation(masked, monkeypatch):
    """Tensors of the meta device have no contents: whatever reads one raises. What a GPU would do
    beside its kernels is done here but for them."""
    kernels = [Untouched() for _ in range(4)]
    monkeypatch.setattr(lse, "lse_kernel", kernels[0])
    monkeypatch.setattr(lse, "merge_kernel", kernels[1])
    monkeypatch.setattr(pair, "pair_kernel", kernels[2])
    monkeypatch.setattr(finish, "finish_kernel", kernels[3])
    monkeypatch.setattr("opsd_kernels.kernels.available", lambda device: True)
    h_S, h_T, W = (t.to("meta") for t in random_inputs(40, 3000, 16, torch.bfloat16))
    h_S.requires_grad_()
    weights = torch.ones(40, device="meta") if masked else None
    with tiles_of(tiles.INTERPRETER):
        fused_jsd_loss(h_S, h_T, W, token_weights=weights).backward()  # the default off the CPU
    assert h_S.grad.shape == h_S.shape
    assert [k.launches for k in kernels] == [1, 1, 3, 1]  # 1,024 columns at a time, of bf16


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_around_the_caller(reentrant):
    h_S, h_T, W = inputs(20, 300, 16)

    def loss(h: torch.Tensor) -> torch.Tensor:
        return fused_jsd_loss(torch.tanh(h), h_T, W, workspace_mib=0)

    plain, saved = h_S.clone().requires_grad_(), h_S.clone().requires_grad_()
    loss(plain).backward()
    checkpoint(loss, saved, use_reentrant=reentrant).backward()
    assert torch.equal(plain.grad, saved.grad)


def test_offsets_beyond_32_bits():
    """The last rows of a head of more than 2³¹ entries (a stride stands for the entries)."""
    V, D, stride = 70, 16, 2**25
    storage = torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
    try:
        storage = torch.empty((V - 1) * stride + D, dtype=torch.bfloat16, device=DEVICE)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip("needs 4.4 GiB of address space")
    W = storage.as_strided((V, D), (stride, 1))
    h_S, h_T, head = inputs(5, V, D, torch.bfloat16)
    W.copy_(head)
    h_S.requires_grad_()
    (grad,) = torch.autograd.grad(fused_jsd_loss(h_S, h_T, W, workspace_mib=0), h_S)
    (expected,) = torch.autograd.grad(fused_jsd_loss(h_S, h_T, head, workspace_mib=0), h_S)
    assert torch.equal(grad, expected)


def test_refused_where_it_cannot_run():
    """On a CPU without the interpreter: a message that says where, and what else to do."""
    code = (
        "import torch, opsd_kernels\n"
        "h, W = torch.randn(3, 4), torch.randn(5, 4)\n"
        "print(opsd_kernels.fused_jsd_loss(h, h, W).item())\n"
        "opsd_kernels.fused_jsd_loss(h, h, W, workspace_mib=0)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "0.0"
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: workspace_mib=0 keeps logits in the registers of a GPU")
    assert "TRITON_INTERPRET=1" in message


def test_the_package_needs_no_triton_on_a_cpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, opsd_kernels\n"
        "h, W = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)\n"
        "opsd_kernels.fused_jsd_loss(h, h.detach() + 1, W).backward()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_schedules_agree():
    """One β and one clip of each kind, in every dtype, and the same numbers."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        h_S, h_T, W = language_like_inputs(40, 1500, 64, dtype, 0.1)
        for beta, entry_clip in DIVERGENCES:
            options = {"beta": beta, "entry_clip": entry_clip, "temperature": 1.3}
            ours, grad = LOGIT_FREE.loss_and_grad(h_S, h_T, W, **options)
            theirs, their_grad = ROW_WORKSPACE.loss_and_grad(h_S, h_T, W, **options)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
            # Both are rounded to their dtype, and before that by the last bits of their fp32
            # logits, whose sums have another order in each: independent noise of the same size.
            _, size = noise(h_S, h_T, W, **options)
            unit = torch.finfo(dtype).eps
            assert (grad - their_grad).norm() < 0.5 * unit * their_grad.norm() + 2**0.5 * size
