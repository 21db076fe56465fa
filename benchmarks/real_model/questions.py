"""What a model is asked before and after: the test sums, and questions of other kinds."""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from benchmarks.real_model.sums import sums
from opsd_train.config import Config
from opsd_train.data import Context
from opsd_train.grading import Grader, MathGrader, Verdict
from opsd_train.records import Problem

GREEDY = 0.0
PRESET = "smollm2-135m-sums"

CAPITALS = {
    **{"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid"},
    **{"Portugal": "Lisbon", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw"},
    **{"Hungary": "Budapest", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki"},
    **{"Denmark": "Copenhagen", "Ireland": "Dublin", "Belgium": "Brussels", "Russia": "Moscow"},
    **{"Turkey": "Ankara", "Egypt": "Cairo", "Kenya": "Nairobi", "Japan": "Tokyo"},
    **{"China": "Beijing", "India": "New Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi"},
    **{"Indonesia": "Jakarta", "Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima"},
    **{"Chile": "Santiago", "Argentina": "Buenos Aires", "Iran": "Tehran", "Iraq": "Baghdad"},
}
OPPOSITES = {
    **{"hot": "cold", "big": "small", "up": "down", "left": "right", "day": "night"},
    **{"fast": "slow", "happy": "sad", "rich": "poor", "strong": "weak", "light": "dark"},
    **{"open": "closed", "early": "late", "full": "empty", "high": "low", "hard": "soft"},
    **{"old": "young", "wet": "dry", "love": "hate", "win": "lose", "true": "false"},
    **{"black": "white", "good": "bad", "near": "far", "inside": "outside", "loud": "quiet"},
    **{"north": "south", "clean": "dirty", "thick": "thin", "wide": "narrow", "safe": "dangerous"},
}
PRODUCTS = [(a, b) for a in range(2, 10) for b in range(a, 10)]


@dataclass(frozen=True)
class Questions:
    name: str
    context: Context
    problems: list[Problem]
    grader: Grader
    temperatures: tuple[float, ...] = (GREEDY,)
    max_new_tokens: int = 24


def all_questions(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Questions]:
    student = Context(tokenizer, config.student_template)
    alone = Context(tokenizer, "{problem}")
    with_example = Context(
        tokenizer,
        (
            {"role": "user", "content": "What is 3 times 10?"},
            {"role": "assistant", "content": "3 times 10 is 30."},
            {"role": "user", "content": "{problem}"},
        ),
    )
    tests = [Problem(p.question, p.solution, p.solution) for p in sums()[1]]
    capitals = [Problem(f"What is the capital of {k}?", "", v) for k, v in CAPITALS.items()]
    opposites = [Problem(f"What is the opposite of {k}?", "", v) for k, v in OPPOSITES.items()]
    products = [Problem(f"What is {a} times {b}?", "", str(a * b)) for a, b in PRODUCTS]
    return [
        Questions("sums", student, tests, MathGrader(), (GREEDY, config.temperature)),
        Questions("products", with_example, products, last_number),
        Questions("capitals", alone, capitals, contains),
        Questions("opposites", alone, opposites, contains),
    ]


def contains(problem: Problem, completion: str) -> Verdict:
    """Whether the answer is among the words."""
    found = re.search(rf"\b{re.escape(problem.answer)}\b", completion, re.IGNORECASE)
    return Verdict(found is not None)


def last_number(problem: Problem, completion: str) -> Verdict:
    """Whether the last number is the answer."""
    numbers = re.findall(r"\d+", completion)
    return Verdict(bool(numbers) and numbers[-1] == problem.answer)
