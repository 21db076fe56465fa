"""`fused_top_k` against whole logits in float64: entries, their order, and the mass of the rest."""

import math
import re
from unittest import mock

import pytest
import torch
from heads import EXTRAS, Extras, as_head, logits, size_of_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import language_like_inputs, random_inputs
from schedules import DEVICE
from test_no_waiting import Waiting
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lib.allocations import Allocations, fake_device
from opsd_kernels import LMHead, TopK, debug, fused_top_k, reference_top_k, replay
from opsd_kernels.schedules import top_k

MIB = 2**20
DEVICES = sorted({"cpu", DEVICE.type})
# Of errors of log-probabilities, in last bits of the largest numbers that may enter them: at most
# 1.8 in hundreds of cases.
UNITS = 3.0


def textbook(h: Tensor, W: Tensor | LMHead, k: int, targets: Tensor, temperature: float) -> TopK:
    log_p = logits(h, W, temperature).log_softmax(-1)
    ordered, ids = log_p.sort(dim=-1, descending=True, stable=True)
    rest = torch.cat([ordered[:, k:], torch.full_like(ordered[:, :1], -torch.inf)], 1)
    return TopK(
        ids[:, :k].masked_fill(ordered[:, :k] == -torch.inf, -1),
        ordered[:, :k],
        rest.logsumexp(-1),
        log_p.gather(-1, targets[:, None]).squeeze(-1),
    )


def test_oracle_is_the_textbook():
    """And a token that is dropped, or whose target is outside of the vocabulary, is as said."""
    h, _, W = (t.double() for t in random_inputs(8, 30, 6))
    head, _ = Extras(bias="with bans", softcap=5.0).heads(W, None, 0)
    targets, weights = torch.arange(8), torch.arange(8) % 3
    for k in (1, 7, 30):
        options = {"targets": targets, "temperature": 0.7}
        found = reference_top_k(h, head, k, **options)
        for got, exact in zip(found, textbook(h, head, k, targets, 0.7), strict=True):
            torch.testing.assert_close(got, exact)
        found = reference_top_k(h, head, k, token_weights=weights, **options)
        narrow = h.float(), head._replace(weight=head.weight.float(), bias=head.bias.float())
        fused = fused_top_k(*narrow, k, token_weights=weights, **options)
        for got, exact in zip(fused, found, strict=True):
            torch.testing.assert_close(got.to(exact), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="k must lie in"):
        reference_top_k(h, head, 31)


def check(found: TopK, h: Tensor, head: LMHead, targets: Tensor, temperature: float) -> None:
    """Log-probabilities to the rounding of logits; an entry may change places with one as near."""
    k = found.ids.shape[1]
    true = textbook(h, head, k, targets, temperature)
    log_p = logits(h, head, temperature).log_softmax(-1)
    V = log_p.shape[1]
    size = size_of_logits(h, as_head(head))
    if head.softcap is not None:
        size = size.clamp(max=head.softcap)
    unit = 2**-24 * (2 * size / temperature + math.log(V) + 1)
    assert (found.ids == -1).equal(true.ids == -1)
    assert all(len(set(row)) == k for row in found.ids[(found.ids != -1).all(1)].tolist())
    at_ids = log_p.gather(-1, found.ids.clamp(min=0)).masked_fill(found.ids == -1, -torch.inf)
    for got, exact in (
        (found.log_probs, true.log_probs),
        (found.log_probs, at_ids),
        (found.log_rest, true.log_rest),
        (found.logp_targets, true.logp_targets),
    ):
        assert got.dtype == torch.float32
        assert got.isinf().equal(exact.isinf())
        error = (got.double() - exact).masked_fill(exact.isinf(), 0).abs()
        assert (error <= UNITS * unit.reshape(-1, *[1] * (error.ndim - 1))).all(), error


@given(
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    N=st.integers(1, 20),
    V=st.integers(1, 300),
    extras=EXTRAS,
    peaked=st.booleans(),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
    workspace_mib=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_any_input(data, dtype, N, V, extras, peaked, temperature, workspace_mib, seed):
    k = data.draw(st.integers(1, V))
    inputs = language_like_inputs if peaked else random_inputs
    h, _, W = inputs(N, V, 12, dtype, distance=0.1, seed=seed)
    head, _ = (extras or Extras()).heads(W, None, seed)
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    found = fused_top_k(
        h, head, k, targets=targets, temperature=temperature, workspace_mib=workspace_mib
    )
    check(found, h, head, targets, temperature)


@pytest.mark.parametrize("k", [1, 7, 64, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_many_chunks_and_blocks(k, dtype, device):
    h, _, W = language_like_inputs(70, 2000, 24, dtype, 0.1)
    head = LMHead(torch.stack([W, W], -1)[..., 0])  # with strides
    targets = torch.arange(70) * 9
    args = h.to(device), LMHead(head.weight.to(device)), k
    for workspace_mib in (None, 0.6):
        options = {"targets": targets.to(device), "workspace_mib": workspace_mib}
        found = fused_top_k(*args, **options)
        check(TopK(*(t.cpu() for t in found)), h, head, targets, 1.0)
    again = fused_top_k(*args, **options)
    assert all(a.equal(b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workspace_mib", [None, 0.3])
@pytest.mark.parametrize("device", DEVICES)
def test_equal_logits_are_in_the_order_of_ids(dtype, workspace_mib, device):
    """Products of whole numbers are exact, and the same in all blocks."""
    g = torch.Generator().manual_seed(1)
    h = torch.randint(-2, 3, (40, 6), generator=g).to(dtype)
    W = torch.randint(-2, 3, (700, 6), generator=g).to(dtype)
    h[3] = 0
    for k in (1, 30, 700):
        ids = fused_top_k(h.to(device), W.to(device), k, workspace_mib=workspace_mib).ids.cpu()
        assert ids.equal(textbook(h, W, k, torch.zeros(40, dtype=torch.int64), 1.0).ids)
    assert ids[3].equal(torch.arange(700))


def test_keys():
    """In the order of numbers, then of ids; a key holds both."""
    z = [math.inf, 3.4e38, 1.5, 1e-45, 0.0, -0.0, -1e-45, -1.5, -3.4e38, -math.inf]
    ids = torch.tensor([2**31, 9, 8, 7, 6, 6, 5, 4, 3, 2**32 - 2])
    keys = top_k._keys(torch.tensor([z]), ids)
    assert keys[0].sort(descending=True).values.equal(keys[0])
    assert keys[0, 4] == keys[0, 5]
    assert (keys > top_k.BANNED).all()
    assert top_k._logits(keys).tolist() == torch.tensor([z]).tolist()
    assert top_k._ids(keys)[0].equal(ids)
    assert top_k._keys(torch.zeros(1, 3), torch.tensor([5, 0, 9])).argmax() == 1


def test_a_small_rest_is_summed_not_subtracted():
    """Rests from 1e-1 to 1e-12, where 1 − Σ p has no digits left."""
    N, V, k = 60, 1000, 4
    h, _, W = language_like_inputs(N, V, 64, torch.float32, 0.0)
    targets = torch.arange(N)
    found = fused_top_k(h, W, k, targets=targets, temperature=0.5, workspace_mib=0.6)
    check(found, h, LMHead(W), targets, 0.5)
    true = textbook(h, W, k, targets, 0.5).log_rest
    assert true.min() < math.log(1e-12)
    assert true.max() > math.log(1e-1)
    subtracted = (-torch.expm1(found.log_probs.logsumexp(-1))).log()
    assert not ((subtracted - true).abs() < 0.1).all()


def test_banned_entries():
    h, _, W = random_inputs(5, 9, 8)
    bias = torch.full((9,), -torch.inf)
    bias[[2, 7]] = 0.5
    head, targets = LMHead(W, bias, softcap=3.0), torch.tensor([2, 0, 7, 2, 8])
    found = fused_top_k(h, head, 4, targets=targets)
    assert (found.ids[:, 2:] == -1).all()
    assert (found.ids[:, :2].sort(1).values == torch.tensor([2, 7])).all()
    check(found, h, head, targets, 1.0)
    with pytest.raises(ValueError, match="leave at least one entry"):
        fused_top_k(h, LMHead(W, torch.full((9,), -torch.inf)), 4, targets=targets)


def test_dropped_tokens():
    """Whatever they are. Only whether a weight is 0 matters."""
    h, _, W = random_inputs(6, 50, 8)
    targets, weights = torch.arange(6), torch.tensor([1.0, 0.0, -2.0, 0.0, 0.5, 3.0])
    whole = fused_top_k(h, W, 5, targets=targets)
    h[1], h[3], targets[1] = torch.nan, torch.inf, 99
    found = fused_top_k(h, W, 5, targets=targets, token_weights=weights)
    for got, all_of_them, dropped in zip(found, whole, (-1, -torch.inf, 0, 0), strict=True):
        assert got[weights != 0].equal(all_of_them[weights != 0])
        assert (got[weights == 0] == dropped).all()
    assert fused_top_k(h, W, 5).log_probs.isnan().any(1).tolist() == [False, True] * 2 + [False] * 2


@pytest.mark.parametrize("leading", [(2, 3), (), (0,), (4, 0)])
def test_leading_shapes(leading):
    h, W = torch.randn(*leading, 8), torch.randn(30, 8)
    targets = torch.ones(leading, dtype=torch.int32)
    found = fused_top_k(h, W, 5, targets=targets, token_weights=torch.ones(leading))
    assert found.ids.shape == found.log_probs.shape == (*leading, 5)
    assert found.log_rest.shape == found.logp_targets.shape == leading
    assert found.ids.dtype == torch.int64
    assert fused_top_k(h, W, 5).logp_targets is None


def test_there_is_no_gradient():
    h, _, W = (t.requires_grad_() for t in random_inputs(6, 50, 8))
    head = LMHead(W, torch.zeros(50, requires_grad=True))
    found = fused_top_k(h, head, 5, targets=torch.arange(6))
    assert not any(t.requires_grad for t in found)


def test_autocast():
    """Operands are rounded, everything else is in fp32."""
    h, _, W = random_inputs(6, 50, 8)
    rounded = fused_top_k(h.bfloat16(), W.bfloat16(), 5, targets=torch.arange(6))
    with torch.autocast("cpu", torch.bfloat16):
        found = fused_top_k(h.bfloat16(), W, 5, targets=torch.arange(6))
    assert all(a.equal(b) for a, b in zip(found, rounded, strict=True))


def test_one_graph():
    """For several batch sizes: the second compiles once more, with N a symbol; the third not."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    h, _, W = random_inputs(6, 50, 8)

    def call(h: Tensor) -> TopK:
        kept = torch.arange(len(h)) != 2
        return fused_top_k(2 * h, W, 5, targets=torch.arange(len(h)), token_weights=kept)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for N in (6, 5, 4):
        for a, b in zip(call(h[:N]), compiled(h[:N]), strict=True):
            assert a.equal(b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("workspace_mib", [None, 0.6])
def test_one_pass(workspace_mib):
    h, _, W = random_inputs(70, 500, 16, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        fused_top_k(h, W, 7, targets=torch.arange(70), workspace_mib=workspace_mib)
    assert counter.get_total_flops() == 2 * 70 * 500 * 16


@pytest.mark.parametrize(("k", "workspace_mib"), [(1, 0.5), (64, 0.5), (64, 2), (500, 2)])
def test_temporaries_are_within_the_workspace(k, workspace_mib):
    """[N, V] in fp32 would take 4 MiB."""
    N, V, D = 100, 10_000, 16
    h, _, W = random_inputs(N, V, D, torch.bfloat16)
    with Allocations(smallest=64) as allocations:
        found = fused_top_k(h, W, k, targets=torch.arange(N), workspace_mib=workspace_mib)
    returned = sum(t.nbytes for t in found) + 64 * N
    assert allocations.peak - returned <= workspace_mib * MIB
    assert allocations.peak - returned > workspace_mib * MIB / 4


def test_on_a_gpu():
    """By default 64 MiB, and nothing waits for the host."""
    N, V = 1100, 20_000
    with fake_device("cuda"):
        h, W = torch.empty(N, 64, dtype=torch.bfloat16), torch.empty(V, 64, dtype=torch.bfloat16)
        targets, weights = torch.empty(N, dtype=torch.int64), torch.empty(N)
        with Allocations(smallest=64) as allocations, Waiting() as waiting:
            found = fused_top_k(h, W, 64, targets=targets, token_weights=weights)
    returned = 2 * sum(t.nbytes for t in found) + 64 * N
    assert 16 * MIB < allocations.peak - returned <= 64 * MIB
    assert waiting.seen == []


def test_bad_arguments():
    h, _, W = random_inputs(6, 50, 8)
    for k, error, message in (
        (True, TypeError, "k must be an int, got bool"),
        (5.0, TypeError, "k must be an int, got float"),
        (0, ValueError, "k must lie in [1, 50], the number of entries of the vocabulary, got 0"),
        (51, ValueError, "k must lie in [1, 50], the number of entries of the vocabulary, got 51"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            fused_top_k(h, W, k)
    padded = LMHead(torch.cat([W, W]), vocab_size=50)
    with pytest.raises(ValueError, match="got 51"):
        fused_top_k(h, padded, 51)
    for options, message in (
        ({"targets": torch.zeros(5, dtype=torch.int64)}, "targets must have the leading shape [6]"),
        ({"targets": torch.full((6,), 50)}, "targets must lie in [0, 50)"),
        ({"temperature": 0.0}, "temperature must"),
        ({"workspace_mib": -1}, "workspace_mib must be finite and not negative"),
        ({"workspace_mib": 1e-3}, "workspace_mib=0.001 cannot hold the 5 likeliest entries"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            fused_top_k(h, W, 5, **options)
    with pytest.raises(TypeError, match="targets must be integers"):
        fused_top_k(h, W, 5, targets=torch.zeros(6))


def test_an_id_outside_of_the_vocabulary_that_is_not_read():
    """As on a GPU, where contents are not checked."""
    h, _, W = random_inputs(3, 50, 8)
    with mock.patch("opsd_kernels.checks.is_readable", return_value=False):
        found = fused_top_k(h, W, 5, targets=torch.tensor([1, 50, -1]))
    assert found.logp_targets.isnan().tolist() == [False, True, True]


def test_a_pass_can_be_computed_again(monkeypatch, tmp_path):
    monkeypatch.setattr(debug, "FOLDER", str(tmp_path))
    h, _, W = random_inputs(3, 50, 8)
    found = fused_top_k(h, W, 5, targets=torch.arange(3))
    monkeypatch.setattr(debug, "FOLDER", None)
    (path,) = tmp_path.iterdir()
    line, made = replay.replay(path)
    assert "makes ids, log_probs, log_rest, logp_targets; " in line
    assert made["ids"].equal(found.ids)
    assert made["log_rest"].equal(found.log_rest)
