"""Where a peer did better than ours, in words, so that a table is not read past it."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.lib import report

OUT_OF_MEMORY = ("out of memory", report.DOES_NOT_FIT)


def wins(rows: list[Any], case: Callable[[Any], Any], figures: dict[str, str]) -> str:
    """Which peers did better than the better of ours, and in how many cases.

    Args:
        rows: of several methods.
        case: of a row, what it must have in common with another to be compared with it.
        figures: a field of the rows by its name in words; less is better.
    """
    return " ".join(_wins(rows, case, *named) for named in figures.items())


def _wins(rows: list[Any], case: Callable[[Any], Any], name: str, field: str) -> str:
    cases = dict[Any, dict[str, float]]()
    for row in rows:
        value = getattr(row, field)
        if getattr(row, "failure", "") in OUT_OF_MEMORY:
            value = math.inf
        if not math.isnan(value):
            cases.setdefault(case(row), {})[row.method] = value
    won, compared = Counter[str](), Counter[str]()
    for figures in cases.values():
        best = min((x for method, x in figures.items() if _is_ours(method)), default=math.nan)
        for method, x in figures.items():
            if not _is_ours(method) and not math.isnan(best):
                compared[method] += 1
                won[method] += x < best
    better = [f"{peer} in {n} of {compared[peer]} cases" for peer, n in won.items() if n]
    if not better:
        return f"No peer was better than ours in {name}."
    return f"Better than the better of ours in {name}: {'; '.join(better)}."


def _is_ours(method: str) -> bool:
    return method.startswith("ours")
