"""Time and memory of the loss on a GPU, beside every peer that computes the same.

    python benchmarks/gpu/times.py [--output FOLDER] [--items 3] [--tiny]

Ours is logit-free, and with row workspaces of 320 to 2,560 MiB. Item after item is measured, the
most valuable first: a shape, and methods that take turns with the floor, three bare products, as
`benchmarks/speed.py` says. What has to be compiled by Inductor goes last. Peak memory above the
inputs is that of PyTorch's allocator. With trained heads the floor is the same, and the gradient
of the head is a fourth product.

It writes speed.csv, memory.csv and trained.csv, with a table and a picture of times, and goes on
with what these hold already. A peer that is not installed has no row.
"""

import gc
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import memory, speed
from benchmarks.lib import report
from benchmarks.lib.inputs import describe, make_inputs
from benchmarks.lib.measure import MIB, high_water, start_counting
from benchmarks.lib.options import Options
from benchmarks.lib.peers import METHODS, Loss, installed, unsloth, why
from opsd_kernels import fused_jsd_loss

WORKSPACES = (320, 640, 1280, 2560)  # MiB
BETA = 0.5


def ours(
    workspace_mib: float,
    h_S: Tensor,
    h_T: Tensor,
    W: Tensor,
    beta: float = BETA,
    temperature: float = 1.0,
) -> Tensor:
    return fused_jsd_loss(
        h_S, h_T, W, beta=beta, temperature=temperature, workspace_mib=workspace_mib
    )


def with_workspace(mib: float) -> dict[str, Loss]:
    """By the name that it has elsewhere, or its size."""
    name = "row workspace" if mib == WORKSPACES[0] else f"{mib:,} MiB"
    return {f"ours, {name}": partial(ours, mib)}


OURS: dict[str, Loss] = {"ours, logit-free": partial(ours, 0)}
for _mib in WORKSPACES:
    OURS |= with_workspace(_mib)
PEERS = {name: METHODS[name] for name in ("Liger, fused", "TRL", "eager")}
OTHERS: dict[str, Loss] = {"ORDA": METHODS["ORDA"], "Unsloth": unsloth}  # which tune themselves
BY_INDUCTOR = {name: METHODS[name] for name in ("eager, compiled", "Liger, chunked")}
# Passes over a trained head: 8, 6, and 4 where the workspace holds its gradient in fp32 too.
TRAINED = {name: OURS[name] for name in ("ours, logit-free", "ours, row workspace")}
TRAINED |= with_workspace(4800)
TRAINED |= {name: METHODS[name] for name in ("Liger, fused", "TRL", "Liger, chunked", "eager")}


@dataclass(frozen=True)
class Item:
    model: str
    N: int
    methods: Mapping[str, Loss]
    trained: bool = False

    @property
    def csv(self) -> str:
        return "trained" if self.trained else "speed"


# Features and vocabulary, by the models whose heads these are.
SHAPES = {"qwen3-8b": (4096, 151936), "qwen3-1.7b": (2048, 151936)}
TINY = {"qwen3-8b": (64, 300), "qwen3-1.7b": (32, 300)}
ITEMS = [
    Item("qwen3-8b", 16384, OURS | PEERS),
    Item("qwen3-8b", 1024, OURS | PEERS),
    Item("qwen3-8b", 65536, OURS | PEERS),
    Item("qwen3-1.7b", 16384, OURS | PEERS),
    Item("qwen3-8b", 16384, TRAINED, trained=True),
    *(Item("qwen3-8b", N, OTHERS) for N in (16384, 1024, 65536)),
    Item("qwen3-8b", 16384, BY_INDUCTOR),
    Item("qwen3-1.7b", 1024, OURS | PEERS),
    Item("qwen3-1.7b", 65536, OURS | PEERS),
    Item("qwen3-8b", 1024, BY_INDUCTOR),
    Item("qwen3-8b", 65536, BY_INDUCTOR),
]
# For a CPU: one of each kind.
TINY_ITEMS = [ITEMS[0], ITEMS[4], ITEMS[6], ITEMS[11]]


def main() -> None:
    options = Options(__doc__)
    options.add_device()
    options.add_argument("--repeats", type=int, default=3)
    options.add_items()
    options.add_argument("--dry", action="store_true", help="launch ours once, time nothing")
    options.add_tiny()
    options.add_output("speed.csv, memory.csv, trained.csv")
    args = options.parse_args()
    device = torch.device(args.device)
    if args.dry:
        launch(device, args.tiny)
        return
    setting = f"{report.machine(device)}; beta {BETA}"
    kept = {
        "speed": report.Results("speed", setting, args.output, speed.show, speed.Row),
        "memory": report.Results("memory", setting, args.output, memory.show, memory.Row),
        "trained": report.Results("trained", setting, args.output, speed.show, speed.Row),
    }
    for item in to_measure(kept, args.items, args.tiny):
        run(item, kept, device, args.repeats, args.tiny)
    for name in ("speed", "trained"):
        kept[name].finish(speed.summary, speed.plot)


def to_measure(
    kept: dict[str, report.Results], most: int | None, tiny: bool = False
) -> Iterator[Item]:
    """The items without rows yet, at most this many, whose packages are installed."""
    found = 0
    for item in TINY_ITEMS if tiny else ITEMS:
        results, (_, N, D, _) = kept[item.csv], shape(item, tiny)
        wanted = {
            name: loss
            for name, loss in installed(item.methods).items()
            if not results.holds(N=N, D=D, method=name)
        }
        if wanted and found != most:
            found += 1
            yield replace(item, methods=wanted)


def shape(item: Item, tiny: bool) -> tuple[str, int, int, int]:
    """Model, N, D and V."""
    D, V = (TINY if tiny else SHAPES)[item.model]
    return item.model, item.N // 1024 if tiny else item.N, D, V


def run(
    item: Item, kept: dict[str, report.Results], device: torch.device, repeats: int, tiny: bool
) -> None:
    model, N, D, V = shape(item, tiny)
    h_S, h_T, W = make_inputs(N, V, D, torch.bfloat16, device)
    described = f"N = {N}, D = {D}: {describe(h_S, h_T, W)}"
    results = kept[item.csv]
    if described not in results.setting:
        results.setting += f"; {described}"
    print(f"\n{described}{', the head trained' if item.trained else ''}", flush=True)
    W.requires_grad_(item.trained)
    rows = speed.measure(h_S, h_T, W, BETA, repeats, item.methods)
    if results.holds(N=N, D=D, method=speed.FLOOR):
        rows = [row for row in rows if row.method != speed.FLOOR]
    for row in rows:
        results.add(row)
    if item.trained:
        return
    for name, loss in item.methods.items():
        figures = measure_memory(loss, h_S, h_T, W)
        name_of = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        of_shape = (name_of, model, N, D, V, "bfloat16", name)
        kept["memory"].add(memory.Row(*of_shape, **figures))


def measure_memory(loss: Loss, h_S: Tensor, h_T: Tensor, W: Tensor) -> dict[str, Any]:
    """Of a run after the one that compiled; in this process, which on a CPU says little."""
    release(h_S.device)
    before = start_counting(h_S.device)
    try:
        memory.forward_and_backward(loss, h_S, h_T, W)
    except Exception as error:
        return {"failure": why(error)}
    return {"measured_mib": (high_water(h_S.device) - before) / MIB}


def release(device: torch.device) -> None:
    """Give back what a method that ran out of memory has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def launch(device: torch.device, tiny: bool) -> None:
    """What ours launches of all items, once: fewer tokens have the same kernels."""
    done = set()
    for item in TINY_ITEMS if tiny else ITEMS:
        _, N, D, V = shape(item, tiny)
        N = min(N, 2048)
        if (N, D, item.trained) in done:
            continue
        done.add((N, D, item.trained))
        h, W = (torch.zeros(n, D, dtype=torch.bfloat16, device=device) for n in (N, V))
        W.requires_grad_(item.trained)
        for name, loss in item.methods.items():
            if name.startswith("ours"):
                memory.forward_and_backward(loss, h, h, W)


if __name__ == "__main__":
    main()
