"""Final answers, as mathematicians among models give them: in \\boxed{}."""

import random
import re
from dataclasses import replace

from opsd_train.records import Problem

BOX = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are matched whole, and count for nothing


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{} (or \\fbox{}) whose braces are closed, or None."""
    for opening in reversed(list(BOX.finditer(text))):
        depth = 1
        for brace in BRACE.finditer(text, opening.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[opening.end() : brace.start()]
    return None


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
