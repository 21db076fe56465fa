"""The rows of releases: their figures are those that were recorded, and counted."""

import csv
import math
from dataclasses import replace

import pytest

from benchmarks import memory, speed
from benchmarks.history import record
from benchmarks.lib import report, sources
from opsd_kernels import __version__

RESULTS = sources.ROOT / "benchmarks/results"
REPORT = """<?xml version="1.0"?>
<testsuites><testsuite name="pytest" tests="12" skipped="2" failures="{}" errors="0" time="90.5">
<testcase name="one" time="3"/></testsuite></testsuites>
"""


@pytest.fixture(scope="module")
def row() -> record.Release:
    return record.release()


def test_recorded_figures(row):
    """The figures are those of the benchmarks' own rows, and name the commit that was measured."""
    setting, timed = report.read(RESULTS / "speed.csv", speed.Row)
    floors = {r.dtype: r.floors for r in timed if (r.method, r.N) == ("ours, row workspace", 1024)}
    assert (row.floors_float32, row.floors_bfloat16) == (floors["float32"], floors["bfloat16"])
    assert f"commit {row.floors_of}" in setting
    setting, rows = report.read(RESULTS / "memory.csv", memory.Row)
    mib = {
        r.method: r.counted_mib
        for r in rows
        if (r.device, r.model, r.N) == ("counted", "qwen3-8b", 16384)
    }
    ours = [mib["ours, logit-free"], mib["ours, row workspace"]]
    assert [row.logit_free_mib, row.row_workspace_mib] == ours
    assert f"commit {row.memory_of}" in setting
    with (RESULTS / "resources.csv").open(newline="") as file:
        variant = ("sm_90", "bfloat16", "JSD")
        instructions = {
            r["kernel"]: float(r["instructions"])
            for r in csv.DictReader(file)
            if (r["arch"], r["dtype"], r["divergence"]) == variant
        }
    assert row.instructions == instructions["lse"] + instructions["pair"]
    assert row.version == __version__


def test_launches(row):
    """A few, and those of each chunk: in the row workspace five for 256 tokens; logit-free, for
    1,024 tokens, four, and three for each of 18 spans of the vocabulary."""
    for launches, of_chunks in (
        (row.row_workspace_launches, 5 * record.N // 256),
        (row.logit_free_launches, (4 + 3 * 18) * record.N // 1024),
    ):
        assert of_chunks < launches < of_chunks + 20


def test_tests(tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(REPORT.format(0))
    assert record.read_tests(path) == (10, 90.5)
    path.write_text(REPORT.format(1))
    with pytest.raises(ValueError, match="1 tests failed"):
        record.read_tests(path)


@pytest.mark.skipif(not (sources.ROOT / ".git").exists(), reason="needs git")
def test_a_past_release(tmp_path):
    """Its files are those of its commit, and nothing is counted."""
    past = record.release("HEAD")
    assert sources.commit().startswith(past.commit)
    assert math.isnan(past.row_workspace_launches)
    with pytest.raises(ValueError, match="git show nothing:"):
        record.release("nothing")


def test_a_release_has_one_row(row, tmp_path):
    path = tmp_path / "releases.csv"
    later = replace(row, version="9.9.9", tests=10.0, tests_s=90.0)
    for release in (row, later):
        record.append(path, release)
    assert [r.version for r in record.read(path)] == [__version__, "9.9.9"]
    assert record.read(path)[1] == later
    with pytest.raises(ValueError, match=r"has a row of 9\.9\.9"):
        record.append(path, later)
    assert len(record.read(path)) == 2
    newest, oldest = record.summary(path).splitlines()[2:]
    assert newest.startswith("| 9.9.9 (")
    assert newest.endswith("| 10 in 1.5 minutes |")
    assert oldest.endswith("| – |")


def test_a_figure_is_of_one_row():
    rows = [{"kernel": "lse", "n": "1"}, {"kernel": "pair", "n": "2"}, {"kernel": "pair", "n": "3"}]
    assert record.figure(rows, "n", kernel="lse") == 1
    for kernel, found in (("pair", 2), ("rows", 0)):
        with pytest.raises(ValueError, match=f"is in {found} rows"):
            record.figure(rows, "n", kernel=kernel)
