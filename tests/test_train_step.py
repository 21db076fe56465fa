"""What a step is made of: sampling, teachers, the objective and its statistics."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_qwen3
from tiny_qwen3 import config, prepared
from transformers.generation.continuous_batching.requests import GenerationOutput

from opsd_kernels.reference import reference_jsd_loss
from opsd_train.failures import RunFailed
from opsd_train.model import adapter_weights, base_model
from opsd_train.objective import opsd_loss, token_weights
from opsd_train.prompts import join
from opsd_train.records import Scores
from opsd_train.rollout import GenerateSampler, Sampling, SeededDraws, draw_seed, roll_out
from opsd_train.score import score
from opsd_train.step import problem_indices
from opsd_train.train import has_stalled


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3")
    tiny_qwen3.save_qwen3(path / "model")
    tiny_qwen3.save_problems(path / "problems.jsonl")
    return path


def with_adapter(setup, std=0.3):
    """An adapter that does something, on a model that was just prepared."""
    torch.manual_seed(1)
    for name, weight in adapter_weights(setup.model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    return setup


# Sampling


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


def test_engines_agree_where_there_is_nothing_to_draw(folder):
    both = []
    for engine in ("generate", "continuous"):
        setup = with_adapter(prepared(folder, engine=engine, temperature=1e-4))
        context, problems = setup.contexts.student, setup.problems[:3]
        both.append(roll_out(setup.sampler, context, problems, [1, 2, 3]))
    assert both[0] == both[1]
    assert both[1] == roll_out(setup.sampler, context, problems, [1, 2, 3])


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


def test_every_problem_once_before_any_comes_again(folder):
    asked = config(folder, batch_size=4)
    drawn = [i for step in range(1, 11) for i in problem_indices(10, asked, step)]
    for epoch in range(4):
        assert sorted(drawn[10 * epoch : 10 * (epoch + 1)]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    other = config(folder, batch_size=4, seed=1)
    assert problem_indices(10, other, 1) != drawn[:4]


# Teachers


def scored(setup) -> Scores:
    context = setup.contexts.student
    rollout = roll_out(setup.sampler, context, setup.problems[:3], [1, 2, 3])
    # Both in the student's context, so that only the weights differ.
    return score(setup.backbone, setup.teacher, context, rollout)


def test_the_initial_teacher_is_the_model_without_its_adapter(folder):
    setup = prepared(folder)
    untrained = scored(setup)
    assert torch.equal(untrained.h_student, untrained.h_teacher)
    scores = scored(with_adapter(setup))
    assert not torch.allclose(scores.h_student, scores.h_teacher)
    assert scores.h_student.requires_grad
    assert not scores.h_teacher.requires_grad


def test_the_live_teacher_is_the_student(folder):
    scores = scored(with_adapter(prepared(folder, teacher="live")))
    assert torch.equal(scores.h_student, scores.h_teacher)


def test_the_ema_teacher_wears_the_average(folder):
    setup = prepared(folder, teacher="ema", ema_decay=0.75)
    weights = adapter_weights(setup.model)
    average = {name: w.detach().clone() for name, w in weights.items()}
    for _ in range(3):
        with torch.no_grad():
            for w in weights.values():
                w.add_(0.1 * torch.randn_like(w))
        setup.teacher.follow()
        average = {n: 0.75 * a + 0.25 * weights[n].detach() for n, a in average.items()}
    student = {name: w.detach().clone() for name, w in weights.items()}
    context = setup.contexts.student
    rollout = roll_out(setup.sampler, context, setup.problems[:3], [1, 2, 3])
    h_teacher = score(setup.backbone, setup.teacher, context, rollout).h_teacher
    for name, w in weights.items():
        assert torch.equal(w, student[name])
        torch.testing.assert_close(setup.teacher.state()[name], average[name])
        w.data.copy_(average[name])
    h_average = setup.backbone(*join(rollout.prompts, rollout.completions, pad_id=0))
    torch.testing.assert_close(h_teacher, h_average, rtol=1e-3, atol=1e-4)


def test_another_model_as_the_teacher(folder, tmp_path):
    tiny_qwen3.save_qwen3(tmp_path / "other", seed=5)
    setup = prepared(folder, teacher_model=str(tmp_path / "other"))
    scores = scored(with_adapter(setup))
    alone = prepared(folder, model=str(tmp_path / "other"))
    assert torch.equal(setup.teacher.W, alone.W)
    context = setup.contexts.student
    rollout = roll_out(setup.sampler, context, setup.problems[:3], [1, 2, 3])
    h = alone.backbone(*join(rollout.prompts, rollout.completions, pad_id=0))
    torch.testing.assert_close(scores.h_teacher, h.detach())
    weights = token_weights(scores.lengths, "token", 3, len(scores.tokens))
    loss, _ = opsd_loss(scores, setup.W, config(folder), weights, setup.teacher.W)
    expected = reference_jsd_loss(
        scores.h_student, scores.h_teacher, setup.W, temperature=1.2, W_teacher=setup.teacher.W
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_head_sees_neither_prompt_nor_completion(folder):
    setup = prepared(folder)
    rollout = roll_out(setup.sampler, setup.contexts.student, setup.problems[:2], [1, 2])

    def refuse(*_):
        raise AssertionError("the LM head was called")

    base_model(setup.model).get_output_embeddings().register_forward_pre_hook(refuse)
    scores = score(setup.backbone, setup.teacher, setup.contexts.teacher, rollout)
    assert scores.h_student.shape == scores.h_teacher.shape == (rollout.tokens, 32)


# Objective


@pytest.mark.parametrize("mean", ["rollout", "token"])
@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.0, "entry_clip": 0.01}, {"objective": "sampled_token"}]
)
def test_micro_batches_add_up(folder, mean, options):
    """Loss, statistics and gradient of a batch of 3 and of its parts."""
    setup = with_adapter(prepared(folder))
    asked = config(folder, mean=mean, **options)
    rollout = roll_out(setup.sampler, setup.contexts.student, setup.problems[:3], [1, 2, 7])
    rollout.completions[1][4:] = []
    weights = adapter_weights(setup.model)
    results = []
    for size in (3, 2, 1):
        setup.model.zero_grad()
        totals: dict[str, float] = {}
        for part in rollout.micro_batches(size):
            scores = score(setup.backbone, setup.teacher, setup.contexts.teacher, part)
            w = token_weights(scores.lengths, mean, len(rollout), rollout.tokens)
            loss, told = opsd_loss(scores, setup.W, asked, w)
            loss.backward()
            for name, value in {"loss": loss.detach(), **told}.items():
                totals[name] = totals.get(name, 0) + float(value)
        results.append((totals, torch.cat([w.grad.flatten() for w in weights.values()])))
    for totals, gradient in results[1:]:
        assert totals == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        error = (gradient - results[0][1]).norm() / results[0][1].norm()
        assert error < 1e-4


def test_statistics_are_means_of_the_batch(folder):
    setup = with_adapter(prepared(folder))
    rollout = roll_out(setup.sampler, setup.contexts.student, setup.problems[:3], [1, 2, 3])
    scores = score(setup.backbone, setup.teacher, setup.contexts.teacher, rollout)
    weights = token_weights(scores.lengths, "token", 3, rollout.tokens)
    asked = config(folder, beta=0.0, entry_clip=0.01, temperature=1.3)
    loss, told = opsd_loss(scores, setup.W, asked, weights)
    log_p = (scores.h_student.detach() @ setup.W.T / 1.3).log_softmax(-1)
    log_q = (scores.h_teacher @ setup.W.T / 1.3).log_softmax(-1)
    p, q, x = log_p.exp(), log_q.exp(), log_q - log_p
    expected = {
        "forward_kl": (q * x).sum(-1),
        "reverse_kl": (-p * x).sum(-1),
        "entropy_student": -(p * log_p).sum(-1),
        "entropy_teacher": -(q * log_q).sum(-1),
        "log_ratio": x.gather(1, scores.tokens[:, None])[:, 0],
    }
    for name, values in expected.items():
        assert float(told[name]) == pytest.approx(float(values.mean()), rel=1e-3), name
    assert float(loss.detach()) == pytest.approx(
        float((q * x).clamp(max=0.01).sum(-1).mean()), rel=1e-3
    )
    assert float(told["clipped_share"]) > 0.1


def test_early_stop():
    def rows(*losses):
        return [{"step": 0}, *({"loss": x, "skipped": x is None} for x in losses)]

    assert not has_stalled(rows(3, 2, 1, 1), None)
    assert not has_stalled(rows(3, 3, 3), 2)
    assert has_stalled(rows(3, 3, 3, 3), 2)
    assert has_stalled(rows(9, 1, 2, None, 1, 2), 2)
    assert not has_stalled(rows(1, 2, 2, 0.5), 2)
