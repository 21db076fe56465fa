"""The parts of docs/benchmarks.md: all tables, with a line for every method."""

import os
from pathlib import Path

from benchmarks import accuracy, memory, speed, step
from benchmarks.gpu import resources
from benchmarks.history import record
from benchmarks.lib import report
from benchmarks.lib.records import OperationError
from benchmarks.more import cross_entropy
from benchmarks.pages.gpus import Gpu, gpus, slug
from benchmarks.pages.wins import wins
from benchmarks.token_efficiency.words import wrapped


def benchmarks_parts(results: Path, page: Path) -> dict[str, str]:
    """What stands between the marks of the page, by the marks' name. `page` is its place."""
    return {
        "accuracy": _accuracy(results / "accuracy.csv", page),
        "memory": _memory(results / "memory.csv"),
        "counts": wrapped(
            " ".join(filter(None, (_agreement(gpu, results) for gpu in gpus(results))))
        ),
        "heads": _every_head(results / "memory.csv"),
        "speed": _speed(results / "speed.csv"),
        "trained": "\n\n".join(map(_speed, sorted(results.glob("*/trained.csv")))),
        "cross-entropy": _cross_entropy(results),
        "step": _step(results / "step.csv"),
        "resources": resources.summary(results / "resources.csv"),
        "history": record.summary(),
        "gpus": "\n\n".join(_section(gpu, page) for gpu in gpus(results)) or "None yet.",
    }


def _accuracy(path: Path, page: Path) -> str:
    """The picture and all that was recorded on a CPU."""
    return "\n\n".join([*picture(path, accuracy.caption(path), page), _errors(path)])


def _errors(path: Path) -> str:
    _, rows = report.read(path, accuracy.Row)

    def case(row: accuracy.Row) -> tuple[str, float]:
        return row.divergence, row.mean_jsd

    told = wins(
        rows, case, {"the gradient's error": "grad_error", "the loss's error": "loss_error"}
    )
    return f"{accuracy.summary(path)}\n\n{wrapped(told)}"


def _memory(path: Path) -> str:
    _, rows = report.read(path, memory.Row)
    measured = [row for row in rows if row.device != "counted"]
    told = wins(measured, lambda row: row.N, {"measured memory": "measured_mib"})
    return f"{memory.summary(path)}\n\n{wrapped(told)}"


def _speed(path: Path) -> str:
    _, rows = report.read(path, speed.Row)
    rows = [row for row in rows if row.method != speed.FLOOR]
    told = wins(rows, lambda row: (row.N, row.D, row.V, row.dtype), {"time": "floors"})
    return f"{speed.summary(path)}\n\n{wrapped(told)}"


def _step(path: Path) -> str:
    """Compared are methods that differ in the loss alone."""
    _, rows = report.read(path, step.Row)
    measured = [row for row in rows if row.device != "counted" and "offloaded" not in row.method]
    told = []
    for sampled, what in ((False, "a step"), (True, "a step with sampled tokens")):
        of_them = [row for row in measured if ("sampled token" in row.method) == sampled]
        figures = {f"the memory of {what}": "peak_mib", f"the time of {what}": "seconds"}
        told.append(wins(of_them, lambda row: row.N, figures))
    return f"{step.summary(path)}\n\n{wrapped(' '.join(told))}"


def _agreement(gpu: Gpu, results: Path) -> str:
    """A sentence on how far what a GPU measured is from what is counted; nothing if it
    measured nothing that is counted."""
    _, rows = report.read(results / "memory.csv", memory.Row)
    counted = {
        (row.model, row.N, row.method): row.counted_mib for row in rows if row.device == "counted"
    }
    pairs = [
        (row.N, row.method, row.measured_mib / counted[key] - 1)
        for row in gpu.rows("memory", memory.Row)
        if not row.failure and (key := (row.model, row.N, row.method)) in counted
    ]
    if not pairs:
        return ""
    tokens = " and ".join(f"{N:,}" for N in sorted({N for N, _, _ in pairs}))
    methods = len({method for _, method, _ in pairs})
    most = max(abs(apart) for _, _, apart in pairs)
    return (
        f"On {gpu.name}, at {tokens} tokens, PyTorch's allocator measured within {most:.1%} of the "
        f"count, for {methods} {'methods' if methods > 1 else 'method'}."
    )


def _cross_entropy(results: Path) -> str:
    """What was recorded on a CPU, and on which GPUs there is more."""
    on_gpus = [gpu for gpu in gpus(results) if gpu.csv("cross_entropy")]
    names = ", ".join(f"[{gpu.name}](#{slug(gpu.name)})" for gpu in on_gpus)
    also = f"Also measured on {names}." if names else "It has not been measured on a GPU."
    path = results / "cross_entropy.csv"
    _, rows = report.read(path, cross_entropy.Row)
    measured = [row for row in rows if row.what == "measured"]

    def case(row: cross_entropy.Row) -> tuple[int, str, str]:
        return row.N, row.dtype, row.head

    told = wins(measured, case, {"memory": "peak_mib", "time": "processor_s"})
    return f"{cross_entropy.summary(path)}\n\n{wrapped(f'{told} {also}')}"


def _every_head(path: Path) -> str:
    """What is counted of each model's head, at every number of tokens."""
    _, rows = report.read(path, memory.Row)
    counted = [row for row in rows if row.device == "counted"]
    models = dict.fromkeys(row.model for row in counted)
    told = wins(counted, lambda row: (row.model, row.N), {"counted memory": "counted_mib"})
    tables = [
        memory.counted_table([row for row in report.complete(counted) if row.model == model])
        for model in models
    ]
    return "\n\n".join([wrapped(told), *tables])


def _section(gpu: Gpu, page: Path) -> str:
    """What was measured on a GPU."""
    parts = [f"### {gpu.name}", gpu.hardware + "."]
    for title, name, summary in (
        ("Time, as multiples of three bare products", "speed", _speed),
        ("Memory", "memory", _memory),
        ("Accuracy", "accuracy", _errors),
        ("Cross-entropy", "cross_entropy", cross_entropy.summary),
        ("A whole training step", "training", _training),
        ("Every operation at a real size", "operations", _operations),
    ):
        if path := gpu.csv(name):
            parts += [f"#### {title}", *picture(path, f"{title} on {gpu.name}", page)]
            parts.append(summary(path))
    if gpu.ended:
        parts += ["#### How each step of `make gpu` ended", f"```\n{gpu.ended}\n```"]
    return "\n\n".join(parts)


def _training(path: Path) -> str:
    from benchmarks.gpu import training  # which imports all that trains

    return training.summary(path)


def _operations(path: Path) -> str:
    """Of each operation the largest error in either schedule, as a share of what is allowed."""
    setting, rows = report.read(path, OperationError)
    worst: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        of_case = f"D = {row.D}, {row.dtype}, distance {row.distance:g}"
        shares = worst.setdefault((row.operation, of_case), {})
        shares[row.workspace_mib] = max(shares.get(row.workspace_mib, 0), row.error / row.bound)
    body = [
        [*case, *(f"{shares[mib]:.2f}" if mib in shares else "–" for mib in (0, 320))]
        for case, shares in worst.items()
    ]
    about = "Largest error against float64 on a few rows, as a share of its bound:"
    table = report.table(["operation", "case", "logit-free", "row workspace"], body)
    return f"{about}\n\n{table}\n\n({setting})"


def picture(path: Path, text: str, page: Path) -> list[str]:
    """The picture beside a csv, as it is called from a page; none if there is none."""
    picture = path.with_suffix(".png")
    return [f"![{text}]({os.path.relpath(picture, page.parent)})"] if picture.exists() else []
