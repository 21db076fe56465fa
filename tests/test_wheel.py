"""The wheel, as someone who installs it has it: without the repository on the path. And what the
sdist holds."""

import email
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from marks import slow

ROOT = Path(__file__).parents[1]
CALLER = """\
import torch
from opsd_kernels import FusedJSDLoss, TokenDivergence, fused_jsd_loss, token_divergence
from opsd_train.opsd import take_step

h, W = torch.zeros(2, 8), torch.zeros(16, 8)
loss: torch.Tensor = fused_jsd_loss(h, h, W, beta=0.5)
module_loss: torch.Tensor = FusedJSDLoss(entry_clip=0.05)(h, h, W)
stats: TokenDivergence = token_divergence(h, h, W)
forward_kl: torch.Tensor = stats.forward_kl
fused_jsd_loss(h, h, W, betta=0.5)  # wrong
stats.forward_kld  # wrong
take_step("a setup")  # wrong
"""


# Without the warm start, which is a minute's work.
RUN_THE_DEMO = """
from opsd_train.__main__ import main
from opsd_train import demo
demo.warm_start = lambda *_: None
main("small-world --steps 2 --held-out 4 --output-dir run".split())
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, built from what is there; nothing is fetched."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Of an environment that holds the wheel, and the dependencies that this one has."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    interpreter = folder / "bin" / "python"
    found = run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    site = Path(found.stdout.strip())
    # A folder that is added so is searched, but its own .pth files, such as that of an editable
    # installation of this repository, are not read.
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("\n".join(sorted(dependencies)) + "\n")
    options = ["--no-deps", "--no-index", "--quiet", "--target", site]
    run(sys.executable, "-m", "pip", "install", *options, wheel)
    return interpreter


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    settings = {"cwd": "/", "env": environment, "check": True} | options
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **settings)


def test_what_it_holds(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "opsd_kernels",
        "opsd_train",
    }
    assert {"opsd_kernels/py.typed", "opsd_train/py.typed"} <= set(names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    for package in ("opsd_kernels", "opsd_train"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".yaml", ".jsonl", ".html", ".css", ".js"):
                assert str(path.relative_to(ROOT)) in names


def test_the_sdist_holds_what_the_wheel_is_built_from(built, wheel):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    packages = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    told = {"README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO"}
    assert names == packages | told | {"pyproject.toml", ".gitignore"}


def test_links_of_the_description(wheel):
    """An index shows the README. What it links to is in the repository of that version."""
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    description = metadata.get_payload(decode=True).decode()
    (address,) = (
        line.partition(", ")[2]
        for line in metadata.get_all("Project-URL")
        if line.startswith("Repository")
    )
    ours = re.compile(rf"{address}/(blob|raw)/v{re.escape(metadata['Version'])}/([^#]+)")
    paths = []
    for image, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", description):
        if target.startswith("https://arxiv.org/"):
            continue
        link = ours.match(target)
        assert link is not None, target
        assert link[1] == ("raw" if image else "blob")
        paths.append(link[2])
    assert {"docs/demo.png", "docs/maths.md", "LICENSE"} <= set(paths)
    assert all((ROOT / path).exists() for path in paths)


def test_it_is_imported_from_where_it_is_installed(python):
    files = run(
        python, "-c", "import opsd_kernels as k, opsd_train as t; print(k.__file__, t.__file__)"
    )
    for file in files.stdout.split():
        assert Path(file).is_relative_to(python.parents[1])


@pytest.mark.parametrize("types_of_others", [False, slow(True)])
def test_a_caller_type_checks(python, tmp_path, types_of_others):
    """What is wrong in it, and nothing else, is an error in the caller's mypy, whether that reads
    the types of PyTorch and transformers, which takes a minute, or takes them for anything."""
    others = "normal" if types_of_others else "skip"
    (tmp_path / "mypy.ini").write_text(
        f"[mypy]\nignore_missing_imports = true\nfollow_imports = {others}\n"
        "[mypy-opsd_kernels.*,opsd_train.*]\nfollow_imports = normal\n"
    )
    (tmp_path / "caller.py").write_text(CALLER)
    command = [sys.executable, "-m", "mypy", "--python-executable", python]
    found = run(*command, "caller.py", cwd=tmp_path, check=False)
    errors = re.findall(r"^caller.py:(\d+): error: (.*)", found.stdout, flags=re.MULTILINE)
    wrong = [n for n, line in enumerate(CALLER.splitlines(), 1) if line.endswith("# wrong")]
    assert {int(line) for line, _ in errors} == set(wrong), found.stdout + found.stderr
    assert len(wrong) == 3
    assert "betta" in errors[0][1]


def test_presets_are_listed_and_run(python, tmp_path):
    told = run(python, "-m", "opsd_train", "--help", cwd=tmp_path).stdout
    for path in (ROOT / "opsd_train" / "presets").glob("*.yaml"):
        assert path.stem in told
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    run(python, "-c", RUN_THE_DEMO, cwd=tmp_path, env=environment)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    assert (tmp_path / "run" / "summary.json").exists()
