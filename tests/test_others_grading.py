"""Answers and references as other people write them: right, wrong, and which vote together."""

import time
from dataclasses import replace

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("math_verify")

from opsd_train.data import hold_out, last_boxed
from opsd_train.grading import Attempt, MathGrader
from opsd_train.grading.scores import maj_at
from opsd_train.records import Problem
from opsd_train.run.setup import hold_out_gradable


@pytest.fixture(scope="module")
def grader():
    with MathGrader(seconds=1.0) as grader:
        yield grader


def graded(grader, reference: str, answer: str) -> bool:
    return grader(Problem("q", "", reference), rf"so \boxed{{{answer}}}.").correct


# Each line: answers that are equal to each other, and to none of any other line of its group.
GROUPS = {
    "rationals": [
        [r"\frac{1}{2^{99}}", "1/2^{99}", "2^{-99}", r"\frac{2}{2^{100}}"],
        [r"\frac{1}{2^{98}}", "2^{-98}"],
        ["1/2004!", r"\frac{1}{2004!}", r"\frac{2005}{2005!}"],
        ["1/2006!"],
        ["10^{-7}", "0.0000001", "10^-7", r"1\times10^{-7}", "1e-7", "1E-07"],
        [r"2\cdot 10^{-7}", "0.0000002", "2e-7"],
        ["1/2", "0.5", r"\frac12", r"\dfrac{1}{2}", ".5", "0.500", r"50\%", "½", "2^{-1}", "２/４"],
        ["1/3", r"0.\overline{3}", r"0.\bar{3}", "0.(3)", r"\frac{2}{6}", r"0.3\overline{3}"],
        ["0.333333"],
        ["0.3333333"],
        ["-1/3", r"-\frac{1}{3}", r"\frac{-1}{3}", "−1/3", r"-0.\overline{3}"],
        ["3/2", "1.5", r"1\frac12", "1 1/2", r"1\frac{1}{2}", "1½", "1.50"],
        ["-3/2", r"-1\frac12", "-1 1/2", "-1.5"],
        ["1500", r"1.5\times10^3", "1.5e3", "1.5 x 10^3", "1,500", "1.5·10³", r"1\,500", "1{,}500"],
        ["0", "-0", "0.0", "+0", r"\frac{0}{5}", "000"],
        ["7", "007", "7.0", "+7", "７", "7.", "$7$", r"\(7\)", "**7**", r"\text{7}", "7!/6!"],
        ["2^{1000}", "2^1000", "4^{500}"],
        ["2^{2^{10}}", "2^{1024}", "2^1024"],
        ["2^{1000}+1"],
        ["9^{9^{9}}"],
        ["9^{9^{9}}+1"],
        ["0.1428571428571428"],
        ["1/7", r"0.\overline{142857}"],
    ],
    "roots and constants": [
        [r"\sqrt{2}", r"\sqrt2", "√2", r"\frac{2}{\sqrt{2}}", "2^{1/2}", "sqrt(2)", r"\sqrt{8}/2"],
        ["1.41421356237"],
        [r"\sqrt{10^{40}+1}"],
        ["10^{20}", r"\sqrt{10^{40}}"],
        [r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}", r"\sqrt3+\sqrt2"],
        [r"\pi", "π", r"\frac{2\pi}{2}"],
        ["3.14159265358979"],
        ["22/7"],
        [r"\frac{355}{113}"],
        ["e", "e^1"],
        ["2.718281828459045"],
        [r"\cos\frac{\pi}{5}", r"\frac{1+\sqrt{5}}{4}"],
        [r"\log_2 8", "3"],
        [r"\infty", "∞"],
        [r"-\infty"],
        ["3+4i", "4i+3"],
        ["3-4i"],
        [r"(1+i)^2", "2i"],
        [r"\sqrt[3]{2}", "2^{1/3}"],
    ],
    "collections": [
        [r"\{1,2\}", r"\{2,1\}", "1, 2", r"1 \text{ and } 2", "x=1 or x=2", r"\{1, 2.0\}"],
        [r"\{1,2,3\}", "3, 2, 1"],
        [r"\{\frac{1}{2^{98}}, 1\}"],
        [r"\{1, \frac{1}{2^{99}}\}"],
        ["(1,3)", r"\left(1, 3\right)", "(1.0, 6/2)"],
        ["(3,1)"],
        ["[1,3]"],
        ["[1,3)", r"[1, \sqrt{9})"],
        [r"(1, \frac{1}{3})"],
        ["(1, 0.333333)"],
        [r"\pm 3", "3, -3", r"\{-3, 3\}", "±3"],
        [
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            r"\begin{bmatrix}1&2\\3&\frac{8}{2}\end{bmatrix}",
        ],
        [r"\begin{pmatrix}1&2\\3&5\end{pmatrix}"],
        [r"\emptyset", r"\varnothing", "∅", r"\{\}"],
        [r"(-\infty, 0) \cup (1, \infty)", "(-∞,0)∪(1,∞)"],
        ["(1,2,3)"],
        ["(3,2,1)"],
    ],
    "equations": [
        [
            "3",
            "x=3",
            "3=x",
            "f(2)=3",
            "a=b=3",
            "m+n=3",
            "1+2=3",
            "x = 3.0",
            r"\sin x = 3",
            "x=1+2=3",
        ],
        ["4", "x=4", "x=2+2"],
        ["4=3"],
        ["2x=6"],
        ["2x+1=3"],
        ["x=1+1=3"],
    ],
    "formulas": [
        ["x+1", "1+x", r"\frac{2x+2}{2}"],
        ["x+1.0000001"],
        ["5t", r"5 \cdot t", r"t \cdot 5"],
        ["5c"],
        ["5"],
        ["2.5x", r"\frac{5x}{2}", r"\frac52 x"],
        ["(x+1)^2", "x^2+2x+1"],
        ["x^2+2x+2"],
    ],
    "words": [
        ["A", "(A)", r"\text{A}", r"\textbf{(A)}", "A.", r"\mathrm{A}", r"\text{(A)}", "(A) 17"],
        ["B", "(B)", "B) 17"],
        ["yes", r"\text{Yes}", "Yes."],
        ["no", r"\text{no}"],
        [r"\text{Monday}", "Monday", "monday"],
        [r"\text{May 5, 2020}", "May 5, 2020"],
        [r"\text{May 6, 2020}"],
        ["silent"],
        ["listen"],
        [r"\text{DNE}", "DNE"],
        [r"0.333\ldots", "0.333..."],
        ["3.14..."],
    ],
}


def cases():
    for group, lines in GROUPS.items():
        for i, line in enumerate(lines):
            others = [lines[(i + j) % len(lines)][0] for j in (1, 2, 3)]
            yield pytest.param(line, [o for o in others if o != line[0]], id=f"{group}: {line[0]}")


@pytest.mark.parametrize(("line", "others"), list(cases()))
def test_equal_answers(grader, line, others):
    assert [a for a in line if not graded(grader, line[0], a)] == []
    assert [a for a in line if not graded(grader, a, line[0])] == []
    assert [a for a in others if graded(grader, line[0], a)] == []


@pytest.mark.parametrize("group", ["rationals", "roots and constants", "collections", "words"])
def test_equal_answers_vote_together(grader, group):
    """Wrong ones: what is right is one answer in any case."""
    problem = Problem("q", "", "123456")
    votes = [{grader(problem, rf"\boxed{{{a}}}").answer for a in line} for line in GROUPS[group]]
    assert [v for v in votes if len(v) > 1] == []
    assert len(set.union(*votes)) == len(votes)


def test_the_majority_of_equal_answers(grader):
    problem = Problem("q", "", "7")
    texts = [r"\boxed{7}", r"\boxed{7.0}", r"\boxed{1/2}", r"\boxed{0.5}", r"\boxed{\frac12}"]
    verdicts = [grader(problem, text) for text in texts]
    attempts = [Attempt("", "", v.correct, v.answer, 1, True) for v in verdicts]
    assert maj_at(5, attempts) == 0  # three of one half against two of seven


# Reference, answer: with marks, either side may leave its own out.
MARKED = {
    True: [
        ("72.", "72"),
        ("72 clips", "72"),
        ("$72", "72"),
        (r"\$72", "72"),
        (r"-\$5", "-5"),
        ("£5", "5"),
        ("₹500", "500"),
        ("500 rupees", "Rs. 500"),
        ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 24", "24"),
        ("5 USD", r"\$5"),
        (r"72\%", "72"),
        (r"72\%", "0.72"),
        ("72", r"72\%"),
        ("0.72", "72 percent"),
        ("1,000 people", "1000"),
        (r"72 \text{ cm}", "72"),
        ("72", r"72\,\mathrm{cm}^2"),
        (r"5 \text{ cm}", "5 centimeters"),
        ("5cm", "5"),
        ("5 o'clock", "5"),
        (r"10 \text{ m/s}", "10"),
        (r"\frac{3}{4} \text{ of the cake}", "0.75"),
        (r"3\sqrt{2}\text{ meters}", r"3\sqrt2"),
        (r"x = 5 \text{ cm}", "5"),
        (r"90^\circ", "90"),
        ("90 degrees", "90°"),
        (r"90^\circ", r"\frac{\pi}{2}"),
        (r"\frac{1}{2}", r"\sin 30^\circ"),
        ("1010_2", "10"),
        ("1010_2", "1010"),
        ("1010_{2}", r"1010_{\text{two}}"),
        (r"7 \pmod{10}", "7"),
        ("21st", "21"),
        ("5:30 p.m.", "5:30"),
        (r"2\pi", "2pi"),
        (r"2\sqrt{3}", "2sqrt(3)"),
        (r"P(A) = \frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", "P(A)=1/2"),
        (r"\$1,000", "1000 dollars"),
        ("3/4 cup", "0.75"),
        ("5:30", r"5:30\text{ p.m.}"),
        (r"\textbf{(A)}\ 5", "5"),
        (r"\textbf{(A)}\ 5", "A"),
        (r"$\boxed{72}$", "72"),
        ("all real numbers", r"(-\infty, \infty)"),
        (r"x \in (1,2)", "1<x<2"),
        ("x>1", r"(1,\infty)"),
        ("100,200", "100, 200"),
        (r"33\frac13\%", r"\frac{1}{3}"),
        ("2:3", r"\frac{2}{3}"),
        ("2:3:4", "4:6:8"),
        (r"\langle 1,2\rangle", "(1,2)"),
        ("five", "5"),
        ("3 million", "3,000,000"),
        (r"\underline{5}", "5"),
        (r"\color{red}{5}", "5"),
        (r"16\pi \text{ cm}^3", r"16\pi"),
        (r"12x \text{ dollars}", "12x"),
        (r"\frac{-1\pm\sqrt{17}}{2}", r"\frac{-1-\sqrt{17}}{2}, \frac{-1+\sqrt{17}}{2}"),
        (r"(1,\pm2)", "(1,2),(1,-2)"),
        (r"\{(1,2),(2,1)\}", "(2,1), (1,2)"),
        (r"\left|-3\right|", "3"),
    ],
    False: [
        ("0.72", "72"),
        ("5 cm", "5 km"),
        (r"5 \text{ cm}^2", "5 cm"),
        ("£5", r"\$5"),
        ("₹5", "£5"),
        (r"12 \text{ hours}", "12 minutes"),
        ("1010_2", "1010_3"),
        (r"7 \pmod{10}", r"7 \pmod{9}"),
        ("5:30 a.m.", "5:30 p.m."),
        ("2 or more", "2"),
        ("(A) 5", "(B) 5"),
        ("5m", "5"),  # 5 times m
        ("P(A)", "P(B)"),
        (r"50\%", r"5\%"),
        (r"\sin 30^\circ", r"\sin 60^\circ"),
        ("17", r"17 or \undefined{18}"),
        (r"\frac{1}{0}", "5"),
        ("5", ""),
        ("2.3", "2,3"),
        (r"33.3\%", r"\frac{1}{3}"),
        ("2:3:4", "2:3:5"),
        ("3", "3,5"),
        (r"5 \text{ apples and } 3 \text{ pears}", "5"),
    ],
}


@pytest.mark.parametrize("is_right", [True, False])
def test_marks(grader, is_right):
    assert [(r, a) for r, a in MARKED[is_right] if graded(grader, r, a) != is_right] == []


def test_what_is_far_too_large_is_not_evaluated(grader):
    before = grader.hung
    for answer in ("9^{9^{9^9}}", "2^{2^{2^{2^{2^2}}}}", "(10^{10})!", r"\frac{1}{(10^9)!}"):
        assert graded(grader, answer, answer)
        assert not graded(grader, "5", answer)
    assert grader.hung == before


@pytest.mark.parametrize(
    "answer",
    [
        *("(" * 3000, "9" * 50_000, r"\frac{" * 500, "1 " * 4000, r"\text{a}" * 285, "{" * 999),
        *("A." * 999, r"\$" * 999, "(A) " * 499, r"\pm" * 600),
    ],
)
def test_what_is_far_too_long_takes_no_time(grader, answer):
    start = time.process_time()
    assert not grader(Problem("q", "", "5"), rf"\boxed{{{answer}}} \boxed{{5").correct
    assert not graded(grader, "5", answer)
    assert time.process_time() - start < 1


def test_boxes_that_are_never_closed_take_no_time():
    start = time.process_time()
    assert last_boxed(r"\boxed{7} then " + r"\boxed{" * 50_000) == "7"
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("answer", "is_gradable"),
    [
        ("72", True),
        ("72 clips", True),
        ("A", True),
        ("isosceles triangle", True),
        ("", False),
        ("...", False),
        (r"\frac{0}{0}", False),
        (r"\undefined{5}_^", False),
        ("The function is increasing on every interval where the parameter is positive", False),
    ],
)
def test_a_reference_that_does_not_accept_itself(grader, answer, is_gradable):
    assert grader.can_grade(Problem("q", "", answer)) == is_gradable


def test_references_that_cannot_be_graded_are_said_and_dropped(grader):
    problems = [Problem(f"{i}?", "", str(i), place=f"a.csv, line {i}") for i in range(20)]
    bad = [replace(p, answer=rf"\undefined{{{p.answer}}}_^") for p in problems[:8]]
    said = []
    assert grader.gradable([*bad, *problems[8:]], said.append) == problems[8:]
    (text,) = said
    assert text.startswith("Not graded: 8 problems whose answer cannot be compared:\n")
    assert text.count("\n  a.csv, line ") == 5
    assert text.endswith("and 3 more")
    assert grader.gradable(problems, said.append) == problems
    assert len(said) == 1


def test_held_out_problems_have_answers_that_can_be_graded(capsys):
    good = [Problem(f"{i}?", rf"\boxed{{{i}}}") for i in range(6)]
    bad = [Problem(f"{i}!", rf"\boxed{{\undefined{{{i}}}_^}}") for i in range(6)]
    train, held_out = hold_out_gradable(good + bad, 4, seed=0)
    assert len(held_out) == 4
    assert {p.question[-1] for p in held_out} == {"?"}
    assert len(train) == 8
    said = capsys.readouterr().out
    assert "Not graded: " in said
    assert "_^" in said
    with pytest.raises(ValueError, match=r"more problems than .* graded, among the 12 with"):
        hold_out(good + bad, 7, 0, can_grade=lambda problem: problem.question[-1] == "?")
