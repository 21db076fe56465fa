"""What a report of a fault should say of a machine: `python -m opsd_kernels.env`."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, kernels
from .schedules.planning import default_workspace_mib

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "numpy")
VARIABLES = ("OPSD_", "TRITON_", "TORCH_", "CUDA_VISIBLE_DEVICES", "PYTORCH_")


def environment() -> dict[str, str]:
    """Versions, devices and the schedule of a call without `workspace_mib`, by name."""
    found = {
        "opsd_kernels": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["CUDA of torch"] = torch.version.cuda or "none"
    found["ROCm of torch"] = torch.version.hip or "none"
    for device in devices():
        found[str(device)] = described(device)
    for name, value in sorted(os.environ.items()):
        if name.startswith(VARIABLES):
            found[name] = value
    return found


def devices() -> list[torch.device]:
    """The CPU and all GPUs."""
    return [
        torch.device("cpu"),
        *(torch.device("cuda", i) for i in range(torch.cuda.device_count())),
    ]


def described(device: torch.device) -> str:
    """A device, and the schedule that a call takes there without `workspace_mib`."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        of_gpu = torch.cuda.get_device_properties(device)
        name = (
            f"{of_gpu.name}, compute capability {of_gpu.major}.{of_gpu.minor}, "
            f"{of_gpu.total_memory / 2**30:.0f} GiB"
        )
    workspace_mib = default_workspace_mib(device)
    schedule = f"row workspace of {workspace_mib} MiB" if workspace_mib else "logit-free"
    can = "Triton kernels" if kernels.available(device) else "PyTorch alone"
    return f"{name}; {can}; by default {schedule}"


def main() -> None:
    """Print the environment, one line for each fact."""
    found = environment()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
