"""Sampling: from prompts to rollouts, by one of several engines.

An engine is a `Sampler`; each has a file here, and its name in `make_sampler` and in the config's
`engine`. server.py and servers.py speak to vLLM, whatever it is asked. Nothing here knows what
rollouts are for: scoring them is in opsd/, grading in grading/.
"""

import torch
from accelerate import Accelerator
from peft import PeftModelForCausalLM
from transformers import PreTrainedTokenizerBase

from opsd_train.config import Config
from opsd_train.models import Student
from opsd_train.sampling.generate import GenerateSampler
from opsd_train.sampling.sampler import (
    Ahead,
    Sampler,
    Sampling,
    as_rollout,
    draw_seed,
    roll_out,
    sampling_of,
)
from opsd_train.sampling.server import Refused, VllmServer
from opsd_train.sampling.servers import Batch, Fleet
from opsd_train.sampling.vllm import VllmSampler, in_main_process, result_of, served_model


def make_sampler(
    config: Config,
    accelerator: Accelerator,
    student: Student,
    backbone: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
) -> Sampler:
    """The engine that the config asks for.

    Raises:
        ValueError: it cannot sample from this model, or is not there.
    """
    if config.engine == "generate":
        return GenerateSampler(student, tokenizer, sampling, config.rollout_batch_size, backbone)
    assert isinstance(student, PeftModelForCausalLM)  # as the config makes sure
    return VllmSampler(config, accelerator, student, backbone, tokenizer, sampling)
