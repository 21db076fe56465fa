"""Who scores what the student sampled: a backbone, and the adapter that is on it meanwhile.

base            the model with its adapter off
initial         the policy that training began with: the same, or with --adapter that adapter
live            the student itself, as it is now
ema             an exponential moving average of the student's adapter
another model   with an LM head of its own, for on-policy distillation

Where all weights are trained there is no adapter to turn off: base and initial are a frozen copy.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft import PeftModelForCausalLM
from torch import Tensor

from opsd_kernels import LMHead
from opsd_train.models import adapter_weights


class Teacher:
    """A backbone as it is: another model's, or the student's own."""

    def __init__(self, backbone: torch.nn.Module, head: LMHead | None = None):
        self.backbone = backbone
        self.head = head  # its own; None where it has the student's

    def active(self) -> AbstractContextManager[None]:
        """The context in which the backbone is the teacher."""
        return nullcontext()

    def follow(self) -> None:
        """Called after each step of the student."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep of it, by name; filled in place when a run is resumed."""
        return {}


class BaseTeacher(Teacher):
    """The student's backbone without its adapter."""

    def __init__(self, backbone: torch.nn.Module, model: PeftModelForCausalLM):
        super().__init__(backbone)
        self.model = model

    def active(self) -> AbstractContextManager[None]:
        return self.model.disable_adapter()


class CopyTeacher(Teacher):
    """A frozen second copy of a backbone that is trained itself. Weights that are not trained, its
    embeddings, are those of the first. With a decay it follows as an average of the student:
    ā ← decay · ā + (1 − decay) · a after each step."""

    def __init__(self, backbone: torch.nn.Module, decay: float | None = None):
        frozen = {id(w): w for w in backbone.parameters() if not w.requires_grad}
        super().__init__(copy.deepcopy(backbone, dict(frozen)).requires_grad_(False))
        self.decay = decay
        self.student = {name: w for name, w in backbone.named_parameters() if w.requires_grad}
        copies = dict(self.backbone.named_parameters())
        self.average = {name: copies[name] for name in self.student}

    @torch.no_grad()
    def follow(self) -> None:
        if self.decay is not None:
            for name, w in self.student.items():
                self.average[name].lerp_(w, 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        return dict(self.average) if self.decay is not None else {}


class AdapterTeacher(Teacher):
    """The student's backbone with adapter weights of the teacher's own: those that the student has
    when this is made."""

    def __init__(self, backbone: torch.nn.Module, model: PeftModelForCausalLM):
        super().__init__(backbone)
        self.student = adapter_weights(model)
        self.adapter = {name: w.detach().clone() for name, w in self.student.items()}

    @contextmanager
    def active(self) -> Iterator[None]:
        live = {name: w.detach().clone() for name, w in self.student.items()}
        self._set(self.adapter)
        try:
            yield
        finally:
            self._set(live)

    @torch.no_grad()
    def _set(self, weights: dict[str, Tensor]) -> None:
        for name, w in self.student.items():
            w.copy_(weights[name])


class EmaTeacher(AdapterTeacher):
    """With the average of the student's adapter: ā ← decay · ā + (1 − decay) · a after each
    step."""

    def __init__(self, backbone: torch.nn.Module, model: PeftModelForCausalLM, decay: float):
        super().__init__(backbone, model)
        self.decay = decay

    def follow(self) -> None:
        for name, w in self.student.items():
            self.adapter[name].lerp_(w.detach(), 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        return self.adapter
