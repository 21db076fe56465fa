"""The likeliest entries of each token, and the mass of all others: 1 U of matrix products.

For R tokens at a time, and within it for a block of the vocabulary at a time:

    z = h W_blockᵀ                     logits in fp32, in a bounded scratch
    the k highest of the block         merged with those of the blocks before
    m, s ← m', s e^{(m − m')/T} + …    over the entries that are not among them, and those that a
                                       merge leaves out: the log-sum-exp of the rest is m/T + log s

The rest is summed without the entries that are found, not subtracted from 1: so it is right where
it is small. An entry has a key in int64, its logit before its id. Keys are all different, so the
order is the same whatever sorts them.

Processes that share the vocabulary merge what they found, chunk by chunk.
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads.vocabulary_parallel import gathered
from ..problem import Problem
from ..products import copied_bytes, project
from .planning import MIB
from .row_workspace import chunks, kept

# What a budget of 0 bytes allows: about the scratch of the logit-free schedule.
LOGIT_FREE_BYTES = 64 * MIB
MOST_ROWS, LEAST_COLUMNS = 1024, 64
# Bytes of temporaries for each logit of a block, and for each entry that is found.
LOGIT_BYTES, FOUND_BYTES = 16, 96


@dataclass(frozen=True)
class Likeliest:
    """The tensors that `fill` fills, for the tokens that are kept; a `TopK` says what they mean."""

    ids: Tensor  # [N, k] int64
    log_probs: Tensor  # [N, k] fp32
    log_rest: Tensor  # [N] fp32
    logp_targets: Tensor | None = None  # [N] fp32


class State(NamedTuple):
    """What is known of R tokens from some entries of the vocabulary. Logits are those before the
    temperature, which keeps more of them apart."""

    keys: Tensor  # [R, up to k] int64, see `_keys`
    m: Tensor  # [R], the largest logit of the rest, −∞ without any
    s: Tensor  # [R], Σ exp((z − m) / T) over the rest
    z_y: Tensor | None  # [R], the logit of the target, −∞ where it is elsewhere


def fill(found: Likeliest, problem: Problem, workspace_bytes: float) -> None:
    """Fill the results of all tokens that are kept, within a budget of bytes."""
    k = found.ids.shape[1]
    rows = kept(problem.keep)
    N = problem.h_S.shape[0] if rows is None else rows.shape[0]
    R, columns = _plan(problem, N, k, workspace_bytes)
    V = problem.W.shape[0]
    scratch = problem.h_S.new_empty(R, min(columns, V), dtype=torch.float32)
    for n in chunks(rows, N, R):
        chunk = problem.tokens(n)
        state = _of_block(chunk, k, scratch, slice(0, min(columns, V)))
        for v in range(columns, V, columns):
            block = _of_block(chunk, k, scratch, slice(v, min(v + columns, V)))
            state = _merged(state, block, k, chunk.temperature)
        if chunk.group is not None:
            state = _of_all_processes(state, k, chunk.group, chunk.temperature)
        _write(found, n, state, chunk.temperature)


def _plan(problem: Problem, N: int, k: int, budget: float) -> tuple[int, int]:
    """Tokens of a chunk, and columns of a block. Tokens do not depend on the rows of a shard.

    Raises:
        ValueError: the budget cannot hold one token; the message names the least that works.
    """
    budget = budget or LOGIT_FREE_BYTES
    row = FOUND_BYTES * k + LOGIT_BYTES * LEAST_COLUMNS
    copied = copied_bytes(problem.W, problem.operand_dtype)
    least = row + LEAST_COLUMNS * copied
    if budget < least:
        raise ValueError(
            f"workspace_mib={budget / MIB:g} cannot hold the {k} likeliest entries of one token; "
            f"the least that works here is workspace_mib={ceil(least / MIB * 1e3) / 1e3:g}"
        )
    R = max(1, min(N, MOST_ROWS, int(budget / 2 // row)))
    return R, int((budget - FOUND_BYTES * k * R) // (LOGIT_BYTES * R + copied))


def _of_block(chunk: Problem, k: int, scratch: Tensor, block: slice) -> State:
    """The state of a chunk of tokens after one block of the vocabulary."""
    R, width = chunk.h_S.shape[0], block.stop - block.start
    z = scratch[:R, :width]
    project(z, chunk.h_S, chunk.W[block], chunk.operand_dtype, width)
    chunk.logit_maps[0].of_columns(block).apply_(z)
    z_y = None
    if chunk.targets is not None:
        at = (chunk.targets - block.start).long()
        inside = (at >= 0) & (at < width)
        z_y = z.gather(1, at.clamp(0, width - 1)[:, None]).squeeze(1)
        z_y = z_y.masked_fill(~inside, -torch.inf)
    ids = torch.arange(block.start, block.stop, device=z.device)
    if chunk.offset is not None:
        ids += chunk.offset
    keys, at = _keys(z, ids).topk(min(k, width), sorted=False)
    z.scatter_(1, at, -torch.inf)
    nothing = z.new_full((R,), -torch.inf), z.new_zeros(R)
    return State(keys, *_with_more(*nothing, z, chunk.temperature), z_y)


def _merged(a: State, b: State, k: int, temperature: float) -> State:
    """The state after the entries of both, which have none in common."""
    keys = torch.cat([a.keys, b.keys], 1).sort(descending=True).values
    m = torch.maximum(a.m, b.m)
    s = a.s * _exp(a.m, m, temperature) + b.s * _exp(b.m, m, temperature)
    if keys.shape[1] > k:
        m, s = _with_more(m, s, _logits(keys[:, k:]), temperature)
    z_y = None if a.z_y is None or b.z_y is None else torch.maximum(a.z_y, b.z_y)
    return State(keys[:, :k], m, s, z_y)


def _with_more(m: Tensor, s: Tensor, z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """m and s [R] with more entries of the rest, whose logits z [R, entries] are overwritten."""
    higher = torch.maximum(m, z.amax(1))
    s = s * _exp(m, higher, temperature)
    z.sub_(_finite_or_zero(higher)[:, None]).div_(temperature).exp_()
    return higher, s + z.sum(1)


def _of_all_processes(state: State, k: int, group: str, temperature: float) -> State:
    """The state after the entries of all processes of a group: the same bits for each of them."""
    keys = torch.nn.functional.pad(state.keys, (0, k - state.keys.shape[1]), value=BANNED)
    keys = gathered(keys, group)
    m, s = gathered(state.m, group), gathered(state.s, group)
    z_y = None if state.z_y is None else gathered(state.z_y, group)
    merged = None
    for i in range(keys.shape[0]):
        of_process = State(keys[i], m[i], s[i], None if z_y is None else z_y[i])
        merged = of_process if merged is None else _merged(merged, of_process, k, temperature)
    assert merged is not None
    return merged


def _write(found: Likeliest, n: slice | Tensor, state: State, temperature: float) -> None:
    """Write the results of the tokens n, whose state is that after all entries."""
    keys = state.keys.sort(descending=True).values
    z = _logits(keys)
    top = z[:, 0]
    # Without the likeliest entry, whose log-probability may be tiny.
    others = _exp(z[:, 1:], top[:, None], temperature).sum(1)
    others += state.s * _exp(state.m, top, temperature)
    log_sum = others.log1p_()

    def log_p(z: Tensor) -> Tensor:
        return (z - _finite_or_zero(top)[:, None]) / temperature - log_sum[:, None]

    found.ids[n] = _ids(keys).masked_fill_(z == -torch.inf, -1)
    found.log_probs[n] = log_p(z)
    found.log_rest[n] = log_p(state.m[:, None]).squeeze(1) + state.s.log()
    if found.logp_targets is not None and state.z_y is not None:
        found.logp_targets[n] = log_p(state.z_y[:, None]).squeeze(1)


def _exp(z: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """exp((z − reference) / T); 0 where both are −∞."""
    return ((z - _finite_or_zero(reference)) / temperature).exp()


def _finite_or_zero(z: Tensor) -> Tensor:
    """The number to subtract from logits before exp: −∞ − (−∞) would be NaN."""
    return z.masked_fill(z == -torch.inf, 0)


# The key of no entry: that of a logit of −∞, and of the last id.
BANNED = -0x7F800001 << 32


def _keys(z: Tensor, ids: Tensor) -> Tensor:
    """[R, entries] int64, in the order of logits; of equal ones the smallest id has the largest
    key."""
    bits = (z + 0.0).view(torch.int32)  # −0 becomes 0
    # Bits of negative numbers grow with their size.
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    keys = bits.long()
    return keys.bitwise_left_shift_(32).bitwise_or_(~ids & 0xFFFFFFFF)


def _logits(keys: Tensor) -> Tensor:
    """The logits of keys."""
    bits = (keys >> 32).int()
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)
    return bits.view(torch.float32)


def _ids(keys: Tensor) -> Tensor:
    """The ids of keys."""
    return ~keys & 0xFFFFFFFF
