"""What was predicted of a GPU beside what was measured on it.

    python benchmarks/prediction.py FOLDER

prints the page of a folder that `make gpu` wrote (which puts it there as prediction.md). Predicted:
benchmarks/results/roofline.csv, of the GPU that hardware.txt names, and resources.csv, of its
architecture, as far as they predict. Measured: speed.csv and tune.json of the folder, as far as
they are there.
"""

import argparse
import csv
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import report
from opsd_kernels.kernels import tiles

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# By the names of the prediction, where nothing measured says it.
ARCHS = {"A100": "sm_80", "RTX 4090": "sm_89", "H100": "sm_90", "H200": "sm_90", "B200": "sm_100"}
KERNELS = ("lse", "pair", "rows")
NOTHING = "not measured"


def page(gpu: str, folder: Path, results: Path = RESULTS) -> str:
    """A GPU, as it names itself: predicted and measured multiples of three bare products, and of
    each kernel the fraction of what bounds it, as Markdown."""
    setting, predicted = read(results / "roofline.csv")
    of_gpu = [row for row in predicted if is_named(row["gpu"], gpu)]
    measured_at, speed = read(folder / "speed.csv")
    known = setting[:1].upper() + setting[1:]
    known = known if of_gpu else f"Nothing is predicted of this GPU ({setting})"
    return "\n\n".join(
        [
            f"# {gpu}: prediction and measurement",
            f"{known}. Measured: {measured_at.partition('; ')[0] or 'nothing yet'}.",
            "## Forward and backward, as multiples of three bare products",
            multiples(of_gpu, speed, setting),
            "A measurement belongs between the two predicted multiples: the lower if everything "
            "overlaps, the upper if nothing does. The quotient is that of the measured and each.",
            "## Each kernel, as a fraction of what bounds it",
            fractions(gpu, folder / "tune.json", results / "resources.csv"),
            "`lse` and `pair`: of the rate of a library product of the same size. `rows`: of the "
            "bandwidth of a copy. Measured with what is now in the table of tiles, where that was "
            "tried, and with the best of those tried.",
        ]
    )


def multiples(predicted: list[dict[str, str]], speed: list[dict[str, str]], setting: str) -> str:
    """A row for each method that is predicted or measured, at the number of tokens of the
    prediction or else the most that was measured."""
    wanted = re.search(r"\bN = (\d+)", setting)
    tokens = {int(row["N"]) for row in speed}
    N = int(wanted[1]) if wanted and int(wanted[1]) in tokens else max(tokens, default=0)
    bounds = {row["method"]: (row["overlapped"], row["serial"]) for row in predicted}
    measured = {
        row["method"]: row["failure"] or row["floors"] for row in speed if int(row["N"]) == N
    }
    measured.pop("3 GEMMs", None)
    rows = []
    for method in dict.fromkeys([*bounds, *measured]):
        value = measured.get(method, NOTHING)
        low, high = (float(bound) for bound in bounds.get(method, ("nan", "nan")))
        told = f"{low:.2f} – {high:.2f}" if method in bounds else "not predicted"
        quotient = "–"
        if _is_number(value):
            if method in bounds:
                quotient = f"{float(value) / low:.2f} – {float(value) / high:.2f}"
            value = f"{float(value):.2f}"
        rows.append([method, told, value, quotient])
    column = f"measured, N = {N}" if N else "measured"
    return report.table(["", "predicted", column, "measured / predicted"], rows)


def fractions(gpu: str, tune: Path, resources: Path) -> str:
    """A row for each kernel."""
    told = json.loads(tune.read_text()) if tune.exists() else {}
    arch = told.get("arch") or next((a for known, a in ARCHS.items() if is_named(known, gpu)), "")
    of = arch, told.get("dtype", "bfloat16"), told.get("features", 4096)
    rows = []
    for kernel in KERNELS:
        bounds = predicted_fractions(resources, kernel, *of)
        tried = [t for t in told.get(kernel, []) if "fraction" in t]
        table = next((t["fraction"] for t in tried if _is_in_table(t, arch, of[1], kernel)), None)
        best = max((t["fraction"] for t in tried), default=None)
        predicted, quotient = "not predicted", "–"
        if bounds:
            predicted = " – ".join(_percent(bound) for bound in bounds)
            if table is not None:
                quotient = " – ".join(f"{table / bound:.2f}" for bound in bounds)
        rows.append([kernel, predicted, _percent(table), quotient, _percent(best)])
    return report.table(
        ["", "predicted", "measured", "measured / predicted", "best of those tried"], rows
    )


def _is_in_table(told: dict[str, Any], arch: str, dtype: str, kernel: str) -> bool:
    """Whether a candidate is what the table of tiles has now, and had nothing else."""
    row = tiles.TABLE.get((arch, dtype))
    if row is None:
        return False
    now, candidate = asdict(getattr(row, kernel)), told["candidate"]
    besides = {value for name, value in candidate.items() if name not in now}
    return now == {name: candidate.get(name) for name in now} and besides <= {False, 1}


def predicted_fractions(
    path: Path, kernel: str, arch: str, dtype: str, features: int
) -> tuple[float, float] | None:
    """Of a library product's rate (of `rows`, a copy's) the least and the most, for the JSD, where
    the table of resources has them."""
    if not path.exists():
        return None
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["arch"], row["dtype"], row["kernel"]) != (arch, dtype, kernel):
                continue
            least, most = (row.get(f"{end}_{features}", "") for end in ("least", "most"))
            if row["divergence"] == "JSD" and _is_number(least) and _is_number(most):
                return float(least), float(most)
    return None


def read(path: Path) -> tuple[str, list[dict[str, str]]]:
    """The setting and the rows of a csv that `report.write` wrote, whatever columns it has; nothing
    where there is none."""
    if not path.exists():
        return "", []
    with path.open(newline="") as file:
        setting = file.readline().removeprefix("# ").strip()
        return setting, list(csv.DictReader(file))


def is_named(known: str, gpu: str) -> bool:
    """Whether a GPU of the prediction is the one that names itself so: its words are among it."""
    return set(known.lower().split()) <= set(re.split(r"[^a-z0-9]+", gpu.lower()))


def _is_number(value: str) -> bool:
    return re.fullmatch(r"[0-9.]+(e[+-]?\d+)?", value or "") is not None


def _percent(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{fraction:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="that make gpu wrote")
    args = parser.parse_args()
    hardware = (args.folder / "hardware.txt").read_text()
    name = hardware.partition(", driver")[0].partition(" x ")[2]
    print(page(name, args.folder))


if __name__ == "__main__":
    main()
