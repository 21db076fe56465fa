"""The op in each of its schedules, on a GPU where there is one, behind the signature it has."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from opsd_kernels import fused_jsd_loss

# Where the Triton kernels run: compiled, or interpreted (see conftest.py).
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Schedule:
    name: str
    workspace_mib: float | None
    device: torch.device

    @property
    def logit_free(self) -> bool:
        return self.workspace_mib == 0

    def __call__(self, h_S: Tensor, h_T: Tensor, W: Tensor, **options: Any) -> Tensor:
        """`fused_jsd_loss` of tensors that lie on a CPU, which is where the result goes."""
        return self.run(fused_jsd_loss, h_S, h_T, W, **options)

    def run(self, function: Callable[..., Any], *tensors: Tensor, **options: Any) -> Any:
        """Any function of the package, likewise."""
        options.setdefault("workspace_mib", self.workspace_mib)
        args, options = tree_map_only(Tensor, lambda t: t.to(self.device), (tensors, options))
        return tree_map_only(Tensor, Tensor.cpu, function(*args, **options))

    def __str__(self) -> str:
        return f"{self.name}, {self.device}"

    def loss_and_grad(
        self, h_S: Tensor, h_T: Tensor, W: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Per-token losses and the gradient of their sum."""
        h = h_S.detach().clone().requires_grad_()
        loss = self(h, h_T, W, reduction="none", **options)
        loss.sum().backward()
        assert h.grad is not None
        return loss.detach(), h.grad


LOGIT_FREE = Schedule("logit-free", 0, DEVICE)
ROW_WORKSPACE = Schedule("row workspace", None, torch.device("cpu"))
SCHEDULES = [ROW_WORKSPACE, LOGIT_FREE]
if DEVICE.type == "cuda":
    SCHEDULES.append(Schedule("row workspace", 320, DEVICE))
