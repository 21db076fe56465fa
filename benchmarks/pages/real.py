"""docs/real_distributions.md: what was measured on a real model; and the README's accuracy."""

from pathlib import Path

from benchmarks import accuracy
from benchmarks.lib import report
from benchmarks.more import adoptions, same_training
from benchmarks.pages.gpus import gpus
from benchmarks.pages.tables import picture
from benchmarks.pages.wins import wins
from benchmarks.token_efficiency.words import wrapped


def real_parts(results: Path, page: Path) -> dict[str, str]:
    """What stands between the marks of the page, by the marks' name. `page` is its place."""
    of_training = results / "same_training.csv"
    shown = picture(of_training, "Loss and gradient norm over the steps of each run", page)
    return {
        "accuracy": _errors(results / "real_accuracy.csv"),
        "training": "\n\n".join([*shown, same_training.summary(of_training)]),
        "adoptions": adoptions.summary(results / "adoptions.csv"),
    }


def _errors(path: Path) -> str:
    _, rows = report.read(path, accuracy.RealRow)
    figures = {"the gradient's error": "grad_error", "the loss's error": "loss_error"}
    told = wins(rows, lambda row: row.divergence, figures)
    return f"{accuracy.real_summary(path)}\n\n{wrapped(told)}"


def accuracy_in_a_sentence(results: Path) -> str:
    """On a real model ours beside its peers; on a GPU the largest error of ours."""
    path = results / "real_accuracy.csv"
    setting, of_all = report.read(path, accuracy.RealRow)
    rows = {row.method: row for row in of_all if row.divergence == of_all[0].divergence}
    ours = max((row for row in rows.values() if is_ours(row)), key=lambda row: row.grad_error)
    named = {
        "eager bf16 logits": rows["eager, bf16 logits"],
        "Liger, chunked": rows["Liger, chunked"],
        "TRL": rows["TRL"],
        "ours": ours,
    }
    errors = "; ".join(
        f"{name} {accuracy.percent(row.grad_error)}, {accuracy.percent(row.loss_error)}"
        for name, row in named.items()
    )
    model = setting.partition("; ")[2].partition(",")[0]
    on_gpus = "".join(
        f" On {gpu.name}, on made-up distributions, ours errs by at most "
        f"{_largest_of_ours(gpu.rows('accuracy', accuracy.Row)):.1f} such roundings "
        f"({report.source(of_gpu)})."
        for gpu in gpus(results)
        if (of_gpu := gpu.csv("accuracy"))
    )
    return wrapped(
        "It is [accurate](docs/maths.md#values-where-student-and-teacher-agree) in bf16. Errors of "
        f"gradient and loss over [{model}'s answers](docs/real_distributions.md) (entropy "
        f"{ours.entropy:.1f} nats, JSD {ours.mean_jsd:.2g}): {errors}; rounding the exact gradient "
        f"{accuracy.percent(ours.rounding)} ({report.source(path)}).{on_gpus}"
    )


def is_ours(row: accuracy.Row) -> bool:
    return row.method.startswith("ours")


def _largest_of_ours(rows: list[accuracy.Row]) -> float:
    return max(row.grad_error / row.rounding for row in rows if is_ours(row))
