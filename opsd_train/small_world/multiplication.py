"""Long multiplication: problems, worked solutions with slips in them, and who is right.

    <problem>3847*6=?<solution>7*6+0=42 4*6+4=28 8*6+2=50 3*6+5=23 <answer>23082<end>

Each step is digit · multiplier + carry, units first; a solution is right if the number after
<answer> is the product.
"""

import random

from opsd_train.evaluation import Verdict
from opsd_train.records import Problem

STUDENT_TEMPLATE = "<problem>{problem}<solution>"
TEACHER_TEMPLATE = "<problem>{problem}<reference>{solution}<rework><solution>"
HELD_OUT, TRAIN = 512, 8000  # problems; the warm start has the other 63,488

Numbers = list[tuple[int, int]]


def split_numbers(seed: int) -> tuple[Numbers, Numbers, Numbers]:
    """All pairs of numbers, in three parts: held out, to train on, and for the warm start."""
    numbers = [(a, b) for a in range(1000, 10000) for b in range(2, 10)]
    random.Random(seed).shuffle(numbers)
    return (
        numbers[:HELD_OUT],
        numbers[HELD_OUT : HELD_OUT + TRAIN],
        numbers[HELD_OUT + TRAIN :],
    )


def make_problem(a: int, b: int) -> Problem:
    solution, _ = work_out(a, b, random.Random(), slip_rate=0.0)
    return Problem(f"{a}*{b}=?", solution, str(a * b).zfill(len(str(a)) + 1))


def work_out(a: int, b: int, rng: random.Random, slip_rate: float) -> tuple[str, list[bool]]:
    """The worked solution of a · b without its <end>, and for each token whether a slip happened AT
    it: a carry forgotten or misread, a neighbour in the times table, a sum off by one or ten. What
    follows a slip is consistent with it, so the answer tells whether there was one."""
    tokens: list[str] = []
    slips: list[bool] = []

    def write(text: str, slip: bool = False) -> None:
        tokens.extend(text)
        slips.extend([slip] * len(text))

    carry, digits = 0, ""
    for digit in map(int, reversed(str(a))):
        kind = rng.choice(["carry", "table", "sum"]) if rng.random() < slip_rate else None
        added = carry
        if kind == "carry":
            added = rng.choice([0, max(0, carry - 1), min(9, carry + 1)])
        right = value = digit * b + added
        if kind == "table":
            value += rng.choice([-b, b])
        elif kind == "sum":
            value += rng.choice([-1, 1, -10, 10])
        if not 0 <= value <= 99:
            value = right
        write(f"{digit}*{b}+")
        write(str(added), slip=added != carry)
        write("=")
        write(f"{value:02d}", slip=value != right)
        write(" ")
        digits = str(value % 10) + digits
        carry = value // 10
    tokens.append("<answer>")
    slips.append(False)
    write(str(carry) + digits)
    return "".join(tokens), slips


def judge(problem: Problem, completion: str) -> Verdict:
    """Right if the completion ends, and with the right answer."""
    _, marker, answer = completion.removesuffix("<end>").rpartition("<answer>")
    if not (completion.endswith("<end>") and marker):
        return Verdict(False)
    return Verdict(answer == problem.answer, answer)
