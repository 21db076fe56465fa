"""ms-swift's GKD with the plugin of examples/, against its own: `make test-swift`."""

import json
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_qwen3
import torch
from accelerate import Accelerator
from ranks import on_ranks
from swift_teacher import SwiftTeacher

from benchmarks.lib.allocations import Allocations

pytestmark = [
    pytest.mark.swift,
    pytest.mark.skipif(
        find_spec("swift") is None, reason="needs ms-swift, which make test-swift sets up"
    ),
]
PLUGIN = Path(__file__).parents[1] / "examples" / "ms_swift_gkd.py"
OURS = "opsd_kernels: the GKD loss is computed from hidden states"
THEIRS = "opsd_kernels: ms-swift computes its own GKD loss: "
COMMON = (
    "--rlhf_type gkd --model {folder}/model --model_type qwen3 --template qwen3 --lmbda 0 "
    "--torch_dtype float32 --output_dir {folder}/out --max_steps 3 --learning_rate 1e-3 "
    "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 --save_strategy no "
    "--report_to none --lora_dropout 0 --split_dataset_ratio 0 --temperature 1.5 "
    "--dataloader_num_workers 0 --check_model false"  # which would ask ModelScope for a newer one
)
TEACHERS = {
    "another": "--teacher_model {folder}/teacher --teacher_model_type qwen3 "
    "--dataset {folder}/rows.jsonl",
    "adapter off": "--teacher_model {folder}/model --teacher_model_type qwen3 "
    "--dataset {folder}/opsd.jsonl",
    "itself": "--dataset {folder}/opsd.jsonl",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With models, and rows that have a prompt for the teacher, or none."""
    folder = tmp_path_factory.mktemp("swift")
    tiny_qwen3.save_model_and_tokenizer(folder / "model")
    tiny_qwen3.save_model_and_tokenizer(folder / "teacher", seed=1)
    tiny_qwen3.save_model_and_tokenizer(folder / "padded", vocab_size=128)
    tiny_qwen3.save_model_and_tokenizer(folder / "real_vocabulary", vocab_size=151_936)
    rows = []
    for i in range(16):
        question, answer = f"{i} + {3 * i}?", f"It is {4 * i}. " * (1 + i % 3)
        turns = [("user", question), ("assistant", answer)]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    for name in ("rows", "opsd"):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        rows = [row | {"teacher_prompt": f"It is {4 * i}. {i}?"} for i, row in enumerate(rows)]
    return folder


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    """One for each micro-batch, as it goes into backward."""
    gradients: list[torch.Tensor] = field(default_factory=list)
    """Of all that is trained, one for each step."""
    said: list[str] = field(default_factory=list)
    """What was logged of our or their loss."""
    theirs: int = 0
    """How often ms-swift's loss was computed."""
    peak_mib: float = 0
    """The most memory of a micro-batch: all tensors that are alive at once and were made in it."""


def train(folder: Path, options: str) -> Run:
    from swift import rlhf_main
    from swift.rlhf_trainers import gkd_trainer
    from swift.utils import logger as logs

    run = Run()
    GKDTrainer, gkd_loss = gkd_trainer.GKDTrainer, gkd_trainer.gkd_loss
    clip, backward, step = (
        Accelerator.clip_grad_norm_,
        Accelerator.backward,
        GKDTrainer.training_step,
    )

    def recorded_clip(self, parameters, *args, **kwargs):
        parameters = list(parameters)
        found = [weight.grad.flatten() for weight in parameters if weight.grad is not None]
        run.gradients.append(torch.cat(found))
        return clip(self, parameters, *args, **kwargs)

    def recorded_backward(self, loss, **kwargs):
        run.losses.append(loss.item())
        return backward(self, loss, **kwargs)

    def counted(*args, **kwargs):
        run.theirs += 1
        return gkd_loss(*args, **kwargs)

    def counted_step(*args, **kwargs):
        with Allocations() as allocations:
            loss = step(*args, **kwargs)
        run.peak_mib = max(run.peak_mib, allocations.peak / 2**20)
        return loss

    def recorded_said(record):
        if record.getMessage().startswith("opsd_kernels"):
            run.said.append(record.getMessage())
        return True

    for said in (logs.info_set, logs.warning_set):
        said.clear()
    for name in [name for name in sys.modules if name.startswith("_swift_external")]:
        del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "clip_grad_norm_", recorded_clip)
        patch.setattr(Accelerator, "backward", recorded_backward)
        patch.setattr(gkd_trainer, "gkd_loss", counted)
        patch.setattr(GKDTrainer, "training_step", counted_step)
        # The plugin replaces it; this puts it back.
        patch.setattr(GKDTrainer, "compute_loss", GKDTrainer.compute_loss)
        logs.logger.addFilter(recorded_said)
        try:
            rlhf_main(
                [*COMMON.format(folder=folder).split(), *options.format(folder=folder).split()]
            )
        finally:
            logs.logger.removeFilter(recorded_said)
    return run


def both(folder: Path, options: str) -> tuple[Run, Run]:
    """The same training by ms-swift alone, and with the plugin."""
    theirs = train(folder, options)
    assert theirs.theirs == 6
    assert theirs.said == []
    return theirs, train(folder, f"{options} --external_plugins {PLUGIN}")


def assert_equal(theirs: Run, ours: Run) -> None:
    """The same losses and gradients, the second without ms-swift's loss."""
    assert ours.theirs == 0
    assert len(ours.losses) == 6
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    for gradient, expected in zip(ours.gradients, theirs.gradients, strict=True):
        assert (gradient - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("top_k", ["", "--gkd_logits_topk 5"], ids=["all", "top 5"])
@pytest.mark.parametrize(
    ("teacher", "tuner", "beta"),
    [
        ("another", "full", 0.3),
        ("another", "lora", 1),
        ("adapter off", "lora", 0),
        ("itself", "full", 1),
        ("itself", "lora", 0.3),
    ],
)
def test_a_training_takes_their_steps(folder, teacher, tuner, beta, top_k):
    options = f"{TEACHERS[teacher]} --tuner_type {tuner} --beta {beta} {top_k}"
    theirs, ours = both(folder, options)
    assert ours.said == [OURS]
    assert_equal(theirs, ours)


def test_on_answers_that_the_student_samples(folder):
    options = "--tuner_type lora --lmbda 1 --max_completion_length 8"
    theirs, ours = both(folder, f"{TEACHERS['itself']} {options}")
    assert ours.said == [OURS]
    assert_equal(theirs, ours)


@pytest.mark.parametrize(
    ("teacher", "tuner"), [("another", "full"), ("itself", "full"), ("adapter off", "lora")]
)
def test_two_processes(folder, tmp_path, teacher, tuner):
    options = f"{TEACHERS[teacher]} --tuner_type {tuner} --use_cpu true --ddp_backend gloo"
    ranks = on_ranks(both_on_rank, 2, tmp_path, folder, options)
    assert ranks[0][0].losses != ranks[1][0].losses
    for theirs, ours in ranks:
        assert_equal(theirs, ours)
        assert all(map(torch.equal, ours.gradients, ranks[0][1].gradients))


def both_on_rank(rank, folder, options):
    return both(folder, options)


def test_top_k_of_a_teacher_with_a_narrower_head(folder):
    options = f"{TEACHERS['another']} --model {folder}/padded --gkd_logits_topk 5"
    theirs, ours = both(folder, options)
    assert ours.said == [OURS]
    assert_equal(theirs, ours)


@pytest.fixture
def teacher(folder, monkeypatch):
    from swift.rlhf_trainers import vllm_client

    # The client uses nothing of vLLM for what it asks here.
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    with SwiftTeacher(folder / "teacher") as teacher:
        yield teacher


SERVER = "--teacher_model_server {url} --gkd_logits_topk 5"


@pytest.mark.parametrize(
    ("rows", "tuner", "beta", "missing"),
    [
        ("rows", "full", 0, 0),
        ("opsd", "lora", 0.3, 0),
        ("rows", "full", 1, 0),
        ("rows", "lora", 0, 4),
    ],
)
def test_a_teacher_on_a_server(folder, teacher, rows, tuner, beta, missing):
    teacher.missing = missing  # tokens at the end that the teacher says nothing of
    options = f"--tuner_type {tuner} --beta {beta} --dataset {folder}/{rows}.jsonl"
    theirs, ours = both(folder, f"{SERVER.format(url=teacher.url)} {options}")
    assert ours.said == [OURS]
    assert_equal(theirs, ours)


def test_a_server_is_as_good_as_the_same_model_here(folder, teacher):
    """So the log-probabilities that it sends are those of the trainer's own tokens."""
    options = f"--tuner_type full --gkd_logits_topk 5 --external_plugins {PLUGIN}"
    sent = train(
        folder, f"{SERVER.format(url=teacher.url)} {options} --dataset {folder}/rows.jsonl"
    )
    assert_equal(train(folder, f"{TEACHERS['another']} {options}"), sent)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (f"{TEACHERS['another']} --sft_alpha 0.5", "sft_alpha adds a loss of its own"),
        (
            f"{TEACHERS['another']} --model {{folder}}/padded",
            "the LM heads have [128, 104] rows",
        ),
        (
            f"{TEACHERS['itself']} --tuner_type lora --modules_to_save lm_head",
            "the LM head is wrapped by PEFT",
        ),
    ],
    ids=["sft_alpha", "two widths", "adapter of the head"],
)
def test_a_warning_says_what_stays_theirs(folder, options, reason):
    ours = train(folder, f"{options} --external_plugins {PLUGIN}")
    assert ours.theirs == 6
    assert len(ours.said) == 1
    assert ours.said[0].startswith(THEIRS + reason)


def test_memory(folder):
    """Of a training step with a real vocabulary, without its weights."""
    turns = [("user", "1 + 1?"), ("assistant", "2" * 250)]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (folder / "long.jsonl").write_text(json.dumps(row | {"teacher_prompt": "2?"}) + "\n")
    options = (
        "--model {folder}/real_vocabulary --tuner_type lora --dataset {folder}/long.jsonl "
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 1 --max_steps 1"
    )
    for more, least, most in (("", 2000, 128), ("--gkd_logits_topk 100", 400, 160)):
        theirs = train(folder, f"{options} {more}")
        ours = train(folder, f"{options} {more} --external_plugins {PLUGIN}")
        assert ours.said == [OURS]
        print(f"{more or 'all tokens'}: {theirs.peak_mib:,.0f} MiB, ours {ours.peak_mib:,.0f} MiB")
        assert theirs.peak_mib > least
        assert ours.peak_mib < most
