"""`fused_jsd_loss` as a torch.nn.Module."""

import torch
from torch import Tensor

from .checks import check_reduction
from .description import divergence_name
from .heads.head import LMHead
from .loss import Reduction, fused_jsd_loss
from .scalars import check_beta, check_clip, check_temperature


class FusedJSDLoss(torch.nn.Module):
    """`fused_jsd_loss` as a module: made with the options of the loss, called with tensors.

        loss = FusedJSDLoss(beta=0.5)(h_student, h_teacher, model.lm_head.weight.detach())

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        entry_clip: float | None = None,
        reduction: Reduction = "mean",
        workspace_mib: float | None = None,
    ):
        super().__init__()
        check_reduction(reduction)
        self.beta = check_beta(beta)
        self.temperature = check_temperature(temperature)
        self.entry_clip = check_clip("entry_clip", entry_clip)
        self.reduction = reduction
        self.workspace_mib = workspace_mib

    def forward(
        self,
        h_student: Tensor,
        h_teacher: Tensor,
        W: Tensor | LMHead,
        token_weights: Tensor | None = None,
        W_teacher: Tensor | LMHead | None = None,
        beta: Tensor | None = None,
    ) -> Tensor:
        """See `fused_jsd_loss`; a tensor `beta` takes the place of the number for this call."""
        return fused_jsd_loss(
            h_student,
            h_teacher,
            W,
            beta=self.beta if beta is None else beta,
            temperature=self.temperature,
            entry_clip=self.entry_clip,
            token_weights=token_weights,
            reduction=self.reduction,
            W_teacher=W_teacher,
            workspace_mib=self.workspace_mib,
        )

    def extra_repr(self) -> str:
        name = divergence_name(self.beta, self.entry_clip)
        return f"{name}, temperature={self.temperature:g}, reduction={self.reduction!r}"
