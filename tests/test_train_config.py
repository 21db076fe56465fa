"""Configs: presets and files, options over them, what is refused, what `--help` says."""

import re
from pathlib import Path

import pytest

from opsd_train.command_line import parse
from opsd_train.config import SECTIONS, Config, make_config, options
from opsd_train.files import read_yaml
from opsd_train.presets import find_preset, preset_names


def preset(size: str, name: str, *options: str) -> Config:
    return parse([f"qwen3-{size}-{name}", *options])


@pytest.mark.parametrize("size", ["1.7B", "4B", "8B"])
def test_presets(size):
    paper, authors = preset(size.lower(), "paper"), preset(size.lower(), "authors-2026-05")
    for config in (paper, authors):
        assert config.model == f"Qwen/Qwen3-{size}"
        assert config.batch_size == 32
        assert (config.lora_rank, config.lora_alpha, len(config.lora_targets)) == (64, 128, 7)
        assert (config.teacher, config.dtype) == ("initial", "bfloat16")
        assert config.activation_checkpointing
    assert (paper.beta, paper.entry_clip, paper.learning_rate) == (0.5, None, 2e-5)
    assert (paper.schedule, paper.warmup, paper.max_new_tokens) == ("cosine", 0.1, 2048)
    assert (paper.temperature, paper.top_p, paper.top_k) == (1.2, 1.0, 0)
    assert (paper.student_thinking, paper.teacher_thinking) == (None, None)
    assert (authors.beta, authors.entry_clip) == (0.0, 0.06 if size == "8B" else 0.05)
    assert (authors.learning_rate, authors.max_grad_norm) == (5e-6, 0.1)
    assert (authors.schedule, authors.warmup, authors.max_new_tokens) == ("constant", 0.0, 1024)
    assert (authors.temperature, authors.top_p, authors.top_k) == (1.1, 0.95, 20)
    assert (authors.student_thinking, authors.teacher_thinking) == (False, True)


def test_options_override_the_file():
    config = preset(
        "4b",
        "authors-2026-05",
        *("--model", "there", "--no-activation-checkpointing", "--entry-clip", "none"),
        *("--lora-targets", "q_proj, v_proj", "--where", "{source: [a, b], level: 3}"),
        *(
            "--teacher-thinking",
            "none",
            "--student-thinking",
            "TRUE",
            "--output-dir",
            "here",
            "--tracker",
            "none",
            "--top-p",
            "1",
        ),
    )
    assert (config.model, config.activation_checkpointing) == ("there", False)
    assert config.entry_clip is None
    assert config.lora_targets == ("q_proj", "v_proj")
    assert config.where == {"source": ["a", "b"], "level": 3}
    assert (config.student_thinking, config.teacher_thinking) == (True, None)
    assert config.output_dir == Path("here")
    assert config.top_p == 1.0


def test_a_config_survives_the_run_folder(tmp_path):
    import yaml

    config = preset("4b", "paper", "--output-dir", "here", "--where", "{a: 1}")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.as_dict()))
    assert make_config(read_yaml(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rates: 1", "unknown key learning_rates; did you mean learning_rate?"),
        ("zzz: 1", "unknown key zzz\n"),
        ("steps: [1]", "steps must be a whole number, got [1]"),
        ("steps: true", "steps must be a whole number, got True"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("schedule: linear", "schedule must be one of cosine, constant; got linear"),
        ("steps: null", "steps cannot be none"),
        ("liger: 1", "liger must be true or false, got 1"),
        ("where: [1]", "where must be a mapping"),
        ("teacher: ema\nteacher_model: x", "teacher must be initial beside a teacher_model"),
        ("overwrite: true\nresume: true", "contradict each other"),
        ("engine: vllm", "engine vllm needs engine_urls"),
        ("engine_urls: [http://a]", "engine generate takes no engine_urls; add --engine vllm"),
        ("engine: vllm\nengine_urls: a:8000, b", "engine_urls must be like http://localhost:8000"),
        ("engine: vllm\nengine_urls: http://a, http://a", "engine_urls must differ, got http://a"),
        ("engine: vllm\nengine_urls: http://a\ntemperature: 0.001", "must be at least 0.01 for v"),
        ("engine: vllm\nengine_urls: http://a\nahead: 2", "ahead must be 0 or 1, got 2"),
        ("seed: 1\nahead: 1", "ahead needs an engine outside the run, vllm; got generate"),
        ("top_p: 0", "top_p must lie in (0, 1], got 0.0"),
        ("warmup: 1", "warmup must lie in [0, 1), got 1.0"),
        ("- 1", "must hold `key: value` lines, got list"),
        ("a: [", "not YAML"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, capsys, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(
        text if text[0] in "-a" else f"model: m\n{text}\n" + "data: d\n" * ("data" not in text)
    )
    with pytest.raises(SystemExit) as end:
        parse([str(path)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error


def test_a_file_names_model_and_data(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: m\n")
    with pytest.raises(SystemExit):
        parse([str(tmp_path / "config.yaml")])
    assert "data must be given: data set: hub name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse([str(tmp_path / "none.yaml")])
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "1.5"], "beta must lie in [0, 1], got 1.5"),
        (["--beta", "none"], "a Divergence must have beta, or forward and reverse"),
        (["--beta", "0", "--forward-weight", "1"], "beta must lie strictly between 0 and 1"),
        (["--forward-weight", "inf"], "forward_weight must be finite"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--temperature", "0"], "temperature must be positive"),
        (["--learning-rate", "-1"], "learning_rate must be positive and finite, got -1.0"),
        (["--entry-clip", "0"], "entry_clip must be positive"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--max-tokens", "9"], "--max-tokens; did you mean --max-new-tokens?"),
        (["--patience", "3"], "--patience: patience is no option any more: a run takes all its s"),
        (["--steps", "many"], "steps must be a whole number, got 'many'"),
    ],
)
def test_bad_options_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# By name


def test_a_preset_is_called_by_its_name_or_by_its_path(tmp_path):
    named = parse(["qwen3-4b-paper"])
    assert parse([str(find_preset("qwen3-4b-paper"))]) == named
    copy = tmp_path / "mine.yaml"
    copy.write_text(find_preset("qwen3-4b-paper").read_text())
    assert parse([str(copy)]) == named
    assert parse(["small-world"]) == parse([]) != named


@pytest.mark.parametrize("name", ["qwen3-4b-papr", "configs/qwen3-4b-paper.yaml", "zzz"])
def test_a_wrong_name_is_answered_with_the_presets(capsys, name):
    with pytest.raises(SystemExit) as end:
        parse([name])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert f"{name}: No such file, and no preset of that name" in error
    assert ("; did you mean qwen3-4b-paper?" in error) == (name != "zzz")
    assert f"Presets: {', '.join(preset_names())}\n" in error


def test_help_has_sections_and_presets(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{name}:\n") for name in (*SECTIONS, "presets")]
    assert places == sorted(places)
    sections = dict(re.findall(r"\n(\w+):\n((?: .*\n|\n(?= ))+)", text))
    for option, section in [
        ("--dtype", "model"),
        ("--ema-decay", "teacher"),
        ("--data", "data"),
        ("--student-template", "data"),
        ("--top-k", "sampling"),
        ("--beta", "objective"),
        ("--warmup", "optimization"),
        ("--output-dir", "run"),
    ]:
        assert option in sections[section]
    for field in options():
        assert f"--{field.name.replace('_', '-')}" in text
    lines = dict(line.split(maxsplit=1) for line in sections["presets"].splitlines())
    assert list(lines) == preset_names()
    assert lines["qwen3-4b-paper"] == "Qwen3-4B, as the paper trains it."
