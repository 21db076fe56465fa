"""Engines: what they draw, and that nothing else decides it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_qwen3
import torch
from tiny_qwen3 import prepared, with_adapter

from opsd_train.run import held_out
from opsd_train.run.held_out import problems_at_once
from opsd_train.sampling import GenerateSampler, Sampling, draw_seed, roll_out
from opsd_train.sampling.generate import SeededDraws


def test_draws_have_the_distribution_of_the_logits():
    total = 20_000
    log_p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).log()
    scores = (log_p + 7.0).expand(total, 5)
    draws = SeededDraws([draw_seed(3, i) for i in range(total)], torch.device("cpu"))
    share = draws(torch.empty(0), scores).argmax(-1).bincount(minlength=5) / total
    # Six standard deviations.
    torch.testing.assert_close(share, log_p.exp(), rtol=0, atol=6 * (0.25 / total) ** 0.5)
    assert share[4] == 0


def test_a_rollout_does_not_depend_on_the_rollouts_beside_it(folder):
    setup = with_adapter(prepared(folder))
    problems, seeds = setup.problems[:5], [11, 12, 13, 14, 15]
    together = roll_out(setup.sampler, setup.contexts.student, problems, seeds)
    alone = [
        roll_out(setup.sampler, setup.contexts.student, [p], [s]).completions[0]
        for p, s in zip(problems, seeds, strict=True)
    ]
    by_two = prepared(folder, rollout_batch_size=2)
    with_adapter(by_two)
    assert together.completions == alone
    assert by_two.sampler.sample(together.prompts, seeds) == alone
    assert len({tuple(c) for c in alone}) == 5
    other = roll_out(setup.sampler, setup.contexts.student, problems[:1], [99])
    assert other.completions[0] != alone[0]


def test_a_cpu_samples_as_many_held_out_problems_at_once_as_fit(folder, monkeypatch):
    setup = prepared(folder, batch_size=2)
    context, problems = setup.contexts.student, setup.problems[:5]
    longest = max(map(len, context.token_ids(problems))) + setup.config.max_new_tokens
    of_one = 2 * 2 * 32 * 4 * longest  # keys and values, layers, features, bytes
    for room, size in ((0, 2), (3 * of_one - 1, 2), (3 * of_one, 3)):
        monkeypatch.setattr(held_out, "CPU_BYTES", room)
        assert problems_at_once(setup.config, setup, context, problems) == size
    elsewhere = replace(setup, accelerator=SimpleNamespace(device=torch.device("cuda")))
    assert problems_at_once(setup.config, elsewhere, context, problems) == 2


def test_the_model_does_not_decide_how_it_is_sampled(folder):
    """Its generation config has a top-k of 20, as Qwen3's."""
    setup = prepared(folder, temperature=5.0, max_new_tokens=1)
    prompts = setup.contexts.student.token_ids(setup.problems[:1])
    first = {c[0] for c in setup.sampler.sample(prompts * 99, list(range(99)))}
    assert len(first) > 30


def test_top_k_and_top_p(folder):
    setup = prepared(folder)
    prompts = setup.contexts.student.token_ids(setup.problems[:1])
    with torch.no_grad():
        logits = setup.model(input_ids=torch.tensor(prompts)).logits[0, -1] / 1.5
    likeliest = logits.argsort(descending=True).tolist()
    mass = logits.softmax(-1).sort(descending=True).values.cumsum(0)
    nucleus = int((mass < 0.5).sum()) + 1
    for options, size in (({"top_k": 3}, 3), ({"top_p": 0.5}, nucleus)):
        sampler = GenerateSampler(setup.model, setup.tokenizer, Sampling(1.5, 1, **options))
        first = {c[0] for c in sampler.sample(prompts * 200, list(range(200)))}
        assert first <= set(likeliest[:size])
        assert len(first) > 1


@pytest.mark.parametrize("family", tiny_qwen3.FAMILIES)
def test_a_low_temperature_draws_the_likeliest_token(folder, tmp_path, family):
    """Token by token, from the logits of whole sequences without a cache or padding."""
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / family, family=family)
    options = {"model": str(path), "temperature": 1e-4, **tiny_qwen3.adapter_options(family)}
    setup = with_adapter(prepared(folder, **options))
    rollout = roll_out(setup.sampler, setup.contexts.student, setup.problems[:3], [1, 2, 3])
    for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True):
        with torch.no_grad():
            logits = setup.model(input_ids=torch.tensor([prompt + completion])).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == completion
