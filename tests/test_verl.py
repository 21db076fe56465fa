"""Steps of verl's FSDP engine, with ours from hidden states and without from logits: the same loss,
gradients and figures. `make test-verl` runs them, in an environment that has verl."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks

pytestmark = pytest.mark.verl

TOLERANCE = 1e-5
OURS = {"external_lib": "opsd_kernels.verl"}
LOSSES = ("log_probs", "entropy", "forward_kl_topk")
OF_TOP_K = {
    "distillation_losses",
    "student_mass",
    "teacher_mass",
    "overlap_count",
    "overlap_token_advantage",
}
REWARDS = {"rewards": True}
ENTROPY = {"calculate_entropy": True}
ALONE = {"distillation_only": True}
NO_TOP_K = {"distillation_use_topk": False, "k": 1}
K3 = {"mode": "k3"}  # an estimate from the sampled tokens

# The model, processes, and options of engine, batch and loss.
CASES: list[Any] = [
    ("Qwen3", 1, {}, {}, {}),
    ("Qwen3", 1, {}, ALONE, {"log_prob_min_clamp": None}),
    ("tied", 1, {}, {"temperature": 1.0}, {"log_prob_min_clamp": -4.0, "loss_max_clamp": 2.0}),
    ("Qwen3", 1, {"strategy": "fsdp"}, ENTROPY, REWARDS),
    ("tied", 1, {"lora": 4}, ENTROPY, REWARDS),
    ("Qwen3", 1, {"backend": "triton"}, ENTROPY, {}),
    ("Gemma2", 1, {}, ENTROPY, REWARDS),
    ("Granite", 1, {}, ENTROPY, REWARDS),
    ("Phi", 2, {}, ENTROPY, REWARDS),
    ("Qwen3", 2, {}, ENTROPY, REWARDS),
    ("tied", 2, {}, ENTROPY, REWARDS),
    ("Qwen3", 2, {}, ALONE, {}),
    ("tied", 2, {}, ALONE, {}),
    ("Qwen3", 2, {"reshard_after_forward": False}, ALONE, {}),
    ("Qwen3", 2, {"use_no_sync_for_gradient_accumulation": False}, {}, {}),
    ("Qwen3", 2, {"fsdp_size": 1}, {}, {}),
    ("Qwen3", 2, {"lora": 4}, ENTROPY, REWARDS),
    ("Qwen3", 2, {"strategy": "fsdp"}, {}, {}),
    ("tied", 2, {"strategy": "fsdp"}, ALONE, {}),
    ("Qwen3", 2, {"strategy": "fsdp", "use_orig_params": True, "lora": 4}, ENTROPY, REWARDS),
    ("Qwen3", 2, {"sequence_parallel": 2}, ENTROPY, REWARDS),
    ("Qwen3", 1, {}, NO_TOP_K | ENTROPY, K3),
    ("Qwen3", 2, {}, NO_TOP_K, K3 | REWARDS),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from verl_runs import FAMILIES, save_model

    folder = tmp_path_factory.mktemp("verl")
    save_model(folder / "tied", tie_word_embeddings=True)
    for family in FAMILIES:
        save_model(folder / family, family)
    return folder


def run(
    folder: Path,
    model: str,
    world_size: int,
    engine: dict[str, Any],
    batch: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    before: Any = None,
) -> list[dict[str, Any]]:
    from verl_runs import step

    given = (folder / model, engine, batch or {}, loss or {}, before)
    return on_ranks(step, world_size, folder, *given, start_method="fork")


def assert_same(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float = TOLERANCE
) -> None:
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine["made"].keys() == yours["made"].keys()
        for name, value in yours["made"].items():
            torch.testing.assert_close(mine["made"][name], value, rtol=tolerance, atol=tolerance)
        assert mine["loss"] == pytest.approx(yours["loss"], rel=tolerance)
        assert mine["figures"] == pytest.approx(yours["figures"], rel=tolerance, abs=tolerance)
        assert mine["gradients"].keys() == yours["gradients"].keys()
        assert mine["gradients"]
        for name, value in yours["gradients"].items():
            off = (mine["gradients"][name] - value).norm()
            assert off <= tolerance * value.norm(), name


@pytest.mark.parametrize(
    ("model", "world_size", "engine", "batch", "loss"),
    CASES,
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else str(x),
)
def test_a_step_is_the_same(model, world_size, engine, batch, loss, folder, capfd):
    theirs = run(folder, model, world_size, engine | {"fused": False}, batch, loss)
    ours = run(folder, model, world_size, engine | OURS, batch, loss)
    assert_same(ours, theirs)
    has_top_k = batch.get("distillation_use_topk", True)
    wanted = (
        not batch.get("distillation_only", False),
        batch.get("calculate_entropy", False),
        has_top_k,
    )
    expected = [
        ("FSDPEngineWithLMHead", name, "ours", "", 2)  # 2 micro-batches
        for name, is_wanted in zip(LOSSES, wanted, strict=True)
        if is_wanted
    ]
    losses = ", ".join(row[1] for row in expected)
    said = f"opsd_kernels computes {losses} of FSDPEngineWithLMHead from hidden states"
    printed = capfd.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("opsd_kernels")] == [said]
    for told in ours:
        assert told["routes"] == expected
        assert not told["warnings"]
        assert (told["made"].keys() >= OF_TOP_K) == has_top_k


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_without_a_loss_it_is_the_same(strategy, folder):
    from verl_runs import infer

    def made_by(**engine: Any) -> Any:
        given = (folder / "Qwen3", {"strategy": strategy} | engine)
        return on_ranks(infer, 2, folder, *given, start_method="fork")

    for (mine, counted), (yours, _) in zip(made_by(**OURS), made_by(fused=False), strict=True):
        assert [row[1:3] for row in counted] == [("log_probs", "ours"), ("entropy", "ours")]
        assert mine.keys() == yours.keys() == {"log_probs", "entropy"}
        for name, value in yours.items():
            torch.testing.assert_close(mine[name], value, rtol=TOLERANCE, atol=TOLERANCE)


def test_in_bf16(folder):
    """verl rounds logits to bf16; ours does not. Apart by such a rounding at most."""
    theirs = run(folder, "Qwen3", 2, {"dtype": "bf16", "fused": False}, ENTROPY, REWARDS)
    ours = run(folder, "Qwen3", 2, {"dtype": "bf16", **OURS}, ENTROPY, REWARDS)
    largest = 16.0  # of the logits
    for mine, yours in zip(ours, theirs, strict=True):
        assert [row[2] for row in mine["routes"]] == ["ours"] * 3
        off = (mine["made"]["log_probs"] - yours["made"]["log_probs"]).abs().max()
        assert off < 2 * largest * torch.finfo(torch.bfloat16).eps
        assert mine["loss"] == pytest.approx(yours["loss"], rel=0.02)


def test_memory_is_counted(tmp_path):
    peaks = in_another_process(_peaks, tmp_path)
    logits = 512 * 151_936 * 2 / 2**20  # MiB of them, once, in bf16
    for head in ("trained", "frozen"):
        assert peaks[head, "verl"] > 4 * logits
        assert peaks[head, "ours"] < logits + 100 * (head == "trained")


def _peaks() -> dict[tuple[str, str], float]:
    from benchmarks.more.verl_memory import count

    cases = [(head, method) for head in ("trained", "frozen") for method in ("verl", "ours")]
    return {case: count("tiny", 512, 4, *case).peak_mib for case in cases}


# ... what stays verl's


@pytest.mark.parametrize(
    ("strategy", "batch", "error"),
    [("fsdp", {}, "KeyError"), ("fsdp2", NO_TOP_K, "mixed torch.Tensor and DTensor")],
)
def test_what_verls_own_fused_kernels_cannot_do(strategy, batch, error, folder):
    """No top-k loss, and no head that FSDP2 has sharded."""
    with pytest.raises(Exception, match=error):
        run(folder, "Qwen3", 1, {"strategy": strategy}, batch, K3 if batch else {})


def test_verls_own_fused_kernels_leave_out_a_softcap(folder):
    engine = {"strategy": "fsdp"}
    of_logits = run(folder, "Gemma2", 1, engine | {"fused": False}, NO_TOP_K, K3)
    fused = run(folder, "Gemma2", 1, engine, NO_TOP_K, K3)
    off = fused[0]["made"]["log_probs"] - of_logits[0]["made"]["log_probs"]
    assert off.abs().max() > 1


@pytest.mark.parametrize(
    ("engine", "batch", "reason"),
    [
        ({"fused": False}, {}, "model.use_fused_kernels is False"),
        (
            {"strategy": "fsdp", "remove_padding": False},
            NO_TOP_K | {"use_remove_padding": False},
            "model.use_remove_padding is False",
        ),
    ],
)
def test_what_stays_verls_is_said_once(engine, batch, reason, folder):
    mode = {} if batch.get("distillation_use_topk", True) else K3
    theirs = run(folder, "Qwen3", 2, engine, batch, mode)
    ours = run(folder, "Qwen3", 2, engine | OURS, batch, mode)
    assert_same(ours, theirs)
    said = f"FSDPEngineWithLMHead computes verl's own loss: {reason}"
    assert [told["warnings"] for told in ours] == [[said], []]
    for told in ours:
        assert {row[2:4] for row in told["routes"]} == {("theirs", reason)}


def test_a_model_that_is_not_known_stays_verls(folder):
    def forget_qwen3() -> None:
        from opsd_kernels.verl import forward

        forward.KNOWN = frozenset()

    strategy = {"strategy": "fsdp"}
    theirs = run(folder, "Qwen3", 1, strategy | {"fused": False}, NO_TOP_K, K3)
    ours = run(folder, "Qwen3", 1, strategy | OURS, NO_TOP_K, K3, forget_qwen3)
    assert_same(ours, theirs)
    reason = "opsd_kernels does not know how a Qwen3ForCausalLM makes its logits"
    assert ours[0]["warnings"] == [f"FSDPEngineWithLMHead computes verl's own loss: {reason}"]
    assert ours[0]["routes"][0][2:4] == ("theirs", reason)


def test_reasons(tmp_path):
    assert in_another_process(_reasons, tmp_path) == {
        "k": "600 tokens at a position are above 511",
        "early": "the Model was built before opsd_kernels.verl was imported",
        "vision": "a Model has a fused forward of its own in verl (verl.models.transformers.glm4v)",
        "backend": 'model.fused_kernel_options.impl_backend is not "torch", "triton" or "liger"',
        "engine": "opsd_kernels does not know the prepare_model_outputs of this engine",
        "turbo": "opsd_kernels does not know the _build_fsdp_module of this engine",
        "critic": None,
        "ours": None,
    }


def _reasons() -> dict[str, str | None]:
    from verl.models.transformers import dense_common, glm4v
    from verl.workers.engine import FSDPTurboEngineWithLMHead
    from verl.workers.engine.fsdp.transformer_impl import (
        FSDPEngineWithLMHead,
        FSDPEngineWithValueHead,
    )
    from verl_runs import make_batch

    class Engine(FSDPEngineWithLMHead):
        def prepare_model_outputs(self, *_: Any) -> None: ...

    class Model:
        forward = dense_common.forward_with_torch_backend

    from opsd_kernels.verl import engine

    def reason(kind: type = FSDPEngineWithLMHead, **wanted: Any) -> str | None:
        made = object.__new__(kind)
        made.module, made.use_ulysses_sp = Model(), False
        batch = make_batch(0, use_fused_kernels=True)
        return engine.why_theirs(made, batch, engine.Wanted(True, False, **no_teacher | wanted))

    no_teacher = {"ids": None, "log_q": None}
    found = {"early": reason()}
    Model.forward = glm4v.forward_with_torch_backend
    found["vision"] = reason()
    Model.forward = lambda self: None
    found["backend"] = reason()
    Model.forward = dense_common.forward_with_torch_backend
    found["ours"] = reason()
    found["k"] = reason(ids=torch.zeros(1, 1, 600))
    found["engine"] = reason(Engine)
    found["turbo"] = reason(FSDPTurboEngineWithLMHead)
    prepare = engine._prepare_model_inputs(lambda *_: ({}, {}), None)
    critic = object.__new__(FSDPEngineWithValueHead)
    found["critic"] = prepare(critic, make_batch(0, use_fused_kernels=True))[0].get(engine.KEY)
    return found


# ... applying and undoing


def in_another_process(function: Any, folder: Path) -> Any:
    """What `function()` returns where the adapter was not imported."""
    import verl_runs  # noqa: F401 (before the fork)

    def run_it(_: int) -> Any:
        torch.distributed.init_process_group("gloo")
        return function()

    return on_ranks(run_it, 1, folder, start_method="fork")[0]


def test_applied_by_import_and_undone(tmp_path):
    assert in_another_process(_applied_and_undone, tmp_path) == []


def _applied_and_undone() -> list[str]:
    """What went wrong."""
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    wrong = []
    before = FSDPEngineWithLMHead.prepare_model_inputs
    from opsd_kernels.verl import apply_opsd_kernels_to_verl, explain

    during = FSDPEngineWithLMHead.prepare_model_inputs
    if during is before:
        wrong.append("import alone")
    ours = [
        row.loss for row in explain() if row.trainer == "FSDPEngineWithLMHead" and not row.reason
    ]
    if ours != list(LOSSES):
        wrong.append(f"explained: {ours}")
    undo = apply_opsd_kernels_to_verl()
    if FSDPEngineWithLMHead.prepare_model_inputs is not during:
        wrong.append("twice")
    undo()
    if FSDPEngineWithLMHead.prepare_model_inputs is not before:
        wrong.append("undone")
    if {row.whose for row in explain()} != {"theirs"}:
        wrong.append("explained when undone")
    with apply_opsd_kernels_to_verl():
        if FSDPEngineWithLMHead.prepare_model_inputs is before:
            wrong.append("again")
    if FSDPEngineWithLMHead.prepare_model_inputs is not before:
        wrong.append("undone again")
    return wrong


def test_a_signature_that_has_changed(tmp_path):
    assert in_another_process(_changed_signatures, tmp_path) == []


def _changed_signatures() -> list[str]:
    """Functions of verl whose change is not noticed."""
    import importlib

    from opsd_kernels.verl import apply_opsd_kernels_to_verl
    from opsd_kernels.verl.patches import HOOKS

    apply_opsd_kernels_to_verl()()
    unnoticed = []
    for hook in HOOKS:
        for path in hook.signatures:
            module, _, name = path.rpartition(":")
            owner = importlib.import_module(module or hook.module)
            *classes, name = name.split(".")
            for part in classes:
                owner = getattr(owner, part)
            theirs = vars(owner)[name]
            setattr(owner, name, lambda another: None)
            try:
                apply_opsd_kernels_to_verl()()
                unnoticed.append(path)
            except RuntimeError as error:
                if f"{name} of verl 0.9.1" not in str(error) or "takes (another)" not in str(error):
                    unnoticed.append(str(error))
            setattr(owner, name, theirs)
    return unnoticed
