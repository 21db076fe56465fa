"""A head that is trained: gradients of weight and bias, in every schedule and by each of the ways
in which they are made: in forward, where the weights of the tokens are known and the budget holds
dW, and otherwise in backward."""

import gc
from typing import Any
from unittest import mock

import pytest
import torch
from accuracy import rounds_scores
from heads import EXTRAS, as_head, logits_of_products
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inputs import clip_is_clear, language_like_inputs, random_inputs
from marks import slow
from schedules import DEVICE, LOGIT_FREE, ROW_WORKSPACE, SCHEDULES
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.allocations import Allocations
from benchmarks.lib.measure import counted_dots
from opsd_kernels import (
    Divergence,
    FusedJSDLoss,
    LMHead,
    autograd,
    fused_jsd_loss,
    fused_sampled_token_loss,
    reference_jsd_loss,
    reference_sampled_token_loss,
    reference_token_divergence,
    token_divergence,
)
from opsd_kernels.divergence import Member
from opsd_kernels.kernels import lse
from opsd_kernels.problem import STATS
from opsd_kernels.schedules import planning
from opsd_kernels.schedules.rows import divergence_rows_

interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="needs Triton's interpreter")
# Of errors in units, as in accuracy.py; those of dW and db are below 2.3 in thousands of cases.
UNITS = 3.0
# The ways: schedule, and a budget that holds dW or does not.
WAYS = {
    "logit-free": (LOGIT_FREE, 0, False),
    "PyTorch, forward": (ROW_WORKSPACE, 2, False),
    "PyTorch, backward": (ROW_WORKSPACE, 0.08, False),
    "rows, forward": (LOGIT_FREE, 2, True),
    "rows, backward": (LOGIT_FREE, 0.03, True),
}


def gradients(function: Any, h_S: Tensor, head: LMHead, *rest: Any, **options: Any) -> list[Tensor]:
    """Value and gradients, those of a head's weight and bias among them, of what a function
    returns."""
    h_S = h_S.detach().clone().requires_grad_()
    leaf = tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(), head)
    value = function(h_S, *rest[:1], leaf, *rest[1:], **options)
    if not isinstance(value, Tensor):
        value = value.loss
    # Upstream weights that differ, where there are several.
    value.backward(torch.linspace(0.5, 2, value.numel()).to(value).reshape(value.shape))
    found = [value.detach(), h_S.grad, leaf.weight.grad]
    return found if leaf.bias is None else [*found, leaf.bias.grad]


def by(way: str, function: Any, h_S: Tensor, head: LMHead, *rest: Any, **options: Any) -> Any:
    op, workspace_mib, with_rows = WAYS[way]
    args, options = tree_map_only(Tensor, lambda t: t.to(op.device), ((h_S, head, *rest), options))
    # On a CPU `rows` is interpreted.
    uses = with_rows or op.device.type == "cuda"
    with mock.patch.object(planning, "uses_rows_kernel", return_value=uses):
        found = gradients(function, *args, workspace_mib=workspace_mib, **options)
    return [t.cpu() for t in found]


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def exact(function: Any, *args: Any, **options: Any) -> list[Tensor]:
    args, options = tree_map_only(Tensor, _double, (args, options))
    return gradients(function, *args, **options)


def close(
    found: list[Tensor], expected: list[Tensor], dtype: torch.dtype, noise: float = 3e-6
) -> None:
    """Each to the rounding of what is returned, that of tiles, and the noise of fp32 logits."""
    for got, true in zip(found, expected, strict=True):
        rounding = float((true.to(got.dtype).double() - true).norm())
        if got is not found[0] and dtype != torch.float32:
            rounding += torch.finfo(dtype).eps / 4 * float(true.norm())  # of tiles
        error = float((got.double() - true).norm())
        assert error <= 1.5 * rounding + noise * float(true.norm()) + 1e-9, (error, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_way(way, reduction, dtype):
    h_S, h_T, W = random_inputs(70, 500, 24, dtype, distance=0.5)
    head = LMHead(W, torch.linspace(-1, 1, 500).to(dtype))
    options = {"reduction": reduction, "temperature": 0.7}
    found = by(way, fused_jsd_loss, h_S, head, h_T, **options)
    assert [t.dtype for t in found[1:]] == [dtype] * 3
    close(found, exact(reference_jsd_loss, h_S, head, h_T, **options), dtype)


def test_the_ways_are_those_they_are_named_for():
    h_S, h_T, W = random_inputs(70, 500, 24)
    head = LMHead(W, torch.zeros(500))
    for way in WAYS:
        weighed, later = autograd._WeighedSum.apply, autograd._TrainedHead.apply
        with (
            mock.patch.object(autograd._WeighedSum, "apply", side_effect=weighed) as forward,
            mock.patch.object(autograd._TrainedHead, "apply", side_effect=later) as backward,
        ):
            by(way, fused_jsd_loss, h_S, head, h_T)
        assert (forward.call_count, backward.call_count) == ((1, 0) if "forward" in way else (0, 1))


@pytest.mark.parametrize(
    "way",
    # Interpreted, they take their time.
    [way if "PyTorch" in way else slow(way) for way in WAYS],
)
@given(
    N=st.integers(1, 9),
    V=st.sampled_from([1, 2, 17, 300]),
    D=st.sampled_from([1, 8, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    beta=st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(1e-3, 1 - 1e-3)),
    temperature=st.sampled_from([1.0, 0.5, 1.7]),
    entry_clip=st.sampled_from([None, None, 0.05]),
    log_distance=st.floats(-3, 0),
    extras=EXTRAS,
    own_head=st.booleans(),
    reduction=st.sampled_from(["mean", "none"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_head_against_oracle(
    way, N, V, D, dtype, beta, temperature, entry_clip, log_distance, extras, own_head, reduction,
    seed,
):  # fmt: skip
    h_S, h_T, W = random_inputs(N, V, D, dtype, distance=10**log_distance, seed=seed)
    head, teacher = LMHead(W), None
    options: dict[str, Any] = {"beta": beta, "temperature": temperature, "entry_clip": entry_clip}
    if own_head:
        teacher = (W + 0.1).to(dtype)
    if extras is not None:
        head, teacher = extras.heads(W, teacher, seed)
    if entry_clip is not None:
        W_T = head if teacher is None else teacher
        assume(
            clip_is_clear(h_S, h_T, head, W_T, Divergence(beta, entry_clip=entry_clip), temperature)
        )
    # Padded rows are NaN: nothing may come of them.
    found = by(way, fused_jsd_loss, h_S, head, h_T, W_teacher=teacher, reduction=reduction,
               **options)  # fmt: skip
    true = exact(reference_jsd_loss, h_S, head, h_T, W_teacher=teacher, reduction=reduction,
                 **options)  # fmt: skip
    upstream = torch.linspace(0.5, 2, N) if reduction == "none" else torch.full((N,), 0.5 / N)
    tiles = dtype != torch.float32 and ("PyTorch" not in way and rounds_scores(dtype, beta))
    units = units_of_head(h_S, h_T, head, teacher, upstream.double(), tiles, **options)
    for got, expected, unit in zip(found[2:], true[2:], units, strict=False):
        assert (got.double() - expected).norm() <= UNITS * unit


def units_of_head(
    h_S: Tensor,
    h_T: Tensor,
    head: LMHead,
    teacher: LMHead | Tensor | None,
    upstream: Tensor,
    tiles: bool,
    *,
    beta: float,
    temperature: float,
    entry_clip: float | None,
) -> tuple[float, float]:
    """What rounding makes of dW and db: that of their dtype, of the tiles that they are sums of,
    and of the last bits of logits and entries."""
    generator = torch.Generator().manual_seed(0)
    dtype = h_S.dtype
    student = tree_map_only(Tensor, Tensor.double, as_head(head))
    other = student if teacher is None else tree_map_only(Tensor, Tensor.double, as_head(teacher))
    h_S, h_T = h_S.double(), h_T.double()
    u_S, u_T = h_S @ student.weight.t(), h_T @ other.weight.t()

    def randn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    def size(h: Tensor, side: LMHead) -> Tensor:
        bias = torch.zeros(1) if side.bias is None else side.bias.nan_to_num(neginf=0.0).abs()
        products = h.norm(dim=1)[:, None] * side.weight.norm(dim=1) + bias
        return products + temperature * (1 + torch.tensor(float(u_S.shape[1])).log()) / side.scale

    def sums(bit: float) -> tuple[Tensor, Tensor]:
        moved_S = u_S + bit * randn(u_S) * size(h_S, student)
        moved_T = u_T + bit * randn(u_T) * size(h_T, other)
        z_S, slope = logits_of_products(moved_S, student)
        z_T, _ = logits_of_products(moved_T, other)
        g = z_S / temperature
        z_T = z_T / temperature
        p, q = g.softmax(-1), z_T.softmax(-1)
        divergence_rows_(g, z_T, Member.of(beta, entry_clip), needs_score=True)
        g += bit * randn(g) * (p + q)  # of terms whose difference an entry is
        g *= slope / temperature * upstream[:, None]
        if tiles and bit:
            g += torch.finfo(dtype).eps / 2 * randn(g) * g
        return g.t() @ h_S, g.sum(0)

    exact_dW, exact_db = sums(0.0)
    units = []
    moved = [sums(2.0**-24) for _ in range(4)]
    for i, exact_sum in enumerate((exact_dW, exact_db)):
        rounding = (exact_sum.to(dtype).double() - exact_sum).norm()
        change = torch.stack([(m[i] - exact_sum).norm() for m in moved]).square().mean().sqrt()
        units.append(float(rounding + change) + torch.finfo(torch.float32).tiny)
    return units[0], units[1]


@pytest.mark.parametrize("way", [way for way in WAYS if "forward" not in way])
def test_other_losses(way):
    """A β of each token, statistics, sampled tokens."""
    h_S, h_T, W = random_inputs(40, 300, 16, distance=0.5)
    head = LMHead(W, torch.linspace(-1, 1, 300), 5.0, 0.5)
    targets = torch.arange(40) * 7
    weights = torch.arange(40) % 3
    options = {"beta": torch.linspace(0, 1, 40), "entry_clip": 0.01, "token_weights": weights}
    found = by(way, token_divergence, h_S, head, h_T, **options)
    close(found, exact(reference_token_divergence, h_S, head, h_T, **options), torch.float32)
    found = by(way, fused_sampled_token_loss, h_S, head, h_T, targets)
    true = exact(lambda *args, **_: reference_sampled_token_loss(*args, targets), h_S, head, h_T)
    close(found, true, torch.float32, 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_what_does_not_count_may_be_nan(way):
    h_S, h_T, W = random_inputs(40, 300, 16)
    keep = torch.arange(40) % 3 != 0
    expected = by(way, fused_jsd_loss, h_S[keep], LMHead(W), h_T[keep])
    h_S[~keep], h_T[~keep] = torch.nan, torch.inf
    found = by(way, fused_jsd_loss, h_S, LMHead(W), h_T, token_weights=keep)
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found[1][keep], expected[1], rtol=1e-4, atol=1e-8)
    assert (found[1][~keep] == 0).all()
    nothing = by(way, fused_jsd_loss, h_S, LMHead(W), h_T, token_weights=torch.zeros(40))
    assert all((t == 0).all() for t in nothing)
    empty = by(way, fused_jsd_loss, h_S[:0], LMHead(W), h_T[:0])
    assert all((t == 0).all() for t in empty)


@pytest.mark.parametrize("way", WAYS)
def test_hidden_states_lose_nothing_by_it(way):
    """On peaked distributions, where most of the gradient is that of one entry: dh_S is as near to
    the exact one as with a frozen head."""
    h_S, h_T, W = language_like_inputs(40, 900, 48, torch.bfloat16, 1.0)
    # Weights that are known, or are not.
    reduction = "sum" if "forward" in way else "none"
    true = exact(reference_jsd_loss, h_S, LMHead(W), h_T, reduction=reduction)[1]
    trained = by(way, fused_jsd_loss, h_S, LMHead(W), h_T, reduction=reduction)[1]
    rounding = (true.bfloat16().double() - true).norm()
    assert (trained.double() - true).norm() < 1.15 * rounding


@pytest.mark.parametrize("way", WAYS)
def test_an_infinite_loss_has_no_gradient(way):
    h_S, h_T, W = random_inputs(6, 50, 8)
    bias = torch.zeros(50)
    banned = bias.clone()
    banned[3] = -torch.inf
    found = by(way, fused_jsd_loss, h_S, LMHead(W, banned), h_T, W_teacher=LMHead(W, bias),
               beta=0.0, reduction="none")  # fmt: skip
    assert (found[0] == torch.inf).all()
    assert all((t == 0).all() for t in found[1:])


@pytest.mark.parametrize("way", WAYS)
def test_a_second_backward_and_a_gradient_that_is_there(way):
    op, workspace_mib, with_rows = WAYS[way]
    h_S, h_T, W = (t.to(op.device) for t in random_inputs(40, 300, 16))
    uses = with_rows or op.device.type == "cuda"
    W.requires_grad_()
    with mock.patch.object(planning, "uses_rows_kernel", return_value=uses):
        loss = fused_jsd_loss(h_S.requires_grad_(), h_T, W, workspace_mib=workspace_mib)
        loss.backward(retain_graph=True)
        once = W.grad.clone(), h_S.grad.clone()
        (3 * loss).backward()  # into what is there
    torch.testing.assert_close(W.grad, 4 * once[0])
    torch.testing.assert_close(h_S.grad, 4 * once[1])
    loss = fused_jsd_loss(h_S, h_T, W, workspace_mib=op.workspace_mib)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, W, create_graph=True)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_scale_of_fp16_neither_overflows_nor_vanishes(way):
    h_S, h_T, W = random_inputs(40, 300, 16, torch.float16)
    scaled = by(way, lambda *args, **o: 2.0**16 * fused_jsd_loss(*args, **o), h_S, LMHead(W), h_T)
    true = exact(lambda *args: 2.0**16 * reference_jsd_loss(*args), h_S, LMHead(W), h_T)
    close(scaled, true, torch.float16)


@pytest.mark.parametrize("op", SCHEDULES, ids=str)
@pytest.mark.parametrize("whose", ["weight", "bias", "h_S"])
def test_only_what_is_asked_for(op, whose):
    h_S, h_T, W = (t.to(op.device) for t in random_inputs(10, 60, 8))
    named = {"h_S": h_S, "weight": W, "bias": torch.zeros(60, device=op.device)}
    named[whose].requires_grad_()
    for reduction in ("mean", "none"):
        loss = fused_jsd_loss(h_S, h_T, LMHead(W, named["bias"]), workspace_mib=op.workspace_mib,
                              reduction=reduction)  # fmt: skip
        loss.sum().backward()
    for name, t in named.items():
        assert (t.grad is not None) == (name == whose)
    assert named[whose].grad.abs().sum() > 0


@pytest.mark.parametrize("op", SCHEDULES, ids=str)
def test_the_teachers_head_never_gets_a_gradient(op):
    h_S, h_T, W = (t.to(op.device) for t in random_inputs(10, 60, 8))
    W_T = W.clone().requires_grad_()
    for student in (W, W.clone().requires_grad_()):
        loss = fused_jsd_loss(h_S.requires_grad_(), h_T.requires_grad_(), student,
                              W_teacher=W_T, workspace_mib=op.workspace_mib)  # fmt: skip
        loss.backward()
        assert W_T.grad is None
        assert h_T.grad is None
    # One head for both sides: the student's gradient alone, as if the teacher's were a copy.
    one = W.clone().requires_grad_()
    fused_jsd_loss(h_S, h_T, one, workspace_mib=op.workspace_mib).backward()
    torch.testing.assert_close(one.grad, student.grad)


@pytest.mark.parametrize("op", SCHEDULES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_with_a_head_in_fp32(op, reduction):
    h_S, h_T, W = random_inputs(40, 300, 16)
    head = LMHead(W, torch.linspace(-1, 1, 300))
    narrow = tree_map_only(Tensor, Tensor.bfloat16, (h_S, head, h_T))
    true = exact(reference_jsd_loss, *narrow, reduction=reduction)

    def autocast(*args: Any, **options: Any) -> Tensor:
        with torch.autocast(op.device.type, dtype=torch.bfloat16):
            return fused_jsd_loss(*args, **options)

    way = "logit-free" if op.logit_free else "PyTorch, forward"
    if op.device.type == "cuda" and not op.logit_free:
        way = "rows, forward"
    found = by(way, autocast, h_S, head, h_T, reduction=reduction)
    assert found[2].dtype == found[3].dtype == torch.float32
    close(found, true, torch.bfloat16, 1e-3)


@pytest.mark.parametrize("backend", ["aot_eager", slow("inductor")])
@pytest.mark.parametrize("op", SCHEDULES, ids=str)
def test_one_graph(op, backend):
    torch._dynamo.reset()
    h_S, h_T, W = (t.to(op.device) for t in random_inputs(12, 300, 16, distance=0.3))

    def loss(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = LMHead(weight, bias, 5.0, 0.5, 290)
        module = FusedJSDLoss(beta=0.3, workspace_mib=op.workspace_mib)
        told = token_divergence(2 * h, h_T, head, workspace_mib=op.workspace_mib)
        return module(2 * h, h_T, head) + told.loss.sum()

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        leaves = [t.clone().requires_grad_() for t in (h_S, W, torch.zeros(300, device=W.device))]
        value = call(*leaves)
        value.backward()
        results.append((value.detach(), *(t.grad for t in leaves)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


# --- what it costs


@interpreted
@pytest.mark.parametrize(("beta", "entry_clip"), [(0.5, None), (0.0, None), (1.0, 0.05)])
def test_passes(beta, entry_clip):
    """8 U logit-free; in the row workspace 4 U in forward, else 6 U."""
    N, V, D = 64, 1024, 64
    for way, U in (("logit-free", 8), ("PyTorch, forward", 4), ("PyTorch, backward", 6)):
        h_S, h_T, W = random_inputs(N, V, D)
        with counted_dots() as dots, FlopCounterMode(display=False) as library:
            by(way, fused_jsd_loss, h_S, LMHead(W), h_T, beta=beta, entry_clip=entry_clip,
               reduction="none" if "backward" in way else "mean")  # fmt: skip
        assert 2 * sum(dots) + library.get_total_flops() == U * 2 * N * D * V


@interpreted
@pytest.mark.parametrize("way", ["logit-free", "PyTorch, backward"])
def test_there_is_no_second_head_in_fp32(way):
    """Beside what is returned: where the weight has 16 bits nothing of its size is allocated; and
    from forward to backward 37 bytes a token are kept."""
    V, D = 6000, 64
    kept = []
    for N in (100, 200):
        h_S, h_T, W = (t.bfloat16().requires_grad_() for t in random_inputs(N, V, D))
        with Allocations() as in_forward:
            loss = fused_jsd_loss(h_S, h_T, W, workspace_mib=0 if way == "logit-free" else 0.8)
        gc.collect()  # what the interpreter of kernels still holds
        kept.append(in_forward.alive)
        with Allocations(smallest=4 * N) as in_backward:
            loss.backward()
        returned, dh_S = 2 * V * D + 2 * N * D, 4 * N * D
        # A second head in fp32 would be 4 V D.
        assert in_backward.peak < returned + dh_S + 2 * V * D
        assert [tuple(shape) for shape in in_backward.shapes].count((V, D)) == 1
    assert kept[1] - kept[0] == 37 * 100


def test_the_kernels_keep_as_many_numbers():
    assert lse.STATS.value == STATS


# --- models


@pytest.mark.parametrize(("family", "options"), [("Qwen3", {"tie_word_embeddings": True}),
                                                 ("Gemma2", {})])  # fmt: skip
def test_a_step_of_a_model_whose_embeddings_are_its_head(tmp_path, op, family, options):
    """Equal to eager in float64, through both uses of the one weight."""
    import tiny_qwen3
    from transformers import AutoModelForCausalLM

    tiny_qwen3.save_model(tmp_path, family=family, **options)
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    privileged = torch.cat([torch.full((2, 3), 7), ids], 1)

    def load(dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype,
                                                     attn_implementation="eager")  # fmt: skip
        assert model.lm_head.weight is model.get_input_embeddings().weight
        return model

    true = load(torch.float64)
    with torch.no_grad():
        log_q = true(privileged).logits[:, 3:].log_softmax(-1)
    log_p = true(ids).logits.log_softmax(-1)
    m = 0.5 * (log_p.exp() + log_q.exp())
    jsd = 0.5 * (log_p.exp() * (log_p - m.log()) + log_q.exp() * (log_q - m.log()))
    jsd.sum(-1).mean().backward()

    ours = load(torch.float32).to(op.device)
    head = LMHead.of(ours)
    assert head.weight.requires_grad
    with torch.no_grad():
        h_T = ours.model(privileged.to(op.device)).last_hidden_state[:, 3:]
    h_S = ours.model(ids.to(op.device)).last_hidden_state
    loss = fused_jsd_loss(h_S, h_T, head, workspace_mib=op.workspace_mib)
    loss.backward()
    torch.testing.assert_close(loss.double().cpu(), jsd.sum(-1).mean().detach(), rtol=1e-4, atol=0)
    for (name, got), expected in zip(ours.named_parameters(), true.parameters(), strict=True):
        step = 0.1 * got.grad.cpu().double(), 0.1 * expected.grad
        size = expected.grad.norm() + 1e-12
        assert (step[0] - step[1]).norm() < 1e-3 * 0.1 * size, name
