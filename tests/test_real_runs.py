"""The runs of docs/real_model.md: SFT's loss, what is answered, and what the page says of it."""

import json

import pytest
import torch
from tiny_qwen3 import prepared, with_adapter

from benchmarks.real_model import page
from benchmarks.real_model.measure import answers, held_out
from benchmarks.real_model.questions import GREEDY, Questions, contains, last_number
from benchmarks.real_model.sft import take_step
from opsd_train.models import adapter_weights, base_model
from opsd_train.opsd.step import own_batch
from opsd_train.records import Problem


def test_sft_learns_the_solution_after_the_students_prompt(folder):
    setup = with_adapter(prepared(folder, batch_size=3, warmup=0.0))
    tokenizer, losses = setup.tokenizer, []
    for problem in own_batch(setup.config, setup, 1)[0]:
        (prompt,) = setup.contexts.student.token_ids([problem])
        solution = tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
        solution.append(tokenizer.eos_token_id)
        ids = torch.tensor([prompt + solution])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        losses.append(setup.model(ids, labels=labels).loss)
    weights = {name: w.detach().clone() for name, w in adapter_weights(setup.model).items()}
    optimizer = torch.optim.AdamW(adapter_weights(setup.model).values(), weight_decay=0.0)
    loss = take_step(setup, optimizer, 1)
    assert loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert take_step(setup, optimizer, 1) < loss
    assert all(not torch.equal(w, weights[n]) for n, w in adapter_weights(setup.model).items())


def test_answers_are_those_of_generate(folder):
    """Whatever is read once for all of them; the second column is sampled."""
    setup = prepared(folder)
    tokenizer, model = setup.tokenizer, base_model(setup.model).eval()
    problems = [Problem(text, "") for text in ("1+1", "12+34+5", "7+8", "1+1")]
    context = setup.contexts.student
    questions = Questions("sums", context, problems, last_number, (GREEDY, 1.0), max_new_tokens=9)
    found = answers(model, questions, problems, torch.Generator().manual_seed(0))
    for problem, (greedy, sampled) in zip(problems, found, strict=True):
        ids = torch.tensor(context.token_ids([problem]))
        out = model.generate(ids, do_sample=False, max_new_tokens=9)
        assert greedy == tokenizer.decode(out[0, ids.shape[1] :])
        assert sampled != greedy
    assert found[0][1] != found[3][1]


def test_who_is_right():
    problem = Problem("What is the opposite of hot?", "", "cold")
    said = {"It is Cold.": True, "a scold": False, "": False}
    assert {text: contains(problem, text).correct for text in said} == said
    problem = Problem("What is 4 times 6?", "", "24")
    said = {"4 times 6 is 24.": True, "24 is 4 times 6": False, "many": False}
    assert {text: last_number(problem, text).correct for text in said} == said


def test_a_runs_curve(tmp_path):
    run = tmp_path / "opsd-3"
    run.mkdir()
    lines = [
        {"step": 0, "accuracy": 0.25, "correct": 1, "problems": 4, "teacher_accuracy": 0.75},
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.1, "accuracy": 0.5, "correct": 2, "problems": 4},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [(r["run"], r["side"], r["step"], r["correct"], r["asked"]) for r in held_out(run)]
    assert rows == [
        ("opsd-3", "student", 0, 1, 4),
        ("opsd-3", "teacher", 0, 3, 4),
        ("opsd-3", "student", 2, 2, 4),
    ]


def row(run: str, correct: int, temperature: float | None, questions: str = "sums") -> page.Row:
    """Of twenty answers."""
    of = {"run": run, "side": "student", "questions": questions, "temperature": temperature}
    return {**of, "asked": 20, "correct": correct}


def test_what_the_page_says():
    rows = [row("base", 4, t) for t in (GREEDY, 0.7)]
    rows += [{**row("opsd-0", n, None, "held-out"), "side": "teacher"} for n in (10, 20)]
    for seed, (opsd, sft) in enumerate([(10, 9), (12, 1), (11, 14)]):
        rows += [row(f"opsd-{seed}", opsd, 0.7), row(f"opsd-{seed}", opsd + 2, GREEDY)]
        rows += [row(f"sft-{seed}", sft, t) for t in (GREEDY, 0.7)]
    lines = page.tests_table(rows).splitlines()
    assert lines[0] == "|  | greedy | sampled, T = 0.7 |"
    assert lines[2] == "| the model | 20.0% (8 to 42) | 20.0% (8 to 42) |"
    assert lines[3] == "| after OPSD | 65.0% (seeds: 60, 70, 65) | 55.0% (seeds: 50, 60, 55) |"
    assert lines[5].endswith("| +45.0 points (+32.6 to +57.4) | +35.0 points (+22.6 to +47.4) |")
    rows += [row(run, n, GREEDY, "products") for run, n in (("base", 19), ("opsd-0", 18))]
    rows.append(row("sft-0", 4, GREEDY, "products"))
    claim = page.claim(rows)
    assert "the model solves 20% before training, read greedily, and 65% after OPSD" in claim
    assert "+45.0 points (+32.6 to +57.4) over 3 seeds, which holds here" in claim
    assert "20% before and 55% after: +35.0 points (+22.6 to +47.4), which holds here" in claim
    assert "75% of held-out ones right" in claim
    assert claim.endswith("go from 95% to 20%, and after OPSD are at 90%.")
