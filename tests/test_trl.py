"""TRL's own trainers, with and without ours: the same losses, gradients and figures."""

import importlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from marks import slow
from ranks import on_ranks
from tiny_qwen3 import FAMILIES, save_model_and_tokenizer
from trl_runs import (
    LENGTH,
    OUTSIDE,
    TRAINERS,
    Run,
    difference,
    load,
    make_trainer,
    run,
    run_of,
    said,
    save_models,
)

from opsd_kernels import fused_jsd_loss, reference_jsd_loss
from opsd_kernels.trl import (
    apply_opsd_kernels_to_trl,
    distillation,
    explain,
    heads,
    patches,
    routes,
)
from opsd_kernels.trl.hidden_states import (
    loss_of_student,
    predicting,
    teacher_hidden_states,
    why_other_logits,
)

TOLERANCE = 1e-4
PROCESSES = 2

# Fast: each trainer, what one of them alone can be asked for, a head that is trained or not.
CASES: list[Any] = [
    slow("DistillationTrainer", {}),
    ("DistillationTrainer", {"lora": True, "beta": 0.3, "temperature": 0.7}),
    slow("DistillationTrainer", {"beta": 0.0}),
    slow("SDFTTrainer", {}),
    ("SDFTTrainer", {"lora": True, "temperature": 0.7, "num_loss_tokens_to_skip": 2}),
    ("SDFTTrainer", {"distillation_alpha": 0.0, "num_iterations": 3, "teacher_model_kind": "ema"}),
    slow("SDFTTrainer", {"lora": True, "distillation_alpha": 1.0, "teacher_model_kind": "ema"}),
    (
        "SDFTTrainer",
        {
            "distillation_mode": "sampled_token",
            "distillation_alpha": 1.0,
            "num_iterations": 3,
            "distillation_is_clip": 1.001,
            "teacher_model_kind": "live",
        },
    ),
    ("SDFTTrainer", {"distillation_mode": "topk_logits"}),
    slow(
        "SDFTTrainer",
        {
            "distillation_mode": "topk_logits",
            "distillation_topk": 5,
            "distillation_add_tail": True,
            "num_iterations": 3,
            "distillation_is_clip": 1.001,
            "temperature": 0.7,
        },
    ),
    slow("SDPOTrainer", {}),
    slow("SDPOTrainer", {"lora": True, "num_iterations": 3, "temperature": 0.8}),
    (
        "SDPOTrainer",
        {
            "distillation_mode": "full_logits",
            "distillation_alpha": 0.5,
            "num_iterations": 3,
            "distillation_is_clip": 1.001,
        },
    ),
    (
        "SDPOTrainer",
        {
            "lora": True,
            "distillation_mode": "topk_logits",
            "distillation_topk": 5,
            "distillation_add_tail": True,
            "num_iterations": 3,
            "distillation_is_clip": 1.001,
            "distillation_weight": 0.7,
        },
    ),
    slow("SDPOTrainer", {"distillation_weight": 0.3, "temperature": 0.7}),
    slow("SDPOTrainer", {"distillation_weight": 0.5, "importance_sampling_level": "sequence"}),
    ("GKDTrainer", {}),
    slow("GKDTrainer", {"lora": True, "beta": 0.2, "temperature": 0.7}),
    slow("GKDTrainer", {"lmbda": 0.0, "beta": 0.0}),
    slow("GKDTrainer", {"lmbda": 0.0, "seq_kd": True, "beta": 1.0}),
    slow("GOLDTrainer", {}),
    ("GOLDTrainer", {"lora": True, "beta": 0.2, "temperature": 0.7}),
    slow("GOLDTrainer", {"lmbda": 0.0, "beta": 1.0}),
    slow("IWOPDTrainer", {}),
    slow("IWOPDTrainer", {"lora": True, "beta": 0.2, "temperature": 0.7}),
    ("IWOPDTrainer", {"lmbda": 0.0, "beta": 0.0}),
    ("IWOPDTrainer", {"loss_top_k": 3, "beta": 0.3}),
    slow("IWOPDTrainer", {"loss_top_k": 3, "beta": 0.0, "loss_add_tail": False}),
    slow("IWOPDTrainer", {"loss_top_k": 3, "beta": 1.0, "temperature": 0.7}),
    slow("IWOPDTrainer", {"loss_top_k": 300, "lora": True}),
    ("IWOPDTrainer", {"loss_top_k": 1, "beta": 0.5, "lora": True}),
    slow("IWOPDTrainer", {"loss_top_k": 1, "beta": 0.5, "reverse_kl_top_1_mode": "argmax"}),
    slow("IWOPDTrainer", {"loss_top_k": 1, "beta": 1.0}),
    ("IWOPDTrainer", {"distillation_objective": "iw_opd", "lora": True, "temperature": 0.7}),
    slow("IWOPDTrainer", {"distillation_objective": "iw_opd", "iw_opd_gamma": 0.7}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    save_models(folder)
    return folder


@pytest.mark.parametrize(
    ("trainer", "options"),
    CASES,
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)),
)
def test_a_run_is_the_same(trainer, options, folder, monkeypatch, caplog):
    calls = []
    real = distillation.token_divergence
    monkeypatch.setattr(
        distillation, "token_divergence", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    theirs = run(trainer, folder, **options)
    routes(clear=True)
    with apply_opsd_kernels_to_trl(), caplog.at_level(logging.WARNING, "opsd_kernels.trl"):
        ours = run(trainer, folder, **options)
        explained = [row[:2] for row in explain() if row.whose == "ours"]
    told = routes(clear=True)
    figures, gradients = difference(ours, theirs)
    print(f"{trainer} {options}: figures {figures:.1e}, gradients {gradients:.1e}")
    assert figures < TOLERANCE
    assert gradients < TOLERANCE
    assert len(theirs.gradients) == 3
    if trainer == "IWOPDTrainer":  # transformers evaluates it with its outputs
        (message,) = said(caplog)
        assert "outputs are asked for" in message
    else:
        assert not said(caplog)
        assert ours.longest_evaluated <= 1
    (route,) = [route for route in told if not route.reason]
    assert route[:2] in explained
    assert route.batches >= 3 * 2
    assert ours.longest <= 1  # what sampling needs
    if trainer == "DistillationTrainer":
        assert theirs.longest <= 1
        assert ours.compared == 0
        assert len(calls) == 3 * 2 + 1  # two micro-batches a step, and one to evaluate
    else:
        assert theirs.longest > 1
        # The logits of each model, once; those of a trainer's teacher may be the student's.
        assert ours.compared in (1, 2)


def test_sequences_without_a_token_that_counts(folder):
    """A loss of 0 that backward goes through."""
    options = {"num_loss_tokens_to_skip": LENGTH}
    theirs = run("SDFTTrainer", folder, **options)
    with apply_opsd_kernels_to_trl():
        ours = run("SDFTTrainer", folder, **options)
    assert ours.logs == theirs.logs
    assert [log["grad_norm"] for log in ours.logs[:3]] == [0, 0, 0]


def test_autocast_is_that_of_the_models_forward(folder):
    """Which is not called; its layers compute in bf16 all the same, and so does the loss."""
    dtypes = []
    for apply in (False, True):
        made = make_trainer("SDFTTrainer", folder, bf16=True)
        layer = made.model.get_submodule("model.layers.0.mlp")
        layer.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
        if apply:
            with apply_opsd_kernels_to_trl():
                ours = run_of(made)
        else:
            theirs = run_of(made)
    assert set(dtypes) == {torch.bfloat16}
    # Theirs rounds logits to bf16, ours does not.
    for mine, yours in zip(ours.logs[:1], theirs.logs[:1], strict=True):
        assert mine["loss"] == pytest.approx(yours["loss"], rel=0.02)
        assert mine["grad_norm"] == pytest.approx(yours["grad_norm"], rel=0.05)


def on_rank(rank: int, folder: Path) -> dict[str, tuple[Run, Run]]:
    """Runs of one of two processes: ours and theirs."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    runs = {}
    for trainer in ("DistillationTrainer", "SDFTTrainer"):
        for lora in (False, True):
            options: dict[str, Any] = {"lora": lora, "max_steps": 2}
            if trainer == "SDFTTrainer" and not lora:
                options["distillation_mode"] = "topk_logits"
            theirs = run(trainer, folder, **options)
            with apply_opsd_kernels_to_trl([trainer]):
                ours = run(trainer, folder, **options)
            assert ours.longest <= 1
            runs[f"{trainer}, {'LoRA' if lora else 'full'}"] = ours, theirs
    assert torch.distributed.get_world_size() == PROCESSES
    for head_apart in (False, True):
        for own_teacher in (False, True):
            assert_sharded_as_averaged(rank, folder, head_apart, own_teacher)
    return runs


def assert_sharded_as_averaged(
    rank: int, folder: Path, head_apart: bool, own_teacher: bool
) -> None:
    """Gradients of a model that FSDP2 has sharded are the average of both ranks' own, those of its
    head too, whether it is gathered with the rest or apart; the teacher another model or itself."""
    from torch.distributed.fsdp import fully_shard

    text = torch.arange(3, 27).reshape(2, 12)
    at = predicting(torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1 - rank]]), 12)
    inputs = {"input_ids": text + 5 * rank, "attention_mask": torch.ones_like(text)}
    accelerator = SimpleNamespace(
        unwrap_model=lambda model: model, autocast=nullcontext, gather=lambda t: t
    )
    trainer = SimpleNamespace(accelerator=accelerator)

    def gradients(model: Any, teacher: Any) -> dict[str, torch.Tensor]:
        def loss(h_S: Any, W: Any, h_T: Any, W_T: Any) -> torch.Tensor:
            return fused_jsd_loss(h_S, h_T, W, W_teacher=W_T, reduction="sum")

        privileged = inputs | {"input_ids": inputs["input_ids"].flip(1)}
        h_T = teacher_hidden_states(trainer, teacher, at, **privileged)
        loss_of_student(trainer, model, loss, h_T, teacher, at, **inputs).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def models() -> tuple[Any, Any]:
        student = load(folder / "student")
        return student, student if own_teacher else load(folder / "teacher")

    mine = gradients(*models())
    for gradient in mine.values():
        torch.distributed.all_reduce(gradient)
    mesh, sharded_models = torch.distributed.init_device_mesh("cpu", (PROCESSES,)), models()
    for model in dict.fromkeys(sharded_models):
        if head_apart:
            fully_shard(model.lm_head, mesh=mesh)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    assert why_other_logits(trainer, sharded_models, **inputs) is None
    sharded = gradients(*sharded_models)
    assert sharded.keys() == mine.keys()
    for name, gradient in sharded.items():
        torch.testing.assert_close(
            gradient.full_tensor(), mine[name] / PROCESSES, rtol=1e-4, atol=1e-7
        )


def test_a_head_that_zero_3_takes_back(folder, monkeypatch):
    """It is whole in forward alone, and backward of a trained one reads it: from a copy."""
    model = load(folder / "student")
    weight = model.lm_head.weight
    whole_weight = weight.data.clone()

    @contextmanager
    def gather(*parameters: Any) -> Iterator[None]:
        for p in {id(p): p for p in parameters if p is weight}.values():
            p.data = whole_weight.clone()
        yield
        for p in parameters:
            if p is weight:
                p.data.fill_(torch.nan)

    h = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))

    def gradient() -> torch.Tensor:
        with heads.heads_of_models(model, model) as (W, _):
            loss = fused_jsd_loss(h, -h, W)
        return torch.autograd.grad(loss, weight)[0]

    true = gradient()
    weight.ds_id, weight.ds_shape = 0, weight.shape
    weight.data = torch.full_like(whole_weight, torch.nan)
    monkeypatch.setattr(heads, "maybe_gather_lm_head_ctx", gather)
    assert heads.why_no_head(model) is None
    assert torch.equal(gradient(), true)


def test_two_processes(folder, tmp_path):
    """Under DistributedDataParallel, with as many tokens on each as come; and under FSDP2."""
    ranks = on_ranks(on_rank, PROCESSES, tmp_path, folder)
    for name, (ours, theirs) in ranks[0].items():
        figures, gradients = difference(ours, theirs)
        print(f"{name}, {PROCESSES} processes: figures {figures:.1e}, gradients {gradients:.1e}")
        assert max(figures, gradients) < TOLERANCE
        # Both hold the gradient of both.
        others, _ = ranks[1][name]
        for mine, yours in zip(ours.gradients, others.gradients, strict=True):
            for parameter in mine:
                torch.testing.assert_close(mine[parameter], yours[parameter])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Qwen3"])
@pytest.mark.parametrize("trainer", ["DistillationTrainer", slow("SDFTTrainer")])
def test_heads_with_a_cap_a_scale_or_a_bias(trainer, family, tmp_path, monkeypatch):
    """Of other families, tied embeddings among them; of Phi's the bias is trained too."""
    for side, seed in (("student", 0), ("teacher", 1)):
        save_model_and_tokenizer(tmp_path / side, seed=seed, family=family, num_hidden_layers=1)
    theirs = run(trainer, tmp_path)
    with apply_opsd_kernels_to_trl():
        ours = run(trainer, tmp_path)
    figures, gradients = difference(ours, theirs)
    assert max(figures, gradients) < TOLERANCE
    assert ours.longest <= 1


def textbook(trainer: str) -> Any:
    """Of logits, β and T: the sum over tokens, as each trainer writes it."""
    if trainer in ("SDFTTrainer", "SDPOTrainer"):
        module = importlib.import_module(
            f"trl.experimental.{trainer.removesuffix('Trainer').lower()}.loss_utils"
        )
        return lambda z_S, z_T, beta, T: module.compute_full_logit_self_distillation_loss(
            z_S / T, z_T / T, distillation_alpha=beta
        ).sum()
    kind, _ = TRAINERS[trainer]
    return lambda z_S, z_T, beta, T: kind.generalized_jsd_loss(
        z_S, z_T, beta=beta, temperature=T, reduction="sum"
    )


@pytest.mark.parametrize("beta", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    "trainer", [name for name in TRAINERS if name not in ("DistillationTrainer", *OUTSIDE)]
)
def test_beta_means_what_it_means_here(trainer, beta):
    """Their formula in float64."""
    g = torch.Generator().manual_seed(0)
    h_S, h_T, W = (torch.randn(n, 8, generator=g, dtype=torch.float64) for n in (5, 5, 40))
    true = reference_jsd_loss(h_S, h_T, W, beta=beta, temperature=0.7, reduction="sum")
    theirs = textbook(trainer)((h_S @ W.T)[None], (h_T @ W.T)[None], beta, 0.7)
    torch.testing.assert_close(theirs, true, rtol=1e-12, atol=0)


# ... the function of DistillationTrainer, of tensors


def divergence_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 1, 1]])
    return {
        "student_hidden_states": randn(3, 5, 16).requires_grad_(),
        "teacher_hidden_states": randn(3, 5, 24),
        "student_lm_head_weight": randn(50, 16).requires_grad_(),
        "teacher_lm_head_weight": randn(50, 24),
        "completion_mask": mask,
        "beta": 0.3,
        "num_items_in_batch": torch.tensor(9.5),
        "student_lm_head_bias": randn(50).requires_grad_(),
        "teacher_lm_head_bias": randn(50),
        "student_logit_scale": 0.4,
        "teacher_logit_scale": 0.6,
        "student_final_logit_softcapping": 3.0,
        "teacher_final_logit_softcapping": 4.0,
        "temperature": 0.7,
    }


def divergence_results(inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Loss, entropy and count of what TRL calls now, and gradients."""
    function = importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss
    results = list(function(**inputs))
    leaves = [t for t in inputs.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    return results + list(torch.autograd.grad(results[0], leaves))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_items_in_batch": None},
        {"num_items_in_batch": 7},
        {"completion_mask": torch.zeros(3, 5, dtype=torch.long), "num_items_in_batch": None},
        {"teacher_hidden_states": torch.float16, "teacher_lm_head_weight": torch.float16},
        {"student_lm_head_weight": torch.bfloat16},
        {"teacher_lm_head_weight": 60, "teacher_lm_head_bias": 60},  # rows
    ],
    ids=["", "local mean", "an int", "no token", "two dtypes", "a head of its own dtype", "padded"],
)
def test_what_distillation_calls(change):
    inputs = divergence_inputs()
    for name, value in change.items():
        if isinstance(value, torch.dtype):
            value = inputs[name].detach().to(value)
            value.requires_grad_(inputs[name].requires_grad)
        elif name.startswith("teacher"):
            g = torch.Generator().manual_seed(1)
            value = torch.randn(value, *inputs[name].shape[1:], generator=g)
        inputs[name] = value
    theirs = divergence_results(inputs)
    with apply_opsd_kernels_to_trl():
        ours = divergence_results(inputs)
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype
        loose = {"rtol": 1e-2, "atol": 1e-4} if y.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(x, y, **(loose or {"rtol": 1e-4, "atol": 1e-6}))


# ... what is not ours


@pytest.mark.parametrize(
    ("trainer", "options", "reason"),
    [
        ("SDPOTrainer", {"distillation_weight": 0.0}, "distillation_weight=0 is"),
    ],
)
def test_what_is_not_computed_stays_theirs_and_is_said_once(
    trainer, options, reason, folder, caplog
):
    theirs = run(trainer, folder, **options)
    routes(clear=True)
    with apply_opsd_kernels_to_trl(), caplog.at_level(logging.WARNING, "opsd_kernels.trl"):
        ours = run(trainer, folder, **options)
        explained = {(row.trainer, row.loss, row.reason) for row in explain()}
    assert ours.logs == theirs.logs
    assert ours.longest == theirs.longest > 1
    messages = said(caplog)
    assert len(messages) == 1
    assert messages[0].startswith(f"{trainer} computes TRL's own loss: ")
    assert reason in messages[0]
    route = routes(clear=True)[0]
    assert (route.trainer, route.loss, route.reason) in explained
    assert (route.whose, route.batches) == ("theirs", 3 * 2 + 1)


def test_gold_with_two_tokenizers_stays_theirs(folder, caplog):
    options = {"use_uld_loss": True, "teacher_tokenizer_name_or_path": str(folder / "teacher")}
    with apply_opsd_kernels_to_trl(), caplog.at_level(logging.WARNING, "opsd_kernels.trl"):
        run("GOLDTrainer", folder, **options)
    assert "use_uld_loss" in caplog.text


def test_a_subclass_that_has_a_loss_of_its_own(folder, caplog):
    kind, _ = TRAINERS["GKDTrainer"]

    class Own(kind):
        @staticmethod
        def generalized_jsd_loss(student_logits, *_args, **_kwargs):
            return student_logits.square().mean()

    with apply_opsd_kernels_to_trl(), caplog.at_level(logging.WARNING, "opsd_kernels.trl"):
        made = run_of(make_trainer("GKDTrainer", folder, base=Own))
    assert "Own computes TRL's own loss: it has a generalized_jsd_loss of its own" in caplog.text
    assert made.longest > 1


def test_a_head_with_an_adapter(folder, caplog):
    from peft import LoraConfig, get_peft_model

    made = make_trainer("GKDTrainer", folder)
    made.model = made.model_wrapped = get_peft_model(
        made.model, LoraConfig(r=2, target_modules=["lm_head"])
    )
    with apply_opsd_kernels_to_trl(), caplog.at_level(logging.WARNING, "opsd_kernels.trl"):
        run_of(made)
    assert "the LM head is wrapped by PEFT" in caplog.text


def test_outputs_that_are_asked_for(folder, caplog):
    made = make_trainer("GKDTrainer", folder)
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    with apply_opsd_kernels_to_trl(), caplog.at_level(logging.WARNING, "opsd_kernels.trl"):
        _, outputs = made.compute_loss(made.model, batch, return_outputs=True)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape
    assert "outputs are asked for" in caplog.text


# ... applying and undoing


def replaced() -> list[Any]:
    found = []
    for hook in patches.HOOKS:
        owner: Any = importlib.import_module(hook.module)
        *classes, name = hook.replaced.split(".")
        for part in classes:
            owner = getattr(owner, part)
        found.append(vars(owner)[name])
    return found


def test_undone_by_call_and_by_context():
    before = replaced()
    undo = apply_opsd_kernels_to_trl()
    during = replaced()
    assert all(x is not y for x, y in zip(during, before, strict=True))
    with apply_opsd_kernels_to_trl():  # a second time: nothing of its own to undo
        assert replaced() == during
    assert replaced() == during
    undo()
    assert replaced() == before
    undo()


def test_some_trainers_alone():
    before = replaced()
    with apply_opsd_kernels_to_trl("GKDTrainer"):
        assert [x is y for x, y in zip(replaced(), before, strict=True)].count(False) == 1
    with pytest.raises(
        ValueError, match=r"trainers must be among .*GKDTrainer.*, got 'DPOTrainer'"
    ):
        apply_opsd_kernels_to_trl(["GKDTrainer", "DPOTrainer"])


def test_someone_elses_replacement_is_left(monkeypatch):
    kind, _ = TRAINERS["GKDTrainer"]
    theirs = kind.compute_loss
    undo = apply_opsd_kernels_to_trl("GKDTrainer")
    monkeypatch.setattr(kind, "compute_loss", lambda *_: 0)
    with pytest.warns(UserWarning, match=r"GKDTrainer\.compute_loss was replaced by someone else"):
        undo()
    kind.compute_loss = theirs
    monkeypatch.undo()
    kind.compute_loss = theirs


def test_a_version_that_is_not_known(monkeypatch):
    monkeypatch.setattr(patches, "version", lambda _: "9.9.9")
    with (
        pytest.warns(UserWarning, match=r"tested with TRL 1\.16\.0, not with the 9\.9\.9"),
        apply_opsd_kernels_to_trl(),
    ):
        pass


def test_the_version_that_is_installed_is_known(recwarn):
    with apply_opsd_kernels_to_trl():
        pass
    assert trl.__version__ in patches.TESTED_VERSIONS
    assert not [w for w in recwarn if "opsd_kernels" in str(w.message)]


@pytest.mark.parametrize("hook", patches.HOOKS, ids=lambda hook: hook.replaced)
def test_a_signature_that_has_changed(hook, monkeypatch):
    module: Any = importlib.import_module(hook.module)
    *classes, name = hook.replaced.split(".")
    owner = getattr(module, classes[0]) if classes else module
    monkeypatch.setattr(owner, name, lambda self, model, batch: None)
    before = replaced()
    with pytest.raises(RuntimeError, match=rf"{hook.replaced} .*takes \(self, model, batch\)"):
        apply_opsd_kernels_to_trl()
    assert replaced() == before
    monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError, match=rf"has no {hook.module}\.{hook.replaced}, which"):
        apply_opsd_kernels_to_trl()


@pytest.mark.parametrize("hook", patches.HOOKS, ids=lambda hook: hook.replaced)
def test_what_ours_does_the_work_of_is_looked_at_too(hook, monkeypatch):
    for path in hook.signatures:
        where, _, path = path.rpartition(":")
        owner: Any = importlib.import_module(where or hook.module)
        *classes, name = path.split(".")
        for part in classes:
            owner = getattr(owner, part)
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, lambda another: None)
            with pytest.raises(RuntimeError, match=rf"{name} .*takes \(another\)"):
                apply_opsd_kernels_to_trl([hook.trainer])


def test_without_trl(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("opsd_kernels.trl")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"pip install 'trl>=1\.16'"):
        importlib.import_module("opsd_kernels.trl")


def test_trl_is_not_imported_by_the_package():
    code = "import opsd_kernels, sys; sys.exit('trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
