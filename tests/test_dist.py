"""What is published, as someone who installs it has it: each file of dist/ in an environment that
holds what the file asks for, and nothing else. `make test-dist` builds the files first.

Packages are installed from an index, so `make test` leaves these tests out.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
(VERSION,) = re.findall(
    r'^__version__ = "(.*)"', (ROOT / "opsd_kernels/__init__.py").read_text(), re.MULTILINE
)
SDIST, WHEEL = f"opsd_kernels-{VERSION}.tar.gz", f"opsd_kernels-{VERSION}-py3-none-any.whl"
LIBRARY, TRAIN, TRL = SDIST, f"{WHEEL}[train]", f"{WHEEL}[trl]"
pytestmark = pytest.mark.dist

# What the README's first lines and its call are given, without transformers and with it.
INPUTS = """
import torch
torch.manual_seed(0)
h_student, h_teacher = torch.randn(2, 5, 8).unbind()
h_student.requires_grad_()
mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
"""
LINEAR = """
from types import SimpleNamespace
model = SimpleNamespace(lm_head=torch.nn.Linear(8, 99, bias=False))
"""
QWEN3 = """
from transformers import Qwen3Config, Qwen3ForCausalLM
size = {"vocab_size": 99, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
model = Qwen3ForCausalLM(Qwen3Config(**size, **heads))
"""
CHECK = """
loss.backward()
assert 0 < loss.item() < 1, loss
assert h_student.grad.norm() > 0
import opsd_kernels
print(opsd_kernels.__file__)
"""
# Without the warm start, which is a minute's work.
DEMO = """
from opsd_train import demo
from opsd_train.__main__ import main
demo.warm_start = lambda *_: None
main("small-world --steps 1 --held-out 4 --output-dir run".split())
"""


class Environment:
    """A new one, into which `requirement` is installed, with what it needs."""

    def __init__(self, folder: Path, requirement: str) -> None:
        self.folder = folder.resolve()
        self.python = self.folder / "env/bin/python"
        subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
        pinned = ["-c", ROOT / "constraints.txt"]
        self.run("-m", "pip", "install", "--quiet", *pinned, requirement)
        self.run("-m", "pip", "check")

    def run(self, *arguments: Any, code: int = 0) -> str:
        """What Python prints, run in a folder that is not the repository."""
        variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        variables |= {"XDG_CACHE_HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def packages(self) -> set[str]:
        lines = self.run("-m", "pip", "list", "--format=freeze").splitlines()
        return {line.partition("==")[0].lower() for line in lines}


def built(requirement: str) -> str:
    """A file of dist/ as pip is told of it."""
    file = ROOT / "dist" / requirement.partition("[")[0]
    assert file.exists(), f"{file} is not there: make test-dist builds it"
    return str(ROOT / "dist" / requirement)


@pytest.fixture(scope="module")
def environment(request) -> Iterator[Environment]:
    """With what `installed` names. One is gone before the next is made: each may hold gigabytes of
    CUDA's libraries."""
    with TemporaryDirectory() as folder:
        yield Environment(Path(folder), built(request.param))


def installed(requirement: str) -> Any:
    """A test with a file of dist/ and an extra in its `environment`."""
    return pytest.mark.parametrize("environment", [requirement], indirect=True)


def python_block() -> str:
    block = re.search(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block is not None
    return block[1]


@installed(LIBRARY)
def test_first_lines_of_the_readme(environment):
    """Those that replace three others, with the library alone."""
    line = re.search(r"^\+ (loss = fused_jsd_loss.*)$", README, re.MULTILINE)
    assert line is not None
    code = f"from opsd_kernels import fused_jsd_loss\n{INPUTS}{LINEAR}{line[1]}{CHECK}"
    file = Path(environment.run("-c", code).split()[-1])
    assert file.is_relative_to(environment.folder)


@installed(LIBRARY)
def test_the_library_asks_for_torch_alone(environment):
    assert "torch" in environment.packages()
    assert not {"transformers", "trl", "matplotlib", "pytest"} & environment.packages()


@installed(LIBRARY)
def test_environment(environment):
    told = environment.run("-m", "opsd_kernels.env")
    assert re.search(rf"^opsd_kernels +{VERSION}$", told, re.MULTILINE)


@installed(LIBRARY)
def test_training_without_its_packages_says_what_to_install(environment):
    told = environment.run("-m", "opsd_train", "--help", code=1)
    assert "pip install 'opsd-kernels[train]'" in told
    assert len(told.splitlines()) == 1


@installed(TRAIN)
def test_training(environment):
    told = environment.run("-m", "opsd_train", "--help")
    for preset in (ROOT / "opsd_train/presets").glob("*.yaml"):
        assert preset.stem in told
    environment.run("-c", DEMO)
    assert len((environment.folder / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert not {"trl", "matplotlib", "pytest"} & environment.packages()


@installed(TRAIN)
def test_gguf(environment):
    """Refused without its package, and then read."""
    (environment.folder / "model.gguf").touch()
    convert = ["-m", "opsd_train.from_gguf", "model.gguf", "model"]
    assert "pip install 'opsd-kernels[gguf]'" in environment.run(*convert, code=1)
    pinned = ["-c", ROOT / "constraints.txt"]
    environment.run("-m", "pip", "install", "--quiet", *pinned, built(f"{WHEEL}[gguf]"))
    assert "model.gguf" in environment.run(*convert, code=1)


@installed(TRL)
def test_call_of_the_readme(environment):
    environment.run("-c", f"{INPUTS}{QWEN3}{python_block()}{CHECK}")


@installed(TRL)
def test_adapter_for_trl(environment):
    code = "from opsd_kernels.trl import apply_opsd_kernels_to_trl, explain\n"
    assert "SDFTTrainer" in environment.run(
        "-c", f"{code}apply_opsd_kernels_to_trl()\nprint(explain())"
    )
