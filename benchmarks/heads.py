"""Every causal language model of the installed transformers: does `LMHead.of` have its logits?

    python benchmarks/heads.py [--write] [CLASS ...]

Each class is built as small as it goes, with random weights, biases, caps and scales. Its own
logits are compared with those that the head that is read of it makes of the last hidden states of
its backbone. Classes where both are equal, to the rounding of fp32, are those that `LMHead.of`
takes; all others it refuses. With --write they are written to opsd_kernels/heads/known_models.py,
and the whole table to docs/heads.md. About a minute on one core.
"""

import ast
import inspect
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from opsd_kernels.head_check import head_logits
from opsd_kernels.heads.head import LMHead
from opsd_kernels.heads.head_of_model import (
    SCALES,
    SOFTCAPS,
    VOCABULARIES,
    backbone_of,
    check_model,
    read_head,
)

ROOT = Path(__file__).parents[1]
KNOWN_MODELS = ROOT / "opsd_kernels" / "heads" / "known_models.py"
PAGE = ROOT / "docs" / "heads.md"

VERSION = transformers.__version__
# fp32 on a CPU, over the spread of the logits.
TOLERANCE = 1e-5
LARGEST = 120_000_000  # parameters of a model that is built
VOCABULARY = 99
# By the name of an attribute of a config, and of the configs in it, the most that it may be.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(^|src_|tgt_)vocab_size(_per_layer_input)?$", VOCABULARY),
    (
        r"^(hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|word_embed_proj_dim|embedding_size"
        r"|projection_dim|out_hidden_size|text_hidden_size|embedding_dim|lru_width|output_dim"
        r"|attention_hidden_size|projector_hidden_size|encoder_hidden_size)$",
        256,
    ),
    (r"^(num_hidden_layers|n_layers?|(num_)?(decoder_|encoder_)?layers|depth)$", 2),
    (r"(attention_heads|n_heads?|num_heads|key_value_heads|num_key_heads|num_value_heads)$", 2),
    (r"^n_group$|^topk_group$", 1),
    (r"intermediate_size|ffn_dim|d_ff|ffn_hidden_size|n_inner|inner_dim|mlp_dim", 48),
    (r"lora_rank$", 8),
    (r"num_experts$|^n_routed_experts$|^num_local_experts$|^moe_num_experts$", 4),
    (r"experts_per_tok(en)?$|top_?k$", 2),
    (r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len", 64),
    (r"image_size$", 32),
    (r"patch_size$", 16),
)
IDS = re.compile(r"(token_id|token_index|_id)$")
# What models multiply logits by, or cap them at, by any name that one has for it: set in every
# config, whether the model's forward reads it or not.
LOGIT_NUMBERS = {
    "final_logit_softcapping": 1.5,
    "logits_soft_cap": 1.5,
    "output_logit_soft_cap": 1.5,
    "logit_scale": 0.4,
    "logits_scaling": 2.5,
    "logits_mup_width_multiplier": 1.6,
    "dim_model_base": 100,
    "lm_head_multiplier": 0.7,
    "output_multiplier": 1.3,
    "unpadded_vocab_size": VOCABULARY - 6,
}
# What a forward reads under such a name must be found in the head that is read of its model.
SCALE_OR_CAP = re.compile(r"scal|multiplier|soft_?cap")
# What else a class needs to be built, or to be as small: attributes of its config.
ROPE = {
    kind: {"rope_type": "default", "rope_theta": 1e4}
    for kind in ("full_attention", "sliding_attention")
}
OPTIONS: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": {"num_expert_group": 1},
    "BambaForCausalLM": {"mamba_n_heads": 8},
    "CodeGenForCausalLM": {"n_head": 4, "rotary_dim": 32},
    "CohereCompassForCausalLM": {"rope_parameters": ROPE},
    "CohereCompassForConditionalGeneration": {"text_config.rope_parameters": ROPE},
    "DbrxForCausalLM": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config.mlp_layer_types": ["dense", "dense"],
    },
    "Dots1ForCausalLM": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    "Ernie4_5_MoeForCausalLM": {"moe_k": 2},
    "Ernie4_5_VLMoeForConditionalGeneration": {"text_config.moe_k": 2},
    "FalconH1ForCausalLM": {"mamba_d_head": 64, "mamba_d_ssm": 128},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "Glm46VForConditionalGeneration": {"text_config.head_dim": 64},
    "Glm4vForConditionalGeneration": {"text_config.head_dim": 64},
    "GlmOcrForConditionalGeneration": {"text_config.head_dim": 64},
    "Granite4VisionForConditionalGeneration": {"deepstack_layer_map": []},
    "GraniteMoeHybridForCausalLM": {"mamba_n_heads": 8},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 128},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 128},
    "HunYuanVLForConditionalGeneration": {
        "text_config.head_dim": 128,
        "text_config.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [16, 16, 16, 16],
        },
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    "MarianForCausalLM": {"decoder_vocab_size": VOCABULARY},
    "MinistralForCausalLM": {"head_dim": 128},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "NemotronHForCausalLM": {"mamba_num_heads": 8},
    "NemotronH_Omni_Reasoning_V3": {"text_config.mamba_num_heads": 8},
    "Qwen4ExpForCausalLM": {"layer_types": ["linear_attention"] * 2},
    "Qwen4ExpForConditionalGeneration": {"text_config.layer_types": ["linear_attention"] * 2},
    "Step3p7ForConditionalGeneration": {"text_config.sliding_window": 64},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {"mamba_headdim": 64},
}


@dataclass(frozen=True)
class Finding:
    """What became of a class."""

    name: str
    head: LMHead | None  # that equals the model's own, or None
    reason: str = ""  # if there is none

    @property
    def known(self) -> bool:
        return self.head is not None

    @property
    def verdict(self) -> str:
        return "equal" if self.known else "refused"

    @property
    def words(self) -> str:
        """The head in words, or why it is refused."""
        if self.head is None:
            return self.reason
        parts = ["h Wᵀ + b" if self.head.bias is not None else "h Wᵀ"]
        if self.name in SCALES:
            path, power = SCALES[self.name]
            parts.append(f"{'times' if power == 1 else 'over'} `{path}`")
        if self.name in SOFTCAPS:
            parts.append(f"capped at `{SOFTCAPS[self.name]}`")
        if self.name in VOCABULARIES:
            parts.append(f"the first `{VOCABULARIES[self.name]}`")
        return ", ".join(parts)


def classes() -> Iterator[type]:
    """All of them, by name."""
    found: set[Any] = set()
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        for given in mapping.values():
            found |= set(given) if isinstance(given, tuple) else {given}
    yield from sorted(found, key=lambda kind: kind.__name__.lower())


def build(kind: Any) -> nn.Module:
    """A tiny model of a class, on which all that may be part of its head does something."""
    torch.manual_seed(0)
    config = kind.config_class()
    shrink(config)
    for path, value in OPTIONS.get(kind.__name__, {}).items():
        *owners, name = path.split(".")
        owner = config
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in kind(config).parameters())
    if parameters > LARGEST:
        raise ValueError(f"it has {parameters / 1e6:.0f} million parameters where it is smallest")
    model = kind(config).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        if "bias" in name and t.is_floating_point():
            t.normal_(0, 0.3, generator=g)
    embeddings = model.get_output_embeddings()
    if isinstance(getattr(embeddings, "weight", None), Tensor):
        embeddings.weight.normal_(0, 0.2, generator=g)
    return model


def shrink(config: Any) -> None:
    for given in (*LOGIT_NUMBERS.items(), ("is_decoder", True)):
        set_if_possible(config, *given)
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            if IDS.search(name) and value >= VOCABULARY:
                set_if_possible(config, name, 3)
            for pattern, most in SIZES:
                if re.search(pattern, name) and value > most:
                    set_if_possible(config, name, most)
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and value:
            set_if_possible(config, name, [value[0], value[-1]])


def set_if_possible(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # one that is computed, or checked against others
        return


def compare(kind: Any, read: Callable[[Any], LMHead]) -> Finding:
    """Build a model, and compare its own logits with those of the head that is read of it."""
    name = kind.__name__
    try:
        model = build(kind)
        logits, h, of_head = run(model)
    except Exception as error:
        return Finding(name, None, f"not built: {first_line(error)}")
    try:
        head = read(model)
    except (TypeError, ValueError, AttributeError) as error:
        return Finding(name, None, first_line(error))
    if h is None:
        return Finding(name, None, "it has no backbone that returns its last hidden states")
    if (apart := distance(head, h, logits)) < TOLERANCE:
        if unread := numbers_left_out(kind, head):
            return Finding(name, None, f"its forward reads {', '.join(unread)}")
        return Finding(name, head)
    if of_head is not None and distance(head, of_head, logits) < TOLERANCE:
        return Finding(name, None, "what enters its head is not what its backbone returns")
    return Finding(name, None, f"its logits are others (by {apart:.2g} of their spread)")


def run(model: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits, the last hidden states of the backbone, and what enters the module of the head."""
    entered: list[Tensor] = []
    embeddings = model.get_output_embeddings()
    hook = None
    if isinstance(embeddings, nn.Module):
        hook = embeddings.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    ids = torch.tensor([[4, 17, 5, 60, 33, 8, 71, 12]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
        backbone, h = backbone_of(model), None
        if backbone is not None:
            h = getattr(backbone(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hook is not None:
        hook.remove()
    return logits, None if h is None else h[0], entered[0][0] if entered else None


def distance(head: LMHead, h: Tensor, logits: Tensor) -> float:
    """Between the logits of a head and a model's own, over the spread of these."""
    try:
        z = head_logits(head, h.float())
    except (RuntimeError, ValueError):
        return float("inf")
    if z.shape != logits.shape:
        return float("inf")
    logits = logits.float()
    spread = (logits - logits.mean(-1, keepdim=True)).norm()
    return float((z - logits).norm() / spread)


def numbers_left_out(kind: Any, head: LMHead) -> list[str]:
    """Scales and caps that a class's forward reads, where its head has none: a number that happens
    to do nothing in a tiny model would not be seen in its logits."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
    names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return sorted(
        name
        for name in names
        if SCALE_OR_CAP.search(name)
        and (head.softcap is None if "cap" in name else head.scale == 1)
    )


def read_without_list(model: Any) -> LMHead:
    return LMHead(*read_head(*check_model(model)))


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160] or type(error).__name__


def known_models(findings: list[Finding]) -> str:
    """The text of opsd_kernels/heads/known_models.py."""
    names = "\n".join(f'        "{finding.name}",' for finding in findings if finding.known)
    return f'''"""The classes of transformers {VERSION} whose logits are those of the head that
`LMHead.of` reads of them.

Made by `python benchmarks/heads.py --write`.
"""

KNOWN = frozenset(
    (
{names}
    )
)
'''


def page(findings: list[Finding]) -> str:
    """The text of docs/heads.md."""
    known = sum(finding.known for finding in findings)
    rows = "\n".join(f"| `{f.name}` | {f.verdict} | {f.words} |" for f in findings)
    return (
        INTRODUCTION.format(version=VERSION, total=len(findings), known=known)
        + f"\n| class | `LMHead.of` | logits, or why not |\n|---|---|---|\n{rows}\n"
    )


INTRODUCTION = """# Which heads does `LMHead.of` know?

`LMHead.of(model)` runs no forward. It knows by its class what a model of transformers makes of its
last hidden states: the product with the head's weight, and a bias, a scale or a softcap. It reads
these numbers where the forward of that class reads them, and nowhere else: some vision-language
models have a text config with a cap or a scale that their own forward never applies.

It refuses, and says what to do instead:

- a class that is not in the table below, and models that come with code of their own;
- a forward that was replaced by something other than accelerate, FSDP2, DeepSpeed, TRL or
  transformers: the model's, its head's, or that of a module between them. A subclass is taken as
  long as its forward is that of a class in the table;
- a hook of anything else on these modules, forward or backward: the loss calls neither the head nor
  its hooks;
- a head that has an adapter, is parametrized, quantized or sharded, or is on no device.

In these cases make the head by hand, and compare it once with the model's own logits:

```python
from opsd_kernels import LMHead
from opsd_kernels.head_check import check_head, head_logits

head = LMHead(model.lm_head.weight, bias=None, softcap=None, scale=1.0)

check_head(  # ValueError, with a figure, where the loss would have other logits than the model
    model,
    lambda **inputs: head_logits(head, model.model(**inputs).last_hidden_state),
    input_ids,
    attention_mask,
)
```

The harness and the adapter for TRL make this comparison on the first batch. So they also see what
was changed later, or by an adapter's wrapper.

The table is of transformers {version}: every class for causal language models, and for text from
images. Of {total} classes {known} are equal; the others are refused. Each was built as small as
possible, with random weights, biases, caps and scales, and its own logits were compared with those
that the head makes of its backbone's last hidden states (`python benchmarks/heads.py --write`). A
class that could not be built on a CPU, for want of a package or of images, is refused too.
"""


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    write = "--write" in sys.argv[1:]
    names = [argument for argument in sys.argv[1:] if argument != "--write"]
    findings = []
    for kind in classes():
        if not names or kind.__name__ in names:
            findings.append(compare(kind, read_without_list))
            print(f"{findings[-1].name}: {findings[-1].verdict}, {findings[-1].words}", flush=True)
    if write and not names:
        KNOWN_MODELS.write_text(known_models(findings))
        PAGE.write_text(page(findings))


if __name__ == "__main__":
    main()
