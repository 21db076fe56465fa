"""Put what was recorded into README.md, docs/benchmarks.md and examples/README.md, each table
between two marks, and into docs/token_efficiency.md.

    python benchmarks/pages/readme.py

The README has one table each for accuracy, memory and time, of the methods that have a result
everywhere; docs/benchmarks.md has all tables, with a line for every method. What `make gpu` left in
a folder of benchmarks/results becomes a section of docs/benchmarks.md, and time and memory of the
first such GPU, by name, take the place of the CPU's in the README, if they are there for several
numbers of tokens.
"""

import csv
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import accuracy, memory, speed, step, trl_trainers
from benchmarks.gpu import resources
from benchmarks.lib import report
from benchmarks.lib.records import OperationError
from benchmarks.lib.shapes import QWEN3
from benchmarks.more import cross_entropy
from benchmarks.token_efficiency import figures
from benchmarks.token_efficiency import page as comparison
from benchmarks.token_efficiency.results import Results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
EXAMPLES = ROOT / "examples" / "README.md"
TOKEN_EFFICIENCY = ROOT / "docs" / "token_efficiency.md"  # all of it is generated


@dataclass(frozen=True)
class Gpu:
    """A folder that `make gpu` wrote."""

    folder: Path

    @property
    def hardware(self) -> str:
        """Hardware, driver and versions, on one line."""
        return (self.folder / "hardware.txt").read_text().strip()

    @property
    def name(self) -> str:
        return self.hardware.partition(", driver")[0].partition(" x ")[2]

    @property
    def versions(self) -> str:
        return _versions(self.hardware, "torch", "triton")

    @property
    def ended(self) -> str:
        """How each step ended; empty if none has."""
        return _text(self.folder / "summary.txt").partition("\n")[2].rstrip()

    @property
    def tests(self) -> str:
        """What became of the tests."""
        step = re.search(r"^tests .*\n((?: .*\n?)*)", self.ended, re.MULTILINE)
        if step is None:
            return "neither"
        outcomes = [line.split(maxsplit=1)[1] for line in step[1].splitlines()]
        if all(outcome == "ok" or outcome.startswith("ok;") for outcome in outcomes):
            return "tested"
        passed, failed = (
            sum(int(n) for n in re.findall(rf"(\d+) {verdict}", step[1]))
            for verdict in ("passed", "failed")
        )
        return f"{passed} tests passed, {failed} failed; not all ran"

    def csv(self, name: str) -> Path | None:
        path = self.folder / f"{name}.csv"
        return path if path.exists() else None


def gpus(results: Path) -> list[Gpu]:
    return [Gpu(path.parent) for path in sorted(results.glob("*/hardware.txt"))]


def readme_parts(results: Path, page: Path) -> dict[str, str]:
    """What stands between the marks of the README, whose place is `page`, by the marks' name."""
    measured = gpus(results)
    return {
        "accuracy": _accuracy_of_readme(results / "accuracy.csv", measured, page),
        "memory": _memory_of_readme(_best(results, measured, "memory", memory.Row), page),
        "speed": _speed_of_readme(_best(results, measured, "speed", speed.Row), page),
        "gpu": _gpus_of_readme(measured),
        "cross-entropy": _cross_entropy_of_readme(results / "cross_entropy.csv"),
        "trainers": _trainers_of_readme(results / "trl_trainers.csv"),
        "layers": _layers_of_readme(results / "step.csv"),
        "token efficiency": comparison.readme_section(
            Results(results / "token_efficiency"), os.path.relpath(ROOT / "docs", page.parent)
        ),
        "compatibility": compatibility(results, measured),
    }


def _accuracy_of_readme(path: Path, measured: list[Gpu], page: Path) -> str:
    """The picture, errors of the gradient on a CPU, and ours on each GPU."""
    setting, rows = report.read(path, accuracy.Row)
    return "\n\n".join(
        [
            *_picture(path, accuracy.caption(path), page),
            accuracy.gradient_table(rows),
            f"({setting})",
            _wrapped(f"{accuracy.largest(rows)}."),
            *filter(None, map(_accuracy_on, measured)),
        ]
    )


def _accuracy_on(gpu: Gpu) -> str:
    """Errors of ours on a GPU, in a sentence or two."""
    if (path := gpu.csv("accuracy")) is None:
        return ""
    setting, rows = report.read(path, accuracy.Row)
    cells = [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in accuracy.gradient_table(rows).splitlines()
    ]
    of = {name: ", ".join(errors) for name, *errors in cells}
    exact = next(name for name in of if name.startswith("the exact gradient"))
    shape = setting.partition("; ")[2]
    return _wrapped(
        f"On {gpu.name}, whose tensor cores truncate when they add ({shape}): ours, logit-free, "
        f"{of['ours, logit-free']}; {exact}, {of[exact]}. "
        f"{accuracy.largest(rows, ['ours, logit-free', 'ours, row workspace'])}."
    )


def _best(results: Path, measured: list[Gpu], name: str, kind: type) -> Path:
    """The csv of the first GPU on which ours has a result for several numbers of tokens, otherwise
    the CPU's."""
    for gpu in measured:
        if path := gpu.csv(name):
            ours = [row for row in _measured(path, kind) if row.method.startswith("ours")]
            if len({row.N for row in ours if report.is_result(row)}) > 1:
                return path
    return results / f"{name}.csv"


def _measured(path: Path, kind: type) -> list[Any]:
    """The rows of a csv that were not counted, nor are the floor."""
    _, rows = report.read(path, kind)
    return [
        row for row in rows if row.method != speed.FLOOR and getattr(row, "device", "") != "counted"
    ]


def _memory_of_readme(path: Path, page: Path) -> str:
    """Of a GPU what was measured, otherwise what is counted as on one."""
    setting, rows = report.read(path, memory.Row)
    on_gpu = [row for row in _measured(path, memory.Row) if row.device != "CPU"]
    if on_gpu:
        table = memory.measured_table(report.complete(on_gpu))
        how = "the high-water mark of PyTorch's allocator:"
        source = setting
    else:
        table = memory.counted_table(report.complete(memory.shown(rows)))
        how = (
            "counted: bytes alive at once in tensors, each method run as on a GPU but on tensors "
            f"without contents.{_counts_on_gpus(path.parent)} What is compiled cannot be counted: "
            "Liger's chunked loss is counted uncompiled, and takes less as it is by default, "
            "compiled."
        )
        versions = _versions(setting, "torch", *report.PEERS)  # the machine does not matter
        source = "; ".join(filter(None, [versions, report.source(path)]))
    about = _wrapped(f"Above the inputs, forward and backward, {how}")
    names = "Memory over the number of tokens by method, counted and measured"
    return "\n\n".join([about, *_picture(path, names, page), table, f"({source})"])


def _counts_on_gpus(results: Path) -> str:
    """How far what GPUs measured is from what is counted, in sentences."""
    _, rows = report.read(results / "memory.csv", memory.Row)
    counted = {
        (row.model, row.N, row.method): row.counted_mib for row in rows if row.device == "counted"
    }
    told = ""
    for gpu in gpus(results):
        if (path := gpu.csv("memory")) is None:
            continue
        pairs = [
            (row.N, row.measured_mib / counted[key] - 1)
            for row in _measured(path, memory.Row)
            if not row.failure and (key := (row.model, row.N, row.method)) in counted
        ]
        if pairs:
            tokens = ", ".join(f"{N:,}" for N in sorted({N for N, _ in pairs}))
            most = max(abs(apart) for _, apart in pairs)
            told += (
                f" On {gpu.name}, at N = {tokens}, the high-water mark of PyTorch's allocator was "
                f"within {most:.1%} of the count, for {len(pairs)} "
                f"{'methods' if len(pairs) > 1 else 'method'}."
            )
    return told


def _speed_of_readme(path: Path, page: Path) -> str:
    setting, rows = report.read(path, speed.Row)
    table = speed.table(report.complete(_measured(path, speed.Row)))
    names = "Bars: multiples of the floor by method and shape"
    parts = [*_picture(path, names, page), table, f"({setting})"]
    parts += report.not_recorded(rows, speed.METHODS) + _price_of_the_default(rows)
    if ", driver" not in setting:  # that of a GPU is named
        about = (
            "A CPU has no product of bf16 into fp32: ours widens the head, tile by tile, and takes"
        )
        parts.append(
            _wrapped(f"{about} about as long as for fp32 ([more](docs/benchmarks.md#time)).")
        )
    return "\n\n".join(parts)


def _price_of_the_default(rows: list[speed.Row]) -> list[str]:
    """What `workspace_mib=None` costs on a GPU, at the most tokens of one head; nothing where
    either schedule has no result."""
    free, workspace = (
        {(row.D, row.N): row for row in rows if row.method == f"ours, {way}" and not row.failure}
        for way in ("logit-free", "row workspace")
    )
    if not (both := free.keys() & workspace.keys()):
        return []
    D, N = max(both)
    times = free[D, N].floors / workspace[D, N].floors
    return [
        _wrapped(
            f"`workspace_mib=None` is logit-free on a GPU: with D = {D:,} and N = {N:,} it takes "
            f"{times:.1f} times as long as `workspace_mib=320`, and allocates no workspace."
        )
    ]


def _gpus_of_readme(measured: list[Gpu]) -> str:
    if not measured:
        return _wrapped(
            "**On a GPU nothing has been measured yet.** The kernels are tested in Triton's "
            "interpreter, and compiled ahead of time."
        )
    names = ", ".join(f"[{gpu.name}](docs/benchmarks.md#{slug(gpu.name)})" for gpu in measured)
    return _wrapped(f"**Measured on a GPU:** {names}.")


def _trainers_of_readme(path: Path) -> str:
    """What TRL's trainer of self-distillation saves, at the most tokens."""
    _, rows = report.read(path, trl_trainers.Row)
    of_sdft = [row for row in rows if row.trainer == "SDFTTrainer" and not row.failure]
    N = max(row.N for row in of_sdft)
    theirs, ours = ({r.method: r for r in of_sdft if r.N == N}[m] for m in trl_trainers.METHODS)
    clock = " of processor time" if ours.device == "CPU" else ""
    return _wrapped(
        f"In TRL it is one line before the trainer is made. {len(trl_trainers.TRAINERS)} of its "
        f"trainers take it; one loss of `SDFTTrainer` and its gradient ({ours.device}, "
        f"{ours.dtype}, {N} tokens, a vocabulary of {QWEN3[ours.model]['vocab_size']:,}) takes "
        f"{ours.peak_mib:,.0f} MiB and {ours.seconds:.1f} s{clock} with it, "
        f"{theirs.peak_mib:,.0f} MiB and {theirs.seconds:.1f} s without{_source(path)}. Other "
        "trainers take a few lines: [examples/](examples/README.md)."
    )


def _cross_entropy_of_readme(path: Path) -> str:
    """What one takes beside eager, of a frozen head, at the most tokens."""
    _, rows = report.read(path, cross_entropy.Row)
    frozen = [row for row in rows if row.what == "measured" and row.head == "frozen"]
    N = max(row.N for row in frozen)
    of_it = [row for row in frozen if (row.N, row.dtype) == (N, frozen[0].dtype)]
    ours, eager, compiled = (
        {r.method: r for r in of_it}[method]
        for method in ("ours, row workspace", "eager", "CCE, torch.compile")
    )
    return _wrapped(
        f"A mean cross-entropy of {N} tokens and its gradient ({ours.device}, {ours.dtype}, a "
        f"frozen head, a vocabulary of {ours.V:,}) takes {ours.peak_mib:,.0f} MiB and "
        f"{ours.processor_s:.1f} s of processor time, eager {eager.peak_mib:,.0f} MiB and "
        f"{eager.processor_s:.1f} s, eager compiled by CCE {compiled.peak_mib:,.0f} MiB and "
        f"{compiled.processor_s:.1f} s{_source(path)}; [more](docs/benchmarks.md#cross-entropy)."
    )


def _layers_of_readme(path: Path) -> str:
    """What is left of a step's memory, at the most tokens that were counted."""
    _, rows = report.read(path, step.Row)
    counted = [row for row in rows if row.device == "counted" and not row.failure]
    N = max(row.N for row in counted)
    kept, less = (
        {row.method: step.total_gib(row) for row in counted if row.N == N}[method]
        for method in ("ours, logit-free", "ours, offloaded, tiled")
    )
    return _wrapped(
        f"With `--offload-checkpoints --mlp-tokens {step.MLP_TOKENS}` a step of {counted[0].model} "
        f"with a rollout of {N:,} tokens takes {less:.0f} GiB, weights included, in place of "
        f"{kept:.0f}, counted as on a GPU{_source(path)}; `--micro-batch-tokens` scores rollouts "
        "of like length together."
    )


def compatibility(results: Path, measured: list[Gpu]) -> str:
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
        body.append([what, bounds[1].replace(",", ", "), version[1], *cells])
    for gpu in measured:
        on_cuda = gpu.name.startswith("NVIDIA")
        cells = [gpu.tests, "–"] if on_cuda else ["–", gpu.tests]
        body.append([f"kernels on {gpu.name}", "", gpu.versions, "–", *cells])
    return report.table(["", "required", "version", "CPU", "CUDA", "ROCm"], body)


def page_parts(results: Path, page: Path) -> dict[str, str]:
    """The same of docs/benchmarks.md."""
    return {
        "accuracy": _accuracy(results / "accuracy.csv", page),
        "memory": memory.summary(results / "memory.csv"),
        "heads": _every_head(results / "memory.csv"),
        "speed": speed.summary(results / "speed.csv"),
        "trained": "\n\n".join(map(speed.summary, sorted(results.glob("*/trained.csv")))),
        "cross-entropy": _cross_entropy(results),
        "step": step.summary(results / "step.csv"),
        "resources": resources.summary(results / "resources.csv"),
        "gpus": "\n\n".join(_section(gpu, page) for gpu in gpus(results)) or "None yet.",
    }


def _accuracy(path: Path, page: Path) -> str:
    """The picture and all that was recorded on a CPU."""
    return "\n\n".join([*_picture(path, accuracy.caption(path), page), accuracy.summary(path)])


def _cross_entropy(results: Path) -> str:
    """What was recorded on a CPU, and on which GPUs there is more."""
    on_gpus = [gpu for gpu in gpus(results) if gpu.csv("cross_entropy")]
    names = ", ".join(f"[{gpu.name}](#{slug(gpu.name)})" for gpu in on_gpus)
    also = f"Also measured on {names}." if names else "On a GPU it has not been measured."
    return f"{cross_entropy.summary(results / 'cross_entropy.csv')}\n\n{also}"


def examples_parts(results: Path, page: Path) -> dict[str, str]:
    """The same of examples/README.md."""
    return {"trl": trl_trainers.summary(results / "trl_trainers.csv")}


def _every_head(path: Path) -> str:
    """What is counted of each model's head, at every number of tokens."""
    _, rows = report.read(path, memory.Row)
    counted = [row for row in rows if row.device == "counted"]
    models = dict.fromkeys(row.model for row in counted)
    tables = [
        memory.counted_table([row for row in report.complete(counted) if row.model == model])
        for model in models
    ]
    return "\n\n".join(tables)


def _section(gpu: Gpu, page: Path) -> str:
    """What was measured on a GPU."""
    parts = [f"### {gpu.name}", gpu.hardware + "."]
    for title, name, summary in (
        ("Time, as multiples of three bare products", "speed", speed.summary),
        ("Memory", "memory", memory.summary),
        ("Accuracy", "accuracy", accuracy.summary),
        ("Cross-entropy", "cross_entropy", cross_entropy.summary),
        ("A whole training step", "training", _training),
        ("Every operation at a real size", "operations", _operations),
    ):
        if path := gpu.csv(name):
            parts += [f"#### {title}", *_picture(path, f"{title} on {gpu.name}", page)]
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


def _picture(path: Path, text: str, page: Path) -> list[str]:
    """The picture beside a csv, as it is called from a page; none if there is none."""
    picture = path.with_suffix(".png")
    return [f"![{text}]({os.path.relpath(picture, page.parent)})"] if picture.exists() else []


def _versions(setting: str, *packages: str) -> str:
    """Those of some packages, of a line that `report.machine` wrote."""
    known = re.findall(rf"\b({'|'.join(packages)}) ([^,;\s]+)", setting)
    return ", ".join(f"{package} {version}" for package, version in known)


def _source(path: Path) -> str:
    """Which commit the figures of a sentence are of, in brackets."""
    source = report.source(path)
    return f" ({source})" if source else ""


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


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
    parts = {README: readme_parts, BENCHMARKS: page_parts, EXAMPLES: examples_parts}
    return {
        page: filled(page.read_text(), made(results, page), page.name)
        for page, made in parts.items()
    } | {TOKEN_EFFICIENCY: comparison.page(Results(results / "token_efficiency"))}


if __name__ == "__main__":
    figures.draw(Results(RESULTS / "token_efficiency"), TOKEN_EFFICIENCY.with_suffix(""))
    for page, text in generated().items():
        page.write_text(text)
