"""Whole runs of a preset shrunk to a tiny Qwen3 on the disk: what they write, killed and resumed,
on several processes. How they end when they cannot go on is in test_train_failures.py."""

import json
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import tiny_qwen3
import torch
from peft import PeftModel
from training_runs import (
    contents,
    die_at_change,
    metrics,
    processes,
    run,
    run_distributed,
    shrunk,
    start,
    steps_done,
    wait_for,
)
from transformers import AutoModelForCausalLM

from opsd_train.export import export
from opsd_train.models import load_tokenizer
from opsd_train.run import RunFolder
from opsd_train.run import folder as room
from opsd_train.run.checkpoint import (
    FOLDER,
    Checkpoint,
    broken_checkpoints,
    copy_adapter,
    last_checkpoint,
    save_checkpoint,
)
from opsd_train.run.loop import warn_of_truncation


def test_a_preset_shrunk_by_options_alone(folder, undisturbed):
    said = undisturbed.with_suffix(".log").read_text()
    for line in [
        f"Loading the problems of {folder / 'problems.jsonl'} ...",
        f"Loading {folder / 'model'} ...",
        "Data: 19 problems of",
        "1 dropped, with a prompt of more than 512 tokens",
        "Model: Qwen3 with 25,312 parameters in torch.float32, sdpa attention, on cpu",
        "Loss: JSD(β=0.5 on the teacher), temperature 1.2, mean over each rollout, then the batch",
        "(processes × micro-batches × rollouts: 1 × 2 × 2)",
        "Schedule: 6 steps, 24 rollouts; learning rate 0.01, cosine, after 1 steps of warm-up.",
        "The base weights, which are the teacher, did not move",
    ]:
        assert line in said
    # Without a terminal, a line now and then, and one at the end.
    figures = r"OPSD: 6/6, 0:00:00 left  loss \S+  truncated \d+%  length \d  forward KL \S+"
    assert len(re.findall(figures, said)) == 1
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
    assert set(first["seconds"]) == {"rollout", "score", "loss", "backward", "record", "step"}
    assert set(first["tokens_per_second"]) == set(first["seconds"]) - {"record"}
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


def test_an_adapter_is_merged_into_a_new_folder(folder, undisturbed, tmp_path):
    """With the logits of model and adapter; neither is touched."""
    export(undisturbed, tmp_path / "merged")
    ids = torch.arange(3, 60)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = base(input_ids=ids).logits
    expected = PeftModel.from_pretrained(base, undisturbed / "adapter")(input_ids=ids).logits
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2
    assert load_tokenizer(str(tmp_path / "merged")).chat_template == tiny_qwen3.CHAT_TEMPLATE
    assert merged.generation_config.eos_token_id == [2, 0]
    with pytest.raises(FileExistsError, match="is there already; name a new folder"):
        export(undisturbed, folder / "model")
    other = shutil.copytree(undisturbed, tmp_path / "run")
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({**summary, "base_weights_sha256": "0"}))
    with pytest.raises(ValueError, match="the base weights are not those that"):
        export(other, tmp_path / "again")
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        export(folder, tmp_path / "again")


def test_a_model_of_another_family(folder, tmp_path):
    """Gemma 2: tied embeddings, and caps on the logits of its head and its attention."""
    options = {"family": "Gemma2", "attn_logit_softcapping": 5.0}
    model = tiny_qwen3.save_model_and_tokenizer(tmp_path / "model", **options)
    output = tmp_path / "run"
    arguments = shrunk(folder, output, "--model", model, "--steps", 2)
    said = run(tmp_path / "log", *arguments)
    assert re.search(
        r"Model: Gemma2 with [\d,]+ parameters in torch.float32, eager attention", said
    )
    assert "The base weights, which are the teacher, did not move" in said
    for row in metrics(output):
        assert row["loss"] > 0
        assert row["grad_norm"] > 0
        assert row["skipped"] is False
    said = run(tmp_path / "log", *arguments, "--dry-run")
    for line in (
        "Data: 19 problems of",
        "1 dropped, with a prompt of more than 512 tokens",
        "Teacher: initial.",
        "Prompts of the teacher: ",
        "Memory of the loss for 12 tokens and a vocabulary of 104: at most ",
        "A process has 2 a step: about ",
    ):
        assert line in said


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


def test_a_line_cut_short_is_written_again(folder, undisturbed, tmp_path):
    output = tmp_path / "run"
    die = partial(die_at_change, 30, output)
    run(tmp_path / "log", *shrunk(folder, output), status=-signal.SIGKILL, before=die)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    # As asked for in its own folder.
    run(tmp_path / "log", output / "config.yaml", "--resume")
    assert contents(output) == contents(undisturbed)


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
    assert broken_checkpoints(tmp_path) == [torn.parent]
    save_checkpoint(tmp_path, checkpoint(2), "{}", keep_last=2)
    assert last_checkpoint(tmp_path).step == 2
    assert broken_checkpoints(tmp_path) == []
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
    ("options", "model"),
    [
        (["--mean", "rollout"], {}),
        (["--mean", "token", "--teacher", "ema"], {}),
        (["--shard", "--mean", "rollout", "--adapter"], {"tie_word_embeddings": True}),
        (["--shard", "--mean", "token", "--teacher", "ema"], {}),
        (["--shard", "--lora-targets", "q_proj,dense,fc1"], {"family": "Phi"}),
    ],
    ids=[
        "data parallel",
        "data parallel, ema",
        "sharded, tied, adapter",
        "sharded, ema",
        "sharded, Phi",
    ],
)
def test_two_processes_are_one(folder, tmp_path, options, model):
    """1 process x 8 at once, and 2 processes x 2 micro-batches x 2: the same rollouts, losses,
    gradients and weights, but for the rounding of sums in another order."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*options, "--batch-size", 8, "--steps", 4]
    if model:
        path = tiny_qwen3.save_model_and_tokenizer(tmp_path / "model", **model)
        if "--adapter" in options:  # of the rank that `shrunk` asks for
            adapter = tiny_qwen3.save_adapter(path, tmp_path / "adapter", r=4, lora_alpha=8)
            options.insert(options.index("--adapter") + 1, adapter)
        options += ["--model", path]
    alone = [option for option in options if option != "--shard"]
    said = run(tmp_path / "log", *shrunk(folder, one, *alone, "--micro-batch-size", 8))
    distributed = shrunk(folder, two, *options, "--micro-batch-size", 2)
    run_distributed(tmp_path / "log", *distributed)
    assert "rollouts: 2 × 2 × 2)" in (tmp_path / "log.0").read_text()
    assert (tmp_path / "log.1").read_text() == ""
    (parameters,) = re.findall(r"with [\d,]+ parameters", said)
    assert parameters in (tmp_path / "log.0").read_text()
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


# Trackers


def test_a_tracker_is_told_every_number(tmp_path, monkeypatch):
    reported = []

    class Tracker:
        def __init__(self, name):
            reported.append(name)

        def start(self):
            reported.append("start")

        def store_init_configuration(self, values):
            reported.append(values)

        def log(self, values, step):
            reported.append((step, values))

        def finish(self):
            reported.append("finish")

    monkeypatch.setitem(room.TRACKERS, "wandb", Tracker)
    folder = RunFolder(tmp_path)
    folder.track("wandb", {"beta": 0.5, "where": {"a": 1}})
    folder.write_metrics(step=3, loss=0.25, seconds={"rollout": 1.5}, interval=[1, 2])
    folder.write_summary()
    assert reported == [
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


def test_truncation_is_told_once(folder, capsys):
    said = []
    for shares in ([1] * 4, [1] * 5, [1] * 6, [1, 1, 0.5, 1, 1, 1, 1, 1], [0.5] + [1] * 5):
        rows = [{"step": 0}, *({"loss": 1.0, "truncated": share} for share in shares)]
        warn_of_truncation(tiny_qwen3.config(folder), rows)
        said.append("No rollout of the last 5 steps ended within" in capsys.readouterr().out)
    assert said == [False, True, False, True, True]
