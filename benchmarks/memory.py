"""Peak memory of forward and backward above the inputs, over the number of tokens.

    python benchmarks/memory.py [--tokens 1024 4096] [--methods ours eager trl liger]

Each figure comes from a process of its own: on a CPU the high-water mark of its resident memory,
on a GPU the allocator's, both after a small warm-up and relative to what the inputs take. A method
that cannot run is a row that says why.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.peers import PEERS, Loss, methods

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--methods", nargs="+", help="of " + ", ".join(PEERS))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = methods(torch.device(args.device))
    if unknown := set(args.methods or []) - set(known):
        parser.error(f"no method {', '.join(unknown)}; there are {', '.join(known)}")
    if args.here:  # the process of one figure
        print(peak_mib(known[args.methods[0]], args.tokens[0], args))
        return
    print(
        f"torch {torch.__version__}, {args.device}, {args.dtype}, V = {args.vocabulary}, ", end=""
    )
    print(f"D = {args.features}; MiB above the inputs")
    print(f"{'method':<14}" + "".join(f"{f'N = {N}':>14}" for N in args.tokens))
    for name in args.methods or known:
        print(f"{name:<14}" + "".join(f"{measure(name, N, args):>14}" for N in args.tokens))


def measure(name: str, N: int, args: argparse.Namespace) -> str:
    """One figure, from a fresh process; or why there is none."""
    command = [sys.executable, __file__, "--here", "--methods", name, "--tokens", str(N)]
    command += ["--device", args.device, "--dtype", args.dtype]
    command += ["--vocabulary", str(args.vocabulary), "--features", str(args.features)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return f"{float(result.stdout.split()[-1]):,.0f}"
    if result.returncode == -9 or "out of memory" in result.stderr.lower():
        return "out of memory"
    return result.stderr.strip().rpartition("\n")[2].partition(":")[0] or "failed"


def peak_mib(loss: Loss, N: int, args: argparse.Namespace) -> float:
    torch.manual_seed(0)
    D, device, dtype = args.features, torch.device(args.device), getattr(torch, args.dtype)
    h_S = torch.randn(N, D, device=device)
    h_T = (h_S + 0.1 * torch.randn(N, D, device=device)).to(dtype)
    h_S = h_S.to(dtype)
    W = (torch.randn(args.vocabulary, D, device=device) / D**0.5).to(dtype)
    forward_and_backward(loss, h_S[:2], h_T[:2], W[:1000])
    before = start_counting(device)
    forward_and_backward(loss, h_S, h_T, W)
    return (high_water(device) - before) / MIB


def forward_and_backward(loss: Loss, h_S: Tensor, h_T: Tensor, W: Tensor) -> None:
    h_S = h_S.detach().requires_grad_()
    loss(h_S, h_T, W).backward()


def start_counting(device: torch.device) -> int:
    """Reset the high-water mark and return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _process_bytes("VmRSS")


def high_water(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _process_bytes("VmHWM")


def _process_bytes(field: str) -> int:
    """A size from Linux's /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
