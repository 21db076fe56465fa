"""How a process divides its part of a batch: so many rollouts at a time, or so many tokens."""

import torch
from accelerate import Accelerator

from opsd_train.config import Config
from opsd_train.data import Contexts
from opsd_train.records import Rollout


def micro_batches(
    config: Config, accelerator: Accelerator, contexts: Contexts, rollout: Rollout, packed: bool
) -> list[Rollout]:
    """The parts of a process's rollouts that are scored one after the other. Their order, and which
    are together, changes nothing but rounding: a token's weight does not depend on it.

    All processes have as many, since sharded weights are gathered by all of them together.
    """
    if config.micro_batch_tokens is None:
        return rollout.micro_batches(config.micro_batch_size)
    prompts = contexts.lengths(rollout.problems)
    groups = by_tokens(
        prompts, list(map(len, rollout.completions)), config.micro_batch_tokens, packed
    )
    own = torch.tensor([len(groups)], device=accelerator.device)
    most = int(accelerator.gather(own).max())
    while len(groups) < most:  # every process has as many rollouts, so that one can be divided
        largest = max(groups, key=len)
        groups.remove(largest)
        groups += [largest[::2], largest[1::2]]
    return [rollout.some(group) for group in groups]


def by_tokens(
    prompts: list[int], completions: list[int], most: int, packed: bool
) -> list[list[int]]:
    """Indices of sequences in groups of like length, each of at most so many tokens, or of one
    sequence that has more.

    Args:
        prompts, completions: tokens of each sequence.
        packed: whether a group's tokens lie one after the other; or else side by side, prompts as
            long as the longest of them, and completions likewise.
    """
    longest_first = sorted(range(len(prompts)), key=lambda i: -(prompts[i] + completions[i]))
    groups: list[list[int]] = []
    for i in longest_first:
        if groups and _tokens(prompts, completions, [*groups[-1], i], packed) <= most:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _tokens(prompts: list[int], completions: list[int], group: list[int], packed: bool) -> int:
    if packed:
        return sum(prompts[i] + completions[i] for i in group)
    return len(group) * (max(prompts[i] for i in group) + max(completions[i] for i in group))
