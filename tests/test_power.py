"""That the faults of `make test-power` can still be planted, in every room."""

import power
import pytest
from faults import FAULTS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.new[:30]}")
def test_a_fault_can_be_planted(fault):
    power.check(fault)


def test_faults_are_in_every_room():
    rooms = {"/".join(fault.file.split("/")[:2]).removesuffix(".py") for fault in FAULTS}
    assert len(FAULTS) >= 40
    assert rooms >= {
        *("opsd_kernels/divergence", "opsd_kernels/kernels", "opsd_kernels/trl"),
        *(f"opsd_train/{room}" for room in ("data", "models", "sampling", "opsd", "run")),
        *("opsd_train/grading", "opsd_train/report"),
        *(f"benchmarks/{room}" for room in ("lib", "gpu", "history")),
    }
