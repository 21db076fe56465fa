"""The comparisons that a GPU makes at a real size (tests/operations.py), at a small one."""

import operations
import pytest
import torch
from schedules import LOGIT_FREE

N, D, V = 6, 32, 200
OFTEN = ("JSD", "statistics, clipped", "softcap, bias, padding")


@pytest.mark.parametrize("workspace_mib", [0, 1])
@pytest.mark.parametrize(
    "name",
    [
        name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow)
        for name in operations.OPERATIONS
    ],
)
def test_operation(name, workspace_mib):
    inputs = operations.make(N, D, V, torch.bfloat16, LOGIT_FREE.device, distance=0.3)
    for told in operations.compare(operations.OPERATIONS[name], inputs, workspace_mib):
        assert told.error < told.bound, told


@pytest.mark.parametrize("wrong", [{"beta": 0.51}, {"temperature": 1.001}])
def test_what_is_wrong_is_found(wrong, monkeypatch):
    """Where a parameter is a little off."""
    inputs = operations.make(N, D, V, torch.bfloat16, torch.device("cpu"), distance=0.3)
    right = operations.fused

    def slightly_wrong(name):
        return lambda *given, **options: right(name)(*given, **options | wrong)

    monkeypatch.setattr(operations, "fused", slightly_wrong)
    loss, _ = operations.compare(operations.OPERATIONS["JSD"], inputs, 1)
    assert loss.error > 10 * loss.bound
