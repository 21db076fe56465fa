"""Final answers, as mathematicians among models give them: in \\boxed{}."""

import random
import re
from collections.abc import Callable
from dataclasses import replace

from opsd_train.records import Problem

# A box that opens, or any brace. \{ and \} are matched whole, and count for nothing.
BRACE = re.compile(r"(?P<box>\\f?boxed\s*\{|\\fbox\s*\{)|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} (or \\fbox{}) whose braces are closed, or None."""
    last: tuple[int, int] | None = None
    opened: list[int | None] = []  # where the contents of a box begin, None for another brace
    for brace in BRACE.finditer(text):
        if brace["box"] or brace[0] == "{":
            opened.append(brace.end() if brace["box"] else None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, brace.start()
    return text[slice(*last)] if last else None


def hold_out(
    problems: list[Problem],
    number: int,
    seed: int,
    can_grade: Callable[[Problem], bool] = lambda problem: True,
) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on, and `number` others whose solutions have a \\boxed{} answer that can be
    graded. A problem that the data hold twice is in one of the two.

    Raises:
        ValueError: there are too few with such an answer, or none to train on is left.
    """
    solutions = {p.question: p for p in problems}
    answers = {p.question: answer for p in problems if (answer := last_boxed(p.solution))}
    if number > len(answers):
        raise ValueError(
            f"held_out={number} asks for so many problems whose solution has its answer in "
            f"\\boxed{{}}; the data have {len(answers)}"
        )
    draw = random.Random(f"held out, {seed}")
    left = sorted(answers)
    held_out: dict[str, Problem] = {}
    while len(held_out) < number and len(left) >= number - len(held_out):
        for question in draw.sample(left, number - len(held_out)):
            left.remove(question)
            problem = replace(solutions[question], answer=answers[question])
            if can_grade(problem):
                held_out[question] = problem
    if len(held_out) < number:
        raise ValueError(
            f"held_out={number} asks for more problems than have an answer that can be graded, "
            f"among the {len(answers)} with an answer in \\boxed{{}}"
        )
    kept = [p for p in problems if p.question not in held_out]
    if not kept:
        raise ValueError(f"held_out={number} leaves no problem to train on")
    return kept, list(held_out.values())
