"""Models as others make and change them: `LMHead.of` has the logits of their forward or refuses."""

import functools
import warnings
from types import MethodType

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.testing._internal.two_tensor import TwoTensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.heads import (
    KNOWN_MODELS,
    PAGE,
    classes,
    compare,
    known_models,
    page,
    read_without_list,
)
from opsd_kernels import LMHead
from opsd_kernels.head_check import head_logits

IDS = torch.arange(3, 9)[None]


def tiny(kind: type = Qwen3ForCausalLM, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=0.3,
        pad_token_id=0, tie_word_embeddings=False, **options,
    )  # fmt: skip
    return kind(config).eval().requires_grad_(False)


def assert_same_logits(model: nn.Module, backbone: nn.Module) -> None:
    h = backbone(input_ids=IDS).last_hidden_state
    z = head_logits(LMHead.of(model), h)
    torch.testing.assert_close(z, model(input_ids=IDS).logits)


# ... families

EQUAL = [
    "BartForCausalLM",
    "CodeGenForCausalLM",  # a bias, as GPT-J and Phi
    "Cohere2VisionForConditionalGeneration",  # its text config has a scale, which it does not apply
    "FalconH1ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",  # its text config has a cap, which it does not apply
    "GraniteMoeForCausalLM",
    "InklingForCausalLM",  # rows that it drops
    "LlavaForConditionalGeneration",
    "MiniCPM3ForCausalLM",
    "OPTForCausalLM",
    "PaliGemmaForConditionalGeneration",  # as Gemma 3, and applies it
    "Qwen3MoeForCausalLM",
    "RecurrentGemmaForCausalLM",
]
REFUSED = [
    "BertLMHeadModel",
    "ElectraForCausalLM",
    "ModernBertDecoderForCausalLM",
    "MusicgenForCausalLM",
    "ProphetNetForCausalLM",
    "RobertaForCausalLM",
]


@pytest.mark.parametrize("name", EQUAL)
def test_a_family_that_is_known(name):
    finding = compare(getattr(transformers, name), LMHead.of)
    assert finding.known, finding.reason


@pytest.mark.parametrize("name", REFUSED)
def test_a_family_that_is_not(name):
    assert not compare(getattr(transformers, name), read_without_list).known
    finding = compare(getattr(transformers, name), LMHead.of)
    assert finding.reason.startswith(("LMHead.of does not know how a", "not built"))


def test_what_the_page_and_the_list_say():
    """Of the handful above; the slow test has them all."""
    rows = dict(line.split(" | ", 1) for line in PAGE.read_text().splitlines() if "` | " in line)
    for name in EQUAL:
        assert rows[f"| `{name}`"].startswith("equal")
    for name in REFUSED:
        assert rows[f"| `{name}`"].startswith("refused")
    assert len(rows) > 250


@pytest.mark.slow
def test_every_class_of_transformers():
    """Every class is equal or refused; the list and the page say which."""
    warnings.filterwarnings("ignore")
    findings = [compare(kind, read_without_list) for kind in classes()]
    assert known_models(findings) == KNOWN_MODELS.read_text()
    assert page(findings) == PAGE.read_text()


def test_word_embeddings_of_another_size():
    config = transformers.OPTConfig(
        vocab_size=96, hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.OPTForCausalLM(config).eval().requires_grad_(False)
    assert_same_logits(model, model.base_model)


def test_an_encoder_decoder_is_refused():
    config = transformers.BartConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)  # with a final_logits_bias
    with pytest.raises(ValueError, match=r"how a BartForConditionalGeneration .*heads\.md"):
        LMHead.of(model)


# ... models of one's own


class Renamed(Qwen3ForCausalLM):
    """With the forward of its base."""


class Scaled(Qwen3ForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits / 2
        return outputs


class Called(Qwen3ForCausalLM):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_a_subclass():
    assert_same_logits(tiny(Renamed), tiny(Renamed).model)
    with pytest.raises(ValueError, match=r"forward of this Scaled was replaced .*LMHead\(weight"):
        LMHead.of(tiny(Scaled))
    with pytest.raises(ValueError, match="this Called has a __call__ of its own"):
        LMHead.of(tiny(Called))


def test_a_model_of_nobody_that_is_known():
    class Model(nn.Module):
        config = Qwen3Config(vocab_size=96)

        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(32, 96)

        def get_output_embeddings(self):
            return self.lm_head

        def forward(self, h):
            return self.lm_head(h)

    with pytest.raises(ValueError, match=r"does not know how a Model makes its logits"):
        LMHead.of(Model())


def halved(module: nn.Module, given: object, z: Tensor) -> Tensor:
    return z * 0.5


def doubled_input(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (given[0] * 2,)


def counted(*_: object) -> None:
    """What looks, and changes nothing, cannot be told from what does."""


class HalvingHook(ModelHook):
    def post_forward(self, module, output):
        return output * 0.5


HOOKS = {
    "forward on the head": lambda m: m.lm_head.register_forward_hook(halved),
    "before the head": lambda m: m.lm_head.register_forward_pre_hook(doubled_input),
    "a partial": lambda m: m.lm_head.register_forward_hook(functools.partial(halved)),
    "a watcher": lambda m: m.lm_head.register_forward_hook(counted),
    "backward of the head": lambda m: m.lm_head.register_full_backward_hook(counted),
    "before backward": lambda m: m.lm_head.register_full_backward_pre_hook(counted),
    "on the model": lambda m: m.register_forward_hook(counted),
    "before the model": lambda m: m.register_forward_pre_hook(counted),
    "old spectral norm": lambda m: spectral_norm(m.lm_head),
    "old weight norm": lambda m: weight_norm(m.lm_head),
    "pruning": lambda m: prune.l1_unstructured(m.lm_head, "weight", amount=0.5),
    "one's own of accelerate": lambda m: add_hook_to_module(m.lm_head, HalvingHook()),
    "among accelerate's": lambda m: add_hook_to_module(
        m.lm_head, SequentialHook(AlignDevicesHook("cpu"), HalvingHook())
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_is_refused(name):
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        HOOKS[name](model)
    with pytest.raises(ValueError, match=r" has a hook, .* Remove the hook\..*LMHead\(weight"):
        LMHead.of(model)


def test_a_hook_of_all_modules_is_refused():
    handle = nn.modules.module.register_module_forward_hook(halved)
    try:
        with pytest.raises(ValueError, match=r"has a hook, \w+\.halved"):
            LMHead.of(tiny())
    finally:
        handle.remove()
    LMHead.of(tiny())


def test_a_hook_between_backbone_and_logits_is_refused():
    config = transformers.XLMConfig(vocab_size=96, emb_dim=32, n_layers=1, n_heads=2)
    model = transformers.XLMWithLMHeadModel(config).eval().requires_grad_(False)
    LMHead.of(model)
    model.pred_layer.register_forward_hook(counted)
    with pytest.raises(ValueError, match="a XLMPredLayer of XLMWithLMHeadModel has a hook"):
        LMHead.of(model)


def test_a_hook_in_the_backbone_is_not_the_heads_concern():
    model = tiny()
    model.model.norm.register_forward_hook(halved)
    assert_same_logits(model, model.model)


def in_place_of(function):
    @functools.wraps(function)
    def replaced(*args, **kwargs):
        return function(*args, **kwargs)

    return replaced


REPLACED = {
    "of the head": lambda m: setattr(m.lm_head, "forward", lambda h: h @ m.lm_head.weight.T / 2),
    "of the head, under its name": lambda m: setattr(
        m.lm_head, "forward", in_place_of(m.lm_head.forward)
    ),
    "of the model": lambda m: setattr(m, "forward", in_place_of(m.forward)),
    "under a cast of accelerate's": lambda m: setattr(
        m, "forward", accelerate.utils.convert_outputs_to_fp32(in_place_of(m.forward))
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_replaced_forward_is_refused(name):
    model = tiny()
    REPLACED[name](model)
    with pytest.raises(ValueError, match=r"forward of .* was replaced by .*Put the forward back"):
        LMHead.of(model)


@pytest.mark.parametrize("kind", [Qwen3ForCausalLM, nn.Linear])
@pytest.mark.parametrize("wraps", [False, True])
def test_a_class_that_was_patched_is_refused(kind, wraps, monkeypatch):
    model, original = tiny(), kind.forward

    def forward(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", functools.wraps(original)(forward) if wraps else forward)
    with pytest.raises(ValueError, match=r"was replaced by test_heads_of_others\.forward"):
        LMHead.of(model)


def test_what_accelerate_compile_and_peft_wrap():
    model = tiny()
    for module in (model, model.lm_head):
        add_hook_to_module(module, SequentialHook(AlignDevicesHook("cpu")))
    assert_same_logits(model, model.model)
    assert LMHead.of(torch.compile(tiny())).scale == 1
    # As Accelerator.prepare does under mixed precision.
    model = tiny()
    cast = torch.autocast("cpu", torch.bfloat16)(type(model).forward)
    model.forward = MethodType(accelerate.utils.convert_outputs_to_fp32(cast), model)
    assert LMHead.of(model).scale == 1
    adapted = get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert LMHead.of(torch.compile(adapted)).weight is adapted.base_model.model.lm_head.weight
    adapted.register_forward_hook(counted)
    with pytest.raises(ValueError, match="this PeftModel has a hook"):
        LMHead.of(adapted)


def test_what_transformers_hooks_in_itself():
    """It records hidden states by hooks, once they were asked for."""
    model = tiny()
    model(input_ids=IDS, output_hidden_states=True, output_attentions=True)
    assert_same_logits(model, model.model)


# ... heads that are not the numbers of a matrix


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_head_is_refused(norm):
    model = tiny()
    norm(model.lm_head)
    with pytest.raises(ValueError, match=r"parametrized \(weight\): make an LMHead of its weight"):
        LMHead.of(model)


class Halving(nn.Linear):
    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) / 2


class Named(nn.Linear):
    """A Linear by another name."""


def test_a_subclass_of_linear():
    model = tiny()
    model.lm_head = Named(32, 96, bias=False)
    assert_same_logits(model.requires_grad_(False), model.model)
    model.lm_head = Halving(32, 96, bias=False)
    with pytest.raises(ValueError, match=r"a Halving, which may do more than torch\.nn\.Linear"):
        LMHead.of(model)
    model.lm_head = nn.Sequential(nn.Linear(32, 96))
    with pytest.raises(ValueError, match="a Sequential, has no weight"):
        LMHead.of(model)


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_head_is_refused():
    model = tiny()
    model.lm_head = torch.ao.quantization.quantize_dynamic(nn.Sequential(model.lm_head))[0]
    with pytest.raises(ValueError, match=r"the LM head is quantized \(Linear\)"):
        LMHead.of(model)
    model = tiny()
    weight = model.lm_head.weight.data
    model.lm_head.weight = nn.Parameter(TwoTensor(weight, weight), requires_grad=False)
    with pytest.raises(ValueError, match=r"the LM head is quantized \(Linear, TwoTensor\)"):
        LMHead.of(model)
