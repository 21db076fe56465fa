"""Data: problems with reference solutions, and the two prompts that each of them becomes.

From a file, a data set on the hub or a row to a `Problem`, and from a problem to the token ids that
student and teacher see; and those that are held out, with their answers. What is sampled after a
prompt is in sampling/.
"""

from opsd_train.data.problems import (
    AnsweredSet,
    hold_out,
    last_boxed,
    load_answered_problems,
    load_problems,
    those_that_fit,
)
from opsd_train.data.prompts import Context, Contexts, fill, join, left_pad, pack
