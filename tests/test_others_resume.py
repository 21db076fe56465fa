"""A run that is resumed goes on with the same model, data and tokenizer, or refuses; and what a run
says of itself."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_qwen3
import yaml
from safetensors.torch import load_file, save_file
from training_runs import metrics, shrunk

from opsd_train import evaluate
from opsd_train.__main__ import main
from opsd_train.models import adapter_weights, base_model
from opsd_train.run import RunFolder
from opsd_train.run.checkpoint import FOLDER
from opsd_train.run.loop import base_weights
from opsd_train.run.plan import count_parameters, describe_start


class Runs:
    """Runs of one folder with a model and problems, in this process."""

    def __init__(self, folder: Path, said: Callable[[], str]):
        self.folder, self.said = folder, said

    def __call__(self, output: Path, *options: object) -> str:
        """Run, and what was said; what was refused begins with the program's name."""
        short = ("--steps", 2, "--save-every", 1, "--record-rollouts", 0, "--max-new-tokens", 4)
        constant = ("--schedule", "constant", "--warmup", 0)
        arguments = shrunk(self.folder, output, *short, *constant, *options)
        with suppress(SystemExit):
            main([str(a) for a in arguments])
        return self.said()


@pytest.fixture
def runs(tmp_path, capsys):
    tiny_qwen3.save_model_and_tokenizer(tmp_path / "model")
    tiny_qwen3.save_problems(tmp_path / "problems.jsonl")

    def said() -> str:
        out, err = capsys.readouterr()
        return out + err

    return Runs(tmp_path, said)


def results(output: Path) -> tuple[list[dict], bytes]:
    return metrics(output), (output / "adapter" / "adapter_model.safetensors").read_bytes()


def rewrite(path: Path, **said: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | said))


def append_five_problems(folder: Path) -> None:
    with (folder / "problems.jsonl").open("a") as file:
        for i in range(5):
            row = {"problem": f"{i} + 9?", "solution": f"\\boxed{{{i + 9}}}"}
            file.write(json.dumps(row) + "\n")


def one_other_weight(folder: Path, name: str = "model.layers.0.mlp.up_proj.weight") -> None:
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights[name][0, 0] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})


def other_chat_template(folder: Path) -> None:
    path = folder / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "helper"))


def other_vocabulary(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": ', '"ä": '))


CHANGES = [
    (append_five_problems, "problems, held-out problems"),
    (one_other_weight, "base weights"),
    (other_chat_template, "tokenizer and chat template"),
    (other_vocabulary, "tokenizer and chat template"),
    (
        lambda folder: rewrite(folder / "model" / "generation_config.json", eos_token_id=[2]),
        "end tokens",
    ),
    (lambda folder: rewrite(folder / "model" / "config.json", rms_norm_eps=1e-3), "model's config"),
]


def test_a_resumed_run_is_made_of_the_same(runs, tmp_path):
    output, mine = tmp_path / "run", tmp_path / "mine"
    for name in ("model", "problems.jsonl"):
        mine.mkdir(exist_ok=True)
        of = tmp_path / name
        (shutil.copytree if of.is_dir() else shutil.copy)(of, mine / name)
    runs.folder = mine
    options = ("--held-out", 4)
    assert "did not move" in runs(output, *options)
    before = contents_of(output)
    for change, what in CHANGES:
        change(mine)
        said = runs(output, *options, "--resume")
        assert f"opsd_train: {what}: changed since the run to resume began" in said
        assert contents_of(output) == before, "a run that is refused leaves the folder as it was"
        for name in ("model", "problems.jsonl"):
            of = tmp_path / name
            if of.is_dir():
                shutil.rmtree(mine / name)
            (shutil.copytree if of.is_dir() else shutil.copy)(of, mine / name)
    # The same under another date, and what has no effect.
    rewrite(mine / "model" / "generation_config.json", temperature=0.3, transformers_version="4")
    rewrite(mine / "model" / "config.json", transformers_version="4")
    was = results(output)
    assert "nothing is left to do" in runs(output, *options, "--resume")
    assert results(output) == was


def contents_of(output: Path) -> dict[str, bytes]:
    """All files but those that say how long a run took."""
    free = ("summary.json", "report.html")
    files = [p for p in sorted(output.rglob("*")) if p.is_file() and p.name not in free]
    return {str(path.relative_to(output)): path.read_bytes() for path in files}


def test_another_teacher_or_adapter_of_the_same_name(runs, tmp_path):
    teacher = tiny_qwen3.save_model_and_tokenizer(tmp_path / "teacher", seed=1)
    adapter = tiny_qwen3.save_adapter(tmp_path / "model", tmp_path / "adapter", r=4, lora_alpha=8)
    output = tmp_path / "run"
    options = ("--teacher-model", teacher, "--adapter", adapter)
    said = runs(output, *options)
    assert "The base weights did not move." in said
    file = adapter / "adapter_model.safetensors"
    data = file.read_bytes()
    weights = load_file(file)
    save_file({k: w * 1.001 for k, w in weights.items()}, file)
    said = runs(output, *options, "--resume")
    assert "opsd_train: adapter to start from: changed since" in said
    file.write_bytes(data)
    rewrite(adapter / "adapter_config.json", use_rslora=True)  # another scale
    assert "opsd_train: adapter to start from: changed" in runs(output, *options, "--resume")
    rewrite(adapter / "adapter_config.json", use_rslora=False)
    tiny_qwen3.save_model_and_tokenizer(teacher, seed=2)
    assert "opsd_train: teacher_model's weights: changed" in runs(output, *options, "--resume")


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(runs, tmp_path):
    output = tmp_path / "run"
    runs(output)
    (output / "fingerprint.json").unlink()
    said = runs(output, "--resume")
    assert "is of an earlier version, without fingerprint.json" in said
    assert "nothing is left to do" in said
    append_five_problems(tmp_path)
    assert "problems: changed since" in runs(output, "--resume"), "from now on it is checked"


# Steps


def test_steps_can_be_raised_under_a_constant_schedule(runs, tmp_path):
    """The longer run is the one that was asked for at once."""
    output, whole = tmp_path / "run", tmp_path / "whole"
    runs(output, "--teacher", "ema")
    assert "Resumed after step 2." in runs(output, "--teacher", "ema", "--resume", "--steps", 4)
    runs(whole, "--teacher", "ema", "--steps", 4)
    assert results(output) == results(whole)
    assert yaml.safe_load((output / "config.yaml").read_text())["steps"] == 4
    said = runs(output, "--teacher", "ema", "--resume")
    assert "steps was 4 in the run to resume, and is 2 now" in said


def begun(path: Path, done: int | None = None, **options: object) -> RunFolder:
    """Check a run of 10 steps as if it were resumed after `done` of them."""
    asked = {"steps": 10, "schedule": "constant", "warmup": 0.2} | options
    RunFolder(path).begin(asked, "")
    if done is not None:
        step = path / FOLDER / f"step-{done:06d}"
        step.mkdir(parents=True)
        (step / "state.json").write_text('{"bytes": {}}')
    return RunFolder(path, resume=True)


def test_steps_that_cannot_be_raised(tmp_path):
    asked = {"steps": 30, "schedule": "constant", "warmup": 0.2}
    begun(tmp_path / "late", 6).begin(asked, "")
    begun(tmp_path / "none", warmup=0.0).begin(asked | {"warmup": 0.0}, "")
    message = "now: the warm-up would be 6 steps, and 5 are taken. Ask for 10, or start a run from"
    with pytest.raises(ValueError, match=message):
        begun(tmp_path / "early", 5).begin(asked, "")
    folder = begun(tmp_path / "cosine", 10, schedule="cosine")
    message = rf"the cosine schedule, .* with --adapter {tmp_path}/cosine/adapter"
    with pytest.raises(ValueError, match=message):
        folder.begin(asked | {"schedule": "cosine"}, "")


# Runs from an adapter


def test_a_run_from_an_adapter(runs, tmp_path):
    """It begins where the other one ended, also when it is resumed; and is evaluated."""
    first, output, resumed = (tmp_path / name for name in ("first", "second", "resumed"))
    shape = ("--lora-rank", 3, "--lora-alpha", 5)
    runs(first, *shape)
    adapter = ("--adapter", first / "adapter")
    said = runs(output, *adapter, *shape)
    assert "lora_rank has an effect only with a new adapter; one that is loaded has its own" in said
    said = runs(output, *adapter, "--held-out", 3)
    assert ", rank 3." in said
    assert f"Adapter to start from: {first / 'adapter'}.\nTeacher: initial." in said
    assert "The base weights did not move." in said, "they are not the teacher"
    row = json.loads((output / "metrics.jsonl").read_text().splitlines()[1])
    assert row["forward_kl"] > 0
    # From the first step on, as it was.
    runs(resumed, *adapter, "--held-out", 3)
    shutil.rmtree(resumed / FOLDER / "step-000002")
    assert "Resumed after step 1." in runs(resumed, *adapter, "--held-out", 3, "--resume")
    assert results(resumed) == results(output)
    assert "of a prompt" not in runs(output, *adapter, "--dry-run")
    shutil.rmtree(first)
    evaluate.main([str(output), "--samples", "1", "--k", "1"])
    assert "adapter − base" in runs.said()


def test_the_model_that_an_adapter_was_made_for_is_said(folder, tmp_path):
    adapter = tiny_qwen3.save_adapter(folder / "model", tmp_path / "adapter")
    asked = tiny_qwen3.config(folder, adapter=str(adapter))
    assert describe_start(asked) == f"Adapter to start from: {adapter}.\n"
    rewrite(adapter / "adapter_config.json", base_model_name_or_path="one/other")
    assert describe_start(asked) == f"Adapter to start from: {adapter}, made for one/other.\n"
    assert describe_start(tiny_qwen3.config(folder)) == ""


# What a run says


@pytest.mark.parametrize("teacher", ["initial", "base", "live", "ema", "model"])
def test_which_weights_did_not_move(folder, teacher):
    options = {"teacher": teacher}
    if teacher == "model":
        options = {"teacher_model": str(folder / "model")}
    is_base = teacher in ("initial", "base")
    said = base_weights(tiny_qwen3.prepared(folder, **options))
    assert said == ("base weights, which are the teacher," if is_base else "base weights")


def test_parameters_are_counted_once(folder, tmp_path):
    """Also where a head that is tied is a tensor of its own, as FSDP2 leaves it."""
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / "tied", tie_word_embeddings=True)
    setup = tiny_qwen3.prepared(folder, model=str(path))
    total = sum(w.numel() for w in load_file(path / "model.safetensors").values())
    total += sum(w.numel() for w in adapter_weights(setup.model).values())
    base = base_model(setup.model)
    assert count_parameters(base) == total
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    assert sum(w.numel() for w in base.parameters()) > total
    assert count_parameters(base) == total
