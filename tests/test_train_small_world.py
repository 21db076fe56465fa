"""The small world: its problems, its cache, and that a run there learns."""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from training_runs import REPOSITORY, demo_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd_train.command_line import parse
from opsd_train.data import Context
from opsd_train.evaluation import grade
from opsd_train.run.checkpoint import last_step
from opsd_train.sampling import GenerateSampler, Sampling, roll_out
from opsd_train.small_world import world
from opsd_train.small_world.multiplication import (
    STUDENT_TEMPLATE,
    TEACHER_TEMPLATE,
    judge,
    make_problem,
    work_out,
)

# The world


def test_worked_solutions_are_right():
    problem = make_problem(3847, 6)
    assert problem.question == "3847*6=?"
    assert problem.solution == "7*6+0=42 4*6+4=28 8*6+2=50 3*6+5=23 <answer>23082"
    for a, b in [(1000, 2), (9999, 9), (1005, 4)]:
        problem = make_problem(a, b)
        assert int(problem.solution.partition("<answer>")[2]) == a * b
        assert judge(problem, problem.solution + "<end>").correct


def test_slips_are_marked_and_carried_on():
    rng = random.Random(0)
    wrong = 0
    for _ in range(300):
        text, slips = work_out(3847, 6, rng, slip_rate=0.3)
        tokens = text.replace("<answer>", "A")
        assert len(tokens) == len(slips)
        answer = text.partition("<answer>")[2]
        if not any(slips):
            assert int(answer) == 3847 * 6
        wrong += int(answer) != 3847 * 6
        steps = tokens.partition("A")[0].split()
        for step, later in itertools.pairwise(steps):
            carried = later.partition("+")[2][0] == step[-2]
            position = tokens.index(later) + later.index("+") + 1
            assert carried or slips[position]
    assert 100 < wrong < 280


def test_grading():
    problem = make_problem(3847, 6)
    assert judge(problem, "anything<answer>23082<end>").correct
    for text in [
        "",
        "<answer>23082",
        "23082<end>",
        "<answer>23083<end>",
        "<answer>23082<end>7<end>",
    ]:
        assert not judge(problem, text).correct


def test_problems_are_disjoint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = []
    monkeypatch.setattr(
        world, "warm_start", lambda model, tokenizer, numbers, *_: seen.extend(numbers)
    )
    materials = world.load_world(seed=3)
    parts = (materials.held_out, materials.problems)
    questions = [{p.question for p in part} for part in parts]
    questions.append({f"{a}*{b}=?" for a, b in seen})
    assert [len(q) for q in questions] == [512, 8000, 63488]
    assert len(set.union(*questions)) == 72000


def test_world_is_cached_and_loaded_from_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(world, "warm_start", lambda *_: calls.append(1))
    first = world.load_world(seed=0)
    again = world.load_world(seed=0)
    assert calls == [1]
    assert list((tmp_path / "opsd_train").iterdir()) == [world.cache_path(0)]
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert (
        again.tokenizer("<problem>12*3=?")["input_ids"]
        == first.tokenizer("<problem>12*3=?")["input_ids"]
    )
    world.load_world(seed=1)
    assert calls == [1, 1]


# Runs


def test_the_preset_has_the_texts_of_the_warm_start():
    config = demo_config()
    assert config.student_template == STUDENT_TEMPLATE
    assert config.teacher_template == TEACHER_TEMPLATE


def start_opsd_train(*arguments: str, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "opsd_train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        # A suite started in the background of a shell would hand on that interrupts are ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def opsd_train(*arguments: str, cache: Path) -> subprocess.CompletedProcess:
    process = start_opsd_train(*arguments, cache=cache)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def test_dry_run_writes_nothing(tmp_path):
    result = opsd_train("--dry-run", "--output-dir", str(tmp_path / "run"), cache=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "<reference>" in result.stdout
    assert "One step: JSD(β=0.5 on the teacher)" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_cache_is_noticed_at_once(tmp_path):
    (tmp_path / "cache").write_text("a file")
    result = opsd_train("--output-dir", str(tmp_path / "run"), cache=tmp_path / "cache")
    assert result.returncode == 1
    assert "set XDG_CACHE_HOME" in result.stderr
    assert "Traceback" not in result.stderr
    assert list((tmp_path / "run").iterdir()) == []


def test_the_demo_learns(tmp_path):
    """`python -m opsd_train` as a newcomer starts it, whole: what it shows, and what it leaves."""
    run = tmp_path / "run"
    result = opsd_train("--output-dir", str(run), cache=tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["student_before"]["accuracy"] <= 0.30
    assert summary["student_after"]["accuracy"] >= 0.75
    assert summary["teacher"]["accuracy"] >= 0.85
    low, high = summary["student_after"]["interval_95"]
    assert low < summary["student_after"]["accuracy"] < high
    assert set(summary["seconds"]) >= {"warm_start", "rollout", "score", "loss", "step", "total"}

    assert (run / "config.yaml").read_text().startswith("# JSD(β=0.5 on the teacher)\n")
    assert parse([str(run / "config.yaml")]) == demo_config(output_dir=str(run))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, 61))
    rates = [m["learning_rate"] for m in metrics if "loss" in m]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(5e-4)
    assert 0 < rates[-1] < 2e-5
    completions = [
        json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()
    ]
    after = [c for c in completions if c["phase"] == "after"]
    assert sum(c["correct"] for c in after) == summary["student_after"]["correct"]
    assert {"prompt", "completion", "correct"} <= set(after[0])
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")

    # The adapter, loaded as PEFT loads one, is the trained student.
    (cached,) = (tmp_path / "cache" / "opsd_train").iterdir()
    tokenizer = AutoTokenizer.from_pretrained(cached)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(cached), run / "adapter")
    numbers = [re.findall(r"\d+", c["prompt"]) for c in after[:100]]
    problems = [make_problem(int(a), int(b)) for a, b in numbers]
    sampler = GenerateSampler(model, tokenizer, Sampling(1.0, 56))
    context = Context(tokenizer, STUDENT_TEMPLATE)
    rollout = roll_out(sampler, context, problems, seeds=list(range(100)))
    assert sum(c.correct for c in grade(tokenizer, rollout, judge)) >= 75

    # Interrupted, a run keeps what it has, and can go on.
    long = tmp_path / "long"
    process = start_opsd_train(
        "--steps", "9999", "--output-dir", str(long), cache=tmp_path / "cache"
    )
    deadline = time.monotonic() + 60
    while not (long / "metrics.jsonl").exists() or len((long / "metrics.jsonl").read_text()) < 500:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    rows = [json.loads(line) for line in (long / "metrics.jsonl").read_text().splitlines()]
    assert last_step(long) == rows[-1]["step"]

    # A second run in the same folder is refused, and loses nothing.
    refused = opsd_train("--output-dir", str(run), cache=tmp_path / "cache")
    assert refused.returncode == 1
    assert "holds a run already" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert json.loads((run / "summary.json").read_text()) == summary
