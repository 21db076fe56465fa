"""Full-vocabulary self-distillation losses from hidden states, without vocabulary-sized logits."""

from .description import Divergence, divergence_name
from .heads.head import LMHead
from .loss import (
    LogProbs,
    SampledTokenLoss,
    TokenDivergence,
    fused_divergence_loss,
    fused_entropy,
    fused_jsd_loss,
    fused_log_probs,
    fused_sampled_token_loss,
    token_divergence,
)
from .module import FusedJSDLoss
from .reference import (
    reference_divergence_loss,
    reference_entropy,
    reference_jsd_loss,
    reference_log_probs,
    reference_sampled_token_loss,
    reference_token_divergence,
    reference_top_k,
    reference_top_k_loss,
)
from .sparse import TopKLoss, fused_top_k_loss
from .top_k import TopK, fused_top_k

__all__ = [
    "Divergence",
    "FusedJSDLoss",
    "LMHead",
    "LogProbs",
    "SampledTokenLoss",
    "TokenDivergence",
    "TopK",
    "TopKLoss",
    "divergence_name",
    "fused_divergence_loss",
    "fused_entropy",
    "fused_jsd_loss",
    "fused_log_probs",
    "fused_sampled_token_loss",
    "fused_top_k",
    "fused_top_k_loss",
    "reference_divergence_loss",
    "reference_entropy",
    "reference_jsd_loss",
    "reference_log_probs",
    "reference_sampled_token_loss",
    "reference_token_divergence",
    "reference_top_k",
    "reference_top_k_loss",
    "token_divergence",
]
__version__ = "0.2.0"
