"""What is for a GPU, or for compiled kernels: one command that measures all of it (`run.py`), the
compiler, the tuner, and what compiled kernels take."""
