"""GKD and OPSD in ms-swift, with the loss computed from hidden states.

    swift rlhf --rlhf_type gkd --external_plugins examples/ms_swift_gkd.py ...

One option more, and nothing else changes: `beta`, `temperature`, a teacher model or the model
itself with `teacher_prompt` in its rows, full fine-tuning or an adapter, and the mean over a
micro-batch's tokens. Where no full distribution of a model at hand is compared, ms-swift goes on as
before: top-k (`gkd_logits_topk`), a teacher on a server, `sft_alpha`, sequence parallelism, Liger,
a teacher with another number of logits. Tested with ms-swift 4.6.0 on a CPU.
"""

from contextlib import nullcontext
from typing import Any

import torch
from swift.rlhf_trainers.gkd_trainer import GKDTrainer
from swift.trainers import disable_gradient_checkpointing
from torch import Tensor

from opsd_kernels import LMHead, fused_jsd_loss

their_compute_loss = GKDTrainer.compute_loss


def compute_loss(
    self: Any,
    model: Any,
    inputs: dict[str, Any],
    return_outputs: bool = False,
    num_items_in_batch: Any = None,
) -> Any:
    """For `GKDTrainer.compute_loss`. There are no outputs to return beside the loss."""
    if not compares_distributions(self):
        return their_compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
    student, args = self.accelerator.unwrap_model(model), self.args
    if self._is_self_distillation:
        teacher_model, teacher = model, student
        context = student.disable_adapter() if self._teacher_use_disable_adapter else nullcontext()
    else:
        teacher_model, teacher = (
            self.teacher_model,
            self.accelerator.unwrap_model(self.teacher_model),
        )
        context = self.load_teacher_model_context() if args.offload_teacher_model else nullcontext()

    h_S = hidden_states(model, student, inputs["model_inputs"])
    without_checkpoints = disable_gradient_checkpointing(
        teacher_model, args.gradient_checkpointing_kwargs
    )
    with torch.no_grad(), context, without_checkpoints:
        h_T = hidden_states(teacher_model, teacher, inputs["teacher_model_inputs"])
        # A teacher that is offloaded afterwards leaves its head here.
        head_T = None if teacher is student else LMHead.of(base_model(teacher)).detach()
    head_S = LMHead.of(base_model(student))
    loss = fused_jsd_loss(
        h_S, h_T, head_S, beta=self.beta, temperature=self.temperature, W_teacher=head_T
    )
    return (loss, None) if return_outputs else loss


def compares_distributions(self: Any) -> bool:
    """Whether both sides are models at hand, with one vocabulary, and the loss is nothing more."""
    if self.use_teacher_api or self.gkd_logits_topk is not None or self.args.sft_alpha > 0:
        return False
    if self.use_liger_gkd_loss or self.template.sequence_parallel_size > 1:
        return False
    models = [self.model, self.model if self._is_self_distillation else self.teacher_model]
    rows = [
        self.accelerator.unwrap_model(m).get_output_embeddings().weight.shape[0] for m in models
    ]
    return rows[0] == rows[1]


def base_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def hidden_states(model: Any, unwrapped: Any, inputs: dict[str, Any]) -> Tensor:
    """[N, D] last hidden states of the positions that predict the N tokens with a label.

    The model is called as it is wrapped; a hook keeps what its decoder returns.
    """
    kept: list[Any] = []
    decoder = base_model(unwrapped).get_decoder()
    others = {name: value for name, value in inputs.items() if name != "labels"}
    with decoder.register_forward_hook(lambda module, args, output: kept.append(output)):
        model(**others, logits_to_keep=1)
    return kept[0].last_hidden_state[:, :-1][inputs["labels"][:, 1:] != -100]


GKDTrainer.compute_loss = compute_loss
