"""Where a peer did better than ours, in words, so that a table is not read past it."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.lib import report

OUT_OF_MEMORY = ("out of memory", report.DOES_NOT_FIT)


def wins(rows: list[Any], case: Callable[[Any], Any], figures: dict[str, str]) -> str:
    """Which peers did better than ours, either of ours, and in how many cases.

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
    found = dict[str, list[str]]()
    for ours in dict.fromkeys(row.method for row in rows if row.method.startswith("ours")):
        won, compared = Counter[str](), Counter[str]()
        for of in cases.values():
            for peer, x in of.items():
                if ours in of and not peer.startswith("ours"):
                    compared[peer] += 1
                    won[peer] += x < of[ours]
        if compared:
            found[ours] = [
                f"{peer} in {n} of {compared[peer]} cases" for peer, n in won.items() if n
            ]
    if not any(found.values()):
        return f"No peer was better than ours in {name}."
    return " ".join(
        f"Better in {name} than our {ours.removeprefix('ours, ')}: {'; '.join(peers) or 'no peer'}."
        for ours, peers in found.items()
    )
