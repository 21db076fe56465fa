"""What is published, as someone who installs it has it: each file of dist/ in an environment that
holds what the file asks for, and nothing else. `make test-dist` builds the files first.

Packages are installed from an index, so `make test` leaves these tests out.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.*)"', (ROOT / "opsd_kernels/__init__.py").read_text(), re.M)
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
        self.folder = folder
        self.python = folder / "env/bin/python"
        subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
        pinned = ["-c", ROOT / "constraints.txt"]
        self.run("-m", "pip", "install", "--quiet", *pinned, requirement)
        self.run("-m", "pip", "check")

    def run(self, *arguments: Any, code: int = 0) -> str:
        """What Python prints, run in a folder that is not the repository."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment |= {"XDG_CACHE_HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def packages(self) -> set[str]:
        lines = self.run("-m", "pip", "list", "--format=freeze").splitlines()
        return {line.partition("==")[0].lower() for line in lines}


def built(pattern: str) -> str:
    assert VERSION is not None
    (path,) = (ROOT / "dist").glob(pattern.format(VERSION[1]))
    return str(path)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Environment:
    """The library alone, built where it is installed."""
    return Environment(tmp_path_factory.mktemp("library"), built("opsd_kernels-{}.tar.gz"))


def wheel(tmp_path_factory: Any, extra: str) -> Environment:
    return Environment(tmp_path_factory.mktemp(extra), f"{built('opsd_kernels-{}-*.whl')}[{extra}]")


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Environment:
    return wheel(tmp_path_factory, "train")


@pytest.fixture(scope="module")
def trl(tmp_path_factory) -> Environment:
    return wheel(tmp_path_factory, "trl")


def python_block() -> str:
    block = re.search(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert block is not None
    return block[1]


def test_first_lines_of_the_readme(library):
    """Those that replace three others, with the library alone."""
    line = re.search(r"^\+ (loss = fused_jsd_loss.*)$", README, re.MULTILINE)
    assert line is not None
    code = f"from opsd_kernels import fused_jsd_loss\n{INPUTS}{LINEAR}{line[1]}{CHECK}"
    file = Path(library.run("-c", code).split()[-1])
    assert file.is_relative_to(library.folder)


def test_the_library_asks_for_torch_alone(library):
    assert "torch" in library.packages()
    assert not {"transformers", "trl", "matplotlib", "pytest"} & library.packages()


def test_environment(library):
    assert VERSION is not None
    assert re.search(rf"^opsd_kernels +{VERSION[1]}$", library.run("-m", "opsd_kernels.env"), re.M)


def test_training_without_its_packages_says_what_to_install(library):
    told = library.run("-m", "opsd_train", "--help", code=1)
    assert "pip install 'opsd-kernels[train]'" in told
    assert len(told.splitlines()) == 1


def test_training(train):
    told = train.run("-m", "opsd_train", "--help")
    for preset in (ROOT / "opsd_train/presets").glob("*.yaml"):
        assert preset.stem in told
    train.run("-c", DEMO)
    assert len((train.folder / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert not {"trl", "matplotlib", "pytest"} & train.packages()


def test_call_of_the_readme(trl):
    trl.run("-c", f"{INPUTS}{QWEN3}{python_block()}{CHECK}")


def test_adapter_for_trl(trl):
    code = "from opsd_kernels.trl import apply_opsd_kernels_to_trl, explain\n"
    assert "SDFTTrainer" in trl.run("-c", f"{code}apply_opsd_kernels_to_trl()\nprint(explain())")


def test_gguf(train):
    """In the environment that trains."""
    (train.folder / "model.gguf").touch()
    convert = ["-m", "opsd_train.from_gguf", "model.gguf", "model"]
    assert "pip install 'opsd-kernels[gguf]'" in train.run(*convert, code=1)
    pinned = ["-c", ROOT / "constraints.txt"]
    train.run("-m", "pip", "install", "--quiet", *pinned, f"{built('opsd_kernels-{}-*.whl')}[gguf]")
    assert "model.gguf" in train.run(*convert, code=1)
