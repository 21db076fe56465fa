"""Engines: what they draw, and that nothing else decides it."""

from dataclasses import replace

import pytest
import tiny_qwen3
import torch
from tiny_qwen3 import prepared, with_adapter
from transformers.generation.continuous_batching.requests import GenerationOutput

from opsd_train.errors import RunFailed
from opsd_train.models import base_model
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


@pytest.mark.parametrize("engine", ["generate", "continuous"])
def test_the_model_does_not_decide_how_it_is_sampled(folder, engine):
    """Its generation config has a top-k of 20, as Qwen3's."""
    setup = prepared(folder, engine=engine, temperature=5.0, max_new_tokens=1)
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
def test_engines_agree_where_there_is_nothing_to_draw(folder, tmp_path, family):
    no_cap = {"attn_logit_softcapping": None} if family == "Gemma2" else {}
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / family, family=family, **no_cap)
    options = {"model": str(path), "temperature": 1e-4, **tiny_qwen3.adapter_options(family)}
    both = []
    for engine in ("generate", "continuous"):
        setup = with_adapter(prepared(folder, engine=engine, **options))
        context, problems = setup.contexts.student, setup.problems[:3]
        both.append(roll_out(setup.sampler, context, problems, [1, 2, 3]))
    assert both[0] == both[1]
    assert both[1] == roll_out(setup.sampler, context, problems, [1, 2, 3])


def test_continuous_batching_without_the_models_attention_is_refused(folder, tmp_path):
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / "gemma", family="Gemma2")
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=50, .*--engine generate"):
        prepared(folder, model=str(path), engine="continuous")


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        ({"error": "CUDA out of memory. Tried to allocate 2 GiB"}, torch.OutOfMemoryError, "2 GiB"),
        ({"error": "a block is lost"}, RunFailed, r"completed 1 of 2 rollouts \(a block is lost\)"),
        ({"generated_tokens": []}, RunFailed, "completed 1 of 2 rollouts; go on with --resume"),
        (None, RunFailed, "completed 1 of 2 rollouts; go on with --resume"),
    ],
)
def test_a_request_that_failed_is_not_trained_on(folder, monkeypatch, failure, raised, message):
    setup = prepared(folder, engine="continuous")
    fine = GenerationOutput("a", generated_tokens=[5, 6])
    results = {"a": fine}
    if failure is not None:
        results["b"] = replace(fine, **failure)
    monkeypatch.setattr(base_model(setup.model), "generate_batch", lambda *_, **__: results)
    with pytest.raises(raised, match=message):
        setup.sampler.sample([[1], [2]], [1, 2])
