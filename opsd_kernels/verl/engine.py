"""What verl's FSDP engine asks of a model's forward for a micro-batch, and what it makes of it."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from verl.trainer.distillation.fsdp.losses import kl_divergence
from verl.utils.tensordict_utils import get_non_tensor_data
from verl.utils.ulysses import slice_input_tensor
from verl.workers.engine.fsdp.transformer_impl import (
    FSDPEngineWithLMHead,
    FSDPEngineWithValueHead,
)

from ..adapting.patches import Hook, is_ours
from .forward import Output, Wanted
from .route import took

MODULE = "verl.workers.engine.fsdp.transformer_impl"
ENGINE = "FSDPEngineWithLMHead"
# `fused_log_probs` takes 512 tokens at a position, and one of them is the sampled one.
MOST_TOKENS = 511
KEY = "opsd_kernels"  # of what is wanted, among the engine's arguments


def _prepare_model_inputs(theirs: Callable[..., Any], _: Any) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def prepare_model_inputs(self: Any, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        model_inputs, output_args = theirs(self, micro_batch)
        if isinstance(self, FSDPEngineWithValueHead):  # a critic has no LM head
            return model_inputs, output_args
        wanted = wanted_of(self, micro_batch)
        reason = why_theirs(self, micro_batch, wanted)
        if reason is None:
            model_inputs[KEY] = output_args[KEY] = wanted
        else:
            took(self, wanted.losses, reason)
        return model_inputs, output_args

    return prepare_model_inputs


def _prepare_model_outputs(theirs: Callable[..., Any], _: Any) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def prepare_model_outputs(
        self: Any,
        output: Any,
        output_args: dict[str, Any],
        micro_batch: Any,
        logits_processor_func: Any,
    ) -> dict[str, Any]:
        made = theirs(self, output, output_args, micro_batch, logits_processor_func)
        wanted: Wanted | None = output_args.get(KEY)
        if wanted is None:
            return made
        given = getattr(logits_processor_func, "keywords", {})
        if wanted.ids is not None and "distillation_config" not in given:
            wanted.reason = "the loss function is not verl's distillation_ppo_loss"
        took(self, wanted.losses, wanted.reason)
        if wanted.reason is None and wanted.ids is not None:
            clamp = given["distillation_config"].distillation_loss.log_prob_min_clamp
            offsets = micro_batch["input_ids"].offsets()
            for name, value in of_top_k(output, wanted, clamp).items():
                packed = self._gather_and_unpad_packed(value.squeeze(0), output_args["pad_size"])
                made[name] = torch.nested.nested_tensor_from_jagged(packed, offsets)
        return made

    return prepare_model_outputs


def wanted_of(engine: Any, micro_batch: Any) -> Wanted:
    """What the engine makes of a micro-batch: log-probabilities, entropies, a top-k loss."""

    def is_asked(key: str) -> bool:
        return bool(get_non_tensor_data(data=micro_batch, key=key, default=False))

    ids = log_q = None
    if is_asked("distillation_use_topk"):
        ids, log_q = (
            micro_batch[key].values().unsqueeze(0) for key in ("teacher_ids", "teacher_logprobs")
        )
        if engine.use_ulysses_sp:
            ids, log_q = (slice_input_tensor(t, dim=1) for t in (ids, log_q))
    return Wanted(not is_asked("distillation_only"), is_asked("calculate_entropy"), ids, log_q)


def why_theirs(engine: Any, micro_batch: Any, wanted: Wanted) -> str | None:
    """Why a micro-batch needs verl's own forward; None if it does not."""
    if reason := why_overridden(type(engine)):
        return reason
    if not get_non_tensor_data(data=micro_batch, key="use_fused_kernels", default=False):
        return "model.use_fused_kernels is False"
    if not get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True):
        return "model.use_remove_padding is False"
    if wanted.ids is not None and wanted.ids.shape[-1] > MOST_TOKENS:
        return f"{wanted.ids.shape[-1]} tokens at a position are above {MOST_TOKENS}"
    model = causal_lm(engine.module)
    forward = type(model).forward
    if is_ours(forward):
        return None
    module = str(getattr(forward, "__module__", ""))
    if module == "verl.models.transformers.dense_common":
        return f"the {type(model).__name__} was built before opsd_kernels.verl was imported"
    if module.startswith("verl."):
        return f"a {type(model).__name__} has a fused forward of its own in verl ({module})"
    return 'model.fused_kernel_options.impl_backend is not "torch", "triton" or "liger"'


def why_overridden(kind: type) -> str | None:
    """Why an engine of this class computes all by itself; None if it does not."""
    for name in ("prepare_model_inputs", "prepare_model_outputs", "_build_fsdp_module"):
        if getattr(kind, name, None) is not getattr(FSDPEngineWithLMHead, name):
            return f"opsd_kernels does not know the {name} of this engine"
    return None


def causal_lm(module: Any) -> Any:
    """The model of transformers in the wrappers of FSDP1 and of an adapter. FSDP2 has none."""
    module = getattr(module, "_fsdp_wrapped_module", module)
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def of_top_k(output: Output, wanted: Wanted, clamp: float | None) -> dict[str, Tensor]:
    """What verl's `compute_forward_kl_topk` makes of logits, from the log-probabilities of the
    teacher's tokens: the loss, both masses and the overlap of both sides' tokens, [1, N] each.

    Args:
        clamp: the least log-probability of either side in the loss; None for none.
    """
    log_p, log_q, ids = output.top_k_log_probs, wanted.log_q, wanted.ids
    assert log_p is not None
    assert log_q is not None
    assert ids is not None
    assert output.top_k_ids is not None
    mass_student, mass_teacher = log_p.exp().sum(-1), log_q.exp().sum(-1)
    if clamp is not None:
        log_p, log_q = log_p.clamp_min(clamp), log_q.clamp_min(clamp)
    shared = is_among(ids, output.top_k_ids)
    count = shared.sum(-1)
    advantage = (log_q.exp() * (log_p - log_q)).where(shared, 0).sum(-1)
    return {
        "distillation_losses": kl_divergence(log_q=log_p, log_p=log_q),
        "student_mass": mass_student,
        "teacher_mass": mass_teacher,
        "overlap_count": count,
        "overlap_token_advantage": advantage / count.clamp_min(1),
    }


def is_among(ids: Tensor, others: Tensor) -> Tensor:
    """Whether each of the ids [..., K] is one of the others [..., K] of its token."""
    others = others.sort(-1).values
    at = torch.searchsorted(others, ids.to(others.dtype)).clamp(max=others.shape[-1] - 1)
    return others.gather(-1, at) == ids


HOOKS = (
    Hook(
        ENGINE,
        MODULE,
        f"{ENGINE}.prepare_model_inputs",
        _prepare_model_inputs,
        {
            f"{ENGINE}.prepare_model_inputs": "self, micro_batch",
            "verl.utils.ulysses:slice_input_tensor": "x, dim, padding, group",
        },
    ),
    Hook(
        ENGINE,
        MODULE,
        f"{ENGINE}.prepare_model_outputs",
        _prepare_model_outputs,
        {
            f"{ENGINE}.prepare_model_outputs": (
                "self, output, output_args, micro_batch, logits_processor_func"
            ),
            "FSDPEngine._gather_and_unpad_packed": "self, tensor, pad_size",
            "verl.trainer.distillation.losses:distillation_ppo_loss": (
                "config, distillation_config, model_output, data, dp_group, student_logits, "
                "data_format"
            ),
            "verl.trainer.distillation.fsdp.losses:compute_forward_kl_topk": (
                "student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format"
            ),
            "verl.trainer.distillation.fsdp.losses:kl_divergence": "log_q, log_p",
        },
    ),
)
