"""The OPSD objective of a batch of rollouts."""

from torch import Tensor

from opsd_kernels import fused_jsd_loss
from opsd_train.config import Config
from opsd_train.records import Scores


def opsd_loss(scores: Scores, W: Tensor, config: Config) -> Tensor:
    """Divergence of the student from the teacher, averaged over each rollout's tokens, then over
    the batch (Algorithm 1): a weighted sum, so that it stays right under gradient accumulation."""
    return fused_jsd_loss(
        scores.h_student,
        scores.h_teacher,
        W,
        beta=config.beta,
        temperature=config.temperature,
        entry_clip=config.entry_clip,
        token_weights=scores.weights,
        reduction="sum",
    )
