"""The op in each of its schedules, on a GPU where there is one, behind the signature it has."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        options.setdefault("workspace_mib", self.workspace_mib)
        moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in options.items()}
        h_S, h_T, W = (t.to(self.device) for t in (h_S, h_T, W))
        return fused_jsd_loss(h_S, h_T, W, **moved).cpu()

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
