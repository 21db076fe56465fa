import os

import numpy as np
import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter, which must be known before the first
# of them is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from schedules import SCHEDULES, Schedule

if os.environ.get("TRITON_INTERPRET") == "1":
    # A GPU's minimum and maximum take the other operand where one is NaN; numpy's do not.
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)

# The same examples on every machine: what CI sees is what a contributor sees.
settings.register_profile("opsd", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("opsd")

# The tensors are small, and on a busy machine threads that wait for each other are far slower than
# one; pytest-xdist uses the cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=SCHEDULES, ids=str)
def op(request: pytest.FixtureRequest) -> Schedule:
    """`fused_jsd_loss` in each schedule, and on each device, that this machine can run."""
    return request.param
