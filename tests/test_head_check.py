"""A head is compared with the model's own logits: equal, or refused with a figure."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from opsd_kernels import LMHead
from opsd_kernels.head_check import TOKENS, check_head, head_logits


def tiny(seed: int = 0, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=0.3,
            pad_token_id=0, tie_word_embeddings=False, **options,
        )
    )  # fmt: skip


def check(model: nn.Module, head: LMHead, backbone: nn.Module, **inputs: Tensor) -> None:
    ids = inputs.pop("input_ids", torch.arange(3, 9)[None])
    check_head(
        model,
        lambda **given: head_logits(head, backbone(**given).last_hidden_state),
        ids,
        **inputs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_models_own_head(dtype):
    model = tiny().to(dtype)
    check(model, LMHead.of(model), model.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [{"scale": 0.9}, {"softcap": 4.0}, {"bias": "random"}])
def test_another_head_is_refused_with_a_figure(change, dtype):
    model = tiny().to(dtype)
    if "bias" in change:
        change = {"bias": torch.randn(96, dtype=dtype)}
    with pytest.raises(
        ValueError, match=r"this Qwen3ForCausalLM: on 6 tokens they differ by 0\.\d"
    ):
        check(model, LMHead(model.lm_head.weight, **change), model.model)


def test_a_constant_for_all_tokens_changes_no_probability():
    model = tiny()
    check(model, LMHead(model.lm_head.weight, torch.full((96,), 3.0)), model.model)


def test_entries_that_are_banned():
    model = tiny()
    bias = torch.zeros(96)
    bias[7] = -torch.inf
    head = LMHead(model.lm_head.weight, bias)
    with pytest.raises(ValueError, match="differ by inf"):
        check(model, head, model.model)
    model.lm_head.bias = nn.Parameter(bias)
    check(model, head, model.model)


def test_other_numbers_of_entries_are_named():
    model = tiny()
    with pytest.raises(ValueError, match=r"logits \[6, 90\] where .* makes \[6, 96\]"):
        check(model, LMHead(model.lm_head.weight, vocab_size=90), model.model)


def test_logits_of_nan_are_not_the_models():
    model = tiny()
    head = LMHead(torch.full_like(model.lm_head.weight, torch.nan))
    with pytest.raises(ValueError, match="differ by nan"):
        check(model, head, model.model)


def test_what_a_wrapper_does_is_seen():
    """Hidden states from within an adapter's wrapper, whose forward does more than call it."""
    adapted = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
    causal = adapted.base_model.model
    head = LMHead.of(causal)
    adapted.train()
    check(adapted, head, causal.model)  # dropout is off
    assert adapted.training
    causal.model.layers[0].mlp.register_forward_hook(lambda *given: given[2] * causal.factor)
    causal.factor = 1.0
    adapted.register_forward_pre_hook(lambda *_: setattr(causal, "factor", 2.0))
    adapted.register_forward_hook(lambda *_: setattr(causal, "factor", 1.0))
    with pytest.raises(ValueError, match="this PeftModel"):
        check(adapted, head, causal.model)


def test_few_tokens_without_padding_and_modes_as_they_were():
    model = tiny().train()
    model.model.layers[0].eval()
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs, module.training)), with_kwargs=True
    )
    ids = torch.arange(2 * 40).reshape(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :39] = 0
    mask[1, :10] = 0
    check(model, LMHead.of(model), model.model, input_ids=ids, attention_mask=mask)
    assert len(seen) == 2
    for kwargs, training in seen:
        assert kwargs["input_ids"].tolist() == [list(range(50, 50 + TOKENS))]
        assert kwargs["attention_mask"].all()
        assert not training
    # What follows the tokens is left out too.
    mask[1, 14:] = 0
    check(model, LMHead.of(model), model.model, input_ids=ids, attention_mask=mask)
    assert seen[-1][0]["input_ids"].tolist() == [list(range(50, 54))]
    assert model.training
    assert model.lm_head.training
    assert not model.model.layers[0].mlp.training


def test_modes_are_put_back_when_a_forward_fails():
    model = tiny().train()
    with pytest.raises(ZeroDivisionError):
        check_head(model, lambda **_: 1 / 0, torch.ones(1, 3, dtype=torch.long))
    assert model.training
