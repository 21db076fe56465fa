"""A model out of a GGUF file: the same model, in a folder that trains."""

import re
from pathlib import Path

import numpy as np
import pytest
import tiny_qwen3
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from opsd_train import from_gguf
from opsd_train.config import make_config
from opsd_train.models import load_config, load_model, load_tokenizer

gguf = pytest.importorskip("gguf")

CONFIG = make_config({"model": "small", "data": "sums", "dtype": "float32"})
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "he"]
HEADS, KV_HEADS = 2, 1


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    ).requires_grad_(False)


def as_llama_cpp_turns(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order that llama.cpp rotates them in: pairs side by
    side, where transformers has all first halves before all second ones."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, change: str = "") -> None:
    """The model, its layers' matrices rounded to 4 bits, there and in the file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tiny_qwen3.CHAT_TEMPLATE)
    if change == "scaled":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    layer = model.model.layers[0]
    tensors = {
        "token_embd": model.model.embed_tokens.weight,
        "output_norm": model.model.norm.weight,
        "blk.0.attn_norm": layer.input_layernorm.weight,
        "blk.0.ffn_norm": layer.post_attention_layernorm.weight,
        "blk.0.attn_q": layer.self_attn.q_proj.weight,
        "blk.0.attn_k": layer.self_attn.k_proj.weight,
        "blk.0.attn_v": layer.self_attn.v_proj.weight,
        "blk.0.attn_output": layer.self_attn.o_proj.weight,
        "blk.0.ffn_gate": layer.mlp.gate_proj.weight,
        "blk.0.ffn_up": layer.mlp.up_proj.weight,
        "blk.0.ffn_down": layer.mlp.down_proj.weight,
    }
    if change == "frequencies":  # as of Llama 3
        tensors["rope_freqs"] = torch.ones(16)
    elif change == "lacking":
        del tensors["blk.0.ffn_up"]
    packed = gguf.GGMLQuantizationType.Q4_1
    heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}
    for name, w in tensors.items():
        if w.dim() == 2 and name != "token_embd":
            bits = gguf.quantize(w.numpy(), packed)
            w.copy_(torch.from_numpy(gguf.dequantize(bits, packed)))
            if name in heads:
                bits = as_llama_cpp_turns(bits, heads[name])
            writer.add_tensor(f"{name}.weight", bits, raw_dtype=packed)
        else:
            writer.add_tensor(f"{name}.weight", w.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, LlamaForCausalLM]:
    model, path = small_llama(), tmp_path_factory.mktemp("gguf") / "small.Q4_1.gguf"
    write_gguf(path, model)
    return path, model


@pytest.fixture(scope="module")
def unpacked(packed) -> Path:
    path, _ = packed
    folder = path.parent / "cache" / "small"
    from_gguf.main([str(path), str(folder)])
    return folder


def test_the_weights_are_those_of_the_file(packed, unpacked):
    _, model = packed
    found = load_model(str(unpacked), CONFIG)
    for name, w in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], w), name
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    tokenizer = load_tokenizer(str(unpacked))
    assert tokenizer("he é<|im_end|>")["input_ids"][0] == TOKENS.index("he")
    assert tokenizer.decode(tokenizer("he é<|im_end|>")["input_ids"]) == "he é<|im_end|>"
    assert tokenizer.chat_template == tiny_qwen3.CHAT_TEMPLATE
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|im_end|>", "<|im_end|>")
    assert [path.name for path in unpacked.parent.iterdir()] == [unpacked.name]


def test_gguf_as_a_model_is_refused_with_what_helps(packed):
    path, _ = packed
    remedy = re.escape(f"`python -m opsd_train.from_gguf {path} FOLDER`")
    for name in (path, path.parent):
        with pytest.raises(OSError, match=remedy):
            load_config(str(name))
    (path.parent / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        load_config(str(path.parent / "empty"))


def test_what_cannot_be_unpacked(packed, unpacked, tmp_path, monkeypatch):
    path, _ = packed
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"broken\.gguf cannot be read: "):
        from_gguf.convert(broken, tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="is not there"):
        from_gguf.convert(tmp_path / "none.gguf", tmp_path / "new")
    with pytest.raises(FileExistsError, match="name a new folder"):
        from_gguf.convert(path, unpacked)
    monkeypatch.setattr(from_gguf, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'opsd-kernels\\[gguf\\]'"):
        from_gguf.convert(path, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.gguf"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("scaled", r"scales rotary positions \(llama\.rope\.scaling\.type\)"),
        ("frequencies", r"scales rotary positions \(rope_freqs\.weight\)"),
        ("lacking", r"lacks 1 weights of the model, as model\.layers\.0\.mlp\.up_proj\.weight"),
    ],
)
def test_another_model_is_not_made_of_it(change, message, tmp_path):
    write_gguf(tmp_path / "odd.gguf", small_llama(), change)
    with pytest.raises(ValueError, match=message):
        from_gguf.convert(tmp_path / "odd.gguf", tmp_path / "new")
    assert not (tmp_path / "new").exists()
