"""Time of forward, of backward and of both, as a multiple of three bare matrix products.

    python benchmarks/speed.py [--model qwen3-8b --tokens 1024 16384] [--quick] [--output FOLDER]

The floor of a frozen head is 3 U of matrix products (U = 2 N D V): both logits and the gradient of
the student's. It is measured in turns with the losses, in one process, so that a slow moment of the
machine hits all of them; a multiple is that of the floor of the same round, and the median of all
rounds is told with the lowest and highest. Ours makes its gradient in forward. A method that cannot
run is a row that says why.

Without a model: on a CPU two shapes that it can hold, on a GPU the head of Qwen3-8B. With --output
it writes speed.csv, speed.md and speed.png to the folder.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.inputs import describe, make_inputs
from benchmarks.peers import Loss, methods
from benchmarks.report import machine
from benchmarks.shapes import MODELS

# N, D, V
SHAPES = {
    "cpu": [(256, 2048, 32768), (1024, 512, 32768)],
    "cuda": [(N, *MODELS["qwen3-8b"]) for N in (1024, 4096, 16384)],
}
QUICK = {"cpu": [(128, 512, 16384)], "cuda": [(1024, *MODELS["qwen3-8b"])]}
FLOOR = "3 GEMMs"


@dataclass(frozen=True)
class Row:
    N: int
    D: int
    V: int
    method: str
    failure: str = ""
    forward_s: float = float("nan")
    backward_s: float = float("nan")
    both_s: float = float("nan")
    floors: float = float("nan")  # both, as a multiple of the floor of the same round: the median,
    floors_low: float = float("nan")  # the lowest
    floors_high: float = float("nan")  # and the highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 on a GPU")
    parser.add_argument("--beta", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", choices=list(MODELS), help="whose LM head")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], help="with --model")
    parser.add_argument("--flat", action="store_true", help="flat distributions, not peaked ones")
    parser.add_argument("--quick", action="store_true", help="one small shape")
    parser.add_argument("--output", type=Path, help="folder for speed.csv, speed.md, speed.png")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    shapes = (QUICK if args.quick else SHAPES)[device.type]
    if args.model:
        shapes = [(N, *MODELS[args.model]) for N in args.tokens]
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    setting = f"{machine(device)}{threads}; {str(dtype).removeprefix('torch.')}, beta {args.beta}"
    print(setting)
    rows: list[Row] = []
    for N, D, V in shapes:
        inputs = make_inputs(N, V, D, dtype, device, confidence=0 if args.flat else 25)
        told = describe(*inputs)
        setting += f"; N = {N}, D = {D}: {told}"
        print(f"\nN = {N}, D = {D}, V = {V}; {told}")
        print(f"{'method':<14}{'forward':>9}{'backward':>9}{'both':>9} s   x {FLOOR}")
        for row in measure(*inputs, args.beta, args.repeats):
            rows.append(row)
            if row.failure:
                print(f"{row.method:<14} {row.failure}", flush=True)
                continue
            print(f"{row.method:<14}{row.forward_s:>9.3f}{row.backward_s:>9.3f}{row.both_s:>9.3f}"
                  f"     {row.floors:.2f} ({row.floors_low:.2f} to {row.floors_high:.2f})",
                  flush=True)  # fmt: skip
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / "speed.csv"
        with path.open("w", newline="") as file:
            file.write(f"# {setting}\n")
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
        path.with_suffix(".md").write_text(summary(path) + "\n")
        plot(path, path.with_suffix(".png"))
        print("\n" + summary(path))


def measure(h_S: Tensor, h_T: Tensor, W: Tensor, beta: float, repeats: int) -> list[Row]:
    """A row for each method, the floor first."""
    (N, D), V, device = h_S.shape, W.shape[0], h_S.device
    h_S = h_S.requires_grad_()

    def forward_and_backward(loss: Loss) -> tuple[float, float]:
        start = now(device)
        value = loss(h_S, h_T, W, beta)
        middle = now(device)
        torch.autograd.grad(value, h_S)
        return middle - start, now(device) - middle

    def products(z: Tensor, dh: Tensor) -> tuple[float, float]:
        start = now(device)
        three_products(h_S, h_T, W, z, dh)
        return now(device) - start, 0.0

    z, dh = h_T.new_empty(N, V), h_T.new_empty(N, D)
    runs: dict[str, Callable[[], tuple[float, float]]] = {FLOOR: partial(products, z, dh)}
    runs |= {name: partial(forward_and_backward, loss) for name, loss in methods(device).items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    failures: dict[str, str] = {}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if name in failures:
                continue
            try:
                times = run()
            except (ImportError, torch.OutOfMemoryError) as error:
                failures[name] = type(error).__name__
                continue
            if repeat > 0:  # the first round warms up
                seconds[name].append(times)
    floor = [sum(times) for times in seconds[FLOOR]]
    rows = []
    for name, rounds in seconds.items():
        if name in failures:
            rows.append(Row(N, D, V, name, failures[name]))
            continue
        both = [sum(times) for times in rounds]
        multiples = [b / f for b, f in zip(both, floor, strict=True)]
        rows.append(
            Row(
                N,
                D,
                V,
                name,
                "",
                statistics.median(forward for forward, _ in rounds),
                statistics.median(backward for _, backward in rounds),
                statistics.median(both),
                statistics.median(multiples),
                min(multiples),
                max(multiples),
            )
        )
    return rows


def three_products(h_S: Tensor, h_T: Tensor, W: Tensor, z: Tensor, dh: Tensor) -> None:
    """The products alone, into tensors that exist already."""
    with torch.no_grad():
        torch.mm(h_T, W.t(), out=z)
        torch.mm(h_S, W.t(), out=z)
        torch.mm(z, W, out=dh)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def read(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The setting of a recorded speed.csv, and its rows."""
    with path.open(newline="") as file:
        setting = file.readline().removeprefix("# ").strip()
        return setting, list(csv.DictReader(file))


def summary(path: Path) -> str:
    """Multiples of the floor, a column for each shape, as Markdown."""
    setting, rows = read(path)
    shapes = list(dict.fromkeys((row["N"], row["D"], row["V"]) for row in rows))
    lines = ["| | " + " | ".join(f"N = {N}, D = {D}, V = {V}" for N, D, V in shapes) + " |"]
    lines.append("|---" * (len(shapes) + 1) + "|")
    for method in dict.fromkeys(row["method"] for row in rows if row["method"] != FLOOR):
        cells = [told(row) for row in rows if row["method"] == method]
        strong = "**" if method.startswith("ours") else ""
        lines.append("| " + " | ".join(f"{strong}{c}{strong}" for c in (method, *cells)) + " |")
    return "\n".join([*lines, "", f"({setting})"])


def told(row: dict[str, Any]) -> str:
    if row["failure"]:
        return str(row["failure"])
    median, low, high = (float(row[k]) for k in ("floors", "floors_low", "floors_high"))
    return f"{median:.2f} ({low:.2f} – {high:.2f})"


def plot(path: Path, to: Path) -> None:
    """A group of bars for each shape: multiples of the floor."""
    from matplotlib.figure import Figure

    setting, rows = read(path)
    shapes = list(dict.fromkeys((row["N"], row["D"], row["V"]) for row in rows))
    figure = Figure(figsize=(3.6 * len(shapes) + 1.5, 3.4), layout="constrained")
    for axis, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        of_it = [r for r in rows if (r["N"], r["D"], r["V"]) == shape and r["method"] != FLOOR]
        names = [row["method"] for row in of_it]
        values = [0.0 if row["failure"] else float(row["floors"]) for row in of_it]
        colors = ["#1f6fb4" if name.startswith("ours") else "#b9b9b9" for name in names]
        bars = axis.barh(names[::-1], values[::-1], color=colors[::-1])
        labels = [row["failure"] or f"{float(row['floors']):.2f}" for row in of_it]
        axis.bar_label(bars, labels[::-1], padding=3, fontsize=8)
        axis.axvline(1, color="#333333", linewidth=0.9, linestyle=":")
        axis.set_title("N = {}, D = {}, V = {}".format(*shape), fontsize=9, loc="left")
        axis.set_xlabel("forward + backward, multiples of three bare products", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
        axis.tick_params(labelsize=8)
    figure.supxlabel(setting, fontsize=5, color="#777777", x=1, ha="right")
    figure.savefig(to, dpi=150)


if __name__ == "__main__":
    main()
