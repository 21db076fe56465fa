"""Problems with known answers: benchmarks by name, data sets and files."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from opsd_train.data import load_answered_problems
from opsd_train.records import Problem


@dataclass(frozen=True)
class Benchmark:
    """Where problems and their answers are, as `load_answered_problems` reads them."""

    data: str  # data set on the hub, or a file
    split: str = "train"
    problem_column: str = "problem"
    answer_column: str = "answer"
    where: dict[str, Any] | None = None


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024"),
    "aime25": Benchmark("yentinglin/aime_2025"),
    "hmmt25": Benchmark("MathArena/hmmt_feb_2025"),
    # 39 of its 50 problems. Answers to the others are descriptions, for a language model to grade.
    "amo-bench": Benchmark(
        "meituan-longcat/AMO-Bench",
        split="test",
        problem_column="prompt",
        where={"answer_type": ["number", "set", "variable"]},
    ),
}


def benchmark_names() -> list[str]:
    return list(BENCHMARKS)


def load_benchmark(
    name: str,
    *,
    skip_bad_rows: bool = False,
    report: Callable[[str], None] = lambda text: None,
    **columns: Any,
) -> list[Problem]:
    """The problems of a benchmark, a data set or a file, by name.

    Args:
        skip_bad_rows, report: whether rows that cannot be read are left out, and what is called
            with a text on them.
        columns: `problem_column` and `answer_column`, `split` too, where they are not the defaults.

    Raises:
        OSError: a file or data set that cannot be read.
        ValueError: a row without problem or answer, or no row.
    """
    benchmark = replace(BENCHMARKS.get(name, Benchmark(name)), **columns)
    return load_answered_problems(
        benchmark.data,
        benchmark.split,
        benchmark.problem_column,
        benchmark.answer_column,
        benchmark.where,
        skip_bad_rows,
        report,
    )
