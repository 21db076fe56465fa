"""The pages: their links lead somewhere, what they quote is in the code, and the site is built."""

import ast
import importlib
import os
import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from inputs import random_inputs
from test_head_of_model import model_of

import opsd_kernels
from benchmarks.pages.gpus import slug
from opsd_kernels.heads.known_models import KNOWN

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> str:
    return CODE_BLOCK.sub("", path.read_text())


@cache
def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {slug(re.sub(r"`|\[(.*?)\]\(.*?\)", r"\1", heading)) for heading in headings}


def dead_links(page: Path) -> list[str]:
    """Targets of relative links that are no file, or no heading of a page."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if target.startswith(("http://", "https://")):
            continue
        where, _, anchor = target.partition("#")
        path = (page.parent / where).resolve() if where else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page):
    assert dead_links(page) == []


def test_a_dead_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# One `two`\n[a](page.md#one-two) [b](#three) [c](no.md) `[d](code.md)`\n")
    assert dead_links(page) == ["#three", "no.md"]


NAMED = re.compile(r"`((?:opsd_kernels|opsd_train|benchmarks|examples|tests|docs)/[\w./-]+\.\w+)`")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=name)
def test_files_that_a_page_names_are_there(page):
    missing = [named for named in NAMED.findall(page.read_text()) if not (ROOT / named).exists()]
    assert missing == []


def test_the_readme_is_read_in_four_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1100


@cache
def words_of_the_code() -> str:
    """All texts of both packages, … for what is put into them."""
    found = []
    for package in ("opsd_kernels", "opsd_train"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                    found.append("".join(map(str, parts)))
    return "\n".join(found)


def quoted_messages() -> list[str]:
    """Those of the tables of errors, and those that are called "refused"."""
    pages = {page: (ROOT / f"docs/{page}.md").read_text() for page in QUOTING}
    in_tables = re.findall(r"^\| `([^`]+ [^`]+)` \|", pages["troubleshooting"], re.MULTILINE)
    refused = re.findall(r"(?:refused|said)[^`|]*`([^`]+ [^`]+)`", "\n".join(pages.values()))
    return in_tables + refused


QUOTING = ("troubleshooting", "heads_and_parallel")


@pytest.mark.parametrize("message", quoted_messages())
def test_a_message_that_a_page_quotes_is_one(message):
    assert message in words_of_the_code()


def test_messages_are_quoted():
    assert len(quoted_messages()) > 30


def test_the_number_of_known_classes():
    assert f"[{len(KNOWN)} classes](heads.md)" in (ROOT / "docs/heads_and_parallel.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_of_a_page_is_python(page):
    """And what it imports of ours is there."""
    for kind, code in CODE_BLOCK.findall(page.read_text()):
        for node in ast.walk(ast.parse(code)) if kind == "python" else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opsd_"):
                assert {alias.name for alias in node.names} <= names_of(node.module), code


def names_of(module: str) -> set[str]:
    """What can be imported of a module; of opsd_kernels.verl, which needs verl, what it says so."""
    if module != "opsd_kernels.verl":
        return set(dir(importlib.import_module(module)))
    tree = ast.parse((ROOT / "opsd_kernels/verl/__init__.py").read_text())
    (names,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    return set(ast.literal_eval(names))


@pytest.mark.parametrize("page", ["README.md", "docs/losses.md", "docs/troubleshooting.md"])
def test_code_of_a_page_runs(page, monkeypatch):
    h_student, h_teacher, W = random_inputs(70, 99, 32)
    values = {name: getattr(opsd_kernels, name) for name in opsd_kernels.__all__}
    values |= {
        "torch": torch,
        "model": model_of("Qwen3"),
        "h": h_student.clone().requires_grad_(),
        "h_student": h_student.requires_grad_(),
        "h_teacher": h_teacher,
        "W": W,
        "head": W,
        "mask": torch.arange(70) % 3 > 0,
        "uncertain": torch.arange(70) % 2 == 0,
        "w": torch.rand(70),
        "A": torch.randn(70),
        "sampled_ids": torch.arange(70),
        "several_ids": torch.arange(210).view(70, 3) % 99,
        "places": [{str(v): {"logprob": -1.0 - v} for v in range(21)}] * 70,  # as vLLM answers
    }
    monkeypatch.setitem(sys.modules, "opsd_kernels.trl", pytest.importorskip("opsd_kernels.trl"))
    monkeypatch.setattr("opsd_kernels.trl.apply_opsd_kernels_to_trl", lambda: None)
    blocks = [
        code for kind, code in CODE_BLOCK.findall((ROOT / page).read_text()) if kind == "python"
    ]
    assert blocks
    for code in blocks:
        exec(compile(code, page, "exec"), values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
def test_what_the_page_says_of_liger():
    """Its arguments, ours, and that they are one loss, where some labels are −100."""
    fused_linear_jsd = pytest.importorskip("liger_kernel.transformers.fused_linear_jsd")
    h_student, h_teacher, W = random_inputs(6, 40, 8, distance=1.0)
    shift_labels = torch.tensor([3, -100, 5, 7, -100, 2])
    with torch.no_grad():
        theirs = fused_linear_jsd.LigerFusedLinearJSD(jsd_beta=0.3)(
            h_student, W, h_teacher, W, shift_labels
        )
        ours = opsd_kernels.fused_jsd_loss(
            h_student, h_teacher, W, W_teacher=W, beta=0.3, token_weights=shift_labels != -100
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    page = (ROOT / "docs/coming_from.md").read_text()
    assert (
        "LigerFusedLinearJSD(jsd_beta=0.5)(h_student, W, h_teacher, W_teacher, shift_labels)"
        in page
    )


class Fetched(HTMLParser):
    """What a page has its reader's browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.found += [given.get("src") or ""]
        if tag == "link":
            self.found += [given.get("href") or ""]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs mkdocs: make docs")
def test_the_site_is_built_and_fetches_nothing(tmp_path):
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {"index.html", "api.html", "troubleshooting.html"} <= {page.name for page in pages}
    api = (tmp_path / "docs" / "api.html").read_text()
    for public in opsd_kernels.__all__:
        assert f'id="opsd_kernels.{public}"' in api, public
    architecture = (tmp_path / "docs" / "architecture.html").read_text()
    assert "flowchart" not in architecture
    assert "<th>uses</th>" in architecture
    for page in pages:
        fetched = Fetched()
        fetched.feed(page.read_text())
        assert not [url for url in fetched.found if url.startswith(("http", "//"))], page
