"""Options as other people give them: those that contradict each other or have no effect, those that
do not fit the model or the data, and who is named in the message."""

import json
import re

import pytest
import yaml

pytest.importorskip("peft")
pytest.importorskip("transformers")

import tiny_qwen3
from accelerate import Accelerator
from tiny_qwen3 import config, prepared

from opsd_train.command_line import parse
from opsd_train.config import make_config, without_effect
from opsd_train.data import load_problems
from opsd_train.files import read_yaml
from opsd_train.models import load_model, load_tokenizer
from opsd_train.presets import find_preset, preset_names
from opsd_train.run import run_training
from opsd_train.run.setup import check_batch, fit_lengths, make_contexts

BASE = {"model": "m", "data": "d.jsonl"}
VLLM = {"engine": "vllm", "engine_urls": ["http://a"]}
SAMPLED = {"objective": "sampled_token"}
SERVERS = {"teacher_urls": ["http://a"], "temperature": 1}

REFUSED = [
    ({"beta": 0.5, **SAMPLED}, "beta has an effect only with objective divergence"),
    ({"entry_clip": 0.05, **SAMPLED}, "entry_clip has an effect only with objective divergence"),
    ({"reverse_weight": 1, **SAMPLED}, "reverse_weight has an effect only with objective"),
    ({"advantage_clip": 5}, "advantage_clip has an effect only with objective sampled_token"),
    ({"ema_decay": 0.9}, "ema_decay has an effect only with teacher ema; it is initial"),
    ({"ema_decay": 0.9, "teacher": "live"}, "ema_decay has an effect only with teacher ema"),
    ({"teacher_top_k": 9}, "teacher_top_k has an effect only with teacher_urls"),
    ({"outside": "ignore"}, "outside has an effect only with teacher_urls"),
    ({**SERVERS, **SAMPLED, "outside": "ignore"}, "outside has an effect only with objective"),
    ({**SERVERS, "teacher_urls": "a"}, "teacher_urls must be like http://localhost:8000, got a"),
    ({**SERVERS, "teacher_model": "m"}, "teacher_urls and teacher_model contradict each other"),
    ({**SERVERS, "teacher": "live"}, "teacher must be initial beside teacher_urls"),
    ({**SERVERS, "teacher_top_k": 512}, "teacher_top_k must lie in [1, 511], got 512"),
    ({**SERVERS, "beta": None, "forward_weight": 1}, "forward_weight must be none with teacher_u"),
    ({**SERVERS, "temperature": 1.2}, "set --temperature 1, or --outside renormalize"),
    ({**SERVERS, "temperature": 1.2, **SAMPLED}, "all of its logits; set --temperature 1"),
    ({"micro_batch_size": 1, "micro_batch_tokens": 99}, "micro_batch_size has an effect only"),
    ({"engine_folder": "/tmp"}, "engine_folder has an effect only with engine vllm; it is gen"),
    ({"offload_checkpoints": True, "activation_checkpointing": False}, "offload_checkpoints needs"),
    ({"teacher_template": "{problem}"}, "teacher_template must contain {solution}"),
    ({"teacher_template": "{solution}"}, "teacher_template must contain {problem}"),
    ({"student_template": "Q: {problem} {solution}"}, "student_template contains {solution}"),
    ({"student_template": "{question}"}, "student_template has {question}, which stands for"),
    ({"student_template": "{problems}"}, "did you mean problem?"),
    ({"teacher_template": "{problem} {solution} {answer}"}, "teacher_template has {answer}"),
    ({"workspace_mib": -1}, "workspace_mib must not be negative"),
    ({"lora_targets": []}, "lora_targets must name at least one layer"),
    ({"eval_every": 5}, "eval_every has an effect only with held_out problems"),
    ({"resume": True}, "resume has an effect only with output_dir"),
    ({"patience": 50}, "patience is no option any more: a run takes all its steps"),
    ({"seed": -1}, "seed must lie in [0, 2**32)"),
    ({"data": []}, "data must be given, and is empty"),
    ({"where": "{a: 1, a: 2}"}, "where must be a mapping"),
    ({"advantage_clip": 5, "ema_decay": 0.9}, "it is divergence\nema_decay has an effect"),
]
ACCEPTED = [
    {"entry_clip": None, **SAMPLED},
    {"advantage_clip": 5, **SAMPLED},
    {"ema_decay": 0.9, "teacher": "ema"},
    {"micro_batch_tokens": 99},
    {"engine_folder": "/tmp", **VLLM},
    {"record_rollouts": 0},
    {"teacher_template": "{problem}", "teacher_model": "other"},
    {"student_template": r"{problem} \boxed{answer} \frac{a}{b} x^{n} {} {a b} \text{done}"},
    {**SERVERS, "teacher_template": "{problem}", "teacher_top_k": 511, "outside": "ignore"},
    {**SERVERS, "temperature": 1.2, "outside": "renormalize"},
    {**SERVERS, **SAMPLED, "teacher_top_k": 1},
    {"eval_every": 5, "held_out": 9},
    {"data": ["a.jsonl", "b.csv"]},
    {"lora_targets": "all-linear"},
    {"patience": None, "record_every": 10},  # as a run of an earlier version wrote them
    {"resume": True, "output_dir": "runs/a"},
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_options_without_effect_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_config({**BASE, **values})


@pytest.mark.parametrize("values", ACCEPTED)
def test_options_with_an_effect(values):
    make_config({**BASE, **values})


MESSAGES = [
    {"role": "user", "content": "{problem}"},
    {"role": "assistant", "content": "{solution}"},
    {"role": "user", "content": "Again."},
]


def test_templates_of_messages_from_files_and_from_the_command_line(tmp_path):
    asked = make_config({**BASE, "teacher_template": MESSAGES})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(asked.as_dict()))
    option = f"--teacher-template={json.dumps(MESSAGES)}"
    assert parse([str(path)]) == parse([str(path), option]) == asked
    for wrong in ([], MESSAGES[:2], [{"role": "user", "text": "{problem}{solution}"}], 3):
        with pytest.raises(ValueError, match="teacher_template must be text, or a list of messag"):
            make_config({**BASE, "teacher_template": wrong})
    with pytest.raises(ValueError, match="student_template contains"):
        make_config({**BASE, "student_template": MESSAGES})


@pytest.mark.parametrize("name", [n for n in preset_names() if n != "small-world"])
def test_a_preset_gives_way(name):
    """What it says of a divergence is no option of a run with another objective."""
    config = parse([name, "--objective", "sampled_token", "--micro-batch-tokens", "4096"])
    assert {"beta", "entry_clip", "micro_batch_size"} <= without_effect(config).keys()
    again = make_config(yaml.safe_load(yaml.safe_dump(config.as_dict())))
    assert again.as_dict() == config.as_dict()
    with pytest.raises(SystemExit):
        parse([name, "--objective", "sampled_token", "--beta", "0.5"])


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_no_option_without_effect(name):
    make_config(read_yaml(find_preset(name)))


@pytest.mark.parametrize("values", [{}, SAMPLED, {"micro_batch_tokens": 9}, VLLM, *ACCEPTED])
def test_what_a_run_folder_says_can_be_asked_for_again(values):
    config = make_config({**BASE, **values})
    again = make_config(yaml.safe_load(yaml.safe_dump(config.as_dict())))
    assert again.as_dict() == config.as_dict()


def error_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit):
        parse(list(arguments))
    return capsys.readouterr().err.partition("opsd_train: ")[2]


def test_an_error_names_what_it_came_from(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("model: m\ndata: d\nobjective: sampled_token\nsteps: 0\n")
    assert error_of(capsys, str(path)).startswith(f"{path}: steps must be at least 1")
    assert error_of(capsys, str(path), "--steps", "-1").startswith("--steps: steps must be")
    both = error_of(capsys, str(path), "--steps", "1", "--beta", "0.1")
    assert both.startswith("--beta: beta has an effect only with objective divergence")
    preset = error_of(capsys, "qwen3-4b-paper", "--learning-rate", "0")
    assert preset.startswith("--learning-rate: learning_rate must be positive")
    path.write_text("model: m\ndata: d\noverwrite: true\n")
    both = error_of(capsys, str(path), "--resume")
    assert both.startswith(f"{path}: overwrite and resume contradict")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: m\ndata: d\nbeta: 0\nsteps: 3\nbeta: 1\n",
            "beta is there twice, in lines 3 and 5",
        ),
        ("model: m\ndata: d\nwhere: {a: 1, a: 2}\n", "a is there twice, in lines 3 and 3"),
        ("", "must hold `key: value` lines, got NoneType"),
        ("model: [m]\ndata: d\n", "model must be text, got ['m']"),
    ],
)
def test_a_file_that_is_refused(tmp_path, capsys, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    error = error_of(capsys, str(path))
    assert error.startswith(str(path))
    assert message in error


def test_a_file_in_other_encodings(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_bytes("\ufeffmodel: größe\ndata: d\n".encode())
    assert parse([str(path)]).model == "größe"
    path.write_bytes("model: größe\ndata: d\n".encode("latin-1"))
    assert "must be text in UTF-8" in error_of(capsys, str(path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--learning_rate", "1e-5"],
        ["--learning_rate=1e-5"],
        ["--learning-rate=1e-5"],
        ["--learning-rate", "1e-5"],
        ["--learning_rate=1e-5", "--no-activation_checkpointing", "--output_dir", "a_b"],
    ],
)
def test_underscores(arguments):
    config = parse(["qwen3-4b-paper", *arguments])
    assert config.learning_rate == 1e-5
    assert str(config.output_dir or "a_b") == "a_b"


@pytest.mark.parametrize("tie", [True, False])
def test_all_linear_layers(folder, tmp_path, tie):
    tiny_qwen3.save_model_and_tokenizer(tmp_path / "model", tie_word_embeddings=tie)
    setup = prepared(
        folder,
        model=str(tmp_path / "model"),
        lora_targets="all-linear",
        max_problems=4,
        lora_rank=2,
    )
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, _ in setup.model.named_parameters()
               if "lora_" in name}  # fmt: skip
    default = prepared(folder, max_problems=4, lora_rank=2)
    assert adapted == set(config(folder).lora_targets)
    assert sum("lora_" in n for n, _ in default.model.named_parameters()) == sum(
        "lora_" in n for n, _ in setup.model.named_parameters()
    )


# What fits


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A model of 256 positions; prompts have up to 41 tokens."""
    path = tmp_path_factory.mktemp("short")
    tiny_qwen3.save_model_and_tokenizer(path / "model", max_position_embeddings=256)
    rows = [{"problem": f"{i}+{i}?", "solution": "It is \\boxed{2}."} for i in range(20)]
    (path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked_for(folder, **options):
    values = {"model": str(folder / "model"), "data": str(folder / "problems.jsonl")}
    templates = {"student_template": "{problem}", "teacher_template": "{problem}{solution}"}
    return make_config(values | {"dtype": "float32"} | templates | options)


def fitted(folder, **options):
    asked = asked_for(folder, **options)
    model = load_model(asked.model, asked)
    contexts = make_contexts(asked, load_tokenizer(asked.model))
    return fit_lengths(asked, model, contexts, load_problems(asked))


@pytest.mark.parametrize(
    ("options", "prompt", "new"),
    [
        ({}, 41, 215),  # the longest prompt, and the rest
        ({"max_new_tokens": 100}, 156, 100),
        ({"max_prompt_tokens": 60}, 60, 196),
        ({"max_prompt_tokens": 100, "max_new_tokens": 100}, 100, 100),
        ({"teacher_template": "{problem}{solution}" + 300 * "x"}, 128, 128),
    ],
)
def test_a_default_is_fitted_and_said(short, capsys, options, prompt, new):
    found = fitted(short, **options)
    assert (found.max_prompt_tokens, found.max_new_tokens) == (prompt, new)
    said = capsys.readouterr().out
    assert ("The model has 256 positions" in said) == (len(options) < 2)


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 256},
        {"max_prompt_tokens": 256},
        {"max_prompt_tokens": 8192, "max_new_tokens": 100},
        {"max_prompt_tokens": 156, "max_new_tokens": 101},
    ],
)
def test_what_was_asked_for_is_not_fitted(short, options):
    with pytest.raises(ValueError, match="together exceed the model's 256 positions"):
        fitted(short, **options)


def test_a_teacher_with_fewer_positions(short, folder):
    """It reads the longer prompt."""
    found = fitted(folder, teacher_model=str(short / "model"), max_problems=2)
    assert found.max_prompt_tokens + found.max_new_tokens == 256


def test_a_batch_larger_than_the_data(short):
    asked = asked_for(short, batch_size=21, dry_run=True)
    with pytest.raises(ValueError, match="batch_size must be at most the number of problems, 20"):
        run_training(asked, Accelerator(cpu=True))
    with pytest.raises(ValueError, match="got 32"):
        check_batch(asked_for(short), load_problems(asked))
