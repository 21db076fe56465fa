"""Problems with reference solutions, from the hub or from a file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from opsd_train.config import Config
from opsd_train.data.prompts import Contexts
from opsd_train.records import Problem

ENCODED_AT_ONCE = 1000


def load_problems(config: Config) -> list[Problem]:
    """Every problem that `where` and `max_problems` keep.

    Raises:
        OSError: a file or data set that cannot be read.
        ValueError: a row that is malformed, a column that is not there, or no row left; the message
            says which row, and what it should hold.
    """
    problems = []
    for place, row in _rows(config.data, config.split):
        try:
            if not _is_kept(row, config.where or {}):
                continue
            problem = _text(row, config.problem_column, "user")
            solution = _text(row, config.solution_column, "assistant")
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        problems.append(Problem(problem, solution))
        if len(problems) == config.max_problems:
            break
    if not problems:
        raise ValueError(f"{config.data} has no row with where={config.where}")
    return problems


def load_answered_problems(
    data: str,
    split: str,
    problem_column: str,
    answer_column: str,
    where: dict[str, Any] | None = None,
) -> list[Problem]:
    """Problems with answers and without solutions, to evaluate on; an answer is text or a number.

    Raises:
        OSError, ValueError: as `load_problems`.
    """
    problems = []
    for place, row in _rows(data, split):
        try:
            if not _is_kept(row, where or {}):
                continue
            problem = _text(row, problem_column, "user")
            answer = _cell(row, answer_column, "answer_column")
            if isinstance(answer, bool) or not str(answer if answer is not None else "").strip():
                raise ValueError(
                    f"column {answer_column} must hold text or a number, got {answer!r}"
                )
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        problems.append(Problem(problem, solution="", answer=str(answer)))
    if not problems:
        raise ValueError(f"{data} has no row" + (f" with where={where}" if where else ""))
    return problems


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


def _rows(data: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows, each with the place to look for it."""
    if data.endswith(".jsonl"):
        yield from _json_lines(Path(data))
        return
    try:
        if data.endswith(".parquet"):
            rows = datasets.load_dataset("parquet", data_files=data, split="train")
        else:
            rows = datasets.load_dataset(data, split=split)
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{data} cannot be read: {error.__cause__ or error}") from error
    for i, row in enumerate(rows):
        yield f"{data}, row {i}", row


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # By hand, so that a broken line is known by its number.
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON ({error}); mend or remove the line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place}: must be an object, got {type(row).__name__}")
            yield place, row


def _is_kept(row: dict[str, Any], where: dict[str, Any]) -> bool:
    for column, wanted in where.items():
        value = _cell(row, column, "where")
        if value not in (wanted if isinstance(wanted, list) else [wanted]):
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
            f"got {row[column]!r:.80}. Mend or remove the row, or leave it out with `where`"
        )
    return value


def _cell(row: dict[str, Any], column: str, option: str) -> Any:
    if column not in row:
        raise ValueError(f"no column {column}; it has {', '.join(row)}. Set {option}")
    return row[column]
