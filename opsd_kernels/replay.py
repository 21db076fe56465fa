"""Passes that were written under OPSD_KERNELS_DUMP, computed again: `python -m
opsd_kernels.replay FILE ...` prints what they read and make (see `debug`)."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from .debug import described, summarized, tensors_of
from .problem import Problem
from .schedules.choice import RECORDS, fill


def replay(path: Path, device: torch.device | None = None) -> tuple[str, dict[str, Tensor]]:
    """Compute a pass again.

    Args:
        path: a file that was written under OPSD_KERNELS_DUMP.
        device: where to compute; None for where the pass was.

    Returns:
        The pass in one line, and the tensors that it reads and makes, by name.

    Raises:
        ValueError: the pass was that of one of several processes that share a vocabulary.
    """
    content = torch.load(path, map_location=device, weights_only=True)
    problem, budget = Problem(**content["problem"]), content["workspace_bytes"]
    if problem.group is not None:
        raise ValueError(f"{path} needs the other processes of its group: it cannot run alone")
    tensors = {
        name: problem.h_S.new_zeros(shape, dtype=dtype)
        for name, (shape, dtype) in content["made"].items()
    }
    made = RECORDS[content["record"]](**tensors)
    fill(made, problem, budget)
    return described(problem, made, budget), tensors_of(problem) | tensors_of(made)


def main(paths: list[str]) -> int:
    """Compute the passes of files again, and print what they read and make."""
    if not paths:
        print("give the files that OPSD_KERNELS_DUMP=FOLDER wrote", file=sys.stderr)
        return 2
    for path in map(Path, paths):
        line, tensors = replay(path)
        print(f"{path}: {line}")
        for name, tensor in tensors.items():
            print(f"    {name}: {summarized(tensor)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
