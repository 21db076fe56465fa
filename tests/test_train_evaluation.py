"""Accuracy and its interval."""

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from opsd_train.evaluation import Accuracy


def test_wilson_interval():
    low, high = Accuracy(50, 100).interval
    assert low == pytest.approx(0.4038, abs=1e-4)
    assert high == pytest.approx(0.5962, abs=1e-4)
    assert Accuracy(0, 10).interval[0] < 1e-12
    assert Accuracy(10, 10).interval[1] == 1
