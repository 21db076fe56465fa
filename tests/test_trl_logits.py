"""The adapter for TRL compares its logits with the model's own, once, and leaves to TRL what it
would not compute as the model does."""

import logging
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PolyConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from trl_runs import difference, load, make_trainer, run_of, said, save_models

from opsd_kernels import fused_log_probs
from opsd_kernels.trl import apply_opsd_kernels_to_trl, heads, self_distillation
from opsd_kernels.trl.hidden_states import why_no_hidden_states, why_other_logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    save_models(folder)
    return folder


def trainer_of(model: Any, processes: int = 1) -> Any:
    accelerator = SimpleNamespace(
        unwrap_model=lambda model: model,
        autocast=nullcontext,
        is_fsdp2=False,
        gather=lambda t: t.repeat(processes),
    )
    return SimpleNamespace(accelerator=accelerator, is_fsdp_enabled=False, model=model)


@pytest.mark.parametrize("trainer", ["GKDTrainer", "SDFTTrainer"])
def test_other_logits_than_the_models_are_left_to_trl(trainer, folder, monkeypatch, caplog):
    theirs = run_of(make_trainer(trainer, folder, max_steps=1))
    real = heads.head_of
    monkeypatch.setattr(heads, "head_of", lambda model: real(model)._replace(scale=0.9))
    with apply_opsd_kernels_to_trl(), caplog.at_level(logging.WARNING, "opsd_kernels.trl"):
        ours = run_of(make_trainer(trainer, folder, max_steps=1))
    assert difference(ours, theirs) == (0, 0)
    (message,) = said(caplog)
    assert f"{trainer} computes TRL's own loss: the loss would not have the logits" in message
    assert "they differ by 0.1 of their spread" in message


def test_a_comparison_is_made_once_for_each_model(folder):
    models = load(folder / "student"), load(folder / "teacher")
    adapted = get_peft_model(models[0], LoraConfig(r=2, target_modules=["q_proj"]))
    calls: list[int] = []
    for model in models:
        model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer = trainer_of(adapted)
    text = torch.arange(3, 27).reshape(2, 12)
    for _ in range(3):
        given = (adapted, models[1], adapted)
        assert why_other_logits(trainer, given, text, torch.ones_like(text)) is None
    assert len(calls) == 2 * 2  # each model's own forward, and its backbone's


def test_processes_agree(folder):
    """Where another one finds a difference."""
    trainer = trainer_of(load(folder / "student"))
    trainer.accelerator.gather = lambda found: torch.tensor([False, True])
    text = torch.arange(3, 27).reshape(2, 12)
    reason = why_other_logits(trainer, (trainer.model,), text, torch.ones_like(text))
    assert reason == "on another process it would not have the model's logits"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"]), None),
        (
            LoraConfig(
                r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5]
            ),
            "activated LoRA",
        ),
        (
            PolyConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", n_tasks=1),
            "PolyModel, has a forward of its own",
        ),
    ],
    ids=["LoRA", "activated LoRA", "Poly"],
)
def test_adapters_whose_wrapper_does_part_of_the_work(folder, config, reason):
    model = get_peft_model(load(folder / "student"), config)
    found = why_no_hidden_states(trainer_of(model), model)
    assert found is None if reason is None else reason in found


def test_ones_own_wrapper_of_an_adapter(folder):
    """As X-LoRA, which scales its layers in hooks that its wrapper sets."""
    model = get_peft_model(load(folder / "student"), LoraConfig(r=2, target_modules=["q_proj"]))
    kind = type(model.base_model)
    model.base_model.__class__ = type("XLoraModel", (kind,), {"forward": lambda *_, **__: None})
    assert "XLoraModel, has a forward" in why_no_hidden_states(trainer_of(model), model)


def test_log_p_of_the_student_takes_one_pass(folder):
    model = load(folder / "student")
    trainer = trainer_of(model)
    trainer.temperature = 0.7
    ids = torch.arange(20, 32).reshape(2, 6)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    text = {
        "input_ids": torch.cat([torch.arange(3, 9).reshape(2, 3), ids], 1),
        "attention_mask": torch.cat([torch.ones(2, 3, dtype=torch.long), mask], 1),
    }
    with FlopCounterMode(display=False) as backbone, torch.no_grad():
        h = model.model(**text).last_hidden_state[:, 2:-1]
    with FlopCounterMode(display=False) as all_of_it:
        log_p = self_distillation._log_p_of_student(trainer, ids, mask, text)
    n, (V, D) = int(mask.sum()), model.lm_head.weight.shape
    assert all_of_it.get_total_flops() - backbone.get_total_flops() == 2 * n * D * V
    true = fused_log_probs(h, model.lm_head.weight, ids, temperature=0.7).detach()
    torch.testing.assert_close(log_p, true * mask)
