"""GKD and OPSD in ms-swift, with the loss computed from hidden states.

    swift rlhf --rlhf_type gkd --external_plugins examples/ms_swift_gkd.py ...

One option more, and nothing else changes. The teacher is another model, the model itself with a
`teacher_prompt` in its rows, or a server. Both sides are compared over the whole vocabulary, or on
the teacher's likeliest tokens (`gkd_logits_topk`). Where `why_theirs` gives a reason, ms-swift
computes its own loss, and a warning says so. Tested with ms-swift 4.6.0 on a CPU: docs/ms_swift.md.
"""

from contextlib import nullcontext
from typing import Any

import torch
from swift.rlhf_trainers.gkd_trainer import GKDTrainer
from swift.trainers import disable_gradient_checkpointing
from swift.utils import get_logger
from torch import Tensor

from opsd_kernels import LMHead, fused_jsd_loss, fused_top_k, fused_top_k_loss

logger = get_logger()
their_compute_loss = GKDTrainer.compute_loss


def compute_loss(
    self: Any,
    model: Any,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    """For `GKDTrainer.compute_loss`: the mean over the micro-batch's tokens."""
    reason = "the model's outputs are asked for" if return_outputs else why_theirs(self)
    if reason is not None:
        logger.warning_once(f"opsd_kernels: ms-swift computes its own GKD loss: {reason}")
        return their_compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
    logger.info_once("opsd_kernels: the GKD loss is computed from hidden states")
    student = self.accelerator.unwrap_model(model)
    h_S, head_S = hidden_states(model, student, inputs["model_inputs"]), head_of(student)
    options = {"beta": self.beta, "temperature": self.temperature}
    with self.accelerator.autocast():
        if not self.use_teacher_api and self.gkd_logits_topk is None:
            h_T, head_T = of_teacher(self, model, inputs["teacher_model_inputs"])
            W_teacher = None if self._is_self_distillation else head_T  # None: the student's
            return fused_jsd_loss(h_S, h_T, head_S, W_teacher=W_teacher, **options)
        ids, log_q = top_k_of_teacher(self, model, inputs)
        return fused_top_k_loss(
            h_S,
            head_S,
            ids,
            log_q / self.temperature,  # log q is that of temperature 1
            outside="renormalize",
            token_weights=(log_q != -torch.inf).any(-1),
            **options,
        )


def why_theirs(self: Any) -> str | None:
    """Why a trainer's loss stays ms-swift's; None if it is ours."""
    if self.args.sft_alpha > 0:
        return "sft_alpha adds a loss of its own"
    if self.use_liger_gkd_loss:
        return "use_liger_kernel chooses Liger's loss"
    if self.template.sequence_parallel_size > 1:
        return "processes share a sequence"
    if (self.gkd_logits_topk or 0) > 512:
        return "gkd_logits_topk is above 512"
    has_other_teacher = self.teacher_model is not None
    models = [self.model, self.teacher_model] if has_other_teacher else [self.model]
    try:
        heads = [head_of(self.accelerator.unwrap_model(model)).weight for model in models]
    except (TypeError, ValueError) as error:
        return str(error)
    sizes = [len(weight) for weight in heads]
    if self.gkd_logits_topk is None and len(set(sizes)) > 1:
        return f"the LM heads have {sizes} rows"
    return None


def of_teacher(self: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, LMHead]:
    """The teacher's hidden states and its head, both constants."""
    teacher_model, context = model, nullcontext()
    if not self._is_self_distillation:
        teacher_model = self.teacher_model
        if self.args.offload_teacher_model:
            context = self.load_teacher_model_context()
    elif self._teacher_use_disable_adapter:
        context = self.accelerator.unwrap_model(model).disable_adapter()
    teacher = self.accelerator.unwrap_model(teacher_model)
    without_checkpoints = disable_gradient_checkpointing(
        teacher_model, self.args.gradient_checkpointing_kwargs
    )
    with torch.no_grad(), context, without_checkpoints:
        # A teacher that is offloaded afterwards leaves its head here.
        return hidden_states(teacher_model, teacher, inputs), head_of(teacher).detach()


def top_k_of_teacher(self: Any, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Ids and log q [N, K] of the teacher's likeliest tokens, as a server sent them, or found."""
    of_inputs = inputs["teacher_model_inputs"]
    if not self.use_teacher_api:
        found = fused_top_k(*of_teacher(self, model, of_inputs), self.gkd_logits_topk)
        return found.ids, found.log_probs
    at, sent = predicting(of_inputs["labels"]), inputs["gkd_batch"]
    return sent.teacher_topk_indices[at], sent.teacher_topk_logprobs[at]


def head_of(model: Any) -> LMHead:
    """A model's LM head. Its padded rows count, as in the logits that ms-swift compares."""
    return LMHead.of(model)._replace(vocab_size=None)


def predicting(labels: Tensor) -> Tensor:
    """[B, L] bool, the positions that predict a token with a label."""
    return labels.roll(-1, dims=1) != -100


def hidden_states(model: Any, unwrapped: Any, inputs: dict[str, Any]) -> Tensor:
    """[N, D] last hidden states of the positions that predict the N tokens with a label.

    The model is called as it is wrapped; a hook keeps what its decoder returns.
    """
    kept: list[Any] = []
    base = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
    others = {name: value for name, value in inputs.items() if name != "labels"}
    with base.get_decoder().register_forward_hook(lambda *call: kept.append(call[-1])):
        model(**others, logits_to_keep=1)
    return kept[0].last_hidden_state[predicting(inputs["labels"])]


GKDTrainer.compute_loss = compute_loss
