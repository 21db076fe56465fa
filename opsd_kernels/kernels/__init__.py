"""The Triton kernels, one a file, each with its maths.

    pointwise.py    the family of divergences, entry by entry; what divergence.py is for PyTorch
    logits_tile.py  a tile of products h Wᵀ of both sides, in registers
    head.py         products → logits, where a head is more than a matrix
    lse.py          hidden states → log-sum-exp of both sides, the student's top entry
    pair.py         hidden states → per-token sums, and the tiles of scores that dh_S is made of
    finish.py       sums and accumulators → ℓ and dh_S
    gradient.py     hidden states, and all that is known of a row → the gradient of a tile of logits
    rows.py         rows of logits that exist → ℓ and their gradient in place (row workspace)
    top_row.py      a product of that gradient and W → dh_S (row workspace)
    records.py      what kernels are given: sides, tokens, formula, tiling; what they fill
    tiles.py        tile sizes and warp counts, in one table

Under TRITON_INTERPRET=1, set before Python starts, Triton interprets them on CPU tensors; that is
how they are tested without a GPU.
"""

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch


# What a machine has is a constant to PyTorch's compiler, which need not trace how it is asked.
@torch.compiler.assume_constant_result
def available(device: torch.device) -> bool:
    """Whether the kernels run on a device: a GPU of compute capability 8.0 or above (or AMD's), or
    a CPU where Triton interprets."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        from opsd_kernels.kernels.pointwise import INTERPRETED

        return bool(INTERPRETED.value)
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or capability(device) >= (8, 0)


@torch.compiler.assume_constant_result
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU. Where there is none, and tensors are fake, the least
    that the kernels run on."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)


@torch.compiler.assume_constant_result
def multiprocessors(device: torch.device) -> int | None:
    """Multiprocessors of a GPU; None where there is none, and tensors are fake."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).multi_processor_count


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within it kernels are launched on `device`, and on its current stream: Triton takes the
    current device, which need not be that of the inputs."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉; triton.cdiv is one that PyTorch's compiler cannot look into."""
    return -(-a // b)
