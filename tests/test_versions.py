"""The versions that were tried: as recorded, as required, and a warning outside of them."""

import re
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest import mock

import pytest
import torch
import versions
from inputs import random_inputs

from benchmarks.lib import report
from benchmarks.lib.records import TriedVersions
from opsd_kernels import fused_jsd_loss
from opsd_kernels import versions as tried
from opsd_kernels.trl.patches import TESTED_VERSIONS
from opsd_kernels.versions import TRIED, minor

ROOT = Path(__file__).parents[1]
_, ROWS = report.read(versions.RECORDED, TriedVersions)


@pytest.fixture
def installed(monkeypatch):
    """Versions that are installed, by package; none of the others is."""
    found: dict[str, str] = {}

    def version(package):
        if package not in found:
            raise PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(tried, "version", version)
    tried.warn_of_untried.cache_clear()
    yield found
    tried.warn_of_untried.cache_clear()


@pytest.mark.parametrize("package", TRIED)
def test_what_was_tried_is_what_is_recorded(package):
    passed = {minor(getattr(row, package)) for row in ROWS if not row.failed}
    assert (min(passed), max(passed)) == tuple(map(minor, TRIED[package]))


def test_the_trl_that_was_tested_is_recorded():
    assert {row.trl for row in ROWS if not row.failed} == set(TESTED_VERSIONS)


@pytest.mark.parametrize("package", TRIED)
def test_the_oldest_that_was_tried_is_required(package):
    bounds = re.findall(rf'"{package}>=([\d.]+)', (ROOT / "pyproject.toml").read_text())
    assert bounds
    assert {minor(bound) for bound in bounds} == {minor(TRIED[package][0])}


def test_the_versions_that_are_installed_were_tried():
    assert [tried.untried(package) for package in TRIED] == [None] * len(TRIED)


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("2.10.0", True),
        ("2.15.9", True),  # a patch release
        ("2.13.0+cpu", True),
        ("2.9.1", False),
        ("2.16.0.dev20261130+cu130", False),
        ("3.0.0", False),
    ],
)
def test_a_loss_warns_once_of_a_version_that_was_never_tried(installed, version, known):
    installed.update(torch=version, triton="3.7.1")
    inputs = random_inputs(2, 5, 3, torch.float32)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fused_jsd_loss(*inputs)
        fused_jsd_loss(*inputs)
    expected = f"tried with torch 2.10 to 2.15, not with the {version} that is installed"
    assert [expected in str(w.message) for w in told] == [True] * (not known)


def test_a_compiled_loss_warns_too(installed):
    installed.update(torch="2.13.0", triton="9.9.9")
    torch._dynamo.reset()
    loss = torch.compile(fused_jsd_loss, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match=r"triton 3\.6 to 3\.9, not with the 9\.9\.9"):
        loss(*random_inputs(2, 5, 3, torch.float32))


def test_without_triton_nothing_is_said(installed):
    installed.update(torch="2.13.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_jsd_loss(*random_inputs(2, 5, 3, torch.float32))


def test_an_environment_is_bound_by_the_rest_of_the_constraints():
    environment = versions.Environment(("triton==3.6.0", "numpy<2.4", "peft"))
    bounds = versions.bounds(environment)
    assert "torch==" in bounds
    assert not re.search(r"^(triton|numpy|peft)\b", bounds, re.MULTILINE)


def test_the_core_names_tests_that_are_there():
    for test in versions.core():
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / file).read_text(), test


@pytest.mark.parametrize(
    ("status", "last", "counts"),
    [
        (0, "12 passed, 3 skipped in 9.1s", (12, 0, 3)),
        (1, "2 failed, 11 passed, 1 error in 9.1s", (11, 3, 0)),
        (4, "ERROR: file or directory not found", (0, 1, 0)),
    ],
)
def test_a_run_is_recorded_in_place_of_the_former(status, last, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(versions.sources, "line", lambda: "commit abc1234, kernels 0")
    monkeypatch.setattr(versions, "PLACE", tmp_path)
    monkeypatch.setattr(versions, "RECORDED", tmp_path / "versions.csv")
    monkeypatch.setattr(versions, "versions", lambda _: dict.fromkeys(versions.COLUMNS, "1.0"))

    def pytest_of_there(command, *, stdout, **_):
        stdout.write(f"...\n{last}\n")
        return mock.Mock(returncode=status)

    with mock.patch.object(versions.subprocess, "run", pytest_of_there):
        for name in ("newest", "oldest", "newest"):
            versions.record(versions.run(name, Path("python"), jobs=1))
    _, rows = report.read(versions.RECORDED, TriedVersions)
    assert [row.environment for row in rows] == ["oldest", "newest"]
    assert (rows[1].passed, rows[1].failed, rows[1].skipped) == counts
