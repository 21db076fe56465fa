"""Where the time of the row workspace goes: each operation, of all tokens and of a chunk.

    python benchmarks/gpu/profile_rows.py [--output FOLDER] [--tiny]

PyTorch's profiler over one loss and its gradient, for workspaces of several sizes. A chunk is the
tokens whose logits a workspace holds at a time: its launches are what host and GPU pay for each.
It writes profile.csv, and the profiler's own tables to profile.txt.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.gpu.times import ours
from benchmarks.lib import report
from benchmarks.lib.inputs import make_inputs
from benchmarks.lib.options import Options
from opsd_kernels.problem import Problem
from opsd_kernels.schedules.planning import MIB, make_plan

WORKSPACES = [320, 1280]  # MiB
SHAPE, TINY = (16384, 4096, 151936), (64, 32, 300)  # N, D, V


@dataclass(frozen=True)
class Row:
    workspace_mib: float
    chunks: int
    operation: str  # a kernel's name on a GPU
    calls: int
    calls_a_chunk: float
    seconds: float
    share: float  # of all time on the device


def main() -> None:
    options = Options(__doc__)
    options.add_device()
    options.add_tiny()
    options.add_output("profile.csv, profile.txt")
    args = options.parse_args()
    device = torch.device(args.device)
    results = report.Results("profile", report.machine(device), args.output, show)
    tables = []
    for workspace_mib in [0.1] if args.tiny else WORKSPACES:
        rows, table = measure(device, TINY if args.tiny else SHAPE, workspace_mib)
        for row in rows:
            results.add(row)
        tables.append(f"workspace_mib = {workspace_mib}\n{table}\n")
        if args.output:
            (args.output / "profile.txt").write_text("\n".join(tables))


def show(row: Row) -> None:
    print(
        f"{row.workspace_mib:>6,.0f} MiB {row.seconds * 1e3:>9.2f} ms {row.share:>6.1%} "
        f"{row.calls_a_chunk:>6.1f} a chunk  {row.operation}",
        flush=True,
    )


def measure(
    device: torch.device, shape: tuple[int, int, int], workspace_mib: float
) -> tuple[list[Row], str]:
    """What takes most, longest first, and the profiler's table."""
    N, D, V = shape
    h_S, h_T, W = make_inputs(N, V, D, torch.bfloat16, device)
    h_S.requires_grad_()
    on_gpu = device.type == "cuda"
    ours(workspace_mib, h_S, h_T, W).backward()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profiler(activities=activities) as seen:
        ours(workspace_mib, h_S, h_T, W).backward()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = seen.key_averages()
    took: dict[str, Any] = {event.key: event for event in events if getattr(event, key) > 0}
    problem = Problem(h_S, h_T, W, None, W.dtype, 0.5)
    rows_at_a_time = make_plan(problem, N, workspace_mib * MIB).rows
    chunks = -(-N // rows_at_a_time)
    total = sum(getattr(event, key) for event in took.values())
    longest = sorted(took.values(), key=lambda event: -getattr(event, key))[:15]
    rows = [
        Row(
            workspace_mib,
            chunks,
            event.key[:80],
            event.count,
            event.count / chunks,
            getattr(event, key) / 1e6,
            getattr(event, key) / total,
        )
        for event in longest
    ]
    return rows, events.table(sort_by=key, row_limit=30, max_name_column_width=60)


if __name__ == "__main__":
    main()
