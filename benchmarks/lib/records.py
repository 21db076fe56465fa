"""A row of a result that a test writes, and a page reads."""

from dataclasses import dataclass


@dataclass(frozen=True)
class OperationError:
    """Of operations.csv: an operation of the package at a real size, beside float64."""

    operation: str
    workspace_mib: int
    N: int
    D: int
    dtype: str
    distance: float  # of the teacher's hidden states
    what: str  # loss, gradient, or a statistic
    error: float  # norm over the rows that are compared
    bound: float


@dataclass(frozen=True)
class TriedVersions:
    """Of versions.csv: what became of the core of the suite in an environment of its own."""

    environment: str
    python: str
    torch: str
    triton: str
    numpy: str
    transformers: str
    peft: str
    accelerate: str
    datasets: str
    trl: str
    passed: int
    failed: int
    skipped: int
    date: str
    code: str  # the commit, and a digest of the kernels
