"""Long numbers times one digit: problems of several levels, worked solutions, and who is right.

    <problem>d3c8b4a7*6<solution>a7*6+0=42b4*6+4=28c8*6+2=50d3*6+5=23<end>

Every digit of the problem has a letter, a at the units; a step is its letter, digit · multiplier +
carry = value. The answer is read off the steps: the units of each, before them the last one's tens.
A reference solution is terser than that, as those of data sets are, the values alone:

    <reference>a42b28c50d23

Alone, the model has learnt to err in two ways. Misconceptions are systematic: some pairs of the
times table have a wrong value, and a carry is forgotten at a zero, more often than not; so they are
what greedy decoding says. Slips happen anywhere.
"""

import random
import zlib
from dataclasses import dataclass

from opsd_train.grading import Verdict
from opsd_train.records import Problem

STUDENT_TEMPLATE = "<problem>{problem}<solution>"
TEACHER_TEMPLATE = "<problem>{problem}<reference>{solution}<rework><solution>"
LETTERS = "abcdefghijkl"
LEVELS = (6, 8, 10, 12)  # digits
PARTS = ("warm start", "train", "validation", "test")  # of all pairs of numbers

WRONG_PAIRS = {(7, 8): -8, (8, 7): -7, (6, 9): 9, (9, 4): -4, (4, 6): 6, (3, 3): 3, (6, 7): 7}
"""(digit, multiplier) and how far off its product is believed to be."""
MISCONCEPTION, SLIP = 0.65, 0.05  # how often a misconception is acted on; a slip at any step


@dataclass(frozen=True)
class Working:
    """A worked solution without its <end>, and which of its characters are mistakes: those that
    do not follow from what is before them."""

    text: str
    mistakes: list[bool]


def make_problem(a: int, b: int) -> Problem:
    number = str(a)
    question = "".join(f"{LETTERS[len(number) - 1 - i]}{d}" for i, d in enumerate(number))
    return Problem(f"{question}*{b}", reference(a, b), str(a * b).zfill(len(number) + 1))


def reference(a: int, b: int) -> str:
    """The values of the steps, each after its letter."""
    values, carry = [], 0
    for digit in map(int, reversed(str(a))):
        values.append(digit * b + carry)
        carry = values[-1] // 10
    return "".join(f"{letter}{value:02d}" for letter, value in zip(LETTERS, values, strict=False))


def work_out(
    a: int, b: int, rng: random.Random, misconception: float = 0.0, slip: float = 0.0
) -> Working:
    """The worked solution of a · b, with mistakes at the rates given. What follows a mistake is
    consistent with it, so the answer tells whether there was one."""
    text, mistakes, carry = "", list[bool](), 0

    def write(some: str, mistake: bool = False) -> None:
        nonlocal text
        text += some
        mistakes.extend([mistake] * len(some))

    for letter, digit in zip(LETTERS, map(int, reversed(str(a))), strict=False):
        added, off = carry, 0
        if rng.random() < misconception:
            if digit == 0:
                added = 0
            off = WRONG_PAIRS.get((digit, b), 0)
        if rng.random() < slip:
            kind = rng.choice(["carry", "table", "sum"])
            if kind == "carry":
                added = rng.choice([0, max(0, carry - 1), min(9, carry + 1)])
            else:
                off = rng.choice([-b, b] if kind == "table" else [-1, 1, -10, 10])
        right = digit * b + added
        value = right + off if 0 <= right + off <= 99 else right
        write(f"{letter}{digit}*{b}+")
        write(str(added), added != carry)
        write("=")
        write(f"{value:02d}", value != right)
        carry = value // 10
    return Working(text, mistakes)


def judge(problem: Problem, completion: str) -> Verdict:
    """Right if the completion ends, its steps are all there, and their units, after the last one's
    tens, are the product. Solutions of values alone are read likewise."""
    if not completion.endswith("<end>"):
        return Verdict(False)
    values = read_values(completion.removesuffix("<end>"))
    if not values:
        return Verdict(False)
    answer = values[-1][0] + "".join(value[1] for value in reversed(values))
    return Verdict(answer == problem.answer, answer)


def read_values(text: str) -> list[str]:
    """The two-digit value that ends each step; empty where one has none, or its letter is not the
    one that is due."""
    values, starts = [], [i for i, c in enumerate(text) if c in LETTERS]
    if starts[:1] != [0] or len(starts) > len(LETTERS):
        return []
    for letter, start, end in zip(LETTERS, starts, [*starts[1:], len(text)], strict=False):
        value = text[max(start + 1, end - 2) : end]
        if text[start] != letter or len(value) != 2 or not value.isdigit():
            return []
        values.append(value)
    return values


def first_mistake(problem: Problem, completion: str) -> int | None:
    """The index of the first character of a completion that does not follow from the problem and
    what is before it; None where there is none."""
    question, _, multiplier = problem.question.partition("*")
    digits, b = question[1::2][::-1], int(multiplier)
    text = completion.removesuffix("<end>")
    right, carry = "", 0
    for letter, digit in zip(LETTERS, digits, strict=False):
        for part in (f"{letter}{digit}*{b}+{carry}=", f"{int(digit) * b + carry:02d}"):
            written = text[len(right) : len(right) + len(part)]
            if written != part:
                same = [x == y for x, y in zip(written, part, strict=False)]
                return len(right) + (same.index(False) if False in same else len(written))
            right += part
        carry = int(right[-2])
    return None if text == right else len(right)


def sample_numbers(rng: random.Random, count: int, level: int, part: str) -> list[tuple[int, int]]:
    """Pairs of numbers of a part; no pair is in two parts."""
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        a, b = rng.randrange(10 ** (level - 1), 10**level), rng.randrange(2, 10)
        if PARTS[zlib.crc32(f"{a}*{b}".encode()) % len(PARTS)] == part:
            pairs.append((a, b))
    return pairs


def sample_problems(part: str, count: int, seed: int = 0) -> list[Problem]:
    """As many problems of each level, the levels in turn."""
    rng = random.Random(f"{part} {seed}")
    levels = [sample_numbers(rng, -(-count // len(LEVELS)), level, part) for level in LEVELS]
    return [make_problem(*pair) for pairs in zip(*levels, strict=True) for pair in pairs][:count]
