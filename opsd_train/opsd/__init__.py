"""OPSD: Algorithm 1 of Zhao et al. (2026), and nothing else.

One step reads from top to bottom in step.py: the student's rollout, both sides' scores, the
objective, AdamW. Nothing here reads or writes a file or says anything: steps follow one another in
run/.
"""

from opsd_train.opsd.objective import compare as compare
from opsd_train.opsd.objective import loss_name as loss_name
from opsd_train.opsd.objective import opsd_loss as opsd_loss
from opsd_train.opsd.objective import score as score
from opsd_train.opsd.objective import score_sequences as score_sequences
from opsd_train.opsd.objective import token_weights as token_weights
from opsd_train.opsd.step import Observe as Observe
from opsd_train.opsd.step import Setup as Setup
from opsd_train.opsd.step import can_pack as can_pack
from opsd_train.opsd.step import take_step as take_step
from opsd_train.opsd.teachers import AdapterTeacher as AdapterTeacher
from opsd_train.opsd.teachers import BaseTeacher as BaseTeacher
from opsd_train.opsd.teachers import CopyTeacher as CopyTeacher
from opsd_train.opsd.teachers import ServerTeacher as ServerTeacher
from opsd_train.opsd.teachers import Teacher as Teacher
