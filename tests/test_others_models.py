"""Models and adapters as others save them: with the weights of the file, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_qwen3
from fake_vllm import FakeVllm
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_qwen3 import config, prepared, save_adapter
from torch import Tensor

from opsd_train.config import make_config
from opsd_train.models import (
    adapter_weights,
    add_adapter,
    base_model,
    base_weights_sha256,
    load_adapter,
    load_model,
    load_tokenizer,
)
from opsd_train.models.loading import is_finite
from opsd_train.opsd import AdapterTeacher, BaseTeacher
from opsd_train.run import load

IDS = torch.arange(3, 10)[None]
Weights = dict[str, Tensor]


@pytest.fixture
def saved(tmp_path):
    return tiny_qwen3.save_model_and_tokenizer(tmp_path / "saved", tie_word_embeddings=False)


def rewrite(file: Path, change: Callable[[Weights], Weights]) -> Weights:
    before = load_file(file)
    save_file(change(dict(before)), file, metadata={"format": "pt"})
    return before


def say(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def loaded(folder, path):
    return load_model(str(path), config(folder))


# A model's weights


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_a_wrappers_prefix(folder, saved, prefix):
    rewrite(saved / "model.safetensors", lambda w: {prefix + k: v for k, v in w.items()})
    message = (
        r"are not those of a Qwen3ForCausalLM: 25 missing \(lm_head.weight, model.embed_tokens."
        rf"weight, .*, \.\.\.\); 25 unexpected \({prefix}.*; save it again without {prefix} in"
    )
    with pytest.raises(ValueError, match=message):
        loaded(folder, saved)


def of_layer(number: int) -> Callable[[str], bool]:
    return lambda key: f"layers.{number}." in key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if ".1." not in k}, r"11 missing \(model.layers.1"),
        (lambda w: w | {"score.weight": torch.ones(1, 32)}, r"1 unexpected \(score.weight\)"),
        (
            lambda w: w | {k.replace(".1.", ".2."): v + 0 for k, v in w.items() if ".1." in k},
            r"11 unexpected \(model.layers.2",
        ),
        (
            lambda w: {k: v[:96].clone() if len(v) == 104 else v for k, v in w.items()},
            r"2 of another shape \(lm_head.weight \[96, 32\] for \[104, 32\], model.embed",
        ),
        (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, r"1 missing \(lm_head"),
    ],
    ids=["a layer less", "another head", "a layer more", "another vocabulary", "no head"],
)
def test_other_weights_are_listed(folder, saved, change, message):
    rewrite(saved / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        loaded(folder, saved)
    if "missing" in message:
        with pytest.raises(ValueError, match=message):
            prepared(folder, teacher_model=str(saved))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder, saved, value):
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(w: Weights) -> Weights:
        w = {k: v.bfloat16() for k, v in w.items()}
        w[name][3, 4] = value
        return w

    rewrite(saved / "model.safetensors", spoil)
    with pytest.raises(ValueError, match=rf"not finite, in 1 tensors \({name}\): its file is dam"):
        loaded(folder, saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_number_that_is_not_finite_is_found_anywhere(dtype):
    w = torch.randn(7, 301).to(dtype)
    assert is_finite(w)
    assert is_finite(w[:0])
    for value in (torch.nan, torch.inf, -torch.inf):
        for at in (0, 150, 300):
            spoiled = w.clone()
            spoiled[3, at] = value
            assert not is_finite(spoiled)


def test_files_that_are_damaged_or_absent(folder, saved):
    file = saved / "model.safetensors"
    data, weights = file.read_bytes(), load_file(file)
    file.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"saved cannot be loaded: .*incomplete"):
        loaded(folder, saved)
    file.unlink()
    with pytest.raises(ValueError, match=r"saved cannot be loaded: .*no file named model"):
        loaded(folder, saved)
    one, two = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    where = {name: one if i < 5 else two for i, name in enumerate(sorted(weights))}
    some = {name: w for name, w in weights.items() if where[name] == one}
    save_file(some, saved / one, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"saved cannot be loaded: .*{two}"):
        loaded(folder, saved)
    say(saved / "config.json", num_hidden_layers=1)  # and two layer_types
    with pytest.raises(ValueError, match=r"cannot be loaded, for its config.json: .*layer_type"):
        loaded(folder, saved)


def test_what_may_be_missing_or_more(folder, tmp_path, saved):
    """A head that is tied, buffers of older versions, and one prefix that transformers knows."""
    tied = tiny_qwen3.save_model_and_tokenizer(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    model = loaded(folder, tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    buffers = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "masked_bias", "attention.bias")
    old = {f"model.layers.0.self_attn.{name}": torch.ones(8) for name in buffers}
    weights = rewrite(saved / "model.safetensors", lambda w: w | old)
    for file_has in (weights, {f"model.{name}": w for name, w in weights.items()}):
        rewrite(saved / "model.safetensors", lambda _, w=file_has: w)
        for name, w in loaded(folder, saved).state_dict().items():
            assert torch.equal(w, weights[name])


def test_weights_that_float16_cannot_hold(folder, saved):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(saved / "model.safetensors", lambda w: w | {name: w[name] + 1e5})
    with pytest.raises(ValueError, match=r"or float16 cannot hold them \(--dtype bfloat16 can\)"):
        load_model(str(saved), config(folder, dtype="float16"))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "cannot be loaded: .*not a valid JSON"),
        ("config.json", '{"model_type": "qwen9"}', "for its config.json: .*qwen9"),
        (
            "config.json",
            '{"auto_map": {"AutoConfig": "a.B"}}',
            "for its config.json: .*custom code",
        ),
        ("pytorch_model.bin", "junk", "saved cannot be loaded: "),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", "saved cannot be load"),
        ("adapter_config.json", "{", "holds an adapter"),
        ("adapter_config.json", "[]", "holds an adapter"),
    ],
)
def test_files_that_hold_something_else(folder, saved, file, text, message):
    if file == "pytorch_model.bin":
        (saved / "model.safetensors").unlink()
    (saved / file).write_text(text)
    with pytest.raises((OSError, ValueError), match=message):
        loaded(folder, saved)


@pytest.mark.parametrize("family", ["Qwen3", "Gemma2", "Phi", "Llama"])
def test_a_folder_without_a_tokenizer(tmp_path, family):
    """transformers makes an empty one of the model's type, and some prompts would have no token."""
    tiny_qwen3.save_model(tmp_path, family=family)
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}('s tokenizer cannot be| has no tokenizer: it)"
    ):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_tokenizer_that_is_damaged(saved, file, text):
    (saved / file).write_text(text)
    with pytest.raises(ValueError, match=f"^{saved}'s tokenizer cannot be loaded: "):
        load_tokenizer(str(saved))


def test_a_rope_that_nobody_knows(folder, saved):
    say(saved / "config.json", rope_parameters={"rope_type": "nothing", "rope_theta": 1.0})
    with pytest.raises(ValueError, match="saved cannot be loaded: no 'nothing'"):
        loaded(folder, saved)


def test_what_is_no_models_name(folder, saved):
    with pytest.raises(
        OSError, match="/nowhere/at/all does not exist; a model is a folder, or own"
    ):
        loaded(folder, "/nowhere/at/all")
    with pytest.raises(OSError, match="/nowhere/at/all does not exist"):
        prepared(folder, teacher_model="/nowhere/at/all")
    with pytest.raises(OSError, match=r"config\.json is a file; a model is a folder"):
        loaded(folder, saved / "config.json")


@pytest.mark.parametrize("family", tiny_qwen3.FAMILIES)
def test_families_load_as_they_are_saved(folder, tmp_path, family):
    path = tiny_qwen3.save_model_and_tokenizer(tmp_path / family, family=family)
    weights = load_file(path / "model.safetensors")
    for name, w in loaded(folder, path).state_dict().items():
        assert name not in weights or torch.equal(w, weights[name])


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "hqq", "compressed-tensors"])
def test_quantization_without_its_package(folder, saved, method):
    options = {"load_in_4bit": True} if method == "bitsandbytes" else {"bits": 4, "group_size": 8}
    say(saved / "config.json", quantization_config={"quant_method": method, **options})
    message = rf"^\S+saved is quantized \({method}\), and cannot be loaded: [^\n]*; install what"
    with pytest.raises(ValueError, match=message):
        loaded(folder, saved)


# Adapters


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    return save_adapter(folder / "model", tmp_path_factory.mktemp("peft") / "adapter")


@pytest.fixture
def changed(adapter, tmp_path):
    """A copy of the adapter, for a test to change."""
    path = tmp_path / "adapter"
    path.mkdir()
    for file in adapter.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_a_model_folder_that_holds_an_adapter(folder, saved, changed):
    for file in changed.iterdir():
        (saved / file.name).write_bytes(file.read_bytes())
    for path in (saved, changed):
        message = (
            rf"{path} holds an adapter \(adapter_config.json\), which a model's folder must not: "
            rf"name the model without it, perhaps {folder / 'model'}, and start from the adapter "
            rf"with --adapter {path}"
        )
        with pytest.raises(ValueError, match=message):
            loaded(folder, path)


def test_an_adapter_is_that_of_its_file(folder, adapter):
    theirs = PeftModel.from_pretrained(loaded(folder, folder / "model"), adapter)
    ours = load_adapter(loaded(folder, folder / "model"), adapter)
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    assert not any(w.requires_grad for w in ours.parameters())


def drop_one(w: Weights) -> Weights:
    return {k: v for k, v in w.items() if not ("layers.1" in k and "lora_B" in k)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: {
                k.replace("model.model.", "model._orig_mod.model."): v for k, v in w.items()
            },
            r"8 missing \(.*\); 8 unexpected \(.*; save it again without _orig_mod. in",
        ),
        (drop_one, r"2 missing \(base_model.model.model.layers.1.mlp.up_proj.lora_B.weight, "),
        (
            lambda w: w | {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)},
            r"1 unexpected \(base_model.model.lm_head.lora_A.weight\)",
        ),
        (
            lambda w: {k: v[:1].clone() if "lora_A" in k else v for k, v in w.items()},
            r"4 of another shape \(.* \[1, 32\] for \[2, 32\]",
        ),
        (lambda w: {k: v * torch.nan for k, v in w.items()}, r"not finite, in 8 tensors"),
    ],
    ids=["prefix", "some missing", "a head", "rank", "NaN"],
)
def test_other_weights_of_an_adapter_are_listed(folder, changed, change, message):
    rewrite(changed / "adapter_model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        load_adapter(loaded(folder, folder / "model"), changed)
    with pytest.raises(ValueError, match=message):
        prepared(folder, adapter=str(changed))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"use_dora": True}, r"more than plain LoRA, .* has LORA, use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"alora_invocation_tokens": [3, 4]}, r"alora_invocation_tokens=\[3, 4\]"),
        ({"bias": "all"}, "bias=all"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa, which changes the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora, which changes the base"),
        ({"a_feature_to_come": 3}, "a_feature_to_come=3"),
        ({"peft_type": "XLORA"}, "has XLORA"),
        ({"peft_type": "IA3"}, "has IA3"),
        ({"target_modules": ["nowhere"]}, "is no adapter of this model: Target modules"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_more_than_plain_lora_is_refused(folder, changed, said, message):
    say(changed / "adapter_config.json", **said)
    with pytest.raises(ValueError, match=message):
        load_adapter(loaded(folder, folder / "model"), changed)


def test_adapters_of_other_kinds_as_peft_saves_them(folder, tmp_path):
    base = loaded(folder, folder / "model")
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(base, ia3).save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="has IA3"):
        prepared(folder, adapter=str(tmp_path / "ia3"))
    head = save_adapter(folder / "model", tmp_path / "head", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"has weights for .*lm_head: the loss reads the LM head"):
        prepared(folder, adapter=str(head))
    (head / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not PEFT's: Expecting prop"):
        prepared(folder, adapter=str(head))


def test_embeddings_in_an_adapters_file(folder, changed):
    """PEFT saves them where a vocabulary was resized; another prefix would not help."""
    name = "base_model.model.model.embed_tokens.weight"
    rewrite(changed / "adapter_model.safetensors", lambda w: w | {name: torch.ones(104, 32)})
    with pytest.raises(ValueError, match=rf"1 unexpected \({name}\)$"):
        load_adapter(loaded(folder, folder / "model"), changed)


def test_an_adapter_in_a_pickle(folder, changed):
    (changed / "adapter_model.safetensors").rename(changed / "adapter_model.bin")
    with pytest.raises(
        OSError, match=r"no adapter_model.safetensors \(adapter_model.bin is not re"
    ):
        load_adapter(loaded(folder, folder / "model"), changed)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"r": "2"}, "is no adapter of this model: '<=' not supported"),
        ({"r": 0}, "is no adapter of this model: `r` should be a positive integer"),
        ({"target_modules": None}, r"not those of an adapter .* missing .* unexpected"),
    ],
)
def test_an_adapters_config_with_other_values(folder, changed, said, message):
    say(changed / "adapter_config.json", **said)
    with pytest.raises(ValueError, match=message):
        prepared(folder, adapter=str(changed))


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 5}},
        {"lora_dropout": 0.5},
        {"lora_alpha": 6.5},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda options: "-".join(options),
)
def test_plain_lora_as_it_comes(folder, tmp_path, options):
    """As PEFT loads it, in training mode too."""
    path = save_adapter(folder / "model", tmp_path / "adapter", **options)
    theirs = PeftModel.from_pretrained(loaded(folder, folder / "model"), path).eval()
    setup = prepared(folder, adapter=str(path))
    expected = theirs(input_ids=IDS).logits
    torch.testing.assert_close(setup.model.train()(input_ids=IDS).logits, expected)
    assert all(w.requires_grad for w in adapter_weights(setup.model).values())


def test_its_rank_and_targets_are_its_own(adapter, folder):
    given = {"model": str(folder / "model"), "data": "x.jsonl", "adapter": str(adapter)}
    asked = make_config(given, preset={"lora_rank": 64, "lora_alpha": 128})
    assert not {"lora_rank", "lora_alpha", "lora_targets"} & asked.as_dict().keys()
    assert make_config(asked.as_dict()).as_dict() == asked.as_dict()
    for name, value in (("lora_rank", 2), ("lora_alpha", 6), ("lora_targets", "q_proj")):
        with pytest.raises(ValueError, match=f"{name} has an effect only with a new adapter"):
            make_config(given | {name: value})
    with pytest.raises(OSError, match=r"is no adapter: it has no adapter_config\.json"):
        load(make_config(given | {"adapter": str(folder)}))


def test_the_teacher_of_a_run_from_an_adapter(folder, adapter):
    """Initial: with it, whatever the student becomes. Base: without."""
    fresh = loaded(folder, folder / "model")
    with torch.no_grad():
        base = fresh.model(input_ids=IDS).last_hidden_state
        start = load_adapter(fresh, adapter)(input_ids=IDS, output_hidden_states=True)
    scored = {}
    for name in ("initial", "base", "ema", "live"):
        setup = prepared(folder, adapter=str(adapter), teacher=name)
        sha256 = base_weights_sha256(setup.model)
        for w in adapter_weights(setup.model).values():
            torch.nn.init.normal_(w)
        ones = torch.ones_like(IDS)
        with setup.teacher.active(), torch.no_grad():
            scored[name] = setup.teacher.backbone(IDS, ones, ones.bool())
        moved = {n: w.clone() for n, w in adapter_weights(setup.model).items()}
        assert all(w.std() > 0.5 for w in moved.values()), "the student is as it was"
        assert base_weights_sha256(setup.model) == sha256
    torch.testing.assert_close(scored["initial"], start.hidden_states[-1][0])
    torch.testing.assert_close(scored["ema"], scored["initial"])
    torch.testing.assert_close(scored["base"], base[0])
    assert (scored["live"] - scored["initial"]).abs().max() > 0.1
    assert type(prepared(folder, adapter=str(adapter)).teacher) is AdapterTeacher
    assert type(prepared(folder, teacher="base").teacher) is BaseTeacher
    assert type(prepared(folder).teacher) is BaseTeacher


def test_vllm_samples_from_the_adapter_that_a_run_starts_from(folder, adapter, tmp_path):
    setup = prepared(folder, adapter=str(adapter))
    prompts = setup.contexts.student.token_ids(setup.problems[:2])
    with FakeVllm(folder / "model") as server:
        options = {"engine": "vllm", "engine_urls": [server.url], "engine_folder": str(tmp_path)}
        other = prepared(folder, adapter=str(adapter), **options)
        drawn = other.sampler.sample(prompts, [1, 2])
        assert drawn == setup.sampler.sample(prompts, [1, 2])
        assert other.sampler.sample(prompts, [1, 2]) == drawn
        with other.model.disable_adapter():
            assert other.sampler.sample(prompts, [1, 2]) != drawn
    never_omitted = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens"}
    for request in server.requests:
        assert never_omitted <= request.keys(), "or the server takes it from generation_config.json"


def test_a_model_whose_wrapper_does_more_is_refused(folder, monkeypatch):
    """The first batch shows it: what is sampled from is not what is scored."""
    from opsd_train.run import setup as room

    def with_a_hook(model, asked):
        adapted = add_adapter(model, asked)
        layer = base_model(adapted).model.layers[0].mlp
        layer.register_forward_hook(lambda module, given, h: h * getattr(layer, "factor", 1.0))
        adapted.register_forward_pre_hook(lambda *_: setattr(layer, "factor", 2.0))
        adapted.register_forward_hook(lambda *_: setattr(layer, "factor", 1.0))
        return adapted

    monkeypatch.setattr(room, "add_adapter", with_a_hook)
    with pytest.raises(ValueError, match=r"would not have the logits of this PeftModel\w+: on 16 "):
        prepared(folder)
