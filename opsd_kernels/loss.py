"""The face of the package: arguments checked, tokens flattened, per-token losses reduced."""

import math
from numbers import Real
from typing import Literal

import torch
from torch import Tensor

from opsd_kernels import kernels
from opsd_kernels.autograd import TokenDivergence
from opsd_kernels.divergence import HUGE
from opsd_kernels.row_workspace import MIB, default_workspace_mib

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Reduction = Literal["mean", "sum", "none"]


def fused_jsd_loss(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    entry_clip: float | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "mean",
    W_teacher: Tensor | None = None,
    workspace_mib: float | None = None,
) -> Tensor:
    """Generalized Jensen-Shannon divergence between teacher and student over the full vocabulary,
    from hidden states and the LM head, without [N, V] logits.

    Per token, with p = softmax(h_student Wᵀ / T), q = softmax(h_teacher Wᵀ / T) and the mixture
    m = β q + (1 − β) p (On-Policy Self-Distillation, Zhao et al. 2026, Eq. 6):

        JSD_β = β KL(q‖m) + (1 − β) KL(p‖m)

    `beta=0` and `beta=1` name the forward KL(teacher‖student) and the reverse
    KL(student‖teacher). They are not the limits of JSD_β, which tends to 0 at both ends.

    Args:
        h_student: [..., D] student's last hidden states (what enters the LM head), bf16, fp16 or
            fp32. The gradient flows here and nowhere else.
        h_teacher: [..., D], or [..., D_T] with `W_teacher`; the teacher's, at the positions that
            predict the same tokens. Same leading shape and dtype. Treated as a constant.
        W: [V, D] LM head, frozen (detach a head that requires grad). A head padded beyond its
            vocabulary is passed as the view `W[:vocab_size]`.
        beta: in [0, 1], the teacher's weight in the mixture.
        temperature: T > 0, divides both logits. The loss carries no factor T².
        entry_clip: τ > 0: each vocabulary entry's value is min(f, τ) before the sum, and a clipped
            entry has no gradient of its own. A clipped KL can be negative.
        token_weights: [...] float, int or bool, ≥ 0; constants. 0 drops the token: its loss and
            gradient are exactly 0 even where its hidden states are NaN.
        reduction: "mean" Σ w ℓ / Σ w, "sum" Σ w ℓ, or "none" w ℓ of shape [...]. Without tokens,
            or with all weights 0, the loss and its gradient are 0.
        W_teacher: [V, D_T] the teacher's own LM head; by default `W` serves both.
        workspace_mib: MiB that all temporaries with a vocabulary-sized dimension may take together,
            whatever the number of tokens. 0, the default on a GPU, allocates none: logits exist in
            registers only, and are computed twice. 320 or so is faster on a GPU. On a CPU the
            default is 128. The result does not depend on it beyond rounding.

    Returns:
        fp32 scalar, or [...] with reduction "none". Where a KL is infinite it is +inf, with
        gradient 0.

    Under autocast the operands are rounded as `F.linear` would round them. Shapes, dtypes and
    devices are always checked; contents (signs of `token_weights`) on a CPU only, so that a GPU
    never waits for the host.

    Raises:
        TypeError: an argument of the wrong type, or of a dtype that is not supported.
        ValueError: shapes, devices or values that do not fit; the message names the argument.
    """
    beta, temperature, entry_clip = check_divergence(beta, temperature, entry_clip)
    operand_dtype = check_tensors(h_student, h_teacher, W, W_teacher, FLOAT_DTYPES)
    check_reduction(reduction)
    leading = h_student.shape[:-1]
    weights = check_weights(token_weights, leading, h_student.device)
    workspace_bytes = _workspace_bytes(workspace_mib, h_student.device)

    loss = TokenDivergence.apply(
        h_student.reshape(-1, h_student.shape[-1]),
        h_teacher.detach().reshape(-1, h_teacher.shape[-1]),
        W.detach(),
        None if W_teacher is None else W_teacher.detach(),
        None if weights is None else weights.reshape(-1) != 0,
        torch.is_grad_enabled() and h_student.requires_grad,
        operand_dtype,
        workspace_bytes,
        beta,
        temperature,
        entry_clip,
    )
    return reduce_tokens(loss.reshape(leading), weights, reduction)


def reduce_tokens(loss: Tensor, weights: Tensor | None, reduction: Reduction) -> Tensor:
    """Weigh and reduce per-token losses [...]; see `fused_jsd_loss` for what each reduction is."""
    if weights is not None:
        # Selected, not multiplied: a dropped token's loss may be anything.
        loss = torch.where(weights != 0, weights * loss, 0)
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if weights is None:
        return total / max(loss.numel(), 1)
    weight = weights.sum()
    return total / torch.where(weight > 0, weight, 1)


def check_divergence(
    beta: float, temperature: float, entry_clip: float | None
) -> tuple[float, float, float | None]:
    """Check the numbers that define the divergence and return them as floats."""
    beta = _number("beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    temperature = _number("temperature", temperature)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if entry_clip is not None:
        entry_clip = _number("entry_clip", entry_clip)
        if not 0 < entry_clip < HUGE:
            raise ValueError(
                f"entry_clip must be positive and below {HUGE:g}, or None for no clip, "
                f"got {entry_clip}"
            )
    return beta, temperature, entry_clip


def check_tensors(
    h_student: Tensor,
    h_teacher: Tensor,
    W: Tensor,
    W_teacher: Tensor | None,
    dtypes: tuple[torch.dtype, ...],
) -> torch.dtype:
    """Check hidden states and heads, and return the dtype of the matrix products' operands."""
    tensors = {"h_student": h_student, "h_teacher": h_teacher, "W": W}
    if W_teacher is not None:
        tensors["W_teacher"] = W_teacher
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {t.layout}")
        if t.dtype not in dtypes:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{name} must be one of {wanted}, got {t.dtype}")
        if t.device != h_student.device:
            raise ValueError(
                f"{name} is on {t.device}, h_student on {h_student.device}; "
                "all tensors must be on one device"
            )
    device_type = h_student.device.type
    # Devices without autocast (meta, say) raise when asked whether it is on.
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        operand_dtype = torch.get_autocast_dtype(device_type)
    else:
        operand_dtype = h_student.dtype
        for name, t in tensors.items():
            if t.dtype != operand_dtype:
                raise TypeError(
                    f"{name} is {t.dtype}, h_student {operand_dtype}; "
                    "all tensors must have one dtype (or be used under torch.autocast)"
                )

    for name, t in tensors.items():
        if not name.startswith("W"):
            if t.ndim == 0:
                raise ValueError(f"{name} must be [..., D], got a scalar")
        elif t.ndim != 2:
            raise ValueError(
                f"{name} must be [V, D], got shape {list(t.shape)}; a head sharded or flattened by "
                "FSDP or ZeRO-3 must be gathered first"
            )
        elif 0 in t.shape:
            raise ValueError(
                f"{name} must have at least one row and column, got shape {list(t.shape)}"
            )
        elif t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires grad, but the gradient reaches h_student only: "
                f"pass {name}.detach() for a frozen head"
            )
    if h_student.shape[:-1] != h_teacher.shape[:-1]:
        raise ValueError(
            "h_student and h_teacher must have the same leading shape, got "
            f"{list(h_student.shape)} and {list(h_teacher.shape)}"
        )
    head_T, W_T = ("W", W) if W_teacher is None else ("W_teacher", W_teacher)
    for name, h, head, weight in (
        ("h_student", h_student, "W", W),
        ("h_teacher", h_teacher, head_T, W_T),
    ):
        if h.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"{name} has {h.shape[-1]} features, {head} {weight.shape[1]}: "
                f"{name} {list(h.shape)} must be [..., D] for {head} [V, D] {list(weight.shape)}"
            )
    if W_T.shape[0] != W.shape[0]:
        raise ValueError(
            f"W_teacher has {W_T.shape[0]} rows, W {W.shape[0]}: "
            "student and teacher must share one vocabulary"
        )
    return operand_dtype


def check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def check_weights(
    token_weights: Tensor | None, leading: torch.Size, device: torch.device
) -> Tensor | None:
    """Check token weights and return them as fp32 constants of the leading shape."""
    if token_weights is None:
        return None
    if not isinstance(token_weights, Tensor):
        raise TypeError(f"token_weights must be a torch.Tensor, got {type(token_weights).__name__}")
    if token_weights.is_complex():
        raise TypeError(f"token_weights must be float, int or bool, got {token_weights.dtype}")
    if token_weights.shape != leading:
        raise ValueError(
            f"token_weights must have the leading shape {list(leading)} of h_student, "
            f"got {list(token_weights.shape)}"
        )
    if token_weights.device != device:
        raise ValueError(f"token_weights is on {token_weights.device}, h_student on {device}")
    weights = token_weights.detach().float()
    if device.type == "cpu" and not ((weights >= 0) & (weights < math.inf)).all():
        raise ValueError("token_weights must be finite and not negative")
    return weights


def _workspace_bytes(workspace_mib: float | None, device: torch.device) -> float:
    if workspace_mib is None:
        return default_workspace_mib(device) * MIB
    workspace_mib = _number("workspace_mib", workspace_mib)
    if not (workspace_mib >= 0 and math.isfinite(workspace_mib)):
        raise ValueError(f"workspace_mib must be finite and not negative, got {workspace_mib}")
    if workspace_mib == 0 and not kernels.available(device):
        raise ValueError(
            f"workspace_mib=0 keeps logits in the registers of a GPU; the tensors are on {device}. "
            "On a CPU it runs under TRITON_INTERPRET=1 only, for tests: leave workspace_mib out, "
            "or give what may be used"
        )
    return workspace_mib * MIB


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large: {value}") from None
