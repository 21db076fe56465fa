"""A model from the disk: as it was asked for, or refused."""

import json
import sys
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import tiny_qwen3
import torch
from tiny_qwen3 import config, prepared, with_adapter
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from opsd_train.data import join
from opsd_train.models import (
    add_adapter,
    base_model,
    check_not_merged,
    lm_head,
    load_model,
    save_memory,
)


def test_the_model_as_asked_for(folder):
    setup = prepared(folder, dtype="bfloat16", attention="eager", lora_targets=("q_proj",))
    base = base_model(setup.model)
    assert setup.head.weight.dtype == torch.bfloat16
    assert base.config._attn_implementation == "eager"
    assert base.is_activation_checkpointing
    trained = {n: w for n, w in setup.model.named_parameters() if w.requires_grad}
    assert all("q_proj.lora_" in name for name in trained)
    assert {w.dtype for w in trained.values()} == {torch.float32}
    assert prepared(folder).model.config._attn_implementation == "sdpa"


def test_activation_checkpointing_changes_nothing_but_memory(folder):
    gradients = []
    for checkpointing in (False, True):
        setup = prepared(folder, activation_checkpointing=checkpointing)
        h = setup.backbone.train()(*join([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], pad_id=0))
        h.square().sum().backward()
        gradients.append([w.grad for w in setup.model.parameters() if w.grad is not None])
    assert gradients[0]
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@contextmanager
def unpinned():
    """As on a GPU, but without pinned memory, which is not to be had without one."""
    with (
        mock.patch("opsd_train.models.memory.has_memory_of_its_own", return_value=True),
        mock.patch(
            "transformers.modeling_utils.save_on_cpu",
            side_effect=lambda **_: torch.autograd.graph.save_on_cpu(),
        ) as moved,
    ):
        yield moved


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Granite"])
@pytest.mark.parametrize(
    "options", [{"offload_checkpoints": True}, {"mlp_tokens": 3}, {"mlp_tokens": 1}]
)
def test_less_memory_changes_nothing_but_rounding(options, family, tmp_path):
    tiny_qwen3.save_model_and_tokenizer(tmp_path / "model", family=family)
    tiny_qwen3.save_problems(tmp_path / "problems.jsonl")
    sequences = join([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], pad_id=0)
    gradients = []
    for asked in ({}, options):
        with unpinned():
            setup = with_adapter(prepared(tmp_path, **asked))
            setup.model.double()  # of saturated attention the gradient is rounding, in fp32
            h = setup.backbone.train()(*sequences)
            h.sin().sum().backward()
        gradients.append([w.grad for w in setup.model.parameters() if w.grad is not None])
    assert gradients[0]
    for plain, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-12)


def test_what_layers_keep(folder):
    """Checkpoints go where save_on_cpu puts them, and an MLP sees a number of tokens at a time."""
    sequences = join([[5, 6, 7], [8]], [[9, 10], [11, 12, 13]], pad_id=0)
    with unpinned() as moved:
        setup = prepared(folder, offload_checkpoints=True, mlp_tokens=5)
        seen: list[int] = []
        for layer in base_model(setup.model).model.layers:
            layer.mlp.up_proj.register_forward_pre_hook(
                lambda _module, args: seen.append(args[0].shape[:-1].numel())
            )
        setup.backbone.train()(*sequences).sin().sum().backward()
    layers = base_model(setup.model).config.num_hidden_layers
    assert moved.call_count == layers
    # 12 tokens: forward, the layer again, and in its backward each tile again; but the layer's last
    # tile, after which nothing is kept, is not made twice.
    assert seen.count(5) == 2 * 3 * layers
    assert seen.count(2) == 2 * layers
    with pytest.raises(ValueError, match="offload_checkpoints needs activation_checkpointing"):
        config(folder, offload_checkpoints=True, activation_checkpointing=False)
    with pytest.raises(ValueError, match="mlp_tokens must be at least 1"):
        config(folder, mlp_tokens=0)


def test_a_model_without_mlps_has_none_to_tile(tmp_path):
    tiny_qwen3.save_model_and_tokenizer(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), config(tmp_path))
    for layer in model.model.layers:
        layer.feed_forward = layer.mlp
        del layer.mlp
    with pytest.raises(ValueError, match="layers of this Qwen3ForCausalLM have no module named"):
        save_memory(model, config(tmp_path, mlp_tokens=5))


def test_other_models_are_refused(folder, tmp_path):
    for kind in ("t5", "bart", "vit"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        message = f"is of type {kind}; the model must be a causal language model"
        with pytest.raises(ValueError, match=message):
            load_model(str(tmp_path), config(folder))
    with pytest.raises(OSError, match="no-such-model"):
        load_model(str(tmp_path / "no-such-model"), config(folder))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="liger needs a CUDA device"):
            prepared(folder, liger=True)
    with pytest.raises(ValueError, match="exceed the model's 2048 positions"):
        prepared(folder, max_new_tokens=2000)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Bert", {}),  # has layers between its decoder and its head
        ("Gemma3Text", {"head_dim": 16, "use_bidirectional_attention": True}),
        ("Rwkv", {"attention_hidden_size": 32}),  # takes padding for text
    ],
)
def test_a_model_whose_logits_the_loss_would_not_have_is_refused(folder, tmp_path, family, options):
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / family, family=family, **options)
    refused = rf"the logits of this {family[:4]}\w+: the model must be|how a BertLMHeadModel makes"
    with pytest.raises(ValueError, match=refused):
        lm_head(load_model(str(path), config(folder)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_changes_its_logits_in_silence_is_refused(folder, monkeypatch, dtype):
    """As one would whose config has a name for it that nobody knows."""
    asked = config(folder, dtype=dtype)
    forward = Qwen3ForCausalLM.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 0.8 * out.logits
        return out

    lm_head(load_model(asked.model, asked))
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", scaled)
    for options in ({}, {"teacher_model": str(folder / "model")}):
        with pytest.raises(ValueError, match="forward of this Qwen3ForCausalLM was replaced"):
            prepared(folder, dtype=dtype, **options)


def test_dropout_is_off(folder, tmp_path):
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / "phi", family="Phi", resid_pdrop=0.5)
    asked = config(folder)
    model = load_model(str(path), asked).train()
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, model.eval()(ids).logits)


def test_attention_that_sdpa_cannot_do(folder, tmp_path):
    """Gemma 2's attention has a cap."""
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / "gemma", family="Gemma2")
    asked = config(folder)
    assert load_model(str(path), asked).config._attn_implementation == "eager"


def test_targets_that_no_layer_has_are_named(folder, tmp_path):
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / "phi", family="Phi")
    message = (
        "names o_proj, gate_proj, up_proj, down_proj, which this PhiForCausalLM does not have; "
        "its linear layers are dense, fc1, fc2, k_proj, q_proj, v_proj"
    )
    with pytest.raises(ValueError, match=message):
        prepared(folder, model=str(path))


def test_kernels_that_are_not_installed_are_named(folder, monkeypatch):
    def not_installed(*_, **__):
        raise ImportError("there is no FlashAttention2.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    with pytest.raises(ValueError, match=r"liger cannot be used: .* `pip install -e '\.\[gpu\]'`"):
        load_model(str(folder / "model"), config(folder, liger=True))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    with pytest.raises(ValueError, match="liger has no kernels for models of type qwen3"):
        load_model(str(folder / "model"), config(folder, liger=True))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", not_installed)
    message = r"flash_attention_2 cannot be used: there is no .* `pip install -e '\.\[flash\]'`"
    with pytest.raises(ValueError, match=message):
        load_model(str(folder / "model"), config(folder, attention="flash_attention_2"))


def test_an_adapter_on_the_head_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="must not name lm_head"):
        prepared(folder, lora_targets=("q_proj", "lm_head"))
    prepared(folder, lora_targets=("q_proj", "embed_tokens"))
    tied = tiny_qwen3.save_model_and_tokenizer(tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"must not name model.embed_tokens"):
        prepared(folder, model=str(tied), lora_targets=("embed_tokens",))


def test_a_merged_adapter_is_refused(folder):
    asked = config(folder)
    model = add_adapter(load_model(asked.model, asked), asked)
    check_not_merged(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into"):
        check_not_merged(model)


@pytest.mark.parametrize("shape", [[104 * 32], [0]])
def test_a_head_flattened_or_emptied_by_sharding_is_refused(folder, shape):
    asked = config(folder)
    model = load_model(asked.model, asked)
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match="FSDP1 flattens it and ZeRO-3 leaves it empty"):
        lm_head(model)


def test_a_teacher_of_another_vocabulary_is_refused(folder, tmp_path):
    tiny_qwen3.save_model_and_tokenizer(tmp_path / "wide", vocab_size=110)
    with pytest.raises(ValueError, match="the student's vocabulary of 104, got 110"):
        prepared(folder, teacher_model=str(tmp_path / "wide"))
    tiny_qwen3.save_model_and_tokenizer(tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": ', '"ä": '))
    with pytest.raises(ValueError, match="2 entries differ"):
        prepared(folder, teacher_model=str(tmp_path / "other"))
