"""Check the arguments of a loss before anything is computed. A refusal names the argument.

Shapes, dtypes and devices are always checked. The contents of tensors are checked on a CPU only, so
that a GPU never waits for the host, and not while PyTorch traces or compiles, when tensors have no
contents.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import kernels
from .description import Divergence
from .divergence import Family, Weight
from .heads.head import LMHead
from .heads.vocabulary_parallel import check_group, find_shard, is_dtensor, local_ids
from .problem import Problem
from .scalars import check_temperature, number
from .schedules.planning import MIB, default_workspace_mib
from .versions import warn_of_untried

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Arguments(NamedTuple):
    """The checked arguments of a call of a loss."""

    problem: Problem  # N tokens in one dimension and both heads, all of them constants
    # Gradients are with respect to these: the student's hidden states and head.
    h_S: Tensor  # [N, D]
    weight: Tensor  # [rows, D]; the first V rows are the vocabulary
    bias: Tensor | None  # [rows]
    leading: torch.Size  # [...], the leading shape of the hidden states
    weights: Tensor | None  # [...] fp32
    valid: Tensor | None  # [...] bool, whether a target is in the vocabulary; None without targets
    ids: Tensor | None = None  # [N, K] int32, K tokens for each; −1 where not in the vocabulary


# Hidden states by argument name: the student's first, then the teacher's if there is one.
Hidden = dict[str, Tensor]


def check_arguments(
    hidden: Hidden,
    W: Tensor | LMHead,
    value: Divergence | Family,
    W_teacher: Tensor | LMHead | None = None,
    *,
    targets: Tensor | None = None,
    ids: tuple[str, Tensor] | None = None,
    advantages: Tensor | None = None,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    reduction: str = "none",
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES,
) -> Arguments:
    """Check the arguments of a loss.

    Args:
        hidden: see `Hidden`.
        value: the value ℓ of every token: a divergence, or a `Family` that is none.
        ids: K tokens for each, [..., K], after the name of their argument.
        dtypes: the dtypes that tensors may have.

    For the others see `fused_divergence_loss`.
    """
    _check_versions()
    if not isinstance(value, (Divergence, Family)):
        raise TypeError(f"divergence must be a Divergence, got {type(value).__name__}")
    check_reduction(reduction)
    temperature = check_temperature(temperature)
    student = check_head("W", W)
    teacher = student if W_teacher is None else check_head("W_teacher", W_teacher)
    for head in (student, teacher):
        check_temperature(temperature, head.scale)
    if teacher.group != student.group:
        raise ValueError(
            "W and W_teacher must have the same group: every process holds the same rows of both"
        )
    operand_dtype = check_tensors(hidden, student, teacher, dtypes)
    _name, h_student = _student_of(hidden)
    h_teacher = hidden.get("h_teacher")
    shared = is_same_weight(student, teacher)
    weights = check_weights(token_weights, hidden, reduction)
    beta = entry_clip = w_q = w_p = None
    if isinstance(value, Divergence):
        entry_clip = value.entry_clip
        beta, halves = _parameters(value)
        if isinstance(beta, Tensor):
            beta = check_token_beta(beta, hidden)
        if halves is not None:
            w_q = check_weights_of_tokens("forward", halves[0], hidden, weights)
            w_p = check_weights_of_tokens("reverse", halves[1], hidden, weights)
    if advantages is not None:
        if targets is None:
            raise ValueError("targets must be given with advantages: the ids that were sampled")
        if not isinstance(advantages, Tensor):
            raise TypeError(f"advantages must be a torch.Tensor, got {type(advantages).__name__}")
        advantages = check_weights_of_tokens("advantages", advantages, hidden, weights)
    sampled = valid = offset = None
    V: int | Tensor = student.V
    if student.group is not None:
        offset, V = find_shard(student.V, h_student, student.group)
    if targets is not None or value == Family.LOG_PROB:
        sampled, valid = check_targets(targets, hidden, V, weights)
        if offset is not None:
            sampled = local_ids(sampled, offset, student.V).int()
    several = None if ids is None else check_ids(*ids, hidden, V)
    h_S = h_student.reshape(-1, h_student.shape[-1])
    problem = Problem(
        h_S.detach(),
        None if h_teacher is None else h_teacher.detach().reshape(-1, h_teacher.shape[-1]),
        student.rows,
        None if shared else teacher.rows,
        operand_dtype,
        beta,
        # The student's scale is part of the temperature, and other numbers are relative to it.
        temperature / student.scale,
        entry_clip,
        None if weights is None else weights.reshape(-1) != 0,
        sampled,
        student.bias_of(operand_dtype),
        teacher.bias_of(operand_dtype),
        _quotient(student.softcap, student.scale),
        _quotient(teacher.softcap, student.scale),
        teacher.scale / student.scale,
        group=student.group,
        offset=offset,
        w_q=w_q,
        w_p=w_p,
        advantages=advantages,
    )
    if h_teacher is None:
        problem = problem.without_teacher()
    leading = h_student.shape[:-1]
    return Arguments(problem, h_S, student.weight, student.bias, leading, weights, valid, several)


# PyTorch's compiler does not trace it.
@torch.compiler.assume_constant_result
def _check_versions() -> None:
    """Warn once of a PyTorch or a Triton that was never tried."""
    warn_of_untried("torch")
    warn_of_untried("triton")


def _parameters(
    divergence: Divergence,
) -> tuple[float | Tensor | None, tuple[Weight, Weight] | None]:
    """β, and the weights of both halves, or None if β implies them. Weights that equal those of a
    named divergence are replaced by its β: it has kernels of its own."""
    beta, weights = divergence.beta, divergence.weights
    if weights is None or any(isinstance(w, Tensor) for w in weights):
        return beta, weights
    implied = {0.0: (1.0, 0.0), 1.0: (0.0, 1.0)}
    if isinstance(beta, float):
        implied = {beta: (beta, 1 - beta)}
    for b, of_beta in implied.items():
        if weights == of_beta:
            return b, None
    return beta, weights


def check_token_beta(beta: Tensor, hidden: Hidden) -> Tensor:
    """Check a β for every token and return it as fp32 constants [N]."""
    if not beta.is_floating_point():
        raise TypeError(f"beta must be float, got {beta.dtype}")
    if beta.ndim == 0:
        beta = beta.expand(_student_of(hidden)[1].shape[:-1])
    _check_per_token("beta", beta, hidden)
    beta = beta.detach().reshape(-1)
    if is_readable(beta) and not ((beta >= 0) & (beta <= 1)).all():
        raise ValueError("beta must lie in [0, 1], and that of some token does not")
    # A β between 0 and 1 names a JSD, and still does when it is rounded to fp32. A β outside [0, 1]
    # gives NaN, where it could not be refused because it cannot be read.
    inside = beta.float().clamp(torch.finfo(torch.float32).tiny, 1 - 2**-24)
    ends = torch.where((beta == 0) | (beta == 1), beta.float(), torch.nan)
    return torch.where((beta > 0) & (beta < 1), inside, ends)


@dataclass(frozen=True)
class Head:
    """The head of one side. Its numbers are checked; `check_tensors` checks its tensors."""

    name: str  # of the argument: W or W_teacher
    weight_name: str  # the same, or with .weight if the argument is an LMHead
    weight: Tensor  # [rows, D]
    bias: Tensor | None
    softcap: float | None
    scale: float
    vocab_size: int | None
    group: str | None  # the name of its group

    @property
    def V(self) -> int:
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def rows(self) -> Tensor:
        """W [V, D] without padded rows, a constant. An empty shard has one banned row instead."""
        if self.V == 0:
            return self.weight.new_zeros(1, self.weight.shape[1])
        return self.weight.detach()[: self.V]

    def bias_of(self, operand_dtype: torch.dtype) -> Tensor | None:
        """b [V] in the dtype to which autocast would round it."""
        if self.V == 0:
            return self.weight.new_full((1,), -torch.inf, dtype=operand_dtype)
        if self.bias is None:
            return None
        return self.bias.detach()[: self.V].to(operand_dtype).contiguous()

    def tensors(self) -> dict[str, Tensor]:
        named = {self.weight_name: self.weight}
        return named if self.bias is None else named | {f"{self.name}.bias": self.bias}


def check_head(name: str, W: Tensor | LMHead) -> Head:
    """Check the numbers of a head."""
    if isinstance(W, torch.nn.Module):
        raise TypeError(
            f"{name} must be a torch.Tensor [V, D] or an LMHead, got the module "
            f"{type(W).__name__}: of a linear layer pass its .weight, or LMHead(layer.weight, "
            "layer.bias), of a model LMHead.of(model)"
        )
    if not isinstance(W, LMHead):
        return Head(name, name, W, None, None, 1.0, None, None)
    softcap, vocab_size = W.softcap, W.vocab_size
    if softcap is not None:
        softcap = number(f"{name}.softcap", softcap)
        if not 0 < softcap < math.inf:
            raise ValueError(
                f"{name}.softcap must be positive and finite, or None for no cap, got {softcap}"
            )
    scale = number(f"{name}.scale", W.scale)
    if not 0 < scale < math.inf:
        raise ValueError(f"{name}.scale must be positive and finite, got {scale}")
    if vocab_size is not None and (isinstance(vocab_size, bool) or not isinstance(vocab_size, int)):
        raise TypeError(f"{name}.vocab_size must be an int, got {type(vocab_size).__name__}")
    group = check_group(name, W.group)
    return Head(name, f"{name}.weight", W.weight, W.bias, softcap, scale, vocab_size, group)


def check_tensors(
    hidden: Hidden, student: Head, teacher: Head, dtypes: tuple[torch.dtype, ...]
) -> torch.dtype:
    """Check hidden states and heads, and return the dtype of the matrix products' operands."""
    heads = (student,) if teacher is student else (student, teacher)
    name_S, h_S = _student_of(hidden)
    tensors = dict(hidden)
    for head in heads:
        tensors |= head.tensors()
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            or_head = " or an LMHead" if name in ("W", "W_teacher") else ""
            raise TypeError(f"{name} must be a torch.Tensor{or_head}, got {type(t).__name__}")
        if is_dtensor(t):
            raise TypeError(
                f"{name} is a DTensor, sharded by FSDP2: pass {name}.full_tensor(); a head that is "
                "trained as .full_tensor(grad_placements=[Partial()]), whose gradient is summed; a "
                "head whose ranks all have the same tokens as LMHead(….to_local(), group=…)"
            )
        if t.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {t.layout}")
        if t.dtype not in dtypes:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{name} must be one of {wanted}, got {t.dtype}")
        if t.device != h_S.device:
            raise ValueError(
                f"{name} is on {t.device}, {name_S} on {h_S.device}; "
                "all tensors must be on one device"
            )
    device_type = h_S.device.type
    # The meta device has no autocast: asking whether it is enabled raises.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        operand_dtype = torch.get_autocast_dtype(device_type)
    else:
        operand_dtype = h_S.dtype
        for name, t in tensors.items():
            if t.dtype != operand_dtype:
                raise TypeError(
                    f"{name} is {t.dtype}, {name_S} {operand_dtype}; "
                    "all tensors must have one dtype (or be used under torch.autocast)"
                )

    for name, h in hidden.items():
        if h.ndim == 0:
            raise ValueError(f"{name} must be [..., D], got a scalar")
    for head in heads:
        _check_shapes(head)
    for name, h in hidden.items():
        if h.shape[:-1] != h_S.shape[:-1]:
            raise ValueError(
                f"{name_S} and {name} must have the same leading shape, got "
                f"{list(h_S.shape)} and {list(h.shape)}"
            )
    for (name, h), head in zip(hidden.items(), (student, teacher), strict=False):
        W = head.weight
        if h.shape[-1] != W.shape[1]:
            raise ValueError(
                f"{name} has {h.shape[-1]} features, {head.weight_name} {W.shape[1]}: {name} "
                f"{list(h.shape)} must be [..., D] for {head.weight_name} [V, D] {list(W.shape)}"
            )
    if teacher.V != student.V:
        raise ValueError(
            f"{teacher.name} has {teacher.V} rows, {student.name} {student.V}: "
            "student and teacher must share one vocabulary (of a padded head the first vocab_size)"
        )
    return operand_dtype


def _check_shapes(head: Head) -> None:
    name, W, bias = head.weight_name, head.weight, head.bias
    if W.ndim != 2:
        raise ValueError(
            f"{name} must be [V, D], got shape {list(W.shape)}; a head sharded or flattened by "
            "FSDP or ZeRO-3 must be gathered first"
        )
    if 0 in (W.shape if head.group is None else W.shape[1:]):
        raise ValueError(f"{name} must have at least one row and column, got shape {list(W.shape)}")
    rows = W.shape[0]
    least = 1 if head.group is None else 0
    if not least <= head.V <= rows:
        raise ValueError(
            f"{head.name}.vocab_size must lie in [{least}, {rows}], the rows of {name}, got "
            f"{head.V}"
        )
    if bias is None:
        return
    if bias.shape != (rows,):
        raise ValueError(
            f"{head.name}.bias must have one number for each of the {rows} rows of {name}, "
            f"got shape {list(bias.shape)}"
        )
    if is_readable(bias) and not (bias[: head.V] < math.inf).all():
        raise ValueError(f"{head.name}.bias must be finite, or −∞ for entries that are banned")
    # A shard may be banned, if another process has entries that are not.
    if head.group is None and is_readable(bias) and (bias[: head.V] == -math.inf).all():
        raise ValueError(
            f"{head.name}.bias is −∞ for the whole vocabulary: it must leave at least one entry"
        )


def is_same_weight(student: Head, teacher: Head) -> bool:
    """Whether both sides have the same W. While PyTorch traces, two views of the same memory count
    as different."""
    if student.weight is teacher.weight and student.V == teacher.V:
        return True
    W, W_T = student.rows, teacher.rows
    if torch.compiler.is_compiling() or any(
        isinstance(t, FakeTensor) or t.is_meta for t in (W, W_T)
    ):
        return False
    return (W.data_ptr(), W.dtype, W.shape, W.stride()) == (
        W_T.data_ptr(), W_T.dtype, W_T.shape, W_T.stride()
    )  # fmt: skip


def _quotient(softcap: float | None, scale: float) -> float | None:
    return None if softcap is None else softcap / scale


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def check_weights(token_weights: Tensor | None, hidden: Hidden, reduction: str) -> Tensor | None:
    """Check token weights and return them as fp32 constants of the leading shape."""
    if token_weights is None:
        return None
    if not isinstance(token_weights, Tensor):
        raise TypeError(f"token_weights must be a torch.Tensor, got {type(token_weights).__name__}")
    if token_weights.is_complex():
        raise TypeError(f"token_weights must be float, int or bool, got {token_weights.dtype}")
    _check_per_token("token_weights", token_weights, hidden)
    # A copy: a tensor made in inference mode could not be saved for backward.
    weights = token_weights.detach().float().clone()
    if is_readable(weights):
        if not weights.isfinite().all():
            raise ValueError("token_weights must be finite, and that of some token is not")
        if reduction == "mean" and (weights < 0).any():
            raise ValueError(
                'token_weights must not be negative with reduction "mean", which divides by their '
                'sum; "sum" and "none" take weights of both signs'
            )
    return weights


def check_weights_of_tokens(
    name: str, values: Weight, hidden: Hidden, weights: Tensor | None
) -> Tensor:
    """Check numbers of either sign, one for each token or one for all, and return them as fp32
    constants [N]; 0 for dropped tokens."""
    _name, h_S = _student_of(hidden)
    if not isinstance(values, Tensor):
        return h_S.new_full((h_S.shape[:-1].numel(),), values, dtype=torch.float32)
    if not values.is_floating_point():
        raise TypeError(f"{name} must be float, got {values.dtype}")
    if values.ndim == 0:
        values = values.expand(h_S.shape[:-1])
    _check_per_token(name, values, hidden)
    values = values.detach().float()
    if weights is not None:
        values = torch.where(weights != 0, values, 0)
    # A copy: a tensor made in inference mode could not be saved for backward.
    values = values.reshape(-1).clone()
    if is_readable(values) and not values.isfinite().all():
        raise ValueError(f"{name} must be finite, and that of some token is not")
    return values


def check_targets(
    targets: Tensor | None, hidden: Hidden, V: int | Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check ids of sampled tokens.

    Returns:
        The ids [N] int32, clamped to the vocabulary; and bool [...], False where a token that is
        not dropped had an id outside of it.
    """
    _check_integers("targets", targets)
    assert isinstance(targets, Tensor)
    _check_per_token("targets", targets, hidden)
    targets = targets.long()  # V may not fit the dtype of the targets
    valid = (targets >= 0) & (targets < V)
    if weights is not None:
        valid = valid | (weights == 0)
    if is_readable(targets) and not valid.all():
        raise ValueError(
            f"targets must lie in [0, {int(V)}), the vocabulary, for every token whose weight is "
            "not 0"
        )
    within = targets.clamp(min=0)
    within = within.clamp(max=V - 1) if isinstance(V, int) else within.minimum(V - 1)
    return within.reshape(-1).int(), valid


# The ids that a token may have.
MOST_IDS = 512


def check_ids(name: str, ids: Tensor, hidden: Hidden, V: int | Tensor) -> Tensor:
    """Check the ids of K tokens for each, and return them [N, K] int32; −1 for one that is not in
    the vocabulary."""
    _check_integers(name, ids)
    name_S, h_S = _student_of(hidden)
    if ids.shape[:-1] != h_S.shape[:-1] or ids.ndim != h_S.ndim:
        raise ValueError(
            f"{name} must be [..., K] with the leading shape {list(h_S.shape[:-1])} of {name_S}, "
            f"got {list(ids.shape)}"
        )
    K = ids.shape[-1]
    if not 1 <= K <= MOST_IDS:
        raise ValueError(f"{name} [..., K] must have 1 to {MOST_IDS} ids a token, got K = {K}")
    if ids.device != h_S.device:
        raise ValueError(f"{name} is on {ids.device}, {name_S} on {h_S.device}")
    ids = ids.detach().reshape(-1, K).long()  # V may not fit the dtype of the ids
    return ids.masked_fill((ids < 0) | (ids >= V), -1).int()


def _check_integers(name: str, ids: Tensor | None) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(ids).__name__}")
    if ids.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {ids.layout}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, the ids of tokens, got {ids.dtype}")


def _check_per_token(name: str, t: Tensor, hidden: Hidden) -> None:
    name_S, h_S = _student_of(hidden)
    leading = h_S.shape[:-1]
    if t.shape != leading:
        raise ValueError(
            f"{name} must have the leading shape {list(leading)} of {name_S}, got {list(t.shape)}"
        )
    if t.device != h_S.device:
        raise ValueError(f"{name} is on {t.device}, {name_S} on {h_S.device}")


def _student_of(hidden: Hidden) -> tuple[str, Tensor]:
    """The student's hidden states, after the name of their argument."""
    return next(iter(hidden.items()))


def is_readable(t: Tensor) -> bool:
    """Whether the contents of t can be read without waiting for a device."""
    compiling = torch.compiler.is_compiling() or isinstance(t, FakeTensor)
    return t.device.type == "cpu" and not compiling


def check_workspace(workspace_mib: float | None, device: torch.device) -> float:
    """Check the size of the workspace and return it in bytes."""
    if workspace_mib is None:
        return default_workspace_mib(device) * MIB
    workspace_mib = number("workspace_mib", workspace_mib)
    if not 0 <= workspace_mib < math.inf:
        raise ValueError(f"workspace_mib must be finite and not negative, got {workspace_mib}")
    if workspace_mib == 0 and not kernels.available(device):
        raise ValueError(
            f"workspace_mib=0 keeps logits in the registers of a GPU; the tensors are on {device}. "
            "On a CPU it runs under TRITON_INTERPRET=1 only, for tests: leave workspace_mib out, "
            "or give what may be used"
        )
    return workspace_mib * MIB
