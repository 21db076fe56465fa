"""The comparison of benchmarks/token_efficiency/run.py: its world, its baselines, its rule
of verdicts, and all of it once, in little."""

import json
import math
import random
from pathlib import Path
from statistics import fmean

import pytest
import torch
from pictures import drawn, saved_figures, words
from torch.nn.functional import cross_entropy

from benchmarks.token_efficiency import (
    cells,
    figures,
    methods,
    multiplication,
    page,
    verdicts,
    warm_start,
)
from benchmarks.token_efficiency import run as token_efficiency
from benchmarks.token_efficiency.plan import (
    LENGTHS,
    SELF_DISTILLATION,
    Plan,
    best_rates,
    in_order_of_work,
)
from benchmarks.token_efficiency.results import Results
from benchmarks.token_efficiency.rollouts import WrongRollout, auc
from opsd_train.models import adapter_weights

TINY = Plan(
    methods=("GRPO", "JSD 0.5"),
    rates=(1e-3,),
    seeds=(0,),
    steps=1,
    baseline_steps=1,
    every=1,
    problems=4,
    samples=1,
    size="small",
    sizes=("small",),
    temperatures=(1.0,),
    warm_steps=2,
    counted=(("tiny", 64),),
)
RECORDED = Path(__file__).parents[1] / "benchmarks/results/token_efficiency"


# The world


def test_a_solution_and_its_reference():
    problem = multiplication.make_problem(3847, 6)
    assert problem.question == "d3c8b4a7*6"
    assert problem.solution == "a42b28c50d23"
    assert problem.answer == "23082"
    worked = "a7*6+0=42b4*6+4=28c8*6+2=50d3*6+5=23"
    assert methods.in_own_words(problem) == worked
    for text in (worked, problem.solution):
        assert multiplication.judge(problem, text + "<end>").correct
        assert not multiplication.judge(problem, text).correct  # it never ended
        assert not multiplication.judge(problem, text[:-1] + "<end>").correct
    assert multiplication.judge(problem, worked[:-1] + "4<end>").answer == "24082"


def test_mistakes_are_where_they_are_said_to_be():
    rng = random.Random(0)
    for a, b in multiplication.sample_numbers(rng, 200, 8, "train"):
        working = multiplication.work_out(a, b, rng, misconception=0.5, slip=0.1)
        problem = multiplication.make_problem(a, b)
        first = multiplication.first_mistake(problem, working.text + "<end>")
        marked = [i for i, mistake in enumerate(working.mistakes) if mistake]
        if not marked:
            assert first is None
            assert multiplication.judge(problem, working.text + "<end>").correct
        else:
            # Of a value both digits are marked, where one of them may be right.
            assert first - marked[0] in (0, 1)
    problem = multiplication.make_problem(123456, 7)
    worked = methods.in_own_words(problem)
    assert multiplication.first_mistake(problem, worked[:20]) == 20
    assert multiplication.first_mistake(problem, worked + "a") == len(worked)


def test_no_pair_is_in_two_parts():
    parts = [
        {p.question for p in multiplication.sample_problems(part, 400)}
        for part in multiplication.PARTS
    ]
    assert len(set().union(*parts)) == sum(map(len, parts))
    lengths = {len(q) for q in parts[0]}
    assert lengths == {2 * level + 2 for level in multiplication.LEVELS}


# The baselines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a model that has hardly learnt."""
    folder = tmp_path_factory.mktemp("models")
    warm_start.build("small", 2, folder)
    return folder


def setup_of(method, folder, **fields):
    cell = TINY.cell(method, 1e-3, 0, **fields)
    config = cells.config_of(cell, folder)
    return config, cells.make_setup(config, cell, folder)


def test_sft_is_the_cross_entropy_of_solutions(folder):
    config, setup = setup_of("SFT", folder)
    problems = setup.problems[:3]
    prompts = setup.contexts.student.token_ids(problems)
    texts = [p.solution + "<end>" for p in problems]
    solutions = setup.tokenizer(texts, add_special_tokens=False)["input_ids"]
    loss = methods.backward(config, setup, prompts, solutions, [1.0] * 3)
    expected = 0.0
    for prompt, solution in zip(prompts, solutions, strict=True):
        logits = setup.model(input_ids=torch.tensor([prompt + solution])).logits[0]
        of_solution = logits[len(prompt) - 1 : -1]
        expected += cross_entropy(of_solution, torch.tensor(solution)).item() / 3
    assert loss == pytest.approx(expected, rel=1e-4)


def test_grpo_learns_from_groups_that_differ_alone(folder, monkeypatch):
    config, setup = setup_of("GRPO", folder, longest=5)
    optimizer = torch.optim.AdamW(adapter_weights(setup.model).values(), lr=1e-3)
    seen = []
    monkeypatch.setattr(methods, "backward", lambda *of: seen.append(of[-1]) or 0.0)
    graded = iter([True, *[False] * 7, *[True] * 8, *[False] * 16])
    monkeypatch.setattr(
        methods, "grade", lambda *_: [type("C", (), {"correct": next(graded)}) for _ in range(32)]
    )
    tokens, metrics = methods.grpo_step(config, setup, optimizer, 1)
    assert tokens > 0
    assert metrics["reward"] == 9 / 32
    (advantages,) = seen
    assert advantages[0] == pytest.approx((1 - 1 / 8) / math.sqrt(7 / 64))
    assert sum(advantages[:8]) == pytest.approx(0)
    assert advantages[8:] == [0.0] * 24


# The rule


def test_verdicts():
    one = verdicts.difference([0.7, 0.72, 0.71], [0.6, 0.6, 0.61])
    assert one.mean == pytest.approx(0.1067, abs=1e-4)
    assert one.high - one.mean == pytest.approx(4.303 * 0.011547 / math.sqrt(3), rel=1e-3)
    assert one.verdict == verdicts.HOLDS
    assert verdicts.interval([-0.1, -0.11, -0.1]).verdict == verdicts.FAILS
    assert verdicts.interval([0.1, -0.1, 0.2]).verdict == verdicts.OPEN
    assert verdicts.interval([0.3]).verdict == verdicts.OPEN


def curve_of(*accuracies):
    return [
        {"step": i, "tokens": 100 * i, "accuracy": a, "solved": [1]}
        for i, a in enumerate(accuracies)
    ]


def test_tokens_to_an_accuracy():
    curve = curve_of(0.2, 0.4, 0.3, 0.8)
    assert verdicts.tokens_to(curve, 0.3) == pytest.approx(50)
    assert verdicts.tokens_to(curve, 0.6) == pytest.approx(260)
    assert verdicts.tokens_to(curve, 0.1) == 0
    assert verdicts.tokens_to(curve, 0.9) == math.inf
    assert verdicts.accuracy_after(curve, 150) == pytest.approx(0.35)
    assert verdicts.accuracy_after(curve, 500) == 0.8
    assert verdicts.mean_accuracy(curve) == pytest.approx((0.3 + 0.35 + 0.55) / 3)
    ours = [{"curve": curve_of(0.2, 0.8)}] * 2
    theirs = [{"curve": curve_of(0.2, 0.2, 0.4)}] * 2
    ratio = page.times_fewer(ours, theirs)
    assert math.exp(ratio.mean) == pytest.approx(200 / (100 / 3))
    assert page.times_fewer(theirs, ours) is None


def test_the_first_mistake_stands_out():
    rollout = WrongRollout("a7*6+0=43b", [0, 0, 0, 0, 0, 0.1, 0, 0.2, 0.4, 0], 8)
    assert rollout.before_that_could_err == [0.1, 0.2]
    assert rollout.peak_is_first_mistake
    assert rollout.first_mistake_is_largest_so_far
    assert auc(0.2, [0.1, 0.2, 0.3, 0.0]) == (1 + 0.5 + 0 + 1) / 4


def test_the_same_search_for_all():
    plan = Plan()
    searched = plan.search(plan.methods, plan.size)
    assert {c.method for c in searched} == set(plan.methods)
    for method in plan.methods:
        assert sorted(c.rate for c in searched if c.method == method) == list(plan.rates)
    assert {c.part for c in searched} == {"validation"}
    assert not {c.seed for c in searched} & set(plan.seeds)
    results = [
        {
            "cell": {"method": c.method, "size": c.size, "rate": c.rate},
            "curve": [{"accuracy": 0.5 if c.rate in plan.rates[1:3] else 0.1}],
        }
        for c in searched
    ]
    rates = best_rates(results)
    assert set(rates.values()) == {plan.rates[1]}
    cells_of_all = plan.main(rates) + plan.lengths(rates)
    assert len(in_order_of_work(cells_of_all)) == 3 * len(plan.methods) + 6


# The pictures


def test_pictures_show_what_was_recorded(tmp_path):
    tested = [json.loads(line) for line in (RECORDED / "cells.jsonl").open()]
    tested = [row for row in tested if row["cell"]["part"] == "test" and row["cell"]["steps"] > 0]
    plan = json.loads((RECORDED / "setting.json").read_text())["plan"]

    def accuracies(method: str, **fields: object) -> list[list[float]]:
        """Those of each seed, step by step."""
        usual = {"size": plan["size"], "temperature": 1.0, "longest": cells.LONGEST}
        wanted = {"method": method, **usual, **fields}
        curves = [
            [point["accuracy"] for point in row["curve"]]
            for row in tested
            if wanted.items() <= row["cell"].items()
        ]
        assert curves, wanted
        return curves

    def means(curves: list[list[float]]) -> set[float]:
        return {fmean(of_seeds) for of_seeds in zip(*curves, strict=True)}

    with saved_figures() as pictures:
        figures.draw(Results(RECORDED), tmp_path)
    assert set(words(pictures["main.png"])) >= set(plan["methods"])
    for method in plan["methods"]:
        assert means(accuracies(method)) <= drawn(pictures["main.png"])
        assert fmean(curve[-1] for curve in accuracies(method)) in drawn(pictures["methods.png"])
    for size in plan["sizes"]:
        ends = {curve[-1] for curve in accuracies(SELF_DISTILLATION, size=size)}
        assert ends
        assert ends <= drawn(pictures["size.png"])
    for temperature in plan["temperatures"]:
        curves = accuracies(SELF_DISTILLATION, temperature=temperature)
        assert means(curves) <= drawn(pictures["temperature.png"])
    for longest in LENGTHS:
        curves = accuracies(SELF_DISTILLATION, longest=longest)
        assert means(curves) <= drawn(pictures["length.png"])
    wrong = [json.loads(line) for line in (RECORDED / "mistakes.jsonl").open()]
    at_the_mistake = fmean(row["divergence"][row["first_mistake"]] for row in wrong)
    shown = drawn(pictures["mistakes.png"])
    assert any(math.isclose(at_the_mistake, height, rel_tol=1e-9) for height in shown)


# All of it


def test_in_little(tmp_path, capsys, monkeypatch):
    """Every question is answered; what is kept is not done again; a page is made of it."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    token_efficiency.compare(TINY, ("main", "length", "mistakes", "memory"), 1, cache, out)
    results = Results(out)
    assert results.methods == ["GRPO", "JSD 0.5"]
    (result,) = results.of(SELF_DISTILLATION)
    before, after = result["curve"]
    assert (before["step"], before["tokens"], after["step"]) == (0, 0, 1)
    assert 32 <= after["tokens"] <= 32 * cells.LONGEST
    assert len(after["solved"]) == 4

    monkeypatch.setattr(cells, "measure", lambda *_: pytest.fail("it is kept"))
    assert cells.run(TINY.cell(SELF_DISTILLATION, 1e-3, 0), cache) == result

    with saved_figures() as pictures:
        figures.draw(results, tmp_path / "pictures")
    assert set(pictures) >= {"main.png", "methods.png", "length.png", "mistakes.png"}
    text = page.page(results)
    assert "| JSD 0.5 (1 steps) |" in text
    assert "| the small world, measured |" in text
    words = " ".join(text.split())
    undecided = words.count(f"**{verdicts.OPEN}**")
    assert undecided >= 5  # of one seed nothing can be told
    assert f"{undecided} cannot be told from the noise." in words
