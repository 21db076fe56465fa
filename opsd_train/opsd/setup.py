"""What a step is taken with."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from peft import PeftModelForCausalLM
from transformers import PreTrainedTokenizerBase

from opsd_kernels import LMHead
from opsd_train.data import Contexts
from opsd_train.opsd.teachers import Teacher
from opsd_train.records import Problem
from opsd_train.sampling import Ahead, Sampler


@dataclass(frozen=True)
class Setup:
    """What a step is taken with: student, teacher, problems and prompts, and the processes that
    share the work."""

    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    contexts: Contexts
    problems: list[Problem]
    model: PeftModelForCausalLM  # the student, to sample from
    backbone: torch.nn.Module  # the student, to score with: a `Backbone`, wrapped if distributed
    head: LMHead  # the student's, frozen
    teacher: Teacher
    sampler: Sampler
    ahead: Ahead | None = None  # samples for the next step; None where each step samples its own
