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
from opsd_train.sampling.generate import GenerateSampler as GenerateSampler
from opsd_train.sampling.sampler import Ahead as Ahead
from opsd_train.sampling.sampler import Sampler as Sampler
from opsd_train.sampling.sampler import Sampling as Sampling
from opsd_train.sampling.sampler import as_rollout as as_rollout
from opsd_train.sampling.sampler import draw_seed as draw_seed
from opsd_train.sampling.sampler import roll_out as roll_out
from opsd_train.sampling.sampler import sampling_of as sampling_of
from opsd_train.sampling.server import Refused as Refused
from opsd_train.sampling.server import VllmServer as VllmServer
from opsd_train.sampling.servers import Batch as Batch
from opsd_train.sampling.servers import Fleet as Fleet
from opsd_train.sampling.vllm import VllmSampler as VllmSampler
from opsd_train.sampling.vllm import in_main_process as in_main_process
from opsd_train.sampling.vllm import result_of as result_of
from opsd_train.sampling.vllm import served_model as served_model


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
