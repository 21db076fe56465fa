"""Scores, their intervals and the paired test; answers in \\boxed{}; what is held out."""

import itertools
import json
from fractions import Fraction
from math import comb
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_train.data import AnsweredSet, hold_out, last_boxed, load_answered_problems
from opsd_train.grading import (
    Attempt,
    MathGrader,
    benchmark_names,
    compare,
    comparison_table,
    load_benchmark,
)
from opsd_train.grading.scores import (
    difference_of,
    maj_at,
    paired_test,
    pass_at,
    score_of,
    wilson,
)
from opsd_train.records import Problem

# Scores


def test_wilson_interval():
    low, high = wilson(0.5, 100)
    assert low == pytest.approx(0.4038, abs=1e-4)
    assert high == pytest.approx(0.5962, abs=1e-4)
    assert wilson(0, 10)[0] < 1e-12
    assert wilson(1, 10)[1] == 1


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_mean_over_all_choices(n, data):
    right = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    expected = fmean(any(chosen) for chosen in itertools.combinations(right, k))
    assert pass_at(k, n, sum(right)) == pytest.approx(expected)


def test_pass_at_k_has_no_bias():
    """Its mean over all outcomes of n samples is the chance that one of k is right."""
    n, k, p = 10, 4, 0.15
    chances = [comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    mean = sum(chance * pass_at(k, n, c) for c, chance in enumerate(chances))
    assert mean == pytest.approx(1 - (1 - p) ** k)
    naive = sum(chance * (1 - (1 - c / n) ** k) for c, chance in enumerate(chances))
    assert abs(naive - (1 - (1 - p) ** k)) > 0.02


@pytest.mark.parametrize("k", [0, 5])
def test_k_is_at_most_the_number_of_samples(k):
    for score in (lambda: pass_at(k, 4, 1), lambda: maj_at(k, attempts("RRRR"))):
        with pytest.raises(ValueError, match=r"k must lie in \[1, 4\]"):
            score()


def attempts(answers: str) -> list[Attempt]:
    """R is right, another letter a wrong answer, - none."""
    return [Attempt("", "", a == "R", None if a == "-" else a, 10, a != "-") for a in answers]


@pytest.mark.parametrize(
    ("answers", "k", "expected"),
    [
        ("RRa", 3, 1.0),
        ("Raa", 3, 0.0),
        ("Ra-", 3, 0.5),  # a tie
        ("Rabc", 4, 0.25),
        ("R---", 4, 1.0),  # no answer is no vote
        ("----", 4, 0.0),
        ("RRaR", 2, 0.75),  # two runs of two
        ("RRaaa", 2, 0.5),  # and what does not make up a run is left
        ("Ra", 1, 0.5),
    ],
)
def test_majority(answers, k, expected):
    assert maj_at(k, attempts(answers)) == expected


def test_answers_written_otherwise_are_one_if_right():
    same = [Attempt("", "", True, text, 1, True) for text in ("1/2", "0.500")]
    assert maj_at(4, [*same, *attempts("aab")][:4]) == 0.5  # two against two
    assert maj_at(3, [*same, *attempts("a")]) == 1


def test_an_interval_is_wilsons_for_one_sample():
    score = score_of([1, 0, 0, 1, 1], samples=1)
    assert (score.low, score.high) == pytest.approx(wilson(3 / 5, 5))
    # And at most that of as many problems as there are samples.
    assert score_of([0.5, 0.5, 0.5, 0.6], 4).low >= wilson(0.525, 16)[0]


@pytest.mark.parametrize("shape", [(1, 1), (0.3, 0.3), (0.3, 3), (5, 5)])
@pytest.mark.parametrize("n", [1, 16])
def test_an_interval_holds_the_truth(shape, n):
    """Of 30 problems whose chances of being solved are drawn, as often as it says, about."""
    rng = np.random.default_rng(0)
    a, b = shape
    held = 0
    for _ in range(400):
        counts = rng.binomial(n, rng.beta(a, b, 30))
        score = score_of([c / n for c in counts], n)
        held += score.low <= a / (a + b) <= score.high
    assert 0.90 <= held / 400 <= 0.985


# The paired test


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=7))
def test_paired_test_counts_all_signs(pairs):
    before = [Fraction(a, 3) for a, _ in pairs]
    after = [Fraction(b, 3) for _, b in pairs]
    changes = [b - a for a, b in pairs]
    sums = [
        abs(sum(sign * x for sign, x in zip(signs, changes, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(changes))
    ]
    expected = fmean(s >= abs(sum(changes)) for s in sums)
    assert paired_test(before, after) == pytest.approx(expected)


def test_paired_test_of_one_sample_each_is_mcnemars():
    before = [Fraction(x) for x in [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]]
    after = [Fraction(x) for x in [1, 0, 1, 1, 1, 1, 1, 1, 0, 1]]
    exact = 2 * sum(comb(7, i) for i in range(2)) / 2**7  # 6 for the better, 1 for the worse
    assert paired_test(before, after) == pytest.approx(exact)
    assert paired_test(before, before) == 1


def test_difference():
    d = difference_of([Fraction(1, 2)] * 4, [Fraction(3, 4)] * 4)
    assert (d.mean, d.low, d.high, d.p) == (0.25, 0.25, 0.25, 2 / 16)
    with pytest.raises(ValueError, match="of the same problems, got 1 and 2"):
        difference_of([Fraction(1)], [Fraction(1)] * 2)


def test_comparison_has_lengths_beside_scores():
    result = compare(
        {
            "base": [attempts("Ra-a"), attempts("aaaa")],
            "adapter": [attempts("RRRR"), attempts("Raaa")],
        },
        [2, 4],
    )
    base, adapter = result["models"]["base"], result["models"]["adapter"]
    assert base["scores"]["avg@4"]["mean"] == 1 / 8
    assert adapter["scores"]["pass@4"]["mean"] == 1
    assert adapter["scores"]["pass@2"]["mean"] == pytest.approx((1 + 1 / 2) / 2)
    assert adapter["scores"]["maj@4"]["mean"] == 1 / 2
    assert (base["truncated"], base["no_answer"], base["tokens"]) == (1 / 8, 1 / 8, 10)
    assert result["difference"]["mean"] == 1 / 2
    json.dumps(result)
    table = comparison_table("a set", result).splitlines()
    assert len({len(line) for line in table}) == 1
    assert table[0].split("|")[1].strip() == "a set"
    assert "12.5% (" in table[2]
    assert "+50.0 (" in table[2]
    assert "truncated" in table[-2]
    alone = comparison_table("a set", compare({"base": [attempts("Ra")]}, [2]))
    assert "adapter" not in alone


# Answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{5}.", "5"),
        (r"\boxed{4}, no: \boxed{5}", "5"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{5} and then \boxed{6", "5"),  # cut off
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        (r"boxed{5}", None),
        ("The answer is 5.", None),
        ("", None),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@pytest.fixture(scope="module")
def grader():
    with MathGrader(seconds=1.0) as grader:
        yield grader


RIGHT = [
    ("204", r"Therefore \boxed{204}."),
    ("025", r"\boxed{25}"),
    (25, r"\boxed{025}"),
    (r"$\boxed{7}$", r"\boxed{7}"),
    ("7", r"first \boxed{3}, but in fact \boxed{7}"),
    ("103", r"\boxed{103.}"),
    ("1000", r"\boxed{1{,}000}"),
    ("1000", r"\boxed{1,000}"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    (r"\frac{1}{2}", r"\boxed{\dfrac12}"),
    (r"\frac{21}{4}", r"\boxed{1/2 + \frac{19}{4}}"),
    (r"\frac{\frac{1}{2}}{3}", r"\boxed{\frac{1}{6}}"),
    (r"9\sqrt{15}", r"\boxed{9 \sqrt{15}}"),
    (r"1+\sqrt{2}", r"\boxed{\sqrt 2+1}"),
    ("[0,1)", r"\boxed{[0, 1)}"),
    (r"(-\infty,3]", r"\boxed{\left(-\infty, 3\right]}"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}"),
    ("5", r"\boxed{5\text{ cm}}"),
    ("70", r"\boxed{70^\circ}"),
    ("5", r"\boxed{x=5}"),
    ("2^{10}", r"\boxed{1024}"),
    (r"\sum_{k=1}^{100} k", r"\boxed{5050}"),
]
WRONG = [
    ("204", r"\boxed{205}"),
    ("204", "The answer is 204."),  # no box
    ("204", r"\boxed{204"),  # cut off
    ("204", r"\boxed{204} or rather \boxed{205}"),
    ("204", r"\boxed{}"),
    ("204", r"\boxed{\text{unknown}}"),
    (r"\frac{1}{3}", r"\boxed{0.33}"),
    (r"\frac{3}{4}", r"\boxed{\frac{3}{4}\pi}"),
    ("[0,1)", r"\boxed{(0,1]}"),
    ("(1,2)", r"\boxed{(2,1)}"),
    ("5", r"\boxed{-5}"),
    ("17", r"\boxed{\{17, 18\}}"),
    ("5", r"\boxed{\frac{}{}}"),
    ("5", r"\boxed{\undefined{5}_^}"),
]


@pytest.mark.parametrize(("reference", "completion"), RIGHT)
def test_right_answers(grader, reference, completion):
    assert grader(Problem("", "", str(reference)), completion).correct


@pytest.mark.parametrize(("reference", "completion"), WRONG)
def test_wrong_answers(grader, reference, completion):
    assert not grader(Problem("", "", reference), completion).correct


def test_what_is_read_alike_votes_alike(grader):
    problem = Problem("", "", "204")
    boxes = (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", r"\boxed{\dfrac12}")
    assert {grader(problem, text).answer for text in boxes} == {"1/2"}
    assert grader(problem, "nothing").answer is None
    assert grader(problem, r"\boxed{}").answer is None


@pytest.mark.parametrize(
    "hanging", [r"\binom{10^{9}}{10^{8}}", r"\sum_{k=1}^{10^{9}} \frac{1}{k^2+k^3}"]
)
def test_an_expression_that_hangs_is_wrong(grader, hanging):
    """And the next one is graded."""
    before = grader.hung
    assert not grader(Problem("", "", "5"), rf"\boxed{{{hanging}}}").correct
    assert grader.hung == before + 1
    assert grader(Problem("", "", "5"), r"\boxed{\frac{10}{2}}").correct


# Problems


def problem(question: str, solution: str) -> Problem:
    return Problem(question, solution)


def test_hold_out():
    data = [problem(f"{i}?", rf"so \boxed{{{i}}}") for i in range(10)]
    data += [problem("no box?", "5"), data[3], problem("none?", r"\boxed{5")]
    train, held_out = hold_out(data, 4, seed=0)
    assert [p.answer for p in held_out] == [p.question.rstrip("?") for p in held_out]
    assert {p.question for p in train}.isdisjoint(p.question for p in held_out)
    assert {p.question for p in [*train, *held_out]} == {p.question for p in data}
    assert hold_out(data, 4, seed=0) == (train, held_out)
    assert hold_out(data, 4, seed=1)[1] != held_out
    with pytest.raises(ValueError, match=r"held_out=11 is more than the data have: 10"):
        hold_out(data, 11, seed=0)
    with pytest.raises(ValueError, match="held_out=2 leaves no problem"):
        hold_out(data[:2], 2, seed=0)


def test_problems_with_answers(tmp_path):
    path = tmp_path / "set.jsonl"
    rows = [{"q": "1+1?", "a": 2, "k": "x"}, {"q": "1/2?", "a": "0.5", "k": "y"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"problem_column": "q", "answer_column": "a"}
    found = load_benchmark(str(path), **columns)
    assert found == [Problem("1+1?", "", "2"), Problem("1/2?", "", "0.5")]
    some = load_answered_problems(AnsweredSet(str(path), "train", "q", "a", {"k": ["y"]}))
    assert [p.answer for p in some] == ["0.5"]
    with pytest.raises(ValueError, match="line 1: no column answer; it has q, a, k"):
        load_benchmark(str(path), problem_column="q")
    path.write_text('{"problem": "1?", "answer": null}\n')
    with pytest.raises(ValueError, match="column answer must hold text or a number, got None"):
        load_benchmark(str(path))
    path.write_text("")
    with pytest.raises(ValueError, match="has no row"):
        load_benchmark(str(path))


ROWS = {
    "HuggingFaceH4/aime_2024": {"id": 60, "problem": "x?", "solution": "...", "answer": "204"},
    "yentinglin/aime_2025": {"id": "0", "problem": "x?", "answer": "204", "solution": ""},
    "MathArena/hmmt_feb_2025": {"problem_idx": 1, "answer": "204", "problem": "x?"},
    "meituan-longcat/AMO-Bench": {
        **{"question_id": 1, "prompt": "x?", "solution": "...", "answer": r"\boxed{204}"},
        "answer_type": "number",
    },
}


def test_benchmarks_by_name(monkeypatch):
    """By the columns that they have; nothing is downloaded here."""
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return [ROWS[name], *([ROWS[name] | {"answer_type": "description"}] * ("AMO" in name))]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for name in benchmark_names():
        (found,) = load_benchmark(name)
        assert found.question == "x?"
        assert "204" in found.answer
    assert [name for name, _ in asked] == list(ROWS)
    assert [split for _, split in asked] == ["train", "train", "train", "test"]
