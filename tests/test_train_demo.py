"""The demo: its problems, its cache, and that a run on it learns."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from peft import PeftModel
from pictures import saved_figures
from training_runs import (
    REPOSITORY,
    demo_config,
    do_not_warm_start,
    metrics,
    run,
    start,
    steps_done,
    wait_for,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.pages.demo import draw
from opsd_train import demo
from opsd_train.command_line import parse
from opsd_train.data import Context, last_boxed, load_problems
from opsd_train.demo import STUDENT_TEMPLATE, TEACHER_TEMPLATE, make_problem, work_out
from opsd_train.grading import MathGrader, grade
from opsd_train.records import Problem
from opsd_train.run.checkpoint import last_step
from opsd_train.sampling import GenerateSampler, Sampling, roll_out

# Model and problems


def test_worked_solutions_are_right():
    problem = make_problem(3847, 6)
    assert problem.question == "3847*6=?"
    assert problem.solution == "7*6+0=42 4*6+4=28 8*6+2=50 3*6+5=23 \\boxed{23082}"
    for a, b in [(1000, 2), (9999, 9), (1005, 4)]:
        assert int(last_boxed(make_problem(a, b).solution)) == a * b


def test_slips_are_marked_and_carried_on():
    rng = random.Random(0)
    wrong = 0
    for _ in range(300):
        text, slips = work_out(3847, 6, rng, slip_rate=0.3)
        tokens = text.replace(demo.BOX, "A")
        assert len(tokens) == len(slips)
        answer = last_boxed(text)
        if not any(slips):
            assert int(answer) == 3847 * 6
        wrong += int(answer) != 3847 * 6
        steps = tokens.partition("A")[0].split()
        for step, later in itertools.pairwise(steps):
            carried = later.partition("+")[2][0] == step[-2]
            position = tokens.index(later) + later.index("+") + 1
            assert carried or slips[position]
    assert 100 < wrong < 280


def test_it_is_built_once_and_shares_no_problem_with_its_warm_start(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = []

    def warm_start(model, tokenizer, numbers, *_):
        seen.extend(numbers)

    monkeypatch.setattr(demo, "warm_start", warm_start)
    config = demo.find_demo(demo_config(), Accelerator(cpu=True))
    again = demo.find_demo(demo_config(model="mine"), Accelerator(cpu=True))
    assert list((tmp_path / "opsd_train").iterdir()) == [Path(config.model)]
    assert (again.model, again.data) == ("mine", config.data)

    questions = {p.question for p in load_problems(config)}
    warm = {f"{a}*{b}=?" for a, b in seen}
    assert [len(questions), len(warm), len(questions | warm)] == [8512, 63488, 72000]
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    problem = make_problem(3847, 6)
    ids = tokenizer(problem.solution)["input_ids"]
    assert (len(ids), tokenizer.decode(ids)) == (len(problem.solution) - 6, problem.solution)


# Runs


def test_the_preset_has_the_texts_of_the_warm_start():
    config = demo_config()
    assert config.student_template == STUDENT_TEMPLATE
    assert config.teacher_template == TEACHER_TEMPLATE


def test_dry_run_makes_no_run_folder(tmp_path):
    log, cache = tmp_path / "log", tmp_path / "cache"
    options = ["--dry-run", "--output-dir", tmp_path / "run"]
    said = run(log, *options, before=do_not_warm_start, XDG_CACHE_HOME=str(cache))
    assert "<reference>" in said
    assert "One step: JSD(β=0.5 on the teacher)" in said
    assert sorted(tmp_path.iterdir()) == [cache, log]


def test_an_unwritable_cache_is_noticed_at_once(tmp_path):
    (tmp_path / "cache").write_text("a file")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    said = run(tmp_path / "log", "--output-dir", tmp_path / "run", status=1, **cache)
    assert "set XDG_CACHE_HOME" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def check_what_is_left(run: Path, **changed: object) -> dict:
    """Files of a run of the demo with some changed options agree with one another; its summary."""
    asked = parse([str(run / "config.yaml")])
    assert asked == demo_config(output_dir=str(run), model=asked.model, data=asked.data, **changed)
    summary = json.loads((run / "summary.json").read_text())
    low, high = summary["student_after"]["interval_95"]
    assert low <= summary["student_after"]["accuracy"] < high
    assert set(summary["seconds"]) >= {"rollout", "score", "loss", "step", "evaluate", "total"}
    assert (run / "config.yaml").read_text().startswith("# JSD(β=0.5 on the teacher)\n")
    assert [m["step"] for m in metrics(run) if "loss" in m] == list(range(1, asked.steps + 1))
    after = completions_of(run, "held-out", asked.steps)
    assert sum(c["correct"] for c in after) == summary["student_after"]["correct"]
    taught = completions_of(run, "teacher", 0)
    accuracy = sum(c["correct"] for c in taught) / len(taught)
    assert summary["teacher_accuracy"] == pytest.approx(accuracy, abs=1e-4)
    return summary


def completions_of(run: Path, phase: str, step: int) -> list[dict]:
    lines = (run / "completions.jsonl").read_text().splitlines()
    return [c for c in map(json.loads, lines) if (c["phase"], c["step"]) == (phase, step)]


def model_of(run: Path, cache: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The adapter, loaded as PEFT loads one, and the tokenizer that is cached with the model."""
    (cached,) = (cache / "opsd_train").iterdir()
    model = AutoModelForCausalLM.from_pretrained(cached)
    return PeftModel.from_pretrained(model, run / "adapter"), AutoTokenizer.from_pretrained(cached)


def test_a_demo_in_little(tmp_path):
    """Without the warm start, and few steps: what it leaves; and it is not overwritten."""
    output, cache = tmp_path / "run", tmp_path / "cache"
    arguments = ["--steps", 3, "--held-out", 4, "--output-dir", output]
    environment = {"XDG_CACHE_HOME": str(cache)}
    said = run(tmp_path / "log", *arguments, before=do_not_warm_start, **environment)
    assert "Building the demo's model" in said
    assert "Held-out problems, teacher, who sees the solution: 0.0%" in said
    summary = check_what_is_left(output, steps=3, held_out=4)
    model, _ = model_of(output, cache)
    assert any(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)

    said = run(tmp_path / "log", *arguments, status=1, **environment)
    assert "holds a run already" in said
    assert "Traceback" not in said
    assert json.loads((output / "summary.json").read_text()) == summary


def test_interrupted_a_run_keeps_what_it_has(tmp_path):
    output = tmp_path / "run"
    process = start(
        tmp_path / "log",
        *("--steps", 9999, "--held-out", 4, "--output-dir", output),
        before=do_not_warm_start,
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    wait_for(lambda: steps_done(output) >= 3)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert "Traceback" not in (tmp_path / "log").read_text()
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert last_step(output) == rows[-1]["step"]


@pytest.mark.slow
def test_the_demo_learns(tmp_path):
    """`python -m opsd_train` as a newcomer starts it, whole."""
    output, cache = tmp_path / "run", tmp_path / "cache"
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "opsd_train", "--output-dir", output]
    subprocess.run(command, env=environment, cwd=REPOSITORY, check=True)
    summary = check_what_is_left(output)
    assert summary["student_before"]["accuracy"] <= 0.30
    assert summary["student_after"]["accuracy"] >= 0.75
    assert summary["teacher_accuracy"] >= 0.85

    rates = [m["learning_rate"] for m in metrics(output) if "loss" in m]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(5e-4)
    assert 0 < rates[-1] < 2e-5

    # The adapter is the trained student.
    model, tokenizer = model_of(output, cache)
    problems = [Problem(f"{a}*7=?", "", str(a * 7)) for a in range(1234, 1334)]
    sampler = GenerateSampler(model, tokenizer, Sampling(1.1, 56))
    context = Context(tokenizer, STUDENT_TEMPLATE)
    rollout = roll_out(sampler, context, problems, seeds=list(range(100)))
    with MathGrader() as grader:
        assert sum(c.correct for c in grade(tokenizer, rollout, grader)) >= 75


def test_curves(tmp_path):
    """Losses of the steps that were taken, and accuracies with the teacher's beside them."""
    rows = [
        {"step": 0, "accuracy": 0.2, "interval_95": (0.1, 0.3), "teacher_accuracy": 0.9},
        {"step": 1, "loss": 0.5, "skipped": False},
        {"step": 2, "loss": None, "skipped": True},
        {"step": 3, "loss": 0.25, "skipped": False},
        {"step": 3, "accuracy": 0.6, "interval_95": (0.5, 0.7)},
    ]
    (tmp_path / "config.yaml").write_text("# JSD\nmodel: x\n")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with saved_figures() as figures:
        draw(tmp_path, tmp_path / "demo.png")
    left, right = figures["demo.png"].axes
    assert [line.get_xydata().tolist() for line in left.get_lines()] == [[[1, 0.5], [3, 0.25]]]
    assert left.get_title(loc="left") == "Loss: JSD"
    student, teacher = right.get_lines()
    assert student.get_xydata().tolist() == [[0, 0.2], [3, 0.6]]
    assert list(teacher.get_ydata()) == [0.9, 0.9]
    assert [text.get_text() for text in right.get_legend().get_texts()] == [
        "student, alone",
        "teacher, sees the solution",
    ]
