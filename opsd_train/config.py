"""All options of a run, in one place. Each field is a key of a YAML file and an option
of the command line; the defaults are the paper's figures where it gives them.

Plain values become typed ones here by code of our own: jsonargparse, tyro and transformers'
HfArgumentParser were tried on what tests/test_train_config.py asks for. The last two do not check
the values of a file. jsonargparse does, but for it `none` is no value, a list with commas no list
and `--no-` no switch, and it names no nearest key; most of what follows would stay around it.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from opsd_kernels import Divergence
from opsd_kernels.scalars import check_clip, check_temperature, check_weight
from opsd_train.errors import did_you_mean
from opsd_train.files import UniqueKeyLoader

STUDENT_TEMPLATE = "{problem}\n\nReason step by step, and put your final answer within \\boxed{}."
TEACHER_TEMPLATE = (
    "{problem}\n\nFor reference, this is a correct solution:\n\n{solution}\n\n"
    "Work the problem again from the beginning, in your own words and without mentioning the "
    "reference. Reason step by step, and put your final answer within \\boxed{}."
)
Template = str | tuple[dict[str, str], ...]
"""A text, or chat messages: {"role": ..., "content": a text}."""

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SECTIONS = ("model", "teacher", "data", "sampling", "objective", "optimization", "run")
"""Of the options, in `--help`."""


def option(default: Any = dataclasses.MISSING, *, section: str = "", help: str) -> Any:
    """A field of `Config`. The section that it names is that of the fields after it as well."""
    return field(default=default, metadata={"section": section, "help": help})


BOUNDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (
        (
            *("lora_rank", "lora_alpha", "mlp_tokens", "max_problems", "held_out"),
            *("max_prompt_tokens", "max_new_tokens", "rollout_batch_size", "steps", "batch_size"),
            *("micro_batch_size", "micro_batch_tokens", "save_every", "keep_last", "eval_every"),
        ),
        lambda x: x >= 1,
        "be at least 1",
    ),
    (("learning_rate", "max_grad_norm"), lambda x: 0 < x < math.inf, "be positive and finite"),
    (("ema_decay", "warmup"), lambda x: 0 <= x < 1, "lie in [0, 1)"),
    (("top_p",), lambda x: 0 < x <= 1, "lie in (0, 1]"),
    (("top_k", "record_rollouts", "workspace_mib"), lambda x: x >= 0, "not be negative"),
    # The loss takes 512 ids. One of them is that of the sampled token.
    (("teacher_top_k",), lambda x: 1 <= x <= 511, "lie in [1, 511]"),
    (("ahead",), lambda x: x in (0, 1), "be 0 or 1"),
    (("seed",), lambda x: 0 <= x < 2**32, "lie in [0, 2**32)"),
)
"""What numbers must be, where they are not none."""

REMOVED: dict[str, tuple[Any, str]] = {
    "engine_timeout": (3600.0, "a server has four hours for a rollout"),
    "patience": (None, "a run takes all its steps, or ends with Ctrl-C"),
    "record_every": (10, "every tenth step is recorded; --record-rollouts 0 records none"),
}
"""Options of earlier versions: their default, which a config file may still name, and what is done
now."""


@dataclass(frozen=True)
class Config:
    model: str = option(
        section="model", help="causal language model: its folder, or its name on the hub"
    )
    data: str = option(
        section="data",
        help="data set: hub name or folder; or files, with commas between them: .jsonl, .json, "
        ".csv, .tsv or .parquet",
    )

    dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", section="model", help="of the weights"
    )
    quantize: Literal["none", "nf4"] = option(
        "none", help="nf4: base weights in 4 bits (QLoRA, by bitsandbytes); the LM head in dtype"
    )
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = option(
        "auto", help="auto: FlashAttention 2 where it is installed, else sdpa"
    )
    liger: bool = option(False, help="Liger's kernels in the layers (CUDA)")
    activation_checkpointing: bool = option(True, help="recompute layers in backward")
    offload_checkpoints: bool = option(
        False, help="keep the inputs that layers are recomputed from in host memory"
    )
    mlp_tokens: int | None = option(
        None, help="tokens that an MLP takes at a time, recomputed in backward (none: all)"
    )
    train: Literal["adapter", "full"] = option(
        "adapter", help="full: all weights but embeddings and LM head, in float32, no adapter"
    )
    lora_rank: int = option(64, help="rank of the adapter")
    lora_alpha: int = option(128, help="the adapter's scale is alpha / rank")
    lora_targets: tuple[str, ...] = option(
        LORA_TARGETS, help="layers with an adapter; all-linear: every linear layer but the LM head"
    )
    adapter: Path | None = option(
        None, help="folder of a LoRA adapter to start from, with its rank, alpha and targets"
    )

    teacher: Literal["initial", "base", "live", "ema"] = option(
        "initial",
        section="teacher",
        help="which adapter the teacher has: the one that training began with, none, the "
        "student's, or the student's average",
    )
    ema_decay: float = option(0.99, help="decay of the ema teacher's average")
    teacher_model: str | None = option(None, help="another model, same vocabulary, as the teacher")
    teacher_urls: tuple[str, ...] | None = option(
        None,
        help="another model, same tokenizer, as the teacher: vLLM servers that run it, as "
        "http://localhost:8000; with commas between them",
    )
    # Others send 32 to 128 (verl) or 64 (NeMo-RL). A token takes about 5 kB of JSON.
    teacher_top_k: int = option(
        64, help="likeliest tokens that the teacher's servers send at each position"
    )
    outside: Literal["bucket", "renormalize", "ignore"] = option(
        "bucket",
        help="all tokens that the teacher's servers do not send: one entry of the divergence; "
        "left out of both distributions; or ignored",
    )

    split: str = option("train", section="data", help="of a data set on the hub")
    problem_column: str = option("problem", help="text, or chat messages: the user's last")
    solution_column: str = option("solution", help="text, or chat messages: the assistant's last")
    where: dict[str, Any] | None = option(
        None, help="rows to keep, {column: value} or {column: [values]}"
    )
    max_problems: int | None = option(None, help="use only the first rows, at most this many")
    held_out: int | None = option(
        None,
        help="problems to keep from training and evaluate on; their solutions must have the answer "
        "in \\boxed{}",
    )
    skip_bad_rows: bool = option(
        False, help="go on without rows that cannot be read (default: list them, and stop)"
    )
    max_prompt_tokens: int = option(
        8192,
        help="a problem with a longer prompt is dropped; less by default where the model has fewer "
        "positions",
    )

    student_template: Template = option(
        STUDENT_TEMPLATE, help="{problem} stands for the problem; text, or a list of chat messages"
    )
    teacher_template: Template = option(
        TEACHER_TEMPLATE,
        help="the same for the teacher; {solution} stands for its reference solution",
    )
    student_thinking: bool | None = option(None, help="chat template's switch (none: its default)")
    teacher_thinking: bool | None = option(None, help="chat template's switch (none: its default)")

    engine: Literal["generate", "vllm"] = option(
        "generate", section="sampling", help="transformers' generate, or servers of vLLM"
    )
    engine_urls: tuple[str, ...] | None = option(
        None, help="of vLLM servers that run, as http://localhost:8000; with commas between them"
    )
    engine_folder: Path | None = option(
        None, help="a folder that every server can read, for adapters (none: the temporary folder)"
    )
    ahead: int = option(
        0, help="1: vLLM samples the next batch while this one is trained on, one step off-policy"
    )
    temperature: float = option(1.2, help="of sampling and of the loss")
    top_p: float = option(1.0, help="sample from the likeliest tokens that together have this mass")
    top_k: int = option(0, help="sample from this many of the likeliest tokens; 0 for all")
    max_new_tokens: int = option(
        2048, help="longest rollout; less by default where the model has fewer positions"
    )
    rollout_batch_size: int | None = option(
        None, help="rollouts a process samples at once (none: its whole share of the batch)"
    )

    objective: Literal["divergence", "sampled_token"] = option(
        "divergence",
        section="objective",
        help="over the whole vocabulary, or of the sampled token alone",
    )
    beta: float | None = option(
        0.5, help="teacher's weight in the JSD; 0 and 1 name forward and reverse KL"
    )
    forward_weight: float | None = option(
        None, help="of KL(teacher‖mixture); with beta none of KL(teacher‖student)"
    )
    reverse_weight: float | None = option(
        None, help="of KL(student‖mixture); with beta none of KL(student‖teacher)"
    )
    entry_clip: float | None = option(None, help="clip of each vocabulary entry's value")
    advantage_clip: float | None = option(None, help="clip of the sampled token's log-ratio")
    mean: Literal["rollout", "token"] = option(
        "rollout", help="over each rollout's tokens, then the batch; or over all tokens alike"
    )
    workspace_mib: float | None = option(None, help="bound on the loss's vocabulary-sized tensors")

    steps: int = option(100, section="optimization", help="OPSD steps")
    batch_size: int = option(32, help="problems, and rollouts, a step, over all processes")
    micro_batch_size: int = option(1, help="rollouts a process scores at once")
    micro_batch_tokens: int | None = option(
        None,
        help="score rollouts of similar length together, up to this many tokens with their "
        "prompts, in place of micro_batch_size",
    )
    learning_rate: float = option(2e-5, help="peak learning rate of AdamW on the adapter")
    schedule: Literal["cosine", "constant"] = option("cosine", help="after warm-up")
    warmup: float = option(0.1, help="share of the steps over which the learning rate rises")
    max_grad_norm: float = option(1.0, help="gradients are scaled down to this norm")
    shard: bool = option(False, help="spread the weights over the processes (FSDP2)")
    seed: int = option(0, help="of the adapter, the order of problems and all sampling")

    output_dir: Path | None = option(
        None, section="run", help="run folder (default: runs/<date>-<time>)"
    )
    save_every: int = option(10, help="steps between checkpoints")
    keep_last: int = option(3, help="checkpoints to keep")
    resume: bool = option(False, help="go on from the run folder's last checkpoint, if any")
    overwrite: bool = option(False, help="replace the run that the run folder holds")
    tracker: Literal["none", "trackio", "wandb", "tensorboard"] = option(
        "none", help="where metrics go besides metrics.jsonl"
    )
    dry_run: bool = option(
        False, help="show prompts, lengths and memory, do one step, write nothing"
    )
    record_rollouts: int = option(
        2, help="rollouts of some steps that are recorded token by token, for the report"
    )
    eval_every: int = option(
        10, help="steps between evaluations, where there are held-out problems"
    )

    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """The options that the user gave, not those of a preset. Only the others may be fitted to a
    model, or be left without effect."""

    def __post_init__(self) -> None:
        for names, fits, wanted in BOUNDS:
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"{name} must {wanted}, got {value}")
        check_temperature(self.temperature)
        for name in ("forward_weight", "reverse_weight"):
            if (weight := getattr(self, name)) is not None:
                check_weight(name, weight)
        _ = self.divergence  # which is checked where it is made
        check_clip("advantage_clip", self.advantage_clip)
        if wrong := [*contradictions(self), *wrong_templates(self), *given_without_effect(self)]:
            raise ValueError("\n".join(wrong))

    @property
    def has_other_teacher(self) -> bool:
        """Whether the teacher is another model than the student's."""
        return self.teacher_model is not None or bool(self.teacher_urls)

    @property
    def divergence(self) -> Divergence:
        """What the loss is, unless the objective is another."""
        return Divergence(self.beta, self.forward_weight, self.reverse_weight, self.entry_clip)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and JSON: of the options that have an effect."""
        idle = without_effect(self)
        names = [f.name for f in options() if f.name not in idle]
        values = {name: getattr(self, name) for name in names}
        for name, value in values.items():
            if isinstance(value, Path):
                values[name] = str(value)
            elif isinstance(value, tuple):
                values[name] = list(value)
        return values


def options() -> list[dataclasses.Field]:
    """Every field of `Config` that is an option."""
    return [f for f in dataclasses.fields(Config) if "help" in f.metadata]


def without_effect(config: Config) -> dict[str, str]:
    """Options that others leave without effect, and what gives them one."""
    idle: dict[str, str] = {}
    if config.objective == "sampled_token":
        of_divergence = ("beta", "entry_clip", "forward_weight", "reverse_weight", "outside")
        idle |= dict.fromkeys(of_divergence, "objective divergence; it is sampled_token")
    else:
        idle["advantage_clip"] = "objective sampled_token; it is divergence"
    lora = ("lora_rank", "lora_alpha", "lora_targets")
    if config.train == "full":
        idle |= dict.fromkeys(lora, "train adapter")
    elif config.adapter is not None:
        idle |= dict.fromkeys(lora, "a new adapter; one that is loaded has its own")
    if config.teacher != "ema":
        idle["ema_decay"] = f"teacher ema; it is {config.teacher}"
    if not config.teacher_urls:
        idle |= dict.fromkeys(("teacher_top_k", "outside"), "teacher_urls")
    if config.micro_batch_tokens is not None:
        idle["micro_batch_size"] = "micro_batch_tokens none; give one of the two"
    if config.engine != "vllm":
        idle["engine_folder"] = f"engine vllm; it is {config.engine}"
    if config.held_out is None:
        idle["eval_every"] = "held_out problems to evaluate"
    return idle


def given_without_effect(config: Config) -> list[str]:
    """What is wrong with options that the user gave, and that have no effect beside the others."""
    return [
        f"{name} has an effect only with {needs}"
        for name, needs in without_effect(config).items()
        if name in config.given and getattr(config, name) is not None
    ]


PLACEHOLDER = re.compile(r"(?<![\\\w}^_])\{(\w+)\}")  # not what LaTeX has in braces: \boxed{x}


def template_text(template: Template) -> str:
    """All that a template says."""
    if isinstance(template, str):
        return template
    return "\n".join(message["content"] for message in template)


def wrong_templates(config: Config) -> Iterator[str]:
    """What is wrong with a template that lacks what it is to show, or names what is nothing."""
    for name in ("student_template", "teacher_template"):
        text = template_text(getattr(config, name))
        for word in PLACEHOLDER.findall(text):
            if word not in ("problem", "solution"):
                yield (
                    f"{name} has {{{word}}}, which stands for nothing; {{problem}} and {{solution}}"
                    f" do{did_you_mean(word, ['problem', 'solution'])}"
                )
        if "{problem}" not in text:
            yield f"{name} must contain {{problem}}, got {text!r}"
    if "{solution}" in template_text(config.student_template):
        yield "student_template contains {solution}, which only the teacher may see"
    if "{solution}" not in template_text(config.teacher_template) and not config.has_other_teacher:
        yield (
            "teacher_template must contain {solution}, without which the teacher knows no more than"
            " the student; only a teacher_model, or one of teacher_urls, may do without"
        )


def contradictions(config: Config) -> Iterator[str]:
    """What is wrong with options that do not go together."""
    if config.offload_checkpoints and not config.activation_checkpointing:
        yield "offload_checkpoints needs activation_checkpointing: it moves its checkpoints"
    if config.shard and config.quantize != "none":
        yield f"quantize must be none with shard, got {config.quantize}"
    if config.has_other_teacher and config.teacher != "initial":
        beside = "a teacher_model" if config.teacher_model is not None else "teacher_urls"
        yield f"teacher must be initial beside {beside}, which has no adapter; got {config.teacher}"
    if config.overwrite and config.resume:
        yield "overwrite and resume contradict each other; give one of them"
    if config.resume and config.output_dir is None:
        yield "resume has an effect only with output_dir: by default a run has a new folder"
    if not config.lora_targets:
        yield "lora_targets must name at least one layer"
    for name, wanted, why in (
        ("dtype", "float32", "16 bits round small updates away"),
        ("engine", "generate", "vLLM takes adapters alone"),
        ("quantize", "none", "weights of 4 bits cannot be trained"),
        ("shard", False, "a sharded model trains an adapter alone"),
        ("adapter", None, "it is no part of the model"),
    ):
        if config.train == "full" and (value := getattr(config, name)) != wanted:
            yield f"{name} must be {wanted} with train full, got {value}: {why}"

    is_vllm, urls = config.engine == "vllm", config.engine_urls or ()
    if is_vllm and not urls:
        yield "engine vllm needs engine_urls"
    if urls and not is_vllm:
        yield f"engine {config.engine} takes no engine_urls; add --engine vllm"
    yield from wrong_urls("engine_urls", urls)
    if is_vllm and config.temperature < 0.01:
        yield (
            "temperature must be at least 0.01 for vLLM, which raises a lower one to 0.01; got "
            f"{config.temperature}"
        )
    if is_vllm and config.quantize != "none":
        yield (
            "quantize must be none with engine vllm, whose servers have weights of 16 bits; got "
            f"{config.quantize}"
        )
    if config.ahead and not is_vllm:
        yield f"ahead needs an engine outside the run, vllm; got {config.engine}"

    if not config.teacher_urls:
        return
    yield from wrong_urls("teacher_urls", config.teacher_urls)
    if config.teacher_model is not None:
        yield "teacher_urls and teacher_model contradict each other; give one of them"
    for name in ("forward_weight", "reverse_weight"):
        if (weight := getattr(config, name)) is not None:
            yield f"{name} must be none with teacher_urls, whose loss takes beta; got {weight}"
    is_sampled = config.objective == "sampled_token"
    if config.temperature != 1 and (is_sampled or config.outside != "renormalize"):
        yield (
            f"temperature must be 1 with teacher_urls, got {config.temperature}: vLLM sends the "
            "teacher's log-probabilities at temperature 1, and those of another need all of its "
            "logits; set --temperature 1"
            + ("" if is_sampled else ", or --outside renormalize, which needs only those sent")
        )


def wrong_urls(name: str, urls: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with addresses of servers."""
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield f"{name} must be like http://localhost:8000, got {url}"
    if len(set(urls)) < len(urls):
        yield f"{name} must differ, got {', '.join(urls)}"


def make_config(values: dict[str, Any], preset: dict[str, Any] | None = None) -> Config:
    """Config of plain values, as YAML or the command line give them.

    Args:
        values: what the user gave. An option among them that has no effect beside the others is
            refused.
        preset: values for what is not among these; they may be left without effect.

    Raises:
        ValueError: an unknown key, a missing one, or a value that does not fit.
    """
    fields = {f.name: f for f in options()}
    every = {**(preset or {}), **values}
    for name, (default, now) in REMOVED.items():
        if str(values.get(name, default)).lower() != str(default).lower():
            raise ValueError(f"{name} is no option any more: {now}; leave it out")
        every.pop(name, None)
    for name in every:
        if name not in fields:
            raise ValueError(f"unknown key {name}{did_you_mean(str(name), fields)}")
    for name, f in fields.items():
        if f.default is dataclasses.MISSING and name not in every:
            raise ValueError(f"{name} must be given: {f.metadata['help']}")
    if isinstance(every.get("data"), list):
        every["data"] = ",".join(map(str, every["data"]))
    for name in ("model", "data"):
        if every[name] == "":
            raise ValueError(f"{name} must be given, and is empty")
    made = {name: _convert(name, value) for name, value in every.items()}
    return Config(**made, given=frozenset(values))


def field_types(name: str) -> tuple[Any, ...]:
    """The types a field accepts: that of its values, and NoneType where it may be none."""
    hint = typing.get_type_hints(Config)[name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def field_choices(name: str) -> tuple[str, ...]:
    """The words a field accepts, if it accepts only some."""
    kind = field_types(name)[0]
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _convert(name: str, value: Any) -> Any:
    """A plain value as the field's type. Text is read as on a command line: YAML itself takes 1e-5,
    without a point, for text."""
    kind, *others = field_types(name)
    choices = field_choices(name)
    is_none = str(value).lower() == "none"
    if is_none and "none" not in choices:
        if types.NoneType not in others:
            raise ValueError(f"{name} cannot be none")
        return None
    if choices:
        value = "none" if is_none else value
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value}")
        return value
    wanted, convert = _CONVERSIONS[typing.get_origin(kind) or kind]
    if name.endswith("_template"):
        wanted, convert = "text, or a list of messages that ends with a user's", _template
    try:
        return convert(value)
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        raise ValueError(f"{name} must be {wanted}, got {value!r}") from None


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError
    return value


def _words(value: Any) -> tuple[str, ...]:
    words = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
    return tuple(_of(str, word) for word in words)


def _template(value: Any) -> Template:
    if isinstance(value, str) and value.startswith("[{"):
        value = yaml.load(value, UniqueKeyLoader)
    if isinstance(value, str):
        return value
    for message in _of(list | tuple, value):
        if set(_of(dict, message)) != {"role", "content"}:
            raise ValueError
        _of(str, message["role"])
        _of(str, message["content"])
    if not value or value[-1]["role"] != "user":
        raise ValueError
    return tuple(value)


def _mapping(value: Any) -> dict[str, Any]:
    return _of(dict, yaml.load(value, UniqueKeyLoader) if isinstance(value, str) else value)


_CONVERSIONS: dict[Any, tuple[str, typing.Callable[[Any], Any]]] = {
    int: ("a whole number", lambda value: int(_of(int | str, value))),
    float: ("a number", lambda value: float(_of(int | float | str, value))),
    bool: ("true or false", lambda value: {"true": True, "false": False}[str(value).lower()]),
    str: ("text", lambda value: _of(str, value)),
    Path: ("a path", Path),
    tuple: ("a list of names", _words),
    dict: ("a mapping, {column: value}", _mapping),
}
