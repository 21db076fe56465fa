"""Runs: the life of one, from its world and its folder to its summary.

The loop and its checkpoints, the folder, failures and what is said on the console: whatever knows
about files, signals or a terminal lives here. What a step does is in opsd/; which worlds there are
is in worlds.py.
"""

from opsd_train.run.console import be_quiet, fail, progress_bar, say
from opsd_train.run.folder import RunFolder
from opsd_train.run.held_out import Evaluate, held_out_metrics
from opsd_train.run.life import run_in
from opsd_train.run.setup import check_distribution, set_up
from opsd_train.run.trackers import check_tracker
from opsd_train.run.world import Materials, World

__all__ = [
    "Evaluate",
    "Materials",
    "RunFolder",
    "World",
    "be_quiet",
    "check_distribution",
    "check_tracker",
    "fail",
    "held_out_metrics",
    "progress_bar",
    "run_in",
    "say",
    "set_up",
]
