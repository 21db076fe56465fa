r"""Sums of two numbers from 2 to 39: the problems of the preset smollm2-135m-sums.

    What is 6 plus 16?
    6 plus 16 is 22. \boxed{22}

A quarter of the pairs is for tests, and is not in the file that a run trains on and holds out from.
"""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

from opsd_train.config import Config
from opsd_train.errors import RunFailed
from opsd_train.records import Problem

NAME = "sums"
"""Stands for the file, as `data`."""


def find_sums(config: Config) -> Config:
    """The config with the file's path in place of its name. The file is written first.

    Raises:
        RunFailed: the cache cannot be written.
    """
    if config.data != NAME:
        return config
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "opsd_train" / "sums.jsonl"
    rows = [json.dumps({"problem": p.question, "solution": p.solution}) + "\n" for p in sums()[0]]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")  # one of several processes'
        unfinished.write_text("".join(rows), encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise RunFailed(f"{error}; set XDG_CACHE_HOME to a writable folder") from error
    return replace(config, data=str(path))


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
