"""Sampling: from prompts to rollouts, by one of several engines.

An engine is whatever has the `sample` of `Sampler`; each has a file here, and its name in
engines.py. Nothing here knows what rollouts are for: scoring them is in opsd/, grading in
grading/.
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

__all__ = [
    "Ahead",
    "BackgroundSampler",
    "GenerateSampler",
    "Sampler",
    "Sampling",
    "as_rollout",
    "draw_seed",
    "make_sampler",
    "roll_out",
    "sampling_of",
]
