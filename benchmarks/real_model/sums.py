r"""Sums of two numbers from 2 to 39: the problems of the preset smollm2-135m-sums.

    What is 6 plus 16?
    6 plus 16 is 22. \boxed{22}

A quarter of the pairs is for tests, and is not in the file that a run trains on and holds out from.

    python benchmarks/real_model/sums.py    # writes that file, beside the preset
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import opsd_train.presets
from opsd_train.records import Problem

FILE = Path(opsd_train.presets.__file__).with_name("smollm2-135m-sums.jsonl")


def sums() -> tuple[list[Problem], list[Problem]]:
    """556 problems to train on and to hold out, and 185 for tests. No two have the same numbers, in
    whatever order: who has seen 6 plus 16 would know 16 plus 6."""
    rng = random.Random(0)
    pairs = [rng.sample([a, b], 2) for b in range(2, 40) for a in range(2, b + 1)]
    rng.shuffle(pairs)
    problems = [make_sum(a, b) for a, b in pairs]
    tests = len(problems) // 4
    return problems[tests:], problems[:tests]


def make_sum(a: int, b: int) -> Problem:
    return Problem(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}. \\boxed{{{a + b}}}")


def main() -> None:
    rows = [{"problem": p.question, "solution": p.solution} for p in sums()[0]]
    FILE.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
