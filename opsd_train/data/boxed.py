"""Final answers, as mathematicians among models give them: in \\boxed{}."""

import random
import re
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
    problems: list[Problem], number: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
    """Problems to train on, and `number` others whose solutions have a \\boxed{} answer. A problem
    that the data hold twice is in one of the two.

    Raises:
        ValueError: there are too few with an answer, or none to train on is left.
    """
    answers = {p.question: answer for p in problems if (answer := last_boxed(p.solution))}
    if number > len(answers):
        raise ValueError(
            f"held_out={number} asks for so many problems whose solution has its answer in "
            f"\\boxed{{}}; the data have {len(answers)}"
        )
    chosen = random.Random(f"held out, {seed}").sample(sorted(answers), number)
    held_out = {question: answers[question] for question in chosen}
    kept = [p for p in problems if p.question not in held_out]
    if not kept:
        raise ValueError(f"held_out={number} leaves no problem to train on")
    solutions = {p.question: p for p in problems}
    return kept, [replace(solutions[q], answer=a) for q, a in held_out.items()]
