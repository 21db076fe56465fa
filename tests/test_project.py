"""What belongs to a release and cannot run here: workflows, forms, addresses, the citation."""

import csv
import re
import sys
from pathlib import Path

import pytest
import yaml
from check_jsonschema import main as check_jsonschema

from opsd_kernels import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:  # it comes with pytest
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/*.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_files_have_the_fields_that_their_reader_knows(schema, pattern):
    paths = [str(path) for path in ROOT.glob(pattern)]
    assert paths
    with pytest.raises(SystemExit) as end:
        check_jsonschema(["--builtin-schema", f"vendor.{schema}", *paths])
    assert end.value.code == 0


def test_workflows_call_what_is_there():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    commands = []
    for path in WORKFLOWS:
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        commands += [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        assert all("timeout-minutes" in job for job in jobs.values()), path
    assert ".ci/run" in commands
    made = {word for command in commands for word in re.findall(r"make ([a-z-]+)", command)}
    assert made == {"test-slow", "test-dist", "docs"}
    told = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert made | set(re.findall(r"(?:`|^ *)make ([a-z-]+)", told, re.M)) <= set(targets)


def test_the_repository_has_one_address():
    address = PROJECT["urls"]["Repository"]
    owner, name = address.split("/")[-2:]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == address
    known = (address, f"https://{owner}.github.io/{name}")
    assert all(url.startswith(known) for url in PROJECT["urls"].values())
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert set(re.findall(r"https://github\.com/[^/]+/[\w.-]+", text)) == {address}


def releases() -> dict[str, list[str]]:
    """The sections of each release in the changelog, by its heading."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for level, heading in re.findall(r"^(##|###) (.*)$", text, re.M):
        if level == "##":
            found[heading] = []
        else:
            found[list(found)[-1]].append(heading)
    return found


def test_the_changelog_is_in_order():
    headings = [heading for heading in releases() if heading != "Unreleased"]
    dates = [heading.partition(" - ")[2] for heading in headings[:-1]]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
    assert dates == sorted(dates, reverse=True)
    order = ["Breaking", "Added", "Changed", "Fixed", "Removed"]
    for sections in releases().values():
        assert sections == [name for name in order if name in sections]


def test_files_say_the_same_version():
    version, _, date = next(h for h in releases() if h != "Unreleased").partition(" - ")
    assert version == __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["date-released"]) == (version, date)


def test_pythons_are_those_that_were_tried():
    """Classifiers and CI's matrix, in which another is marked."""
    page = (ROOT / "docs/compatibility.md").read_text(encoding="utf-8")
    tried = set(re.findall(r"The suite runs on (3\.\d+)", page))
    recorded = ROOT / "benchmarks/results/versions.csv"
    lines = recorded.read_text(encoding="utf-8").splitlines() if recorded.exists() else []
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        if row["failed"] == "0":
            tried.add(row["python"].rpartition(".")[0])
    assert tried
    assert {c.split(" :: ")[-1] for c in PROJECT["classifiers"] if ":: 3." in c} == tried
    ci = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    matrix = ci["jobs"]["test"]["strategy"]["matrix"]
    assert set(matrix["python"]) == tried
    untried = {entry["python"] for entry in matrix["include"] if entry["untried"]}
    assert len(untried) == len(matrix["include"])
    assert not untried & tried
