"""Each kernel alone against float64, interpreted without a GPU and compiled on one."""

import importlib
import inspect
import math
import pkgutil
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from accuracy import GRAD_UNITS, LOSS_UNITS, TILED_GRAD_UNITS, errors
from inputs import language_like_inputs, random_inputs
from schedules import DEVICE, LOGIT_FREE
from triton.runtime.jit import KernelInterface

from opsd_kernels import kernels
from opsd_kernels.divergence import Member, value_and_score
from opsd_kernels.kernels import lse, pair, pointwise, tiles
from opsd_kernels.kernels.logits_tile import INTERPRETED, round_to
from opsd_kernels.kernels.records import PerToken
from opsd_kernels.problem import Outputs, Problem
from opsd_kernels.schedules import logit_free, row_workspace, rows

BETAS = [0.0, 1e-3, 0.3, 0.5, 0.8, 0.999, 1.0]
DIVERGENCES = [(beta, clip) for beta in (0.0, 0.3, 0.5, 0.8, 1.0) for clip in (None, 0.01)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_no_kernel_has_more_than_a_dozen_parameters():
    """Nor has any function that one calls: what there is more of goes in records."""
    functions = [
        function
        for found in pkgutil.iter_modules(kernels.__path__)
        for function in vars(importlib.import_module(f"{kernels.__name__}.{found.name}")).values()
        if isinstance(function, KernelInterface)
    ]
    assert len(functions) > 40
    for function in functions:
        assert len(inspect.signature(function.fn).parameters) <= 12, function.fn.__name__


# --- pointwise


@triton.jit
def pointwise_kernel(f_ptr, a_ptr, p_ptr, q_ptr, x_ptr, tokens, formula, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p, q, x = tl.load(p_ptr + i), tl.load(q_ptr + i), tl.load(x_ptr + i)
    parameters = pointwise.parameters_of(tokens, i, None, formula)
    f, a, _excess = pointwise.value_and_score(p, q, x, 0.0, parameters, formula)
    tl.store(f_ptr + i, f)
    tl.store(a_ptr + i, a)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_pointwise_is_the_family(beta, mixed):
    """Entry by entry, for log-ratios from 1e-6 to 89 of either sign. The KLs' f tends to x²/2 p: no
    digit is lost however small x is, which PyTorch's form cannot say."""
    g = torch.Generator().manual_seed(0)
    x = 10 ** (torch.rand(4096, generator=g) * 7.95 - 6)
    x = torch.where(torch.rand(4096, generator=g) < 0.5, x, -x).float()
    smaller = torch.rand(4096, generator=g) + 1e-3
    p = torch.where(x > 0, smaller * torch.exp(-x), smaller)
    q = torch.where(x > 0, smaller, smaller * torch.exp(x))
    f, a = torch.empty_like(x, device=DEVICE), torch.empty_like(x, device=DEVICE)
    betas = torch.full((4096,), beta, device=DEVICE)
    formula = pointwise.formula_of(Member.of(betas if mixed else beta), temperature=1.0)
    tokens = PerToken(beta=betas if mixed else None)
    if mixed:
        beta = float(betas[0])
    pointwise_kernel[(1,)](
        f, a, p.to(DEVICE), q.to(DEVICE), x.to(DEVICE), tokens, formula, BLOCK=4096
    )  # fmt: skip
    expected_f, expected_a = value_and_score(p.double(), q.double(), x.double(), Member.of(beta))
    assert expected_a is not None
    # p and q are rounded apart from x: what that does to an entry is not the formula's error.
    size = (p + q).double() * x.double().abs().clamp(max=1) * x.double().abs()
    close = x.abs() < 1
    assert ((f.cpu() - expected_f).abs() < 2e-6 * expected_f.abs() + 1e-7 * size)[close].all()
    assert ((f.cpu() - expected_f).abs() < 1e-5 * (expected_f.abs() + size))[~close].all()
    assert ((a.cpu() - expected_a).abs() < 1e-5 * expected_a.abs() + 1e-30).all()


@triton.jit
def round_kernel(out_ptr, t_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, round_to(tl.load(t_ptr + i), DTYPE))


@pytest.mark.parametrize(
    ("dtype", "triton_dtype"),
    [(torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16), (torch.float32, tl.float32)],
)
def test_rounding_is_to_nearest_even(dtype, triton_dtype):
    """Peculiar to the interpreter, which truncates fp32 to bf16 when left alone."""
    t = torch.randn(1024)
    t[:6] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1 + 2**-8])
    out = torch.empty(1024, dtype=dtype, device=DEVICE)
    round_kernel[(1,)](out, t.to(DEVICE), triton_dtype, BLOCK=1024)
    assert torch.equal(out.cpu().nan_to_num(7), t.to(dtype).nan_to_num(7))


@contextmanager
def approximated():
    """2ʸ, log₂ w and quotients of the interpreter, as wrong as the instructions of a GPU may be
    (PTX ISA: ex2.approx and lg2.approx 2⁻²², the latter absolute between ½ and 2; div.approx 2 of
    the last bit), each number in its own direction."""
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    exp2, log2, divide = Builder.create_exp2, Builder.create_log2, Builder.create_fdiv
    random = np.random.default_rng(0)

    def off(t, size):
        error = size * random.uniform(-1, 1, t.data.shape)
        return type(t)((t.data + error).astype(t.data.dtype), t.dtype)

    with (
        mock.patch.object(
            Builder, "create_exp2", lambda self, y: (t := exp2(self, y)) and off(t, 2**-22 * t.data)
        ),
        mock.patch.object(
            Builder,
            "create_log2",
            lambda self, w: (t := log2(self, w)) and off(t, 2**-22 * np.maximum(abs(t.data), 1)),
        ),
        mock.patch.object(
            Builder,
            "create_fdiv",
            lambda self, a, b: (t := divide(self, a, b)) and off(t, 2**-22 * abs(t.data)),
        ),
    ):
        yield


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("distance", [1e-3, 0.03, 1.0])
@pytest.mark.parametrize(
    ("beta", "entry_clip"), [(0.5, None), (0.8, None), (0.0, 0.05), (1.0, None)]
)
def test_instructions_may_be_as_wrong_as_they_are(beta, entry_clip, distance):
    """The series near 0 use none of them, so what they lose is small where all is."""
    h_S, h_T, W = language_like_inputs(24, 1000, 48, torch.float32, distance)
    options = {"beta": beta, "entry_clip": entry_clip}
    found = []
    for how in (nullcontext, approximated):
        with how():
            loss, grad = LOGIT_FREE.loss_and_grad(h_S, h_T, W, **options)
        found.append(errors(loss, grad, h_S, h_T, W, normalizers=True, **options))
    exact, wrong = found
    assert wrong != exact
    assert wrong.loss < LOSS_UNITS
    assert wrong.grad < GRAD_UNITS[torch.float32]


# --- lse, pair, finish


def problem_of(h_S, h_T, W, *, keep=None, W_T=None, beta=0.5, temperature=1.0, entry_clip=None):
    h_S, h_T, W, W_T, keep = (None if t is None else t.to(DEVICE) for t in (h_S, h_T, W, W_T, keep))
    return Problem(h_S, h_T, W, W_T, h_S.dtype, beta, temperature, entry_clip, keep)


def scratch_of(problem):
    return logit_free.allocate(problem, needs_gradient=True, needs_statistics=False)


CASES = {
    "ragged": lambda dtype: random_inputs(37, 517, 40, dtype),
    "one token": lambda dtype: random_inputs(1, 700, 33, dtype),
    "one feature": lambda dtype: random_inputs(5, 300, 1, dtype),
    "one entry": lambda dtype: random_inputs(5, 1, 16, dtype),
    "peaked": lambda dtype: language_like_inputs(40, 900, 48, dtype, 0.3),
    "identical": lambda dtype: (lambda h_S, _, W: (h_S, h_S.clone(), W))(
        *language_like_inputs(20, 600, 32, dtype, 0.0)
    ),
    "huge logits": lambda dtype: random_inputs(9, 600, 32, dtype, size=300.0),
    "tiny logits": lambda dtype: random_inputs(9, 600, 32, dtype, size=1e-4),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_lse(case, dtype):
    h_S, h_T, W = CASES[case](dtype)
    problem = problem_of(h_S, h_T, W, temperature=0.7, beta=1.0)
    scratch = scratch_of(problem)
    lse.launch(scratch, problem)
    N = h_S.shape[0]
    top_S, p_max, top_T, q_max, log_sums, c, _without_null, _s_top = (
        scratch.stats[:, :N].cpu().double()
    )
    top_S, top_T = top_S / 0.7, top_T / 0.7  # kept as logits are before temperature
    z_S, z_T = (h.double() @ W.double().T / 0.7 for h in (h_S, h_T))
    size = 1 + z_S.abs().max()
    assert (top_S - z_S.amax(-1)).abs().max() < 1e-6 * size
    assert (top_T - z_T.amax(-1)).abs().max() < 1e-6 * size
    assert (top_S - p_max.log() - z_S.logsumexp(-1)).abs().max() < 1e-6 * size
    assert (top_T - q_max.log() - z_T.logsumexp(-1)).abs().max() < 1e-6 * size
    assert (log_sums - (p_max / q_max).log()).abs().max() < 3e-7
    top = scratch.top[:N].cpu().long()
    assert (z_S.gather(1, top[:, None])[:, 0] - z_S.amax(-1)).abs().max() < 1e-6 * size
    # What c is for the reverse KL: its G.
    p, x = z_S.softmax(-1), z_T.log_softmax(-1) - z_S.log_softmax(-1)
    assert (c + (p * x).sum(-1)).abs().max() < 3e-6 * size


def test_the_first_of_equal_entries_is_the_top():
    h_S, h_T, W = random_inputs(3, 1000, 8)
    W[::7] = 10 * h_S[0] / h_S[0].norm()
    problem = problem_of(h_S, h_T, W)
    scratch = scratch_of(problem)
    lse.launch(scratch, problem)
    assert scratch.top[0] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("beta", "entry_clip"), DIVERGENCES)
def test_pair(beta, entry_clip, dtype):
    """The tiles are those of the formula, in the dtype that a GPU multiplies; c is free to be
    anything, and cancels in s − (G − c) p."""
    h_S, h_T, W = language_like_inputs(37, 200, 40, dtype, 0.3)
    problem = problem_of(h_S, h_T, W, beta=beta, entry_clip=entry_clip)
    scratch = scratch_of(problem)
    lse.launch(scratch, problem)
    pair.launch(pair.arguments(scratch, problem), 0)
    N, top = 37, scratch.top[:37].cpu().long()[:, None]
    stored_s, stored_p = scratch.s_and_p(N)
    # What fp16 can hold only scaled is; the reverse KL's scores have no bound to scale by.
    s_dtype = torch.float32 if dtype == torch.float16 and beta == 1 else dtype
    assert stored_s.dtype == s_dtype
    assert scratch.scale == (2**14 if s_dtype == torch.float16 else 1)

    z_S, z_T = (h.double() @ W.double().T for h in (h_S, h_T))
    p, q = z_S.softmax(-1), z_T.softmax(-1)
    x = z_T.log_softmax(-1) - z_S.log_softmax(-1)
    _f, a = value_and_score(p, q, x, Member.of(beta, entry_clip))
    c = scratch.stats[5, :N].cpu().double()[:, None]
    s = (a - c * p).scatter(1, top, 0)
    unit = torch.finfo(s_dtype).eps + 3e-5
    # The last fp32 bit of a logit of 40 or so, and of its log-sum-exp, moves an entry that much.
    tolerance = unit * s.abs() + 2e-5 * (a.abs() + c.abs() * p + p)
    least = torch.finfo(s_dtype).smallest_normal * torch.finfo(s_dtype).eps / scratch.scale
    assert ((stored_s[:, :200].cpu().double() / scratch.scale - s).abs() < tolerance + least).all()
    if stored_p is not None:
        stored = stored_p[:, :200].cpu().double() / scratch.scale
        assert (stored.gather(1, top) == 0).all()
        assert ((stored - p.scatter(1, top, 0)).abs() < unit * p + least).all()
    assert (stored_p is None) == (beta in (0, 1) and entry_clip is None)


def test_s_vanishes_with_the_divergence():
    """c is near G unless the top entry has nearly all the mass: what it misses is second order."""
    h_S, h_T, W = language_like_inputs(20, 600, 32, torch.float32, 1e-3)
    for beta in (0.3, 0.5, 0.9, 1.0):
        problem = problem_of(h_S, h_T, W, beta=beta)
        scratch = scratch_of(problem)
        lse.launch(scratch, problem)
        arguments = pair.arguments(scratch, problem)
        for v in range(0, 600, scratch.columns):
            pair.launch(arguments, v)
        missed = scratch.sums[1, :, :20].sum(0) + scratch.stats[7, :20]
        scale = scratch.s_p[:20].abs().sum(1)
        spread = scratch.stats[1, :20] < 0.9  # p_top
        assert spread.sum() > 5
        assert (missed.abs() < 0.01 * scale + 1e-7)[spread].all()


@pytest.mark.parametrize("distance", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_clip_that_takes_much_leaves_the_shift_small(beta, distance):
    """Where entries are far above the clip, what their log-ratios say of G is wrong by as much; the
    tiles must not be rounded at that size."""
    h_S, h_T, W = random_inputs(6, 1000, 64, torch.bfloat16, size=20.0, distance=distance)
    options = {"beta": beta, "entry_clip": 0.01}
    loss, grad = LOGIT_FREE.loss_and_grad(h_S, h_T, W, **options)
    error = errors(loss, grad, h_S, h_T, W, tiles=True, **options)
    assert error.loss < LOSS_UNITS
    assert error.grad < TILED_GRAD_UNITS


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [48, 45])
def test_loads_in_bulk_change_nothing(D, dtype, own_head):
    """Descriptors where strides allow them, pointers where not (45 features): the same numbers, to
    the last bit."""
    h_S, h_T, W = language_like_inputs(45, 1400, D, dtype, 0.3)
    W_T = W.flip(0) if own_head else None
    row = tiles.lookup(DEVICE, dtype)
    found = []
    for BULK in (False, True):
        changed = replace(row, lse=replace(row.lse, BULK=BULK), pair=replace(row.pair, BULK=BULK))
        with mock.patch.object(tiles, "lookup", return_value=changed), counted_bulk_loads() as bulk:
            found.append(LOGIT_FREE.loss_and_grad(h_S, h_T, W, W_teacher=W_T))
        if INTERPRETED:
            assert (bulk[0] > 0) == (BULK and D == 48)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@contextmanager
def counted_bulk_loads():
    if not INTERPRETED:
        yield [0]
        return
    from triton.runtime.interpreter import InterpreterBuilder

    original, loads = InterpreterBuilder.create_descriptor_load, [0]

    def load(*args):
        loads[0] += 1
        return original(*args)

    with mock.patch.object(InterpreterBuilder, "create_descriptor_load", load):
        yield loads


# --- rows


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("g_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("beta", "entry_clip"), DIVERGENCES)
def test_rows(beta, entry_clip, g_dtype, mixed):
    z_S = torch.randn(5, 1300, generator=torch.Generator().manual_seed(0)) * 3
    z_T = z_S + 0.3 * torch.randn(5, 1300, generator=torch.Generator().manual_seed(1))
    exact_g = z_S.double() / 0.7
    exact_loss = rows.divergence_rows_(
        exact_g, z_T.double() / 0.7, Member.of(beta, entry_clip), needs_score=True
    )
    workspace = torch.cat([z_S, z_T]).to(DEVICE)
    problem = problem_of(
        torch.empty(5, 1, dtype=g_dtype), torch.empty(5, 1), torch.empty(1300, 1),
        beta=torch.full((5,), beta, device=DEVICE) if mixed else beta,
        temperature=0.7, entry_clip=entry_clip,
    )  # fmt: skip
    for needs_score in (False, True):
        loss = torch.empty(5, device=DEVICE)
        gradient = row_workspace.launch_rows(
            Outputs(loss), workspace[:5], workspace[5:], problem, needs_score
        )
        assert ((loss.cpu() - exact_loss) / exact_loss).abs().max() < 2e-5
    unit = torch.finfo(g_dtype).eps
    assert gradient.g.dtype == g_dtype
    g = whole(gradient)
    assert ((g.cpu() - exact_g).norm() / exact_g.norm()) < 0.5 * unit + 1e-5
    assert g.float().sum(1).abs().max() < 2 * unit * exact_g.abs().sum(1).max() + 1e-6


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_rows_of_infinite_divergence(beta, mixed):
    """−∞ on one side, and on both: see tests/test_divergence.py; here it is the kernel."""
    z_S, z_T = torch.randn(3, 9), torch.randn(3, 9)
    z_S[0, 4], z_T[1, 5], z_S[2, 6], z_T[2, 6] = (-math.inf,) * 4
    expected_g = z_S.clone()
    expected = rows.divergence_rows_(expected_g, z_T.clone(), Member.of(beta), needs_score=True)
    loss, workspace = torch.empty(3, device=DEVICE), torch.cat([z_S, z_T]).to(DEVICE)
    betas = torch.full((3,), beta, device=DEVICE) if mixed else beta
    problem = problem_of(torch.empty(3, 1), torch.empty(3, 1), torch.empty(9, 1), beta=betas)
    gradient = row_workspace.launch_rows(Outputs(loss), workspace[:3], workspace[3:], problem, True)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole(gradient), expected_g, rtol=1e-4, atol=1e-6)


def whole(gradient):
    """The gradient with its top entries in their places."""
    g, top, g_top = (t.cpu() for t in (gradient.g, gradient.top, gradient.g_top))
    assert (g.gather(1, top[:, None].long()) == 0).all()
    return g.float().scatter(1, top[:, None].long(), g_top[:, None])


@pytest.mark.parametrize("schedule", ["logit-free", "rows"])
def test_a_row_of_nan_points_at_no_entry_beyond_the_last(schedule):
    """Its top entry is looked up in the head, whatever it is."""
    h_S, h_T, W = random_inputs(5, 300, 16)
    h_S[2] = math.nan
    if schedule == "logit-free":
        problem = problem_of(h_S, h_T, W)
        scratch = scratch_of(problem)
        lse.launch(scratch, problem)
        top = scratch.top[:5]
    else:
        z_S, z_T = (h @ W.T for h in (h_S.to(DEVICE), h_T.to(DEVICE)))
        loss = torch.empty(5, device=DEVICE)
        top = row_workspace.launch_rows(
            Outputs(loss), z_S, z_T, problem_of(h_S, h_T, W), needs_score=True
        ).top
        assert loss.isnan().tolist() == [False, False, True, False, False]
    assert ((top >= 0) & (top < 300)).all()
