"""Sampling: from prompts to rollouts, by one of several engines.

An engine is whatever has the `sample` of `Sampler`; each has a file here, and its name in
engines.py. server.py and servers.py speak to vLLM, whatever it is asked. Nothing here knows what
rollouts are for: scoring them is in opsd/, grading in grading/.
"""

from opsd_train.sampling.engines import Ahead, make_sampler
from opsd_train.sampling.generate import GenerateSampler
from opsd_train.sampling.sampler import (
    BackgroundSampler,
    Sampler,
    Sampling,
    as_rollout,
    draw_seed,
    roll_out,
    sampling_of,
)
from opsd_train.sampling.server import Refused, VllmServer
from opsd_train.sampling.servers import Batch, Fleet
from opsd_train.sampling.vllm import in_main_process, result_of, served_model

__all__ = [
    "Ahead",
    "BackgroundSampler",
    "Batch",
    "Fleet",
    "GenerateSampler",
    "Refused",
    "Sampler",
    "Sampling",
    "VllmServer",
    "as_rollout",
    "draw_seed",
    "in_main_process",
    "make_sampler",
    "result_of",
    "roll_out",
    "sampling_of",
    "served_model",
]
