"""Figures as words, and words as Markdown."""

import math
import re
import textwrap
from collections.abc import Sequence
from statistics import fmean

from benchmarks.token_efficiency.multiplication import LEVELS
from benchmarks.token_efficiency.plan import Result
from benchmarks.token_efficiency.results import Results
from benchmarks.token_efficiency.verdicts import Interval, tokens_to

PICTURES = "token_efficiency"  # folder, in docs/


def listed(names: Sequence[str]) -> str:
    return "; ".join(names) or "none"


def claims(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def claim(what: str, of: Interval) -> str:
    return f"{what}: {points(of)}: **{of.verdict}**."


def points(of: Interval) -> str:
    mean, low, high = (f"{100 * x:+.1f}".replace("-", "−") for x in (of.mean, of.low, of.high))
    return f"{mean} points ({low} to {high})" if math.isfinite(of.low) else f"{mean} points"


def spread(values: Sequence[float]) -> str:
    return f"{fmean(values):.1%} ({min(values):.0%} – {max(values):.0%})"


def share(of: tuple[float, float, float]) -> str:
    return f"{of[0]:.0%} ({100 * of[1]:.0f} to {100 * of[2]:.0f})"


def judged(of: tuple[float, float, float], chance: float) -> str:
    return Interval(of[0] - chance, of[1] - chance, of[2] - chance).verdict


def thousands(cells: Sequence[Result], accuracy: float) -> str:
    if not cells[0]["curve"][-1]["tokens"]:
        return "none"
    needed = [tokens_to(result["curve"], accuracy) for result in cells]
    return "–" if any(map(math.isinf, needed)) else f"{fmean(needed) / 1000:.0f}k"


def of_levels(solved: Sequence[int], samples: int) -> list[float]:
    """Accuracy of each level; problems are in the order of levels, as many of each."""
    each = len(solved) // len(LEVELS)
    return [fmean(solved[i : i + each]) / samples for i in range(0, each * len(LEVELS), each)]


def parameters(results: Results, size: str | None = None) -> str:
    wanted = size or results.plan["size"]
    known = {m["size"]: m["parameters"] for m in results.setting["models"]}
    return f"{known[wanted]:,}" if wanted in known else "–"


def mib(x: float) -> str:
    return f"{x / 1024:,.1f} GiB" if x >= 1024 else f"{x:,.1f} MiB"


def picture(name: str, text: str) -> str:
    return f"![{text}]({PICTURES}/{name}.png)"


def reflowed(text: str) -> str:
    """Markdown with its paragraphs and list items filled anew; tables, code and comments as they
    are."""
    blocks = []
    for block in text.split("\n\n"):
        if not block.startswith(("|", "#", "```", "!", "<!--")):
            items = re.split(r"\n(?=- )", block)
            block = "\n".join(map(wrapped, items))
        blocks.append(block)
    return "\n\n".join(blocks)


def wrapped(text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()),
        100,
        subsequent_indent="  " if text.startswith("- ") else "",
        break_long_words=False,
        break_on_hyphens=False,
    )
