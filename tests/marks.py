"""Which tests `make test` leaves to `make test-slow`."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A parameter set of a test that is a whole, where others of its cases represent it."""
    return pytest.param(*values, marks=pytest.mark.slow)
