"""The Triton kernels, one a file, each with its maths.

    pointwise.py    the family of divergences, entry by entry; what divergence.py is for PyTorch
    logits_tile.py  a tile of logits of both sides, in registers
    lse.py          hidden states → log-sum-exp of both sides, the student's top entry
    pair.py         hidden states → per-token sums, and the tiles of scores that dh_S is made of
    finish.py       sums and accumulators → ℓ and dh_S
    rows.py         rows of logits that exist → ℓ and their gradient in place (row workspace)
    tiles.py        tile sizes and warp counts, in one table

Under TRITON_INTERPRET=1, set before Python starts, Triton interprets them on CPU tensors; that is
how they are tested without a GPU.
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch


def available(device: torch.device) -> bool:
    """Whether the kernels run on a device: a GPU, or a CPU where Triton interprets."""
    if device.type == "cpu":
        runs = os.environ.get("TRITON_INTERPRET", "0") == "1"
    else:
        runs = device.type == "cuda"
    return runs and importlib.util.find_spec("triton") is not None


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within it kernels are launched on `device`, and on its current stream: Triton takes the
    current device, which need not be that of the inputs."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
