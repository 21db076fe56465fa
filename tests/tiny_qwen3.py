"""A Qwen3 of 30,000 parameters on the disk, with a tokenizer and a chat template like the real
one's, thinking switch included; and problems for it. And models of other families as small."""

import json
import random
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedTokenizerFast

from opsd_train.config import Config, make_config
from opsd_train.data import load_problems
from opsd_train.models import adapter_weights, load_model, load_tokenizer
from opsd_train.opsd import Setup
from opsd_train.run import set_up

# What a head of each is, beside its weight, and what the model needs to be as small.
FAMILIES: dict[str, dict[str, object]] = {
    "Qwen3": {"head_dim": 16},
    "Llama": {},
    "Gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0},  # tied
    "Granite": {"logits_scaling": 2.5},
    "Cohere": {"logit_scale": 0.4},  # tied
    "Phi": {"num_key_value_heads": 2, "resid_pdrop": 0.1},  # with a bias
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def save_tokenizer(path: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:],
        chat_template=chat_template,
    ).save_pretrained(path)


def save_model(path: Path, seed: int = 0, family: str = "Qwen3", **options: object) -> None:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 104,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": [2, 0],
        "bos_token_id": None,
    }
    sizes |= FAMILIES.get(family, {})
    config = getattr(transformers, f"{family}Config")(**sizes | options)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    if (bias := model.get_output_embeddings().bias) is not None:
        torch.nn.init.normal_(bias)
    # As the real ones say how they would be sampled; a run has its own mind about that.
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    model.save_pretrained(path)


def save_model_and_tokenizer(path: Path, **options: object) -> Path:
    save_model(path, **options)
    save_tokenizer(path)
    return path


def adapter_options(family: str) -> dict[str, object]:
    """Phi's layers have names of their own."""
    return {"lora_targets": ("q_proj", "dense", "fc1")} if family == "Phi" else {}


def save_adapter(model: Path, path: Path, std: float = 0.3, **options: object) -> Path:
    """PEFT's own LoRA of a model, which does something."""
    torch.manual_seed(3)
    values = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]} | options
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **values))
    for name, w in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(w, std=std)
    adapted.save_pretrained(path)
    return path


def save_problems(path: Path, total: int = 20) -> Path:
    """As JSONL, with one that is far too long."""
    rng = random.Random(0)
    rows = []
    for _ in range(total - 1):
        a, b = rng.randrange(100), rng.randrange(100)
        rows.append({"problem": f"{a} + {b}?", "solution": f"It is \\boxed{{{a + b}}}."})
    rows.insert(3, {"problem": "1 + 1? " * 200, "solution": "2"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(folder: Path, **options: object) -> Config:
    """Of a folder with a model and problems.jsonl."""
    values = {
        "model": str(folder / "model"),
        "data": str(folder / "problems.jsonl"),
        "dtype": "float32",
        "max_prompt_tokens": 512,
        "max_new_tokens": 12,
    }
    return make_config(values | options, preset={"lora_rank": 4})


def prepared(folder: Path, **options: object) -> Setup:
    """As a run prepares itself."""
    asked = config(folder, **options)
    model, tokenizer = load_model(asked.model, asked), load_tokenizer(asked.model)
    return set_up(asked, Accelerator(cpu=True), model, tokenizer, load_problems(asked))


def with_adapter(setup: Setup, std: float = 0.3) -> Setup:
    """An adapter that does something, on a model that was just prepared."""
    torch.manual_seed(1)
    for name, weight in adapter_weights(setup.model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=std)
    return setup
