"""Whole runs of a preset shrunk to a tiny Qwen3 on the disk: what they write, killed and resumed,
on several processes, and how they end when they cannot go on."""

import importlib.util
import json
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import safetensors.torch
import tiny_qwen3
from peft import PeftModel
from training_runs import (
    REPOSITORY,
    die_at_change,
    have_no_room_for_the_model,
    let_no_file_grow,
    lose_the_loss,
    processes,
    run,
    run_distributed,
    run_out_of_memory,
    start,
    wait_for,
)
from transformers import AutoModelForCausalLM

from opsd_train import report
from opsd_train.checkpoint import FOLDER, Checkpoint, copy_adapter, last_checkpoint, save_checkpoint
from opsd_train.failures import StopRequest

COST = ("seconds", "tokens_per_second", "peak_memory_mib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    tiny_qwen3.save_qwen3(path / "model")
    tiny_qwen3.save_problems(path / "problems.jsonl")
    return path


def shrunk(folder: Path, output: Path, *options: object, preset: str = "4b-paper") -> list[object]:
    """The command line of a preset made small, by options alone."""
    return [
        REPOSITORY / "configs" / f"qwen3-{preset}.yaml",
        *("--model", folder / "model", "--data", folder / "problems.jsonl"),
        *("--dtype", "float32", "--lora-rank", 4, "--lora-alpha", 8),
        *("--max-prompt-tokens", 512, "--max-new-tokens", 6),
        *("--steps", 6, "--batch-size", 4, "--micro-batch-size", 2, "--learning-rate", 0.01),
        *("--save-every", 2, "--keep-last", 2, "--output-dir", output),
        *options,
    ]


def metrics(output: Path) -> list[dict]:
    """All that should not depend on when a run is made."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in row.items() if name not in COST} for row in rows]


def contents(output: Path) -> tuple:
    """All that an interruption must not change."""
    adapter = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    return metrics(output), (output / "completions.jsonl").read_text(), adapter


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run(output.with_suffix(".log"), *shrunk(folder, output))
    return output


def test_a_preset_shrunk_by_options_alone(folder, undisturbed):
    said = undisturbed.with_suffix(".log").read_text()
    for line in [
        f"Loading {folder / 'problems.jsonl'} and {folder / 'model'} ...",
        "Data: 19 problems of",
        "1 dropped, with a prompt of more than 512 tokens",
        "Model: Qwen3 with 25,312 parameters in torch.float32, sdpa attention, on cpu",
        "Loss: JSD(β=0.5 on the teacher), temperature 1.2, mean over each rollout, then the batch",
        "(processes × micro-batches × at most so many rollouts: 1 × 2 × 2)",
        "Schedule: 6 steps, 24 rollouts; learning rate up to 0.01 over 1 steps, then cosine",
        "Hashing the base weights",
        "The base weights, which are the teacher, did not move",
    ]:
        assert line in said
    # Without a terminal, a line a step.
    told = re.findall(r"OPSD: (\d)/6  loss \S+  forward KL \S+  length \d  truncated \d+%", said)
    assert told == ["1", "2", "3", "4", "5", "6"]
    rows = metrics(undisturbed)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["loss"] > 0
        assert row["forward_kl"] > 0
        assert row["reverse_kl"] > 0
        assert 0 < row["entropy_student"] < 4.7
        assert 0 < row["entropy_teacher"] < 4.7
        assert row["clipped_share"] == 0
        assert row["grad_norm"] > 0
        assert row["skipped"] is False
        assert 4 <= row["tokens"] <= 24
        assert row["length_mean"] == row["tokens"] / 4
        assert row["finished"] + row["truncated"] == 1
    first = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[0])
    assert set(first["seconds"]) == {"rollout", "score", "loss", "backward", "step"}
    assert set(first["tokens_per_second"]) == set(first["seconds"])
    assert first["peak_memory_mib"] > 0
    steps = sorted(path.name for path in (undisturbed / FOLDER).iterdir())
    assert steps == ["step-000004", "step-000006"]
    completions = (undisturbed / "completions.jsonl").read_text().splitlines()
    assert len(completions) == 24
    # The adapter and a checkpoint's are what PEFT loads.
    for adapter in (undisturbed / "adapter", undisturbed / FOLDER / "step-000006"):
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "model"), adapter
        )
        weights = dict(model.named_parameters())
        saved = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
        assert len(saved) == 28
        for name, value in saved.items():
            assert torch.equal(weights[name.replace(".weight", ".default.weight")], value)
            assert value.any()  # B begins at 0


# Killed and resumed


def test_killed_at_changes_to_the_disk(folder, undisturbed, tmp_path):
    """Each run goes on from what the last one left, and is killed two changes of a file later."""
    output, kills = tmp_path / "run", 0
    while True:
        process = start(
            tmp_path / "log",
            *shrunk(folder, output, "--resume"),
            before=partial(die_at_change, 2 * kills + 1, output),
        )
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        kills += 1
    assert kills > 8
    assert contents(output) == contents(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_between_changes(folder, undisturbed, tmp_path, number):
    output = tmp_path / "run"
    for step, later in [(1, 0.0), (3, 0.05), (4, 0.11)]:
        process = start(tmp_path / "log", *shrunk(folder, output, "--resume"))
        wait_for(lambda at=step, p=process: steps_done(output) >= at or p.exitcode is not None)
        time.sleep(later)
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode in (0, -number, 128 + number), (tmp_path / "log").read_text()
    run(tmp_path / "log", *shrunk(folder, output, "--resume"))
    assert contents(output) == contents(undisturbed)


def test_asked_to_stop_a_run_saves_what_it_did(folder, tmp_path):
    output = tmp_path / "run"
    process = start(tmp_path / "log", *shrunk(folder, output, "--steps", 9999))
    wait_for(lambda: steps_done(output) >= 2)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    last = metrics(output)[-1]["step"]
    assert last_checkpoint(output).step == last
    assert f"stopped after step {last}" in (tmp_path / "log").read_text()


@pytest.fixture
def ended():
    """Signals that reach what was there before a `StopRequest`."""
    seen: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {n: signal.signal(n, lambda number, frame: seen.append(number)) for n in numbers}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def test_sigterm_passed_on_by_a_launcher_is_one_request(ended):
    with StopRequest() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert (stop.signal, ended) == (signal.SIGTERM, [])
        stop.time -= 9  # seconds later it is another request
        signal.raise_signal(signal.SIGTERM)
    assert ended == [signal.SIGTERM]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_is_a_request_of_its_own(ended, first):
    with StopRequest():
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)
    assert ended == [signal.SIGINT]


def steps_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_line_cut_short_is_written_again(folder, undisturbed, tmp_path):
    output = tmp_path / "run"
    die = partial(die_at_change, 30, output)
    run(tmp_path / "log", *shrunk(folder, output), status=-signal.SIGKILL, before=die)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    # As asked for in its own folder.
    run(tmp_path / "log", output / "config.yaml", "--resume")
    assert contents(output) == contents(undisturbed)


def test_a_resumed_run_asks_for_the_same(folder, undisturbed, tmp_path):
    other = shrunk(folder, undisturbed, "--resume", "--beta", "0")
    said = run(tmp_path / "log", *other, status=1)
    assert "beta was 0.5 in the run to resume, and is 0.0 now" in said
    said = run(tmp_path / "log", *shrunk(folder, undisturbed), status=1)
    assert "go on with --resume, or replace the run with --overwrite" in said
    before = contents(undisturbed)
    finished = shrunk(folder, undisturbed, "--resume", "--micro-batch-size", 4)
    assert "Resumed after step 6." in run(tmp_path / "log", *finished)
    assert contents(undisturbed) == before


def test_resume_removes_no_results(folder, undisturbed, tmp_path):
    """A finished run whose checkpoints someone has deleted."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    shutil.rmtree(output / FOLDER)
    for options in (["--resume"], ["--resume", "--beta", "0"]):
        said = run(tmp_path / "log", *shrunk(folder, output, *options), status=1)
        assert "no whole checkpoint to go on from" in said
        assert "(adapter, summary.json)" in said
    assert contents(output) == contents(undisturbed)


def test_resumed_before_the_first_checkpoint_a_run_asks_for_the_same(tmp_path):
    report.RunFolder(tmp_path).begin({"beta": 0.5}, "")
    folder = report.RunFolder(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"beta was 0\.5 in the run to resume, and is 0 now"):
        folder.begin({"beta": 0}, "")
    folder.begin({"beta": 0.5}, "")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config\.yaml does not say what the run to resume was"):
        folder.begin({"beta": 0.5}, "")


def test_rollouts_at_once_are_free_but_for_continuous_batching(tmp_path):
    report.RunFolder(tmp_path).begin({"engine": "generate", "rollout_batch_size": 2}, "")
    folder = report.RunFolder(tmp_path, resume=True)
    folder.begin({"engine": "generate", "rollout_batch_size": 4}, "")
    folder = report.RunFolder(tmp_path, overwrite=True)
    folder.begin({"engine": "continuous", "rollout_batch_size": 2}, "")
    folder = report.RunFolder(tmp_path, resume=True)
    with pytest.raises(ValueError, match="rollout_batch_size was 2 in the run to resume"):
        folder.begin({"engine": "continuous", "rollout_batch_size": 4}, "")


def test_a_run_that_replaced_another_resumes_from_its_own_config(folder, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "metrics.jsonl").write_text("")
    run(tmp_path / "log", *shrunk(folder, output, "--overwrite", "--steps", 1))
    said = run(tmp_path / "log", output / "config.yaml", status=1)
    assert "holds a run already" in said
    said = run(tmp_path / "log", output / "config.yaml", "--resume")
    assert "Resumed after step 1." in said


# Checkpoints


def checkpoint(step: int) -> Checkpoint:
    tensors = {"w": torch.full([5], float(step))}
    return Checkpoint(step, tensors, tensors, {})


def save_and_die(folder: Path, number: int) -> None:
    die_at_change(number, folder)
    save_checkpoint(folder, checkpoint(2), "{}", keep_last=1)


def test_a_checkpoint_is_there_whole_or_not(tmp_path):
    found = []
    for number in range(1, 40):
        folder = tmp_path / str(number)
        save_checkpoint(folder, checkpoint(1), "{}", keep_last=1)
        process = processes().Process(target=save_and_die, args=(folder, number))
        process.start()
        process.join()
        last = last_checkpoint(folder)
        assert torch.equal(last.adapter["w"], checkpoint(last.step).adapter["w"])
        assert torch.equal(last.optimizer["w"], checkpoint(last.step).optimizer["w"])
        found.append(last.step)
        save_checkpoint(folder, checkpoint(3), "{}", keep_last=1)
        assert [path.name for path in (folder / FOLDER).iterdir()] == ["step-000003"]
        if process.exitcode == 0:
            break
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_a_torn_checkpoint_is_not_loaded(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step), "{}", keep_last=2)
    torn = tmp_path / FOLDER / "step-000002" / "optimizer.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    assert last_checkpoint(tmp_path).step == 1
    save_checkpoint(tmp_path, checkpoint(2), "{}", keep_last=2)
    assert last_checkpoint(tmp_path).step == 2
    state = tmp_path / FOLDER / "step-000002" / "state.json"
    for text in ("", "{}", "[]", '{"bytes": 3}'):
        state.write_text(text)
        assert last_checkpoint(tmp_path).step == 1
    state.unlink()
    assert last_checkpoint(tmp_path).step == 1


def test_an_adapter_is_there_whole_or_not(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), "{}", keep_last=1)
    for number in range(1, 20):
        process = processes().Process(target=copy_and_die, args=(tmp_path, number))
        process.start()
        process.join()
        if (tmp_path / "adapter").exists():
            safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
            assert (tmp_path / "adapter" / "adapter_config.json").read_text() == "{}"
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", FOLDER]


def copy_and_die(folder: Path, number: int) -> None:
    die_at_change(number, folder)
    copy_adapter(folder, folder / "adapter")


# Several processes


@pytest.mark.parametrize(
    ("options", "tied"),
    [
        (["--mean", "rollout"], False),
        (["--mean", "token", "--teacher", "ema"], False),
        (["--shard", "--mean", "rollout"], True),
        (["--shard", "--mean", "token", "--teacher", "ema"], False),
    ],
    ids=["data parallel", "data parallel, ema", "sharded, tied", "sharded, ema"],
)
def test_two_processes_are_one(folder, tmp_path, options, tied):
    """1 process x 8 at once, and 2 processes x 2 micro-batches x 2: the same rollouts, losses,
    gradients and weights, but for the rounding of sums in another order."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*options, "--batch-size", 8, "--steps", 4]
    if tied:
        options += ["--model", tiny_qwen3.save_qwen3(tmp_path / "tied", tie_word_embeddings=True)]
    alone = [option for option in options if option != "--shard"]
    run(tmp_path / "log", *shrunk(folder, one, *alone, "--micro-batch-size", 8))
    distributed = shrunk(folder, two, *options, "--micro-batch-size", 2)
    run_distributed(tmp_path / "log", *distributed)
    assert "so many rollouts: 2 × 2 × 2)" in (tmp_path / "log.0").read_text()
    assert (tmp_path / "log.1").read_text() == ""
    assert (one / "completions.jsonl").read_text() == (two / "completions.jsonl").read_text()
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    mine, theirs = (
        safetensors.torch.load_file(path / "adapter" / "adapter_model.safetensors")
        for path in (one, two)
    )
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5)

    # And they can go on from an earlier step.
    before = contents(two)
    shutil.rmtree(two / FOLDER / "step-000004")
    run_distributed(tmp_path / "log", *distributed, "--resume")
    assert "Resumed after step 2." in (tmp_path / "log.0").read_text()
    assert contents(two) == before


def test_launches_that_do_not_fit_are_refused(folder, tmp_path):
    # Before the model is loaded, which may take minutes.
    options = shrunk(folder, tmp_path / "run", "--shard", "--model", tmp_path / "nowhere")
    said = run(tmp_path / "log", *options, status=1)
    assert "shard spreads weights over several processes; there is only one" in said
    options = shrunk(folder, tmp_path / "run", "--batch-size", 3)
    run_distributed(tmp_path / "log", *options, status=1)
    said = (tmp_path / "log.0").read_text()
    assert "batch_size must be a multiple of the 2 processes, got 3" in said


# What can go wrong


def test_a_step_without_a_finite_loss_is_skipped(folder, undisturbed, tmp_path):
    output = tmp_path / "run"
    said = run(
        tmp_path / "log", *shrunk(folder, output), before=partial(lose_the_loss, range(5, 6))
    )
    assert "skipped 1" in said
    rows = metrics(output)
    assert [row["skipped"] for row in rows] == [False, False, True, False, False, False]
    assert rows[2]["loss"] is None
    assert rows[2]["grad_norm"] is None
    # Not taken: the fourth step starts where the third did.
    before = metrics(undisturbed)
    assert rows[:2] == before[:2]
    assert rows[3]["loss"] != before[3]["loss"]
    assert all(row["loss"] > 0 for row in rows[3:])


def test_a_loss_that_stays_lost_ends_the_run(folder, tmp_path):
    output = tmp_path / "run"
    lost = partial(lose_the_loss, range(4, 99))
    said = run(tmp_path / "log", *shrunk(folder, output), status=1, before=lost)
    assert "not finite in 3 steps one after the other" in said
    assert "Traceback" not in said
    assert metrics(output)[-1]["step"] == 5
    (batch,) = json.loads((output / "failed_batch.json").read_text())
    assert len(batch["prompts"]) == len(batch["completions"]) == 4
    saved = last_checkpoint(output)
    assert saved.step == 5
    for weight in saved.adapter.values():
        assert weight.isfinite().all()


def test_a_full_disk_costs_nothing_but_time(folder, undisturbed, tmp_path):
    output = tmp_path / "run"
    full = partial(let_no_file_grow, 20_000)
    said = run(tmp_path / "log", *shrunk(folder, output), status=1, before=full)
    assert "no room left in" in said
    assert "lower --keep-last, and go on with --resume" in said
    assert "Traceback" not in said
    assert list((output / FOLDER).iterdir()) == []
    run(tmp_path / "log", *shrunk(folder, output, "--resume"))
    assert contents(output) == contents(undisturbed)


def test_out_of_memory_names_the_remedy(folder, undisturbed, tmp_path):
    output = tmp_path / "run"
    out_of_memory = partial(run_out_of_memory, 7)
    said = run(
        tmp_path / "log",
        *shrunk(folder, output, "--save-every", 99),
        status=1,
        before=out_of_memory,
    )
    assert "out of memory in the score phase: lower --micro-batch-size" in said
    assert "Traceback" not in said
    assert last_checkpoint(output).step == 3
    run(tmp_path / "log", *shrunk(folder, output, "--resume", "--micro-batch-size", 1))
    for a, b in zip(metrics(output), metrics(undisturbed), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_a_model_without_room_names_the_remedy(folder, tmp_path):
    options = shrunk(folder, tmp_path / "run")
    said = run(tmp_path / "log", *options, status=1, before=have_no_room_for_the_model)
    assert "take a smaller one, or a larger card. (tried to allocate 2.00 GiB)" in said
    assert "Traceback" not in said


def test_bad_data_ends_before_anything_is_written(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"problem": "x", "solution": 4}')
    output = tmp_path / "run"
    options = shrunk(folder, output, "--data", tmp_path / "rows.jsonl")
    said = run(tmp_path / "log", *options, status=1)
    assert "rows.jsonl, line 1: column solution must hold text" in said
    assert "Traceback" not in said
    assert list(output.iterdir()) == []


def test_a_tracker_that_is_not_installed(folder, tmp_path):
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    options = shrunk(folder, tmp_path / "run", "--tracker", "trackio")
    said = run(tmp_path / "log", *options, status=1)
    assert "install it with `pip install trackio`" in said
    assert not (tmp_path / "run").exists()


def test_a_tracker_is_told_every_number(tmp_path, monkeypatch):
    told = []

    class Tracker:
        def __init__(self, name):
            told.append(name)

        def start(self):
            told.append("start")

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("finish")

    monkeypatch.setitem(report.TRACKERS, "wandb", Tracker)
    folder = report.RunFolder(tmp_path)
    folder.track("wandb", {"beta": 0.5, "where": {"a": 1}})
    folder.write_metrics(step=3, loss=0.25, seconds={"rollout": 1.5}, interval=[1, 2])
    folder.write_summary()
    assert told == [
        *("opsd", "start", {"beta": 0.5, "where": "{'a': 1}"}),
        (3, {"step": 3, "loss": 0.25, "seconds/rollout": 1.5}),
        "finish",
    ]


# Teachers, engines and objectives, whole


@pytest.mark.parametrize(
    "options",
    [
        ["--teacher", "ema", "--ema-decay", 0.5],
        ["--objective", "sampled_token", "--advantage-clip", 5],
    ],
)
def test_resumed_with_other_options(folder, tmp_path, options):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(tmp_path / "log", *shrunk(folder, whole, *options))
    die = partial(die_at_change, 32, killed)
    arguments = shrunk(folder, killed, *options)
    run(tmp_path / "log", *arguments, status=-signal.SIGKILL, before=die)
    assert last_checkpoint(killed).step in (2, 4)
    run(tmp_path / "log", *arguments, "--resume")
    assert contents(killed) == contents(whole)


def test_the_authors_preset(folder, tmp_path):
    options = shrunk(folder, tmp_path / "run", "--entry-clip", 1e-3, preset="4b-authors-2026-05")
    said = run(tmp_path / "log", *options)
    assert "Loss: forward KL(teacher‖student), entries clipped at 0.001, temperature 1.1" in said
    for row in metrics(tmp_path / "run"):
        assert row["clipped_share"] > 0
        assert row["learning_rate"] == 0.01
    rows = [
        json.loads(x) for x in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    ]
    assert all(row["prompt"].endswith("<think>\n\n</think>\n\n") for row in rows)
    assert {row["correct"] for row in rows} == {None}
