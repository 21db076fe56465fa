"""The likeliest entries of next-token distributions, without logits of all tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_arguments, check_workspace
from .divergence import Family
from .heads.head import LMHead
from .schedules import choice
from .schedules.top_k import Likeliest


class TopK(NamedTuple):
    """The k likeliest entries of every token, from `fused_top_k`. Nothing here has a gradient."""

    ids: Tensor
    """[..., k] int64, the likeliest entry first. Entries whose logits are equal in fp32 are in the
    order of their ids. −1 where fewer than k entries are not banned."""
    log_probs: Tensor
    """[..., k] fp32 log p of these entries; −inf where the id is −1."""
    log_rest: Tensor
    """[...] fp32, the log of the probability of all other entries together; −inf if there are
    none."""
    logp_targets: Tensor | None
    """[...] fp32 log p of the targets; None without `targets`."""


def fused_top_k(
    h: Tensor,
    W: Tensor | LMHead,
    k: int,
    *,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    workspace_mib: float | None = None,
) -> TopK:
    """The k likeliest entries of next-token distributions, and the mass of all others, from hidden
    states and the LM head, in one pass over the vocabulary and without [N, V] logits.

    Each token gets the k largest of p = softmax(h Wᵀ / T), in order. The mass of the rest is a sum
    over the rest, not 1 − Σ p: it keeps its digits where it is small. Logits are in fp32, and their
    last bits depend on the device, the number of tokens and the workspace. Entries whose logits
    differ in those bits alone may change places.

    Args:
        h: [..., D] bf16, fp16 or fp32, the last hidden states, which enter the LM head. A constant.
        W: [V, D] LM head, or an `LMHead`, a constant. If processes share its rows, all of them get
            the entries of the whole vocabulary.
        k: number of entries, from 1 to V. If processes share the vocabulary, k may be larger than
            V; the ids that do not exist are then −1.
        targets: [...] ids of tokens whose log p is wanted too, see `token_divergence`.
        temperature: T > 0, divides the logits.
        token_weights: [...] float, int or bool. A token of weight 0 is dropped: its ids are −1, its
            log-probabilities −inf, its `log_rest` and `logp_targets` 0, whatever its hidden states
            are. Other weights have no effect.
        workspace_mib: MiB for all temporaries together; see `fused_jsd_loss` for the default. Here
            logits are in memory on a GPU too, so 0 is read as 64.

    Returns:
        A `TopK`.

    Raises:
        TypeError, ValueError: as `fused_jsd_loss`.
    """
    arguments = check_arguments(
        {"h": h},
        W,
        Family.ENTROPY,
        targets=targets,
        temperature=temperature,
        token_weights=token_weights,
    )
    problem, leading = arguments.problem, arguments.leading
    check_k(k, None if problem.group is not None else problem.W.shape[0])
    workspace_bytes = check_workspace(workspace_mib, h.device)
    h_S, N = problem.h_S, problem.h_S.shape[0]
    found = Likeliest(
        h_S.new_empty(N, k, dtype=torch.int64),
        h_S.new_empty(N, k, dtype=torch.float32),
        h_S.new_empty(N, dtype=torch.float32),
        None if targets is None else h_S.new_empty(N, dtype=torch.float32),
    )
    choice.fill(found, problem, workspace_bytes)
    ids, log_probs = found.ids.reshape(*leading, k), found.log_probs.reshape(*leading, k)
    log_rest, logp_targets = found.log_rest.reshape(leading), found.logp_targets
    if logp_targets is not None and arguments.valid is not None:
        logp_targets = logp_targets.reshape(leading).masked_fill(~arguments.valid, torch.nan)
    if problem.keep is not None:
        dropped = ~problem.keep.reshape(leading)
        ids = ids.masked_fill(dropped[..., None], -1)
        log_probs = log_probs.masked_fill(dropped[..., None], -torch.inf)
        log_rest = log_rest.masked_fill(dropped, 0)
        if logp_targets is not None:
            logp_targets = logp_targets.masked_fill(dropped, 0)
    return TopK(ids, log_probs, log_rest, logp_targets)


def check_k(k: int, V: int | None) -> None:
    """Check the number of entries; V is None where its size is not known to this process."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if V is None and k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if V is not None and not 1 <= k <= V:
        raise ValueError(
            f"k must lie in [1, {V}], the number of entries of the vocabulary, got {k}"
        )
