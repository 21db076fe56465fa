"""Put what was recorded into the pages, each table and sentence with figures between two marks.

    python benchmarks/pages/readme.py

README.md has one table of a GPU, docs/choosing.md what helps to choose, docs/compatibility.md what
was tested where, docs/training.md the memory of a long rollout, docs/vllm.md that of a large
teacher, docs/real_distributions.md what a real model showed, docs/real_model.md what it learned,
examples/README.md and docs/trl.md what TRL's trainers save; docs/benchmarks.md has all tables, with
a line for every method (tables.py). docs/token_efficiency.md is generated as a whole, and so is the
Markdown beside each csv.
"""

import csv
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import accuracy, memory, speed, step, trl_trainers
from benchmarks.lib import report, sources
from benchmarks.lib.peers import METHODS
from benchmarks.lib.records import TriedVersions
from benchmarks.lib.shapes import MODELS, QWEN3
from benchmarks.more import adoptions, cross_entropy, same_training, teachers, verl_memory
from benchmarks.pages.gpus import Gpu, gpus, slug, versions
from benchmarks.pages.real import accuracy_in_a_sentence, real_parts
from benchmarks.pages.tables import benchmarks_parts
from benchmarks.real_model import page as real_model
from benchmarks.token_efficiency import figures
from benchmarks.token_efficiency import page as comparison
from benchmarks.token_efficiency.results import Results
from benchmarks.token_efficiency.words import wrapped
from opsd_kernels.versions import minor

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
EXAMPLES = ROOT / "examples" / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
CHOOSING = ROOT / "docs" / "choosing.md"
COMPATIBILITY = ROOT / "docs" / "compatibility.md"
REAL = ROOT / "docs" / "real_distributions.md"
REAL_MODEL = ROOT / "docs" / "real_model.md"
TRAINING = ROOT / "docs" / "training.md"
TRL = ROOT / "docs" / "trl.md"
VERL = ROOT / "docs" / "verl.md"
VLLM = ROOT / "docs" / "vllm.md"
TOKEN_EFFICIENCY = ROOT / "docs" / "token_efficiency.md"  # all of it is generated

LOGIT_FREE, ROW_WORKSPACE = "ours, logit-free", "ours, row workspace"
# What each method calls (benchmarks/lib/peers.py).
FUNCTIONS = {
    LOGIT_FREE: "`fused_jsd_loss`",
    ROW_WORKSPACE: "`fused_jsd_loss`",
    "eager": "`log_softmax` of all logits",
    "eager, compiled": "the same in `torch.compile`",
    "TRL": "`ChunkedDivergenceFunction`",
    "Liger, fused": "`LigerFusedLinearJSD`",
    "Liger, chunked": "`LigerFusedLinearJSDLoss`",
    "ORDA": "`distillation_loss`",
}
NOT_MEASURED = "not measured"


def readme_parts(results: Path, page: Path) -> dict[str, str]:
    """What stands between the marks of the README, by the marks' name. `page` is its place."""
    return {
        "saving": f"{_saving(results / 'memory.csv')}\n\n{accuracy_in_a_sentence(results)}",
        "trainers": _trainers(results / "trl_trainers.csv"),
        "peers": _peers(results),
        "evidence": "\n\n".join(
            [
                _tests(gpus(results)),
                comparison.in_a_sentence(Results(results / "token_efficiency")),
                real_model.in_a_sentence(results),
            ]
        ),
    }


def _saving(path: Path) -> str:
    """What the diff saves."""
    _, rows = report.read(path, memory.Row)
    counted = {(row.model, row.N, row.method): row for row in rows if row.device == "counted"}
    N = 16384
    eager, ours = (counted["qwen3-8b", N, name].counted_mib for name in ("eager", LOGIT_FREE))
    return wrapped(
        f"For {N:,} tokens and the head of Qwen3-8B in bf16, the first three lines and their "
        f"backward take **{memory.amount(eager)}**, the last line **{memory.amount(ours)}**. "
        "(Counted: the bytes of all tensors alive at once, without the inputs; "
        f"{report.source(path)}.)"
    )


def _trainers(path: Path) -> str:
    """What TRL's trainer of self-distillation saves, at the most tokens."""
    _, rows = report.read(path, trl_trainers.Row)
    sdft = ("SDFTTrainer", "full_logits")
    of_sdft = [row for row in rows if (row.trainer, row.loss) == sdft and not row.failure]
    N = max(row.N for row in of_sdft)
    theirs, ours = ({r.method: r for r in of_sdft if r.N == N}[m] for m in trl_trainers.METHODS)
    clock = " of processor time" if ours.device == "CPU" else ""
    return wrapped(
        f"{len(trl_trainers.WHOLE)} of TRL's trainers then compute their loss from hidden "
        f"states. One loss of `SDFTTrainer` and its gradient ({ours.device}, {ours.dtype}, {N} "
        f"tokens, a vocabulary of {QWEN3[ours.model]['vocab_size']:,}) takes "
        f"{ours.peak_mib:,.0f} MiB and {ours.seconds:.1f} s{clock} with it, "
        f"{theirs.peak_mib:,.0f} MiB and {theirs.seconds:.1f} s without ({report.source(path)})."
    )


def _peers(results: Path) -> str:
    """One table of a GPU, at the most tokens that were timed, and what to choose."""
    for gpu in gpus(results):
        timed = gpu.rows("speed", speed.Row)
        if any(row.method.startswith("ours") and not row.failure for row in timed):
            return _table_of(gpu, timed, results)
    return "No GPU has been measured yet."


def _table_of(gpu: Gpu, timed: list[speed.Row], results: Path) -> str:
    D, V, N = timed[0].D, timed[0].V, max(row.N for row in timed if row.D == timed[0].D)
    at = {row.method: row for row in timed if (row.N, row.D, row.V) == (N, D, V)}
    counted = _counted(results / "memory.csv", D, V)
    body = [
        [
            name,
            function,
            _cell(at.get(name), lambda row: f"{1000 * row.both_s:,.0f} ms"),
            _cell(counted.get((name, N)), lambda row: memory.amount(row.counted_mib)),
        ]
        for name, function in FUNCTIONS.items()
        if name in at or (name, N) in counted
    ]
    left_out = [name for name in METHODS if name not in at and (name, N) not in counted]
    named = "; ".join(f'"{name}"' for name in left_out)
    setting, _ = report.read(gpu.folder / "speed.csv", speed.Row)
    notes = [
        f"{gpu.name}, {versions(setting, 'torch', 'triton', *report.PEERS)}; {D:,} features, "
        f"{V:,} entries, bf16; medians; {report.source(gpu.folder / 'speed.csv')}.",
        f"Memory is counted ([how near that is](docs/benchmarks.md#memory)); "
        f"{report.source(results / 'memory.csv')}.",
        '"Liger, chunked" takes less when it is compiled.' * ("Liger, chunked" not in left_out),
        f"Neither timed nor counted: {named}." * bool(left_out),
    ]
    parts = [
        report.table([f"{N:,} tokens", "calls", "time", "memory"], body),
        wrapped(f"({' '.join(filter(None, notes))})"),
        _which(at, {method: row for (method, n), row in counted.items() if n == N}),
    ]
    return "\n\n".join(parts)


def _cell(row: Any, shown: Callable[[Any], str]) -> str:
    """A row's figure, or why there is none."""
    if row is None or row.failure not in ("", "out of memory", report.DOES_NOT_FIT):
        return NOT_MEASURED
    return row.failure or shown(row)


def _counted(path: Path, D: int, V: int) -> dict[tuple[str, int], memory.Row]:
    """What is counted of the head of that shape, by method and tokens."""
    _, rows = report.read(path, memory.Row)
    model = next(name for name, shape in MODELS.items() if shape == (D, V))
    return {
        (row.method, row.N): row
        for row in rows
        if (row.device, row.model) == ("counted", model) and not row.failure
    }


def _which(at: dict[str, speed.Row], counted: dict[str, memory.Row]) -> str:
    """Which of ours to choose, and where a peer was better than one of them, in words."""
    free, rows = at.get(LOGIT_FREE), at.get(ROW_WORKSPACE)
    if free is None or rows is None or free.failure or rows.failure:
        return ""
    told = [
        "**Which one?** The row workspace, if its 320 MiB fit: logit-free takes "
        f"{free.both_s / rows.both_s:.1f} times as long."
    ]
    for ours in (free, rows):
        told += [
            f"{peer.partition(',')[0]}'s {FUNCTIONS[peer]} was faster than our "
            f"{ours.method.partition(', ')[2]}, with {memory.amount(counted[peer].counted_mib)}."
            for peer, row in at.items()
            if peer in counted and not peer.startswith("ours") and row.both_s < ours.both_s
        ]
        told += [
            f"{peer} took less memory than our {ours.method.partition(', ')[2]}."
            for peer, row in counted.items()
            if not peer.startswith("ours") and row.counted_mib < counted[ours.method].counted_mib
        ]
    return wrapped(" ".join(told))


def _tests(measured: list[Gpu]) -> str:
    """What GPUs said of the tests."""
    found = "; ".join(f"on {gpu.name} {gpu.tests}" for gpu in measured)
    return wrapped(
        f"Tested on a GPU: {found or 'no'} ([more](docs/benchmarks.md#measured-on-gpus)). No AMD "
        "GPU has run the kernels; they compile for one."
    )


def choosing_parts(results: Path, page: Path) -> dict[str, str]:
    """The same of docs/choosing.md."""
    return {
        "schedules": _schedules(results),
        "clip": comparison.clip_in_a_sentence(Results(results / "token_efficiency")),
    }


def _schedules(results: Path) -> str:
    """Time and memory of both schedules and of the peers that were timed, by tokens."""
    for gpu in gpus(results):
        timed = [row for row in gpu.rows("speed", speed.Row) if row.method != speed.FLOOR]
        if not timed:
            continue
        D, V = timed[0].D, timed[0].V
        counted = _counted(results / "memory.csv", D, V)

        def cell(row: speed.Row, counted: dict = counted) -> str:
            time = _cell(row, lambda row: f"{1000 * row.both_s:,.0f} ms")
            of_memory = _cell(
                counted.get((row.method, row.N)), lambda row: memory.amount(row.counted_mib)
            )
            return f"{time}, {of_memory}"

        table = report.by_method(
            "time, memory",
            [row for row in timed if (row.D, row.V) == (D, V)],
            lambda row: f"{row.N:,} tokens",
            cell,
        )
        told = _where_peers_win(timed, counted)
        where = (
            f"{gpu.name}, D = {D}, V = {V}, bf16, one loss and its gradient; time is the median "
            f"({report.source(gpu.folder / 'speed.csv')}), memory is counted "
            f"({report.source(results / 'memory.csv')})"
        )
        return "\n\n".join([table, wrapped(f"({where})"), *filter(None, [wrapped(told)])])
    return "No GPU has been measured yet."


def _where_peers_win(timed: list[speed.Row], counted: dict[tuple[str, int], memory.Row]) -> str:
    """Which peers, of those that were timed, took less time or memory than ours, and where."""
    told = []
    for N in sorted({row.N for row in timed}):
        at = {row.method: row for row in timed if row.N == N and not row.failure}
        for ours, peer in itertools.product((LOGIT_FREE, ROW_WORKSPACE), FUNCTIONS):
            if peer.startswith("ours") or not {ours, peer} <= at.keys():
                continue
            pair = [counted.get((name, N)) for name in (peer, ours)]
            less = [
                f"in time ({1000 * at[peer].both_s:,.0f} ms against {1000 * at[ours].both_s:,.0f})"
            ] * (at[peer].both_s < at[ours].both_s)
            if pair[0] and pair[1] and pair[0].counted_mib < pair[1].counted_mib:
                amounts = " against ".join(memory.amount(row.counted_mib) for row in pair if row)
                less.append(f"in memory ({amounts})")
            if less:
                told.append(
                    f"At {N:,} tokens {peer.partition(',')[0]}'s {FUNCTIONS[peer]} beat our "
                    f"{ours.partition(', ')[2]} {' and '.join(less)}."
                )
    return " ".join(told)


def training_parts(results: Path, page: Path) -> dict[str, str]:
    """The same of docs/training.md."""
    return {"layers": _layers(results / "step.csv")}


def _layers(path: Path) -> str:
    """What is left of a step's memory, at the most tokens that were counted."""
    _, rows = report.read(path, step.Row)
    counted = [row for row in rows if row.device == "counted" and not row.failure]
    N = max(row.N for row in counted)
    kept, less = (
        {row.method: step.total_gib(row) for row in counted if row.N == N}[method]
        for method in (LOGIT_FREE, "ours, offloaded, tiled")
    )
    return wrapped(
        f"With `--offload-checkpoints --mlp-tokens {step.MLP_TOKENS}` a step of {counted[0].model} "
        f"with a rollout of {N:,} tokens takes {less:.0f} GiB, weights included, in place of "
        f"{kept:.0f} (counted as on a GPU; {report.source(path)})."
    )


def vllm_parts(results: Path, page: Path) -> dict[str, str]:
    """The same of docs/vllm.md."""
    return {"teachers": _teachers(results / "teachers.csv")}


def _teachers(path: Path) -> str:
    """What a teacher on servers saves."""
    _, rows = report.read(path, teachers.Row)
    N = max(row.N for row in rows)
    here, away = ({row.place: row for row in rows if row.N == N}[p] for p in teachers.PLACES)
    return wrapped(
        f"A step of {here.student} with a rollout of {N:,} tokens takes {here.total_gib:.0f} GiB, "
        f"weights included, with {here.teacher} beside it, and {away.total_gib:.0f} with the "
        f"teacher on servers (counted as on a GPU; {report.source(path)})."
    )


def compatibility_parts(results: Path, page: Path) -> dict[str, str]:
    """The same of docs/compatibility.md."""
    tried = report.read(results / "versions.csv", TriedVersions)[1]
    return {"compatibility": _compatibility(results, tried), "versions": _versions(tried)}


def _compatibility(results: Path, tried: list[TriedVersions]) -> str:
    """Which versions run where: tested, compiled ahead of time, or neither."""
    with (results / "resources.csv").open(newline="") as file:
        archs = list(dict.fromkeys(row["arch"] for row in csv.DictReader(file)))
    cuda, rocm = (
        f"compiled for {', '.join(arch for arch in archs if arch.startswith(prefix))}"
        for prefix in ("sm_", "gfx")
    )
    rows = [
        ["torch", "tested", "neither", "neither"],
        ["triton", "tested, interpreted", cuda, rocm],
        ["transformers, to train", "tested", "neither", "neither"],
        ["trl, to compare with", "tested", "neither", "neither"],
    ]
    required, pinned = (ROOT / name for name in ("pyproject.toml", "constraints.txt"))
    body = []
    for what, *cells in rows:
        package = what.partition(",")[0]
        bounds = re.search(rf'"{package}([<>=.,\d]+)', required.read_text())
        version = re.search(rf"^{package}==([\w.]+)", pinned.read_text(), re.MULTILINE)
        if bounds is None or version is None:
            raise ValueError(f"pyproject.toml or constraints.txt does not name {package}")
        versions = sorted({getattr(row, package) for row in tried if not row.failed}, key=minor)
        others = [v for v in versions if minor(v) != minor(version[1])]
        if others:
            cells[0] += f"; its core with {', '.join(others)}"
        body.append([what, bounds[1].replace(",", ", "), version[1], *cells])
    for gpu in gpus(results):
        cells = [gpu.tests, "–"] if gpu.name.startswith("NVIDIA") else ["–", gpu.tests]
        name = f"kernels on [{gpu.name}](benchmarks.md#{slug(gpu.name)})"
        body.append([name, "", gpu.versions, "–", *cells])
    return report.table(["", "required", "version", "CPU", "CUDA", "ROCm"], body)


def _versions(tried: list[TriedVersions]) -> str:
    """What became of the core of the suite in each environment."""
    shown = ("python", "torch", "triton", "numpy", "transformers", "trl")
    body = [
        [
            row.environment,
            *(getattr(row, name) for name in shown),
            f"{row.passed} passed" + f", {row.failed} failed" * bool(row.failed),
            sources.described(row.code),
        ]
        for row in tried
    ]
    return report.table(["environment", *shown, "core of the suite", "of"], body)


def examples_parts(results: Path, page: Path) -> dict[str, str]:
    """The same of examples/README.md."""
    whole, top_k = (trl_trainers.summary(path) for path in _of_trl(results))
    return {"trl": f"On the whole vocabulary:\n\n{whole}\n\nOn K tokens:\n\n{top_k}"}


def trl_parts(results: Path, page: Path) -> dict[str, str]:
    """The same of docs/trl.md."""
    whole, top_k = (trl_trainers.saved(path) for path in _of_trl(results))
    told = (f"- On the whole vocabulary {whole}", f"- On K tokens {top_k}")
    return {"saved": "\n".join(wrapped(line) for line in told)}


def _of_trl(results: Path) -> list[Path]:
    """Where the losses of TRL's trainers are recorded, by what they compare."""
    return [results / f"{name}.csv" for name in trl_trainers.FILES.values()]


def verl_parts(results: Path, page: Path) -> dict[str, str]:
    """The same of docs/verl.md."""
    return {"memory": verl_memory.summary(results / "verl_memory.csv")}


PAGES: dict[Path, Callable[[Path, Path], dict[str, str]]] = {
    README: readme_parts,
    EXAMPLES: examples_parts,
    BENCHMARKS: benchmarks_parts,
    CHOOSING: choosing_parts,
    COMPATIBILITY: compatibility_parts,
    REAL: real_parts,
    REAL_MODEL: real_model.real_model_parts,
    TRAINING: training_parts,
    TRL: trl_parts,
    VERL: verl_parts,
    VLLM: vllm_parts,
}

SUMMARIES: dict[str, Callable[[Path], str]] = {
    "accuracy": accuracy.summary,
    "adoptions": adoptions.summary,
    "cross_entropy": cross_entropy.summary,
    "memory": memory.summary,
    "real_accuracy": accuracy.real_summary,
    "same_training": same_training.summary,
    "speed": speed.summary,
    "step": step.summary,
    "teachers": teachers.summary,
    "trained": speed.summary,
    "trl_top_k": trl_trainers.summary,
    "trl_trainers": trl_trainers.summary,
    "verl_memory": verl_memory.summary,
}


def filled(text: str, parts: dict[str, str], name: str) -> str:
    """A page's text with each part between its marks. `name` is the page's."""
    for mark, part in parts.items():
        marks = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)", re.DOTALL)
        pieces = marks.split(text)
        if len(pieces) != 4:
            raise ValueError(f"{name} has no place for {mark}, or two")
        before, start, end, after = pieces
        text = f"{before}{start}\n{part}\n\n{end}{after}"
    return text


def generated(results: Path = RESULTS) -> dict[Path, str]:
    """The text of all pages, with what is recorded in `results`."""
    return {
        page: filled(page.read_text(), parts(results, page), page.name)
        for page, parts in PAGES.items()
    } | {
        TOKEN_EFFICIENCY: comparison.page(Results(results / "token_efficiency")),
        **{
            path.with_suffix(".md"): summary(path) + "\n"
            for name, summary in SUMMARIES.items()
            for path in sorted(results.glob(f"**/{name}.csv"))
            if path.with_suffix(".md").exists()
        },
    }


if __name__ == "__main__":
    figures.draw(Results(RESULTS / "token_efficiency"), TOKEN_EFFICIENCY.with_suffix(""))
    real_model.draw(RESULTS, REAL_MODEL.with_suffix(".svg"))
    for page, text in generated().items():
        page.write_text(text)
