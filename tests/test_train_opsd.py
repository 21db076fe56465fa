"""Who scores a rollout, the objective and its statistics. A whole step is in test_train_step.py."""

from types import SimpleNamespace

import pytest
import tiny_qwen3
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_qwen3 import config, prepared, with_adapter

from opsd_kernels.reference import reference_divergence_loss, reference_jsd_loss
from opsd_train.data import join
from opsd_train.models import adapter_weights, base_model
from opsd_train.opsd import opsd_loss, score, token_weights
from opsd_train.opsd.step import by_tokens, micro_batches
from opsd_train.records import Rollout, Scores
from opsd_train.sampling import roll_out

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


def test_the_ema_teacher_has_the_average_of_the_adapter(folder):
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
    tiny_qwen3.save_model_and_tokenizer(tmp_path / "other", seed=5)
    setup = prepared(folder, teacher_model=str(tmp_path / "other"))
    scores = scored(with_adapter(setup))
    alone = prepared(folder, model=str(tmp_path / "other"))
    assert torch.equal(setup.teacher.head.weight, alone.head.weight)
    context = setup.contexts.student
    rollout = roll_out(setup.sampler, context, setup.problems[:3], [1, 2, 3])
    h = alone.backbone(*join(rollout.prompts, rollout.completions, pad_id=0))
    torch.testing.assert_close(scores.h_teacher, h.detach())
    weights = token_weights(scores.lengths, "token", 3, len(scores.tokens))
    loss, _ = opsd_loss(scores, setup.head, config(folder), weights, setup.teacher.head)
    expected = reference_jsd_loss(
        scores.h_student,
        scores.h_teacher,
        setup.head,
        temperature=1.2,
        W_teacher=setup.teacher.head,
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


# Models of other families


def logits_of_the_model(setup, rollout: Rollout, context) -> torch.Tensor:
    """[N, V] of the completions' tokens, sequence by sequence, as the model makes them."""
    prompts = context.token_ids(rollout.problems)
    rows = []
    for prompt, completion in zip(prompts, rollout.completions, strict=True):
        logits = setup.model(input_ids=torch.tensor([prompt + completion])).logits[0]
        rows.append(logits[len(prompt) - 1 : -1])
    return torch.cat(rows)


@pytest.mark.parametrize("family", tiny_qwen3.FAMILIES)
def test_the_loss_is_that_of_the_models_logits(folder, tmp_path, family):
    """And so is its gradient, of every family: scale, cap and bias of the head included."""
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / family, family=family)
    setup = with_adapter(prepared(folder, model=str(path), **tiny_qwen3.adapter_options(family)))
    context = setup.contexts.student
    rollout = roll_out(setup.sampler, context, setup.problems[:3], [1, 2, 3])
    scores = score(setup.backbone.train(), setup.teacher, setup.contexts.teacher, rollout)
    weights = token_weights(scores.lengths, "token", 3, rollout.tokens)
    setup.model.eval()
    z_student = logits_of_the_model(setup, rollout, context)
    with setup.model.disable_adapter(), torch.no_grad():
        z_teacher = logits_of_the_model(setup, rollout, setup.contexts.teacher)
    identity = torch.eye(z_student.shape[1])
    adapter = list(adapter_weights(setup.model).values())
    both = {"beta": None, "forward_weight": 0.3, "reverse_weight": 0.7}
    for options in ({"beta": 0.0}, {"beta": 0.5}, both):
        asked = config(folder, temperature=1.3, **options)
        loss, _ = opsd_loss(scores, setup.head, asked, weights, setup.teacher.head)
        exact = reference_divergence_loss(
            z_student, z_teacher, identity, asked.divergence, temperature=1.3
        )
        assert exact > 1e-3
        torch.testing.assert_close(loss, exact.float(), rtol=1e-3, atol=0)
        gradient, expected = (
            torch.cat([g.flatten() for g in torch.autograd.grad(of, adapter, retain_graph=True)])
            for of in (loss, exact)
        )
        assert (gradient - expected).norm() < 1e-3 * expected.norm()


def test_a_teacher_of_another_family_and_width(folder, tmp_path):
    """Each side has its own cap."""
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / "other", family="Gemma2", hidden_size=48)
    setup = with_adapter(prepared(folder, teacher_model=str(path)))
    assert (setup.head.softcap, setup.teacher.head.softcap) == (None, 3.0)
    context = setup.contexts.student
    rollout = roll_out(setup.sampler, context, setup.problems[:3], [1, 2, 3])
    scores = score(setup.backbone, setup.teacher, context, rollout)
    assert scores.h_teacher.shape[1] == 48
    weights = token_weights(scores.lengths, "token", 3, rollout.tokens)
    loss, _ = opsd_loss(scores, setup.head, config(folder), weights, setup.teacher.head)
    alone = prepared(folder, model=str(path))
    z_teacher = logits_of_the_model(alone, rollout, context).detach()
    expected = reference_jsd_loss(
        scores.h_student,
        z_teacher,
        setup.head,
        temperature=1.2,
        W_teacher=torch.eye(z_teacher.shape[1]),
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)


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
            loss, statistics = opsd_loss(scores, setup.head, asked, w)
            loss.backward()
            for name, value in {"loss": loss.detach(), **statistics}.items():
                totals[name] = totals.get(name, 0) + float(value)
        results.append((totals, torch.cat([w.grad.flatten() for w in weights.values()])))
    for totals, gradient in results[1:]:
        assert totals == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        error = (gradient - results[0][1]).norm() / results[0][1].norm()
        assert error < 1e-4


@pytest.mark.parametrize("most", [1, 60, 100, 10_000])
@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_of_tokens_add_up(folder, most, packed):
    """Loss and gradient of a batch, one rollout at a time and up to a number of tokens."""
    setup = with_adapter(prepared(folder))
    rollout = roll_out(setup.sampler, setup.contexts.student, setup.problems[:4], [1, 2, 7, 9])
    rollout.completions[1][4:] = []
    rollout.completions[3][1:] = []
    results = []
    for asked in (config(folder), config(folder, micro_batch_tokens=most)):
        setup.model.zero_grad()
        together = packed and asked.micro_batch_tokens is not None
        parts = micro_batches(asked, setup.accelerator, setup.contexts, rollout, together)
        losses = 0.0
        for part in parts:
            scores = score(setup.backbone, setup.teacher, setup.contexts.teacher, part, together)
            w = token_weights(scores.lengths, "rollout", len(rollout), rollout.tokens)
            loss, _ = opsd_loss(scores, setup.head, asked, w)
            loss.backward()
            losses += float(loss)
        gradient = [w.grad.flatten() for w in adapter_weights(setup.model).values()]
        results.append((losses, torch.cat(gradient)))
    assert len(parts) == {1: 4, 10_000: 1}.get(most, len(parts))
    (loss, gradient), (others, other_gradient) = results
    assert others == pytest.approx(loss, rel=1e-4)
    assert (other_gradient - gradient).norm() < 1e-4 * gradient.norm()


@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 99)), min_size=1, max_size=30),
    most=st.integers(1, 400),
    packed=st.booleans(),
)
def test_groups_of_tokens(lengths, most, packed):
    """Every rollout once, in groups as large as they may be, the longest together."""
    prompts, completions = [list(column) for column in zip(*lengths, strict=True)]
    groups = by_tokens(prompts, completions, most, packed)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        p, c = [prompts[i] for i in group], [completions[i] for i in group]
        tokens = sum(p) + sum(c) if packed else len(group) * (max(p) + max(c))
        assert len(group) == 1 or tokens <= most
    order = [sum(lengths[i]) for group in groups for i in group]
    assert order == sorted(order, reverse=True)


def test_all_processes_have_as_many_micro_batches(folder):
    """Sharded weights are gathered by all together."""
    setup = prepared(folder)
    rollout = roll_out(setup.sampler, setup.contexts.student, setup.problems[:4], [1, 2, 7, 9])
    asked = config(folder, micro_batch_tokens=10_000)
    for most in (1, 2, 3, 4):
        several = SimpleNamespace(
            device="cpu", gather=lambda own, most=most: torch.cat([own, torch.tensor([most])])
        )
        parts = micro_batches(asked, several, setup.contexts, rollout, packed=False)
        assert len(parts) == most
        completions = [c for part in parts for c in part.completions]
        assert sorted(completions) == sorted(rollout.completions)


def test_statistics_are_means_of_the_batch(folder):
    setup = with_adapter(prepared(folder))
    rollout = roll_out(setup.sampler, setup.contexts.student, setup.problems[:3], [1, 2, 3])
    scores = score(setup.backbone, setup.teacher, setup.contexts.teacher, rollout)
    weights = token_weights(scores.lengths, "token", 3, rollout.tokens)
    asked = config(folder, beta=0.0, entry_clip=0.01, temperature=1.3)
    loss, statistics = opsd_loss(scores, setup.head, asked, weights)
    W = setup.head.weight
    log_p = (scores.h_student.detach() @ W.T / 1.3).log_softmax(-1)
    log_q = (scores.h_teacher @ W.T / 1.3).log_softmax(-1)
    p, q, x = log_p.exp(), log_q.exp(), log_q - log_p
    expected = {
        "forward_kl": (q * x).sum(-1),
        "reverse_kl": (-p * x).sum(-1),
        "entropy_student": -(p * log_p).sum(-1),
        "entropy_teacher": -(q * log_q).sum(-1),
        "log_ratio": x.gather(1, scores.tokens[:, None])[:, 0],
    }
    for name, values in expected.items():
        assert float(statistics[name]) == pytest.approx(float(values.mean()), rel=1e-3), name
    assert float(loss.detach()) == pytest.approx(
        float((q * x).clamp(max=0.01).sum(-1).mean()), rel=1e-3
    )
    assert float(statistics["clipped_share"]) > 0.1
