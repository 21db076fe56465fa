"""Full-vocabulary self-distillation losses from hidden states, without vocabulary-sized logits."""

from opsd_kernels.divergence import divergence_name
from opsd_kernels.loss import fused_jsd_loss
from opsd_kernels.reference import reference_jsd_loss

__all__ = ["divergence_name", "fused_jsd_loss", "reference_jsd_loss"]
__version__ = "0.1.0"
