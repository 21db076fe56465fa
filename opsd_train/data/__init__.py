"""Data: problems with reference solutions, and the two prompts that each of them becomes.

From a file, a data set on the hub or a row to a `Problem`, and from a problem to the token ids that
student and teacher see; and those that are held out, with their answers. What is sampled after a
prompt is in sampling/.
"""

from opsd_train.data.problems import AnsweredSet as AnsweredSet
from opsd_train.data.problems import hold_out as hold_out
from opsd_train.data.problems import last_boxed as last_boxed
from opsd_train.data.problems import load_answered_problems as load_answered_problems
from opsd_train.data.problems import load_problems as load_problems
from opsd_train.data.problems import those_that_fit as those_that_fit
from opsd_train.data.prompts import Context as Context
from opsd_train.data.prompts import Contexts as Contexts
from opsd_train.data.prompts import fill as fill
from opsd_train.data.prompts import join as join
from opsd_train.data.prompts import left_pad as left_pad
from opsd_train.data.prompts import pack as pack
