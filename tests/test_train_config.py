"""Configs: files, options over them, what is refused; presets as docs/training.md has them."""

import itertools
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")

from opsd_train.config import Config, make_config, parse, read_yaml
from opsd_train.step import learning_rate

CONFIGS = Path(__file__).parents[1] / "configs"


def preset(size: str, name: str, *options: str) -> Config:
    return parse([str(CONFIGS / f"qwen3-{size}-{name}.yaml"), *options])


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
        ("data: small-world", "small-world is both or neither"),
        ("overwrite: true\nresume: true", "contradict each other"),
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


def test_schedules():
    cosine = make_config(
        {"model": "m", "data": "d", "steps": 10, "warmup": 0.2, "learning_rate": 1}
    )
    rates = [learning_rate(cosine, step) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[1:]))
    constant = preset("4b", "authors-2026-05")
    assert {learning_rate(constant, step) for step in range(1, 101)} == {5e-6}
