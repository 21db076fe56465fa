"""Runs: the life of one, from its folder to its summary.

The loop and its checkpoints, the folder, failures and what is said on the console: whatever knows
about files, signals or a terminal lives here. What a step does is in opsd/.
"""

from opsd_train.run.console import be_quiet, fail, progress_bar, say
from opsd_train.run.fingerprint import check_base
from opsd_train.run.folder import RunFolder, check_tracker, config_of_adapter
from opsd_train.run.loop import run_training
from opsd_train.run.setup import Materials, check_distribution, load, set_up
