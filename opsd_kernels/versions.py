"""Versions of other packages that the core of the suite has passed with, and a warning outside of
them. `make test-versions` records them in benchmarks/results/versions.csv. The versions of TRL and
verl stand in their adapters."""

import re
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

# Oldest and newest.
TRIED = {
    "torch": ("2.10", "2.15"),
    "triton": ("3.6", "3.9"),
    "transformers": ("5.23", "5.24"),
}


@cache
def warn_of_untried(package: str) -> None:
    """Warn, once in a process, if the installed version of a package was never tried.

    Warns:
        UserWarning: it is older than the oldest version that was tried, or newer than the newest.
    """
    if told := untried(package):
        warnings.warn(told, stacklevel=2)


def untried(package: str) -> str | None:
    """That the installed version of a package was never tried, in words; None if the version lies
    between those that were tried, or the package is not installed. Patch releases count as tried.
    """
    try:
        installed = version(package)
    except PackageNotFoundError:
        return None
    oldest, newest = TRIED[package]
    if minor(oldest) <= minor(installed) <= minor(newest):
        return None
    return (
        f"opsd_kernels was tried with {package} {oldest} to {newest}, not with the {installed} "
        "that is installed"
    )


def minor(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))
