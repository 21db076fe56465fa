"""`LMHead.of`: what it reads of models of transformers is what they do, and what it cannot read it
refuses."""

import math

import pytest
import torch
import transformers
from inputs import random_inputs
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from opsd_kernels import LMHead, fused_jsd_loss, reference_jsd_loss

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Qwen3": {"head_dim": 16},
    "Llama": {},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0},
    "Gemma3": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "Granite": {"logits_scaling": 2.5},
    "Cohere": {"logit_scale": 0.4},
    "Cohere2": {"logit_scale": 0.4},
    "Phi": {"num_key_value_heads": 2},
    "HyperCLOVAX": {"logits_scaling": 0.5},
}


def model_of(family: str, **options: object) -> nn.Module:
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")
    causal = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = causal(config(**{**SIZES, **FAMILIES[family], **options})).eval()
    if (bias := model.get_output_embeddings().bias) is not None:
        nn.init.normal_(bias)
    return model.requires_grad_(False)


def logits_and_hidden(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return model(ids).logits[0], model.base_model(ids).last_hidden_state[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_models_logits(family):
    model = model_of(family).double()
    ids, others = torch.arange(3, 12)[None], torch.arange(13, 22)[None]
    (z_S, h_S), (z_T, h_T) = (logits_and_hidden(model, i) for i in (ids, others))
    head = LMHead.of(model)
    assert head.weight is model.get_output_embeddings().weight
    identity = torch.eye(99, dtype=torch.float64)
    for beta in (0.0, 0.5, 1.0):
        z = z_S.clone().requires_grad_()
        expected = reference_jsd_loss(z, z_T, identity, beta=beta, temperature=0.9)
        exact = reference_jsd_loss(h_S, h_T, head, beta=beta, temperature=0.9)
        assert expected > 1e-3
        torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-12)
        loss = fused_jsd_loss(
            h_S.float(), h_T.float(), LMHead.of(model.float()), beta=beta, temperature=0.9
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
        model.double()


def test_the_gradient_is_that_through_the_models_logits():
    """Of Gemma 2, whose head has a cap."""
    model = model_of("Gemma2").double()
    h_S, h_T, _ = (t.double() for t in random_inputs(5, 1, 32, size=2.0))
    h = h_S.clone().requires_grad_()
    z = 3.0 * torch.tanh(model.lm_head(h) / 3.0)
    z_T = 3.0 * torch.tanh(model.lm_head(h_T) / 3.0)
    nn.functional.kl_div(
        z.log_softmax(-1), z_T.log_softmax(-1), log_target=True, reduction="batchmean"
    ).backward()
    h_ref = h_S.clone().requires_grad_()
    reference_jsd_loss(h_ref, h_T, LMHead.of(model), beta=0.0).backward()
    torch.testing.assert_close(h_ref.grad, h.grad, rtol=1e-10, atol=1e-12)


def test_padded_rows_and_those_that_are_missing():
    model = model_of("Qwen3", vocab_size=128)
    assert LMHead.of(model).vocab_size is None
    model.config.vocab_size = 99
    assert LMHead.of(model).vocab_size == 99
    model.config.vocab_size = 256
    with pytest.raises(ValueError, match=r"128 rows, fewer than the vocabulary's 256: .*gathered"):
        LMHead.of(model)


def test_a_trainable_head_is_not_frozen_in_silence():
    model = model_of("Qwen3").requires_grad_(True)
    h_S, h_T, _ = random_inputs(5, 1, 32)
    assert not fused_jsd_loss(h_S, h_T, LMHead.of(model).detach()).requires_grad
    fused_jsd_loss(h_S, h_T, LMHead.of(model)).backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("family", "name"),
    [("Llama", "logit_scale"), ("Qwen3", "logits_scaling"), ("Gemma2", "logits_soft_cap"),
     ("Llama", "lm_head_multiplier")],
)  # fmt: skip
def test_what_a_config_says_and_the_forward_does_not_read_is_not_the_heads(family, name):
    model = model_of(family)
    ids = torch.arange(3, 12)[None]
    before = LMHead.of(model)
    logits = model(ids).logits
    setattr(model.config, name, 0.7)
    assert LMHead.of(model)[1:] == before[1:]
    assert torch.equal(model(ids).logits, logits)


def test_other_logits_are_no_concern_of_the_head():
    model = model_of("Gemma2", attn_logit_softcapping=50.0)
    model.config.output_router_logits = True
    assert LMHead.of(model).softcap == 3.0


def test_what_is_no_causal_model():
    with pytest.raises(TypeError, match=r"causal language model of transformers.*got Linear"):
        LMHead.of(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="no LM head: LlamaModel"):
        LMHead.of(model_of("Llama").model)


def test_an_adapter_on_the_head_is_refused():
    options = {"target_modules": ["q_proj"], "r": 2}
    assert LMHead.of(get_peft_model(model_of("Llama"), LoraConfig(**options))).scale == 1
    for on_head in ({"target_modules": ["lm_head"], "r": 2},
                    {**options, "modules_to_save": ["lm_head"]}):  # fmt: skip
        model = get_peft_model(model_of("Llama"), LoraConfig(**on_head))
        with pytest.raises(ValueError, match=r"wrapped by PEFT .*target_modules.*merge"):
            LMHead.of(model)


class Linear4bit(nn.Linear):
    """As that of bitsandbytes: a weight of packed bytes, and a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class DTensor(nn.Parameter):
    """Stands for that of torch.distributed, by its name."""


def quantized(head: nn.Linear) -> None:
    head.__class__ = Linear4bit
    packed = torch.zeros(99 * 16, 1, dtype=torch.uint8)
    head.weight = nn.Parameter(packed, requires_grad=False)


def sharded(head: nn.Linear) -> None:
    head.weight = DTensor(head.weight.data)


def replaced(weight: Tensor):
    def change(head: nn.Linear) -> None:
        head.weight = nn.Parameter(weight)

    return change


def with_a_forward(head: nn.Linear) -> None:
    head.__class__ = Linear4bit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (quantized, r"quantized \(Linear4bit, torch.uint8\): .*llm_int8_skip_modules"),
        (sharded, r"DTensor, sharded by FSDP2: .*unshard\(\).*full_tensor\(\)"),
        (replaced(torch.zeros(0)), r"got shape \[0\]: .*ZeRO-3.*gather"),
        (replaced(torch.zeros(99 * 32)), r"got shape \[3168\]: FSDP1 flattens"),
        (replaced(torch.zeros(99, 32, device="meta")), "on the meta device"),
        (with_a_forward, "a Linear4bit, which may do more than torch.nn.Linear"),
    ],
)
def test_a_head_that_is_not_whole_is_refused(change, message):
    model = model_of("Llama")
    change(model.get_output_embeddings())
    with pytest.raises(ValueError, match=message):
        LMHead.of(model)


def test_a_quantized_backbone_is_no_concern_of_the_head():
    model = model_of("Llama")
    quantized(model.model.layers[0].mlp.down_proj)
    assert LMHead.of(model).weight is model.lm_head.weight


def test_a_loss_refuses_a_sharded_weight_too():
    h_S, h_T, W = random_inputs(5, 20, 8)
    with pytest.raises(TypeError, match=r"W\.weight is a DTensor.*W\.weight\.full_tensor\(\)"):
        fused_jsd_loss(h_S, h_T, LMHead(DTensor(W)))
    assert math.isfinite(fused_jsd_loss(h_S, h_T, LMHead(W)))
