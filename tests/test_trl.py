"""TRL's own trainers with our losses and without: what they log and learn is the same."""

import logging
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import trl_trainers
from trl_trainers import TRAINERS, save_models, trained

from opsd_kernels.trl import apply_opsd_kernels_to_trl, patches

# Figures of float32 runs, relative; at most 3e-6 of those here.
ROUNDING = 2e-5
# What configs can ask for.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("DistillationTrainer", {"beta": 0.3, "temperature": 0.7}),
    ("DistillationTrainer", {"beta": 0.0, "evaluated": True}),
    ("SDFTTrainer", {"distillation_alpha": 0.3, "temperature": 0.7, "num_loss_tokens_to_skip": 2}),
    ("SDFTTrainer", {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}),
    ("SDFTTrainer", {"teacher_model_kind": "base", "lora": True, "evaluated": True}),
    # Rollouts that are used twice: of older weights, whose log p is kept.
    ("SDFTTrainer", {"num_iterations": 3, "distillation_is_clip": 1.001, "temperature": 0.8}),
    ("SDPOTrainer", {"num_iterations": 3, "distillation_is_clip": 1.001}),
    ("SDPOTrainer", {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}),
    ("GKDTrainer", {"beta": 0.1, "temperature": 0.7, "lmbda": 1.0}),
    ("GKDTrainer", {"beta": 1.0, "seq_kd": True, "lmbda": 0.0}),
    ("GOLDTrainer", {"beta": 0.0, "temperature": 0.7}),
    ("IWOPDTrainer", {"beta": 0.3, "temperature": 0.7}),
]
# And what stays TRL's own.
LEFT: list[tuple[str, dict[str, Any], str]] = [
    ("SDFTTrainer", {"distillation_mode": "topk_logits", "distillation_topk": 5}, "topk_logits"),
    ("SDPOTrainer", {"distillation_weight": 0.5}, "distillation_weight"),
    ("IWOPDTrainer", {"loss_top_k": 3}, "loss_top_k=3"),
    ("IWOPDTrainer", {"distillation_objective": "iw_opd"}, "iw_opd"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def anew():
    """What was said once may be said again, and TRL is as it came."""
    patches.say_once.cache_clear()
    yield
    for hook in patches.HOOKS:
        assert not hasattr(vars(hook.owner())[hook.attribute], "replaces")


def assert_same(ours: Any, theirs: Any) -> None:
    """What was logged, and the weights that were learned."""
    (logged, weights, _), (expected, expected_weights, _) = ours, theirs
    assert [sorted(row) for row in logged] == [sorted(row) for row in expected]
    assert any(row.get("loss", 0) != 0 for row in expected)
    for row, true in zip(logged, expected, strict=True):
        assert row == pytest.approx(true, rel=ROUNDING, abs=1e-7)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_as_without(trainer, lora, folder, caplog):
    theirs = trained(trainer, folder, lora)
    with apply_opsd_kernels_to_trl():
        ours = trained(trainer, folder, lora)
    assert_same(ours, theirs)
    assert ours[2] == 0, "a head was called in a loss"
    assert trainer == "DistillationTrainer" or theirs[2] > 0
    assert "own code" not in caplog.text


@pytest.mark.parametrize(("trainer", "options"), OPTIONS)
def test_options(trainer, options, folder):
    theirs = trained(trainer, folder, **options)
    with apply_opsd_kernels_to_trl():
        ours = trained(trainer, folder, **options)
    assert_same(ours, theirs)
    assert ours[2] == 0, "a head was called in a loss"


@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "Granite"])
@pytest.mark.parametrize("trainer", ["DistillationTrainer", "GKDTrainer"])
def test_other_heads(family, trainer, tmp_path):
    """With a softcap, tied, or with a scale."""
    save_models(tmp_path, family=family)
    theirs = trained(trainer, tmp_path)
    with apply_opsd_kernels_to_trl():
        ours = trained(trainer, tmp_path)
    assert_same(ours, theirs)
    assert ours[2] == 0


@pytest.mark.parametrize(("trainer", "options", "reason"), LEFT)
def test_what_is_left_to_trl(trainer, options, reason, folder, caplog):
    """The same to the last bit, and said once."""
    theirs = trained(trainer, folder, **options)
    with apply_opsd_kernels_to_trl(), caplog.at_level(logging.WARNING, "opsd_kernels.trl"):
        ours = trained(trainer, folder, **options)
    assert ours[0] == theirs[0]
    said = [r.getMessage() for r in caplog.records if r.name == "opsd_kernels.trl"]
    assert len(said) == 1
    assert trainer in said[0]
    assert reason in said[0]


def test_a_head_with_an_adapter_is_left_to_trl(folder, caplog):
    from peft import LoraConfig

    on_head = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with mock.patch.object(trl_trainers, "LoraConfig", return_value=on_head):
        theirs = trained("IWOPDTrainer", folder, lora=True)
        with apply_opsd_kernels_to_trl(), caplog.at_level(logging.WARNING, "opsd_kernels.trl"):
            ours = trained("IWOPDTrainer", folder, lora=True)
    assert ours[0] == theirs[0]
    assert "wrapped by PEFT" in caplog.text


def test_undone():
    originals = [vars(hook.owner())[hook.attribute] for hook in patches.HOOKS]
    undo = apply_opsd_kernels_to_trl()
    changed = [vars(hook.owner())[hook.attribute] for hook in patches.HOOKS]
    assert all(a is not b for a, b in zip(originals, changed, strict=True))
    again = apply_opsd_kernels_to_trl()
    again()  # changed nothing, and takes nothing back
    assert [vars(hook.owner())[hook.attribute] for hook in patches.HOOKS] == changed
    undo()
    undo()
    assert [vars(hook.owner())[hook.attribute] for hook in patches.HOOKS] == originals


def test_another_version():
    with (
        mock.patch("importlib.metadata.version", return_value="1.99.0"),
        pytest.warns(UserWarning, match=r"tested with TRL 1\.16\.0, not with 1\.99\.0"),
    ):
        apply_opsd_kernels_to_trl()()


def test_another_signature():
    """An error that names it, and nothing is replaced."""
    *others, last = patches.HOOKS
    changed = replace(last, parameters=("self", "model", "batch"))
    missing = replace(last, name="IWOPDTrainer.compute_divergence")
    for hook, said in (
        (changed, "IWOPDTrainer.compute_loss of TRL .* takes self, model, inputs.*known is"),
        (missing, r"TRL .* has no .*IWOPDTrainer\.compute_divergence"),
        (replace(last, name="IWTrainer.compute_loss"), r"has no .*IWTrainer\.compute_loss"),
    ):
        with (
            mock.patch.object(patches, "HOOKS", [*others, hook]),
            pytest.raises(RuntimeError, match=said),
        ):
            apply_opsd_kernels_to_trl()
    for hook in patches.HOOKS:
        assert not hasattr(vars(hook.owner())[hook.attribute], "replaces")


def test_a_trainer_that_cannot_be_imported():
    *others, last = patches.HOOKS
    gone = replace(last, module="trl.experimental.gone")
    with (
        mock.patch.object(patches, "HOOKS", [*others, gone]),
        pytest.warns(UserWarning, match=re.escape("IWOPDTrainer.compute_loss stays as it is")),
    ):
        undo = apply_opsd_kernels_to_trl()
    assert len(undo.replaced) == len(others)
    undo()


def test_without_trl():
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(ImportError, match="pip install"),
    ):
        apply_opsd_kernels_to_trl()


def on_rank(rank: int, port: int, folder: str) -> None:
    """Runs of two processes, with ours and without, into a file."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
    }  # fmt: skip
    results = {}
    for trainer in TWO_PROCESSES:
        results[trainer] = [trained(trainer, Path(folder), per_device_train_batch_size=1)]
        with apply_opsd_kernels_to_trl():
            results[trainer].append(trained(trainer, Path(folder), per_device_train_batch_size=1))
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


TWO_PROCESSES = ("DistillationTrainer", "SDFTTrainer", "GKDTrainer")


def test_two_processes(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, (port, str(folder)), nprocs=2)
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for trainer in TWO_PROCESSES:
        for rank in ranks:
            theirs, ours = rank[trainer]
            assert_same(ours, theirs)
            assert ours[2] == 0
        weights = [rank[trainer][1][1] for rank in ranks]
        assert all(w.equal(weights[1][name]) for name, w in weights[0].items())
