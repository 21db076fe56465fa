"""Runs: the life of one, from its folder to its summary.

The loop and its checkpoints, the folder, failures and what is said on the console: whatever knows
about files, signals or a terminal lives here. What a step does is in opsd/.
"""

from opsd_train.run.console import be_quiet as be_quiet
from opsd_train.run.console import fail as fail
from opsd_train.run.console import progress_bar as progress_bar
from opsd_train.run.console import say as say
from opsd_train.run.fingerprint import check_base as check_base
from opsd_train.run.folder import RunFolder as RunFolder
from opsd_train.run.folder import check_tracker as check_tracker
from opsd_train.run.folder import config_of_adapter as config_of_adapter
from opsd_train.run.loop import run_training as run_training
from opsd_train.run.setup import Materials as Materials
from opsd_train.run.setup import check_distribution as check_distribution
from opsd_train.run.setup import load as load
from opsd_train.run.setup import set_up as set_up
