"""Which code a recorded figure is of, as pages say it."""

from dataclasses import dataclass

import pytest

from benchmarks.lib import report, sources
from benchmarks.pages import readme

FIELD = '''class Row:
    """A row."""
    N: int
    """How many."""
    text = "kept"
'''
CODE = '''"""A docstring."""
from a import b

def f(x):
    """Another."""
    return x + 1  # why
'''


@dataclass(frozen=True)
class Row:
    N: int


def test_a_digest_is_of_code_alone():
    moved = CODE.replace("A doc", "One more doc").replace("why", "ö").replace("from a", "from a.c")
    same = sources.digest({"lse.py": CODE})
    assert sources.digest({"kernels/lse.py": moved.replace("    return", "\n    return")}) == same
    assert sources.digest({"lse.py": CODE, "reference.py": "x = 1"}) == same
    assert sources.digest({"lse.py": CODE.replace("x + 1", "x + 2")}) != same
    assert sources.digest({"lse.py": CODE, "pair.py": ""}) != same
    assert sources.digest({"lse.py": CODE.replace("# why", "+ len('# why')")}) != same


def test_a_digest_knows_the_docstring_of_a_field():
    same = sources.digest({"head.py": FIELD})
    assert sources.digest({"head.py": FIELD.replace("How many", "Tokens")}) == same
    assert sources.digest({"head.py": FIELD.replace("kept", "changed")}) != same


def test_a_result_says_which_commit_it_is_of(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "commit", lambda: "abc1234")
    path = tmp_path / "some.csv"
    report.write(path, "a machine", [Row(7)])
    assert report.read(path, Row) == ("a machine; commit abc1234", [Row(7)])
    monkeypatch.setattr(sources, "kernels_digest", lambda: "another")
    assert report.source(path) == f"commit abc1234, {sources.CHANGED}"
    path.write_text("# a machine\nN\n7\n")
    assert report.read(path, Row) == ("a machine", [Row(7)])


def test_a_copy_without_git_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    commit = sources.commit.__wrapped__
    assert commit() == "unknown"
    monkeypatch.setenv("OPSD_COMMIT", "abc1234")
    assert commit() == "abc1234"


@pytest.mark.parametrize("changed", [False, True])
def test_pages_mark_figures_of_kernels_that_have_changed(changed, monkeypatch):
    """Every table and every sentence with figures says its commit."""
    marked = []

    def described(line):
        marked.append(line)
        return "commit abc1234" + f", {sources.CHANGED}" * changed

    monkeypatch.setattr(sources, "described", described)
    for page, names in {
        readme.README: ("saving", "peers", "trainers", "evidence"),
        readme.CHOOSING: ("schedules", "clip"),
        readme.TRAINING: ("layers",),
        readme.BENCHMARKS: (
            *("accuracy", "memory", "speed", "trained", "cross-entropy", "step", "gpus"),
        ),
        readme.EXAMPLES: ("trl",),
    }.items():
        parts = readme.PAGES[page](readme.RESULTS, page)
        for name in names:
            text = " ".join(parts[name].split())
            assert "commit abc1234" in text, name
            assert (sources.CHANGED in text) == changed, name
    assert all(line.startswith("commit ") for line in marked)
