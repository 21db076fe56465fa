"""OPSD: Algorithm 1 of Zhao et al. (2026), and nothing else.

One step reads from top to bottom in step.py: the student's rollout, both sides' scores, the
objective, AdamW. Nothing here reads or writes a file or says anything: steps follow one another in
run/.
"""

from opsd_train.opsd.objective import loss_name, opsd_loss, token_weights
from opsd_train.opsd.observation import Observe, observe_tokens
from opsd_train.opsd.scoring import score, score_sequences
from opsd_train.opsd.setup import Setup
from opsd_train.opsd.step import Phase, can_pack, take_step
from opsd_train.opsd.teachers import AdapterTeacher, BaseTeacher, EmaTeacher, Teacher

__all__ = [
    "AdapterTeacher",
    "BaseTeacher",
    "EmaTeacher",
    "Observe",
    "Phase",
    "Setup",
    "Teacher",
    "can_pack",
    "loss_name",
    "observe_tokens",
    "opsd_loss",
    "score",
    "score_sequences",
    "take_step",
    "token_weights",
]
