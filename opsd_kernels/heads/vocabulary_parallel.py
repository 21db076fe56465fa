"""A head whose rows the processes of a group share. All of them have the same tokens.

Every process passes its own rows of the vocabulary, in the order of ranks, as `LMHead(rows,
group=…)`, and gets what one process with the whole head would get: losses, statistics, and the
gradient with respect to the hidden states. The gradient of its own rows of the head needs no other
process. For R tokens at a time these are gathered or summed:

    logit-free      gathered: the state of every row after `lse`; summed: the sums of `pair`, and,
                    while the next R tokens are computed, ∂ℓ/∂h_S
    row workspace   gathered: top and sum of both sides; summed: the shift c, all other sums, and at
                    the end ∂ℓ/∂h_S of all tokens

(bytes in docs/maths.md, "A vocabulary that processes share"), and once in a call the sizes of all
shards. The number of collectives depends on the number of tokens, not on the rows of a process: a
shard may be empty.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# all_gather_into_tensor is its name up to torch 2.12.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def local_ids(ids: Tensor, offset: Tensor, own_rows: int) -> Tensor:
    """Ids counted from this process's first row; −1 for rows of other processes."""
    local = ids - offset
    return local.masked_fill((local < 0) | (local >= own_rows), -1)


def check_group(name: str, group: Any) -> str | None:
    """The name of a head's group, by which `_find` finds it; None for a group of one process.

    Raises:
        TypeError: `group` is no process group.
        ValueError: this process is not a member.
    """
    if group is None:
        return None
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        if dist.is_available() and group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"{name}.group does not have this process among its members: only those that hold "
                "rows of the head take part in its loss"
            )
        raise TypeError(
            f"{name}.group must be a torch.distributed.ProcessGroup, got {type(group).__name__}; "
            "of a one-dimensional DeviceMesh it is mesh.get_group()"
        )
    return None if group.size() == 1 else group.group_name


def find_shard(own_rows: int, h: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """The place of this process's first row, and the number of rows of all processes, [] int64
    each, from the sizes of all shards, which one collective gathers.

    Raises:
        ValueError: the processes have different numbers of tokens (checked on a CPU only).
    """
    compiling = torch.compiler.is_compiling()
    find = ops.find_shard if compiling else _find_shard
    offset, V = find(h, own_rows, group).unbind()
    return offset, V


def _find_shard(h: Tensor, own_rows: int, group: str) -> Tensor:
    # Filled on the device: copying a number to a GPU would make the host wait.
    rows_and_tokens = h.new_full((2,), own_rows, dtype=torch.int64)
    rows_and_tokens[1:].fill_(h.shape[:-1].numel())
    rows, tokens = gathered(rows_and_tokens, group).unbind(1)
    if h.device.type == "cpu" and not (tokens == tokens[0]).all():
        raise ValueError(
            f"the ranks of W.group have {tokens.tolist()} tokens: every rank must have all tokens "
            "that the others have (gather a sequence that is split first)"
        )
    return torch.stack([rows[: rank_in(group)].sum(), rows.sum()])


_operator = torch.library.custom_op(
    add_op_namespace_prefix("find_shard"),
    _find_shard,
    mutates_args=(),
    schema="(Tensor h, int own_rows, str group) -> Tensor",
)
_operator.register_fake(lambda h, own_rows, group: h.new_empty(2, dtype=torch.int64))


def is_dtensor(t: Tensor) -> bool:
    """Whether t is a DTensor of torch.distributed, which need not be imported."""
    return type(t).__name__ == "DTensor"


def gathered(t: Tensor, group: str) -> Tensor:
    """[processes, ...] the t of every process."""
    process_group = _find(group)
    out = t.new_empty(process_group.size() * t.shape[0], *t.shape[1:])
    _all_gather(out, t.contiguous(), group=process_group)
    return out.unflatten(0, (-1, t.shape[0]))


def summed_(t: Tensor, group: str) -> Tensor:
    """Sum a contiguous t over the processes, in place. All get the same bits."""
    dist.all_reduce(t, group=_find(group))
    return t


def begin_sum_(t: Tensor, group: str) -> Any:
    """`summed_` beside what is launched next. Call `.wait()` on the result before reading t."""
    return dist.all_reduce(t, group=_find(group), async_op=True)


def smallest(number: int, group: str, device: torch.device) -> int:
    """The smallest number of all processes. The host waits for it."""
    t = torch.full((), number, device=device)
    dist.all_reduce(t, op=dist.ReduceOp.MIN, group=_find(group))
    return int(t)


def rank_in(group: str) -> int:
    return _find(group).rank()


def _find(group: str) -> "ProcessGroup":
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
