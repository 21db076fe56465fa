"""LM heads as a loss takes them: whole, wherever they are sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from opsd_kernels.head import LMHead
from opsd_kernels.head_of_model import head_of_model
from opsd_kernels.vocabulary_parallel import is_dtensor


@contextmanager
def heads_of_models(student: Any, teacher: Any) -> Iterator[tuple[LMHead, LMHead | None]]:
    """The student's head, and the teacher's if it is another; whole for as long as this lasts.

    All rows count, as in the logits of the models. Every process must enter at the same time.
    """
    module, module_T = student.get_output_embeddings(), teacher.get_output_embeddings()
    with gathered(module.weight, module.bias, module_T.weight, module_T.bias):
        W = head_of(student)._replace(vocab_size=None)
        if module_T is module:
            yield W, None
        else:
            yield W, head_of(teacher).detach()._replace(vocab_size=None)


@contextmanager
def gathered(weight: Any, bias: Any, weight_T: Any, bias_T: Any) -> Iterator[None]:
    """With parameters that ZeRO-3 has partitioned made whole, the teacher's by its own engine."""
    with maybe_gather_lm_head_ctx(weight, bias), maybe_gather_lm_head_ctx(weight_T, bias_T):
        yield


def head_of(model: Any) -> LMHead:
    """The head of a model, whole."""
    return LMHead(*head_of_model(model, whole))


def whole(t: Tensor) -> Tensor:
    """A parameter of a head, all of it and for backward too; a gradient finds its way back.

    FSDP2's are gathered; their gradients are averaged over the mesh, as FSDP2 averages others.
    """
    if is_dtensor(t):
        from torch.distributed.tensor import Partial

        mesh = t.device_mesh  # type: ignore[attr-defined]
        full = t.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # type: ignore[attr-defined]
        if full.requires_grad:
            full.register_hook(lambda gradient: gradient / mesh.size())
        return full
    if hasattr(t, "ds_id") and t.requires_grad and torch.is_grad_enabled():
        # ZeRO-3 takes back what it gathered for forward, and backward reads it once more.
        return t.clone()
    return t


def in_one_dtype(
    h_S: Tensor, W: LMHead, h_T: Tensor, W_T: LMHead | None
) -> tuple[Tensor, LMHead, Tensor, LMHead | None]:
    """Heads in the dtype of their hidden states, and both sides in the wider dtype of the two.
    Under autocast the loss sees to it."""
    if torch.is_autocast_enabled(h_S.device.type):
        return h_S, W, h_T, W_T
    dtype = torch.promote_types(h_S.dtype, h_T.dtype)
    if W_T is None and h_T.dtype != h_S.dtype:
        W_T = W.detach()
    if W_T is not None:
        W_T = _to(_to(W_T, h_T.dtype), dtype)
    return h_S.to(dtype), _to(_to(W, h_S.dtype), dtype), h_T.to(dtype), W_T


def _to(W: LMHead, dtype: torch.dtype) -> LMHead:
    bias = None if W.bias is None else W.bias.to(dtype)
    return W._replace(weight=W.weight.to(dtype), bias=bias)


def why_no_head(model: Any) -> str | None:
    """Why the loss cannot take a model's head, if it cannot; told without gathering it."""
    try:
        dtype = head_of_model(model, _stand_in)[0].dtype
    except (TypeError, ValueError) as error:
        return str(error)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the LM head is {dtype}"
    return None


def _stand_in(t: Tensor) -> Tensor:
    """What has the shape of the whole parameter, and takes no memory."""
    shape = getattr(t, "ds_shape", t.shape)
    return t if t.is_meta else torch.empty((), dtype=t.dtype).expand(shape)
