"""What happens at each token of a rollout, for people to look at."""

from collections.abc import Callable

import torch
from torch import Tensor

from opsd_kernels import LMHead, token_divergence
from opsd_train.config import Config
from opsd_train.models import logits, vocab_size
from opsd_train.records import Choices, Observation, Rollout, Scores

Observe = Callable[[Rollout, Scores], None]
"""Called with the rollouts and the scores of each micro-batch of a step."""

ENTRIES_AT_ONCE = 2**22  # of the vocabulary times tokens, 16 MiB in fp32


@torch.no_grad()
def observe_tokens(
    scores: Scores,
    head: LMHead,
    config: Config,
    teacher_head: LMHead | None,
    row: int,
    max_tokens: int,
    choices: int,
) -> Observation:
    """One rollout of a micro-batch, up to `max_tokens` of it: the divergence and statistics of
    every token, and the likeliest `choices` of both sides there."""
    first = int(scores.lengths[:row].sum())
    some = slice(first, first + min(int(scores.lengths[row]), max_tokens))
    h_S, h_T, tokens = scores.h_student[some], scores.h_teacher[some], scores.tokens[some]
    divergence = token_divergence(
        h_S,
        h_T,
        head,
        divergence=config.divergence,
        temperature=config.temperature,
        targets=tokens,
        W_teacher=teacher_head,
        workspace_mib=config.workspace_mib,
    )
    statistics = {name: t.tolist() for name, t in divergence._asdict().items()}
    return Observation(
        statistics,
        _likeliest(h_S, head, config.temperature, choices),
        _likeliest(h_T, teacher_head or head, config.temperature, choices),
    )


def _likeliest(h: Tensor, head: LMHead, temperature: float, choices: int) -> Choices:
    V = vocab_size(head)
    ids: list[list[int]] = []
    log_probs: list[list[float]] = []
    for some in h.split(max(1, ENTRIES_AT_ONCE // V)):
        log_p = torch.log_softmax(logits(head, some) / temperature, dim=-1)
        top = log_p.topk(min(choices, V), dim=-1)
        ids += top.indices.tolist()
        log_probs += top.values.tolist()
    return Choices(ids, log_probs)
