"""ms-swift's GKD with the plugin of examples/, against its own: `make test-swift`."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_qwen3
import torch

pytestmark = [
    pytest.mark.swift,
    pytest.mark.skipif(
        find_spec("swift") is None, reason="needs ms-swift, which make test-swift sets up"
    ),
]

PLUGIN = Path(__file__).parents[1] / "examples" / "ms_swift_gkd.py"
COMMON = (
    "--rlhf_type gkd --model {folder}/model --model_type qwen3 --template qwen3 --lmbda 0 "
    "--torch_dtype float32 --output_dir {folder}/out --max_steps 3 --learning_rate 1e-2 "
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 1 --save_strategy no "
    "--report_to none --lora_dropout 0 --split_dataset_ratio 0"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With two models, and rows that have a prompt for the teacher, or none."""
    folder = tmp_path_factory.mktemp("swift")
    tiny_qwen3.save_model_and_tokenizer(folder / "model")
    tiny_qwen3.save_model_and_tokenizer(folder / "teacher", seed=1)
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


def differences(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[tuple]:
    """Of every batch of a short run: their loss, ours, how far the gradients are apart relative to
    theirs, and whether ours called theirs."""
    from swift import rlhf_main
    from swift.rlhf_trainers.gkd_trainer import GKDTrainer

    theirs, made, calls = GKDTrainer.compute_loss, [], []
    monkeypatch.setattr(GKDTrainer, "compute_loss", theirs)  # puts it back at the end
    monkeypatch.syspath_prepend(str(PLUGIN.parent))
    sys.modules.pop(PLUGIN.stem, None)
    import ms_swift_gkd

    def counted(*args, **kwargs):
        calls.append(1)
        return theirs(*args, **kwargs)

    monkeypatch.setattr(ms_swift_gkd, "their_compute_loss", counted)

    def compare(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        found = []
        for compute_loss in (ms_swift_gkd.compute_loss, theirs):
            # Theirs changes what it is given.
            given = {k: dict(v) if isinstance(v, dict) else v for k, v in inputs.items()}
            loss = compute_loss(self, model, given)
            loss.backward()  # not autograd.grad, which their checkpoints do not allow
            found.append((loss, torch.cat([weight.grad.flatten() for weight in trained])))
            model.zero_grad()
        (loss, gradient), (their_loss, their_gradient) = found
        apart = (gradient - their_gradient).norm() / their_gradient.norm()
        made.append((their_loss.item(), loss.item(), apart.item(), bool(calls)))
        return theirs(self, model, inputs, return_outputs, num_items_in_batch)

    monkeypatch.setattr(GKDTrainer, "compute_loss", compare)
    rlhf_main([*COMMON.format(folder=folder).split(), *options])
    return made


@pytest.mark.parametrize(
    ("teacher", "beta"), [("other", "0.3"), ("adapter off", "0"), ("itself", "1")]
)
def test_loss_and_gradients_are_theirs(folder, monkeypatch, teacher, beta):
    options = {
        "other": f"--teacher_model {folder}/teacher --teacher_model_type qwen3 --tuner_type full "
        f"--dataset {folder}/rows.jsonl",
        "adapter off": f"--tuner_type lora --teacher_model {folder}/model "
        f"--teacher_model_type qwen3 --dataset {folder}/opsd.jsonl",
        "itself": f"--tuner_type full --dataset {folder}/opsd.jsonl",
    }[teacher]
    made = differences(
        folder, monkeypatch, *options.split(), "--beta", beta, "--temperature", "1.5"
    )
    assert len(made) == 3
    for theirs, ours, apart, has_called_theirs in made:
        assert not has_called_theirs
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert apart < 1e-3


def test_what_is_not_computed_is_left_to_ms_swift(folder, monkeypatch):
    options = f"--tuner_type full --dataset {folder}/opsd.jsonl --gkd_logits_topk 5"
    for theirs, ours, apart, has_called_theirs in differences(
        folder, monkeypatch, *options.split()
    ):
        assert has_called_theirs
        assert (ours, apart) == (theirs, 0)


def test_as_a_plugin(folder, monkeypatch):
    from swift import rlhf_main
    from swift.rlhf_trainers.gkd_trainer import GKDTrainer

    theirs = GKDTrainer.compute_loss
    monkeypatch.setattr(GKDTrainer, "compute_loss", theirs)  # puts it back at the end
    options = f"--tuner_type full --dataset {folder}/opsd.jsonl --external_plugins {PLUGIN}"
    rlhf_main([*COMMON.format(folder=folder).split(), *options.split()])
    assert Path(GKDTrainer.compute_loss.__code__.co_filename) == PLUGIN
