"""Data: problems with reference solutions, and the two prompts that each of them becomes.

From a file, a data set on the hub or a row to a `Problem`, and from a problem to the token ids that
student and teacher see. What is sampled after a prompt is in sampling/.
"""

from opsd_train.data.problems import load_problems, those_that_fit
from opsd_train.data.prompts import Context, Contexts, fill, join, left_pad, pack

__all__ = [
    "Context",
    "Contexts",
    "fill",
    "join",
    "left_pad",
    "load_problems",
    "pack",
    "those_that_fit",
]
