"""What docs/real_model.md says in figures, and its picture, out of results/real_model."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.lib import report
from benchmarks.real_model.questions import GREEDY
from benchmarks.token_efficiency.verdicts import Interval, interval
from benchmarks.token_efficiency.words import points, wrapped
from opsd_train.grading.scores import wilson

METHODS = {"opsd": "OPSD", "sft": "SFT"}
ELSEWHERE = {
    "products": "products (2 to 9, an example in view)",
    "capitals": "capitals of countries",
    "opposites": "opposites of words",
}

Row = dict[str, Any]


def read(results: Path, name: str) -> list[Row]:
    text = (results / "real_model" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def real_model_parts(results: Path, page: Path) -> dict[str, str]:
    """What stands between the marks of docs/real_model.md."""
    rows = read(results, "rows")
    return {
        "claim": wrapped(claim(rows)),
        "tests": tests_table(rows),
        "elsewhere": elsewhere_table(rows),
        "tried": tried_table(read(results, "candidates")),
    }


def claim(rows: list[Row]) -> str:
    before, read = (_one(rows, "base", temperature=t) for t in (None, GREEDY))
    sampled, greedy = (
        {method: f"{_mean_share(rows, method, t):.0%}" for method in METHODS}
        for t in (None, GREEDY)
    )
    changes = [_change(rows, "opsd", t) for t in (GREEDY, None)]
    return (
        f"Of {read['asked']} sums that no run has seen, the model solves {_share(read):.0%} before "
        f"training, read greedily, and {greedy['opsd']} after OPSD: {points(changes[0])} over "
        f"{len(seeds(rows, 'opsd'))} seeds, which {changes[0].verdict}. Sampled at T = 0.7 it "
        f"solves {_share(before):.0%} before and {sampled['opsd']} after: {points(changes[1])}, "
        f"which {changes[1].verdict}. (Its teacher, who sees the solution, samples "
        f"{taught(rows):.0%} of held-out ones right.) SFT on the same problems solves more, "
        f"{greedy['sft']} read greedily and {sampled['sft']} sampled, and forgets more: products "
        f"of small numbers, which the model could do, go from {_elsewhere(rows, 'base')} to "
        f"{_elsewhere(rows, 'sft')}, and after OPSD are at {_elsewhere(rows, 'opsd')}."
    )


def in_a_sentence(results: Path) -> str:
    """What the README says of it."""
    rows = read(results, "rows")
    before = _share(_one(rows, "base", temperature=GREEDY))
    opsd, sft = (_mean_share(rows, method, GREEDY) for method in METHODS)
    return wrapped(
        f"SmolLM2-135M solves {before:.0%} of [unseen sums](docs/real_model.md), after OPSD "
        f"{opsd:.0%}, after SFT {sft:.0%} (greedily)."
    )


def _elsewhere(rows: list[Row], method: str) -> str:
    found = [r for r in rows if r["run"].startswith(method) and r["questions"] == "products"]
    return f"{fmean(map(_share, found)):.0%}"


def tests_table(rows: list[Row]) -> str:
    """The test sums, greedy and sampled."""
    temperatures = sorted({r["temperature"] for r in rows if r.get("temperature") is not None})
    head = ["", *("sampled, T = " + str(t) if t else "greedy" for t in temperatures)]
    before = [_with_interval(_one(rows, "base", temperature=t)) for t in temperatures]
    lines = [["the model", *before]]
    for method, name in METHODS.items():
        found = [_mean(seeds(rows, method, temperature=t)) for t in temperatures]
        lines.append([f"after {name}", *found])
    for method, name in METHODS.items():
        changes = [points(_change(rows, method, t)) for t in temperatures]
        lines.append([f"{name} − the model", *changes])
    return report.table(head, lines)


def elsewhere_table(rows: list[Row]) -> str:
    """Questions of other kinds, greedy, before and after."""
    head = ["", "questions", "the model", *(f"after {name}" for name in METHODS.values())]
    lines = []
    for questions, name in ELSEWHERE.items():
        before = _one(rows, "base", questions, GREEDY)
        after = [seeds(rows, method, questions, GREEDY) for method in METHODS]
        lines.append([name, str(before["asked"]), f"{_share(before):.0%}", *map(_mean, after)])
    return report.table(head, lines)


def tried_table(candidates: list[Row]) -> str:
    head = ["task", "form of the answer", "prompt", "greedy", "sampled, T = 0.7"]
    lines = []
    for c in candidates:
        number = c["examples"]
        examples = f", {number} example{'s' if number > 1 else ''}" if number else ""
        shares = [f"{100 * c[how]:.0f}%" for how in ("greedy", "sampled")]
        lines.append([c["task"], c["form"], c["context"] + examples, *shares])
    return report.table(head, lines)


def seeds(
    rows: list[Row], method: str, questions: str = "sums", temperature: float | None = None
) -> list[Row]:
    """A row a seed; of those without a temperature the one that runs sample with."""
    names = sorted({r["run"] for r in rows if r["run"].startswith(f"{method}-")})
    return [_one(rows, name, questions, temperature) for name in names]


def _one(
    rows: list[Row], run: str, questions: str = "sums", temperature: float | None = None
) -> Row:
    found = [
        r
        for r in rows
        if (r["run"], r["questions"]) == (run, questions)
        and temperature in (None, r["temperature"])
    ]
    return max(found, key=lambda r: r["temperature"])


def taught(rows: list[Row]) -> float:
    """What the teacher samples right of the held-out problems of all seeds."""
    found = [r for r in rows if r["side"] == "teacher"]
    return sum(r["correct"] for r in found) / sum(r["asked"] for r in found)


def _share(row: Row) -> float:
    return row["correct"] / row["asked"]


def _mean_share(rows: list[Row], method: str, temperature: float | None = None) -> float:
    return fmean(map(_share, seeds(rows, method, temperature=temperature)))


def _change(rows: list[Row], method: str, temperature: float | None = None) -> Interval:
    """Of the test sums, over the seeds."""
    before = _share(_one(rows, "base", temperature=temperature))
    return interval([_share(r) - before for r in seeds(rows, method, temperature=temperature)])


def _with_interval(row: Row) -> str:
    low, high = wilson(_share(row), row["asked"])
    return f"{_share(row):.1%} ({100 * low:.0f} to {100 * high:.0f})"


def _mean(of: list[Row]) -> str:
    each = ", ".join(f"{100 * _share(r):.0f}" for r in of)
    return f"{fmean(map(_share, of)):.1%} ({'seeds' if len(of) > 1 else 'one seed'}: {each})"


# The picture


def draw(results: Path, output: Path) -> None:
    """Held-out accuracy over the steps of each run, beside where it began and the teacher."""
    rows = [r for r in read(results, "rows") if r["questions"] == "held-out"]
    colors = {"opsd": "#1f6fb4", "sft": "#8a6d1f"}
    with rc_context({"svg.hashsalt": "real_model", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 3.8), layout="constrained")
        axes = figure.subplots()
        axes.axhline(taught(rows), color="#c7502b", linestyle="--", label="teacher, before")
        for method, name in METHODS.items():
            curves: dict[str, list[tuple[int, float]]] = {}
            for r in rows:
                if r["side"] == "student" and r["run"].startswith(f"{method}-"):
                    curves.setdefault(r["run"], []).append((r["step"], _share(r)))
            for curve in curves.values():
                axes.plot(*zip(*curve, strict=True), color=colors[method], alpha=0.35, linewidth=1)
            means = [
                (points[0][0], fmean(share for _, share in points))
                for points in zip(*curves.values(), strict=True)
            ]
            label = (
                f"{name}, mean of {len(curves)} seeds" if len(curves) > 1 else f"{name}, one seed"
            )
            axes.plot(*zip(*means, strict=True), color=colors[method], marker="o", label=label)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_xlabel("step of 12 problems")
        axes.set_title("Held-out sums that are sampled right", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(loc="lower right", frameon=False, fontsize=9)
        figure.savefig(output, metadata={"Date": None})
