"""Problems with known answers: benchmarks by name, data sets and files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from opsd_train.data import AnsweredSet, load_answered_problems
from opsd_train.errors import did_you_mean
from opsd_train.records import Problem

BENCHMARKS = {
    "aime24": AnsweredSet("HuggingFaceH4/aime_2024"),
    "aime25": AnsweredSet("yentinglin/aime_2025"),
    "hmmt25": AnsweredSet("MathArena/hmmt_feb_2025"),
    # 39 of its 50 problems. Answers to the others are descriptions, for a language model to grade.
    "amo-bench": AnsweredSet(
        "meituan-longcat/AMO-Bench",
        split="test",
        problem_column="prompt",
        where={"answer_type": ["number", "set", "variable"]},
    ),
}


def benchmark_names() -> list[str]:
    return list(BENCHMARKS)


def load_benchmark(
    name: str, report: Callable[[str], None] = lambda text: None, **options: Any
) -> list[Problem]:
    """The problems of a benchmark, a data set or a file, by name.

    Args:
        report: called with a text on rows that are left out.
        options: fields of `AnsweredSet`, where they are not as the benchmark has them.

    Raises:
        OSError: a file or data set that cannot be read.
        ValueError: no such benchmark; or a row without problem or answer, or no row.
    """
    if name not in BENCHMARKS and "/" not in name and not Path(name).exists():
        hint = did_you_mean(name, BENCHMARKS)
        raise ValueError(
            f"there is no benchmark {name}{hint or '.'} Known are {', '.join(BENCHMARKS)}, "
            "held-out, .jsonl, .json, .csv and .parquet files, and data sets on the hub by "
            "owner/name"
        )
    of = replace(BENCHMARKS.get(name, AnsweredSet(name)), **options)
    return load_answered_problems(of, report)
