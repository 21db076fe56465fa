"""The Triton kernels, one in each file, with its maths and its launcher.

    pointwise.py    the family of divergences, entry by entry; what divergence.py is for PyTorch
    logits_tile.py  a tile of products h Wᵀ of both sides, in registers
    head.py         products → logits, where a head is more than a matrix
    excluded.py     entries that a row of a tile is without
    lse.py          hidden states → log-sum-exp of both sides, the student's top entry
    pair.py         hidden states → sums of each token, and the tiles of scores for dh_S
    finish.py       sums and accumulators → ℓ and dh_S
    gradient.py     hidden states and stats of a row → the gradient of a tile of logits
    rows.py         rows of logits in memory → ℓ, and the gradient in their place (row workspace)
    top_row.py      a product of that gradient and W → dh_S (row workspace)
    gathered.py     products with some rows of W for each token, and the gradient of such rows
    records.py      the records that kernels take
    scratch.py      the scratch of the logit-free schedule
    tiles.py        tile sizes and warp counts, in one table

Under TRITON_INTERPRET=1, set before Python starts, Triton interprets the kernels on CPU tensors, so
that tests need no GPU.
"""

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch


# To PyTorch's compiler this is a constant, which it does not trace.
@torch.compiler.assume_constant_result
def available(device: torch.device) -> bool:
    """Whether the kernels run on a device: a GPU of compute capability 8.0 or above (or AMD's), or
    a CPU where Triton interprets."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        from .pointwise import INTERPRETED

        return bool(INTERPRETED.value)
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or capability(device) >= (8, 0)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; without a GPU, for fake tensors, the least that the
    kernels run on."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)


def current(device: torch.device) -> AbstractContextManager[object]:
    """A context in which kernels are launched on `device` and its current stream. Triton itself
    takes the current device, which may not be the device of the inputs."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉"""
    return -(-a // b)
