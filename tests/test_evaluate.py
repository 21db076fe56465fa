"""`python -m opsd_train.evaluate`, of a run on a tiny Qwen3: what it samples, writes and goes on
with; and runs that evaluate on what they hold out."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_qwen3
import yaml
from fake_vllm import FakeVllm
from training_runs import (
    REPOSITORY,
    die_at_change,
    metrics,
    processes,
    run,
    run_distributed,
    shrunk,
)

from opsd_train import evaluate
from opsd_train.evaluate import read_samples
from opsd_train.grading import comparison_table


def evaluated(capsys, *arguments: object) -> str:
    evaluate.main([str(a) for a in arguments])
    return capsys.readouterr().out


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(a) for a in arguments])
    assert end.value.code in (1, 2)
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("set") / "sums.jsonl"
    rows = [{"problem": f"{i} + {i}?", "answer": 2 * i} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def options(undisturbed, problems, tmp_path) -> list[object]:
    return [
        *(undisturbed, "--on", problems, "--samples", 3, "--max-new-tokens", 8),
        *("--batch-size", 4, "--output-dir", tmp_path / "evaluation"),
    ]


def test_base_and_adapter_side_by_side(capsys, options, tmp_path, problems):
    said = evaluated(capsys, *options)
    assert f"{problems}: 5 problems, 3 samples each; T = 1, top-p 0.95, top-k off" in said
    output = tmp_path / "evaluation"
    samples = read_samples(output / "samples.jsonl")
    lines = (output / "samples.jsonl").read_text().splitlines()
    assert len(samples) == len(lines) == 2 * 5 * 3
    assert {model for _, model, *_ in samples} == {"base", "adapter"}
    assert all(a.finished or a.tokens == 8 for a in samples.values())
    texts = {
        name: [a.completion for (_, model, *_), a in samples.items() if model == name]
        for name in ("base", "adapter")
    }
    assert texts["base"] != texts["adapter"]  # the adapter is on in one of them
    assert len(set(texts["base"])) > 5

    result = json.loads((output / "scores.json").read_text())[str(problems)]
    truncated = [not a.finished for (_, model, *_), a in samples.items() if model == "base"]
    assert result["models"]["base"]["truncated"] == pytest.approx(sum(truncated) / 15)
    assert result["models"]["base"]["scores"].keys() == {"avg@3", "pass@3", "maj@3"}
    assert 0 <= result["difference"]["p"] <= 1
    assert (output / "scores.md").read_text().strip() in said

    # Again, nothing is sampled; more samples are the same ones and new ones.
    before = (output / "samples.jsonl").read_text()
    assert evaluated(capsys, *options).splitlines()[-1] == said.splitlines()[-1]
    assert (output / "samples.jsonl").read_text() == before
    evaluated(capsys, *options, "--samples", 4, "--k", 2)
    after = (output / "samples.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 2 * 5 * 4


def kill_and_evaluate(folder: Path, number: int, arguments: list[str]) -> None:
    die_at_change(number, folder)
    evaluate.main(arguments)


def test_killed_it_goes_on(capsys, options, tmp_path):
    """Whenever it is killed, also within a line, samples are those of one that never was."""
    evaluated(capsys, *options)
    output = tmp_path / "evaluation"
    whole = (output / "samples.jsonl").read_text()
    scores = (output / "scores.json").read_text()
    shutil.rmtree(output)
    arguments = [str(a) for a in options]
    for changes in (3, 6):
        process = processes().Process(target=kill_and_evaluate, args=(output, changes, arguments))
        process.start()
        process.join()
        assert process.exitcode == -9
    file = output / "samples.jsonl"
    assert 0 < len(file.read_text().splitlines()) < 30
    file.write_text(file.read_text()[:-40])
    evaluated(capsys, *options)
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())
    assert (output / "scores.json").read_text() == scores


def test_other_samples_are_not_gone_on_with(capsys, options, tmp_path, problems):
    evaluated(capsys, *options)
    error = refused(capsys, *options, "--temperature", 0.5)
    assert "were made with" in error
    assert ".temperature 1.0, not 0.5; ask for the same" in error
    assert "--output-dir" in error
    assert "made with seed 0, not 1" in refused(capsys, *options, "--seed", 1)
    # Another set is another matter.
    other = tmp_path / "other.jsonl"
    other.write_text(problems.read_text())
    evaluated(capsys, *options[:2], other, *options[3:])
    scores = json.loads((tmp_path / "evaluation" / "scores.json").read_text())
    assert scores.keys() == {str(problems), str(other)}


def test_what_does_not_fit_is_refused(capsys, undisturbed, options, folder, tmp_path):
    assert "the run has no held-out problems" in refused(capsys, undisturbed)
    assert "no benchmark amo-bensh; did you mean amo-bench?" in refused(
        capsys, undisturbed, "--on", "amo-bensh"
    )
    long = [*options, "--max-new-tokens", 38912]
    assert "ask for --max-new-tokens 19" in refused(capsys, *long)
    assert "k must lie in [1, 3]" in refused(capsys, *options, "--k", 4)
    assert "is no adapter: it has no adapter_config.json" in refused(
        capsys, *options, "--adapter", folder
    )
    assert "No such file, and no preset" in refused(capsys, tmp_path / "none")
    assert "must be at least 1" in refused(capsys, *options, "--samples", 0)

    # An adapter on other weights than it was trained on.
    moved = tmp_path / "moved"
    shutil.copytree(undisturbed, moved)
    other = tiny_qwen3.save_model_and_tokenizer(tmp_path / "model", seed=1)
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(str(folder / "model"), str(other)))
    assert "base weights are not those" in refused(capsys, moved, *options[1:])


def test_a_config_alone_is_the_base(capsys, undisturbed, options, tmp_path):
    said = evaluated(capsys, undisturbed / "config.yaml", *options[1:], "--samples", 1)
    assert "| base" in said
    assert "adapter" not in said.splitlines()[-5]
    samples = read_samples(tmp_path / "evaluation" / "samples.jsonl")
    assert {model for _, model, *_ in samples} == {"base"}


# Within a run


def test_a_run_evaluates_on_what_it_holds_out(capsys, folder, tmp_path):
    output = tmp_path / "run"
    options = ["--held-out", 5, "--eval-every", 4]
    said = run(tmp_path / "log", *shrunk(folder, output, *options))
    assert "Data: 14 problems of" in said
    assert ", 5 more held out; 1 dropped" in said
    assert "Held-out accuracy before: " in said
    rows = metrics(output)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    measured = [row for row in rows if "accuracy" in row]
    assert [row["step"] for row in measured] == [0, 4, 6]
    for row in measured:
        assert row["problems"] == 5
        assert 0 <= row["accuracy"] <= row["interval_95"][1] <= 1
        assert 0 < row["held_out_length_mean"] <= 6
        assert 0 <= row["held_out_truncated"] <= 1
    completions = [json.loads(x) for x in (output / "completions.jsonl").read_text().splitlines()]
    held_out = {row["prompt"] for row in completions if row["phase"] == "held-out"}
    trained_on = {row["prompt"] for row in completions if row["phase"] == "rollout"}
    assert len(held_out) == 5
    assert held_out.isdisjoint(trained_on)
    summary = json.loads((output / "summary.json").read_text())
    assert summary["student_after"]["accuracy"] == measured[-1]["accuracy"]

    # What is held out is what the other command evaluates by default, as the run samples.
    said = evaluated(capsys, output, "--samples", 2)
    assert "held-out: 5 problems, 2 samples each; T = 1.2, top-p 1, top-k off, up to 6" in said
    samples = read_samples(output / "evaluation" / "samples.jsonl")
    assert {a.prompt for a in samples.values()} == held_out


def test_processes_share_the_held_out_problems(folder, tmp_path):
    """Five problems, two processes: one of them has one less to do."""
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--held-out", 5, "--steps", 1, "--batch-size", 2]
    run(tmp_path / "log", *shrunk(folder, one, *options))
    run_distributed(tmp_path / "log", *shrunk(folder, two, *options, "--shard"))
    assert (one / "completions.jsonl").read_text() == (two / "completions.jsonl").read_text()
    assert metrics(one)[0] == metrics(two)[0]


def test_processes_share_samples(capsys, options, tmp_path):
    """An odd number of samples a batch, which one process cannot halve."""
    run_distributed(tmp_path / "log", *options, "--batch-size", 3, program="evaluate")
    assert (tmp_path / "log.1").read_text() == ""
    file = tmp_path / "evaluation" / "samples.jsonl"
    shared = sorted(file.read_text().splitlines())
    shutil.rmtree(file.parent)
    evaluated(capsys, *options)
    assert sorted(file.read_text().splitlines()) == shared


def test_a_report_has_the_scores(capsys, undisturbed, problems, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(undisturbed, moved)
    evaluated(capsys, moved, "--on", problems, "--samples", 1, "--max-new-tokens", 4)
    scores = (moved / "evaluation" / "scores.json").read_text()
    assert json.loads(scores).keys() == {str(problems)}
    assert '"avg@1"' in (moved / "report.html").read_text()


def test_a_run_of_an_earlier_version_goes_on(folder, undisturbed, tmp_path):
    """Options that it did not know of are as they are by default."""
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    config = [
        line
        for line in (output / "config.yaml").read_text().splitlines()
        if not line.startswith(("held_out:", "record_rollouts:"))
    ]
    (output / "config.yaml").write_text("\n".join(config) + "\n")
    run(tmp_path / "log", *shrunk(folder, output, "--resume"))
    said = run(tmp_path / "log", *shrunk(folder, output, "--resume", "--held-out", 2), status=1)
    assert "held_out was None in the run to resume, and is 2 now" in said


def test_the_table_of_the_page_is_what_was_recorded():
    """Of the small world's scores.json, kept beside the benchmarks' results."""
    recorded = json.loads((REPOSITORY / "benchmarks/results/small_world.json").read_text())
    table = comparison_table("held-out", recorded["held-out"])
    assert table in (REPOSITORY / "docs/evaluation.md").read_text()


@pytest.fixture
def of_vllm(undisturbed, folder, tmp_path):
    """A run that took its rollouts from a server, and the server."""
    with FakeVllm(folder / "model") as server:
        run_folder = shutil.copytree(undisturbed, tmp_path / "run")
        config = yaml.safe_load((run_folder / "config.yaml").read_text())
        config |= {"engine": "vllm", "engine_urls": [server.url], "ahead": 1}
        (run_folder / "config.yaml").write_text(yaml.safe_dump(config))
        yield run_folder, server


def test_by_the_engine_of_the_run_or_another(capsys, of_vllm, problems, tmp_path):
    """The same samples from a server, the run's or one that is named, and from here."""
    run_folder, server = of_vllm
    asked = ["--on", problems, "--samples", 2, "--max-new-tokens", 8, "--output-dir"]
    texts = []
    for i, engine in enumerate(([], ["--engine", "generate"], ["--engine-urls", server.url])):
        server.requests.clear()
        evaluated(capsys, run_folder, *asked, tmp_path / str(i), *engine)
        # Those of 10 samples of either model, and what a server is asked before.
        assert bool(engine[:1] != ["--engine"]) == (len(server.requests) > 20)
        samples = read_samples(tmp_path / str(i) / "samples.jsonl")
        texts.append({place: a.completion for place, a in samples.items()})
    assert len(texts[0]) == 2 * 5 * 2
    assert texts[0] == texts[1] == texts[2]


def test_a_server_has_room_for_what_is_asked(capsys, of_vllm, problems, tmp_path):
    """Not for the run's rollouts alone, which may be shorter."""
    run_folder, server = of_vllm
    server.max_model_len = 512 + 12  # the run's
    asked = ["--on", problems, "--samples", 1, "--output-dir", tmp_path / "evaluation"]
    assert "max-model-len" in refused(capsys, run_folder, *asked, "--max-new-tokens", 64)


def test_urls_without_vllm(capsys, undisturbed, problems):
    asked = ["--on", problems, "--engine", "generate", "--engine-urls", "http://localhost:1"]
    assert "engine generate takes no engine_urls" in refused(capsys, undisturbed, *asked)
