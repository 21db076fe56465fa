"""What a run says of a GPU's memory before its first step."""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from tiny_qwen3 import config, prepared, with_adapter

from benchmarks.lib.allocations import Allocations
from opsd_train.models import adapter_weights
from opsd_train.run import plan as room
from opsd_train.run.plan import GIB, MemoryPlan, Shape, plan_memory, probe


def counted(run: Callable[[], None]) -> int:
    with Allocations() as allocations:
        run()
    return allocations.peak


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"mlp_tokens": 256}])
def test_the_line_through_two_micro_batches(options, folder):
    """What a micro-batch three times as long takes is foretold, as it is counted."""
    asked = config(folder, max_new_tokens=1500, **options)
    setup = prepared(folder, max_new_tokens=1500, **options)
    plan = plan_memory(asked, setup, counted, there=0, available=GIB)
    actual = counted(lambda: probe(asked, setup, plan.shape))
    assert plan.shape.tokens > 1.4 * room.SHORT
    # Rather more than less: two rollouts take 11 % less than one as long as both.
    assert 0.95 * actual < plan.micro_batch < 1.15 * actual


def test_nothing_is_left_of_the_probe(folder):
    setup = with_adapter(prepared(folder))
    before = {n: w.detach().clone() for n, w in setup.model.named_parameters()}
    state = torch.get_rng_state()
    plan_memory(config(folder), setup, counted, there=0, available=GIB)
    assert torch.equal(torch.get_rng_state(), state)
    for name, w in setup.model.named_parameters():
        assert w.grad is None
        assert torch.equal(w, before[name])


def test_a_gradient_is_counted_once(folder):
    """What the probe holds at its end is the adapter's gradient; AdamW's averages come later."""
    setup = with_adapter(prepared(folder))
    adapter = list(adapter_weights(setup.model).values())
    plan = plan_memory(config(folder), setup, counted, there=0, available=GIB)
    loss = sum(w.sum() for w in adapter)
    with Allocations() as allocations:
        loss.backward()
        gradients = allocations.alive
        optimizer = torch.optim.AdamW(adapter)
        optimizer.step()
        assert allocations.alive - gradients == pytest.approx(plan.adapter, rel=0.01)


def test_the_largest_micro_batch(folder):
    setup = prepared(folder)
    contexts = setup.contexts
    prompt = max(map(len, contexts.student.token_ids(setup.problems)))
    teacher_prompt = max(map(len, contexts.teacher.token_ids(setup.problems)))
    for options, rollouts in (
        ({}, 1),
        ({"micro_batch_size": 3}, 3),
        ({"micro_batch_tokens": 1}, 1),
        ({"micro_batch_tokens": 4 * (teacher_prompt + 12)}, 4),
    ):
        largest = room.largest_micro_batch(config(folder, **options), setup)
        assert largest == Shape(rollouts, prompt, teacher_prompt, 12)


def test_what_is_said(folder):
    def peak(run: Callable[[], None]) -> int:
        run()
        return GIB + 2**20 * shapes[-1].tokens

    shapes: list[Shape] = []
    asked = config(folder, max_new_tokens=2048 - 100, micro_batch_size=8)
    setup = prepared(folder)
    largest = Shape(8, 100, 200, 1948)
    with (
        mock.patch.object(room, "probe", lambda _config, _setup, shape: shapes.append(shape)),
        mock.patch.object(room, "largest_micro_batch", return_value=largest),
    ):
        plan = plan_memory(asked, setup, peak, there=16 * GIB, available=80 * GIB)
    assert [shape.tokens for shape in shapes] == [1024, 2048]
    adapter = sum(w.numel() for w in adapter_weights(setup.model).values())
    assert plan == MemoryPlan(largest, 16 * GIB, 8 * adapter, GIB, 2**20, 80 * GIB)
    said = plan.describe(asked)
    assert "weights 16.0 GiB" in said
    assert "the largest micro-batch 17.0 (8 × up to 100 + 1,948 tokens" in said
    assert said.endswith("33.0 of 80.0 GiB.")

    small = replace(plan, available=24 * GIB)
    said = small.describe(asked)
    assert small.most_tokens == pytest.approx(7 * 1024, abs=2)
    assert "A micro-batch of 7,1" in said
    assert said.endswith(
        "would fit: lower --micro-batch-size, or ask for --offload-checkpoints, or for "
        "--mlp-tokens 4096, or lower --max-new-tokens."
    )
    nothing_left = config(folder, offload_checkpoints=True, mlp_tokens=1)
    assert small.describe(nothing_left).endswith("would fit: lower --max-new-tokens.")
