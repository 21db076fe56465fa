"""The former name of `opsd_train.grading`, for programs that import it."""

import sys
from importlib import import_module

sys.modules[__name__] = import_module("opsd_train.grading")
