"""The training harness: rows aligned, teacher unmoved, run folder complete, and that it learns."""

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

pytest.importorskip("peft")
pytest.importorskip("transformers")

from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd_train import tiny_world
from opsd_train.checkpoint import last_step
from opsd_train.config import make_config, parse
from opsd_train.evaluate import Accuracy, grade
from opsd_train.model import adapter_weights, base_model, base_weights_sha256
from opsd_train.objective import opsd_loss, token_weights
from opsd_train.prompts import Context
from opsd_train.records import Rollout, Scores
from opsd_train.report import RunFolder
from opsd_train.rollout import GenerateSampler, Sampling, roll_out
from opsd_train.score import score
from opsd_train.setup import Setup, set_up
from opsd_train.tiny_world import (
    DEMO,
    STUDENT_TEMPLATE,
    build_model,
    build_tokenizer,
    is_correct,
    make_problem,
    work_out,
)


def demo_config(**options):
    return make_config({**DEMO, **options})


@pytest.fixture
def tiny() -> Setup:
    """A randomly initialised model with an adapter that does something, its tokenizer, problems of
    different lengths."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    problems = [make_problem(a, b) for a, b in [(1234, 5), (7, 6), (98, 3), (31415, 9)]]
    setup = set_up(
        demo_config(lora_rank=4, lora_alpha=8),
        Accelerator(cpu=True),
        build_model(tokenizer),
        tokenizer,
        problems,
        is_correct,
    )
    for name, weight in adapter_weights(setup.model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return setup


def sampled(tiny: Setup, temperature: float, max_new_tokens: int, problems=None) -> Rollout:
    sampler = GenerateSampler(tiny.model, tiny.tokenizer, Sampling(temperature, max_new_tokens))
    problems = problems or tiny.problems
    return roll_out(sampler, tiny.contexts.student, problems, seeds=list(range(len(problems))))


def scored(tiny: Setup, rollout: Rollout) -> Scores:
    return score(tiny.backbone, tiny.teacher, tiny.contexts.teacher, rollout)


def loss_of(tiny: Setup, scores: Scores, **options) -> torch.Tensor:
    weights = token_weights(scores.lengths, "rollout", len(scores.lengths), len(scores.tokens))
    loss, _ = opsd_loss(scores, tiny.W, demo_config(**options), weights)
    return loss


# The world


def test_worked_solutions_are_right():
    problem = make_problem(3847, 6)
    assert problem.question == "3847*6=?"
    assert problem.solution == "7*6+0=42 4*6+4=28 8*6+2=50 3*6+5=23 <answer>23082"
    for a, b in [(1000, 2), (9999, 9), (1005, 4)]:
        problem = make_problem(a, b)
        assert int(problem.solution.partition("<answer>")[2]) == a * b
        assert is_correct(problem, problem.solution + "<end>")


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
    assert is_correct(problem, "anything<answer>23082<end>")
    for text in [
        "",
        "<answer>23082",
        "23082<end>",
        "<answer>23083<end>",
        "<answer>23082<end>7<end>",
    ]:
        assert not is_correct(problem, text)


def test_problems_are_disjoint(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen = []
    monkeypatch.setattr(
        tiny_world, "warm_start", lambda model, tokenizer, numbers, *_: seen.extend(numbers)
    )
    world = tiny_world.load_world(seed=3)
    questions = [{p.question for p in part} for part in (world.held_out, world.train)]
    questions.append({f"{a}*{b}=?" for a, b in seen})
    assert [len(q) for q in questions] == [512, 8000, 63488]
    assert len(set.union(*questions)) == 72000


def test_world_is_cached_and_loaded_from_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(tiny_world, "warm_start", lambda *_: calls.append(1))
    first = tiny_world.load_world(seed=0)
    again = tiny_world.load_world(seed=0)
    assert calls == [1]
    assert list((tmp_path / "opsd_train").iterdir()) == [tiny_world.cache_path(0)]
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name])
    assert (
        again.tokenizer("<problem>12*3=?")["input_ids"]
        == first.tokenizer("<problem>12*3=?")["input_ids"]
    )
    tiny_world.load_world(seed=1)
    assert calls == [1, 1]


# A step


def test_row_n_predicts_token_n(tiny):
    """Off by one here trains nonsense quietly. Recomputed sequence by sequence, without padding,
    from the model's full logits."""
    model, W = tiny.model, tiny.W
    rollout = sampled(tiny, temperature=1.2, max_new_tokens=20)
    assert len({len(c) for c in rollout.completions}) > 1, "the test wants ragged completions"
    assert len({len(p) for p in rollout.prompts}) > 1, "the test wants ragged prompts"
    scores = scored(tiny, rollout)

    expected = {"student": [], "teacher": []}
    for problem, completion in zip(rollout.problems, rollout.completions, strict=True):
        for who in ("student", "teacher"):
            (prompt_ids,) = getattr(tiny.contexts, who).token_ids([problem])
            ids = torch.tensor([prompt_ids + completion])
            with torch.no_grad():
                if who == "teacher":
                    with model.disable_adapter():
                        logits = model(input_ids=ids).logits
                else:
                    logits = model(input_ids=ids).logits
            log_probs = logits[0, :-1].log_softmax(-1)
            predicted = log_probs[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
            expected[who].append(predicted[-len(completion) :])
    for h, who in ((scores.h_student, "student"), (scores.h_teacher, "teacher")):
        log_probs = (h @ W.T).log_softmax(-1).gather(1, scores.tokens[:, None]).squeeze(1)
        torch.testing.assert_close(log_probs, torch.cat(expected[who]), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores.h_student, scores.h_teacher, atol=1e-2)


def test_token_ids_are_never_re_encoded(tiny, monkeypatch):
    """A completion whose text would be read back differently keeps the ids that were sampled."""
    tokenizer, problems = tiny.tokenizer, tiny.problems[:1]
    odd = [tokenizer.pad_token_id, 9, tokenizer.pad_token_id, 8, tokenizer.eos_token_id]
    rollout = Rollout(problems, tiny.contexts.student.token_ids(problems), [odd], [True])
    monkeypatch.setattr(type(tokenizer), "decode", None)
    monkeypatch.setattr(type(tokenizer), "batch_decode", None)
    assert scored(tiny, rollout).tokens.tolist() == odd


def test_objective_is_the_mean_over_tokens_then_rollouts(tiny):
    W = tiny.W
    rollout = sampled(tiny, temperature=1.2, max_new_tokens=20)
    scores = scored(tiny, rollout)
    log_p = (scores.h_student @ W.T / 1.2).log_softmax(-1)
    log_q = (scores.h_teacher @ W.T / 1.2).log_softmax(-1)
    log_m = (0.5 * log_p.exp() + 0.5 * log_q.exp()).log()
    jsd = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)
    rollouts = jsd.split([len(c) for c in rollout.completions])
    expected = torch.stack([r.mean() for r in rollouts]).mean()
    loss = loss_of(tiny, scores, temperature=1.2)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-7)


def test_gradient_reaches_the_adapter_and_nothing_else(tiny):
    model = tiny.model
    before = base_weights_sha256(model)
    scores = scored(tiny, sampled(tiny, temperature=1.0, max_new_tokens=8))
    assert not scores.h_teacher.requires_grad
    loss_of(tiny, scores).backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and weight.grad.any()) == ("lora_" in name), name
    torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1.0).step()
    assert base_weights_sha256(model) == before
    with torch.no_grad():
        next(w for n, w in base_model(model).named_parameters() if "base_layer" in n)[0, 0] += 1e-6
    assert base_weights_sha256(model) != before


def test_completions_stop_at_the_end_of_text(tiny):
    tokenizer = tiny.tokenizer
    rollout = sampled(tiny, temperature=1.2, max_new_tokens=12, problems=tiny.problems * 4)
    for completion, finished in zip(rollout.completions, rollout.finished, strict=True):
        assert (completion[-1] == tokenizer.eos_token_id) == finished
        assert tokenizer.eos_token_id not in completion[:-1]
        assert finished or len(completion) == 12
    graded = grade(tokenizer, rollout, is_correct)
    prompts = [tiny.contexts.student.text(p) for p in tiny.problems * 4]
    assert [g.prompt for g in graded] == prompts


# Around the run


def test_wilson_interval():
    low, high = Accuracy(50, 100).interval
    assert low == pytest.approx(0.4038, abs=1e-4)
    assert high == pytest.approx(0.5962, abs=1e-4)
    assert Accuracy(0, 10).interval[0] < 1e-12
    assert Accuracy(10, 10).interval[1] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "1.5"], "beta must lie in [0, 1], got 1.5"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--temperature", "0"], "temperature must be positive"),
        (["--learning-rate", "-1"], "learning_rate must be positive and finite, got -1.0"),
        (["--eval-problems", "513"], "eval_problems must be at most 512, got 513"),
        (["--entry-clip", "0"], "entry_clip must be positive"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--max-tokens", "9"], "--max-tokens; did you mean --max-new-tokens?"),
        (["--steps", "many"], "steps must be a whole number, got 'many'"),
    ],
)
def test_bad_options_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    first = RunFolder(tmp_path)
    RunFolder(tmp_path)  # one that never began is in nobody's way
    first.begin({"seed": 0}, "a loss")
    first.write_metrics(step=1)
    with pytest.raises(
        FileExistsError, match=r"holds a run already \(config.yaml, metrics.jsonl\)"
    ):
        RunFolder(tmp_path)
    second = RunFolder(tmp_path, overwrite=True)
    assert (tmp_path / "metrics.jsonl").exists(), "nothing is lost before the new run begins"
    second.begin({"seed": 1}, "a loss")
    (tmp_path / "config.yaml").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(NotADirectoryError, match="not a folder"):
        RunFolder(tmp_path / "mine.txt")


def start_opsd_train(*arguments: str, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "opsd_train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
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
    (world,) = (tmp_path / "cache" / "opsd_train").iterdir()
    tokenizer = AutoTokenizer.from_pretrained(world)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world), run / "adapter")
    numbers = [re.findall(r"\d+", c["prompt"]) for c in after[:100]]
    problems = [make_problem(int(a), int(b)) for a, b in numbers]
    sampler = GenerateSampler(model, tokenizer, Sampling(1.0, 56))
    context = Context(tokenizer, STUDENT_TEMPLATE)
    rollout = roll_out(sampler, context, problems, seeds=list(range(100)))
    assert sum(c.correct for c in grade(tokenizer, rollout, is_correct)) >= 75

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
