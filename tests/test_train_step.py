"""A step: which problems it takes, rows aligned, teacher unmoved, learning rates."""

import itertools

import pytest
import torch
from accelerate import Accelerator
from tiny_qwen3 import config
from training_runs import demo_config

from opsd_train.command_line import parse
from opsd_train.config import make_config
from opsd_train.demo import build_model, build_tokenizer, make_problem
from opsd_train.grading import Verdict, grade
from opsd_train.models import adapter_weights, base_model, base_weights_sha256
from opsd_train.opsd import Setup, opsd_loss, score, token_weights
from opsd_train.opsd.step import learning_rate, problem_indices
from opsd_train.records import Rollout, Scores
from opsd_train.run import set_up
from opsd_train.sampling import GenerateSampler, Sampling, roll_out


@pytest.fixture
def tiny() -> Setup:
    """A randomly initialised model with an adapter that does something, its tokenizer, problems of
    different lengths."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    problems = [make_problem(a, b) for a, b in [(1234, 5), (7, 6), (98, 3), (31415, 9)]]
    setup = set_up(
        demo_config(lora_rank=4, lora_alpha=8),
        Accelerator(cpu=True),
        build_model(tokenizer),
        tokenizer,
        problems,
    )
    for name, weight in adapter_weights(setup.model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return setup


def sampled(tiny: Setup, temperature: float, max_new_tokens: int, problems=None) -> Rollout:
    sampler = GenerateSampler(tiny.model, tiny.tokenizer, Sampling(temperature, max_new_tokens))
    problems = problems or tiny.problems
    return roll_out(sampler, tiny.contexts.student, problems, seeds=list(range(len(problems))))


def scored(tiny: Setup, rollout: Rollout) -> Scores:
    return score(tiny.backbone, tiny.teacher, tiny.contexts.teacher, rollout)


def loss_of(tiny: Setup, scores: Scores, **options) -> torch.Tensor:
    weights = token_weights(scores.lengths, "rollout", len(scores.lengths), len(scores.tokens))
    loss, _ = opsd_loss(scores, tiny.head, demo_config(**options), weights)
    return loss


def test_row_n_predicts_token_n(tiny):
    """Off by one here trains nonsense quietly. Recomputed sequence by sequence, without padding,
    from the model's full logits."""
    model, W = tiny.model, tiny.head.weight
    rollout = sampled(tiny, temperature=1.2, max_new_tokens=20)
    assert len({len(c) for c in rollout.completions}) > 1, "the test wants ragged completions"
    assert len({len(p) for p in rollout.prompts}) > 1, "the test wants ragged prompts"
    scores = scored(tiny, rollout)

    expected = {"student": [], "teacher": []}
    for problem, completion in zip(rollout.problems, rollout.completions, strict=True):
        for who in ("student", "teacher"):
            (prompt_ids,) = getattr(tiny.contexts, who).token_ids([problem])
            ids = torch.tensor([prompt_ids + completion])
            with torch.no_grad():
                if who == "teacher":
                    with model.disable_adapter():
                        logits = model(input_ids=ids).logits
                else:
                    logits = model(input_ids=ids).logits
            log_probs = logits[0, :-1].log_softmax(-1)
            predicted = log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
            expected[who].append(predicted[-len(completion) :])
    for h, who in ((scores.h_student, "student"), (scores.h_teacher, "teacher")):
        log_probs = (h @ W.T).log_softmax(-1).gather(1, scores.tokens[:, None]).squeeze(1)
        torch.testing.assert_close(log_probs, torch.cat(expected[who]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores.h_student, scores.h_teacher, atol=1e-2)


def test_objective_is_the_mean_over_tokens_then_rollouts(tiny):
    W = tiny.head.weight
    rollout = sampled(tiny, temperature=1.2, max_new_tokens=20)
    scores = scored(tiny, rollout)
    log_p = (scores.h_student @ W.T / 1.2).log_softmax(-1)
    log_q = (scores.h_teacher @ W.T / 1.2).log_softmax(-1)
    log_m = (0.5 * log_p.exp() + 0.5 * log_q.exp()).log()
    jsd = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
    rollouts = jsd.split([len(c) for c in rollout.completions])
    expected = torch.stack([r.mean() for r in rollouts]).mean()
    loss = loss_of(tiny, scores, temperature=1.2)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)


def test_gradient_reaches_the_adapter_and_nothing_else(tiny):
    model = tiny.model
    before = base_weights_sha256(model)
    scores = scored(tiny, sampled(tiny, temperature=1.0, max_new_tokens=8))
    assert not scores.h_teacher.requires_grad
    loss_of(tiny, scores).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and weight.grad.any()) == ("lora_" in name), name
    torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1.0).step()
    assert base_weights_sha256(model) == before
    with torch.no_grad():
        next(w for n, w in base_model(model).named_parameters() if "base_layer" in n)[0, 0] += 1e-6
    assert base_weights_sha256(model) != before


def test_token_ids_are_never_re_encoded(tiny, monkeypatch):
    """A completion whose text would be read back differently keeps the ids that were sampled."""
    tokenizer, problems = tiny.tokenizer, tiny.problems[:1]
    odd = [tokenizer.pad_token_id, 9, tokenizer.pad_token_id, 8, tokenizer.eos_token_id]
    rollout = Rollout(problems, tiny.contexts.student.token_ids(problems), [odd], [True])
    monkeypatch.setattr(type(tokenizer), "decode", None)
    monkeypatch.setattr(type(tokenizer), "batch_decode", None)
    assert scored(tiny, rollout).tokens.tolist() == odd


def test_completions_stop_at_the_end_of_text(tiny):
    tokenizer = tiny.tokenizer
    rollout = sampled(tiny, temperature=1.2, max_new_tokens=12, problems=tiny.problems * 4)
    for completion, finished in zip(rollout.completions, rollout.finished, strict=True):
        assert (completion[-1] == tokenizer.eos_token_id) == finished
        assert tokenizer.eos_token_id not in completion[:-1]
        assert finished or len(completion) == 12
    graded = grade(tokenizer, rollout, lambda problem, text: Verdict(False))
    prompts = [tiny.contexts.student.text(p) for p in tiny.problems * 4]
    assert [g.prompt for g in graded] == prompts


def test_every_problem_once_before_any_comes_again(folder):
    asked = config(folder, batch_size=4)
    drawn = [i for step in range(1, 11) for i in problem_indices(10, asked, step)]
    for epoch in range(4):
        assert sorted(drawn[10 * epoch : 10 * (epoch + 1)]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    other = config(folder, batch_size=4, seed=1)
    assert problem_indices(10, other, 1) != drawn[:4]


def test_schedules():
    cosine = make_config(
        {"model": "m", "data": "d", "steps": 10, "warmup": 0.2, "learning_rate": 1}
    )
    rates = [learning_rate(cosine, step) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[1:]))
    constant = parse(["qwen3-4b-authors-2026-05"])
    assert {learning_rate(constant, step) for step in range(1, 101)} == {5e-6}
