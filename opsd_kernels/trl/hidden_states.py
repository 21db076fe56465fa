"""Hidden states and heads of a trainer's models, however they are wrapped.

A loss that reads the head's weight must run inside the forward of what the model is wrapped in:
that is where DDP learns that a backward follows, and where FSDP and ZeRO-3 have the parameters
whole. TRL's `_ForwardRedirection` takes a function there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from opsd_kernels.checks import is_dtensor
from opsd_kernels.head import LMHead
from opsd_kernels.head_of_model import head_of_model

T = TypeVar("T")


def inside(trainer: Any, model: Any, function: Callable[..., T], *args: Any) -> T:
    """function(unwrapped model, *args) within the forward of a model's wrapper, and under the
    autocast that the wrapper would put on the model's own forward."""
    from trl.models.utils import _ForwardRedirection

    unwrapped = trainer.accelerator.unwrap_model(model)

    def under_autocast(*given: Any) -> T:
        with trainer.accelerator.autocast():
            return function(*given)

    return _ForwardRedirection()(model, unwrapped, under_autocast, unwrapped, *args)


def hidden_states(model: Any, inputs: dict[str, Any], positions: slice) -> Tensor:
    """[B, T, D] what enters the head of a causal language model at some positions."""
    backbone = _own(model).base_model
    return backbone(**inputs, use_cache=False).last_hidden_state[:, positions]


def teacher_hidden_states(
    trainer: Any, teacher: Any, inputs: dict[str, Any], positions: slice
) -> Tensor:
    """Likewise, of a teacher, as constants."""
    with torch.no_grad():
        return inside(trainer, teacher, hidden_states, inputs, positions)


def head_of(model: Any) -> LMHead:
    """The head of a model, gathered if it is sharded. ZeRO-3 has it whole within `gathered`. Rows
    that a tokenizer does not use count, as they do in the logits that TRL compares."""
    return head_of_model(_own(model), whole)._replace(vocab_size=None)


def check_model(model: Any) -> None:
    """See whether hidden states and head tell all of a model, without gathering anything.

    Raises:
        ValueError: they do not, and why.
    """
    prompt = getattr(model, "active_peft_config", None)
    if prompt is not None and prompt.is_prompt_learning:
        raise ValueError("the prompt that PEFT learns is no input of the model's own")
    weight = head_of_model(_own(model), _stand_in).weight
    if hasattr(weight, "ds_id") and weight.requires_grad:
        raise ValueError("ZeRO-3 takes the weight of a head that is trained away before backward")


def gathered(*models: Any) -> AbstractContextManager[Any]:
    """Within it ZeRO-3 has whole heads."""
    heads = [_own(model).get_output_embeddings() for model in models]
    if not any(hasattr(head.weight, "ds_id") for head in heads):
        return nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*(p for head in heads for p in (head.weight, head.bias)))


def in_one_dtype(
    h_student: Tensor, h_teacher: Tensor, head: LMHead, head_T: LMHead
) -> tuple[Tensor, Tensor, LMHead, LMHead]:
    """Both sides in the dtype of the student's hidden states, unless autocast sees to it."""
    if torch.is_autocast_enabled(h_student.device.type):
        return h_student, h_teacher, head, head_T
    dtype = h_student.dtype
    return h_student, h_teacher.to(dtype), _cast(head, dtype), _cast(head_T, dtype)


def whole(t: Tensor) -> Tensor:
    """A weight that FSDP2 may have sharded. Each rank's gradient is that of its own tokens, of
    which FSDP makes the mean."""
    if not is_dtensor(t):
        return t
    if not t.requires_grad:
        return t.full_tensor()  # type: ignore[attr-defined]
    from torch.distributed.tensor import Partial

    placements = [Partial("avg")] * t.device_mesh.ndim  # type: ignore[attr-defined]
    return t.full_tensor(grad_placements=placements)  # type: ignore[attr-defined]


def _stand_in(t: Tensor) -> Tensor:
    """What a tensor will be like when it is whole, of no size."""
    return t.new_zeros(()).expand(t.shape) if is_dtensor(t) else t


def _cast(head: LMHead, dtype: torch.dtype) -> LMHead:
    bias = None if head.bias is None else head.bias.to(dtype)
    return head._replace(weight=head.weight.to(dtype), bias=bias)


def _own(model: Any) -> Any:
    """A model without what PEFT has put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
