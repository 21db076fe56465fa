"""LM heads made whole for a loss, whatever shards them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..heads.head import LMHead
from ..heads.head_of_model import head_of_model, stand_in
from ..heads.vocabulary_parallel import is_dtensor


@contextmanager
def heads_of_models(student: Any, teacher: Any) -> Iterator[tuple[LMHead, LMHead | None]]:
    """The student's head, and the teacher's, or None if it is the same. They are whole inside the
    `with` only.

    Padded rows count, as in the logits of the models. All processes must enter at the same time.
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
    """Make parameters whole that ZeRO-3 has partitioned, each side's by the engine that has it."""
    with maybe_gather_lm_head_ctx(weight, bias), maybe_gather_lm_head_ctx(weight_T, bias_T):
        yield


def head_of(model: Any) -> LMHead:
    """The head of a model, made whole."""
    return LMHead(*head_of_model(model, whole))


def whole(t: Tensor) -> Tensor:
    """The whole of a parameter of a head, valid in backward too. Gradients flow to the parameter.

    A parameter of FSDP2 is gathered, and its gradient averaged over the mesh, as FSDP2 averages
    others.
    """
    if is_dtensor(t):
        from torch.distributed.tensor import Partial

        mesh = t.device_mesh  # type: ignore[attr-defined]
        full = t.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # type: ignore[attr-defined]
        if full.requires_grad:
            full.register_hook(lambda gradient: gradient / mesh.size())
        return full
    if hasattr(t, "ds_id") and t.requires_grad and torch.is_grad_enabled():
        # ZeRO-3 frees what it gathered for forward, and backward reads it again.
        return t.clone()
    return t


def in_one_dtype(
    h_S: Tensor, W: LMHead, h_T: Tensor, W_T: LMHead | None
) -> tuple[Tensor, LMHead, Tensor, LMHead | None]:
    """Each head in the dtype of its hidden states, then both sides in the wider dtype of the two.
    Under autocast nothing changes, since the loss casts."""
    if torch.is_autocast_enabled(h_S.device.type):
        return h_S, W, h_T, W_T
    dtype = torch.promote_types(h_S.dtype, h_T.dtype)
    if W_T is None and h_T.dtype != h_S.dtype:
        W_T = W.detach()
    if W_T is not None:
        W_T = _to(in_dtype_of(h_T, W_T), dtype)
    return h_S.to(dtype), _to(in_dtype_of(h_S, W), dtype), h_T.to(dtype), W_T


def in_dtype_of(h: Tensor, W: LMHead) -> LMHead:
    """A head in the dtype of its hidden states; under autocast as it is, since the loss casts."""
    return W if torch.is_autocast_enabled(h.device.type) else _to(W, h.dtype)


def _to(W: LMHead, dtype: torch.dtype) -> LMHead:
    bias = None if W.bias is None else W.bias.to(dtype)
    return W._replace(weight=W.weight.to(dtype), bias=bias)


def why_no_head(model: Any) -> str | None:
    """Why the loss cannot take the head of a model, found without gathering it; None if it can."""
    try:
        dtype = head_of_model(model, stand_in)[0].dtype
    except (TypeError, ValueError) as error:
        return str(error)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the LM head is {dtype}"
    return None
