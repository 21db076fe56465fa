"""The hidden states that enter a model's head, computed inside the forward of its wrapper.

A wrapper (DDP, FSDP2, a DeepSpeed engine) makes parameters whole, and prepares for their gradients,
in its own forward. So the wrapper is called. Inside its forward the backbone runs in place of the
model, and the loss is computed before that forward returns.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from accelerate.utils import is_compiled_module, is_peft_model
from torch import Tensor
from torch.nn.functional import pad
from trl.models.utils import _ForwardRedirection

from ..head_check import check_head, head_logits
from ..heads.head import LMHead
from .heads import heads_of_models, in_dtype_of, in_one_dtype, why_no_head

T = TypeVar("T")
Loss = Callable[[Tensor, LMHead, Tensor, LMHead | None], T]
SIGNATURES = {
    "trl.models.utils:_ForwardRedirection.__call__": (
        "self, wrapper_module, original_module, method, args, kwargs"
    ),
    "trl.trainer.utils:maybe_gather_lm_head_ctx": "params",
}


def predicting(mask: Tensor, length: int) -> Tensor:
    """The positions [B, L] bool of sequences that predict the tokens of a mask.

    Args:
        mask: [B, K] of the last K tokens; a token counts where it is not 0.
        length: L > K, of the sequences.
    """
    return pad(mask != 0, (length - 1 - mask.shape[1], 1))


def prompts_and_completions(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The `input_ids` and `attention_mask` [B, L] of the student, from those of prompts and
    completions."""
    return {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
    }


def run_backbone(
    trainer: Any, wrapped: Any, at: Tensor, then: Callable[[Tensor, Any], T], **inputs: Any
) -> T:
    """Run a model up to its head, and then `then`, inside the forward of its wrapper.

    Args:
        at: [B, L] bool, the positions that count.
        then: called with the last hidden states [n, D] at these positions and the model without its
            adapter's wrapper. Only the tensors that it returns have a backward.
        inputs: of the model's forward.

    Returns:
        What `then` returns.
    """

    def compute(**inputs: Any) -> T:
        # As accelerate does in the forward of a model that it prepared, which is not called here.
        with trainer.accelerator.autocast():
            h = causal_lm.base_model(**inputs, use_cache=False).last_hidden_state
            device = causal_lm.get_output_embeddings().weight.device
            return then(h[at.to(h.device)].to(device), causal_lm)

    model = trainer.accelerator.unwrap_model(wrapped)
    causal_lm = _causal_lm(model)
    return _ForwardRedirection()(wrapped, model, compute, **inputs)


def teacher_hidden_states(trainer: Any, teacher: Any, at: Tensor, **inputs: Any) -> Tensor:
    """The teacher's last hidden states [n, D_T] at the positions `at` [B, L], without gradient."""
    with torch.no_grad():
        return run_backbone(trainer, teacher, at, lambda h, _: h, **inputs)


def loss_of_student(
    trainer: Any, model: Any, loss: Loss[T], h_T: Tensor, teacher: Any, at: Tensor, **inputs: Any
) -> T:
    """Run the student, and compute a loss from both sides at the positions `at` [B, L].

    Args:
        loss: called with h_S, the student's head, h_T and the teacher's head, or None if it is the
            same.
        h_T: [n, D_T] from `teacher_hidden_states`, for the same tokens.
    """
    teacher = _causal_lm(trainer.accelerator.unwrap_model(teacher))

    def then(h_S: Tensor, student: Any) -> T:
        with heads_of_models(student, teacher) as (W, W_T):
            return loss(*in_one_dtype(h_S, W, h_T.to(h_S.device), W_T))

    return run_backbone(trainer, model, at, then, **inputs)


def _causal_lm(model: Any) -> Any:
    """A model without the wrapper of its adapter; the adapter's layers stay in its modules."""
    return model.base_model.model if is_peft_model(model) else model


def why_no_hidden_states(trainer: Any, *models: Any) -> str | None:
    """Why the hidden states or the head of one of the models cannot be computed inside its wrapper;
    None if they can. The same on every process."""
    if getattr(trainer.accelerator, "is_fsdp2", False) is False and trainer.is_fsdp_enabled:
        return "FSDP of version 1 flattens the LM head; version 2 does not"
    for model in models:
        if model is None:
            return "there is no teacher model"
        if isinstance(model, torch.nn.DataParallel):
            return "torch.nn.DataParallel copies the model; use a process for each GPU"
        if is_compiled_module(model):
            return "the model is compiled by torch.compile"
        unwrapped = trainer.accelerator.unwrap_model(model)
        if is_peft_model(unwrapped) and (reason := _why_wrapped(unwrapped)):
            return reason
        causal_lm = _causal_lm(unwrapped)
        if getattr(causal_lm, "base_model", causal_lm) is causal_lm:
            return f"{type(causal_lm).__name__} has no base_model without an LM head"
        if reason := why_no_head(causal_lm):
            return reason
    return None


def _why_wrapped(model: Any) -> str | None:
    """Why an adapter needs the forward of its wrapper; None if its layers do all of its work."""
    from peft import AdaLoraModel
    from peft.tuners.tuners_utils import BaseTuner

    for name in model.active_adapters:
        config = model.peft_config[name]
        if config.is_prompt_learning:
            return "an adapter that learns a prompt needs the forward of the whole model"
        if getattr(config, "alora_invocation_tokens", None) is not None:
            return "the wrapper of an activated LoRA finds in its forward where it is active"
    # AdaLoRA's forward adds a term to the model's own loss, which no trainer here asks for.
    if type(model.base_model).forward not in (BaseTuner.forward, AdaLoraModel.forward):
        return f"the adapter's wrapper, {type(model.base_model).__name__}, has a forward of its own"
    return None


def why_other_logits(
    trainer: Any, models: Iterable[Any], input_ids: Tensor, attention_mask: Tensor
) -> str | None:
    """Why a loss would compute other logits than one of the models; None if it would not. They are
    compared once for each model, on a few tokens of the first batch. The same on every process."""
    compared = vars(trainer).setdefault("_opsd_kernels_compared", {})
    for model in models:
        causal_lm = _causal_lm(trainer.accelerator.unwrap_model(model))
        if id(causal_lm) not in compared:
            compared[id(causal_lm)] = _compare(trainer, model, input_ids, attention_mask)
        if reason := compared[id(causal_lm)]:
            return str(reason)
    return None


def _compare(trainer: Any, model: Any, input_ids: Tensor, attention_mask: Tensor) -> str | None:
    def logits(h: Tensor, causal_lm: Any) -> Tensor:
        with heads_of_models(causal_lm, causal_lm) as (W, _):
            return head_logits(in_dtype_of(h, W), h)

    def make_logits(**inputs: Any) -> Tensor:
        return run_backbone(trainer, model, inputs["attention_mask"] != 0, logits, **inputs)

    reason = None
    try:
        check_head(model, make_logits, input_ids, attention_mask)
    except ValueError as error:
        reason = str(error)
    found = torch.tensor([reason is not None], device=input_ids.device)
    if trainer.accelerator.gather(found).any() and reason is None:
        reason = "on another process it would not have the model's logits"
    return reason
