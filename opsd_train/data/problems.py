"""Problems with reference solutions, from the hub or from a file, and those that are held out."""

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opsd_train.config import Config
from opsd_train.data.prompts import Contexts
from opsd_train.data.rows import is_data_set, rows
from opsd_train.errors import did_you_mean, listed
from opsd_train.records import Problem

ENCODED_AT_ONCE = 1000
SHOWN = 10  # bad rows, in a message

Report = Callable[[str], None]
"""Called with a message about rows that are left out."""


def load_problems(config: Config, report: Report = lambda text: None) -> list[Problem]:
    """Every problem that `where` and `max_problems` keep.

    Raises:
        OSError: a file or data set that cannot be read.
        ValueError: rows that are malformed, a column that is not there, or no row left; the message
            says which rows, and what they should hold. With `skip_bad_rows` only if no row is left.
    """
    if config.split != "train" and not is_data_set(config.data):
        raise ValueError(f"split has an effect only on data sets; {config.data} is a file")

    def problem_of(place: str, row: dict[str, Any]) -> Problem:
        return Problem(
            _text(row, config.problem_column, "user"),
            _text(row, config.solution_column, "assistant"),
            place=place,
        )

    return _load(config, problem_of, report)


@dataclass(frozen=True)
class AnsweredSet:
    """Where problems with answers are, that have no solutions. Names are those of `Config`."""

    data: str
    split: str = "train"
    problem_column: str = "problem"
    answer_column: str = "answer"  # of texts or numbers
    where: dict[str, Any] | None = None
    skip_bad_rows: bool = False
    max_problems: int | None = None


def load_answered_problems(of: AnsweredSet, report: Report = lambda text: None) -> list[Problem]:
    """Every problem of a set to evaluate on.

    Raises:
        OSError, ValueError: as `load_problems`.
    """

    def problem_of(place: str, row: dict[str, Any]) -> Problem:
        problem = _text(row, of.problem_column, "user")
        answer = _cell(row, of.answer_column, "answer_column")
        is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
        is_number = is_number and math.isfinite(answer)  # NaN is how tables have nothing
        if not is_number and not (isinstance(answer, str) and answer.strip()):
            raise ValueError(
                f"column {of.answer_column} must hold text or a number, got {answer!r}"
            )
        return Problem(problem, solution="", answer=str(answer), place=place)

    return _load(of, problem_of, report)


def _load(
    of: Config | AnsweredSet,
    problem_of: Callable[[str, dict[str, Any]], Problem],
    report: Report,
) -> list[Problem]:
    problems: list[Problem] = []
    bad: list[tuple[str, str]] = []
    total = 0
    for place, row in rows(of.data, of.split):
        total += 1
        try:
            if isinstance(row, ValueError):
                raise row
            if _is_kept(row, of.where or {}):
                problems.append(problem_of(place, row))
        except ValueError as error:
            bad.append((place, str(error)))
        if len(problems) == of.max_problems:
            break
    if bad and not (of.skip_bad_rows and problems):
        remedy = ", or go on without them: --skip-bad-rows" if problems else ""
        raise ValueError(f"{_listed(bad, total)}\nCorrect or remove these rows{remedy}")
    if bad:
        report(f"Left out: {_listed(bad, total)}")
    if not problems:
        chosen = "" if of.where is None else f" with where={of.where}"
        raise ValueError(f"{of.data} has no row{chosen}")
    return problems


def _listed(bad: list[tuple[str, str]], total: int) -> str:
    """The first bad rows, one a line; what is wrong with all rows alike once."""
    place, reason = bad[0]
    if len(bad) == 1:
        return f"{place}: {reason}"
    if len(bad) == total and {other for _, other in bad} == {reason}:
        return f"{place}: {reason} (so it is in all {total:,} rows)"
    lines = [f"{place}: {reason}" for place, reason in bad]
    return listed(f"{len(bad):,} of {total:,} rows cannot be used", lines, SHOWN)


def those_that_fit(
    problems: list[Problem], contexts: Contexts, max_prompt_tokens: int
) -> list[Problem]:
    """Problems whose prompts both have at most `max_prompt_tokens`: a longer one is dropped whole,
    since a cut one is another problem.

    Raises:
        ValueError: none does.
    """
    fit = []
    for start in range(0, len(problems), ENCODED_AT_ONCE):
        some = problems[start : start + ENCODED_AT_ONCE]
        lengths = contexts.lengths(some)
        fit += [p for p, n in zip(some, lengths, strict=True) if n <= max_prompt_tokens]
    if not fit:
        raise ValueError(
            f"all {len(problems)} problems exceed max_prompt_tokens={max_prompt_tokens}"
        )
    return fit


def _is_kept(row: dict[str, Any], where: dict[str, Any]) -> bool:
    for column, wanted in where.items():
        value = _cell(row, column, "where")
        any_of = wanted if isinstance(wanted, list) else [wanted]
        # Cells of a table are text, and 5 is wanted.
        if value not in any_of and str(value) not in map(str, any_of):
            return False
    return True


def _text(row: dict[str, Any], column: str, role: str) -> str:
    """A cell's text: its own, or that of the last chat message of a role."""
    option = "problem_column" if role == "user" else "solution_column"
    value = _cell(row, column, option)
    if isinstance(value, list):
        said = [m.get("content") for m in value if isinstance(m, dict) and m.get("role") == role]
        value = said[-1] if said else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"column {column} must hold text, or chat messages with one of the {role}; "
            f"got {row[column]!r:.80}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"column {column} is no text that UTF-8 can hold: {error}") from None
    return value


def _cell(row: dict[str, Any], column: str, option: str) -> Any:
    if column not in row:
        hint = did_you_mean(column, row)
        raise ValueError(f"no column {column}; it has {', '.join(row)}. Set {option}{hint}")
    return row[column]


# Final answers in \boxed{}

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
            f"held_out={number} is more than the data have: {len(answers)} problems whose solution "
            "has its answer in \\boxed{}"
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
