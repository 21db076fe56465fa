"""OPSD: Algorithm 1 of Zhao et al. (2026), and nothing else.

One step reads from top to bottom in step.py: the student's rollout, both sides' scores, the
objective, AdamW. Nothing here reads or writes a file or says anything: steps follow one another in
run/.
"""

from opsd_train.opsd.objective import (
    compare,
    loss_name,
    opsd_loss,
    score,
    score_sequences,
    token_weights,
)
from opsd_train.opsd.step import Observe, Setup, can_pack, take_step
from opsd_train.opsd.teachers import (
    AdapterTeacher,
    BaseTeacher,
    CopyTeacher,
    ServerTeacher,
    Teacher,
)
