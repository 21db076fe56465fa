"""The loss on K tokens at each position, as TRL's trainers define it.

All other tokens are one more entry of both distributions, their "tail", or both distributions are
divided by their sums over the K tokens.
"""

from torch import Tensor, no_grad

from ..checks import MOST_IDS
from ..heads.head import LMHead
from ..loss import fused_log_probs
from ..sparse import Outside, fused_top_k_loss


def outside(add_tail: bool) -> Outside:
    """How all other tokens count, in the words of `fused_top_k_loss`."""
    return "bucket" if add_tail else "renormalize"


def why_too_many(tokens: int) -> str | None:
    """Why the loss cannot take this number of tokens at a position; None if it can."""
    return f"{tokens} tokens at a position are above {MOST_IDS}" if tokens > MOST_IDS else None


def top_k_loss(
    h_S: Tensor,
    W: LMHead,
    h_T: Tensor,
    W_T: LMHead | None,
    ids: Tensor,
    *,
    add_tail: bool,
    beta: float,
    temperature: float,
) -> Tensor:
    """The loss [n] of each token where the teacher is a model.

    Args:
        ids: [n, K] the tokens that are compared. Of equal ids the first counts.
    """
    with no_grad():
        log_q, log_q_rest = fused_log_probs(
            h_T, W if W_T is None else W_T, ids, rest=True, temperature=temperature
        )
    loss = fused_top_k_loss(
        h_S,
        W,
        ids,
        log_q,
        log_q_rest=log_q_rest,
        outside=outside(add_tail),
        beta=beta,
        temperature=temperature,
        reduction="none",
    )
    assert isinstance(loss, Tensor)
    return loss
