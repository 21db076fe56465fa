import torch
from hypothesis import settings

# The same examples on every machine: what CI sees is what a contributor sees.
settings.register_profile("opsd", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("opsd")

# The tensors are small, and on a busy machine threads that wait for each other are far slower than
# one; pytest-xdist uses the cores.
torch.set_num_threads(1)
