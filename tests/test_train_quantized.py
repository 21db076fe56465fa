"""QLoRA: base weights in 4 bits, as far as a CPU goes."""

import importlib.util

import pytest
import tiny_qwen3
import torch
from tiny_qwen3 import prepared, with_adapter
from training_runs import metrics, run, shrunk
from transformers import AutoModelForCausalLM

from opsd_train.config import make_config
from opsd_train.export import export
from opsd_train.models import base_model
from opsd_train.opsd import opsd_loss, score, token_weights
from opsd_train.run.plan import count_parameters
from opsd_train.sampling import roll_out

IS_THERE = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not IS_THERE, reason="bitsandbytes is not installed")


def test_what_quantized_weights_do_not_go_with():
    base = {"model": "m", "data": "d.jsonl", "quantize": "nf4"}
    with pytest.raises(ValueError, match="quantize must be none with shard, got nf4"):
        make_config({**base, "shard": True})
    with pytest.raises(ValueError, match="quantize must be none with engine vllm"):
        make_config({**base, "engine": "vllm", "engine_urls": ["http://a"]})


@pytest.mark.skipif(IS_THERE, reason="bitsandbytes is installed")
def test_without_bitsandbytes(folder):
    with pytest.raises(ValueError, match="install it with `pip install bitsandbytes`"):
        prepared(folder, quantize="nf4")


@pytest.fixture
def model(tmp_path):
    """Wide enough for blocks of 64 weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    return tiny_qwen3.save_model_and_tokenizer(tmp_path / "model", **sizes)


@needs_bitsandbytes
def test_loss_and_gradient_are_those_of_the_weights_of_4_bits(folder, model):
    """Of a model whose weights are those that 4 bits stand for."""
    import bitsandbytes

    results = []
    for quantize in ("nf4", "none"):
        setup = prepared(folder, model=str(model), quantize=quantize)
        if quantize == "nf4":
            linear = {
                name: module.weight
                for name, module in base_model(setup.model).named_modules()
                if isinstance(module, bitsandbytes.nn.Linear4bit)
            }
            weights = {
                name: bitsandbytes.functional.dequantize_4bit(w.data, w.quant_state)
                for name, w in linear.items()
            }
            parameters = count_parameters(base_model(setup.model))
        else:
            modules = dict(base_model(setup.model).named_modules())
            with torch.no_grad():
                for name, w in weights.items():
                    modules[name].weight.copy_(w)
            assert count_parameters(base_model(setup.model)) == parameters
        with_adapter(setup)
        problems = setup.problems[:2]
        rollout = roll_out(setup.sampler, setup.contexts.student, problems, [1, 2])
        scores = score(setup.backbone, setup.teacher, setup.contexts.teacher, rollout)
        weighting = token_weights(scores.lengths, "rollout", 2, rollout.tokens)
        loss, _ = opsd_loss(scores, setup.head, setup.config, weighting)
        loss.backward()
        grads = [w.grad for name, w in setup.model.named_parameters() if "lora_" in name]
        results.append(
            (rollout.completions, loss.detach(), torch.cat([g.flatten() for g in grads]))
        )
    assert len(weights) == 14  # of two layers, all but embeddings and LM head
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-3, atol=1e-6)


@needs_bitsandbytes
def test_a_run_on_4_bits(folder, model, tmp_path):
    """Base weights unmoved, and its adapter merged into whole weights."""
    output = tmp_path / "run"
    options = ["--model", model, "--quantize", "nf4"]
    said = run(tmp_path / "log", *shrunk(folder, output, *options))
    assert "in torch.float32, quantized to nf4" in said
    assert "The base weights, which are the teacher, did not move" in said
    assert all(not m["skipped"] for m in metrics(output))
    export(output, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.float32
    assert not hasattr(merged.config, "quantization_config")
